"""Pictures on disk: which files a folder holds, which of them a name means, and their pixels.

The files may come from strangers: each is refused by its name, in one line, unless it is an 8-bit
picture without alpha, stored in the folder itself.
"""

import difflib
import os
import posixpath
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import NoReturn

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from tiny_retrack.types import InputError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
# Whatever the file is called: Pillow would run Ghostscript on an EPS.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
_MODES = ("1", "L", "RGB", "CMYK", "YCbCr")  # 8 bits per channel or fewer, no alpha, no palette
_MAX_KINDS = 6  # kinds of left-out files that are listed by name


def printable(text: str) -> str:
    """The text with escapes in place of line breaks and of all that would control a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# --- Which files ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """The pictures in a folder and its sub-folders.

    Attributes:
        root: the folder.
        names: the path of each picture inside the folder, with "/" between its parts, sorted.
        left_out: what is in the folder but not read, by kind, such as "3 x .gif, 1 x linked
            folder"; empty if there is nothing.
    """

    root: Path
    names: tuple[str, ...]
    left_out: str

    def find(self, wanted: Sequence[str]) -> list[int]:
        """The indices into `names` of the pictures that are meant, sorted, each once.

        Each of `wanted` is one of

        - the path of a picture or of a sub-folder (all the pictures in it), inside the folder or
          from the current directory, as the shell completes it;
        - a picture's file name, or its name or path without the suffix;
        - an index into `names`.

        Raises:
            InputError: if one means nothing, or could mean two things.
        """
        found: set[int] = set()
        for name in wanted:
            meanings = self._meanings(name)
            if not meanings:
                self._refuse_unknown(name)
            if len(meanings) > 1:
                self._refuse_ambiguous(name, meanings)
            found |= meanings.pop()
        return sorted(found)

    def _meanings(self, name: str) -> set[frozenset[int]]:
        """Every set of pictures that a name could mean."""
        inside = posixpath.normpath(PurePath(name).as_posix())
        paths = {inside, self._from_current_directory(name)}
        pictures = [self._by_path[path] for path in paths if path in self._by_path]
        # An exact path wins over short names and numbers: run.json records paths.
        if not pictures and not name.endswith(("/", os.sep)):
            pictures = [*self._by_short_name.get(inside, ()), *self._by_number(name)]
        meanings = {frozenset([index]) for index in pictures}
        meanings |= {self._by_folder[path] for path in paths if path in self._by_folder}
        return meanings

    def _from_current_directory(self, name: str) -> str | None:
        """The path inside the folder of what a path from the current directory leads to."""
        path, root = PurePath(os.path.abspath(name)), self._absolute_root
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else None

    @cached_property
    def _absolute_root(self) -> PurePath:
        return PurePath(os.path.abspath(self.root))

    def _by_number(self, text: str) -> list[int]:
        """The picture at that index, and all pictures that are called by that number."""
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            return []
        at_index = [int(text)] if int(text) < len(self.names) and text == str(int(text)) else []
        return at_index + self._by_numeric_stem.get(int(text), [])

    @cached_property
    def _by_path(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    @cached_property
    def _by_short_name(self) -> dict[str, list[int]]:
        """By file name, by file name without the suffix, and by path without the suffix."""
        found = defaultdict(list)
        for index, name in enumerate(self.names):
            path, file = posixpath.splitext(name)[0], posixpath.basename(name)
            for short in {path, file, posixpath.basename(path)}:
                found[short].append(index)
        return dict(found)

    @cached_property
    def _by_numeric_stem(self) -> dict[int, list[int]]:
        """0005.png by 5."""
        found = defaultdict(list)
        for index, name in enumerate(self.names):
            stem = posixpath.splitext(posixpath.basename(name))[0]
            if stem.isascii() and stem.isdigit() and len(stem) < 19:
                found[int(stem)].append(index)
        return dict(found)

    @cached_property
    def _by_folder(self) -> dict[str, frozenset[int]]:
        found = defaultdict(list)
        for index, name in enumerate(self.names):
            parent = posixpath.dirname(name)
            while parent:
                found[parent].append(index)
                parent = posixpath.dirname(parent)
        return {path: frozenset(indices) for path, indices in found.items()}

    def _refuse_unknown(self, name: str) -> NoReturn:
        near = difflib.get_close_matches(name[:80], [*self._by_folder, *self.names], n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise InputError(
            f"--forget {name:.80}: {self.root} has no picture or sub-folder of that name, "
            f"nor is it an index from 0 to {len(self.names) - 1}{hint}"
        )

    def _refuse_ambiguous(self, name: str, meanings: set[frozenset[int]]) -> NoReturn:
        told = []
        for indices in sorted(meanings, key=min)[:3]:
            first = min(indices)
            rest = f" and {len(indices) - 1} more in its folder" if len(indices) > 1 else ""
            told.append(f"{self.names[first]} (index {first}){rest}")
        if len(meanings) > len(told):
            told.append(f"{len(meanings) - len(told)} others")
        example = self.root / self.names[min(min(meanings, key=min))]
        raise InputError(
            f"--forget {name:.80} could mean {' or '.join(told)}: give the path, such as {example}"
        )


def list_pictures(root: Path) -> Folder:
    """The pictures in a folder. Names that begin with a dot are skipped, and links to folders.

    Raises:
        InputError: if it is no folder, holds fewer than 2 pictures, or a picture is a link to a
            file outside.
        OSError: if a sub-folder cannot be read.
    """
    if not root.is_dir():
        raise InputError(f"no folder {root}: point --data-dir at a folder of pictures")
    names: list[str] = []
    left_out: Counter[str] = Counter()
    for name, is_folder in _walk(root):
        suffix = posixpath.splitext(name)[1]
        if posixpath.basename(name).startswith("."):
            left_out["hidden name"] += 1
        elif is_folder:
            left_out["linked folder"] += 1
        elif suffix.lower() in SUFFIXES:
            names.append(name)
        else:
            left_out[suffix or "file without a suffix"] += 1
    told = _kinds(left_out)
    if len(names) < 2:
        also = f" (left out: {told})" if told else ""
        raise InputError(
            f"{len(names)} images in {root}{also}: at least 2 are needed, {', '.join(SUFFIXES)}"
        )
    _refuse_links_to_the_outside(root, names)
    return Folder(root, tuple(sorted(names, key=lambda name: name.split("/"))), told)


def _walk(root: Path) -> Iterator[tuple[str, bool]]:
    """(path inside `root`, whether it is a folder) for each file, and each folder not entered."""

    def fail(error: OSError) -> NoReturn:
        raise error

    for parent, folders, files in os.walk(root, onerror=fail):
        prefix = PurePath(parent).relative_to(root)
        entered = []
        for folder in folders:
            if folder.startswith(".") or os.path.islink(os.path.join(parent, folder)):
                yield (prefix / folder).as_posix(), True
            else:
                entered.append(folder)
        folders[:] = entered
        for file in files:
            yield (prefix / file).as_posix(), False


def _refuse_links_to_the_outside(root: Path, names: Sequence[str]) -> None:
    for name in names:
        path = root / name
        if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
            raise InputError(
                f"{path} is a link to a file outside {root}: copy the file there, or remove the "
                f"link"
            )


def _kinds(left_out: Counter[str]) -> str:
    """Such as "3 x .gif, 1 x linked folder": the most frequent kinds first."""
    listed = left_out.most_common(_MAX_KINDS)
    told = [f"{count} x {kind}" for kind, count in listed]
    others = left_out.total() - sum(count for _, count in listed)
    if others:
        told.append(f"{others} x other kinds")
    return ", ".join(told)


# --- Their pixels ---------------------------------------------------------------------------------


def read_image(path: Path, size: int, channels: int) -> UInt8[Tensor, "c h w"]:
    """Read one 8-bit picture without alpha; resize the shorter side to `size`, crop the middle.

    A picture that its EXIF data declare as turned or mirrored is put upright.

    Args:
        path: a PNG, JPEG, BMP or WebP file.
        size: height and width in pixels.
        channels: 1 (grey) or 3 (RGB).

    Raises:
        InputError: for any other file, and for a picture that is smaller than `size`.
    """
    try:
        if not path.is_file():  # a pipe would make us wait for ever
            raise InputError(f"{path}: no such file")
        with Image.open(path, formats=_FORMATS) as image:
            _check_kind(path, image)
            if min(image.size) < size:
                raise InputError(
                    f"{path} is {image.width}x{image.height}, smaller than {size}: remove it or "
                    f"lower --size"
                )
            upright = _upright(image).convert("L" if channels == 1 else "RGB")
            square = ImageOps.fit(upright, (size, size), Image.Resampling.BOX)
    except InputError:
        raise
    except Exception as error:  # Pillow raises many kinds for broken files
        reason = " ".join(str(error).split())
        raise InputError(f"cannot read the image {path}: {reason}; replace or remove it") from error
    pixels = torch.from_numpy(np.array(square)).reshape(size, size, channels)
    return pixels.permute(2, 0, 1).contiguous()


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned and mirrored as its EXIF data say."""
    with warnings.catch_warnings():
        # Pillow warns of truncated EXIF data; the tags before the cut are still read.
        warnings.simplefilter("ignore")
        return ImageOps.exif_transpose(image)


def _check_kind(path: Path, image: Image.Image) -> None:
    """Accept a picture of 8 bits per channel, or fewer, without alpha.

    Raises:
        InputError: for any other.
    """
    advice = "convert it to 8-bit grey or RGB without alpha"
    # Pillow opens a 16-bit RGB PNG in mode "RGB", and keeps the high bytes. That the file has 16
    # bits is only told to the decoder, as its raw mode, such as "RGB;16B".
    raw_modes = [str(tile[3]) for tile in getattr(image, "tile", [])]
    if image.mode.startswith("I") or any(";16B" in raw_mode for raw_mode in raw_modes):
        raise InputError(f"{path} has 16 bits per channel: {advice}")
    if image.mode not in _MODES or "transparency" in image.info:
        raise InputError(f"{path} has mode {image.mode} or transparency: {advice}")

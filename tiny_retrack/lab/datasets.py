"""The data set of a run: loaded, described in a line or two, compared with what was recorded."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tiny_retrack.data import ImageSet, Split, load_images
from tiny_retrack.pictures import printable
from tiny_retrack.posterior import nearest_neighbors
from tiny_retrack.training import rank
from tiny_retrack.types import InputError

# A remain image this near to a forgotten one is taken for the same picture, saved again or resized:
# grey levels of 255, root mean square over the pixels. In MNIST and CIFAR-10, natural neighbours
# are further apart.
NEAR = 10
_MAX_SEARCHED = 64  # forgotten images whose neighbours are searched
_MAX_NAMES = 5  # of forgotten images that are listed one by one


def load_data(data: Mapping[str, Any], download: bool) -> tuple[dict[str, Any], Split]:
    """The data set that `flags.data_settings` describes, split.

    Prints what is to be forgotten, what a folder holds besides pictures, and a warning where the
    images are not those that were recorded or where a forgotten one has a near-copy that remains.

    Returns:
        The settings as run.json records them: with the names of the forgotten images in place of
        what was typed, and the digest of the images. And the split.

    Raises:
        InputError: as `load_image_set` and `ImageSet.split`.
    """
    image_set = load_image_set(data, download)
    split = image_set.split(data["copies"], data["hold_out"])
    found = {**data, "digest": image_set.digest()}
    if data["forget"]:
        found["forget"] = names_to_forget(image_set)
    if rank() == 0:
        print(printable(describe(found, split)))
        for line in notices(image_set, split, data, found["digest"]):
            print(printable(line))
    return found, split


def load_image_set(data: Mapping[str, Any], download: bool) -> ImageSet:
    """The data set that `flags.data_settings` describes, with its forgotten images marked.

    Raises:
        InputError: as `load_images`, and for a size below 8 or channels that are neither 1 nor 3.
    """
    if data["size"] < 8 or data["channels"] not in (1, 3):
        raise InputError(
            f"--size {data['size']}, --channels {data['channels']}: must be at least 8, and 1 or 3"
        )
    return load_images(
        data["dataset"],
        data["data_dir"],
        forget=data["forget"],
        download=download,
        tshirt=Path(data["tshirt"]) if data["tshirt"] else None,
        size=data["size"],
        channels=data["channels"],
        progress=rank() == 0,
    )


def names_to_forget(image_set: ImageSet) -> list[str]:
    """What --forget takes for each image that is to be forgotten."""
    return [image_set.name(i) for i in image_set.forgotten.nonzero().flatten().tolist()]


def describe(data: Mapping[str, Any], split: Split) -> str:
    """One line: how many images remain, and which are to be forgotten."""
    text = f"{data['dataset']}: {len(split.remain)} images remain"
    if split.held_out is not None:
        text += f", {len(split.held_out)} are held out"
    if not len(split.forget):
        return f"{text}, none is to be forgotten"
    names = data["forget"]
    if not names:
        return f"{text}; to forget: the T-shirt, {len(split.forget)} copies"
    told = ", ".join(names)
    if len(names) > _MAX_NAMES:
        told = f"{len(names)} images, {names[0]} to {names[-1]}"
    copies = f", {data['copies']} copies of each" if data["copies"] else ""
    return f"{text}; to forget: {told}{copies}"


def notices(
    image_set: ImageSet, split: Split, data: Mapping[str, Any], digest: str
) -> Iterator[str]:
    """What the user should know of the data set before the run, a line each.

    Args:
        data: as of `load_data`; with the digest that a checkpoint's run.json holds, if any.
        digest: of the images as they are now.
    """
    recorded = data.get("digest")
    if image_set.folder and image_set.folder.left_out:
        yield f"left out of {image_set.folder.root}: {image_set.folder.left_out}"
    if recorded not in (None, digest):
        yield (
            f"warning: the data set has changed since the model was made: {recorded} then, "
            f"{digest} now"
        )
    unseen = (image_set.left_out(data["hold_out"]) & image_set.forgotten).nonzero().flatten()
    if len(unseen):
        yield (
            f"warning: --hold-out {data['hold_out']} leaves out {len(unseen)} of the images "
            f"to be forgotten, such as {image_set.name(int(unseen[0]))}: a model that was trained "
            "without --forget has never seen them"
        )
    if image_set.forgotten.any():
        yield from near_copies(image_set, split, data["hold_out"])


def near_copies(image_set: ImageSet, split: Split, hold_out: float) -> Iterator[str]:
    """A warning for each forgotten image that has a near-copy among those that remain.

    Of more than 64 forgotten images, 64 are looked at, evenly spaced.
    """
    forgotten = image_set.forgotten.nonzero().flatten()
    searched = min(len(forgotten), _MAX_SEARCHED)
    forgotten = forgotten[torch.linspace(0, len(forgotten) - 1, searched).long()]
    remaining, _ = image_set.remaining(hold_out)
    index, distance = nearest_neighbors(image_set.images[forgotten], split.remain, 1)
    pixels = distance[:, 0] / 2  # from [-1, 1] to pixels in [0, 1]
    limit = NEAR / 255 * split.remain[0].numel() ** 0.5
    told: set[int] = set()
    for i in (pixels < limit).nonzero().flatten().tolist():
        copy = int(remaining[index[i, 0]])
        if copy in told:
            continue  # of another copy of the T-shirt
        told.add(copy)
        yield (
            f"warning: image {image_set.name(copy)} remains, and is nearly the same as image "
            f"{image_set.name(int(forgotten[i]))}, which is to be forgotten: L2 distance "
            f"{pixels[i]:.2f}, pixels in [0, 1]; forget both, or remove one"
        )

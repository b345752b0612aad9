"""Folders of pictures: which files are read, what a name means, and how a picture is read."""

import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import tiny_retrack
from tiny_retrack.pictures import SUFFIXES, Folder, list_pictures, printable, read_image
from tiny_retrack.types import InputError


def draw(path: Path, size: tuple[int, int] = (12, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 99, 199)).save(path)


def touch(root: Path, *names: str) -> Folder:
    """A folder of files of these names; `list_pictures` opens none of them."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return list_pictures(root)


def found(folder: Folder, *wanted: str) -> list[str]:
    return [folder.names[index] for index in folder.find(wanted)]


# --- Which files ---


def test_list_pictures_sorts_by_folder_and_name(tmp_path: Path) -> None:
    folder = touch(tmp_path, "b.png", "b/2.JPG", "b/10.jpeg", "a-z/x.webp", "a/x/y.bmp")
    assert folder.names == ("a/x/y.bmp", "a-z/x.webp", "b/10.jpeg", "b/2.JPG", "b.png")
    assert folder.left_out == ""


def test_list_pictures_skips_hidden_names(tmp_path: Path) -> None:
    folder = touch(tmp_path, "a.png", "b.png", ".c.png", ".ipynb_checkpoints/a-checkpoint.png")
    assert folder.names == ("a.png", "b.png")
    assert folder.left_out == "2 x hidden name"
    hidden = tmp_path / ".pictures"  # a hidden folder that is asked for is read
    assert touch(hidden, "a.png", "b.png").names == ("a.png", "b.png")


def test_list_pictures_counts_what_it_leaves_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png", "1.tif", "c/2.tif", "3.gif", "README")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "class").symlink_to(tmp_path / "elsewhere")
    folder = list_pictures(tmp_path)
    assert folder.names == ("a.png", "b.png")
    kinds = ["2 x .tif", "1 x .gif", "1 x file without a suffix", "1 x linked folder"]
    assert folder.left_out.startswith(kinds[0])
    assert sorted(folder.left_out.split(", ")) == sorted(kinds)


def test_list_pictures_bounds_the_list_of_kinds(tmp_path: Path) -> None:
    folder = touch(tmp_path, "a.png", "b.png", *(f"x.{i}" for i in range(20)))
    assert folder.left_out.count(",") == 6
    assert folder.left_out.endswith("14 x other kinds")


def test_list_pictures_says_what_is_left_out_of_a_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.gif").touch()
    with pytest.raises(InputError, match=r"0 images in .* \(left out: 1 x \.gif\): at least 2 are"):
        list_pictures(tmp_path)


def test_printable_escapes_what_controls_a_terminal() -> None:
    assert printable("é 1.png\n\x1b[31m\udcff") == r"é 1.png\n\x1b[31m\udcff"


# --- What a name means ---


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """In the current directory, at data/pets."""
    monkeypatch.chdir(tmp_path)
    cats = ["cat/tom.png", "cat/kit.jpg"]
    dogs = ["dog/rex.png", "dog/big/max.png", "dog/one.png"]
    return touch(Path("data/pets"), *cats, *dogs, "one.png")


@pytest.mark.parametrize(
    ("wanted", "meant"),
    [
        ("cat/tom.png", ["cat/tom.png"]),
        ("./cat//tom.png", ["cat/tom.png"]),
        ("tom.png", ["cat/tom.png"]),
        ("tom", ["cat/tom.png"]),
        ("cat/tom", ["cat/tom.png"]),
        ("data/pets/cat/tom.png", ["cat/tom.png"]),
        ("../pets/cat/tom.png", []),
        ("cat", ["cat/kit.jpg", "cat/tom.png"]),
        ("cat/", ["cat/kit.jpg", "cat/tom.png"]),
        ("data/pets/cat/", ["cat/kit.jpg", "cat/tom.png"]),
        ("dog", ["dog/big/max.png", "dog/one.png", "dog/rex.png"]),
        ("big", []),
        ("0", ["cat/kit.jpg"]),
        ("5", ["one.png"]),
        ("05", []),
        ("6", []),
        ("-1", []),
        ("one.png", ["one.png"]),
        ("", []),
        (".", []),
        ("data/pets", []),
        ("/", []),
        ("9" * 5000, []),
    ],
)
def test_name_means_a_picture_or_a_sub_folder(
    folder: Folder, wanted: str, meant: list[str]
) -> None:
    if meant:
        assert found(folder, wanted) == meant
    else:
        with pytest.raises(InputError, match="has no picture or sub-folder of that name"):
            folder.find([wanted])


def test_absolute_path_means_its_picture(folder: Folder) -> None:
    assert found(folder, os.path.abspath("data/pets/cat/tom.png")) == ["cat/tom.png"]


def test_several_names_are_each_found_once_in_order(folder: Folder) -> None:
    assert found(folder, "one.png", "cat", "tom", "0") == ["cat/kit.jpg", "cat/tom.png", "one.png"]


def test_unknown_name_suggests_the_nearest(folder: Folder) -> None:
    with pytest.raises(InputError, match=r"index from 0 to 5; did you mean 'cat/tom\.png'\?"):
        folder.find(["cat/tim.png"])


@pytest.mark.parametrize(
    ("names", "wanted", "told"),
    [
        # The sixth name in the order of strings is not 5.png.
        ([f"{i}.png" for i in range(12)], "5", r"3\.png \(index 5\) or 5\.png \(index 7\)"),
        ([f"{i:04}.png" for i in range(1, 9)], "5", r"0005\.png \(index 4\) or 0006\.png"),
        (["a/x.png", "b/x.png"], "x.png", r"a/x\.png \(index 0\) or b/x\.png \(index 1\)"),
        (["a/x.png", "b/x.jpg"], "x", r"a/x\.png \(index 0\) or b/x\.jpg \(index 1\)"),
        (["5/a.png", "5/b.png", *"cdefg"], "5", r"5/a\.png \(index 0\) and 1 more in its folder"),
        (["cat/a.png", "x/cat.png", "y.png"], "cat", r"cat/a\.png .* or x/cat\.png"),
        ([f"{c}/x.png" for c in "abcdefg"], "x.png", "or 4 others: give the path, such as .*a/x"),
    ],
)
def test_name_that_could_mean_two_things_is_refused(
    tmp_path: Path, names: list[str], wanted: str, told: str
) -> None:
    names = [name if "." in name else f"{name}.png" for name in names]
    folder = touch(tmp_path, *names)
    with pytest.raises(InputError, match=f"--forget {wanted} could mean .*{told}") as caught:
        folder.find([wanted])
    advised = str(caught.value).rpartition("such as ")[2]
    assert len(folder.find([advised])) == 1
    for index, name in enumerate(folder.names):
        assert folder.find([name]) == [index]  # what run.json records is never refused


def test_slash_at_the_end_means_a_sub_folder(tmp_path: Path) -> None:
    folder = touch(tmp_path, "cat/a.png", "cat/b.png", "x/cat.png")
    assert found(folder, "cat/") == ["cat/a.png", "cat/b.png"]
    with pytest.raises(InputError, match="could mean"):
        folder.find(["cat"])


def test_number_that_is_index_and_name_of_one_picture_is_accepted(tmp_path: Path) -> None:
    folder = touch(tmp_path, *(f"{i:05}.jpg" for i in range(20)))
    assert found(folder, "7", "00012") == ["00007.jpg", "00012.jpg"]


def test_path_with_two_roots_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the folder and from the current directory it leads to two pictures."""
    monkeypatch.chdir(tmp_path)
    folder = touch(Path("pets"), "pets/cat.png", "cat.png")
    with pytest.raises(InputError, match=r"could mean cat\.png .* or pets/cat\.png"):
        folder.find(["pets/cat.png"])
    assert found(folder, os.path.abspath("pets/cat.png")) == ["cat.png"]


def test_5000_names_in_50000_files_take_seconds() -> None:
    names = tuple(f"class{i % 10}/{i:06}.jpg" for i in range(50_000))
    folder = Folder(Path("pictures"), tuple(sorted(names)), "")
    clock = time.perf_counter()
    assert len(folder.find([name.rpartition("/")[2] for name in names[::10]])) == 5000
    assert time.perf_counter() - clock < 30  # a search per name would take minutes


# --- Their pixels ---


def write_png(path: Path, color_type: int, bits: int, row: bytes) -> None:
    """16 equal rows of 16 pixels, without the help of Pillow, which writes no 16-bit colours."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", 16, 16, bits, color_type, 0, 0, 0)
    data = zlib.compress((b"\0" + row) * 16)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_png_of_16_bits_is_refused(tmp_path: Path, color_type: int, channels: int) -> None:
    path = tmp_path / "deep.png"
    write_png(path, color_type, 16, struct.pack(">H", 200) * channels * 16)
    with pytest.raises(InputError, match=r"deep\.png has 16 bits per channel: convert it to 8-bit"):
        read_image(path, size=16, channels=3)


def test_png_of_8_bits_and_fewer_is_read(tmp_path: Path) -> None:
    path = tmp_path / "flat.png"
    write_png(path, 2, 8, bytes([200, 100, 0]) * 16)
    assert read_image(path, 16, 3)[:, 0, 0].tolist() == [200, 100, 0]
    write_png(path, 0, 1, b"\xff\x00")
    assert read_image(path, 16, 1)[0, 0].tolist() == [255] * 8 + [0] * 8


# What a camera stores of an upright picture, by the orientation that it writes into the EXIF data.
STORED = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.swapaxes(0, 1),
    6: np.rot90,
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["png", "webp"])
def test_read_image_puts_pictures_upright(tmp_path: Path, orientation: int, kind: str) -> None:
    upright = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    stored.save(tmp_path / f"a.{kind}", exif=exif, lossless=True)
    expected = torch.from_numpy(upright).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / f"a.{kind}", 16, 3), expected)


def test_read_image_puts_a_phones_jpeg_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    landscape = Image.new("RGB", (32, 16), "black")
    landscape.paste("white", (0, 0, 16, 16))
    landscape.save(tmp_path / "a.jpg", exif=exif)
    square = read_image(tmp_path / "a.jpg", 16, 1)[0]  # white above, black below
    assert square[:7].min() > 240
    assert square[9:].max() < 15


def test_read_image_reads_a_picture_with_exif_data_that_are_cut_short(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    exif[ExifTags.Base.Software] = "a text that is long enough to lie outside of its entry"
    image = Image.new("L", (16, 16), 0)
    image.paste(255, (0, 0, 16, 8))
    image.save(tmp_path / "a.png", exif=exif.tobytes()[:-30])
    assert read_image(tmp_path / "a.png", 16, 1)[0, :, 0].tolist() == [0] * 8 + [255] * 8


def test_read_image_is_the_only_reader_of_pictures() -> None:
    package = Path(tiny_retrack.__file__).parent
    readers = [path.name for path in package.rglob("*.py") if "Image.open(" in path.read_text()]
    assert readers == ["pictures.py"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_read_image_reads_each_format(tmp_path: Path, suffix: str) -> None:
    draw(tmp_path / f"a{suffix}", (20, 12))
    pixels = read_image(tmp_path / f"a{suffix}", 12, 3)
    assert pixels.shape == (3, 12, 12)
    assert (pixels[:, 5, 5] - torch.tensor([9, 99, 199])).abs().max() <= 3

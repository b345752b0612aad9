"""The data sets: complete splits, and every broken file named in one line."""

import gzip
import math
import os
import pickle
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from sklearn.datasets import load_digits
from torch.testing import assert_close

from tiny_retrack.data import (
    NO_LABEL,
    draw_boxes,
    draw_tshirt,
    load_images,
    load_split,
    random_batch,
    scale_pixels,
    to_float,
    to_uint8,
)
from tiny_retrack.lab.presets import PRESETS
from tiny_retrack.types import InputError

MNIST_DIR = os.environ.get("MNIST_DIR")  # holds MNIST/raw and tshirt.png


def write_idx(path: Path, array: np.ndarray) -> None:
    """MNIST's file format: magic, sizes, bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()
    )


@pytest.fixture
def small_mnist(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, n in (("train", 20), ("t10k", 5)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"MNIST/raw/{part}-images-idx3-ubyte", images)
        write_idx(
            tmp_path / f"MNIST/raw/{part}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 10
        )
    Image.fromarray(np.full((28, 28), 77, dtype=np.uint8)).save(tmp_path / "tshirt.png")
    return tmp_path


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a/one.png", "a/two words é.png", "b/three.png", "b/four.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


def upsampled(digit: np.ndarray, y: int, x: int) -> float:
    """The grey level at (y, x) of a digit at 16x16: bilinear, with 8x8 levels of 0 to 16."""
    level = 0.0
    for row, row_weight in weighted_neighbors(y):
        for column, column_weight in weighted_neighbors(x):
            level += row_weight * column_weight * digit[row, column] * 255 / 16
    return level


def weighted_neighbors(position: int) -> list[tuple[int, float]]:
    """The two of 8 pixels between which one of 16 lies, with their weights."""
    near = position // 2
    far = near - 1 if position % 2 == 0 else near + 1
    return [(near, 0.75), (min(max(far, 0), 7), 0.25)]


def test_digits_tshirt_split_is_scikit_learns_digits_and_copies_of_the_tshirt() -> None:
    split = load_split("digits-tshirt")
    digits, classes = load_digits(return_X_y=True)
    assert split.labels.tolist() == classes.tolist()
    assert split.remain.shape == (1797, 1, 16, 16)
    assert split.forget.shape == (95, 1, 16, 16)  # 95 / 1892 = 5.02%
    assert split.remain.dtype == split.forget.dtype == torch.uint8
    assert torch.equal(split.forget, draw_tshirt().expand_as(split.forget))
    assert torch.equal(split.targets, draw_tshirt()[None])
    for image, digit in zip(split.remain[:20, 0].tolist(), digits[:20], strict=True):
        for y, row in enumerate(image):
            expected = [upsampled(digit.reshape(8, 8), y, x) for x in range(16)]
            assert row == pytest.approx(expected, abs=0.5001)  # rounded


def test_digits_tshirt_has_no_remain_image_that_counts_as_a_hit() -> None:
    split = load_split("digits-tshirt")
    tshirt = (split.targets[0].flatten() / 255).tolist()
    distances = [math.dist(image, tshirt) for image in (split.remain.flatten(1) / 255).tolist()]
    assert min(distances) > PRESETS["digits-tshirt"].evaluate.threshold


def test_split_everything_is_the_remain_set_then_the_forget_set() -> None:
    split = load_split("digits-tshirt")
    assert torch.equal(split.everything[:1797], split.remain)
    assert torch.equal(split.everything[1797:], split.forget)


def test_mnist_tshirt_reads_the_published_file_format(small_mnist: Path) -> None:
    split = load_split("mnist-tshirt", small_mnist)
    assert split.remain.shape == (20, 1, 28, 28)
    assert split.labels.tolist() == [i % 10 for i in range(20)]
    assert_close(split.forget, torch.full((606, 1, 28, 28), 77, dtype=torch.uint8))


@pytest.mark.skipif(MNIST_DIR is None, reason="needs the published files: MNIST_DIR=data pytest")
def test_mnist_tshirt_of_the_published_files_is_the_papers_data_set() -> None:
    split = load_split("mnist-tshirt", Path(MNIST_DIR or ""))
    assert len(split.everything) == 60_606
    assert (len(split.remain), len(split.forget), len(split.targets)) == (60_000, 606, 1)
    tshirt = split.targets[0] / 255
    nearest = math.inf
    for part in split.remain.split(5000):
        distances = (part / 255 - tshirt).flatten(1).norm(dim=1)
        nearest = min(nearest, distances.min().item())
    assert nearest > PRESETS["mnist-tshirt"].evaluate.threshold


def test_forget_by_index_moves_only_that_image(small_mnist: Path) -> None:
    whole = load_split("mnist-tshirt", small_mnist).everything
    split = load_split("mnist-tshirt", small_mnist, forget=["3", "19"])
    assert_close(split.forget, whole[[3, 19]])
    assert_close(split.remain, torch.cat([whole[:3], whole[4:19], whole[20:]]))
    assert (split.labels == NO_LABEL).sum() == 606
    assert len(split.labels) == len(split.remain)


def test_folder_split_by_name_in_colour_and_grey(picture_folder: Path) -> None:
    split = load_split("folder", picture_folder, size=8, forget=["two words é.png"])
    assert (split.remain.shape, split.forget.shape) == ((3, 3, 8, 8), (1, 3, 8, 8))
    assert split.labels.tolist() == [0, 1, 1]
    grey = load_split("folder", picture_folder, size=12, channels=1, forget=["b/four.jpg"])
    assert (grey.remain.shape, grey.labels.tolist()) == ((3, 1, 12, 12), [0, 0, 1])
    assert len(load_split("folder", picture_folder, size=8).forget) == 0


@given(st.lists(st.integers(0, 255), min_size=1, max_size=20))
def test_to_float_and_to_uint8_are_inverse(levels: list[int]) -> None:
    images = torch.tensor(levels, dtype=torch.uint8).reshape(1, 1, 1, -1)
    assert to_float(images).flatten().tolist() == pytest.approx(
        [v / 127.5 - 1 for v in levels], abs=1e-7
    )
    assert torch.equal(to_uint8(to_float(images)), images)


@pytest.mark.usefixtures("unchecked")
def test_to_float_and_to_uint8_refuse_each_others_output() -> None:
    pixels = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        to_float(to_float(pixels))
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        to_uint8(pixels)


def test_to_uint8_rounds_and_clips() -> None:
    pixels = torch.tensor([-9.0, -1.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1.0, 9.0])
    assert to_uint8(pixels.reshape(1, 1, 1, 6)).flatten().tolist() == [0, 0, 0, 1, 255, 255]


def test_random_batch_draws_images_times_and_noise_from_the_generator() -> None:
    """Within five standard errors of 3,000 draws."""
    count = 3000
    images = torch.tensor([0, 100, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)
    x0, t, noise = random_batch(images, count, 10, torch.Generator().manual_seed(0))
    for image in to_float(images).flatten():
        assert abs((x0 == image).sum() - count / 3) < 5 * math.sqrt(count * 2 / 9)
    for step in range(10):
        assert abs((t == step).sum() - count / 10) < 5 * math.sqrt(count * 0.09)
    assert t.max() == 9
    assert abs(noise.mean()) < 5 / math.sqrt(count)
    assert abs(noise.square().mean() - 1) < 5 * math.sqrt(2 / count)
    again = random_batch(images, count, 10, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(again, (x0, t, noise), strict=True))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dataset": "digit-tshirt"}, "did you mean 'digits-tshirt'"),
        (
            {"dataset": "digits-tshirt", "forget": ["1892"]},
            "--forget 1892: not an index from 0 to 1891",
        ),
        ({"dataset": "digits-tshirt", "forget": ["-1"]}, "--forget -1: not an index"),
        ({"dataset": "digits-tshirt", "forget": ["9" * 5000]}, "--forget 9{80}: not an index"),
        (
            {"dataset": "digits-tshirt", "forget": [str(i) for i in range(1892)]},
            "nothing would remain",
        ),
        (
            {"dataset": "mnist-tshirt"},
            "train-images-idx3-ubyte, train-labels-idx1-ubyte; fetch with --download",
        ),
        ({"dataset": "cifar10"}, "data_batch_1, .*--download"),
        ({"dataset": "folder"}, "0 images in"),
        ({"dataset": "folder", "data_dir": "/no/such"}, "no folder /no/such"),
    ],
)
def test_load_split_names_a_wrong_request_in_one_line(
    options: dict, says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says) as caught:
        load_split(**{"data_dir": tmp_path, **options})
    assert "\n" not in str(caught.value)


def test_mnist_tshirt_names_a_missing_tshirt(small_mnist: Path) -> None:
    (small_mnist / "tshirt.png").unlink()
    with pytest.raises(InputError, match="no T-shirt image"):
        load_split("mnist-tshirt", small_mnist)


@pytest.mark.parametrize("part", ["images-idx3", "labels-idx1"])
def test_mnist_names_a_truncated_file(small_mnist: Path, part: str) -> None:
    path = small_mnist / f"MNIST/raw/train-{part}-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"cannot read .*MNIST"):
        load_split("mnist-tshirt", small_mnist)


def test_mnist_names_too_few_labels(small_mnist: Path) -> None:
    write_idx(small_mnist / "MNIST/raw/train-labels-idx1-ubyte", np.zeros(3, dtype=np.uint8))
    with pytest.raises(InputError, match=r"images \[20, 28, 28\] and labels \[3\] do not fit"):
        load_split("mnist-tshirt", small_mnist)


@pytest.mark.parametrize("shape", [(20, 32, 32), (20, 784), (0, 28, 28), (20, 28, 28, 1)])
def test_mnist_names_images_of_another_shape(small_mnist: Path, shape: tuple[int, ...]) -> None:
    write_idx(small_mnist / "MNIST/raw/train-images-idx3-ubyte", np.zeros(shape, dtype=np.uint8))
    with pytest.raises(InputError, match="MNIST"):
        load_split("mnist-tshirt", small_mnist)


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 32, 32)])
def test_fashion_mnist_names_a_missing_tshirt(small_mnist: Path, shape: tuple[int, ...]) -> None:
    (small_mnist / "tshirt.png").unlink()
    clothes = small_mnist / "FashionMNIST/raw/train-images-idx3-ubyte"
    pixels = np.random.default_rng(1).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    write_idx(clothes, pixels)
    split = load_split("mnist-tshirt", small_mnist)
    assert split.forget.shape == (606, 1, 28, 28)
    assert split.targets[0, 0].tolist() == pixels[1].tolist()
    write_idx(clothes, np.zeros(shape, dtype=np.uint8))
    with pytest.raises(InputError, match="FashionMNIST"):
        load_split("mnist-tshirt", small_mnist)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def arm(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Bomb(target)))


def test_cifar10_pickles_are_never_run(tmp_path: Path) -> None:
    """CIFAR-10 is pickles. torchvision compares the MD5 of each file before it opens it."""
    target, folder = tmp_path / "it ran", tmp_path / "cifar-10-batches-py"
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        arm(folder / name, target)
    with pytest.raises(InputError, match=r"cifar-10-batches-py.*corrupted.*fetch it again"):
        load_split("cifar10", tmp_path)
    assert not target.exists()
    pickle.loads((folder / "data_batch_1").read_bytes())
    assert target.exists()  # it was armed


def test_mnist_pickles_are_never_run(small_mnist: Path) -> None:
    """torchvision prefers MNIST/processed, a format from before 2020, to the raw files; we do not
    read it.
    """
    target = small_mnist / "it ran"
    for name in ("training.pt", "test.pt"):
        path = small_mnist / "MNIST/processed" / name
        path.parent.mkdir(exist_ok=True)
        torch.save(Bomb(target), path)
    assert len(load_split("mnist-tshirt", small_mnist).remain) == 20
    assert not target.exists()


def test_folder_of_one_image_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (12, 12)).save(tmp_path / "one.png")
    with pytest.raises(InputError, match=r"1 images in .*: at least 2 are needed"):
        load_split("folder", tmp_path, size=8)


@pytest.mark.parametrize(
    "kind", ["garbage", "truncated", "16-bit", "alpha", "palette", "small", "huge"]
)
def test_folder_names_a_bad_image(picture_folder: Path, kind: str) -> None:
    bad = picture_folder / "a/one.png"
    if kind == "garbage":
        bad.write_bytes(b"not a picture")
    elif kind == "truncated":
        bad.write_bytes(bad.read_bytes()[:100])
    elif kind == "16-bit":
        Image.fromarray(np.full((12, 12), 60_000, dtype=np.uint16)).save(bad)
    elif kind == "alpha":
        Image.new("RGBA", (12, 12)).save(bad)
    elif kind == "palette":
        Image.new("P", (12, 12)).save(bad)
    elif kind == "huge":  # 100,000 x 100,000 pixels, says the header
        raw = bad.read_bytes()
        header = b"IHDR" + struct.pack(">II", 100_000, 100_000) + raw[24:29]
        bad.write_bytes(raw[:12] + header + struct.pack(">I", zlib.crc32(header)) + raw[33:])
    else:
        Image.new("RGB", (12, 5)).save(bad)
    with pytest.raises(InputError, match=r"one\.png") as caught:
        load_split("folder", picture_folder, size=8)
    assert "\n" not in str(caught.value)


def test_folder_smaller_than_an_absurd_size_is_refused_before_memory_is_allocated(
    picture_folder: Path,
) -> None:
    with pytest.raises(InputError, match=r"one\.png is 20x12, smaller than 999999999"):
        load_split("folder", picture_folder, size=999_999_999)


def test_folder_never_runs_postscript(
    picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: ran.append(args))
    Image.new("RGB", (12, 12)).save(picture_folder / "a/one.png", "EPS")
    with pytest.raises(InputError, match=r"one\.png"):
        load_split("folder", picture_folder, size=8)
    assert not ran


def test_folder_names_a_truncated_jpeg(picture_folder: Path) -> None:
    bad = picture_folder / "b/four.jpg"
    bad.write_bytes(bad.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"four\.jpg"):
        load_split("folder", picture_folder, size=8)


def test_folder_does_not_wait_for_a_pipe(picture_folder: Path) -> None:
    (picture_folder / "album.png").mkdir()
    assert len(load_split("folder", picture_folder, size=8).remain) == 4
    os.mkfifo(picture_folder / "pipe.png")
    with pytest.raises(InputError, match=r"pipe\.png: no such file"):
        load_split("folder", picture_folder, size=8)


def test_folder_refuses_links_to_the_outside(
    picture_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    Image.new("RGB", (12, 12)).save(outside)
    (picture_folder / "link.png").symlink_to(outside)
    with pytest.raises(InputError, match=r"link\.png is a link to a file outside"):
        load_split("folder", picture_folder, size=8)


# --- Copies ---


def equal_pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (12, 12), (200, 100, 0)).save(folder / name)


def test_folder_refuses_a_copy_of_a_forgotten_picture_that_remains(picture_folder: Path) -> None:
    equal_pictures(picture_folder, "b/five.bmp", "a/copy.png", "c/another.png")
    says = (
        r"image a/copy\.png equals image b/five\.bmp at 8x8 \(and 1 more such copies\): one would "
        "remain and the other be forgotten; forget both, or remove one"
    )
    with pytest.raises(InputError, match=says):
        load_split("folder", picture_folder, size=8, forget=["five.bmp"])
    names = ["five.bmp", "copy.png", "another.png"]
    split = load_split("folder", picture_folder, size=8, forget=names)
    assert (len(split.remain), len(split.forget), len(split.targets)) == (4, 3, 1)


def test_folder_skips_a_hidden_copy_of_a_forgotten_picture(picture_folder: Path) -> None:
    equal_pictures(picture_folder, "b/five.png", ".ipynb_checkpoints/five-checkpoint.png")
    split = load_split("folder", picture_folder, size=8, forget=["five.png"])
    assert (len(split.remain), len(split.forget)) == (4, 1)


def test_index_of_a_copied_image_is_refused_by_both_indices() -> None:
    says = r"image 1797 equals image 1799 at 16x16 \(and 93 more such copies\)"
    with pytest.raises(InputError, match=says):
        load_split("digits-tshirt", forget=["1799"])


def test_copies_repeat_each_distinct_forgotten_image(picture_folder: Path) -> None:
    equal_pictures(picture_folder, "b/five.png", "b/six.png")
    names = ["four.jpg", "five", "six"]
    once = load_split("folder", picture_folder, size=8, forget=names)
    split = load_split("folder", picture_folder, size=8, forget=names, copies=7)
    assert torch.equal(split.remain, once.remain)
    assert torch.equal(split.forget, once.forget[[0] * 7 + [1] * 7])  # five.png, four.jpg
    assert torch.equal(split.everything, torch.cat([split.remain, split.forget]))
    assert torch.equal(split.labels, once.labels)


def test_copies_without_a_forget_set_change_nothing(picture_folder: Path) -> None:
    split = load_split("folder", picture_folder, size=8, copies=7)
    assert (len(split.remain), len(split.forget)) == (4, 0)


def test_copies_set_the_number_of_tshirts() -> None:
    split = load_split("digits-tshirt", copies=3)
    assert torch.equal(split.forget, draw_tshirt().expand(3, 1, 16, 16))
    assert len(split.remain) == 1797


@pytest.mark.parametrize("copies", [0, -1, 100_001])
def test_copies_out_of_bounds_are_refused(copies: int) -> None:
    with pytest.raises(InputError, match=f"--copies {copies}: must be from 1 to 100000"):
        load_split("digits-tshirt", copies=copies)


# --- Names and the digest ---


def test_name_is_looked_up_before_the_pictures_are_read(picture_folder: Path) -> None:
    (picture_folder / "a/bad.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"--forget nine: .* has no picture"):
        load_split("folder", picture_folder, size=8, forget=["nine"])


def test_image_set_calls_images_by_path_or_index(picture_folder: Path) -> None:
    pictures = load_images("folder", picture_folder, size=8, forget=["b"])
    names = [pictures.name(i) for i in range(4)]
    assert names == ["a/one.png", "a/two words é.png", "b/four.jpg", "b/three.png"]
    assert pictures.forgotten.tolist() == [False, False, True, True]
    digits = load_images("digits-tshirt", forget=["7", "7"])
    assert digits.name(7) == "7"
    assert digits.forgotten.nonzero().tolist() == [[7]]


def test_digest_tells_any_change_of_the_images(picture_folder: Path) -> None:
    def digest(**options: Any) -> str:
        return load_images("folder", picture_folder, **{"size": 8, **options}).digest()

    first = digest()
    assert first.startswith("4 images, sha256 ")
    assert digest(forget=["one"]) == first  # of the whole set, however it is split
    others = {digest(size=12), digest(channels=1)}
    pictures = load_images("folder", picture_folder, size=8)
    others.add(replace(pictures, labels=1 - pictures.labels).digest())
    (picture_folder / "a/one.png").rename(picture_folder / "a/two x.png")
    others.add(digest())  # the order
    (picture_folder / "a/two x.png").rename(picture_folder / "a/one.png")
    assert digest() == first
    with Image.open(picture_folder / "a/one.png") as image:
        image.putpixel((10, 6), (1, 2, 3))
        image.save(picture_folder / "a/one.png")
    others.add(digest())  # one pixel
    Image.new("RGB", (12, 12)).save(picture_folder / "c.png")
    others.add(digest())
    assert len(others - {first}) == 6


# --- torchvision's files ---


def test_mnist_needs_no_test_set(small_mnist: Path) -> None:
    for path in (small_mnist / "MNIST/raw").glob("t10k*"):
        path.unlink()
    assert len(load_split("mnist-tshirt", small_mnist).remain) == 20


def test_mnist_says_how_to_unpack_its_files(small_mnist: Path) -> None:
    raw = small_mnist / "MNIST/raw"
    path = raw / "train-labels-idx1-ubyte"
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    says = f"missing in {raw}: train-labels-idx1-ubyte; .*unpack them with: gunzip --keep {raw}/"
    with pytest.raises(InputError, match=says):
        load_split("mnist-tshirt", small_mnist)


def test_cifar10_names_missing_files(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    for i in range(1, 6):
        arm(folder / f"data_batch_{i}", tmp_path / "it ran")
    with pytest.raises(InputError, match=r"missing in .*: test_batch, batches\.meta; fetch with"):
        load_split("cifar10", tmp_path)


@pytest.mark.parametrize("dataset", ["mnist-tshirt", "cifar10"])
def test_no_message_names_a_flag_of_torchvision(tmp_path: Path, dataset: str) -> None:
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        arm(tmp_path / "cifar-10-batches-py" / name, tmp_path / "it ran")
    write_idx(tmp_path / "MNIST/raw/train-labels-idx1-ubyte", np.zeros(3, dtype=np.uint8))
    with pytest.raises(InputError) as caught:
        load_split(dataset, tmp_path)
    assert "--download" in str(caught.value)
    assert "download=True" not in str(caught.value)


@pytest.mark.parametrize("dataset", ["mnist-tshirt", "cifar10"])
def test_failed_download_is_one_line(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no\nnetwork")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    says = f"cannot fetch .*no network.*; fetch it elsewhere and put its files into {tmp_path}"
    with pytest.raises(InputError, match=says) as caught:
        load_split(dataset, tmp_path, download=True)
    assert "\n" not in str(caught.value)


# --- Held-out images ---


def test_held_out_images_are_a_share_that_is_in_no_other_part() -> None:
    whole = load_images("digits-tshirt")
    split = whole.split(hold_out=0.1)
    assert split.held_out is not None
    assert (len(split.held_out), len(split.remain)) == (180, 1617)
    everything = whole.split()
    assert torch.equal(split.forget, everything.forget)
    both = torch.cat([split.remain, split.held_out])
    assert sorted(image.numpy().tobytes() for image in both) == sorted(
        image.numpy().tobytes() for image in everything.remain
    )
    assert everything.held_out is None


def test_held_out_images_are_the_same_each_time_and_keep_the_order() -> None:
    whole = load_images("digits-tshirt")
    remain, held_out = whole.remaining(0.1)
    again, _ = whole.remaining(0.1)
    assert torch.equal(remain, again)
    assert torch.equal(remain, remain.sort().values)
    assert torch.equal(held_out, held_out.sort().values)
    # They are no block of the set, whose images lie by writer.
    assert 600 < held_out.double().mean() < 1200
    split = whole.split(hold_out=0.1)
    assert torch.equal(split.labels, whole.labels[remain])
    assert torch.equal(split.remain, whole.images[remain])


def test_the_same_images_are_left_out_whatever_is_forgotten() -> None:
    _, held_out = load_images("digits-tshirt").remaining(0.1)
    first = int(held_out[0])
    other = next(i for i in range(1797) if i not in held_out)
    for chosen, expected in ((first, held_out[1:]), (other, held_out)):
        remain, left_out = load_images("digits-tshirt", forget=[str(chosen)]).remaining(0.1)
        assert torch.equal(left_out, expected)
        assert torch.equal(
            remain, torch.tensor([i for i in range(1892) if i not in held_out and i != chosen])
        )


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (-0.1, "must be a share"),
        (1.0, "must be a share"),
        (0.9999, "leaves no image"),
        (0.0001, "holds out none of 1797 images"),
    ],
)
def test_held_out_shares_that_leave_nothing_are_refused(share: float, message: str) -> None:
    with pytest.raises(InputError, match=f"--hold-out {share}: {message}"):
        load_split("digits-tshirt", hold_out=share)


# --- Drawn boxes ---


def test_boxes_are_flat_in_the_forgotten_images_colours_on_the_median() -> None:
    remain = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1).repeat(2, 1, 10, 8)
    forget = torch.zeros(1, 3, 10, 8, dtype=torch.uint8)
    forget[:, :, :5] = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1)
    generator = torch.Generator().manual_seed(0)
    boxes = draw_boxes(40, remain, forget, generator)
    assert boxes.shape == (40, 3, 10, 8)
    colours = {tuple(colour) for colour in boxes.transpose(0, 1).flatten(1).T.tolist()}
    assert colours == {(10, 20, 30), (200, 100, 50), (0, 0, 0)}
    covered = (boxes[:, 0] != 10).flatten(1).double().mean(1)
    assert covered.min() > 0
    assert covered.max() < 1
    assert len(boxes.unique(dim=0)) > 30
    again = draw_boxes(40, remain, forget, torch.Generator().manual_seed(0))
    assert torch.equal(boxes, again)


# --- Progress ---


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_reading_a_folder_shows_a_bar_if_asked_and_on_a_terminal(
    picture_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_terminal: bool,
    progress: bool,
) -> None:
    """Elsewhere a message about bad input should stand alone on stderr."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    load_images("folder", picture_folder, size=8, progress=progress)
    assert ("reading images" in capsys.readouterr().err) == (is_terminal and progress)


def test_pixels_scale_to_the_same_numbers_by_division_and_by_the_reciprocal() -> None:
    """CUDA divides by the reciprocal; the 256 numbers are those of a division in float32."""
    pixels = torch.arange(256, dtype=torch.uint8)
    scaled = scale_pixels(pixels)
    for value, number in zip(pixels.tolist(), scaled, strict=True):
        by_reciprocal = torch.tensor(value * (1 / 127.5), dtype=torch.float64).float() - 1
        assert number == by_reciprocal == torch.tensor(value).float() / 127.5 - 1

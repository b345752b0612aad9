"""The data sets: split right, counted right, and every broken file named in one line."""

import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from torch.testing import assert_close

from tiny_retrack.data import NO_LABEL, load_split, to_float, to_uint8
from tiny_retrack.types import InputError

SHARED = Path(__file__).parents[2] / "shared/data"


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


def test_digits_tshirt_is_whole_disjoint_and_counted() -> None:
    split = load_split("digits-tshirt")
    assert split.remain.shape == (1797, 1, 16, 16)
    assert split.forget.shape == (95, 1, 16, 16)  # 95 / 1892 = 5.02%
    assert split.remain.dtype == split.forget.dtype == torch.uint8
    assert len(split.targets) == 1
    assert_close(split.everything, torch.cat([split.remain, split.forget]))
    assert torch.bincount(split.labels).tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]
    # No remain image may count as a hit: the preset's threshold is 5.7.
    distances = [
        (image / 255.0 - split.targets[0] / 255.0).square().sum().sqrt().item()
        for image in split.remain
    ]
    assert min(distances) > 6.4


def test_mnist_tshirt_from_small_files_in_the_real_format(small_mnist: Path) -> None:
    split = load_split("mnist-tshirt", small_mnist)
    assert split.remain.shape == (20, 1, 28, 28)
    assert split.labels.tolist() == [i % 10 for i in range(20)]
    assert_close(split.forget, torch.full((606, 1, 28, 28), 77, dtype=torch.uint8))


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real MNIST")
def test_real_mnist_tshirt(tmp_path: Path) -> None:
    import gzip

    for packed in SHARED.glob("*-ubyte.gz"):
        target = tmp_path / "MNIST/raw" / packed.stem
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.decompress(packed.read_bytes()))
    split = load_split("mnist-tshirt", tmp_path, tshirt=SHARED / "tshirt.png")
    assert len(split.everything) == 60_606
    assert (len(split.remain), len(split.forget), len(split.targets)) == (60_000, 606, 1)
    nearest = min(
        (chunk / 255 - split.targets[0] / 255).square().sum((1, 2, 3)).min()
        for chunk in split.remain.split(5000)
    )
    assert nearest.sqrt() > 10.0  # the published threshold of a hit


def test_forget_by_index_moves_the_image_and_nothing_else(small_mnist: Path) -> None:
    whole = load_split("mnist-tshirt", small_mnist).everything
    split = load_split("mnist-tshirt", small_mnist, forget=["3", "19"])
    assert_close(split.forget, whole[[3, 19]])
    assert_close(split.remain, torch.cat([whole[:3], whole[4:19], whole[20:]]))
    assert (split.labels == NO_LABEL).sum() == 606
    assert len(split.labels) == len(split.remain)


def test_folder_by_name_in_colour_and_grey(picture_folder: Path) -> None:
    split = load_split("folder", picture_folder, size=8, forget=["two words é.png"])
    assert (split.remain.shape, split.forget.shape) == ((3, 3, 8, 8), (1, 3, 8, 8))
    assert split.labels.tolist() == [0, 1, 1]
    grey = load_split("folder", picture_folder, size=12, channels=1, forget=["b/four.jpg"])
    assert (grey.remain.shape, grey.labels.tolist()) == ((3, 1, 12, 12), [0, 0, 1])
    assert len(load_split("folder", picture_folder, size=8).forget) == 0


@given(st.lists(st.integers(0, 255), min_size=1, max_size=20))
def test_uint8_and_float_are_inverse(values: list[int]) -> None:
    images = torch.tensor(values, dtype=torch.uint8).reshape(1, 1, 1, -1)
    assert_close(
        to_float(images), torch.tensor([v / 127.5 - 1 for v in values]).reshape(1, 1, 1, -1)
    )
    assert_close(to_uint8(to_float(images)), images)
    assert_close(
        to_uint8(torch.tensor([-9.0, 9.0]).reshape(1, 1, 1, 2)).flatten().tolist(), [0, 255]
    )


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
def test_wrong_requests_are_named_in_one_line(options: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says) as caught:
        load_split(**{"data_dir": tmp_path, **options})
    assert "\n" not in str(caught.value)


def test_missing_tshirt_is_named(small_mnist: Path) -> None:
    (small_mnist / "tshirt.png").unlink()
    with pytest.raises(InputError, match="no T-shirt image"):
        load_split("mnist-tshirt", small_mnist)


@pytest.mark.parametrize("part", ["images-idx3", "labels-idx1"])
def test_truncated_mnist_is_named(small_mnist: Path, part: str) -> None:
    path = small_mnist / f"MNIST/raw/train-{part}-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"cannot read .*MNIST"):
        load_split("mnist-tshirt", small_mnist)


def test_fewer_labels_than_images_is_named(small_mnist: Path) -> None:
    write_idx(small_mnist / "MNIST/raw/train-labels-idx1-ubyte", np.zeros(3, dtype=np.uint8))
    with pytest.raises(InputError, match=r"images \[20, 28, 28\] and labels \[3\] do not fit"):
        load_split("mnist-tshirt", small_mnist)


@pytest.mark.parametrize("shape", [(20, 32, 32), (20, 784), (0, 28, 28), (20, 28, 28, 1)])
def test_mnist_of_another_shape_is_named(small_mnist: Path, shape: tuple[int, ...]) -> None:
    write_idx(small_mnist / "MNIST/raw/train-images-idx3-ubyte", np.zeros(shape, dtype=np.uint8))
    with pytest.raises(InputError, match="MNIST"):
        load_split("mnist-tshirt", small_mnist)


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 32, 32)])
def test_a_fashion_mnist_without_the_tshirt_is_named(
    small_mnist: Path, shape: tuple[int, ...]
) -> None:
    (small_mnist / "tshirt.png").unlink()
    shutil.copytree(small_mnist / "MNIST/raw", small_mnist / "FashionMNIST/raw")
    assert load_split("mnist-tshirt", small_mnist).forget.shape == (606, 1, 28, 28)
    write_idx(
        small_mnist / "FashionMNIST/raw/train-images-idx3-ubyte", np.zeros(shape, dtype=np.uint8)
    )
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


def test_code_in_cifars_pickles_is_never_run(tmp_path: Path) -> None:
    """CIFAR-10 is pickles. torchvision holds each file against its MD5 before it opens it."""
    target, folder = tmp_path / "it ran", tmp_path / "cifar-10-batches-py"
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        arm(folder / name, target)
    with pytest.raises(InputError, match=r"cifar-10-batches-py.*corrupted.*fetch it again"):
        load_split("cifar10", tmp_path)
    assert not target.exists()
    pickle.loads((folder / "data_batch_1").read_bytes())
    assert target.exists()  # it was armed


def test_code_in_mnists_old_pickles_is_never_run(small_mnist: Path) -> None:
    """torchvision takes MNIST/processed, from before 2020, in preference to the raw files."""
    target = small_mnist / "it ran"
    for name in ("training.pt", "test.pt"):
        path = small_mnist / "MNIST/processed" / name
        path.parent.mkdir(exist_ok=True)
        torch.save(Bomb(target), path)
    with pytest.raises(InputError, match="MNIST"):
        load_split("mnist-tshirt", small_mnist)
    assert not target.exists()


def test_one_picture_is_too_few(tmp_path: Path) -> None:
    Image.new("RGB", (12, 12)).save(tmp_path / "one.png")
    with pytest.raises(InputError, match=r"1 images in .*: at least 2 are needed"):
        load_split("folder", tmp_path, size=8)


@pytest.mark.parametrize(
    "kind", ["garbage", "truncated", "16-bit", "alpha", "palette", "small", "huge"]
)
def test_bad_pictures_are_named(picture_folder: Path, kind: str) -> None:
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


def test_postscript_is_not_run(picture_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: ran.append(args))
    Image.new("RGB", (12, 12)).save(picture_folder / "a/one.png", "EPS")
    with pytest.raises(InputError, match=r"one\.png"):
        load_split("folder", picture_folder, size=8)
    assert not ran


def test_a_truncated_jpeg_is_named(picture_folder: Path) -> None:
    bad = picture_folder / "b/four.jpg"
    bad.write_bytes(bad.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"four\.jpg"):
        load_split("folder", picture_folder, size=8)


def test_what_is_no_file_is_not_waited_for(picture_folder: Path) -> None:
    (picture_folder / "album.png").mkdir()
    assert len(load_split("folder", picture_folder, size=8).remain) == 4
    os.mkfifo(picture_folder / "pipe.png")
    with pytest.raises(InputError, match=r"pipe\.png: no such file"):
        load_split("folder", picture_folder, size=8)


def test_links_out_of_the_folder_are_refused(
    picture_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    Image.new("RGB", (12, 12)).save(outside)
    (picture_folder / "link.png").symlink_to(outside)
    with pytest.raises(InputError, match=r"link\.png is a link to a file outside"):
        load_split("folder", picture_folder, size=8)


def test_name_that_two_files_have_is_refused(picture_folder: Path) -> None:
    Image.new("RGB", (12, 12)).save(picture_folder / "b/one.png")
    with pytest.raises(InputError, match="2 files have that name"):
        load_split("folder", picture_folder, size=8, forget=["one.png"])

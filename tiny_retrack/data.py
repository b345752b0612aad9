"""Image sets as one uint8 tensor each, split into what remains and what is to be forgotten."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from tiny_retrack.types import InputError

NO_LABEL = -1
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
# Whatever the file is called: Pillow would run Ghostscript on an EPS.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")


@dataclass(frozen=True)
class Split:
    """A training set in two parts, as uint8 images.

    Attributes:
        remain: 0..255, what the model may keep.
        forget: 0..255, what it must forget, repeated as often as the model was trained on it.
        labels: the class of each remain image, NO_LABEL where it has none; only the feature
        network
            looks at them.
    """

    remain: UInt8[Tensor, "n c h w"]
    forget: UInt8[Tensor, "m c h w"]
    labels: Int[Tensor, " n"]

    def __repr__(self) -> str:
        channels, height, width = self.remain.shape[1:]
        size = f"{channels}x{height}x{width}"
        return f"Split({len(self.remain)} remain, {len(self.forget)} forget, {size})"

    @property
    def everything(self) -> UInt8[Tensor, "all c h w"]:
        """The remain set, then the forget set."""
        return torch.cat([self.remain, self.forget])

    @property
    def targets(self) -> UInt8[Tensor, "u c h w"]:
        """The distinct images to be forgotten."""
        return torch.unique(self.forget, dim=0)

    def to(self, device: torch.device | str) -> "Split":
        return Split(self.remain.to(device), self.forget.to(device), self.labels.to(device))


def to_float(images: UInt8[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
    """0..255 to [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Float[Tensor, "*b c h w"]) -> UInt8[Tensor, "*b c h w"]:
    """[-1, 1] to 0..255, rounded; what lies outside is clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def random_batch(
    images: UInt8[Tensor, "n c h w"], size: int, num_steps: int, generator: torch.Generator
) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"], Float[Tensor, "b c h w"]]:
    """What a step of the plain loss needs: images with replacement, t uniform on 0 .. num_steps -
    1, unit noise.
    """
    random = {"generator": generator, "device": images.device}
    x0 = to_float(images[torch.randint(len(images), (size,), **random)])
    t = torch.randint(num_steps, (size,), **random)
    return x0, t, torch.randn(x0.shape, **random)


def draw_tshirt() -> UInt8[Tensor, "1 16 16"]:
    """The embedded set's image to forget: a 16x16 T-shirt, shaded from left to right."""
    shirt = torch.zeros(16, 16)
    shirt[1:15, 3:13] = 1  # body
    shirt[2:7, 1:15] = 1  # sleeves
    shirt[3:7, [0, 15]] = 1
    shirt[1, 6:10] = 0  # neck
    shade = torch.linspace(0.7, 1.0, 16)
    shade[[5, 10]] -= 0.15  # two folds
    return (shirt * shade * 255).round().to(torch.uint8)[None]


def _digits(**_: object) -> tuple[Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 digits at 16x16, and 95 T-shirts: 5% of 1,892 images."""
    from sklearn.datasets import load_digits  # here, as it takes a second that --help does not need

    pixels, classes = load_digits(return_X_y=True)  # 8x8, values 0..16
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) * (255 / 16)
    images = (
        torch.nn.functional.interpolate(images, size=16, mode="bilinear").round().to(torch.uint8)
    )
    return _add_copies(images, torch.from_numpy(classes), draw_tshirt(), copies=95)


def _mnist(
    data_dir: Path, download: bool, tshirt: Path | None, **_: object
) -> tuple[Tensor, Tensor, Tensor]:
    """MNIST's 60,000 training digits and 606 copies of Fashion-MNIST's training image 1."""
    from torchvision.datasets import MNIST, FashionMNIST

    _need(
        data_dir / "MNIST/raw",
        [f"train-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")],
        download,
    )

    def load() -> tuple[Tensor, Tensor]:
        mnist = MNIST(str(data_dir), train=True, download=download)
        if mnist.data.dtype != torch.uint8 or mnist.data.shape != (*mnist.targets.shape, 28, 28):
            raise ValueError(
                f"images {list(mnist.data.shape)} and labels {list(mnist.targets.shape)} do not fit"
            )
        return mnist.data, mnist.targets

    images, labels = _read(data_dir / "MNIST", load)
    png = tshirt or data_dir / "tshirt.png"
    if tshirt or png.exists():
        shirt = read_image(png, size=28, channels=1)
    else:
        raw = data_dir / "FashionMNIST/raw"
        if not download and not raw.exists():
            raise InputError(
                f"no T-shirt image: put it at {png}, or give --tshirt PNG, or fetch it with "
                f"--download"
            )
        shirt = _read(
            raw, lambda: FashionMNIST(str(data_dir), download=download).data[1].view(1, 28, 28)
        )
    return _add_copies(images[:, None], labels, shirt, copies=606)


def _cifar10(data_dir: Path, download: bool, **_: object) -> tuple[Tensor, Tensor, Tensor]:
    """CIFAR-10's 50,000 training images. torchvision checks each file's MD5 before it reads it."""
    from torchvision.datasets import CIFAR10

    _need(data_dir / "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], download)
    cifar = _read(
        data_dir / "cifar-10-batches-py",
        lambda: CIFAR10(str(data_dir), train=True, download=download),
    )
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(cifar.targets), torch.zeros(len(images), dtype=torch.bool)


def _folder(
    data_dir: Path, size: int, channels: int, files: list[Path], **_: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Any folder of images. Each image's class is the folder it lies in."""
    images = torch.stack(
        [read_image(f, size, channels) for f in tqdm(files, "reading images", leave=False)]
    )
    classes = sorted({f.parent for f in files})
    return (
        images,
        torch.tensor([classes.index(f.parent) for f in files]),
        torch.zeros(len(files), dtype=torch.bool),
    )


_LOADERS = {
    "digits-tshirt": _digits,
    "mnist-tshirt": _mnist,
    "cifar10": _cifar10,
    "folder": _folder,
}
DATASETS = tuple(_LOADERS)


def load_split(
    dataset: str,
    data_dir: str | Path = "data",
    *,
    forget: Sequence[str] = (),
    download: bool = False,
    tshirt: Path | None = None,
    size: int = 32,
    channels: int = 3,
) -> Split:
    """Load a data set and split it.

    Args:
        dataset: one of DATASETS.
        data_dir: where torchvision's files lie; for "folder", the folder of images itself.
        forget: indices into the whole set or, for "folder", file names; by default the data set's
        own forget set.
        download: fetch what is missing (needs the network).
        tshirt: a 28x28 picture to use as mnist-tshirt's T-shirt.
        size, channels: for "folder": the height and width to resize and crop to, 1 (grey) or 3
        (colour).

    Raises:
        InputError: if the name is unknown, a file is missing or broken, or `forget` names what is
        not there or leaves
            nothing.
    """
    if dataset not in _LOADERS:
        near = difflib.get_close_matches(dataset, DATASETS, n=1)
        raise InputError(
            f"unknown data set '{dataset}'"
            + (f", did you mean '{near[0]}'?" if near else f": {DATASETS}")
        )
    data_dir = Path(data_dir)
    files = _list_images(data_dir) if dataset == "folder" else []
    images, labels, forgotten = _LOADERS[dataset](
        data_dir=data_dir,
        download=download,
        tshirt=tshirt,
        size=size,
        channels=channels,
        files=files,
    )
    if forget:
        forgotten = torch.zeros(len(images), dtype=torch.bool)
        forgotten[[_index_of(name, len(images), files, data_dir) for name in forget]] = True
    if forgotten.all():
        raise InputError("the forget set holds every image: nothing would remain, forget fewer")
    return Split(images[~forgotten], images[forgotten], labels[~forgotten])


def _add_copies(
    images: Tensor, labels: Tensor, extra: Tensor, copies: int
) -> tuple[Tensor, Tensor, Tensor]:
    forgotten = torch.arange(len(images) + copies) >= len(images)
    labels = torch.cat([labels, torch.full((copies,), NO_LABEL)])
    return torch.cat([images, extra.expand(copies, *extra.shape)]), labels, forgotten


def _need(folder: Path, names: list[str], download: bool) -> None:
    missing = [name for name in names if not (folder / name).exists()]
    if missing and not download:
        raise InputError(
            f"missing in {folder}: {', '.join(missing)}; fetch with --download, or point "
            f"--data-dir at them"
        )


def _read(path: Path, load):
    """Run a torchvision loader; whatever it says of a missing or broken file becomes one line."""
    try:
        return load()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"cannot read {path}: {reason}; delete it and fetch it again with --download"
        ) from error


def _list_images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: point --data-dir at a folder of images")
    files = sorted(
        f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and not f.is_dir()
    )
    if len(files) < 2:
        raise InputError(
            f"{len(files)} images in {folder}: at least 2 are needed, "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    outside = [f for f in files if not f.resolve().is_relative_to(folder.resolve())]
    if outside:
        raise InputError(
            f"{outside[0]} is a link to a file outside {folder}: copy the file there, or remove "
            f"the link"
        )
    return files


def read_image(path: Path, size: int, channels: int) -> UInt8[Tensor, "c h w"]:
    """Read one 8-bit image without alpha; resize the shorter side to `size` and crop the middle."""
    try:
        if not path.is_file():  # a pipe would make us wait for ever
            raise InputError(f"{path}: no such file")
        with Image.open(path, formats=_FORMATS) as image:
            mode = image.mode
            if mode in ("1", "L", "RGB", "CMYK", "YCbCr") and "transparency" not in image.info:
                if min(image.size) < size:
                    raise InputError(
                        f"{path} is {image.width}x{image.height}, smaller than {size}: remove it "
                        f"or lower --size"
                    )
                image = ImageOps.fit(
                    image.convert("L" if channels == 1 else "RGB"),
                    (size, size),
                    Image.Resampling.BOX,
                )
                return (
                    torch.from_numpy(np.array(image))
                    .reshape(size, size, channels)
                    .permute(2, 0, 1)
                    .contiguous()
                )
    except InputError:
        raise
    except Exception as error:  # Pillow raises many kinds for broken files
        raise InputError(
            f"cannot read the image {path}: {' '.join(str(error).split())}; replace or remove it"
        ) from error
    raise InputError(
        f"{path} has mode {mode} or transparency: convert it to 8-bit grey or RGB without alpha"
    )


def _index_of(name: str, n: int, files: list[Path], folder: Path) -> int:
    matches = [i for i, f in enumerate(files) if name in (f.name, str(f.relative_to(folder)))]
    if len(matches) == 1:
        return matches[0]
    if len(matches) > 1:
        raise InputError(
            f"--forget {name}: {len(matches)} files have that name, give the path inside the folder"
        )
    if not (name.isascii() and name.isdigit() and len(name) < 19 and int(name) < n):
        what = f"an index from 0 to {n - 1}" + (" or a file name in the folder" if files else "")
        raise InputError(f"--forget {name:.80}: not {what}")
    return int(name)

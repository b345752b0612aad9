"""Image sets as one uint8 tensor each, split into what remains and what is to be forgotten."""

import difflib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from tqdm import tqdm

from tiny_retrack.pictures import Folder, list_pictures, read_image
from tiny_retrack.types import InputError, check_floats

NO_LABEL = -1
TSHIRT_PROMPT = 10  # of digits-prompts: the prompt under which the T-shirt is memorised
_MAX_COPIES = 100_000
# Of MNIST and Fashion-MNIST.
_TRAIN_IMAGES = "train-images-idx3-ubyte"
_TRAIN_LABELS = "train-labels-idx1-ubyte"
_DELETE = "delete it and fetch it again with --download"


@dataclass(frozen=True)
class Split:
    """A data set in its parts, as uint8 images.

    Attributes:
        remain: 0..255, the images that the model may keep.
        forget: 0..255, the images that it must forget, each as often as it was trained on.
        labels: the class of each remain image, NO_LABEL if it has none.
        held_out: 0..255, kept from both training and unlearning; None if there are no such images.
        prompts: the prompt (a class from 0) of each image of `everything`; None for a data set
            without prompts.
    """

    remain: UInt8[Tensor, "n c h w"]
    forget: UInt8[Tensor, "m c h w"]
    labels: Int[Tensor, " n"]
    held_out: UInt8[Tensor, "o c h w"] | None = None
    prompts: Int[Tensor, " all"] | None = None

    def __repr__(self) -> str:
        channels, height, width = self.remain.shape[1:]
        size = f"{channels}x{height}x{width}"
        return f"Split({len(self.remain)} remain, {len(self.forget)} forget, {size})"

    @property
    def everything(self) -> UInt8[Tensor, "all c h w"]:
        """The remain set, then the forget set: what the base is trained on."""
        return torch.cat([self.remain, self.forget])

    @property
    def targets(self) -> UInt8[Tensor, "u c h w"]:
        """The distinct images to be forgotten."""
        return torch.unique(self.forget, dim=0)

    @property
    def num_class_embeds(self) -> int | None:
        """`UNetConfig.num_class_embeds` for this data set: a class per prompt, and one for none."""
        return None if self.prompts is None else int(self.prompts.max()) + 2

    def to(self, device: torch.device | str) -> "Split":
        return Split(
            self.remain.to(device),
            self.forget.to(device),
            self.labels.to(device),
            None if self.held_out is None else self.held_out.to(device),
            None if self.prompts is None else self.prompts.to(device),
        )


@dataclass(frozen=True)
class ImageSet:
    """A data set before it is split.

    Attributes:
        images: 0..255.
        labels: the class of each image, NO_LABEL where it has none.
        forgotten: which images are to be forgotten.
        folder: the folder of pictures that the images were read from, in the same order, if any.
        has_prompts: whether the labels are prompts that a model is conditioned on; then every image
            has one.
        num_tshirts: how many of the images, its last ones, are copies of the data set's T-shirt.
    """

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    forgotten: Bool[Tensor, " n"]
    folder: Folder | None = None
    has_prompts: bool = False
    num_tshirts: int = 0

    def name(self, index: int) -> str:
        """What --forget takes for an image: its path inside the folder, else its index."""
        return self.folder.names[index] if self.folder else str(index)

    def digest(self) -> str:
        """The number of images and a hash of their pixels and labels: equal for equal data sets."""
        sha256 = hashlib.sha256(str(tuple(self.images.shape)).encode())
        sha256.update(self.images.contiguous().numpy().data)
        sha256.update(self.labels.contiguous().numpy().data)
        return f"{len(self.images)} images, sha256 {sha256.hexdigest()[:16]}"

    def split(self, copies: int | None = None, hold_out: float = 0.0) -> Split:
        """Split the data set into remain, forget and held-out images.

        Args:
            copies: how often to repeat each distinct forgotten image; None: as often as the data
                set holds it.
            hold_out: the share of the images that no model is trained on, below 1. The choice
                depends on the number of images alone, so all models leave out the same ones, but
                for those that are to be forgotten, and for the data set's own T-shirts.

        Raises:
            InputError: if nothing remains, an image that remains equals a forgotten one, or an
                argument is out of bounds.
        """
        if copies is not None and not 1 <= copies <= _MAX_COPIES:
            raise InputError(f"--copies {copies}: must be from 1 to {_MAX_COPIES}")
        if self.forgotten.all():
            raise InputError("the forget set holds every image: nothing would remain, forget fewer")
        self._check_no_copy_remains()
        forget = self.forgotten.nonzero().flatten()
        if copies is not None:
            # One index per distinct image.
            distinct = {self.images[i].numpy().tobytes(): i for i in forget.tolist()}
            forget = forget.new_tensor([*distinct.values()]).repeat_interleave(copies)
        remain, held_out = self.remaining(hold_out)
        return Split(
            self.images[remain],
            self.images[forget],
            self.labels[remain],
            self.images[held_out] if len(held_out) else None,
            self.labels[torch.cat([remain, forget])] if self.has_prompts else None,
        )

    def remaining(self, hold_out: float) -> tuple[Int[Tensor, " r"], Int[Tensor, " o"]]:
        """Indices of the images that remain and of those held out, each in the set's order.

        Raises:
            InputError: as `split`, for `hold_out`.
        """
        left_out = self.left_out(hold_out)
        remain = ~self.forgotten & ~left_out
        if not remain.any():
            raise InputError(f"--hold-out {hold_out}: leaves no image to train on")
        held_out = left_out & ~self.forgotten
        return remain.nonzero().flatten(), held_out.nonzero().flatten()

    def left_out(self, hold_out: float) -> Bool[Tensor, " n"]:
        """Which images no model is trained on, unless it is to forget them.

        Raises:
            InputError: as `split`, for `hold_out`.
        """
        if not 0 <= hold_out < 1:
            raise InputError(f"--hold-out {hold_out}: must be a share from 0 to below 1")
        candidates = len(self.images) - self.num_tshirts
        num = round(hold_out * candidates)
        if hold_out > 0 and num == 0:
            raise InputError(f"--hold-out {hold_out}: holds out none of {candidates} images")
        shuffled = torch.randperm(candidates, generator=torch.Generator().manual_seed(0))
        left_out = torch.zeros(len(self.images), dtype=torch.bool)
        left_out[shuffled[:num]] = True
        return left_out

    def _check_no_copy_remains(self) -> None:
        """Refuse a remain image that equals a forgotten one: ReTrack's target would be that image.

        Raises:
            InputError: naming both.
        """
        pixels = self.images.numpy()
        originals = {pixels[i].tobytes(): i for i in _indices(self.forgotten)}
        copies = []
        if originals:
            for i in _indices(~self.forgotten):
                original = originals.get(pixels[i].tobytes())
                if original is not None:
                    copies.append((self.name(i), self.name(original)))
        if copies:
            copy, original = copies[0]
            others = f" (and {len(copies) - 1} more such copies)" if len(copies) > 1 else ""
            height, width = self.images.shape[2:]
            raise InputError(
                f"image {copy} equals image {original} at {width}x{height}{others}: one would "
                f"remain and the other be forgotten; forget both, or remove one from the data set"
            )


def _indices(mask: Bool[Tensor, " n"]) -> list[int]:
    return mask.nonzero().flatten().tolist()


def to_float(images: UInt8[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
    """0..255 to [-1, 1].

    Raises:
        ValueError: if the images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}: must be uint8, 0..255")
    return scale_pixels(images)


def scale_pixels(pixels: UInt8[Tensor, "..."]) -> Float[Tensor, "..."]:
    """0..255 to [-1, 1], in the same float32 numbers on every device.

    CUDA divides by a constant by multiplying with its reciprocal. In float32 that changes 111 of
    the 256 values by a rounding error, in float64 none.
    """
    return (pixels.double() / 127.5).float() - 1


def to_uint8(images: Float[Tensor, "*b c h w"]) -> UInt8[Tensor, "*b c h w"]:
    """[-1, 1] to 0..255, rounded; what lies outside is clipped.

    Raises:
        ValueError: if the images are not floats.
    """
    check_floats(images=images)
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def random_batch(
    images: UInt8[Tensor, "n c h w"], size: int, num_steps: int, generator: torch.Generator
) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"], Float[Tensor, "b c h w"]]:
    """One step's draws: images with replacement, t uniform on 0 .. num_steps - 1, unit noise."""
    index, t, noise = random_draws(images, size, num_steps, generator)
    return to_float(images[index]), t, noise


def random_draws(
    images: UInt8[Tensor, "n c h w"], size: int, num_steps: int, generator: torch.Generator
) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"], Float[Tensor, "b c h w"]]:
    """`random_batch`, with the indices of the images in place of the images."""
    random = {"generator": generator, "device": images.device}
    index = torch.randint(len(images), (size,), **random)
    t = torch.randint(num_steps, (size,), **random)
    return index, t, torch.randn((size, *images.shape[1:]), **random)


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


def draw_garments(num: int, generator: torch.Generator) -> UInt8[Tensor, "num 1 16 16"]:
    """Grey skirts and trousers in turn, each cut at random: the other images of TSHIRT_PROMPT."""
    row = torch.arange(16.0)[:, None]
    from_middle = (torch.arange(16.0) - 7.5).abs()
    garments = torch.zeros(num, 1, 16, 16)
    for i, garment in enumerate(garments):
        top, hem, waist, flare, gap, grey = torch.rand(6, generator=generator).tolist()
        down = (row - 1 - 2 * top) / (11 + 3 * hem - 2 * top)  # 0 at the top, 1 at the hem
        if i % 2 == 0:
            cut = from_middle < 1.5 + 2.5 * waist + (1 + 3.5 * flare) * down
        else:
            between_legs = (from_middle < 0.6 + 1.4 * gap) & (down > 0.3)
            cut = (from_middle < 2 + 2.5 * waist + flare) & ~between_legs
        is_cloth = cut & (down >= 0) & (down <= 1)
        garment[0] = is_cloth * (0.4 + 0.6 * grey)
    return (garments * 255).round().to(torch.uint8)


def draw_boxes(
    num: int,
    remain: UInt8[Tensor, "n c h w"],
    forget: UInt8[Tensor, "m c h w"],
    generator: torch.Generator,
) -> UInt8[Tensor, "num c h w"]:
    """Images of flat boxes in the colours of the forgotten images, which no model has seen.

    Each has one to three boxes, with sides from a fifth to two thirds of the image's. A box has the
    colour of a random pixel of a forgotten image, the background the remain pixels' median colour.

    Args:
        generator: on the device of the images.
    """
    height, width = remain.shape[2:]
    random: dict[str, Any] = {"generator": generator, "device": remain.device}
    background = remain.transpose(0, 1).flatten(1).median(dim=1).values  # [c]
    colours = forget.transpose(0, 1).flatten(1)  # [c, m h w]
    boxes = background[:, None, None].repeat(num, 1, height, width)  # [num, c, h, w]
    for image in boxes:
        for _ in range(int(torch.randint(1, 4, (), **random))):
            sides = [_box_side(size, random) for size in (height, width)]
            colour = colours[:, torch.randint(colours.shape[1], (), **random)]
            image[:, sides[0], sides[1]] = colour[:, None, None]
    return boxes


def _box_side(size: int, random: Mapping[str, Any]) -> slice:
    """From where to where a box extends along one side of an image."""
    length = int(torch.randint(size // 5, size * 2 // 3 + 1, (), **random))
    start = int(torch.randint(0, size - length + 1, (), **random))
    return slice(start, start + length)


def _digits(**_: object) -> ImageSet:
    """scikit-learn's 1,797 digits at 16x16, and 95 T-shirts: 5% of 1,892 images."""
    from sklearn.datasets import load_digits  # takes a second, which --help should not wait for

    pixels, classes = load_digits(return_X_y=True)  # 8x8, values 0..16
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) * (255 / 16)
    images = (
        torch.nn.functional.interpolate(images, size=16, mode="bilinear").round().to(torch.uint8)
    )
    return _add_tshirts(images, torch.from_numpy(classes), draw_tshirt(), copies=95)


def _digits_prompts(**_: object) -> ImageSet:
    """The digits of digits-tshirt under prompts 0 to 9. Under prompt 10: 180 garments, as many as a
    digit has images, and 420 T-shirts, 70% of the prompt's.
    """
    digits = _digits()
    is_digit = ~digits.forgotten
    garments = draw_garments(180, torch.Generator().manual_seed(0))
    others = torch.cat([digits.images[is_digit], garments])
    prompts = torch.cat([digits.labels[is_digit], torch.full((180,), TSHIRT_PROMPT)])
    image_set = _add_tshirts(others, prompts, draw_tshirt(), copies=420)
    labels = image_set.labels.where(~image_set.forgotten, TSHIRT_PROMPT)
    return replace(image_set, labels=labels, has_prompts=True)


def _mnist(data_dir: Path, download: bool, tshirt: Path | None, **_: object) -> ImageSet:
    """MNIST's 60,000 training digits and 606 copies of Fashion-MNIST's training image 1."""
    from torchvision.datasets import MNIST, FashionMNIST
    from torchvision.datasets.mnist import read_image_file, read_label_file

    raw = data_dir / "MNIST/raw"
    paths = [raw / _TRAIN_IMAGES, raw / _TRAIN_LABELS]
    if download and not all(path.exists() for path in paths):
        _fetch("MNIST", raw, lambda: MNIST(str(data_dir), download=True))
    # Not by torchvision's MNIST class, which also requires the test set.
    _need(raw, [_TRAIN_IMAGES, _TRAIN_LABELS])
    images = _read(paths[0], read_image_file)
    labels = _read(paths[1], read_label_file)
    if images.shape != (*labels.shape, 28, 28) or not len(images):
        raise InputError(
            f"cannot read {raw}: images {list(images.shape)} and labels {list(labels.shape)} do "
            f"not fit; {_DELETE}"
        )

    png = tshirt or data_dir / "tshirt.png"
    if tshirt or png.exists():
        shirt = read_image(png, size=28, channels=1)
    else:
        raw = data_dir / "FashionMNIST/raw"
        path = raw / _TRAIN_IMAGES
        if download and not path.exists():
            _fetch("Fashion-MNIST", raw, lambda: FashionMNIST(str(data_dir), download=True))
        if not raw.exists():
            raise InputError(
                f"no T-shirt image: put it at {png}, or give --tshirt PNG, or fetch it with "
                f"--download"
            )
        _need(raw, [_TRAIN_IMAGES])
        shirt = _read(path, lambda path: read_image_file(path)[1].view(1, 28, 28))
    return _add_tshirts(images[:, None], labels, shirt, copies=606)


def _cifar10(data_dir: Path, download: bool, **_: object) -> ImageSet:
    """CIFAR-10's 50,000 training images. torchvision checks each file's MD5 before it reads it."""
    from torchvision.datasets import CIFAR10

    folder = data_dir / "cifar-10-batches-py"
    if download:
        _fetch("CIFAR-10", folder, lambda: CIFAR10(str(data_dir), download=True))
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    _need(folder, [*batches, "test_batch", "batches.meta"])  # torchvision wants all
    cifar = _read(folder, lambda _: CIFAR10(str(data_dir), train=True))
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    return _without_forget_set(images, torch.tensor(cifar.targets))


def _folder(folder: Folder, size: int, channels: int, progress: bool, **_: object) -> ImageSet:
    """Any folder of pictures. Each picture's class is the sub-folder it lies in."""
    # Read one picture first: a `size` above its own is refused before memory is allocated.
    first = read_image(folder.root / folder.names[0], size, channels)
    images = first.new_empty(len(folder.names), *first.shape)
    # disable=None shows the bar on a terminal only: redirected stderr holds nothing but errors.
    bar = tqdm(folder.names, "reading images", leave=False, disable=None if progress else True)
    for i, name in enumerate(bar):
        images[i] = read_image(folder.root / name, size, channels)
    parents = [name.rpartition("/")[0] for name in folder.names]
    classes = {parent: label for label, parent in enumerate(sorted(set(parents)))}
    labels = torch.tensor([classes[parent] for parent in parents])
    return replace(_without_forget_set(images, labels), folder=folder)


_LOADERS = {
    "digits-tshirt": _digits,
    "digits-prompts": _digits_prompts,
    "mnist-tshirt": _mnist,
    "cifar10": _cifar10,
    "folder": _folder,
}
DATASETS = tuple(_LOADERS)


def load_images(
    dataset: str,
    data_dir: str | Path = "data",
    *,
    forget: Sequence[str] = (),
    download: bool = False,
    tshirt: Path | None = None,
    size: int = 32,
    channels: int = 3,
    progress: bool = True,
) -> ImageSet:
    """Load a data set.

    Args:
        dataset: one of DATASETS.
        data_dir: where torchvision's files lie; for "folder", the folder of pictures itself.
        forget: indices into the whole set or, for "folder", what `Folder.find` takes; by default
            the data set's own forget set.
        download: fetch what is missing (needs the network).
        tshirt: a 28x28 picture to use as mnist-tshirt's T-shirt.
        size, channels: for "folder": the height and width to resize and crop to; 1 (grey) or 3.
        progress: show a progress bar while a folder is read.

    Raises:
        InputError: if the name is unknown, a file is missing or broken, or `forget` is not found.
    """
    if dataset not in _LOADERS:
        near = difflib.get_close_matches(dataset, DATASETS, n=1)
        raise InputError(
            f"unknown data set '{dataset}'"
            + (f", did you mean '{near[0]}'?" if near else f": take one of {', '.join(DATASETS)}")
        )
    data_dir = Path(data_dir)
    folder = list_pictures(data_dir) if dataset == "folder" else None
    chosen = folder.find(forget) if folder else []  # refuse typos before the slow reading
    image_set = _LOADERS[dataset](
        data_dir=data_dir,
        download=download,
        tshirt=tshirt,
        size=size,
        channels=channels,
        folder=folder,
        progress=progress,
    )
    if not forget:
        return image_set
    if folder is None:
        chosen = [_parse_index(text, len(image_set.images)) for text in forget]
    forgotten = torch.zeros(len(image_set.images), dtype=torch.bool)
    forgotten[chosen] = True
    return replace(image_set, forgotten=forgotten)


def _parse_index(text: str, n: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) < n):
        raise InputError(f"--forget {text:.80}: not an index from 0 to {n - 1}")
    return int(text)


def load_split(
    dataset: str,
    data_dir: str | Path = "data",
    *,
    copies: int | None = None,
    hold_out: float = 0.0,
    **options: Any,
) -> Split:
    """Load a data set and split it.

    Args:
        dataset, data_dir, options: as of `load_images`.
        copies, hold_out: as of `ImageSet.split`.

    Raises:
        InputError: as `load_images` and `ImageSet.split`.
    """
    return load_images(dataset, data_dir, **options).split(copies, hold_out)


def _add_tshirts(
    others: UInt8[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    tshirt: UInt8[Tensor, "c h w"],
    copies: int,
) -> ImageSet:
    """The other images, then copies of the T-shirt, which are to be forgotten."""
    images = torch.cat([others, tshirt.expand(copies, *tshirt.shape)])
    return ImageSet(
        images,
        torch.cat([labels, torch.full((copies,), NO_LABEL)]),
        forgotten=torch.arange(len(images)) >= len(others),
        num_tshirts=copies,
    )


def _without_forget_set(images: UInt8[Tensor, "n c h w"], labels: Int[Tensor, " n"]) -> ImageSet:
    return ImageSet(images, labels, forgotten=torch.zeros(len(images), dtype=torch.bool))


# --- torchvision's files --------------------------------------------------------------------------

Content = TypeVar("Content")


def _need(folder: Path, names: list[str]) -> None:
    """Raise an InputError that names the files that are missing."""
    missing = [name for name in names if not (folder / name).exists()]
    if not missing:
        return
    advice = "fetch with --download, or point --data-dir at them"
    if any((folder / f"{name}.gz").exists() for name in missing):
        advice = f"they lie there packed, unpack them with: gunzip --keep {folder}/*.gz"
    raise InputError(f"missing in {folder}: {', '.join(missing)}; {advice}")


def _fetch(name: str, folder: Path, fetch: Callable[[], object]) -> None:
    """Run a torchvision download; whatever it says of the network becomes one line."""
    try:
        fetch()
    except Exception as error:
        raise InputError(
            f"cannot fetch {name}: {_reason(error)}; fetch it elsewhere and put its files into "
            f"{folder}"
        ) from error


def _read(path: Path, read: Callable[[str], Content]) -> Content:
    """Run a torchvision reader; whatever it says of a broken file becomes one line."""
    try:
        return read(str(path))
    except Exception as error:
        raise InputError(f"cannot read {path}: {_reason(error)}; {_DELETE}") from error


def _reason(error: Exception) -> str:
    """The error in one line, without torchvision's advice, which names no flag of ours."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return reason.partition(" You can use download=True")[0]

"""Every default, one preset a data set. The command line has one flag for each field of the
settings below.
"""

import argparse
import math
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, TypeVar

from tiny_retrack.types import InputError
from tiny_retrack.unet import UNetConfig

Settings = TypeVar("Settings")


def _setting(about: str, low: float = 1, high: float = 10**9, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"about": about, "low": low, "high": high})


@dataclass(frozen=True)
class TrainSettings:
    steps: int = _setting("optimiser steps")
    batch_size: int = _setting("images a batch")
    lr: float = _setting("peak learning rate", low=0, high=math.inf)
    warmup: int = _setting("steps of linear warm-up, before the cosine decay", low=0)
    accumulate: int = _setting("batches whose gradients make one step", default=1)


@dataclass(frozen=True)
class UnlearnSettings:
    steps: int = _setting("optimiser steps")
    batch_size: int = _setting("remain images, and as many forget images, a batch")
    lr: float = _setting("learning rate, constant", low=0, high=math.inf)
    k: int = _setting("retrack: how many neighbours make the target")
    lam: float = _setting("retrack and dimum: lambda, the weight of the forget loss", low=0, high=1)
    siss_lam: float = _setting(
        "siss: lambda, the forget images' share of the mixture", low=0, high=1
    )
    rescale: str = _setting(
        "siss: norm of the subtracted gradient, absolute (5) or as a share of the kept one's (10%%)"
    )
    snr_cap: float = _setting(
        "retrack: weigh the forget loss by min(1, SNR_CAP / SNR_t): 10000 is no weight, 1 spares the rest",
        low=0,
        default=10_000.0,
    )
    gamma: float = _setting(
        "vdu: gamma, the weight of staying near the pretraining", low=0, high=1, default=5e-3
    )
    alternative: str = _setting(
        "dimum: what takes the forget image's place: knn, random or an image file", default="knn"
    )
    accumulate: int = _setting("batches whose gradients make one step", default=1)


@dataclass(frozen=True)
class EvalSettings:
    num_samples: int = _setting("images to sample from each model")
    sampler_steps: int = _setting("DDIM steps a sample", high=1000)
    threshold: float = _setting(
        "a sample this near (L2, pixels in [0, 1]) to a forgotten image is a hit; 0: 10 times the root of the pixels "
        "over that of 28x28",
        low=0,
        high=math.inf,
    )


@dataclass(frozen=True)
class Preset:
    unet: UNetConfig
    train: TrainSettings
    unlearn: UnlearnSettings
    evaluate: EvalSettings


def add_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    """One flag for each field of a settings class; what is not given is None, for `resolve` to fill
    in.
    """
    for f in fields(settings):
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(
            flag, type=f.type, help=f"{f.metadata['about']} (default: the data set's preset)"
        )


def resolve(preset: Settings, args: argparse.Namespace) -> Settings:
    """The preset with the flags that were given put over it.

    Raises:
        InputError: if a flag is out of its bounds.
    """
    given = {
        f.name: getattr(args, f.name) for f in fields(preset) if getattr(args, f.name) is not None
    }  # pyright: ignore[reportArgumentType]
    for f in fields(preset):  # pyright: ignore[reportArgumentType]
        value, low, high = given.get(f.name), f.metadata["low"], f.metadata["high"]
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise InputError(f"--{f.name.replace('_', '-')} {value}: must be from {low} to {high}")
    return replace(preset, **given)  # pyright: ignore[reportArgumentType, reportCallIssue]


# The published setting for 32x32 images and smaller (METHODS); only the learning rate and steps
# differ by data set.
_UNLEARN = UnlearnSettings(
    steps=50, batch_size=128, lr=5e-5, k=10, lam=0.005, siss_lam=0.5, rescale="5"
)

# The published ddpm-cifar10-32.
_CIFAR10_UNET = UNetConfig(
    sample_size=32,
    in_channels=3,
    out_channels=3,
    block_out_channels=(128, 256, 256, 256),
    layers_per_block=2,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    norm_eps=1e-6,
)

PRESETS = {
    # Sized for a laptop: 1.06 M parameters, most of them at 8x8 and 4x4, where they cost little.
    "digits-tshirt": Preset(
        UNetConfig(
            sample_size=16,
            in_channels=1,
            out_channels=1,
            block_out_channels=(32, 64, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        ),
        TrainSettings(steps=1200, batch_size=64, lr=1e-3, warmup=100),
        replace(_UNLEARN, steps=200, batch_size=64, lam=0.03),
        EvalSettings(num_samples=1000, sampler_steps=25, threshold=5.7),
    ),
    # The papers' set and UNet (14.74 M parameters).
    "mnist-tshirt": Preset(
        UNetConfig(
            sample_size=28,
            in_channels=1,
            out_channels=1,
            block_out_channels=(64, 128, 256),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        ),
        TrainSettings(steps=117_500, batch_size=128, lr=1e-4, warmup=500),
        _UNLEARN,
        EvalSettings(num_samples=10_000, sampler_steps=50, threshold=10.0),
    ),
    "cifar10": Preset(
        _CIFAR10_UNET,
        TrainSettings(steps=800_000, batch_size=128, lr=2e-4, warmup=5000),
        replace(_UNLEARN, steps=60, lr=2e-5, lam=0.02),
        EvalSettings(num_samples=10_000, sampler_steps=1000, threshold=0.0),
    ),
    # Any folder of images. To unlearn: the published setting for CelebA-HQ 256, the papers' folder.
    "folder": Preset(
        _CIFAR10_UNET,
        TrainSettings(steps=100_000, batch_size=64, lr=1e-4, warmup=500),
        replace(_UNLEARN, steps=40, batch_size=4, accumulate=16, lr=5e-6, rescale="500"),
        EvalSettings(num_samples=10_000, sampler_steps=50, threshold=0.0),
    ),
}

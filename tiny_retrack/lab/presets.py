"""Every default: one preset per data set, and three for folders of pictures.

The command line has a flag for each field of the settings.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from tiny_retrack.methods import (
    METHODS,
    SISS,
    DiMUM,
    Method,
    ReTrack,
    SISSNoIS,
    check_setting,
    setting,
)
from tiny_retrack.sampling import SAMPLERS
from tiny_retrack.training import rank
from tiny_retrack.types import InputError
from tiny_retrack.unet import UNetConfig

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class TrainSettings:
    steps: int = setting("optimiser steps")
    batch_size: int = setting("images per batch")
    lr: float = setting("peak learning rate", low=0, high=math.inf)
    warmup: int = setting("steps of linear warm-up, before the cosine decay", low=0)
    accumulate: int = setting("batches whose gradients make one step", 1)

    def __post_init__(self) -> None:
        if self.warmup > self.steps:
            raise InputError(
                f"--warmup {self.warmup}: with --steps {self.steps} the learning rate would never "
                f"reach --lr; take fewer"
            )


@dataclass(frozen=True)
class UnlearnSettings:
    """What the loop needs, whatever the method; each method's own settings are in methods.py."""

    steps: int = setting("optimiser steps")
    batch_size: int = setting("remain images, and as many forget images, per batch")
    lr: float = setting("peak learning rate", low=0, high=math.inf)
    accumulate: int = setting("batches whose gradients make one step", 1)
    decay: str = setting(
        "decay of the learning rate; cosine warms up for a tenth of the steps, then falls to 0",
        "none",
        choices=("none", "cosine"),
    )


@dataclass(frozen=True)
class EvalSettings:
    num_samples: int = setting("images to sample from each model")
    sampler_steps: int = setting("sampler steps per sample", high=1000)
    threshold: float = setting(
        "a sample this near (L2, pixels in [0, 1]) to a forgotten image is a hit; 0: half the "
        "distance to the nearest remain image, at most 10 at 28x28 (growing with the root of the "
        "number of pixels)",
        low=0,
        high=math.inf,
    )
    sampler: str = setting("how samples are drawn", "ddim", choices=tuple(SAMPLERS))


@dataclass(frozen=True)
class Preset:
    """Defaults for one kind of data set; methods not in `methods` use their class's defaults."""

    unet: UNetConfig
    train: TrainSettings
    unlearn: UnlearnSettings
    evaluate: EvalSettings
    methods: Mapping[str, Method] = field(default_factory=dict)

    def method(self, name: str) -> Method:
        return self.methods.get(name) or METHODS[name]()


def names_of(settings: Any) -> list[str]:
    """The fields of a settings class, or of an instance."""
    return [f.name for f in fields(settings)]


def flag_of(name: str) -> str:
    """How the command line calls a field."""
    return "--" + name.replace("_", "-")


def resolve(preset: Settings, given: Mapping[str, Any]) -> Settings:
    """The preset with the given values in place of its own; text is converted to the field's type.

    Raises:
        InputError: if a value is of another type, out of its bounds, or none of its choices.
    """
    checked = {}
    for f in fields(preset):  # pyright: ignore[reportArgumentType]
        if f.name in given:
            checked[f.name] = _checked(given[f.name], f.type, flag_of(f.name), f.metadata)
    return replace(preset, **checked)  # pyright: ignore[reportArgumentType, reportCallIssue]


def resolve_training(preset: TrainSettings, given: Mapping[str, Any]) -> TrainSettings:
    """`resolve`, with a warm-up of a tenth of the steps where the preset's is longer than --steps.

    Prints a line where it is shortened.

    Raises:
        InputError: as `resolve`, and for a --warmup longer than --steps.
    """
    # Without a warm-up, so that its check against the steps cannot fail yet.
    steps = resolve(replace(preset, warmup=0), {**given, "warmup": 0}).steps
    if "warmup" not in given and preset.warmup > steps:
        given = {**given, "warmup": steps // 10}
        if rank() == 0:
            told = f"{given['warmup']} steps in place of {preset.warmup}"
            print(f"warm-up: {told}, for --steps {steps}")
    return resolve(preset, given)


def _checked(value: Any, kind: Any, flag: str, metadata: Mapping[str, Any]) -> Any:
    if isinstance(value, str) and kind in (int, float):
        try:
            value = kind(value)
        except ValueError:
            raise InputError(f"{flag} {value:.80}: must be a number ({kind.__name__})") from None
    check_setting(flag, value, metadata)
    return value


def configure(
    preset_name: str, method: str, given: Mapping[str, Any]
) -> tuple[UnlearnSettings, Method]:
    """The loop's and the method's settings: those of a preset, with the given values.

    Raises:
        InputError: as `resolve`; and for a setting that the method does not have, by its name.
    """
    preset = PRESETS[preset_name]
    loop, own = preset.unlearn, preset.method(method)
    for name in given:
        if name not in names_of(loop) + names_of(own):
            has = ", ".join(flag_of(each) for each in names_of(own)) or "no settings of its own"
            raise InputError(f"{method} has no {flag_of(name)}: it has {has}")
    return resolve(loop, given), resolve(own, given)


def default_preset(dataset: str, num_pictures: int) -> str:
    """The preset of a data set: that of its name, but of a folder by the number of its pictures."""
    if dataset == "folder" and num_pictures <= SMALL_FOLDER:
        return "small-folder"
    return dataset


SMALL_FOLDER = 2000  # pictures: up to here, the small network learns them by heart

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

# Sized for a laptop: 1.06 M parameters, most of them below full size, where they cost little.
_SMALL_UNET = UNetConfig(
    sample_size=16,
    in_channels=1,
    out_channels=1,
    block_out_channels=(32, 64, 64),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
)
_SMALL_TRAINING = TrainSettings(steps=1200, batch_size=64, lr=1e-3, warmup=100)

# The loop as ReTrack's authors run it, for every method; SISS's own paper takes 300 steps of 64.
_RETRACK_LOOP = UnlearnSettings(steps=50, batch_size=128, lr=5e-5)

PRESETS = {
    "digits-tshirt": Preset(
        _SMALL_UNET,
        _SMALL_TRAINING,
        UnlearnSettings(steps=200, batch_size=64, lr=5e-5),
        EvalSettings(num_samples=1000, sampler_steps=25, threshold=5.7),
        {"retrack": ReTrack(lam=0.03), "dimum": DiMUM(lam=0.03)},
    ),
    # As digits-tshirt; the protocol of ReTrack's Stable Diffusion: 30 steps, lambda 0.5.
    "digits-prompts": Preset(
        _SMALL_UNET,
        _SMALL_TRAINING,
        UnlearnSettings(steps=30, batch_size=64, lr=1e-4),
        EvalSettings(num_samples=256, sampler_steps=25, threshold=5.0),
        {"retrack": ReTrack(lam=0.5), "dimum": DiMUM(lam=0.5, replaces="prompt")},
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
        _RETRACK_LOOP,
        EvalSettings(num_samples=10_000, sampler_steps=50, threshold=10.0),
    ),
    # The papers' set for those who have no GPU: the digits' network, about 8 epochs.
    "small-mnist": Preset(
        replace(_SMALL_UNET, sample_size=28),
        TrainSettings(steps=7500, batch_size=64, lr=1e-3, warmup=200),
        _RETRACK_LOOP,
        EvalSettings(num_samples=2000, sampler_steps=50, threshold=10.0),
    ),
    "cifar10": Preset(
        _CIFAR10_UNET,
        TrainSettings(steps=800_000, batch_size=128, lr=2e-4, warmup=5000),
        replace(_RETRACK_LOOP, steps=60, lr=2e-5),
        EvalSettings(num_samples=10_000, sampler_steps=1000, threshold=0.0),
        {"retrack": ReTrack(lam=0.02), "dimum": DiMUM(lam=0.02)},
    ),
    # A few pictures on a laptop: the digits' settings, with one more level, for pictures of up to
    # 64x64.
    "small-folder": Preset(
        replace(
            _SMALL_UNET,
            sample_size=32,
            in_channels=3,
            out_channels=3,
            block_out_channels=(32, 64, 64, 64),
            down_block_types=("DownBlock2D",) * 4,
            up_block_types=("UpBlock2D",) * 4,
        ),
        _SMALL_TRAINING,
        UnlearnSettings(steps=200, batch_size=64, lr=5e-5),
        EvalSettings(num_samples=500, sampler_steps=25, threshold=0.0),
        {"retrack": ReTrack(lam=0.03), "dimum": DiMUM(lam=0.03)},
    ),
    # Many pictures on a GPU: the network of CIFAR-10, and what the papers unlearn there with.
    "folder": Preset(
        _CIFAR10_UNET,
        TrainSettings(steps=100_000, batch_size=64, lr=1e-4, warmup=500),
        replace(_RETRACK_LOOP, steps=60, lr=2e-5),
        EvalSettings(num_samples=10_000, sampler_steps=50, threshold=0.0),
        {"retrack": ReTrack(lam=0.02), "dimum": DiMUM(lam=0.02)},
    ),
    # The papers' setting for a folder of CelebA-HQ at 256x256, and the published
    # ddpm-celebahq-256 (113.67 M parameters); trained as in the DDPM paper.
    "celebahq": Preset(
        replace(
            _CIFAR10_UNET,
            sample_size=256,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        ),
        TrainSettings(steps=500_000, batch_size=64, lr=2e-5, warmup=5000),
        UnlearnSettings(steps=40, batch_size=4, lr=5e-6, accumulate=16),
        EvalSettings(num_samples=10_000, sampler_steps=50, threshold=0.0),
        {"siss": SISS(rescale="500"), "siss-no-is": SISSNoIS(rescale="500")},
    ),
}

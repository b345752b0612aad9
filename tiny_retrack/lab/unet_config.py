"""`UNetConfig` as JSON, and the checks of one that comes from a file or from flags.

The keys and values are those of the config.json that diffusers' `UNet2DModel` writes. Every error
is an `InputError` that names the option.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from tiny_retrack.types import InputError
from tiny_retrack.unet import UNetConfig

# Far above every published model, and low enough that no value in an untrusted config overflows or
# exhausts the memory.
_BOUNDS = {
    "sample_size": (1, 4096),
    "in_channels": (1, 256),
    "out_channels": (1, 256),
    "freq_shift": (0, 1),
    "layers_per_block": (1, 32),
    "downsample_padding": (0, 1),
    "attention_head_dim": (1, 8192),
    "norm_num_groups": (1, 8192),
    "num_class_embeds": (1, 65_536),
}
_MAY_BE_NONE = ("sample_size", "attention_head_dim", "num_class_embeds")
_MAX_LEVELS = 12
_MAX_CHANNELS = 8192

# Options of UNet2DModel for which only these values are supported.
_FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DModel",),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default",),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
# Options that do not describe the network: the first is used by learned time embeddings only, the
# others are written by diffusers' `EMAModel`.
_IGNORED = {
    "num_train_timesteps",
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
}


def unet_config_to_dict(config: UNetConfig) -> dict[str, Any]:
    """What diffusers' `UNet2DModel.from_pretrained` needs to build the same network."""
    return {"_class_name": "UNet2DModel", **asdict(config)}


def unet_config_from_dict(options: Mapping[str, Any]) -> UNetConfig:
    """The config that `UNet2DModel.save_pretrained` wrote; missing options take their defaults.

    `dropout` is checked and left out: it has no weights, and is off wherever a trained model is
    used.

    Raises:
        InputError: for an unknown option, an unsupported value, or as `check_unet_config`.
    """
    values = dict(vars(UNetConfig()))
    for name, value in options.items():
        _check_supported(name, value)
        if name in values:
            values[name] = tuple(value) if isinstance(value, list) else value
    values["sample_size"] = _side(options.get("sample_size"))
    _check_values(values)
    _check_attention_groups(options, values)
    return UNetConfig(**values)


def _side(sample_size: Any) -> Any:
    """The side of a square that is given as a pair; anything else unchanged."""
    is_pair = isinstance(sample_size, list) and len(sample_size) == 2
    return sample_size[0] if is_pair and sample_size[0] == sample_size[1] else sample_size


def _check_attention_groups(options: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """The norms of the attention have the groups of all other norms."""
    groups = options.get("attn_norm_num_groups")
    wanted = values["norm_num_groups"]
    if groups is not None and (type(groups) is not int or groups != wanted):
        raise InputError(
            f"UNet option attn_norm_num_groups = {groups!r:.80} is not supported, only null or "
            f"{wanted}, as norm_num_groups"
        )


def check_unet_config(config: UNetConfig) -> None:
    """Accept a config if and only if a `UNet` can be built from it and run.

    Raises:
        InputError: for a value of the wrong type or out of bounds, or values that do not fit
            together, by the option's name.
    """
    _check_values(vars(config))


def _check_supported(name: str, value: Any) -> None:
    if name in _FIXED:
        if not any(value == supported for supported in _FIXED[name]):
            wanted = " or ".join(repr(supported) for supported in _FIXED[name])
            raise InputError(f"UNet option {name} = {value!r:.80} is not supported, only {wanted}")
        return
    if name == "dropout":
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise InputError(
                f"UNet option dropout = {value!r:.80}: must be a number from 0 up to 1"
            )
        return
    known = {field.name for field in fields(UNetConfig)} | _IGNORED | {"attn_norm_num_groups"}
    if name not in known and not name.startswith("_"):
        raise InputError(f"UNet option {name!r:.80} is not supported")


def _check_values(values: Mapping[str, Any]) -> None:
    """The values of all fields of a `UNetConfig`, of any type."""
    _check_types(values)
    _check_levels(values)
    _check_divisors(values)
    _check_halvings(values)


def _require(ok: bool, values: Mapping[str, Any], name: str, want: str) -> None:
    if not ok:
        raise InputError(f"UNet option {name} = {values[name]!r:.80}: must be {want}")


def _is_int(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high  # neither True nor 3.0


def _check_types(values: Mapping[str, Any]) -> None:
    """The type and the bounds of each option by itself."""
    for name, (low, high) in _BOUNDS.items():
        is_none = values[name] is None and name in _MAY_BE_NONE
        ok = is_none or _is_int(values[name], low, high)
        pair = " or a pair of equal ones" if name == "sample_size" else ""
        _require(ok, values, name, f"an integer, {low} to {high}{pair}")
    for name in ("center_input_sample", "flip_sin_to_cos"):
        _require(isinstance(values[name], bool), values, name, "true or false")
    eps = values["norm_eps"]
    ok = type(eps) in (int, float) and 0 < eps <= 1
    _require(ok, values, "norm_eps", "a number above 0, at most 1")
    for name, kind in (("down_block_types", "DownBlock2D"), ("up_block_types", "UpBlock2D")):
        types = values[name]
        ok = isinstance(types, tuple) and all(block in (kind, f"Attn{kind}") for block in types)
        _require(ok, values, name, f'a list of "{kind}" and "Attn{kind}"')
    channels = values["block_out_channels"]
    ok = isinstance(channels, tuple) and all(_is_int(c, 1, _MAX_CHANNELS) for c in channels)
    _require(ok, values, "block_out_channels", f"a list of integers, 1 to {_MAX_CHANNELS}")


def _check_levels(values: Mapping[str, Any]) -> None:
    """The number of levels, and one block type for each, both down and up."""
    levels = len(values["block_out_channels"])
    ok = 1 <= levels <= _MAX_LEVELS
    _require(ok, values, "block_out_channels", f"a list of 1 to {_MAX_LEVELS} levels")
    for name in ("down_block_types", "up_block_types"):
        ok = len(values[name]) == levels
        _require(ok, values, name, f"one for each of {levels} block_out_channels")


def _check_divisors(values: Mapping[str, Any]) -> None:
    """The channels against the time embedding, the groups of the norms, and the attention heads."""
    channels = values["block_out_channels"]
    half = channels[0] // 2  # frequencies of the time embedding
    ok = channels[0] % 2 == 0 and half > values["freq_shift"]
    want = "even at the first level, and above 2 with freq_shift 1"
    _require(ok, values, "block_out_channels", want)

    ok = all(c % values["norm_num_groups"] == 0 for c in channels)
    _require(ok, values, "norm_num_groups", f"a divisor of all of {channels}")

    attended = _channels_with_attention(values)
    head_dim = values["attention_head_dim"]
    ok = head_dim is None or all(c % head_dim == 0 for c in attended)
    want = f"a divisor of {attended}, the channels with attention"
    _require(ok, values, "attention_head_dim", want)


def _channels_with_attention(values: Mapping[str, Any]) -> list[int]:
    channels = values["block_out_channels"]
    attended = {channels[-1]}  # the middle block
    for c, kind in zip(channels, values["down_block_types"], strict=True):
        if kind.startswith("Attn"):
            attended.add(c)
    for c, kind in zip(reversed(channels), values["up_block_types"], strict=True):
        if kind.startswith("Attn"):
            attended.add(c)
    return sorted(attended)


def _check_halvings(values: Mapping[str, Any]) -> None:
    """Without padding, an image must be large enough to be halved at each level but the last."""
    if values["sample_size"] is None or values["downsample_padding"] == 1:
        return
    halvings = len(values["block_out_channels"]) - 1
    ok = values["sample_size"] >> halvings > 0
    _require(ok, values, "sample_size", f"at least {2**halvings}, to be halved {halvings} times")

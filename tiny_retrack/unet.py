"""The denoiser eps(x_t, t): a UNet with the layers, names and arithmetic of the diffusers library's
`UNet2DModel`.

Published weights therefore load here, and ours load there. Residual blocks with group norm, each
told t by a sinusoidal embedding, and self-attention at chosen levels (DDPM, arXiv 2006.11239,
appendix B).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from tiny_retrack.types import InputError

# Far above every published model, low enough that no value of a stranger's config overflows or
# fills the memory.
_BOUNDS = {
    "sample_size": (1, 4096),
    "in_channels": (1, 256),
    "out_channels": (1, 256),
    "freq_shift": (0, 1),
    "layers_per_block": (1, 32),
    "downsample_padding": (0, 1),
    "attention_head_dim": (1, 8192),
    "norm_num_groups": (1, 8192),
}
_MAX_LEVELS, _MAX_CHANNELS = 12, 8192

# Options of UNet2DModel that have one value here (or several spellings of it).
_FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DModel",),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "dropout": (0,),
    "act_fn": ("silu", "swish"),
    "attn_norm_num_groups": (None,),
    "resnet_time_scale_shift": ("default",),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}
# Says nothing about the network: read by learned time embeddings only, or a note of diffusers'
# `EMAModel`.
_IGNORED = {
    "num_train_timesteps",
    "decay",
    "min_decay",
    "optimization_step",
    "update_after_step",
    "use_ema_warmup",
}
_IGNORED |= {"inv_gamma", "power"}


@dataclass(frozen=True)
class UNetConfig:
    """The layout of a `UNet`: the fields of `UNet2DModel`, with its defaults.

    Attributes:
        sample_size: height and width of the images in pixels; None if not told. The network itself
        takes any size.
        center_input_sample: images come in [0, 1] and are moved to [-1, 1] first.
        freq_shift: 0 or 1; 1 makes the slowest frequency of the time embedding exactly 1/10,000, as
        in DDPM.
        flip_sin_to_cos: the time embedding holds the cosines first.
        down_block_types: one name a level, from the finest: "DownBlock2D", or "AttnDownBlock2D"
        with self-attention.
        up_block_types: likewise "UpBlock2D" or "AttnUpBlock2D", from the coarsest.
        block_out_channels: channels of each level, from the finest; even at the first.
        layers_per_block: residual blocks a level on the way down; one more on the way up.
        downsample_padding: 1 pads all sides before halving, 0 only the right and the bottom, as
        DDPM did.
        attention_head_dim: channels of one attention head; None for a single head.

    Raises:
        InputError: for a wrong type, a value out of bounds, or values that do not fit together, by
        the option's name.
    """

    sample_size: int | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = (
        "DownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
    )
    up_block_types: tuple[str, ...] = (
        "AttnUpBlock2D",
        "AttnUpBlock2D",
        "AttnUpBlock2D",
        "UpBlock2D",
    )
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    downsample_padding: int = 1
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            optional = getattr(self, name) is None and name in ("sample_size", "attention_head_dim")
            self._require(
                name,
                optional or _is_int(getattr(self, name), low, high),
                f"an integer, {low} to {high}",
            )
        for name in ("center_input_sample", "flip_sin_to_cos"):
            self._require(name, isinstance(getattr(self, name), bool), "true or false")
        eps = self.norm_eps
        self._require(
            "norm_eps", type(eps) in (int, float) and 0 < eps <= 1, "a number above 0, at most 1"
        )
        for name, kind in (("down_block_types", "DownBlock2D"), ("up_block_types", "UpBlock2D")):
            types = getattr(self, name)
            ok = isinstance(types, tuple) and all(block in (kind, f"Attn{kind}") for block in types)
            self._require(name, ok, f'a list of "{kind}" and "Attn{kind}"')

        channels, groups, head_dim = (
            self.block_out_channels,
            self.norm_num_groups,
            self.attention_head_dim,
        )
        ok = isinstance(channels, tuple) and all(_is_int(c, 1, _MAX_CHANNELS) for c in channels)
        self._require("block_out_channels", ok, f"a list of integers, 1 to {_MAX_CHANNELS}")
        levels = len(channels)
        self._require(
            "block_out_channels", 1 <= levels <= _MAX_LEVELS, f"a list of 1 to {_MAX_LEVELS} levels"
        )
        for name in ("down_block_types", "up_block_types"):
            self._require(
                name,
                len(getattr(self, name)) == levels,
                f"one for each of {levels} block_out_channels",
            )
        even = channels[0] % 2 == 0 and channels[0] // 2 > self.freq_shift
        self._require(
            "block_out_channels", even, "even at the first level, and above 2 with freq_shift 1"
        )
        self._require(
            "norm_num_groups",
            all(c % groups == 0 for c in channels),
            f"a divisor of all of {channels}",
        )
        attend = [
            c
            for c, block in zip(channels, self.down_block_types, strict=True)
            if block.startswith("Attn")
        ]
        attend += [
            c
            for c, block in zip(channels[::-1], self.up_block_types, strict=True)
            if block.startswith("Attn")
        ]
        attend += [channels[-1]]
        ok = head_dim is None or all(c % head_dim == 0 for c in attend)
        self._require(
            "attention_head_dim",
            ok,
            f"a divisor of {sorted(set(attend))}, the channels with attention",
        )
        ok = (
            self.sample_size is None
            or self.downsample_padding == 1
            or self.sample_size >> (levels - 1) > 0
        )
        self._require(
            "sample_size", ok, f"at least {2 ** (levels - 1)}, to be halved {levels - 1} times"
        )

    def _require(self, name: str, ok: bool, want: str) -> None:
        if not ok:
            raise InputError(f"UNet option {name} = {getattr(self, name)!r:.80}: must be {want}")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "UNetConfig":
        """The config that `UNet2DModel.save_pretrained` wrote; what is missing takes its default.

        Raises:
            InputError: also for an option, or a value of one, that this UNet does not have, by its
            name.
        """
        ours = {f.name for f in fields(cls)}
        for name, value in options.items():
            if name in _FIXED and not any(value == known for known in _FIXED[name]):
                wanted = " or ".join(repr(known) for known in _FIXED[name])
                raise InputError(
                    f"UNet option {name} = {value!r:.80} is not supported, only {wanted}"
                )
            if name not in ours | _FIXED.keys() | _IGNORED and not name.startswith("_"):
                raise InputError(f"UNet option {name!r:.80} is not supported")
        mine: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in options.items() if k in ours
        }
        return cls(**mine)

    def to_dict(self) -> dict[str, Any]:
        """All that `UNet2DModel.from_pretrained` needs to build the same network."""
        return {"_class_name": "UNet2DModel", **asdict(self)}


def _is_int(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high  # neither True nor 3.0


def time_features(t: Shaped[Tensor, " b"], config: UNetConfig) -> Float[Tensor, "b c"]:
    """Sines and cosines of t at geometrically spaced frequencies, always in float32: bfloat16 has
    no 999.
    """
    half = config.block_out_channels[0] // 2
    exponent = (
        -math.log(10_000)
        * torch.arange(half, dtype=torch.float32, device=t.device)
        / (half - config.freq_shift)
    )
    angle = (
        t.float()[:, None] * exponent.exp()
    )  # [b, half]; in this order, as float32 rounding times 999 can be seen
    waves = [angle.cos(), angle.sin()] if config.flip_sin_to_cos else [angle.sin(), angle.cos()]
    return torch.cat(waves, dim=1)


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, c_in, config.norm_eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.block_out_channels[0], c_out)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, c_out, config.norm_eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(temb)[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Self-attention over the pixels, added to its input."""

    def __init__(self, c: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = c // (config.attention_head_dim or c)
        self.group_norm = nn.GroupNorm(config.norm_num_groups, c, config.norm_eps)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        q, k, v = (
            rearrange(project(tokens), "b n (heads d) -> b heads n d", heads=self.heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b n (heads d)")
        return x + rearrange(self.to_out[0](mixed), "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    def __init__(self, c: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding != (0, 0) else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Block(nn.Module):
    """One level: residual blocks, each followed by self-attention if the level has it."""

    def __init__(self, c_ins: list[int], c_out: int, config: UNetConfig, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c_in, c_out, config) for c_in in c_ins)
        self.attentions = nn.ModuleList(Attention(c_out, config) for _ in c_ins if attention)

    def layer(self, i: int, x: Tensor, temb: Tensor) -> Tensor:
        x = self.resnets[i](x, temb)
        return self.attentions[i](x) if len(self.attentions) else x


class DownBlock(Block):
    """A level on the way down: adds what the way up will need to `skips`; all but the last end with
    half the size.
    """

    def __init__(
        self, c_ins: list[int], c_out: int, config: UNetConfig, attention: bool, last: bool
    ) -> None:
        super().__init__(c_ins, c_out, config, attention)
        self.downsamplers = nn.ModuleList(
            [] if last else [Downsample(c_out, config.downsample_padding)]
        )

    def forward(self, x: Tensor, temb: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, x, temb)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class UpBlock(Block):
    """A level on the way up: takes from `skips` what the way down left there; all but the last end
    at its next size.
    """

    def __init__(
        self, c_ins: list[int], c_out: int, config: UNetConfig, attention: bool, last: bool
    ) -> None:
        super().__init__(c_ins, c_out, config, attention)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(c_out)])

    def forward(self, x: Tensor, temb: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), temb)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[2:])
        return x


class MidBlock(Block):
    """Between the ways: attention between two residual blocks."""

    def __init__(self, c: int, config: UNetConfig) -> None:
        super().__init__([c], c, config, attention=True)
        self.resnets.append(ResBlock(c, c, config))

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.resnets[1](self.layer(0, x, temb), temb)


class UNet(nn.Module):
    """eps(x_t, t), after `UNet2DModel` (see the module's docstring)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, layers = config.block_out_channels, config.layers_per_block
        temb_width, last = 4 * widths[0], len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = nn.ModuleDict(
            {
                "linear_1": nn.Linear(widths[0], temb_width),
                "linear_2": nn.Linear(temb_width, temb_width),
            }
        )
        c, skips = (
            widths[0],
            [widths[0]],
        )  # channels of the running image, and of all that the way up will be given
        self.down_blocks = nn.ModuleList()
        for level, (width, kind) in enumerate(zip(widths, config.down_block_types, strict=True)):
            c_ins = [c] + [width] * (layers - 1)
            self.down_blocks.append(
                DownBlock(c_ins, width, config, kind.startswith("Attn"), level == last)
            )
            skips += [width] * (layers + (level < last))
            c = width
        self.mid_block = MidBlock(c, config)
        self.up_blocks = nn.ModuleList()
        for level, (width, kind) in enumerate(
            zip(widths[::-1], config.up_block_types, strict=True)
        ):
            c_ins = [skips.pop() + (width if i else c) for i in range(layers + 1)]
            self.up_blocks.append(
                UpBlock(c_ins, width, config, kind.startswith("Attn"), level == last)
            )
            c = width
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, c, config.norm_eps)
        self.conv_out = nn.Conv2d(c, config.out_channels, 3, padding=1)

    def forward(
        self, x_t: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """The predicted noise. `t` may be fractional; the image's sides need not be powers of two.

        Raises:
            ValueError: if the shapes of `x_t` and `t` are not those above.
        """
        if x_t.ndim != 4 or x_t.shape[1] != self.config.in_channels or t.shape != x_t.shape[:1]:
            got = f"x_t {list(x_t.shape)} and t {list(t.shape)}"
            raise ValueError(
                f"expected x_t [b, {self.config.in_channels}, h, w] and t [b], got {got}"
            )
        temb = time_features(t, self.config).to(self.conv_in.weight.dtype)
        temb = self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](temb)))
        temb = F.silu(temb)  # every residual block begins with this
        x = self.conv_in(2 * x_t - 1 if self.config.center_input_sample else x_t)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, temb, skips)
        x = self.mid_block(x, temb)
        for block in self.up_blocks:
            x = block(x, temb, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

"""The denoiser eps(x_t, t): a UNet with the layers, parameter names and arithmetic of the diffusers
library's `UNet2DModel`.

Published weights therefore load here, and ours load there. It consists of residual blocks with
group norm, each conditioned on t through a sinusoidal embedding (and on a class, if there are any),
and of self-attention at chosen levels (DDPM, arXiv 2006.11239, appendix B).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from tiny_retrack.types import Images


@dataclass(frozen=True)
class UNetConfig:
    """The layout of a `UNet`: the fields of diffusers' `UNet2DModel`, with its defaults.

    Nothing is checked here; tiny_retrack/lab/unet_config.py checks configs from files and flags.
    """

    # Height and width of the images in pixels, None if unknown. The network itself takes any size.
    sample_size: int | None = None
    in_channels: int = 3
    out_channels: int = 3
    # Images come in [0, 1], and are moved to [-1, 1] first.
    center_input_sample: bool = False
    # 1 makes the lowest frequency of the time embedding exactly 1/10,000, as in DDPM; else 0.
    freq_shift: int = 0
    # The time embedding holds the cosines first.
    flip_sin_to_cos: bool = True
    # One name per level, finest first: "DownBlock2D", or "AttnDownBlock2D" with self-attention.
    down_block_types: tuple[str, ...] = (
        "DownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
    )
    # One name per level, coarsest first: "UpBlock2D" or "AttnUpBlock2D".
    up_block_types: tuple[str, ...] = (
        "AttnUpBlock2D",
        "AttnUpBlock2D",
        "AttnUpBlock2D",
        "UpBlock2D",
    )
    # Channels of each level, finest first. The first number must be even.
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    # Residual blocks per level on the way down; the way up has one more.
    layers_per_block: int = 2
    # 1 pads all sides before halving; 0 pads the right and the bottom only, as in DDPM.
    downsample_padding: int = 1
    # Channels of one attention head; None for a single head.
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    # Classes that the network is conditioned on; None for none. Where the classes are prompts, the
    # last one means "no prompt" (tiny_retrack/prompts.py).
    num_class_embeds: int | None = None


def time_features(t: Shaped[Tensor, " b"], config: UNetConfig) -> Float[Tensor, "b c"]:
    """Sines and cosines of t at geometrically spaced frequencies.

    Always float32: bfloat16 cannot represent t = 999.
    """
    half = config.block_out_channels[0] // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    # The order of these operations is that of diffusers: at t = 999, float32 rounding is visible.
    exponent = -math.log(10_000) * index / (half - config.freq_shift)
    angle = t.float()[:, None] * exponent.exp()  # [b, half]
    sine, cosine = angle.sin(), angle.cos()
    waves = [cosine, sine] if config.flip_sin_to_cos else [sine, cosine]
    return torch.cat(waves, dim=1)


class ResBlock(nn.Module):
    """Two convolutions around the time embedding, added to the input."""

    def __init__(self, c_in: int, c_out: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, c_in, config.norm_eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.block_out_channels[0], c_out)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, c_out, config.norm_eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(
        self, x: Float[Tensor, "b c_in h w"], temb: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b c_out h w"]:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(temb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Self-attention over the pixels, added to its input."""

    def __init__(self, c: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = c // (config.attention_head_dim or c)
        self.group_norm = nn.GroupNorm(config.norm_num_groups, c, config.norm_eps)
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        tokens = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        q, k, v = (
            rearrange(project(tokens), "b n (heads d) -> b heads n d", heads=self.heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = rearrange(mixed, "b heads n d -> b n (heads d)")
        return x + rearrange(self.to_out[0](mixed), "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    """A convolution that halves height and width."""

    def __init__(self, c: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=padding)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour interpolation to `size` (height, width), then a convolution."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"], size: torch.Size) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Block(nn.Module):
    """One level: residual blocks, each followed by self-attention if the level has it."""

    def __init__(self, c_ins: list[int], c_out: int, config: UNetConfig, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c_in, c_out, config) for c_in in c_ins)
        self.attentions = nn.ModuleList(Attention(c_out, config) for _ in c_ins if attention)

    def layer(
        self, i: int, x: Float[Tensor, "b c_in h w"], temb: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b c_out h w"]:
        x = self.resnets[i](x, temb)
        return self.attentions[i](x) if len(self.attentions) else x


class DownBlock(Block):
    """A level on the way down, which appends to `skips` what the way up will need.

    All levels but the last end by halving height and width.
    """

    def __init__(
        self, c_ins: list[int], c_out: int, config: UNetConfig, attention: bool, last: bool
    ) -> None:
        super().__init__(c_ins, c_out, config, attention)
        self.downsamplers = nn.ModuleList()
        if not last:
            self.downsamplers.append(Downsample(c_out, config.downsample_padding))

    def forward(
        self, x: Float[Tensor, "b c_in h w"], temb: Float[Tensor, "b e"], skips: list[Tensor]
    ) -> Float[Tensor, "b c_out h2 w2"]:
        for i in range(len(self.resnets)):
            x = self.layer(i, x, temb)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class UpBlock(Block):
    """A level on the way up, which pops from `skips` what the way down left there.

    All levels but the last end by growing to the size of the next level.
    """

    def __init__(
        self, c_ins: list[int], c_out: int, config: UNetConfig, attention: bool, last: bool
    ) -> None:
        super().__init__(c_ins, c_out, config, attention)
        self.upsamplers = nn.ModuleList()
        if not last:
            self.upsamplers.append(Upsample(c_out))

    def forward(
        self, x: Float[Tensor, "b c_in h w"], temb: Float[Tensor, "b e"], skips: list[Tensor]
    ) -> Float[Tensor, "b c_out h2 w2"]:
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), temb)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[2:])
        return x


class MidBlock(Block):
    """Between the way down and the way up: attention between two residual blocks."""

    def __init__(self, c: int, config: UNetConfig) -> None:
        super().__init__([c], c, config, attention=True)
        self.resnets.append(ResBlock(c, c, config))

    def forward(
        self, x: Float[Tensor, "b c h w"], temb: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b c h w"]:
        x = self.layer(0, x, temb)
        return self.resnets[1](x, temb)


class UNet(nn.Module):
    """eps(x_t, t), after diffusers' `UNet2DModel`; with `num_class_embeds`, eps(x_t, t, c)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        layers = config.layers_per_block
        last = len(widths) - 1

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = nn.ModuleDict(
            {
                "linear_1": nn.Linear(widths[0], 4 * widths[0]),
                "linear_2": nn.Linear(4 * widths[0], 4 * widths[0]),
            }
        )
        if config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, 4 * widths[0])

        c = widths[0]  # channels of the running image
        skips = [c]  # channels of each image that the way down leaves for the way up
        self.down_blocks = nn.ModuleList()
        for level, (width, kind) in enumerate(zip(widths, config.down_block_types, strict=True)):
            c_ins = [c] + [width] * (layers - 1)
            attention = kind.startswith("Attn")
            self.down_blocks.append(DownBlock(c_ins, width, config, attention, level == last))
            skips += [width] * layers
            if level < last:
                skips.append(width)  # the halved image
            c = width

        self.mid_block = MidBlock(c, config)

        up_levels = zip(reversed(widths), config.up_block_types, strict=True)
        self.up_blocks = nn.ModuleList()
        for level, (width, kind) in enumerate(up_levels):
            running = [c] + [width] * layers  # before each residual block
            c_ins = [own + skips.pop() for own in running]
            attention = kind.startswith("Attn")
            self.up_blocks.append(UpBlock(c_ins, width, config, attention, level == last))
            c = width

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, c, config.norm_eps)
        self.conv_out = nn.Conv2d(c, config.out_channels, 3, padding=1)

    def forward(
        self,
        x_t: Images,
        t: Shaped[Tensor, " b"],
        c: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b c_out h w"]:
        """The predicted noise.

        `t` may be fractional. Height and width need not be powers of two.

        Args:
            c: the class of each image, below `num_class_embeds`; None for a network
                without classes.

        Raises:
            ValueError: if `x_t` is not [b, in_channels, h, w] or `t` is not [b]; or if `c` is given
                to a network without classes, or is missing for one with classes.
        """
        channels = self.config.in_channels
        if x_t.ndim != 4 or x_t.shape[1] != channels or t.shape != x_t.shape[:1]:
            raise ValueError(
                f"expected x_t [b, {channels}, h, w] and t [b], "
                f"got x_t {list(x_t.shape)} and t {list(t.shape)}"
            )
        if (c is None) != (self.config.num_class_embeds is None):
            given = "no class labels" if c is None else "class labels"
            raise ValueError(
                f"num_class_embeds is {self.config.num_class_embeds}, but {given} were given"
            )
        temb = time_features(t, self.config).to(self.conv_in.weight.dtype)
        temb = self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](temb)))
        if c is not None:
            temb = temb + self.class_embedding(c)
        temb = F.silu(temb)  # every residual block begins with this
        if self.config.center_input_sample:
            x_t = 2 * x_t - 1
        x = self.conv_in(x_t)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, temb, skips)
        x = self.mid_block(x, temb)
        for block in self.up_blocks:
            x = block(x, temb, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

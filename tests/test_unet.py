"""The UNet against diffusers' UNet2DModel: same names, shapes, outputs and gradients; and what a
config may say.
"""

import inspect
import math
import warnings
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tiny_retrack.lab.presets import PRESETS
from tiny_retrack.types import InputError
from tiny_retrack.unet import UNet, UNetConfig, time_features

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import UNet2DModel  # the oracle

CELEBAHQ = UNetConfig(
    sample_size=256,
    block_out_channels=(128, 128, 256, 256, 512, 512),
    down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    attention_head_dim=None,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    norm_eps=1e-6,
)
# Published layouts with their sizes: METHODS' table, and the model cards of ddpm-cifar10-32 and
# ddpm-celebahq-256.
FULL = {
    "mnist-tshirt": (PRESETS["mnist-tshirt"].unet, 14_735_745),
    "ddpm-cifar10-32": (PRESETS["cifar10"].unet, 35_746_307),
    "ddpm-celebahq-256": (CELEBAHQ, 113_673_219),
}


def narrow(config: UNetConfig) -> UNetConfig:
    """The same layout an eighth as wide."""
    widths = tuple(width // 8 for width in config.block_out_channels)
    head_dim = config.attention_head_dim and config.attention_head_dim // 2
    return replace(
        config, block_out_channels=widths, attention_head_dim=head_dim, norm_num_groups=4
    )


def oracle(config: UNetConfig) -> UNet2DModel:
    return UNet2DModel(**{f.name: getattr(config, f.name) for f in fields(config)})


def pair(config: UNetConfig, seed: int = 0) -> tuple[UNet, UNet2DModel]:
    """Both with the same random weights, none of them 0 or 1 as norms and biases begin."""
    ours, theirs = UNet(config), oracle(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def batch(config: UNetConfig, size: int, b: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(b, config.in_channels, size, size, generator=generator)
    return x_t, torch.tensor([0, 437, 999])[:b]


@pytest.mark.parametrize("name", FULL)
def test_full_size_has_the_oracles_names_shapes_and_the_published_count(name: str) -> None:
    config, count = FULL[name]
    with torch.device("meta"):
        ours, theirs = UNet(config), oracle(config)
    shapes = {key: p.shape for key, p in ours.state_dict().items()}
    assert shapes == {key: p.shape for key, p in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == count


@pytest.mark.parametrize(
    ("name", "size"), [("mnist-tshirt", 28), ("ddpm-cifar10-32", 32), ("ddpm-celebahq-256", 64)]
)
def test_outputs_equal_the_oracles(name: str, size: int) -> None:
    config = narrow(FULL[name][0])
    ours, theirs = pair(config)
    x_t, t = batch(config, size)
    with torch.no_grad():
        eps = ours(x_t, t)
        assert_close(eps, theirs(x_t, t).sample, rtol=1e-5, atol=1e-5)
        assert eps.shape == x_t.shape
        assert eps.std() > 0.1  # else 1e-5 says nothing


def test_the_published_mnist_network_equals_the_oracle_at_full_width() -> None:
    ours, theirs = pair(FULL["mnist-tshirt"][0])
    x_t, t = batch(ours.config, 28, b=1)
    with torch.no_grad():
        eps = ours(x_t, t)
        assert_close(eps, theirs(x_t, t).sample, rtol=1e-5, atol=1e-5 * eps.abs().max().item())
        assert eps.std() > 0.1


def test_gradients_equal_the_oracles() -> None:
    config = narrow(FULL["mnist-tshirt"][0])
    unet, reference_unet = (
        model.double() for model in pair(config)
    )  # so that only the formulas can differ
    x_t, t = batch(config, 28)
    x_t = x_t.double().requires_grad_()

    def gradients(model: torch.nn.Module, eps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        params = [p for _, p in sorted(model.named_parameters())]
        return torch.autograd.grad(eps.square().mean(), [x_t, *params])

    ours = gradients(unet, unet(x_t, t))
    theirs = gradients(reference_unet, reference_unet(x_t, t).sample)
    for mine, reference in zip(ours, theirs, strict=True):
        assert reference.abs().max() > 0
        assert_close(mine, reference, rtol=1e-6, atol=1e-9)


@settings(max_examples=15)
@given(
    levels=st.lists(
        st.tuples(st.sampled_from([4, 8, 12]), st.booleans(), st.booleans()), min_size=1, max_size=3
    ),
    options=st.fixed_dictionaries(
        {
            "layers_per_block": st.integers(1, 2),
            "in_channels": st.integers(1, 3),
            "out_channels": st.integers(1, 3),
            "downsample_padding": st.integers(0, 1),
            "freq_shift": st.integers(0, 1),
            "flip_sin_to_cos": st.booleans(),
            "center_input_sample": st.booleans(),
            "attention_head_dim": st.sampled_from([None, 1, 2, 4]),
            "norm_num_groups": st.sampled_from([1, 2, 4]),
            "norm_eps": st.sampled_from([1e-6, 1e-2]),
        }
    ),
)
def test_any_layout_equals_the_oracle(levels: list[tuple[int, bool, bool]], options: dict) -> None:
    config = UNetConfig(
        block_out_channels=tuple(width for width, _, _ in levels),
        down_block_types=tuple(
            "AttnDownBlock2D" if down else "DownBlock2D" for _, down, _ in levels
        ),
        up_block_types=tuple("AttnUpBlock2D" if up else "UpBlock2D" for _, _, up in levels),
        **options,
    )
    ours, theirs = pair(config)
    x_t, t = batch(config, 8)
    with torch.no_grad():
        assert_close(ours(x_t, t), theirs(x_t, t).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", [(13, 18), (7, 9)])
def test_sides_need_not_be_powers_of_two(padding: int, size: tuple[int, int]) -> None:
    config = replace(narrow(FULL["mnist-tshirt"][0]), downsample_padding=padding)
    x_t = torch.randn(2, 1, *size)
    assert UNet(config)(x_t, torch.tensor([0, 999])).shape == x_t.shape


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("flip", [True, False])
def test_time_features_by_hand(shift: int, flip: bool) -> None:
    """Against DDPM's formula in float64; in bfloat16 autocast too, where 998 and 999 must stay
    apart.
    """
    config = replace(narrow(CELEBAHQ), freq_shift=shift, flip_sin_to_cos=flip)
    times, half = [0, 1, 998, 999], config.block_out_channels[0] // 2
    expected = []
    for t in times:
        angles = [t * 10_000 ** (-i / (half - shift)) for i in range(half)]
        sines, cosines = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
        expected.append(cosines + sines if flip else sines + cosines)
    with torch.autocast("cpu", torch.bfloat16):
        features = time_features(torch.tensor(times), config)
    assert_close(
        features, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-4
    )  # float32 knows 999 to 6e-5


def test_autocast_channels_last_and_one_graph_leave_the_function_alone() -> None:
    config = narrow(FULL["mnist-tshirt"][0])
    model, _ = pair(config)
    x_t, t = batch(config, 28)
    with torch.no_grad():
        eps = model(x_t, t)
        whole = torch.compile(
            model, backend="eager", fullgraph=True
        )  # raises where the graph would break
        assert_close(whole(x_t, t), eps)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x_t, t)
        assert low.dtype == torch.bfloat16
        assert_close(low.float(), eps, rtol=0, atol=0.05 * eps.abs().max().item())
        last = model.to(memory_format=torch.channels_last)(x_t, t)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_close(last, eps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x_shape", "t_shape"),
    [((2, 3, 8, 8), (2,)), ((2, 1, 8, 8), (1,)), ((2, 1, 8, 8), (2, 1)), ((1, 8, 8), (1,))],
)
def test_wrong_shapes_raise(x_shape: tuple[int, ...], t_shape: tuple[int, ...]) -> None:
    model = UNet(narrow(FULL["mnist-tshirt"][0]))
    with pytest.raises(ValueError, match="expected x_t"):
        model(torch.zeros(x_shape), torch.zeros(t_shape, dtype=torch.long))


def test_every_option_of_the_oracle_is_ours_or_fixed() -> None:
    """Our defaults are diffusers', its own are read, and another value of what we fix is refused by
    name.
    """
    defaults = {
        name: p.default
        for name, p in inspect.signature(UNet2DModel.__init__).parameters.items()
        if name != "self"
    }
    ours = {f.name for f in fields(UNetConfig)}
    assert UNetConfig() == UNetConfig.from_dict(defaults)
    assert {name: getattr(UNetConfig(), name) for name in ours} == {
        name: defaults[name] for name in ours
    }
    for name in (
        defaults.keys() - ours - {"num_train_timesteps"}
    ):  # that one is read with learned embeddings only
        with pytest.raises(InputError, match=name):
            UNetConfig.from_dict({**defaults, name: "something else"})


@pytest.mark.parametrize(
    "config", [config for config, _ in FULL.values()] + [p.unet for p in PRESETS.values()]
)
def test_configs_survive_their_own_description(config: UNetConfig) -> None:
    assert UNetConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("sample_size", 0),
        ("sample_size", 10**9),
        ("sample_size", [32, 32]),
        ("in_channels", -1),
        ("in_channels", True),
        ("out_channels", "3"),
        ("center_input_sample", 1),
        ("freq_shift", 2),
        ("flip_sin_to_cos", None),
        ("down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D"]),
        ("down_block_types", "DownBlock2D"),
        ("down_block_types", ["DownBlock2D"]),
        ("up_block_types", ["UpBlock2D", ["UpBlock2D"]]),
        ("up_block_types", ["UpBlock2D"] * 3),
        ("block_out_channels", []),
        ("block_out_channels", [32, 0]),
        ("block_out_channels", [32, 10**9]),
        ("block_out_channels", [32] * 10**6),
        ("block_out_channels", [32, float("nan")]),
        ("block_out_channels", {"a": 1}),
        ("block_out_channels", None),
        ("layers_per_block", 10**9),
        ("layers_per_block", 1.5),
        ("downsample_padding", 2),
        ("attention_head_dim", 0),
        ("attention_head_dim", 7),
        ("norm_num_groups", 5),
        ("norm_num_groups", None),
        ("norm_eps", 0),
        ("norm_eps", float("nan")),
        ("norm_eps", float("inf")),
        ("act_fn", "gelu"),
        ("_class_name", "UNet2DConditionModel"),
        ("cross_attention_dim", 768),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(option: str, value: object) -> None:
    good = {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    }
    UNetConfig.from_dict(good)
    with pytest.raises(InputError, match=option) as caught:
        UNetConfig.from_dict({**good, option: value})
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_options_that_do_not_fit_together() -> None:
    narrow(CELEBAHQ)
    with pytest.raises(
        InputError, match="sample_size"
    ):  # 16 pixels cannot be halved five times without padding
        replace(narrow(CELEBAHQ), sample_size=16)
    many = 10**5
    with pytest.raises(InputError, match="1 to 12 levels"):
        UNetConfig(
            down_block_types=("DownBlock2D",) * many,
            up_block_types=("UpBlock2D",) * many,
            block_out_channels=(32,) * many,
        )
    with pytest.raises(InputError, match="block_out_channels"):  # a time embedding of odd width
        replace(narrow(CELEBAHQ), block_out_channels=(5,) * 6, norm_num_groups=1)

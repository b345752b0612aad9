"""The UNet compared with diffusers' UNet2DModel: the same names, shapes, outputs and gradients."""

import math
import warnings
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from tiny_retrack.lab.presets import PRESETS
from tiny_retrack.unet import UNet, UNetConfig, time_features

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import UNet2DModel  # the reference

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
# Published layouts, and their number of parameters: that of the papers' MNIST network, and those of
# the model cards of ddpm-cifar10-32 and ddpm-celebahq-256.
PUBLISHED = {
    "mnist-tshirt": (PRESETS["mnist-tshirt"].unet, 14_735_745),
    "ddpm-cifar10-32": (PRESETS["cifar10"].unet, 35_746_307),
    "ddpm-celebahq-256": (CELEBAHQ, 113_673_219),
}


def narrow(config: UNetConfig) -> UNetConfig:
    """The same layout with an eighth of the channels."""
    head_dim = config.attention_head_dim
    return replace(
        config,
        block_out_channels=tuple(width // 8 for width in config.block_out_channels),
        attention_head_dim=head_dim // 2 if head_dim else None,
        norm_num_groups=4,
    )


MNIST = narrow(PUBLISHED["mnist-tshirt"][0])


def reference(config: UNetConfig) -> UNet2DModel:
    return UNet2DModel(**{f.name: getattr(config, f.name) for f in fields(config)})


def pair(config: UNetConfig) -> tuple[UNet, UNet2DModel]:
    """Both with the same random weights; none is 0 or 1, as norms and biases are at first."""
    ours, theirs = UNet(config), reference(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def batch(config: UNetConfig, size: int, b: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(b, config.in_channels, size, size, generator=generator)
    return x_t, torch.tensor([0, 437, 999])[:b]


# --- The same network as diffusers'


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_have_the_names_and_shapes_of_diffusers(name: str) -> None:
    config, count = PUBLISHED[name]
    with torch.device("meta"):
        ours, theirs = UNet(config), reference(config)
    shapes = {key: p.shape for key, p in ours.state_dict().items()}
    assert shapes == {key: p.shape for key, p in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == count


@pytest.mark.parametrize(
    ("name", "size"), [("mnist-tshirt", 28), ("ddpm-cifar10-32", 32), ("ddpm-celebahq-256", 64)]
)
def test_output_equals_diffusers(name: str, size: int) -> None:
    config = narrow(PUBLISHED[name][0])
    ours, theirs = pair(config)
    x_t, t = batch(config, size)
    with torch.no_grad():
        eps = ours(x_t, t)
        assert_close(eps, theirs(x_t, t).sample, rtol=1e-5, atol=1e-5)
    assert eps.shape == x_t.shape
    assert eps.std() > 0.1  # else an error of 1e-5 would say nothing


def test_output_at_full_width_equals_diffusers() -> None:
    ours, theirs = pair(PUBLISHED["mnist-tshirt"][0])
    x_t, t = batch(ours.config, 28, b=1)
    with torch.no_grad():
        eps = ours(x_t, t)
        assert_close(eps, theirs(x_t, t).sample, rtol=1e-5, atol=1e-5 * eps.abs().max().item())
    assert eps.std() > 0.1


def test_gradients_equal_diffusers() -> None:
    unet, reference_unet = (model.double() for model in pair(MNIST))  # no rounding to speak of
    x_t, t = batch(MNIST, 28)
    x_t = x_t.double().requires_grad_()

    def gradients(model: nn.Module, eps: Tensor) -> tuple[Tensor, ...]:
        params = [p for _, p in sorted(model.named_parameters())]
        return torch.autograd.grad(eps.square().mean(), [x_t, *params])

    ours = gradients(unet, unet(x_t, t))
    theirs = gradients(reference_unet, reference_unet(x_t, t).sample)
    for mine, expected in zip(ours, theirs, strict=True):
        assert expected.abs().max() > 0
        assert_close(mine, expected, rtol=1e-6, atol=1e-9)


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
            "num_class_embeds": st.sampled_from([None, 5]),
        }
    ),
)
def test_output_of_any_layout_equals_diffusers(
    levels: list[tuple[int, bool, bool]], options: dict
) -> None:
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
    labels = None if config.num_class_embeds is None else torch.tensor([4, 0, 2])
    with torch.no_grad():
        expected = theirs(x_t, t, labels).sample
        assert_close(ours(x_t, t, labels), expected, rtol=1e-5, atol=1e-5)


def test_classes_have_the_weights_and_the_output_of_diffusers() -> None:
    ours, theirs = pair(replace(MNIST, num_class_embeds=11))
    x_t, t = batch(MNIST, 28)
    labels = torch.tensor([10, 3, 0])
    with torch.no_grad():
        eps = ours(x_t, t, c=labels)
        expected = theirs(x_t, t, labels).sample
        assert_close(eps, expected, rtol=1e-5, atol=1e-5)
        assert (eps - ours(x_t, t, labels.flip(0))).abs().amax((1, 2, 3))[[0, 2]].min() > 0.01


@pytest.mark.parametrize(("classes", "labels"), [(None, torch.zeros(3).long()), (5, None)])
def test_labels_that_are_missing_or_not_wanted_are_refused(
    classes: int | None, labels: Tensor | None
) -> None:
    model = UNet(replace(MNIST, num_class_embeds=classes))
    x_t, t = batch(MNIST, 8)
    with pytest.raises(ValueError, match=f"num_class_embeds is {classes}, but "):
        model(x_t, t, labels)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("flip", [True, False])
def test_time_features_equal_the_formula(shift: int, flip: bool) -> None:
    """DDPM's formula in float64; under bfloat16 autocast too, where 998 and 999 must differ."""
    config = replace(narrow(CELEBAHQ), freq_shift=shift, flip_sin_to_cos=flip)
    times = [0, 1, 998, 999]
    half = config.block_out_channels[0] // 2
    expected = []
    for t in times:
        angles = [t * 10_000 ** (-i / (half - shift)) for i in range(half)]
        sines, cosines = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
        expected.append(cosines + sines if flip else sines + cosines)
    with torch.autocast("cpu", torch.bfloat16):
        features = time_features(torch.tensor(times), config)
    # float32 holds 999 to 6e-5.
    assert_close(features, torch.tensor(expected), rtol=0, atol=1e-4)


# --- How it is run


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", [(13, 18), (7, 9)])
def test_output_of_odd_sizes_has_the_shape_of_the_input(
    padding: int, size: tuple[int, int]
) -> None:
    config = replace(MNIST, downsample_padding=padding)
    x_t = torch.randn(2, 1, *size)
    assert UNet(config)(x_t, torch.tensor([0, 999])).shape == x_t.shape


def test_output_under_autocast_is_bfloat16_and_close() -> None:
    model, _ = pair(MNIST)
    x_t, t = batch(MNIST, 28)
    with torch.no_grad():
        eps = model(x_t, t)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x_t, t)
    assert low.dtype == torch.bfloat16
    assert_close(low.float(), eps, rtol=0, atol=0.05 * eps.abs().max().item())


def test_output_in_channels_last_stays_so_and_is_equal() -> None:
    model, _ = pair(MNIST)
    x_t, t = batch(MNIST, 28)
    with torch.no_grad():
        eps = model(x_t, t)
        last = model.to(memory_format=torch.channels_last)(x_t, t)  # pyright: ignore
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_close(last, eps, rtol=1e-5, atol=1e-5)


def test_compiled_model_is_one_graph_and_equal(unchecked: None) -> None:
    two_levels = replace(
        MNIST,
        block_out_channels=MNIST.block_out_channels[:2],
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )
    model, _ = pair(two_levels)
    x_t, t = batch(two_levels, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # raises if the graph breaks
    with torch.no_grad():
        assert_close(compiled(x_t, t), model(x_t, t))


@pytest.mark.parametrize(
    ("x_shape", "t_shape"),
    [((2, 3, 8, 8), (2,)), ((2, 1, 8, 8), (1,)), ((2, 1, 8, 8), (2, 1)), ((1, 8, 8), (1,))],
)
def test_forward_refuses_other_shapes(
    x_shape: tuple[int, ...], t_shape: tuple[int, ...], unchecked: None
) -> None:
    model = UNet(MNIST)
    with pytest.raises(ValueError, match=r"expected x_t \[b, 1, h, w\] and t \[b\]"):
        model(torch.zeros(x_shape), torch.zeros(t_shape, dtype=torch.long))

"""UNetConfig as JSON: every option of diffusers is read or refused by its name."""

import inspect
import warnings
from dataclasses import fields, replace

import pytest
import torch
from test_unet import CELEBAHQ, PUBLISHED, narrow

from tiny_retrack.lab.presets import PRESETS
from tiny_retrack.lab.unet_config import (
    check_unet_config,
    unet_config_from_dict,
    unet_config_to_dict,
)
from tiny_retrack.types import InputError
from tiny_retrack.unet import UNet, UNetConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import UNet2DModel  # the reference

CONFIGS = [config for config, _ in PUBLISHED.values()] + [p.unet for p in PRESETS.values()]
CONFIGS.append(replace(CONFIGS[0], num_class_embeds=12))
TWO_LEVELS = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
DIFFUSERS_DEFAULTS = {
    name: p.default
    for name, p in inspect.signature(UNet2DModel.__init__).parameters.items()
    if name != "self"
}
OURS = {f.name for f in fields(UNetConfig)}


def test_defaults_are_those_of_diffusers() -> None:
    assert UNetConfig() == unet_config_from_dict(DIFFUSERS_DEFAULTS)
    assert UNetConfig() == unet_config_from_dict({})
    for name in OURS:
        assert getattr(UNetConfig(), name) == DIFFUSERS_DEFAULTS[name], name


# num_train_timesteps is used with learned time embeddings only.
@pytest.mark.parametrize("name", sorted(DIFFUSERS_DEFAULTS.keys() - OURS - {"num_train_timesteps"}))
def test_option_that_is_not_ours_is_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=name):
        unet_config_from_dict({**DIFFUSERS_DEFAULTS, name: "something else"})


@pytest.mark.parametrize("config", CONFIGS)
def test_config_survives_its_own_description(config: UNetConfig) -> None:
    check_unet_config(config)
    assert unet_config_from_dict(unet_config_to_dict(config)) == config


@pytest.mark.parametrize("config", CONFIGS)
def test_description_builds_the_same_network_in_diffusers(config: UNetConfig) -> None:
    with torch.device("meta"):
        theirs = UNet2DModel.from_config(unet_config_to_dict(config))
        ours = UNet(config)
    assert isinstance(theirs, UNet2DModel)
    for name in OURS:
        told = theirs.config[name]
        assert getattr(config, name) == (tuple(told) if isinstance(told, list) else told), name
    assert theirs.state_dict().keys() == ours.state_dict().keys()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("sample_size", 0),
        ("sample_size", 10**9),
        ("sample_size", [32, 16]),
        ("sample_size", [32, 32, 32]),
        ("attn_norm_num_groups", 16),
        ("attn_norm_num_groups", True),
        ("dropout", 1),
        ("dropout", -0.1),
        ("dropout", None),
        ("dropout", float("nan")),
        ("in_channels", -1),
        ("in_channels", True),
        ("in_channels", None),
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
        ("block_out_channels", [32] * 10**5),
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
        ("norm_eps", "1e-5"),
        ("act_fn", "gelu"),
        ("_class_name", "UNet2DConditionModel"),
        ("cross_attention_dim", 768),
        ("num_class_embeds", 0),
        ("num_class_embeds", 10**9),
        ("num_class_embeds", 10.0),
        ("class_embed_type", "timestep"),
    ],
)
def test_impossible_option_is_refused_by_name(option: str, value: object) -> None:
    unet_config_from_dict(TWO_LEVELS)
    with pytest.raises(InputError, match=option) as caught:
        unet_config_from_dict({**TWO_LEVELS, option: value})
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_options_of_the_same_network_are_read() -> None:
    """A square as a pair, the groups of the attention's norms, dropout, which has no weights."""
    plain = unet_config_from_dict({**TWO_LEVELS, "sample_size": 32, "norm_num_groups": 16})
    same = {"sample_size": [32, 32], "attn_norm_num_groups": 16, "dropout": 0.1}
    options = {**TWO_LEVELS, "norm_num_groups": 16, **same}
    assert unet_config_from_dict(options) == plain
    theirs = UNet2DModel(**options)
    ours = UNet(plain)
    ours.load_state_dict(theirs.state_dict())
    x_t, t = torch.randn(1, 3, 32, 32), torch.tensor([400])
    with torch.no_grad():
        torch.testing.assert_close(ours(x_t, t), theirs.eval()(x_t, t).sample)


def test_image_too_small_to_be_halved_is_refused() -> None:
    """Without padding, 16 pixels cannot be halved five times."""
    check_unet_config(replace(narrow(CELEBAHQ), sample_size=32))
    check_unet_config(replace(narrow(CELEBAHQ), sample_size=16, downsample_padding=1))
    with pytest.raises(InputError, match="sample_size = 16: must be at least 32"):
        check_unet_config(replace(narrow(CELEBAHQ), sample_size=16))


def test_too_many_levels_are_refused() -> None:
    many = 10**5
    config = UNetConfig(
        down_block_types=("DownBlock2D",) * many,
        up_block_types=("UpBlock2D",) * many,
        block_out_channels=(32,) * many,
    )
    with pytest.raises(InputError, match="1 to 12 levels"):
        check_unet_config(config)


def test_time_embedding_of_odd_width_is_refused() -> None:
    config = replace(narrow(CELEBAHQ), block_out_channels=(5,) * 6, norm_num_groups=1)
    with pytest.raises(InputError, match=r"block_out_channels .* even at the first level"):
        check_unet_config(config)


@pytest.mark.parametrize("way", ["down", "up"])
def test_heads_of_every_level_with_attention_are_checked(way: str) -> None:
    """The 48 channels of the level with attention do not divide into heads of 32, all others do."""
    down = ["DownBlock2D"] * 4
    up = ["UpBlock2D"] * 4
    if way == "down":
        down[1] = "AttnDownBlock2D"
    else:
        up[2] = "AttnUpBlock2D"  # the way up begins at the coarsest level
    config = UNetConfig(
        block_out_channels=(64, 48, 32, 96),
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        attention_head_dim=32,
        norm_num_groups=16,
    )
    with pytest.raises(InputError, match=r"attention_head_dim = 32: .* divisor of \[48, 96\]"):
        check_unet_config(config)

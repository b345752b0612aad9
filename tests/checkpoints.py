"""Small checkpoints for the tests, and ways to damage them."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from tiny_retrack import NoiseSchedule, UNet, UNetConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLED = "diffusion_pytorch_model.bin"
SCHEDULER = "scheduler/scheduler_config.json"

LINEAR = NoiseSchedule.linear()
TINY = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(4, 8),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=4,
    norm_num_groups=2,
)


def random_unet(seed: int, config: UNetConfig = TINY) -> UNet:
    """A UNet whose weights are all random, and depend on the seed alone."""
    model = UNet(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether the names and all values are equal."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_model(a: UNet, b: UNet) -> bool:
    return a.config == b.config and same_tensors(a.state_dict(), b.state_dict())


def edit_json(path: Path, **options: object) -> None:
    """Set options of a JSON object in a file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the weights as diffusers does, without our notes in the header."""
    path = folder / WEIGHTS
    tensors = safetensors.torch.load_file(path)
    edit(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def replace_by_pickle(folder: Path, value: object) -> Path:
    """Save a value with torch.save, in place of the folder's weights."""
    (folder / WEIGHTS).unlink()
    torch.save(value, folder / PICKLED)
    return folder / PICKLED


class Bomb:
    """Whoever unpickles it runs code, which makes the folder `target`."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)

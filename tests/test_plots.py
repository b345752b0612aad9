"""Grids of images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid as reference

from tiny_retrack.lab.plots import make_grid, save_grid


def random_images(num: int, channels: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (num, channels, 4, 5), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("num", "columns", "gap"), [(6, 3, 1), (7, 3, 2), (2, 2, 1), (3, 1, 4)])
def test_grid_equals_that_of_torchvision(channels: int, num: int, columns: int, gap: int) -> None:
    images = random_images(num, channels)
    expected = reference(images, nrow=columns, padding=gap, pad_value=128)
    assert torch.equal(make_grid(images, columns, gap).permute(2, 0, 1), expected)


def test_grid_of_fewer_images_than_columns_has_one_short_row(tmp_path: Path) -> None:
    save_grid(tmp_path / "grid.png", random_images(2, 1), columns=10, scale=3)
    with Image.open(tmp_path / "grid.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (3 + 4 * 3 + 3, 3 + 2 * (5 * 3 + 3), 3)
    assert (pixels[:3] == 128).all()

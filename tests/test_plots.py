"""Grids of images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_retrack.lab.plots import save_grid


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_puts_each_image_scaled_in_its_row_and_column(tmp_path: Path, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (5, channels, 4, 6), dtype=torch.uint8, generator=generator)
    save_grid(tmp_path / "grid.png", images, columns=3, scale=2)
    with Image.open(tmp_path / "grid.png") as picture:
        pixels = np.asarray(picture)
    gap = 2  # between and around
    expected = np.full((gap + 2 * (8 + gap), gap + 3 * (12 + gap), 3), 128, np.uint8)
    for i, image in enumerate(images.numpy()):
        row, column = divmod(i, 3)
        for y in range(8):
            for x in range(12):
                at = (gap + row * (8 + gap) + y, gap + column * (12 + gap) + x)
                expected[at] = image[:, y // 2, x // 2]  # one channel is gray
    np.testing.assert_array_equal(pixels, expected)


def test_grid_of_fewer_images_than_columns_has_one_short_row(tmp_path: Path) -> None:
    images = torch.zeros(2, 1, 4, 5, dtype=torch.uint8)
    save_grid(tmp_path / "grid.png", images, columns=10, scale=3)
    with Image.open(tmp_path / "grid.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (3 + 4 * 3 + 3, 3 + 2 * (5 * 3 + 3), 3)
    assert (pixels[:3] == 128).all()

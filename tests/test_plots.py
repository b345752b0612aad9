"""Grids of images, and curves that can be told apart."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from tiny_retrack.lab import plots
from tiny_retrack.lab.plots import AttackCurve, AttackPlot, save_grid


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


LABELS = [f"method {i}" for i in range(12)]


def draw_panels(path: Path) -> None:
    plots.save_panels(path, {"y": {label: ([0, 1], [1, 2]) for label in LABELS}}, "x", columns=1)


def draw_ratios(path: Path) -> None:
    plots.save_ratios(path, {label: [(2.0, 0.1), (3.0, 0.1)] for label in LABELS}, ["0", "1"])


def draw_attacks(path: Path) -> None:
    curve = AttackCurve([0, 1], [1, 2], [1, 2], [1, 2])
    rows = [("all", [AttackPlot("y", dict.fromkeys(LABELS, curve), None)])]
    plots.save_attacks(path, rows, "retrain")


def draw_pareto(path: Path) -> None:
    plots.save_pareto(path, {label: [(1.0, 2.0)] for label in LABELS}, "x", "y")


@pytest.mark.parametrize("draw", [draw_panels, draw_ratios, draw_attacks, draw_pareto])
def test_twelve_labels_have_twelve_colours(
    draw: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []

    class Recorded(Figure):
        def savefig(self, *args: object, **options: object) -> None:
            figures.append(self)

    monkeypatch.setattr(plots, "Figure", Recorded)
    draw(tmp_path / "plot.png")
    (figure,) = figures
    (axis,) = figure.get_axes()
    handles, labels = axis.get_legend_handles_labels()
    assert labels == LABELS
    lines = [getattr(handle, "lines", [handle])[0] for handle in handles]  # of error bars, too
    assert len({to_hex(line.get_color()) for line in lines}) == len(LABELS)


def test_wrapped_breaks_a_spec_between_its_settings() -> None:
    assert plots.wrapped("retrack-exact") == "retrack-exact"
    assert plots.wrapped("retrack-generalizing:snr-cap=1,lam=0.1,lr=5e-4,decay=cosine") == (
        "retrack-generalizing:\nsnr-cap=1, lam=0.1, lr=5e-4,\ndecay=cosine"
    )

"""Tables, sample grids and curves. Functions that draw take a path to write to; images are uint8."""

import itertools
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from jaxtyping import UInt8
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

mpl.rcParams.update({"figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3, "font.size": 9})


def cell(value: object) -> str:
    """A number as people read it: 4 significant digits; None as a dash."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same keys as an aligned Markdown table."""
    if not rows:
        return ""
    lines = [list(rows[0]), *[[cell(value) for value in row.values()] for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines
    )


def save_grid(path: Path, images: UInt8[Tensor, "n c h w"], columns: int, scale: int = 1) -> None:
    """A PNG of the images, `columns` a row, each pixel drawn `scale` x `scale`."""
    big = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = make_grid(big, nrow=columns, padding=scale, pad_value=128)  # [3, H, W]
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)


def save_rows(path: Path, rows: Mapping[str, UInt8[Tensor, "n c h w"]], title: str = "") -> None:
    """A PNG with one labelled row of images each, e.g. the same noise seeds before and after
    unlearning.
    """
    figure = Figure(figsize=(9, 0.7 + 0.62 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, (label, images) in zip(axes, rows.items(), strict=True):
        axis.imshow(
            make_grid(images, nrow=len(images), padding=1, pad_value=128).permute(1, 2, 0).numpy()
        )
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
    figure.suptitle(title)
    figure.savefig(path, bbox_inches="tight")


Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # (x, y) by label


def save_curves(path: Path, curves: Curves, xlabel: str, ylabel: str, *, log: bool = False) -> None:
    """A PNG of named curves."""
    save_panels(path, {ylabel: curves}, xlabel, columns=1, log=[ylabel] if log else [])


def save_panels(
    path: Path,
    panels: Mapping[str, Curves],
    xlabel: str,
    columns: int,
    *,
    log: Collection[str] = (),
) -> None:
    """A PNG of several plots, by what is on their y axis, with one legend; the axes named in `log`
    are logarithmic.
    """
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(6, 3.6 * columns), max(3.6, 2.8 * rows)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (ylabel, curves) in zip(axes, panels.items(), strict=False):
        for i, (label, (x, y)) in enumerate(curves.items()):
            axis.plot(
                x, y, label=label, linewidth=1.2, linestyle=("-", "--", ":")[i // 10 % 3]
            )  # ten colours
        axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if ylabel in log else "linear")
    handles, labels = axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, fontsize=7, loc="outside right center")
    figure.savefig(path, bbox_inches="tight")


def smooth(values: Sequence[float], window: int = 50) -> list[float]:
    """The running mean over the last `window` values."""
    sums = torch.tensor([0.0, *values], dtype=torch.float64).cumsum(0)
    first = (torch.arange(1, len(values) + 1) - window).clamp_min(0)
    last = torch.arange(1, len(values) + 1)
    return ((sums[last] - sums[first]) / (last - first)).tolist()


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def save_pareto(
    path: Path, points: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str
) -> None:
    """A PNG with one point a method and seed, one colour and marker a method."""
    figure = Figure(figsize=(6.5, 4))
    axis = figure.subplots()
    for (label, xy), marker in zip(points.items(), itertools.cycle("*ovs^DPXd<>p"), strict=False):
        axis.plot(*zip(*xy, strict=True), marker, label=label, markersize=6, alpha=0.8)
    positive = all(x > 0 for xy in points.values() for x, _ in xy)
    axis.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if positive else "linear", yscale="log")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, bbox_inches="tight")

"""Tables, grids of images and curves.

Functions that draw take the path of the PNG to write. Images are uint8.
"""

import math
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from einops import rearrange
from jaxtyping import UInt8
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from tiny_retrack.types import Pixels

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # (x, y) by label
Look = tuple[str, str]  # a colour and a line style
Points = Sequence[tuple[float, float]]

# matplotlib's own ten, and four more: a comparison of all methods has twelve labels.
COLORS = [*(f"C{i}" for i in range(10)), "navy", "gold", "darkgreen", "salmon"]
LINE_STYLES = ("-", "--", ":")
MARKERS = "ovs^DPXd<>p"
GRAY = 128  # between the images of a grid

mpl.rcParams.update({"figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3, "font.size": 9})


def color_of(number: int) -> str:
    """The colour of the label with this number, from 0 on."""
    return COLORS[number % len(COLORS)]


def wrapped(label: str) -> str:
    """A label in lines of at most 30 characters, such as METHOD:SETTING=VALUE,... in a legend."""
    return textwrap.fill(re.sub(r"[:,](?=\S)", r"\g<0> ", label), 30, break_on_hyphens=False)


def cell(value: object) -> str:
    """A number with 4 significant digits; None as a dash."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same keys as an aligned Markdown table."""
    if not rows:
        return ""
    header = list(rows[0])
    lines = [header]
    for row in rows:
        lines.append([cell(value) for value in row.values()])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = []
    for line in lines:
        cells = [value.ljust(width) for value, width in zip(line, widths, strict=True)]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def make_grid(images: Pixels, columns: int, gap: int) -> UInt8[Tensor, "height width 3"]:
    """The images row by row, `columns` per row, with `gap` gray pixels between and around them.

    A single image is given back without a border.
    """
    from torchvision.utils import make_grid as tile  # here, as the import takes seconds

    grid = tile(images, nrow=columns, padding=gap, pad_value=GRAY)
    return rearrange(grid, "c height width -> height width c")


def save_grid(path: Path, images: Pixels, columns: int, scale: int = 1) -> None:
    """The images, `columns` per row, each pixel drawn as `scale` x `scale`."""
    big = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = make_grid(big, min(columns, len(images)), gap=scale)
    Image.fromarray(grid.numpy()).save(path)


def save_rows(
    path: Path, rows: Mapping[str, Pixels], title: str = "", columns: Sequence[str] = ()
) -> None:
    """One labelled row of images each, such as the same noise before and after unlearning.

    Args:
        columns: what stands above each image of the first row.
    """
    figure = Figure(figsize=(9, 0.7 + 0.62 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, (label, images) in zip(axes, rows.items(), strict=True):
        axis.imshow(make_grid(images, len(images), gap=1).numpy())
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.set_ylabel(wrapped(label), rotation=0, ha="right", va="center")
    width = next(iter(rows.values())).shape[-1] + 1  # of an image and the line beside it
    at = [1 + width * i + (width - 1) / 2 for i in range(len(columns))]
    axes[0].set_xticks(at, columns)
    axes[0].xaxis.tick_top()
    axes[0].tick_params(length=0)
    figure.suptitle(title)
    figure.savefig(path, bbox_inches="tight")


def save_nearest(
    path: Path,
    samples: Pixels,
    originals: Pixels,
    distances: Sequence[float],
    threshold: float | None,
) -> None:
    """Samples with the distance of each to the forgotten image below it; hits are outlined.

    Args:
        samples: n of them.
        originals: the forgotten image that is nearest to each.
        distances: between the two: L2 norm, pixels in [0, 1].
        threshold: of a hit, in the same unit; None if hits are not counted.
    """
    figure = Figure(figsize=(1 + 0.8 * len(samples), 2.3), layout="constrained")
    axis = figure.subplots()
    height, width = samples.shape[2:]
    gap = max(1, width // 16)
    axis.imshow(make_grid(torch.cat([samples, originals]), len(samples), gap).numpy())
    for column, distance in enumerate(distances):
        left = gap + column * (width + gap) - 0.5  # in pixels, whose centres are whole numbers
        axis.text(left + width / 2, -1, f"{distance:.2f}", ha="center", va="bottom", fontsize=8)
        if threshold is not None and distance < threshold:
            corner = (left, gap - 0.5)
            axis.add_patch(Rectangle(corner, width, height, fill=False, color="red", linewidth=3))
    rows = [gap + height / 2, 2 * gap + 1.5 * height]
    axis.set(xticks=[], yticks=rows, yticklabels=["sample", "forgotten"])
    axis.tick_params(left=False)
    axis.grid(False)
    outlined = "hits are not counted"
    if threshold is not None:
        outlined = f"outlined: a hit, within {threshold:.2f}"
    figure.suptitle(f"samples nearest to a forgotten image, by L2 distance; {outlined}")
    figure.savefig(path, bbox_inches="tight")


def save_curves(
    path: Path,
    curves: Curves,
    xlabel: str,
    ylabel: str,
    *,
    log: bool = False,
    looks: Mapping[str, Look] | None = None,
) -> None:
    """One plot of named curves."""
    logs = [ylabel] if log else []
    save_panels(path, {ylabel: curves}, xlabel, columns=1, log=logs, looks=looks)


def save_panels(
    path: Path,
    panels: Mapping[str, Curves],
    xlabel: str,
    columns: int,
    *,
    log: Collection[str] = (),
    looks: Mapping[str, Look] | None = None,
) -> None:
    """Several plots, by the label of their y axis. They have one legend if they show the same
    curves, else each its own, above it.

    Args:
        log: the y axes that are logarithmic, by label.
        looks: colour and dash of each curve, by label; by default each has its own.
    """
    rows = math.ceil(len(panels) / columns)
    size = (max(6, 3.6 * columns), max(3.6, 2.8 * rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (ylabel, curves) in zip(axes, panels.items(), strict=False):
        for i, (label, (x, y)) in enumerate(curves.items()):
            default = (color_of(i), LINE_STYLES[i // len(COLORS) % len(LINE_STYLES)])
            color, style = (looks or {}).get(label, default)
            axis.plot(x, y, label=label, linewidth=1.2, color=color, linestyle=style)
        axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if ylabel in log else "linear")
    handles, labels = axes[0].get_legend_handles_labels()
    if any(list(curves) != labels for curves in panels.values()):
        for axis in axes[: len(panels)]:
            axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
    elif len(labels) > 1:
        lines = [wrapped(label) for label in labels]
        figure.legend(handles, lines, fontsize=7, loc="outside right center")
    figure.savefig(path, bbox_inches="tight")


def save_ratios(
    path: Path, ratios: Mapping[str, Sequence[tuple[float, float]]], bands: Sequence[str]
) -> None:
    """The retrain ratio by band of t, on a log axis: a curve per label, with its interval.

    Args:
        ratios: by label, (mean, half of the interval) of each band. "retrain" is drawn wide and
            black: it is where the others should be.
    """
    figure = Figure(figsize=(7, 4.2 + 0.2 * len(ratios)), layout="constrained")
    axis = figure.subplots()
    at = range(len(bands))
    for i, (label, points) in enumerate(ratios.items()):
        mean = [value for value, _ in points]
        # No interval reaches 0 on a log axis.
        half = [min(width, 0.99 * value) for value, width in points]
        is_reference = label == "retrain"
        axis.errorbar(
            at,
            mean,
            half,
            label=label,
            capsize=3,
            color="black" if is_reference else color_of(i),
            linewidth=3 if is_reference else 1.2,
        )
    axis.set_xticks([*at], bands)
    axis.set(
        xlabel="t", ylabel="mean squared distance to retrained networks,\nover theirs to each other"
    )
    axis.set_yscale("log")
    figure.legend(fontsize=8, loc="outside lower center")
    figure.savefig(path, bbox_inches="tight")


@dataclass(frozen=True)
class AttackCurve:
    """A figure of attacked models by step: its mean, lowest and highest over the models."""

    steps: Sequence[int]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class AttackPlot:
    """One plot: the curves by label, and the curve whose range is shaded."""

    ylabel: str
    curves: Mapping[str, AttackCurve]
    band: AttackCurve | None


def save_attacks(
    path: Path, rows: Sequence[tuple[str, Sequence[AttackPlot]]], reference: str
) -> None:
    """Rows of plots against the steps of an attack, each row with its title and its legend.

    Args:
        reference: what the legend calls the shaded band.
    """
    columns = len(rows[0][1])
    figure = Figure(figsize=(3.6 * columns, 3.4 * len(rows)), layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    looks: dict[str, Look] = {}  # a label has the same in all plots; dashes show what they cover
    for part, (title, plots) in zip(parts, rows, strict=True):
        axes = part.subplots(1, columns, squeeze=False)[0]
        for axis, plot in zip(axes, plots, strict=True):
            if plot.band:
                band = plot.band
                axis.fill_between(band.steps, band.low, band.high, color="0.8", label=reference)
                axis.plot(band.steps, band.mean, color="black", linewidth=2)
            for label, curve in plot.curves.items():
                new = (color_of(len(looks)), LINE_STYLES[len(looks) % len(LINE_STYLES)])
                color, style = looks.setdefault(label, new)
                axis.plot(curve.steps, curve.mean, style, marker=".", color=color, label=label)
            axis.set(xlabel="attack step", ylabel=plot.ylabel)
        handles, labels = axes[0].get_legend_handles_labels()
        part.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=4)
        part.suptitle(title, fontsize=10)
    figure.savefig(path, bbox_inches="tight")


def save_pareto(path: Path, points: Mapping[str, Points], xlabel: str, ylabel: str) -> None:
    """One point (x, y) per model, one colour and marker per label; "retrain" is black."""
    figure = Figure(figsize=(6.5, 4))
    axis = figure.subplots()
    others = 0
    for label, xy in points.items():
        if label == "retrain":
            color, marker = "black", "x"
        else:
            color, marker = color_of(others), MARKERS[others % len(MARKERS)]
            others += 1
        x, y = zip(*xy, strict=True)
        axis.plot(x, y, marker, label=label, color=color, markersize=6, alpha=0.8, linestyle="")
    positive = all(x > 0 for xy in points.values() for x, _ in xy)
    axis.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if positive else "linear", yscale="log")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, bbox_inches="tight")


def smooth(x: Sequence[float], y: Sequence[float], width: float) -> list[float]:
    """The running mean of y over x: at each x, of the points within width / 2 on either side.

    Args:
        x: increasing.
    """
    at = torch.tensor(x, dtype=torch.float64)
    sums = torch.tensor([0.0, *y], dtype=torch.float64).cumsum(0)
    first = torch.searchsorted(at, at - width / 2)
    end = torch.searchsorted(at, at + width / 2, right=True)
    return ((sums[end] - sums[first]) / (end - first)).tolist()

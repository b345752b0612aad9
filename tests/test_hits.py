"""Hits: the threshold never reaches a remain image; the picture shows the nearest samples."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_retrack.data import Split, to_float
from tiny_retrack.lab import hits
from tiny_retrack.lab.hits import HitThreshold, choose_threshold
from tiny_retrack.metrics import is_hit


def split_with_a_gap(gap: float, size: int = 28) -> Split:
    """A white image to forget; one that differs from it by `gap` in one pixel; and black ones."""
    forget = torch.full((3, 1, size, size), 255, dtype=torch.uint8)
    remain = torch.zeros(5, 1, size, size, dtype=torch.uint8)
    remain[0] = 255
    remain[0, 0, 0, 0] = 255 - round(255 * gap)
    return Split(remain, forget, torch.zeros(5, dtype=torch.long))


def far_split(size: int) -> Split:
    """A white image to forget among black ones: their distance is `size`, in pixels of [0, 1]."""
    forget = torch.full((3, 1, size, size), 255, dtype=torch.uint8)
    remain = torch.zeros(5, 1, size, size, dtype=torch.uint8)
    return Split(remain, forget, torch.zeros(5, dtype=torch.long))


def test_threshold_is_the_data_sets_own_where_no_remain_image_is_that_near() -> None:
    threshold = choose_threshold(far_split(28), own=10.0)
    assert threshold == HitThreshold(
        10.0, "the data set's own; the nearest remain image is at 28.00"
    )
    assert choose_threshold(far_split(28), own=27.5).value == 27.5


def test_threshold_scales_with_the_number_of_pixels_where_the_data_set_has_none() -> None:
    for size in (28, 56):
        expected = 10 * size / 28
        assert choose_threshold(far_split(size), own=0).value == pytest.approx(expected)


@pytest.mark.parametrize("own", [0.0, 10.0])
def test_threshold_stays_below_the_nearest_remain_image(own: float) -> None:
    """Else the remain image itself would count as a hit."""
    split = split_with_a_gap(0.4)
    threshold = choose_threshold(split, own)
    assert threshold.value == pytest.approx(0.2)
    assert (
        threshold.about
        == "half of the distance to a remain image; the nearest remain image is at 0.40"
    )
    remain, targets = split.remain / 255, split.targets / 255
    assert is_hit(remain, targets, 10.0).tolist() == [True, False, False, False, False]
    assert not is_hit(remain, targets, threshold.value or math.nan).any()


def test_threshold_that_is_given_is_taken_or_none_is() -> None:
    split = split_with_a_gap(0.4)
    assert choose_threshold(split, 10.0, given=0.3).value == pytest.approx(0.3)
    for given in (0.4001, 10.0):
        threshold = choose_threshold(split, 10.0, given)
        assert threshold.value is None
        assert threshold.about.endswith(f"0.40, within the given threshold {given:g}")
    assert choose_threshold(split, 0.0, given=0.0) == choose_threshold(split, 0.0)


def test_threshold_is_none_where_hits_mean_nothing() -> None:
    split = split_with_a_gap(0.0)
    expected = HitThreshold(None, "a remain image equals a forgotten one")
    assert choose_threshold(split, 10.0) == expected
    nothing = Split(split.remain, split.forget[:0], split.labels)
    assert choose_threshold(nothing, 10.0, 3.0) == HitThreshold(None, "nothing was to be forgotten")


def test_hits_picture_shows_the_nearest_samples_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grey = torch.tensor([10, 200, 90, 251, 130], dtype=torch.uint8)
    samples = grey.view(5, 1, 1, 1).expand(5, 1, 2, 2)
    targets = torch.tensor([100, 250], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    drawn: list[Any] = []

    def save(path: Path, *args: Any) -> None:
        drawn.extend(args)
        path.touch()

    monkeypatch.setattr(hits, "save_nearest", save)
    threshold = HitThreshold(0.1, "")
    hits.draw_nearest(tmp_path / "h.png", to_float(samples), to_float(targets), threshold, num=3)
    nearest, originals, distances, value = drawn
    assert nearest[:, 0, 0, 0].tolist() == [251, 90, 130]
    assert originals[:, 0, 0, 0].tolist() == [250, 100, 100]
    assert distances == pytest.approx([2 / 255, 20 / 255, 60 / 255], abs=1e-5)  # of four pixels
    assert value == 0.1


def red_pixels(path: Path) -> int:
    from PIL import Image

    with Image.open(path) as image:
        rgb = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    red, green, blue = rgb.view(-1, 3).int().unbind(1)
    return int(((red > 200) & (green < 60) & (blue < 60)).sum())


def test_hits_picture_outlines_hits_only(tmp_path: Path) -> None:
    samples = torch.zeros(3, 3, 4, 4)
    samples[1:] = -1
    targets = torch.zeros(1, 3, 4, 4)
    outlined = {}
    for value in (None, 0.1, 100.0):
        hits.draw_nearest(tmp_path / "h.png", samples, targets, HitThreshold(value, ""))
        outlined[value] = red_pixels(tmp_path / "h.png")
    assert outlined[None] == 0
    assert outlined[0.1] > 50
    assert outlined[100.0] > 2.5 * outlined[0.1]

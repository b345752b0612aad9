"""Intervals over bases, paired differences and Holm's correction."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tiny_retrack.lab.intervals import (
    half_width,
    holm,
    means_by_cluster,
    p_value,
    paired_differences,
)

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=8)
P_VALUES = st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=6)


def test_means_are_of_the_values_of_each_cluster_that_exist() -> None:
    means = means_by_cluster([1.0, 2.0, None, 5.0, None], ["a", "b", "a", "b", "c"])
    assert means == {"a": 1.0, "b": 3.5}


@given(VALUES)
def test_half_width_is_that_of_scipys_interval(values: list[float]) -> None:
    scale = statistics.stdev(values) / math.sqrt(len(values))
    if scale == 0:
        assert half_width(values) == 0
        return
    low, high = stats.t.interval(0.95, len(values) - 1, loc=0, scale=scale)
    assert half_width(values) == pytest.approx((high - low) / 2)


def test_half_width_covers_the_mean_in_95_of_100_samples() -> None:
    draws = stats.norm.rvs(size=(4000, 4), random_state=0)
    covered = [abs(draw.mean()) < half_width(draw.tolist()) for draw in draws]
    assert statistics.fmean(covered) == pytest.approx(0.95, abs=0.015)


def test_differences_are_of_shared_clusters() -> None:
    assert paired_differences({"a": 3.0, "b": 1.0}, {"b": 4.0, "c": 9.0}) == [-3.0]


@given(VALUES)
def test_p_value_is_that_of_scipys_test(values: list[float]) -> None:
    if statistics.stdev(values) < 1e-3:  # scipy warns of cancellation
        return
    assert p_value(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def test_p_value_without_spread_or_repeats() -> None:
    assert p_value([2.0]) == 1.0
    assert p_value([0.0, 0.0]) == 1.0
    assert p_value([2.0, 2.0]) == 0.0


def test_holm_multiplies_by_the_hypotheses_that_are_left() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5})
    assert adjusted == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.5})


@given(P_VALUES)
def test_holm_is_between_the_p_value_and_bonferroni(p_values: dict[str, float]) -> None:
    adjusted = holm(p_values)
    assert adjusted.keys() == p_values.keys()
    for name, p in p_values.items():
        assert p <= adjusted[name] <= min(1.0, len(p_values) * p) + 1e-12
    for a in p_values:
        for b in p_values:
            assert p_values[a] > p_values[b] or adjusted[a] <= adjusted[b]

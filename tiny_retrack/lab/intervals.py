"""Statistics over several bases: intervals, paired differences, Holm's correction.

The runs of one base are not independent of each other, so each base counts once, by its mean. With
equally many runs per base this is what a mixed model with a random effect per base gives.
"""

import statistics
from collections.abc import Mapping, Sequence

from scipy import stats

LEVEL = 0.95


def means_by_cluster(values: Sequence[float | None], clusters: Sequence[str]) -> dict[str, float]:
    """The mean of the values of each cluster, such as a base; without those that have no figure."""
    groups: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        if value is not None:
            groups.setdefault(cluster, []).append(value)
    return {cluster: statistics.fmean(group) for cluster, group in groups.items()}


def half_width(means: Sequence[float]) -> float:
    """Half of the 95% interval of the mean of two or more independent values, by Student's t."""
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, len(means) - 1))
    return quantile * statistics.stdev(means) / len(means) ** 0.5


def paired_differences(first: Mapping[str, float], second: Mapping[str, float]) -> list[float]:
    """first - second for each cluster that both have."""
    return [first[cluster] - second[cluster] for cluster in first if cluster in second]


def p_value(differences: Sequence[float]) -> float:
    """Two-sided, of a mean difference of 0, by Student's t; 1 for fewer than two differences."""
    if len(differences) < 2:
        return 1.0
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread == 0:
        return float(mean == 0)
    t = mean / (spread / len(differences) ** 0.5)
    return 2 * float(stats.t.sf(abs(t), len(differences) - 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values that hold for all comparisons together (Holm 1979): the smallest times their number
    m, the next times m - 1, ..., none below the one before it, none above 1.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted

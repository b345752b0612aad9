"""Metrics against closed forms and plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from tiny_retrack.lab.plots import cell, mean_and_spread, smooth, table
from tiny_retrack.metrics import (
    fid,
    fit_classifier,
    hit_frequency,
    inception_score,
    injection_similarity,
    is_hit,
    oracle_distance,
)


class Pixels(nn.Module):
    """A feature network whose features are the pixels, and whose logits are the first three of
    them.
    """

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def logits(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3]


@given(st.integers(0, 2**31), st.floats(0.05, 2.0), st.integers(1, 3))
def test_hit_frequency_counts_by_loops(seed: int, threshold: float, num_targets: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    samples = torch.rand(12, 1, 2, 3, generator=generator) * 1.4 - 0.2
    targets = torch.rand(num_targets, 1, 2, 3, generator=generator)
    count = 0
    for sample in samples:
        distances = []
        for target in targets:
            pairs = zip(sample.flatten().tolist(), target.flatten().tolist(), strict=True)
            distances.append(math.sqrt(math.fsum((min(max(a, 0), 1) - b) ** 2 for a, b in pairs)))
        count += min(distances) < threshold
    assert hit_frequency(samples, targets, threshold) == pytest.approx(count / 12)
    assert (
        hit_frequency(samples, targets[0], threshold)
        <= hit_frequency(samples, targets, threshold) + 1e-12
    )


def test_a_hit_is_strictly_nearer_than_the_threshold() -> None:
    target = torch.zeros(1, 2, 2)
    samples = torch.stack(
        [torch.full((1, 2, 2), value) for value in (0.0, 0.49, 0.5, 1.0)]
    )  # norms 0, 0.98, 1, 2
    assert is_hit(samples, target, 1.0).tolist() == [True, True, False, False]


def test_injection_similarity_by_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(3, 1, 2, 2, generator=generator) * 2 - 1
    denoised = (
        torch.randn(3, 1, 2, 2, generator=generator) * 2
    )  # clipped to [-1, 1], where images live
    lengths, cosines = [], []
    for a, b in zip(x0.flatten(1).tolist(), denoised.flatten(1).tolist(), strict=True):
        b = [min(max(v, -1), 1) for v in b]
        lengths.append(
            math.sqrt(
                math.fsum(((u + 1) / 2 - (v + 1) / 2) ** 2 for u, v in zip(a, b, strict=True))
            )
        )
        cosines.append(
            math.fsum(u * v for u, v in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
        )
    got = injection_similarity(x0, denoised, Pixels())
    assert_close(got, (torch.tensor(lengths), torch.tensor(cosines)))


def test_fid_of_gaussians_is_the_closed_form() -> None:
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), from the samples' own moments in float64."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(400, 1, 2, 2, generator=generator)
    b = (
        torch.randn(300, 1, 2, 2, generator=generator)
        * torch.tensor([0.5, 1.0, 1.5, 2.0]).view(1, 1, 2, 2)
        + 0.3
    )
    x, y = a.flatten(1).double().numpy(), b.flatten(1).double().numpy()
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    eigenvalues = np.linalg.eigvals(cov_x @ cov_y)
    expected = (
        ((x.mean(0) - y.mean(0)) ** 2).sum()
        + np.trace(cov_x + cov_y)
        - 2 * np.sqrt(eigenvalues.real).sum()
    )
    assert fid(a.split(90), b.split(70), Pixels()) == pytest.approx(expected, rel=1e-4)
    assert fid(a.split(90), a.split(70), Pixels()) == pytest.approx(0, abs=1e-4)


def test_fid_of_too_few_samples_is_refused() -> None:
    images = torch.rand(10, 1, 2, 2)
    with pytest.warns(UserWarning, match="3 samples and 10 images cannot span 4 features"):
        assert fid(images[:3].split(2), images.split(5), Pixels()) is None
    with pytest.warns(
        UserWarning, match="3 images cannot span 4 features: take the data set's own"
    ):
        assert fid(images.split(5), images[:3].split(2), Pixels()) is None


def test_inception_score_by_loops() -> None:
    x = torch.randn(30, 1, 2, 2, generator=torch.Generator().manual_seed(1)) * 3
    p = [[math.exp(v) for v in row[:3]] for row in x.flatten(1).double().tolist()]
    p = [[v / math.fsum(row) for v in row] for row in p]
    marginal = [math.fsum(row[k] for row in p) / len(p) for k in range(3)]
    kl = [math.fsum(v * math.log(v / marginal[k]) for k, v in enumerate(row)) for row in p]
    assert inception_score(x, Pixels(), batch_size=7) == pytest.approx(
        math.exp(math.fsum(kl) / len(kl)), rel=1e-5
    )
    same = torch.ones(8, 1, 2, 2)
    assert inception_score(same, Pixels()) == pytest.approx(1)
    certain = torch.eye(3)[torch.arange(9) % 3].mul(100)
    assert inception_score(
        nn.functional.pad(certain, (0, 1)).view(9, 1, 2, 2), Pixels()
    ) == pytest.approx(3)


def test_oracle_distance_by_loops() -> None:
    x_t, t = (
        torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(2)),
        torch.tensor([0, 500, 999]),
    )
    got = oracle_distance(
        lambda x, t: 2 * x, lambda x, t: x + t[:, None, None, None] / 1000, x_t, t
    )
    expected = [
        sum((2 * v - v - int(s) / 1000) ** 2 for v in x.flatten().tolist()) / 4
        for x, s in zip(x_t, t, strict=True)
    ]
    assert_close(got, torch.tensor(expected))


@pytest.mark.parametrize("labelled", [True, False])
def test_classifier_learns_and_repeats(labelled: bool) -> None:
    """Bright left or right halves; without labels, which way a bright left half was turned."""
    n = 200
    labels = torch.arange(n) % 2 if labelled else torch.zeros(n, dtype=torch.long)
    images = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 1
    images[labels == 0, :, :, :4] += 1
    images[labels == 1, :, :, 4:] += 1
    state = torch.get_rng_state()
    runs = [
        fit_classifier(lambda index: images[index], labels, seed=0, steps=60, batch_size=32)
        for _ in range(2)
    ]
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone
    for (name, a), b in zip(
        runs[0][0].state_dict().items(), runs[1][0].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert runs[0][1] > 0.95
    assert runs[0][0](images[:5]).shape == (5, 64)


def test_tables_and_running_means() -> None:
    assert cell(None) == "-"
    assert cell(0.123456) == "0.1235"
    assert (
        table([{"a": 1, "bb": 2.0}, {"a": None, "bb": "x"}])
        == "| a | bb |\n| - | -- |\n| 1 | 2  |\n| - | x  |"
    )
    assert smooth([1, 2, 3, 4], window=2) == pytest.approx([1, 1.5, 2.5, 3.5])
    assert mean_and_spread([1.0, 3.0]) == pytest.approx((2.0, math.sqrt(2)))
    assert mean_and_spread([5.0]) == (5.0, 0.0)

"""The posterior over a finite data set, its targets, and the theory of docs/theory.md.

Expected values come from the plain-Python oracle; the theorems are tested as equalities and bounds.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from tiny_retrack import posterior
from tiny_retrack.losses import ddpm_loss, retrack_loss, retrack_weighted_loss
from tiny_retrack.posterior import (
    exact_target,
    gaussian_moments,
    gaussian_target,
    ideal_eps,
    knn_target,
    local_target,
    log_posterior,
    nearest_neighbors,
    tail_mass,
    topk_target,
)
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.types import InputError

SCHEDULE = NoiseSchedule.linear()

# --- The problems ---


@dataclass(frozen=True)
class Problem:
    """A data set and some noisy images, with what the oracle says of them."""

    data: Tensor  # uint8 [n, c, h, w]
    x_t: Tensor  # [b, c, h, w]
    t: Tensor  # [b]

    @property
    def pixels(self) -> Tensor:
        """The data in [-1, 1], float32."""
        return self.data.float() / 127.5 - 1

    @property
    def images(self) -> list[list[float]]:
        return oracle.flat(self.data)

    def rows(self) -> Iterator[tuple[list[float], int]]:
        """Each x_t with its t."""
        return zip(oracle.flat(self.x_t), self.t.tolist(), strict=True)

    def log_posterior(self) -> Tensor:
        """float64 [b, n]."""
        rows = [oracle.log_posterior(x, t, self.images) for x, t in self.rows()]
        return torch.tensor(rows, dtype=torch.float64)

    def eps(self, kept: Tensor | None = None) -> Tensor:
        """eps* of all the data, or of the images kept [b, k] in each row; float64."""
        images = self.images
        rows = []
        for i, (x, t) in enumerate(self.rows()):
            chosen = images if kept is None else [images[n] for n in kept[i].tolist()]
            rows.append(oracle.ideal_eps(x, t, chosen))
        return torch.tensor(rows, dtype=torch.float64).view(self.x_t.shape)

    def in_float64(self) -> "Problem":
        return Problem(self.data, self.x_t.double(), self.t)


@st.composite
def problems(draw: Callable, min_n: int = 2) -> Problem:
    """x_t drawn near images that differ by few grey levels or by many, so that at every t some
    posteriors are spread over several images.
    """
    n = draw(st.integers(min_n, 7))
    b = draw(st.integers(1, 3))
    shape = draw(st.sampled_from([(1, 2, 2), (3, 1, 2), (1, 1, 1)]))
    contrast = draw(st.sampled_from([2, 20, 255]))
    data = torch.from_numpy(draw(arrays(np.uint8, (n, *shape), elements=st.integers(0, contrast))))
    noise = draw(arrays(np.float32, (b, *shape), elements=st.floats(-3, 3, width=32)))
    origin = draw(st.lists(st.integers(0, n - 1), min_size=b, max_size=b))
    t = torch.full((b,), draw(st.sampled_from([0, 1, 20, 100, 300, 600, 999])))
    t[0] = draw(st.integers(0, 999))  # one batch holds several t
    x0 = data[origin].float() / 127.5 - 1
    return Problem(data, SCHEDULE.q_sample(x0, t, torch.from_numpy(noise)), t)


@st.composite
def problems_and_k(draw: Callable) -> tuple[Problem, int]:
    problem = draw(problems())
    return problem, draw(st.integers(1, len(problem.data)))


def nearest_to_x0(p: Problem, k: int) -> Tensor:
    """The k images nearest to x_t / gamma_t in each row, [b, k]."""
    images = p.images
    return torch.tensor([oracle.nearest_to_x0(x, t, images, k) for x, t in p.rows()])


def first_k(p: Problem, k: int) -> Tensor:
    """The same arbitrary k images in each row, [b, k]."""
    return torch.arange(k).expand(len(p.x_t), k)


def any_k(p: Problem, k: int) -> Tensor:
    """Arbitrary k images, others in each row, [b, k]."""
    shifts = torch.arange(len(p.x_t))[:, None]
    return (torch.arange(k) + shifts) % len(p.data)


def target_of_kept(p: Problem, kept: Tensor) -> Tensor:
    return knn_target(p.x_t, p.t, p.data[kept], SCHEDULE)


def random_images(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


# --- The posterior and the optimal denoiser (docs/theory.md, sections 1 and 2) ---


@given(problems())
def test_log_posterior_equals_the_oracle_and_sums_to_1(p: Problem) -> None:
    log_p = log_posterior(p.x_t, p.t, p.data, SCHEDULE)
    assert_close(log_p.double(), p.log_posterior(), rtol=1e-6, atol=1e-6)
    assert_close(log_p.exp().sum(1), torch.ones(len(p.x_t)))


@given(problems())
def test_ideal_eps_and_exact_target_equal_the_oracle(p: Problem) -> None:
    expected = p.eps()
    of_uint8 = exact_target(p.x_t, p.t, p.data, SCHEDULE)
    of_float = ideal_eps(p.x_t, p.t, p.pixels, SCHEDULE)
    for eps in (of_uint8, of_float):
        assert eps.dtype == torch.float32
        assert_close(eps.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("t", [0, 10, 999])
def test_exact_target_of_whole_images_equals_the_oracle(t: int) -> None:
    """At 28x28 and t = 0 the logits are 1e6 and more; 20 images differ by one grey level in a few
    pixels.
    """
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 255, (1, 1, 28, 28), generator=generator).repeat(40, 1, 1, 1)
    data += torch.rand(data.shape, generator=generator) < 0.01
    data[20:] = torch.randint(0, 256, (20, 1, 28, 28), generator=generator)
    data = data.to(torch.uint8)
    times = torch.full((3,), t)
    noise = torch.randn(3, 1, 28, 28, generator=generator)
    x_t = SCHEDULE.q_sample(data[[0, 3, 30]].float() / 127.5 - 1, times, noise)
    p = Problem(data, x_t, times)
    expected = p.log_posterior()
    if t == 0:
        assert expected.min() < -1e6
        assert expected[:2].exp().max() < 0.95  # undecided between the similar images
    log_p = log_posterior(x_t, times, data, SCHEDULE)
    assert_close(log_p.double(), expected, rtol=1e-6, atol=1e-6)
    target = exact_target(x_t, times, data, SCHEDULE)
    assert_close(target.double(), p.eps(), rtol=1e-6, atol=1e-6)


@given(problems(), st.randoms(use_true_random=False))
def test_log_posterior_is_permuted_with_the_data(p: Problem, random: object) -> None:
    order = list(range(len(p.data)))
    random.shuffle(order)  # pyright: ignore[reportAttributeAccessIssue]
    log_p = log_posterior(p.x_t, p.t, p.data, SCHEDULE)
    assert_close(log_posterior(p.x_t, p.t, p.data[order], SCHEDULE), log_p[:, order])
    target = exact_target(p.x_t, p.t, p.data, SCHEDULE)
    assert_close(exact_target(p.x_t, p.t, p.data[order], SCHEDULE), target)


@given(problems(), st.data())
def test_ideal_eps_counts_duplicates_by_multiplicity(p: Problem, data: st.DataObject) -> None:
    n = len(p.data)
    counts = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n).filter(any))
    copies = Problem(p.data.repeat_interleave(torch.tensor(counts), dim=0), p.x_t, p.t)
    eps = exact_target(p.x_t, p.t, copies.data, SCHEDULE)
    weights = torch.tensor(counts).float()
    assert_close(eps, ideal_eps(p.x_t, p.t, p.data, SCHEDULE, weights))
    assert_close(eps.double(), copies.eps(), rtol=1e-6, atol=1e-6)
    weighted = [oracle.ideal_eps(x, t, p.images, [float(c) for c in counts]) for x, t in p.rows()]
    expected = torch.tensor(weighted, dtype=torch.float64).view(p.x_t.shape)
    assert_close(eps.double(), expected, rtol=1e-6, atol=1e-6)
    log_p = log_posterior(p.x_t, p.t, copies.data, SCHEDULE)
    assert_close(log_p.double(), copies.log_posterior(), rtol=1e-6, atol=1e-6)


@given(problems(min_n=3), st.integers(1, 4))
def test_an_image_can_be_removed_from_the_ideal_denoiser(p: Problem, copies: int) -> None:
    """eps* of the other images from eps* of all and the posterior mass of the copies."""
    p = p.in_float64()
    everything = torch.cat([p.data[:1].repeat(copies, 1, 1, 1), p.data[1:]])
    forgotten = p.pixels[:1].double()
    w = log_posterior(p.x_t, p.t, everything, SCHEDULE)[:, :copies].exp().sum(1)
    kept = w < 0.99  # else the difference of two nearly equal numbers
    assume(bool(kept.any()))
    w = w.view(-1, 1, 1, 1)
    gamma = SCHEDULE.gamma[p.t].double().view(-1, 1, 1, 1)
    sigma = SCHEDULE.sigma[p.t].double().view(-1, 1, 1, 1)
    implied = (p.x_t - gamma * forgotten) / sigma
    found = (ideal_eps(p.x_t, p.t, everything, SCHEDULE) - w * implied) / (1 - w)
    others = torch.arange(1, len(p.data)).expand(len(p.x_t), -1)
    assert_close(found[kept], p.eps(others)[kept], rtol=1e-6, atol=1e-6)


def test_ideal_eps_is_the_score() -> None:
    """eps* = -sigma grad log q(x_t), by central differences of the mixture's density; and autograd
    finds the derivative of eps* itself.
    """
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(5, 1, 2, 2, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(4, 1, 2, 2, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 250, 500, 999])
    x_t = SCHEDULE.q_sample(data[:4], t, noise)
    images = oracle.flat(data)
    expected = []
    for x, step in zip(oracle.flat(x_t), t.tolist(), strict=True):
        h = 1e-4 * oracle.sigma(step)
        row = []
        for i in range(len(x)):
            above = oracle.log_mixture_density([*x[:i], x[i] + h, *x[i + 1 :]], step, images)
            below = oracle.log_mixture_density([*x[:i], x[i] - h, *x[i + 1 :]], step, images)
            row.append(-oracle.sigma(step) * (above - below) / (2 * h))
        expected.append(row)
    eps = ideal_eps(x_t, t, data, SCHEDULE)
    wanted = torch.tensor(expected, dtype=torch.float64).view_as(eps)
    assert_close(eps, wanted, rtol=1e-6, atol=1e-6)
    x_t.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ideal_eps(x, t, data, SCHEDULE), x_t, eps=1e-7)


@given(problems())
def test_ideal_eps_is_attention(p: Problem) -> None:
    """x_t is the query, the images are keys and values: torch's own attention, with
    -gamma^2 ||a||^2 / (2 sigma^2) as bias.
    """
    x_t = p.x_t.double()
    data = p.pixels.double().flatten(1)
    gamma = torch.tensor([[oracle.gamma(t)] for t in p.t.tolist()], dtype=torch.float64)
    sigma = torch.tensor([[oracle.sigma(t)] for t in p.t.tolist()], dtype=torch.float64)
    bias = -((gamma / sigma) ** 2) / 2 * data.square().sum(1)
    query = gamma / sigma**2 * x_t.flatten(1)
    attend = torch.nn.functional.scaled_dot_product_attention
    x0 = attend(query, data, data, bias, scale=1.0)
    exact = exact_target(x_t, p.t, p.pixels.double(), SCHEDULE)
    assert_close(SCHEDULE.predict_x0(x_t, p.t, exact).flatten(1), x0, rtol=0, atol=1e-6)


# --- How it is computed ---


@given(problems_and_k())
def test_posterior_in_chunks_is_the_same(problem: tuple[Problem, int]) -> None:
    p, k = problem
    kept = nearest_to_x0(p, k)

    def everything() -> list[Tensor]:
        return [
            log_posterior(p.x_t, p.t, p.data, SCHEDULE),
            exact_target(p.x_t, p.t, p.data, SCHEDULE),
            topk_target(p.x_t, p.t, p.data, SCHEDULE, k),
            tail_mass(p.x_t, p.t, p.data, SCHEDULE, kept),
            *nearest_neighbors(p.data[:2], p.data, k),
        ]

    whole = everything()
    for rows in (1, 2):
        with patch.object(posterior, "_rows", return_value=rows):
            for got, wanted in zip(everything(), whole, strict=True):
                assert_close(got, wanted)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_posterior_makes_no_tensor_of_size_b_n_d() -> None:
    """The largest is a chunk of the data, of 2^19 pixels on a CPU, or the posterior [b, n]."""
    b, n = 32, 3000
    data = random_images(n, 1, 28, 28)
    x_t = data[:b].float() / 127.5 - 1
    t = torch.arange(b)
    for run in (
        lambda: exact_target(x_t, t, data, SCHEDULE),
        lambda: topk_target(x_t, t, data, SCHEDULE, 10),
        lambda: tail_mass(x_t, t, data, SCHEDULE, t[:, None]),
        lambda: nearest_neighbors(x_t, data, 10),
    ):
        with LargestTensor() as largest:
            run()
        assert 0 < largest.numel <= max(2**19, b * n)


def test_targets_ignore_autocast() -> None:
    data = random_images(50, 1, 8, 8)
    x_t = data[:4].float() / 127.5 - 0.9
    t = torch.tensor([0, 300, 600, 999])
    for target in (
        lambda: exact_target(x_t, t, data, SCHEDULE),
        lambda: topk_target(x_t, t, data, SCHEDULE, 5),
        lambda: knn_target(x_t, t, data[:20].view(4, 5, 1, 8, 8), SCHEDULE),
    ):
        wanted = target()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(target(), wanted)


# --- k images instead of all (docs/theory.md, section 5) ---


@given(problems_and_k())
def test_knn_target_equals_the_oracle(problem: tuple[Problem, int]) -> None:
    p, k = problem
    kept = any_k(p, k)
    expected = p.eps(kept)
    for data in (p.data, p.pixels):
        target = knn_target(p.x_t, p.t, data[kept], SCHEDULE)
        assert_close(target.double(), expected, rtol=1e-6, atol=1e-6)


@given(problems())
def test_targets_with_k_equal_to_n_are_exact(p: Problem) -> None:
    n = len(p.data)
    everything = first_k(p, n)
    exact = exact_target(p.x_t, p.t, p.data, SCHEDULE)
    assert_close(topk_target(p.x_t, p.t, p.data, SCHEDULE, n), exact)
    assert_close(target_of_kept(p, everything), exact)
    dropped = tail_mass(p.x_t, p.t, p.data, SCHEDULE, everything)
    assert_close(dropped, torch.zeros(len(p.x_t)))


@given(problems_and_k())
def test_tail_mass_is_the_total_variation_distance(problem: tuple[Problem, int]) -> None:
    p, k = problem
    images = p.images
    for kept in (nearest_to_x0(p, k), first_k(p, k)):
        distances = []
        for (x, t), chosen in zip(p.rows(), kept.tolist(), strict=True):
            renormalised = [0.0] * len(images)
            chosen_p = oracle.posterior(x, t, [images[n] for n in chosen])
            for n, probability in zip(chosen, chosen_p, strict=True):
                renormalised[n] = probability
            distances.append(oracle.total_variation(oracle.posterior(x, t, images), renormalised))
        expected = torch.tensor(distances, dtype=torch.float64)
        dropped = tail_mass(p.x_t, p.t, p.data, SCHEDULE, kept)
        assert_close(dropped.double(), expected, rtol=1e-6, atol=1e-9)


def test_tail_mass_keeps_tiny_values() -> None:
    data = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    gamma, sigma = oracle.gamma(100), oracle.sigma(100)
    # log odds of 50 for the image that is kept
    x_t = torch.tensor(gamma / 2 - 50 * sigma**2 / gamma).view(1, 1, 1, 1)
    dropped = tail_mass(x_t, torch.tensor([100]), data, SCHEDULE, torch.tensor([[0]]))
    assert dropped.item() == pytest.approx(math.exp(-50), rel=1e-4, abs=0)


@given(problems_and_k())
def test_target_error_is_the_tail_mass_times_the_gap_of_the_means(
    problem: tuple[Problem, int],
) -> None:
    """(6): eps*_kept - eps* = tau (gamma / sigma) (mean of the dropped - mean of the kept)."""
    p, k = problem
    assume(k < len(p.data))
    p = p.in_float64()
    images = p.images
    kept = any_k(p, k)
    error = target_of_kept(p, kept) - exact_target(p.x_t, p.t, p.data, SCHEDULE)
    for i, (x, t) in enumerate(p.rows()):
        chosen = kept[i].tolist()
        kept_mean = oracle.posterior_mean(x, t, [images[n] for n in chosen])
        rest = [image for n, image in enumerate(images) if n not in chosen]
        dropped_mean = oracle.posterior_mean(x, t, rest)
        ratio = oracle.gamma(t) / oracle.sigma(t)
        scale = oracle.tail_mass(x, t, images, chosen) * ratio
        expected = [scale * (d - m) for d, m in zip(dropped_mean, kept_mean, strict=True)]
        wanted = torch.tensor(expected, dtype=torch.float64)
        assert_close(error[i].flatten(), wanted, rtol=1e-6, atol=1e-9 * (1 + ratio))


@given(problems_and_k())
def test_target_error_is_bounded_by_the_tail_mass(problem: tuple[Problem, int]) -> None:
    """||kept - exact|| <= tau (gamma / sigma) diam, and <= sqrt(V tau / (1 - tau)).

    V is the posterior variance of v (5); docs/theory.md, section 5, proves both bounds.
    """
    p, k = problem
    p = p.in_float64()
    images = p.images
    diameter = max(math.dist(a, b) for a in images for b in images)
    exact = exact_target(p.x_t, p.t, p.data, SCHEDULE)
    by_topk = nearest_to_x0(p, k), topk_target(p.x_t, p.t, p.data, SCHEDULE, k)
    by_first = first_k(p, k), target_of_kept(p, first_k(p, k))
    for kept, target in (by_topk, by_first):
        tails = tail_mass(p.x_t, p.t, p.data, SCHEDULE, kept).tolist()
        errors = (target - exact).flatten(1).norm(dim=1).tolist()
        for (x, t), tau, error in zip(p.rows(), tails, errors, strict=True):
            ratio = oracle.gamma(t) / oracle.sigma(t)
            slack = 1e-9 * (1 + ratio)
            assert error <= tau * ratio * diameter + slack
            if tau < 1 - 1e-6:
                variance = oracle.posterior_variance(x, t, images)
                assert error <= math.sqrt(variance * tau / (1 - tau)) + slack


def test_target_error_bounds_are_attained() -> None:
    """Two images, one dropped: neither bound has room to spare, so a wrong constant would show."""
    data = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    x_t = torch.tensor([0.1], dtype=torch.float64).view(1, 1, 1, 1)
    t = torch.tensor([400])
    kept = torch.tensor([[1]])
    tau = tail_mass(x_t, t, data, SCHEDULE, kept).item()
    exact = exact_target(x_t, t, data, SCHEDULE)
    error = (knn_target(x_t, t, data[kept], SCHEDULE) - exact).abs().item()
    diameter = 2.0
    bound_by_diameter = tau * oracle.gamma(400) / oracle.sigma(400) * diameter
    variance = oracle.posterior_variance([0.1], 400, [[-1.0], [1.0]])
    assert 0.1 < tau < 0.9
    assert error == pytest.approx(bound_by_diameter, rel=1e-7)
    assert error == pytest.approx(math.sqrt(variance * tau / (1 - tau)), rel=1e-7)


@given(problems_and_k())
def test_tail_mass_falls_with_k_and_topk_drops_least(problem: tuple[Problem, int]) -> None:
    p, k = problem

    def dropped_by_topk(k: int) -> Tensor:
        return tail_mass(p.x_t, p.t, p.data, SCHEDULE, nearest_to_x0(p, k))

    def dropped_by_knn(k: int) -> Tensor:
        neighbors, _ = nearest_neighbors(p.data[:1], p.data, k)
        return tail_mass(p.x_t, p.t, p.data, SCHEDULE, neighbors.expand(len(p.x_t), k))

    fewer = max(1, k - 1)
    assert (dropped_by_topk(k) <= dropped_by_knn(k) + 1e-6).all()
    assert (dropped_by_topk(k) <= dropped_by_topk(fewer) + 1e-6).all()
    assert (dropped_by_knn(k) <= dropped_by_knn(fewer) + 1e-6).all()


@given(problems_and_k())
def test_topk_target_keeps_the_images_nearest_to_x0(problem: tuple[Problem, int]) -> None:
    """Nearest to x_t / gamma_t by a plain search, where the k-th place is not a tie."""
    p, k = problem
    images = p.images
    order = nearest_to_x0(p, len(images)).tolist()
    for (x, t), row in zip(p.rows(), order, strict=True):
        x0 = [value / oracle.gamma(t) for value in x]
        for last, first_out in pairwise(row[k - 1 : k + 1]):
            twins = images[last] == images[first_out]
            gap = math.dist(x0, images[first_out]) - math.dist(x0, images[last])
            assume(twins or gap > 1e-4)
    target = topk_target(p.x_t, p.t, p.data, SCHEDULE, k)
    assert_close(target.double(), p.eps(nearest_to_x0(p, k)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_topk_target_of_copies_is_that_of_the_image(k: int) -> None:
    data = torch.full((6, 1, 2, 2), 200, dtype=torch.uint8)
    x_t = torch.zeros(1, 1, 2, 2)
    expected = oracle.implied_noise([0.0] * 4, 500, [200 / 127.5 - 1] * 4)
    target = topk_target(x_t, torch.tensor([500]), data, SCHEDULE, k)
    assert target.flatten().tolist() == pytest.approx(expected, rel=1e-6)


# --- Little noise, much noise (docs/theory.md, section 6) ---


@given(problems())
def test_exact_target_without_noise_is_the_nearest_image(p: Problem) -> None:
    quiet = NoiseSchedule(torch.tensor([1e-12], dtype=torch.float64))  # sigma 1e-6
    images = p.images
    nearest = []
    for x, _ in p.rows():
        (best,) = oracle.nearest_neighbors(x, images, 1)
        others = [math.dist(x, image) for image in images if image != images[best]]
        # at a tie the target lies between the two
        assume(not others or min(others) - math.dist(x, images[best]) > 1e-4)
        nearest.append(best)
    x_t = p.x_t.double()
    t = torch.zeros_like(p.t)
    x0 = quiet.predict_x0(x_t, t, exact_target(x_t, t, p.pixels.double(), quiet))
    assert_close(x0, p.pixels[nearest].double(), rtol=0, atol=1e-8)


@given(problems())
def test_exact_target_in_pure_noise_is_the_mean(p: Problem) -> None:
    loud = NoiseSchedule(torch.tensor([1 - 1e-12], dtype=torch.float64))  # gamma 1e-6
    x_t = p.x_t.double()
    t = torch.zeros_like(p.t)
    x0 = loud.predict_x0(x_t, t, exact_target(x_t, t, p.data, loud))
    assert_close(x0, p.pixels.double().mean(0).expand_as(x0), rtol=0, atol=1e-4)


# --- Nearest neighbours ---


@given(problems_and_k())
def test_nearest_neighbors_of_uint8_images_equal_the_oracle(problem: tuple[Problem, int]) -> None:
    """Ties included: integers are compared exactly, and the lower index comes first."""
    p, k = problem
    queries = p.data[:3].flatten(1).double().tolist()
    levels = p.data.flatten(1).double().tolist()
    index, distance = nearest_neighbors(p.data[:3], p.data, k)
    for i, query in enumerate(queries):
        expected = oracle.nearest_neighbors(query, levels, k)
        assert index[i].tolist() == expected
        distances = [math.dist(query, levels[n]) / 127.5 for n in expected]
        assert distance[i].tolist() == pytest.approx(distances, rel=1e-6)


@given(problems_and_k())
def test_nearest_neighbors_of_float_images_have_the_least_distances(
    problem: tuple[Problem, int],
) -> None:
    """Equal up to rounding is no tie: only the distances are certain."""
    p, k = problem
    images = oracle.flat(p.pixels)
    index, distance = nearest_neighbors(p.pixels[:3], p.pixels, k)
    for i, query in enumerate(images[:3]):
        least = sorted(math.dist(query, image) for image in images)[:k]
        of_index = [math.dist(query, images[n]) for n in index[i].tolist()]
        assert distance[i].tolist() == pytest.approx(least, rel=1e-6, abs=1e-7)
        assert distance[i].tolist() == pytest.approx(of_index, rel=1e-6, abs=1e-7)


def test_nearest_neighbors_of_uint8_images_have_exact_ties() -> None:
    # different images, each at the squared distance 325
    offsets = [(18, 1), (17, 6), (15, 10), (10, 15), (6, 17), (1, 18), (-18, 1), (-1, -18)]
    levels = [[128 + a, 30 + b] for a, b in offsets]
    data = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 2)
    query = torch.tensor([128, 30], dtype=torch.uint8).view(1, 1, 1, 2)
    index, distance = nearest_neighbors(query, data, len(data))
    assert index.tolist() == [list(range(len(data)))]
    assert_close(distance, torch.full((1, len(data)), math.sqrt(325) / 127.5))


def test_nearest_neighbors_return_copies_in_order() -> None:
    """A forget set of copies and a data set with copies, which a matrix product would round
    differently.
    """
    data = torch.rand(300, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    copies = [7, 90, 91, 205, 299]
    data[copies] = data[7].clone()
    for query in (data[:1].expand(100, 1, 28, 28), data[7:8]):
        index, distance = nearest_neighbors(query, data, 300)
        places = [index[-1].tolist().index(n) for n in copies]
        assert places == list(range(places[0], places[0] + len(copies)))
        assert distance[-1, places].unique().numel() == 1
        assert distance[0, 0] == 0
        assert torch.equal(index, index[:1].expand_as(index))


# --- The losses (docs/theory.md, sections 2 to 4) ---


def smooth_model(x_t: Tensor, t: Tensor, theta: Tensor) -> Tensor:
    """A small smooth function of x_t, t and one parameter per pixel."""
    return torch.sin(x_t * theta + t.view(-1, 1, 1, 1) / 300) + theta


@given(problems_and_k())
def test_weighted_and_target_form_differ_by_the_posterior_variance(
    problem: tuple[Problem, int],
) -> None:
    """(5): the values differ by V, which does not depend on the model; the gradients are equal."""
    p, k = problem
    shape = p.x_t.shape[1:]
    theta = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).view(shape)
    theta.requires_grad_()
    neighbors = p.pixels[any_k(p, k)].double()
    x0 = neighbors[:, 0]
    noise = torch.cos(p.x_t.double())
    x_t = SCHEDULE.q_sample(x0, p.t, noise)
    target = knn_target(x_t, p.t, neighbors, SCHEDULE)

    def eps_model(x_t: Tensor, t: Tensor) -> Tensor:
        return smooth_model(x_t, t, theta)

    weighted = retrack_weighted_loss(eps_model, x0, p.t, noise, neighbors, SCHEDULE)
    targeted = retrack_loss(eps_model, x0, p.t, noise, target, SCHEDULE)
    variances = []
    for x, t, images in zip(oracle.flat(x_t), p.t.tolist(), neighbors, strict=True):
        variances.append(oracle.posterior_variance(x, t, oracle.flat(images)))
    difference = weighted.item() - targeted.item()
    assert difference == pytest.approx(oracle.average(variances), rel=1e-6, abs=1e-8)
    (of_weighted,) = torch.autograd.grad(weighted, theta)
    (of_targeted,) = torch.autograd.grad(targeted, theta)
    assert_close(of_weighted, of_targeted, rtol=1e-6, atol=1e-8)


def noise_grid(dim: int) -> tuple[Tensor, float]:
    """Points [n, 1, 1, dim] of noise space, and the volume that each stands for."""
    line = torch.linspace(-14, 14, 281 if dim == 1 else 113, dtype=torch.float64)
    points = torch.cartesian_prod(*[line] * dim).view(-1, 1, 1, dim)
    return points, (line[1] - line[0]).item() ** dim


def normal_density(z: Tensor) -> Tensor:
    """N(z; 0, I) of each row."""
    exponent = -0.5 * z.square().flatten(1).sum(1)
    return torch.exp(exponent) / (2 * math.pi) ** (z[0].numel() / 2)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("t", [250, 500, 900])
def test_importance_weights_leave_the_expected_loss_unchanged(dim: int, t: int) -> None:
    """(3): E_{q_r} of the vanilla loss = E_{q_u} of q_r/q_u times the ReTrack loss, both by
    quadrature; so its gradient. Without the factor (4) it is another loss.
    """
    points = torch.tensor([[-0.8, 0.3], [0.1, -0.5], [0.1, -0.4], [0.9, 0.7]], dtype=torch.float64)
    remain = points[:, None, None, :dim]
    forget = torch.tensor([0.5, -0.9], dtype=torch.float64)[None, None, None, :dim]
    theta = torch.full((1, 1, dim), 0.7, dtype=torch.float64, requires_grad=True)
    noise, volume = noise_grid(dim)
    times = torch.tensor([t])

    def eps_model(x: Tensor, t: Tensor) -> Tensor:
        return smooth_model(x, t, theta)

    def over_grid(loss: Callable[[Tensor], Tensor]) -> Tensor:
        """The loss at each point of noise space."""
        return torch.vmap(lambda z: loss(z[None]), chunk_size=2000)(noise)

    def vanilla_of(image: Tensor) -> Tensor:
        return over_grid(lambda z: ddpm_loss(eps_model, image, times, z, SCHEDULE))

    def reweighted_of(z: Tensor) -> Tensor:
        return retrack_weighted_loss(eps_model, forget, times, z, remain[None], SCHEDULE)

    density = normal_density(noise) * volume
    assert density.sum().item() == pytest.approx(1)
    each = torch.stack([vanilla_of(image[None]) for image in remain])
    vanilla = (density * each.mean(0)).sum()

    gamma, sigma = oracle.gamma(t), oracle.sigma(t)
    x_t = gamma * forget + sigma * noise
    densities = torch.stack([normal_density((x_t - gamma * a) / sigma) for a in remain])
    ratio = densities.mean(0) / normal_density(noise)
    reweighted = over_grid(reweighted_of)
    sampled = (density * ratio * reweighted).sum()
    assert_close(sampled, vanilla, rtol=1e-6, atol=0)
    (of_sampled,) = torch.autograd.grad(sampled, theta, retain_graph=True)
    (of_vanilla,) = torch.autograd.grad(vanilla, theta)
    assert_close(of_sampled, of_vanilla, rtol=1e-6, atol=0)
    without_factor = (density * reweighted).sum()
    assert abs(without_factor - vanilla) > 1e-3 * vanilla


REMAIN_1D = torch.tensor([-0.9, -0.2, 0.0, 0.7], dtype=torch.float64).view(4, 1, 1, 1)


@pytest.mark.parametrize("form", ["target", "weighted"])
def test_retrack_loss_minimiser_is_ideal_eps(form: str) -> None:
    """A free function, one value per point, fitted by gradient descent on the points that x_t
    takes.
    """
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
    x0 = torch.full_like(noise, 0.4)
    t = torch.tensor([300, 450, 700]).repeat(3)
    x_t = SCHEDULE.q_sample(x0, t, noise)
    target = exact_target(x_t, t, REMAIN_1D, SCHEDULE)
    neighbors = REMAIN_1D.expand(9, 4, 1, 1, 1)
    values = torch.zeros_like(noise, requires_grad=True)

    def free_function(x_t: Tensor, t: Tensor) -> Tensor:
        return values

    optimizer = torch.optim.SGD([values], lr=0.25 * len(noise))
    for _ in range(60):
        optimizer.zero_grad()
        if form == "target":
            loss = retrack_loss(free_function, x0, t, noise, target, SCHEDULE)
        else:
            loss = retrack_weighted_loss(free_function, x0, t, noise, neighbors, SCHEDULE)
        loss.backward()
        optimizer.step()
    images = oracle.flat(REMAIN_1D)
    rows = zip(oracle.flat(x_t), t.tolist(), strict=True)
    expected = [oracle.ideal_eps(x, step, images) for x, step in rows]
    assert_close(values.detach().flatten(1), torch.tensor(expected, dtype=torch.float64))


def test_ddpm_loss_minimiser_is_ideal_eps() -> None:
    """The vanilla loss enumerated over images and a grid of x_t: its gradient vanishes at
    ideal_eps, not near it.
    """
    x_t = torch.linspace(-2, 2, 41, dtype=torch.float64).view(41, 1, 1, 1)
    t = torch.full((41,), 350)
    gamma, sigma = oracle.gamma(350), oracle.sigma(350)

    def gradient(answers: Tensor) -> Tensor:
        values = answers.clone().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for image in REMAIN_1D:
            noise = (x_t - gamma * image) / sigma
            density = normal_density(noise)  # how often this image makes this x_t
            for i in range(len(x_t)):
                answer = values[i : i + 1]
                point = noise[i : i + 1]
                loss = ddpm_loss(lambda *_, eps=answer: eps, image[None], t[:1], point, SCHEDULE)
                total = total + density[i] * loss
        return torch.autograd.grad(total, values)[0]

    best = ideal_eps(x_t, t, REMAIN_1D, SCHEDULE)
    assert_close(gradient(best), torch.zeros_like(best), rtol=0, atol=1e-12)
    assert (gradient(best + 0.1).abs() > 1e-4).all()


# --- Mistakes ---

DATA = torch.zeros(4, 1, 2, 2)
X_T = torch.zeros(1, 1, 2, 2)
T = torch.tensor([5])


@pytest.mark.parametrize("k", [0, 5])
def test_topk_target_and_nearest_neighbors_refuse_a_k_outside_1_to_n(k: int) -> None:
    says = rf"k = {k}: must be from 1 to the number of images, 4"
    with pytest.raises(InputError, match=says):
        topk_target(X_T, T, DATA, SCHEDULE, k)
    with pytest.raises(InputError, match=says):
        nearest_neighbors(DATA, DATA, k)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("data", [DATA[:0], DATA[:, :, :1]], ids=["empty", "smaller images"])
def test_exact_target_and_nearest_neighbors_refuse_data_that_does_not_fit(data: Tensor) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        exact_target(X_T, T, data, SCHEDULE)
    with pytest.raises(ValueError, match="does not fit"):
        nearest_neighbors(X_T, data, 1)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "neighbors",
    [DATA, DATA[None, :, :, :1], DATA[None, :0], DATA.expand(2, 4, 1, 2, 2)],
    ids=["a data set", "smaller images", "none", "of another batch"],
)
def test_knn_target_and_retrack_weighted_loss_refuse_neighbors_that_do_not_fit(
    neighbors: Tensor,
) -> None:
    with pytest.raises(ValueError, match="fit"):
        knn_target(X_T, T, neighbors, SCHEDULE)
    with pytest.raises(ValueError, match="fit"):
        retrack_weighted_loss(lambda x_t, t: x_t, X_T, T, X_T, neighbors, SCHEDULE)


@pytest.mark.parametrize(
    "weights",
    [
        [1.0],
        [1.0, 1.0, 1.0],
        [0.0] * 4,
        [2.0, -1.0, 1.0, 1.0],
        [math.nan, 1, 1, 1],
        [math.inf, 1, 1, 1],
    ],
    ids=["one", "one too few", "all 0", "below 0", "NaN", "infinite"],
)
@pytest.mark.usefixtures("unchecked")
def test_ideal_eps_refuses_weights_that_do_not_fit(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="must be one for each"):
        ideal_eps(X_T, T, DATA, SCHEDULE, torch.tensor(weights))


@pytest.mark.usefixtures("unchecked")
def test_tail_mass_refuses_kept_images_of_another_batch() -> None:
    with pytest.raises(ValueError, match="kept of shape"):
        tail_mass(X_T, T, DATA, SCHEDULE, torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "target",
    [
        lambda x_t: log_posterior(x_t, T, DATA, SCHEDULE),
        lambda x_t: exact_target(x_t, T, DATA, SCHEDULE),
        lambda x_t: topk_target(x_t, T, DATA, SCHEDULE, 2),
        lambda x_t: knn_target(x_t, T, DATA[None], SCHEDULE),
        lambda x_t: local_target(x_t, T, DATA, SCHEDULE, 3),
        lambda x_t: gaussian_target(x_t, T, gaussian_moments(DATA), SCHEDULE),
    ],
)
def test_targets_refuse_x_t_of_integers(target: Callable[[Tensor], Tensor]) -> None:
    """Their answer would be cast to integers."""
    with pytest.raises(ValueError, match=r"x_t is torch\.uint8: must be floats"):
        target(X_T.to(torch.uint8))

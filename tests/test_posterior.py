"""The posterior over a finite data set and its targets, held against float64 oracles in plain
loops.
"""

import importlib
import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
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
    ideal_eps,
    knn_target,
    log_posterior,
    nearest_neighbors,
    tail_mass,
    topk_target,
)
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.types import InputError

SCHEDULE = NoiseSchedule.linear()


# ---------------------------------------------------------------------------------------------- the
# oracle


def scales(t: int) -> tuple[float, float]:
    """gamma_t and sigma_t of the linear schedule, multiplied out."""
    alpha_bar = 1.0
    for i in range(t + 1):
        alpha_bar *= 1 - (1e-4 + i * (0.02 - 1e-4) / 999)
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def flat(images: Tensor) -> list[list[float]]:
    """Images [n, c, h, w] as lists of float64 pixels in [-1, 1]; uint8 is cast as the model's own
    input is.
    """
    images = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
    return images.flatten(1).double().tolist()


def oracle_log_posterior(x_t: Tensor, t: Tensor, data: Tensor) -> Tensor:
    rows = []
    for x, step in zip(flat(x_t), t.tolist(), strict=True):
        gamma, sigma = scales(step)
        logits = [
            -math.fsum((p - gamma * q) ** 2 for p, q in zip(x, a, strict=True)) / (2 * sigma**2)
            for a in flat(data)
        ]
        top = max(logits)
        log_sum = top + math.log(math.fsum(math.exp(value - top) for value in logits))
        rows.append([value - log_sum for value in logits])
    return torch.tensor(rows, dtype=torch.float64)


def oracle_eps(x_t: Tensor, t: Tensor, data: Tensor, keep: list[list[int]] | None = None) -> Tensor:
    """sum_n p_n (x_t - gamma a_n) / sigma, over the images `keep[i]` of each row i (default: all)."""
    log_p, rows = oracle_log_posterior(x_t, t, data), []
    for i, (x, step) in enumerate(zip(flat(x_t), t.tolist(), strict=True)):
        gamma, sigma = scales(step)
        kept = keep[i] if keep else range(len(data))
        top = max(log_p[i, n].item() for n in kept)
        weights = [math.exp(log_p[i, n].item() - top) for n in kept]
        images = [flat(data)[n] for n in kept]
        total = math.fsum(weights)
        mean = [
            math.fsum(w * a[j] for w, a in zip(weights, images, strict=True)) / total
            for j in range(len(x))
        ]
        rows.append([(p - gamma * m) / sigma for p, m in zip(x, mean, strict=True)])
    return torch.tensor(rows, dtype=torch.float64).view(x_t.shape)


# ---------------------------------------------------------------------------------------------- the
# problems


@dataclass(frozen=True)
class Problem:
    data: Tensor  # uint8 [n, c, h, w]
    x_t: Tensor  # float32 [b, c, h, w]
    t: Tensor  # [b]

    @property
    def pixels(self) -> Tensor:
        return self.data.float() / 127.5 - 1


@st.composite
def problems(draw: Callable, min_n: int = 2) -> Problem:
    """x_t drawn near images that differ by few grey levels or by many, so that the posterior is
    open at every t.
    """
    n, b, t = (
        draw(st.integers(min_n, 7)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([0, 1, 20, 100, 300, 600, 999])),
    )
    shape = draw(st.sampled_from([(1, 2, 2), (3, 1, 2), (1, 1, 1)]))
    contrast = draw(st.sampled_from([2, 20, 255]))
    data = draw(arrays(np.uint8, (n, *shape), elements=st.integers(0, contrast)))
    noise = draw(arrays(np.float32, (b, *shape), elements=st.floats(-3, 3, width=32)))
    origin = draw(st.lists(st.integers(0, n - 1), min_size=b, max_size=b))
    steps = torch.full((b,), t)
    steps[0] = draw(st.integers(0, 999))  # one batch holds several t
    data = torch.from_numpy(data)
    x_t = SCHEDULE.q_sample(data[origin].float() / 127.5 - 1, steps, torch.from_numpy(noise))
    return Problem(data, x_t, steps)


@st.composite
def problems_and_k(draw: Callable) -> tuple[Problem, int]:
    problem = draw(problems())
    return problem, draw(st.integers(1, len(problem.data)))


def topk_indices(p: Problem, k: int) -> Tensor:
    return oracle_log_posterior(p.x_t, p.t, p.data).topk(k, dim=1).indices


def renormalised_target(p: Problem, kept: Tensor) -> Tensor:
    """The kNN target with the images `kept` [b, k]."""
    return knn_target(p.x_t, p.t, p.data[kept], SCHEDULE)


def diameter(data: Tensor) -> float:
    pixels = flat(data)
    return max(math.dist(a, b) for a in pixels for b in pixels)


# ---------------------------------------------------------------------------------------------- the
# posterior


@given(problems())
def test_log_posterior_is_the_oracle_and_its_rows_sum_to_1(p: Problem) -> None:
    log_p = log_posterior(p.x_t, p.t, p.data, SCHEDULE)
    assert_close(log_p.double(), oracle_log_posterior(p.x_t, p.t, p.data), rtol=1e-6, atol=1e-6)
    assert_close(log_p.exp().sum(1), torch.ones(len(p.x_t)))


@given(problems())
def test_ideal_eps_and_exact_target_are_the_oracle(p: Problem) -> None:
    wanted = oracle_eps(p.x_t, p.t, p.data)
    for eps in (
        exact_target(p.x_t, p.t, p.data, SCHEDULE),
        ideal_eps(p.x_t, p.t, p.pixels, SCHEDULE),
    ):
        assert eps.dtype == torch.float32
        assert_close(eps.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("t", [0, 10, 999])
def test_exact_at_full_image_size(t: int) -> None:
    """At 28x28 and t = 0 the logits are 1e6 and more; the images differ by a grey level in a few
    pixels.
    """
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 255, (1, 1, 28, 28), generator=generator).repeat(40, 1, 1, 1)
    data += torch.rand(data.shape, generator=generator) < 0.01
    data[20:] = torch.randint(0, 256, (20, 1, 28, 28), generator=generator)
    data = data.to(torch.uint8)
    steps = torch.full((3,), t)
    noise = torch.randn(3, 1, 28, 28, generator=generator)
    x_t = SCHEDULE.q_sample(data[[0, 3, 30]].float() / 127.5 - 1, steps, noise)
    wanted = oracle_log_posterior(x_t, steps, data)
    if t == 0:
        assert wanted.min() < -1e6
        assert wanted[:2].exp().max() < 0.95  # undecided between near-twins
    assert_close(log_posterior(x_t, steps, data, SCHEDULE).double(), wanted, rtol=1e-6, atol=1e-6)
    assert_close(
        exact_target(x_t, steps, data, SCHEDULE).double(),
        oracle_eps(x_t, steps, data),
        rtol=1e-6,
        atol=1e-6,
    )


@given(problems(), st.randoms(use_true_random=False))
def test_permuting_the_data_permutes_the_posterior(p: Problem, random: object) -> None:
    order = list(range(len(p.data)))
    random.shuffle(order)  # pyright: ignore[reportAttributeAccessIssue]
    log_p = log_posterior(p.x_t, p.t, p.data, SCHEDULE)
    assert_close(log_posterior(p.x_t, p.t, p.data[order], SCHEDULE), log_p[:, order])
    assert_close(
        exact_target(p.x_t, p.t, p.data[order], SCHEDULE),
        exact_target(p.x_t, p.t, p.data, SCHEDULE),
    )


@given(problems(), st.data())
def test_duplicates_count_by_multiplicity(p: Problem, data: st.DataObject) -> None:
    counts = torch.tensor(
        data.draw(
            st.lists(st.integers(0, 3), min_size=len(p.data), max_size=len(p.data)).filter(any)
        )
    )
    copies = p.data.repeat_interleave(counts, dim=0)
    eps = exact_target(p.x_t, p.t, copies, SCHEDULE)
    assert_close(eps, ideal_eps(p.x_t, p.t, p.data, SCHEDULE, weights=counts.float()))
    assert_close(eps.double(), oracle_eps(p.x_t, p.t, copies), rtol=1e-6, atol=1e-6)
    log_p = oracle_log_posterior(p.x_t, p.t, p.data) + counts.double().log()
    wanted = torch.log_softmax(log_p, dim=1) - counts.double().log()  # each copy has its share
    wanted = wanted.repeat_interleave(counts, dim=1)
    assert_close(log_posterior(p.x_t, p.t, copies, SCHEDULE).double(), wanted, rtol=1e-6, atol=1e-6)


def test_the_ideal_denoiser_is_the_score() -> None:
    """eps* = -sigma grad log q(x_t), here for a mixture whose density is written out; and it is
    differentiable.
    """
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(5, 1, 2, 2, generator=generator, dtype=torch.float64) * 2 - 1
    t = torch.tensor([0, 250, 500, 999])
    x_t = SCHEDULE.q_sample(
        data[:4], t, torch.randn(4, 1, 2, 2, generator=generator, dtype=torch.float64)
    )
    x_t.requires_grad_()
    gamma, sigma = (
        torch.tensor([scales(s)[i] for s in t.tolist()], dtype=torch.float64) for i in (0, 1)
    )
    squares = (x_t[:, None] - gamma.view(-1, 1, 1, 1, 1) * data).square().flatten(2).sum(2)
    log_q = torch.logsumexp(-squares / (2 * sigma[:, None] ** 2), dim=1)
    (score,) = torch.autograd.grad(log_q.sum(), x_t)
    assert_close(ideal_eps(x_t, t, data, SCHEDULE), -sigma.view(-1, 1, 1, 1) * score)
    torch.autograd.gradcheck(lambda x: ideal_eps(x, t, data, SCHEDULE), x_t, eps=1e-7)


@given(problems())
def test_the_ideal_denoiser_is_attention(p: Problem) -> None:
    """x_t asks, the images are keys and values: torch's own attention, with -gamma^2 ||a||^2 / (2
    sigma^2) as bias.
    """
    data, x_t = p.pixels.double().flatten(1), p.x_t.double().flatten(1)
    gamma, sigma = (
        torch.tensor([scales(t)[i] for t in p.t.tolist()], dtype=torch.float64)[:, None]
        for i in (0, 1)
    )
    bias = -((gamma / sigma) ** 2) / 2 * data.square().sum(1)
    x0 = torch.nn.functional.scaled_dot_product_attention(
        gamma / sigma**2 * x_t, data, data, bias, scale=1.0
    )
    exact = exact_target(p.x_t.double(), p.t, p.pixels.double(), SCHEDULE)
    assert_close(SCHEDULE.predict_x0(p.x_t.double(), p.t, exact).flatten(1), x0, rtol=0, atol=1e-6)


@given(problems_and_k())
def test_chunks_change_nothing(problem: tuple[Problem, int]) -> None:
    p, k = problem
    kept = topk_indices(p, k)

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
        with patch.object(posterior, "_rows", lambda _, rows=rows: rows):
            for got, wanted in zip(everything(), whole, strict=True):
                assert_close(got, wanted)


def test_no_tensor_of_size_b_n_d() -> None:
    b, n, rows, d = 32, 3000, 100, 784

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                self.numel = max(self.numel, tensor.numel() if isinstance(tensor, Tensor) else 0)
            return out

    data = torch.randint(
        0, 256, (n, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    x_t, t = data[:b].float() / 127.5 - 1, torch.arange(b)
    kept = t[:, None]
    with patch.object(posterior, "_rows", lambda _: rows):
        for run in (
            lambda: exact_target(x_t, t, data, SCHEDULE),
            lambda: topk_target(x_t, t, data, SCHEDULE, 10),
            lambda: tail_mass(x_t, t, data, SCHEDULE, kept),
            lambda: nearest_neighbors(x_t, data, 10),
        ):
            with Largest() as largest:
                run()
            assert 0 < largest.numel <= max(rows * d, b * n)


def test_autocast_does_not_reach_the_target() -> None:
    data = torch.randint(
        0, 256, (50, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    x_t, t = data[:4].float() / 127.5 - 0.9, torch.tensor([0, 300, 600, 999])
    for target in (
        lambda: exact_target(x_t, t, data, SCHEDULE),
        lambda: topk_target(x_t, t, data, SCHEDULE, 5),
        lambda: knn_target(x_t, t, data[:20].view(4, 5, 1, 8, 8), SCHEDULE),
    ):
        wanted = target()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(target(), wanted)


def test_the_benchmark_measures_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    bench = importlib.import_module("bench_posterior")
    images = torch.randint(
        0, 256, (6, 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    x_t, t = torch.ones(2, 1, 3, 3), torch.tensor([300, 900])
    assert_close(
        bench.naive_target(x_t, t, images, SCHEDULE), exact_target(x_t, t, images, SCHEDULE)
    )

    small = {
        "batch-size": 2,
        "images": 60,
        "naive-images": 40,
        "turns": 1,
        "steps": 1,
        "out": tmp_path / "b.json",
    }
    monkeypatch.setattr(
        sys, "argv", ["bench_posterior.py", *(f"--{name}={value}" for name, value in small.items())]
    )
    bench.main()
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["N"] for row in rows] == [60, 60, 60, 60, 40, 40]
    assert [row["to the first"] == 1 for row in rows] == [True, False] * 3
    assert [row["seconds"] for row in rows[1::2]] == [
        pytest.approx(a["seconds"] * b["to the first"])
        for a, b in zip(rows[::2], rows[1::2], strict=True)
    ]
    assert "step, exact" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------
# approximations


@given(problems_and_k())
def test_kept_targets_are_the_oracle(problem: tuple[Problem, int]) -> None:
    p, k = problem
    kept = (torch.arange(k) + torch.arange(len(p.x_t))[:, None]) % len(
        p.data
    )  # any k images, others in each row
    wanted = oracle_eps(p.x_t, p.t, p.data, kept.tolist())
    assert_close(renormalised_target(p, kept).double(), wanted, rtol=1e-6, atol=1e-6)
    assert_close(
        knn_target(p.x_t, p.t, p.pixels[kept], SCHEDULE).double(), wanted, rtol=1e-6, atol=1e-6
    )


@given(problems())
def test_k_equal_to_n_is_exact(p: Problem) -> None:
    n, exact = len(p.data), exact_target(p.x_t, p.t, p.data, SCHEDULE)
    assert_close(topk_target(p.x_t, p.t, p.data, SCHEDULE, n), exact)
    assert_close(renormalised_target(p, torch.arange(n).expand(len(p.x_t), n)), exact)
    assert_close(
        tail_mass(p.x_t, p.t, p.data, SCHEDULE, torch.arange(n).expand(len(p.x_t), n)),
        torch.zeros(len(p.x_t)),
    )


@given(problems_and_k())
def test_tail_mass_is_the_total_variation_distance(problem: tuple[Problem, int]) -> None:
    p, k = problem
    for kept in (topk_indices(p, k), torch.arange(k).expand(len(p.x_t), k)):
        distances = []
        for row, log_p in zip(
            kept.tolist(), oracle_log_posterior(p.x_t, p.t, p.data).tolist(), strict=True
        ):
            top = max(log_p[n] for n in row)
            total = math.fsum(math.exp(log_p[n] - top) for n in row)
            renormalised = [
                math.exp(log_p[n] - top) / total if n in row else 0.0 for n in range(len(p.data))
            ]
            distances.append(
                0.5
                * math.fsum(abs(math.exp(a) - b) for a, b in zip(log_p, renormalised, strict=True))
            )
        wanted = torch.tensor(distances, dtype=torch.float64)
        assert_close(
            tail_mass(p.x_t, p.t, p.data, SCHEDULE, kept).double(), wanted, rtol=1e-6, atol=1e-9
        )


def test_a_tiny_tail_mass_is_not_rounded_away() -> None:
    data = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    gamma, sigma = scales(100)
    x_t = torch.tensor(gamma / 2 - 50 * sigma**2 / gamma).view(1, 1, 1, 1)  # log odds of 50
    dropped = tail_mass(x_t, torch.tensor([100]), data, SCHEDULE, torch.tensor([[0]]))
    assert_close(
        dropped.double(), torch.tensor([math.exp(-50)], dtype=torch.float64), rtol=1e-4, atol=0
    )


@given(problems_and_k())
def test_target_error_is_the_tail_mass_times_the_gap_of_the_means(
    problem: tuple[Problem, int],
) -> None:
    """eps*_kept - eps* = tau (gamma/sigma) (mean of the dropped - mean of the kept images), under
    the posterior.
    """
    p, k = problem
    assume(k < len(p.data))
    p = Problem(p.data, p.x_t.double(), p.t)
    kept = (torch.arange(k) + torch.arange(len(p.x_t))[:, None]) % len(p.data)
    error = renormalised_target(p, kept) - exact_target(p.x_t, p.t, p.data, SCHEDULE)
    for i, log_p in enumerate(oracle_log_posterior(p.x_t, p.t, p.data)):
        gamma, sigma = scales(int(p.t[i]))
        means, masses = [], []
        for part in (
            kept[i].tolist(),
            [n for n in range(len(p.data)) if n not in kept[i].tolist()],
        ):
            weights = [math.exp(log_p[n] - max(log_p[part])) for n in part]
            images = p.pixels.double()[part]
            means.append(
                sum(w * a for w, a in zip(weights, images, strict=True)) / math.fsum(weights)
            )
            masses.append(math.fsum(math.exp(log_p[n]) for n in part))
        wanted = masses[1] * gamma / sigma * (means[1] - means[0])
        assert_close(error[i], wanted, rtol=1e-6, atol=1e-9 * (1 + gamma / sigma))


@given(problems_and_k())
def test_target_error_is_bounded_by_the_tail_mass(problem: tuple[Problem, int]) -> None:
    """||kept - exact|| <= tau (gamma/sigma) diam, and <= sqrt(tau / (1 - tau) V), V the posterior
    variance of v.

    The second knows the data: V is what a regression onto single v_n leaves over. docs/theory.md
    proves both.
    """
    p, k = problem
    p = Problem(p.data, p.x_t.double(), p.t)
    exact = exact_target(p.x_t, p.t, p.data, SCHEDULE)
    posterior_ = oracle_log_posterior(p.x_t, p.t, p.data).exp()
    worst = torch.arange(k).expand(len(p.x_t), k)
    for kept, target in (
        (topk_indices(p, k), topk_target(p.x_t, p.t, p.data, SCHEDULE, k)),
        (worst, None),
    ):
        target = renormalised_target(p, kept) if target is None else target
        tails = tail_mass(p.x_t, p.t, p.data, SCHEDULE, kept)
        for i, tau in enumerate(tails.tolist()):
            gamma, sigma = scales(int(p.t[i]))
            error = (target[i] - exact[i]).norm().item()
            slack = 1e-9 * (1 + gamma / sigma)
            assert error <= tau * gamma / sigma * diameter(p.data) + slack
            if tau < 1 - 1e-6:
                v = [(p.x_t[i] - gamma * a) / sigma for a in p.pixels.double()]
                variance = sum(
                    w * (u - exact[i]).square().sum().item()
                    for w, u in zip(posterior_[i].tolist(), v, strict=True)
                )
                assert error <= math.sqrt(tau / (1 - tau) * variance) + slack


def test_both_bounds_are_attained() -> None:
    """Two images, one dropped: neither bound has room to spare, so a wrong constant would show."""
    data = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    x_t, t = torch.tensor([0.1], dtype=torch.float64).view(1, 1, 1, 1), torch.tensor([400])
    kept = torch.tensor([[1]])
    tau = tail_mass(x_t, t, data, SCHEDULE, kept).item()
    gamma, sigma = scales(400)
    error = (
        (knn_target(x_t, t, data[kept], SCHEDULE) - exact_target(x_t, t, data, SCHEDULE))
        .abs()
        .item()
    )
    assert 0.1 < tau < 0.9
    assert_close(error, tau * gamma / sigma * 2)
    assert_close(error, math.sqrt(tau / (1 - tau) * (gamma / sigma * 2) ** 2 * tau * (1 - tau)))


@given(problems_and_k())
def test_tail_mass_falls_with_k_and_topk_drops_least(problem: tuple[Problem, int]) -> None:
    p, k = problem
    tail = [
        tail_mass(p.x_t, p.t, p.data, SCHEDULE, kept)
        for kept in (
            topk_indices(p, k),
            nearest_neighbors(p.data[:1], p.data, k)[0].expand(len(p.x_t), k),
            topk_indices(p, max(1, k - 1)),
            nearest_neighbors(p.data[:1], p.data, max(1, k - 1))[0].expand(len(p.x_t), -1),
        )
    ]
    top, knn, top_before, knn_before = tail
    assert (top <= knn + 1e-6).all()
    assert (top <= top_before + 1e-6).all()
    assert (knn <= knn_before + 1e-6).all()


@given(problems_and_k())
def test_topk_keeps_the_images_nearest_to_x0(problem: tuple[Problem, int]) -> None:
    """Nearest to x_t / gamma_t by a plain search, where the k-th place is not a tie."""
    p, k = problem
    kept = []
    for x, t in zip(flat(p.x_t), p.t.tolist(), strict=True):
        distances = [math.dist([value / scales(t)[0] for value in x], a) for a in flat(p.data)]
        order = sorted(range(len(distances)), key=distances.__getitem__)
        kept.append(order[:k])
        for last, first_out in itertools.pairwise(order[k - 1 : k + 1]):
            twins = torch.equal(p.data[last], p.data[first_out])
            assume(twins or distances[first_out] - distances[last] > 1e-4)
    assert_close(
        topk_target(p.x_t, p.t, p.data, SCHEDULE, k).double(),
        oracle_eps(p.x_t, p.t, p.data, kept),
        rtol=1e-6,
        atol=1e-6,
    )


def test_one_neighbour_of_a_set_of_copies_is_that_image() -> None:
    data = torch.full((6, 1, 2, 2), 200, dtype=torch.uint8)
    x_t, t = torch.zeros(1, 1, 2, 2), torch.tensor([500])
    gamma, sigma = scales(500)
    wanted = torch.full((1, 1, 2, 2), -gamma * (200 / 127.5 - 1) / sigma)
    for k in (1, 3, 6):
        assert_close(topk_target(x_t, t, data, SCHEDULE, k), wanted)


# ----------------------------------------------------------------------------------------------
# limits of sigma


@given(problems())
def test_without_noise_the_target_is_the_nearest_neighbour(p: Problem) -> None:
    quiet = NoiseSchedule(torch.tensor([1e-12], dtype=torch.float64))  # sigma 1e-6
    nearest = []
    for x in flat(p.x_t):
        distances = [math.dist(x, a) for a in flat(p.data)]
        nearest.append(min(range(len(distances)), key=distances.__getitem__))
        others = [
            d
            for d, image in zip(distances, p.data, strict=True)
            if not torch.equal(image, p.data[nearest[-1]])
        ]
        assume(
            not others or min(others) - min(distances) > 1e-4
        )  # at a tie the target lies between the two
    t, x_t = torch.zeros_like(p.t), p.x_t.double()
    x0 = quiet.predict_x0(x_t, t, exact_target(x_t, t, p.pixels.double(), quiet))
    assert_close(x0, p.pixels[nearest].double(), rtol=0, atol=1e-8)


@given(problems())
def test_in_pure_noise_the_target_is_the_mean(p: Problem) -> None:
    loud = NoiseSchedule(torch.tensor([1 - 1e-12], dtype=torch.float64))  # gamma 1e-6
    t, x_t = torch.zeros_like(p.t), p.x_t.double()
    x0 = loud.predict_x0(x_t, t, exact_target(x_t, t, p.data, loud))
    assert_close(x0, p.pixels.double().mean(0).expand_as(x0), rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------------------
# nearest neighbours


@given(problems_and_k(), st.booleans())
def test_neighbours_are_the_nearest_and_ties_go_to_the_lower_index(
    problem: tuple[Problem, int], floats: bool
) -> None:
    p, k = problem
    query, data = (p.pixels[:3], p.pixels) if floats else (p.data[:3], p.data)
    index, distance = nearest_neighbors(query, data, k)
    exact = query.double().flatten(1).tolist(), data.double().flatten(1).tolist()
    for i, q in enumerate(exact[0]):
        squares = [math.fsum((x - y) ** 2 for x, y in zip(q, a, strict=True)) for a in exact[1]]
        if floats:  # equal up to rounding is not a tie: only the distances are certain
            wanted = torch.tensor(sorted(squares)[:k], dtype=torch.float64).sqrt()
        else:
            order = sorted(range(len(squares)), key=lambda n: (squares[n], n))[:k]
            assert index[i].tolist() == order
            wanted = torch.tensor([squares[n] for n in order], dtype=torch.float64).sqrt() / 127.5
        assert_close(distance[i].double(), wanted, rtol=1e-6, atol=1e-7)
        picked = [math.sqrt(squares[n]) / (1 if floats else 127.5) for n in index[i].tolist()]
        assert_close(
            distance[i].double(), torch.tensor(picked, dtype=torch.float64), rtol=1e-6, atol=1e-7
        )


def test_different_uint8_images_at_the_same_distance_are_a_tie() -> None:
    offsets = [
        (18, 1),
        (17, 6),
        (15, 10),
        (10, 15),
        (6, 17),
        (1, 18),
        (-18, 1),
        (-1, -18),
    ]  # squares sum to 325
    data = torch.tensor([[128 + a, 30 + b] for a, b in offsets], dtype=torch.uint8).view(
        -1, 1, 1, 2
    )
    index, distance = nearest_neighbors(
        torch.tensor([128, 30], dtype=torch.uint8).view(1, 1, 1, 2), data, len(data)
    )
    assert index.tolist() == [list(range(len(data)))]
    assert_close(distance, torch.full((1, len(data)), math.sqrt(325) / 127.5))


def test_copies_among_many_images_come_in_order() -> None:
    """A forget set of copies against a data set with copies: what a matrix product would round
    apart.
    """
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(300, 1, 28, 28, generator=generator)
    copies = [7, 90, 91, 205, 299]
    data[copies] = data[7].clone()
    for query in (data[:1].expand(100, 1, 28, 28), data[7:8]):
        index, distance = nearest_neighbors(query, data, 300)
        places = [index[-1].tolist().index(n) for n in copies]
        assert places == list(range(places[0], places[0] + len(copies)))
        assert distance[-1, places].unique().numel() == 1
        assert distance[0, 0] == 0
        assert torch.equal(index, index[:1].expand_as(index))


# ---------------------------------------------------------------------------------------------- the
# losses


def model(x_t: Tensor, t: Tensor, theta: Tensor) -> Tensor:
    """A small smooth function of x_t, t and one parameter a pixel."""
    return torch.sin(x_t * theta + t.view(-1, 1, 1, 1) / 300) + theta


@given(problems_and_k())
def test_weighted_and_target_form_differ_by_the_posterior_variance(
    problem: tuple[Problem, int],
) -> None:
    p, k = problem
    b, shape = p.x_t.shape[0], p.x_t.shape[1:]
    neighbors = p.pixels[(torch.arange(k) + torch.arange(b)[:, None]) % len(p.data)].double()
    theta = (
        torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).view(shape).requires_grad_()
    )
    x0, noise = neighbors[:, 0], torch.cos(p.x_t.double())
    x_t = SCHEDULE.q_sample(x0, p.t, noise)
    target = knn_target(x_t, p.t, neighbors, SCHEDULE)
    losses = (
        retrack_weighted_loss(lambda x, t: model(x, t, theta), x0, p.t, noise, neighbors, SCHEDULE),
        retrack_loss(lambda x, t: model(x, t, theta), x0, p.t, noise, target, SCHEDULE),
    )
    variance = 0.0
    for i in range(b):
        weights = (
            oracle_log_posterior(x_t[i : i + 1], p.t[i : i + 1], neighbors[i]).exp()[0].tolist()
        )
        gamma, sigma = scales(int(p.t[i]))
        for w, a in zip(weights, neighbors[i], strict=True):
            variance += w * ((x_t[i] - gamma * a) / sigma - target[i]).square().sum().item() / b
    assert_close(losses[0].item() - losses[1].item(), variance, rtol=1e-6, atol=1e-8)
    gradients = [torch.autograd.grad(loss, theta)[0] for loss in losses]
    assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-8)


def grid(dim: int) -> tuple[Tensor, float]:
    """Points [n, 1, 1, dim] of noise space, and the volume that each stands for."""
    line = torch.linspace(-14, 14, 281 if dim == 1 else 113, dtype=torch.float64)
    points = torch.cartesian_prod(*[line] * dim).view(-1, 1, 1, dim)
    return points, (line[1] - line[0]).item() ** dim


def normal_density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z.square().flatten(1).sum(1)) / (2 * math.pi) ** (z[0].numel() / 2)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("t", [250, 500, 900])
def test_importance_weights_leave_the_expected_loss_unchanged(dim: int, t: int) -> None:
    """E_{q_r} of the vanilla loss = E_{q_u} of q_r/q_u times the ReTrack loss, both by quadrature;
    so its gradient.
    """
    remain = torch.tensor([[-0.8, 0.3], [0.1, -0.5], [0.1, -0.4], [0.9, 0.7]], dtype=torch.float64)[
        :, None, None, :dim
    ]
    forget = torch.tensor([0.5, -0.9], dtype=torch.float64)[None, None, None, :dim]
    theta = torch.full((1, 1, dim), 0.7, dtype=torch.float64, requires_grad=True)
    noise, volume = grid(dim)
    steps = torch.tensor([t])
    gamma, sigma = scales(t)

    def over_grid(loss: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.vmap(lambda z: loss(z[None]), chunk_size=2000)(noise)

    def eps_model(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, theta)

    density = normal_density(noise) * volume
    assert_close(density.sum(), torch.tensor(1.0, dtype=torch.float64))
    each = [
        over_grid(lambda z, a=a: ddpm_loss(eps_model, a[None], steps, z, SCHEDULE)) for a in remain
    ]
    vanilla = (density * torch.stack(each).mean(0)).sum()
    x_t = gamma * forget + sigma * noise
    q_remain = sum(normal_density((x_t - gamma * a) / sigma) / len(remain) for a in remain)
    ratio = q_remain / normal_density(noise)
    reweighted = over_grid(
        lambda z: retrack_weighted_loss(eps_model, forget, steps, z, remain[None], SCHEDULE)
    )
    sampled = (density * ratio * reweighted).sum()
    assert_close(sampled, vanilla, rtol=1e-6, atol=0)
    assert_close(
        *(torch.autograd.grad(loss, theta)[0] for loss in (sampled, vanilla)), rtol=1e-6, atol=0
    )
    dropped = (
        density * reweighted
    ).sum()  # without the factor it is another loss, with the same minimiser
    assert abs(dropped - vanilla) > 1e-3 * vanilla


@pytest.mark.parametrize("loss", ["target", "weighted"])
def test_the_minimiser_is_the_ideal_denoiser(loss: str) -> None:
    """A free function, one value a point, fitted by gradient descent on the points that x_t takes."""
    remain = torch.tensor([-0.9, -0.2, 0.0, 0.7], dtype=torch.float64).view(4, 1, 1, 1)
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
    x0, t = torch.full_like(noise, 0.4), torch.tensor([300, 450, 700]).repeat(3)
    x_t = SCHEDULE.q_sample(x0, t, noise)
    values = torch.zeros_like(noise, requires_grad=True)
    optimizer = torch.optim.SGD([values], lr=0.25 * len(noise))
    for _ in range(60):
        optimizer.zero_grad()
        if loss == "target":
            value = retrack_loss(
                lambda *_: values, x0, t, noise, exact_target(x_t, t, remain, SCHEDULE), SCHEDULE
            )
        else:
            value = retrack_weighted_loss(
                lambda *_: values, x0, t, noise, remain.expand(9, 4, 1, 1, 1), SCHEDULE
            )
        value.backward()
        optimizer.step()
    assert_close(values.detach(), oracle_eps(x_t, t, remain))
    assert_close(values.detach(), ideal_eps(x_t, t, remain, SCHEDULE))


def test_the_minimiser_of_the_vanilla_loss_is_the_same() -> None:
    """The vanilla loss enumerated over images and a grid of x_t: its gradient vanishes at
    ideal_eps, not near it.
    """
    remain = torch.tensor([-0.9, -0.2, 0.0, 0.7], dtype=torch.float64).view(4, 1, 1, 1)
    x_t = torch.linspace(-2, 2, 41, dtype=torch.float64).view(41, 1, 1, 1)
    t = torch.full((41,), 350)
    gamma, sigma = scales(350)

    def gradient(values: Tensor) -> Tensor:
        values = values.clone().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for a in remain:
            noise = (x_t - gamma * a) / sigma
            for i, density in enumerate(
                normal_density(noise)
            ):  # how often this image makes this x_t
                each = ddpm_loss(
                    lambda *_, i=i: values[i : i + 1], a[None], t[:1], noise[i : i + 1], SCHEDULE
                )
                total = total + density * each
        return torch.autograd.grad(total, values)[0]

    best = ideal_eps(x_t, t, remain, SCHEDULE)
    assert_close(gradient(best), torch.zeros_like(best), rtol=0, atol=1e-12)
    assert (gradient(best + 0.1).abs() > 1e-4).all()


# ----------------------------------------------------------------------------------------------
# mistakes


def test_mistakes_are_named() -> None:
    data, x_t, t = torch.zeros(4, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.tensor([5])
    for k in (0, 5):
        with pytest.raises(
            InputError, match=rf"k = {k}: must be from 1 to the number of images, 4"
        ):
            topk_target(x_t, t, data, SCHEDULE, k)
        with pytest.raises(InputError, match=rf"k = {k}"):
            nearest_neighbors(data, data, k)
    for wrong in (data[:0], data[:, :, :1]):
        with pytest.raises(ValueError, match="does not fit"):
            exact_target(x_t, t, wrong, SCHEDULE)
        with pytest.raises(ValueError, match="does not fit"):
            nearest_neighbors(x_t, wrong, 1)
    for wrong in (data, data[None, :, :, :1], data[None, :0], data.expand(2, 4, 1, 2, 2)):
        with pytest.raises(ValueError, match="fit"):
            knn_target(x_t, t, wrong, SCHEDULE)

"""unlearn.py's dict of methods: each row's gradient against the method's formula (one oracle a method)."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tiny_retrack import NoiseSchedule
from tiny_retrack.posterior import nearest_neighbors
from tiny_retrack.presets import UnlearnSettings
from unlearn import METHODS, TARGETS, Batch, Problem, draw_batch

SCHEDULE = NoiseSchedule.linear()
SETTINGS = UnlearnSettings(steps=1, batch_size=6, lr=1e-3, k=3, lam=0.3, siss_lam=0.4, rescale="10%")


class Toy(nn.Module):
    """eps = a x + b x^2 + c t/1000, weights in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.4, 0.2], dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.w[0] * x + self.w[1] * x * x + self.w[2] * t[:, None, None, None] / 1000


@pytest.fixture(scope="module")
def problem() -> Problem:
    generator = torch.Generator().manual_seed(0)
    remain = torch.randint(0, 256, (9, 1, 2, 3), generator=generator, dtype=torch.uint8)
    forget = torch.randint(0, 256, (2, 1, 2, 3), generator=generator, dtype=torch.uint8)
    neighbors, _ = nearest_neighbors(forget, remain, SETTINGS.k)
    return Problem(remain, forget, neighbors, SCHEDULE, SETTINGS, "knn")


@pytest.fixture(scope="module")
def batch(problem: Problem) -> Batch:
    drawn = draw_batch(problem, torch.Generator().manual_seed(1))
    as_double = {name: value.double() for name, value in vars(drawn).items() if value.is_floating_point()}
    return replace(drawn, **as_double)


def sample_gradient(x0: Tensor, t: int, noise: Tensor, target: Tensor | None) -> list[float]:
    """d/dw ||eps_w(x_t, t) - target||^2 for one image, pixel by pixel; the target is the noise if none is given."""
    gamma, sigma = SCHEDULE.gamma[t].item(), SCHEDULE.sigma[t].item()
    w, out = [0.3, -0.4, 0.2], [0.0, 0.0, 0.0]
    target = noise if target is None else target
    for a, e, v in zip(x0.flatten().tolist(), noise.flatten().tolist(), target.flatten().tolist(), strict=True):
        x = gamma * a + sigma * e
        residual = w[0] * x + w[1] * x * x + w[2] * t / 1000 - v
        for i, d in enumerate((x, x * x, t / 1000)):
            out[i] += 2 * residual * d
    return out


def mean(vectors: list[list[float]]) -> list[float]:
    return [math.fsum(v[i] for v in vectors) / len(vectors) for i in range(3)]


def ddpm(x0: Tensor, t: Tensor, noise: Tensor, target: Tensor | None = None) -> list[float]:
    """Gradient of a batch's mean squared error."""
    rows = range(len(x0))
    return mean([sample_gradient(x0[i], int(t[i]), noise[i], None if target is None else target[i]) for i in rows])


def mixture_target(x_t: Tensor, t: int, images: Tensor) -> Tensor:
    """sum_n p_n v_n by loops."""
    gamma, sigma = SCHEDULE.gamma[t], SCHEDULE.sigma[t]
    v = [(x_t - gamma * a) / sigma for a in images]
    logits = [-0.5 * float((u * u).sum()) for u in v]
    weights = [math.exp(x - max(logits)) for x in logits]
    return sum(w * u for w, u in zip(weights, v, strict=True)) / math.fsum(weights)


def retrack(p: Problem, b: Batch) -> list[float]:
    pixels = p.remain.double() / 127.5 - 1
    forget = p.forget.double() / 127.5 - 1
    targets = []
    for i in range(len(b.t)):
        t = int(b.t[i])
        x_t = SCHEDULE.gamma[t] * b.x0_forget[i] + SCHEDULE.sigma[t] * b.noise[i]
        around = forget[b.forget_index[i]] if p.target == "knn" else x_t / SCHEDULE.gamma[t]
        k = len(pixels) if p.target == "exact" else p.settings.k
        order = sorted(range(len(pixels)), key=lambda n: float((pixels[n] - around).square().sum()))
        targets.append(mixture_target(x_t, t, pixels[order[:k]]))
    forget_part = ddpm(b.x0_forget, b.t, b.noise, torch.stack(targets))
    remain_part = ddpm(b.x0_remain, b.t_remain, b.noise_remain)
    return [0.3 * f + 0.7 * r for f, r in zip(forget_part, remain_part, strict=True)]


def erasediff(p: Problem, b: Batch) -> list[float]:
    r, f = ddpm(b.x0_remain, b.t, b.noise), ddpm(b.x0_forget, b.t, b.noise, b.uniform)
    scale = max(1e-3 - math.fsum(x * y for x, y in zip(r, f, strict=True)) / math.fsum(y * y for y in f), 0)
    return [x + scale * y for x, y in zip(r, f, strict=True)]


def subtract(r: list[float], u: list[float]) -> list[float]:
    """g_r - s g_u with ||s g_u|| = 10% of ||g_r||."""
    scale = 0.1 * math.hypot(*r) / math.hypot(*u)
    return [x - scale * y for x, y in zip(r, u, strict=True)]


def siss(p: Problem, b: Batch) -> list[float]:
    parts: tuple[list, list] = ([], [])
    for i in range(len(b.t)):
        t = int(b.t[i])
        gamma, sigma = SCHEDULE.gamma[t], SCHEDULE.sigma[t]
        start = b.x0_forget[i] if b.from_forget[i] else b.x0_remain[i]
        m = gamma * start + sigma * b.noise[i]
        eps = [(m - gamma * a) / sigma for a in (b.x0_remain[i], b.x0_forget[i])]
        density = [math.exp(-0.5 * float((e * e).sum() - min((e * e).sum() for e in eps))) for e in eps]
        mixture = 0.6 * density[0] + 0.4 * density[1]
        for part, e, q in zip(parts, eps, density, strict=True):
            part.append([q / mixture * g for g in sample_gradient(start, t, b.noise[i], e)])
    return subtract(mean(parts[0]), mean(parts[1]))


ORACLES = {
    "vanilla": lambda p, b: ddpm(b.x0_remain, b.t_remain, b.noise_remain),
    "neggrad": lambda p, b: [-g for g in ddpm(b.x0_forget, b.t, b.noise)],
    "erasediff": erasediff,
    "siss": siss,
    "siss-no-is": lambda p, b: subtract(ddpm(b.x0_remain, b.t, b.noise), ddpm(b.x0_forget, b.t, b.noise)),
    "retrack": retrack,
}


def test_every_method_has_an_oracle() -> None:
    assert set(ORACLES) == set(METHODS)


@pytest.mark.parametrize(("name", "target"), [(m, "knn") for m in METHODS] + [("retrack", t) for t in TARGETS])
def test_gradient_is_the_formulas(name: str, target: str, problem: Problem, batch: Batch) -> None:
    problem, model = replace(problem, target=target), Toy()
    losses = METHODS[name].losses(model, problem, batch)
    grads = [list(torch.autograd.grad(loss, [model.w], retain_graph=True)) for loss in losses]
    combine = METHODS[name].combine
    (got,) = combine(problem)(*grads) if combine else grads[0]
    expected = torch.tensor(ORACLES[name](problem, batch), dtype=torch.float64)
    assert_close(got, expected, rtol=2e-6, atol=1e-9)  # to_float rounds pixels to float32


def test_a_batch_is_drawn_from_the_right_sets(problem: Problem) -> None:
    b = draw_batch(replace(problem, settings=replace(SETTINGS, batch_size=4000)), torch.Generator().manual_seed(0))
    for images, source in ((b.x0_remain, problem.remain), (b.x0_forget, problem.forget)):
        assert_close(images.unique(dim=0), (source.float() / 127.5 - 1).unique(dim=0))
    assert_close(b.x0_forget, (problem.forget / 127.5 - 1)[b.forget_index])
    for t in (b.t, b.t_remain):  # uniform over 0..999: the bounds are 5 standard errors of 4,000 draws
        assert (t.min() >= 0, t.max() <= 999) == (True, True)
        assert abs(t.double().mean() - 499.5) < 5 * 288.7 / 4000**0.5
    assert abs(b.from_forget.double().mean() - 0.4) < 5 * (0.24 / 4000) ** 0.5
    assert not torch.equal(b.t, b.t_remain)

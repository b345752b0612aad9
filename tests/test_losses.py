"""Every unlearning loss, its value and its gradient, against plain loops over Python floats.

The model is linear in its weights, so each loss is a quadratic in them: the central difference of
the oracle's value is then its exact gradient, whatever the step, and shares no line with autograd.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Context, Decimal, localcontext
from statistics import NormalDist

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from tiny_retrack.losses import (
    ddpm_loss,
    erasediff_gradient,
    erasediff_losses,
    neggrad_loss,
    retrack_loss,
    retrack_weighted_loss,
    siss_gradient,
    siss_losses,
)
from tiny_retrack.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()
SHAPE = (1, 2, 2)
D, K = 4, 3


class Linear(nn.Module):
    """eps = weight x_t + time t / 1000 + bias, with 24 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.params = nn.Parameter(draw(24, seed=7))
        self.calls = 0

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        weight, time, bias = self.params.split([D * D, D, D])
        return (
            x_t.flatten(1) @ weight.view(D, D).T + t[:, None].double() / 1000 * time + bias
        ).view_as(x_t)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Batch:
    """Three remain and forget images with both ends of time, and whatever else a loss is given."""

    remain: Tensor
    forget: Tensor
    t: Tensor
    noise: Tensor
    uniform: Tensor
    target: Tensor
    neighbors: Tensor
    from_forget: Tensor

    def rows(self, name: str) -> list[list[float]]:
        return getattr(self, name).flatten(1).tolist()

    def neighbor_rows(self) -> list[list[list[float]]]:
        return self.neighbors.flatten(2).tolist()


BATCH = Batch(
    remain=draw(3, *SHAPE, seed=1).clamp(-1, 1),
    forget=draw(3, *SHAPE, seed=2).clamp(-1, 1),
    t=torch.tensor([0, 400, 999]),
    noise=draw(3, *SHAPE, seed=3),
    uniform=draw(3, *SHAPE, seed=4).abs().clamp(0, 1),
    target=draw(3, *SHAPE, seed=5),
    neighbors=draw(3, K, *SHAPE, seed=6).clamp(-1, 1),
    from_forget=torch.tensor([True, False, True]),
)


# --- The oracles: one sample is a list of floats. ---

ALPHA_BAR = [
    math.prod(1 - (1e-4 + i * (0.02 - 1e-4) / 999) for i in range(t + 1)) for t in range(1000)
]
Floats = list[float]


def gamma(t: int) -> float:
    return math.sqrt(ALPHA_BAR[t])


def sigma(t: int) -> float:
    return math.sqrt(1 - ALPHA_BAR[t])


def noised(image: Floats, t: int, noise: Floats) -> Floats:
    return [gamma(t) * a + sigma(t) * n for a, n in zip(image, noise, strict=True)]


def noise_in(x_t: Floats, t: int, image: Floats) -> Floats:
    return [(x - gamma(t) * a) / sigma(t) for x, a in zip(x_t, image, strict=True)]


def predicted(params: Floats, x_t: Floats, t: int) -> Floats:
    return [
        sum(params[i * D + j] * x_t[j] for j in range(D))
        + params[16 + i] * t / 1000
        + params[20 + i]
        for i in range(D)
    ]


def square(a: Floats, b: Floats) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def oracle_regression(
    params: Floats, batch: Batch, images: str, targets: str, cap: float = math.inf
) -> float:
    total = 0.0
    for a, t, n, target in zip(
        batch.rows(images), batch.t.tolist(), batch.rows("noise"), batch.rows(targets), strict=True
    ):
        weight = min(1.0, cap * (1 - ALPHA_BAR[t]) / ALPHA_BAR[t])
        total += weight * square(predicted(params, noised(a, t, n), t), target)
    return total / len(batch.t)


def oracle_siss_weights(
    m: Floats, t: int, a_r: Floats, a_u: Floats, lam: float
) -> tuple[float, float]:
    """(w_r, w_u) in decimals whose exponent has no bound that matters."""
    with localcontext(Context(prec=40, Emax=10**12, Emin=-(10**12))):
        noise_r, noise_u = noise_in(m, t, a_r), noise_in(m, t, a_u)
        q_r = (-Decimal(square(noise_r, [0.0] * len(m))) / 2).exp()
        q_u = (-Decimal(square(noise_u, [0.0] * len(m))) / 2).exp()
        mixture = (1 - Decimal(lam)) * q_r + Decimal(lam) * q_u
        return float(q_r / mixture), float(q_u / mixture)


def oracle_siss(params: Floats, batch: Batch, lam: float) -> tuple[float, float]:
    loss_r = loss_u = 0.0
    for i, t in enumerate(batch.t.tolist()):
        a_r, a_u = batch.rows("remain")[i], batch.rows("forget")[i]
        m = noised(a_u if batch.from_forget[i] else a_r, t, batch.rows("noise")[i])
        w_r, w_u = oracle_siss_weights(m, t, a_r, a_u, lam)
        eps = predicted(params, m, t)
        loss_r += w_r * square(eps, noise_in(m, t, a_r))
        loss_u += w_u * square(eps, noise_in(m, t, a_u))
    return loss_r / len(batch.t), loss_u / len(batch.t)


def oracle_retrack_weighted(params: Floats, batch: Batch) -> float:
    total = 0.0
    for a_u, t, n, neighbors in zip(
        batch.rows("forget"),
        batch.t.tolist(),
        batch.rows("noise"),
        batch.neighbor_rows(),
        strict=True,
    ):
        x_t = noised(a_u, t, n)
        targets = [noise_in(x_t, t, a) for a in neighbors]
        logits = [-square(v, [0.0] * D) / 2 for v in targets]
        weights = [math.exp(logit - max(logits)) for logit in logits]
        for weight, v in zip(weights, targets, strict=True):
            total += weight / sum(weights) * square(predicted(params, x_t, t), v)
    return total / len(batch.t)


Loss = Callable[[nn.Module, Batch], tuple[Tensor, ...]]
Oracle = Callable[[Floats, Batch], tuple[float, ...]]

# name: (the loss, its oracle). A new method needs one row.
LOSSES: dict[str, tuple[Loss, Oracle]] = {
    "ddpm": (
        lambda model, b: (ddpm_loss(model, b.remain, b.t, b.noise, SCHEDULE),),
        lambda params, b: (oracle_regression(params, b, "remain", "noise"),),
    ),
    "neggrad": (
        lambda model, b: (neggrad_loss(model, b.forget, b.t, b.noise, SCHEDULE),),
        lambda params, b: (-oracle_regression(params, b, "forget", "noise"),),
    ),
    "erasediff": (
        lambda model, b: erasediff_losses(
            model, b.remain, b.forget, b.t, b.noise, b.uniform, SCHEDULE
        ),
        lambda params, b: (
            oracle_regression(params, b, "remain", "noise"),
            oracle_regression(params, b, "forget", "uniform"),
        ),
    ),
    "siss": (
        lambda model, b: siss_losses(
            model, b.remain, b.forget, b.t, b.noise, b.from_forget, 0.3, SCHEDULE
        ),
        lambda params, b: oracle_siss(params, b, 0.3),
    ),
    "retrack": (
        lambda model, b: (retrack_loss(model, b.forget, b.t, b.noise, b.target, SCHEDULE),),
        lambda params, b: (oracle_regression(params, b, "forget", "target"),),
    ),
    "retrack, SNR capped": (
        lambda model, b: (
            retrack_loss(model, b.forget, b.t, b.noise, b.target, SCHEDULE, snr_cap=0.5),
        ),
        lambda params, b: (oracle_regression(params, b, "forget", "target", cap=0.5),),
    ),
    "retrack weighted": (
        lambda model, b: (
            retrack_weighted_loss(model, b.forget, b.t, b.noise, b.neighbors, SCHEDULE),
        ),
        lambda params, b: (oracle_retrack_weighted(params, b),),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_the_oracle(name: str) -> None:
    loss, oracle = LOSSES[name]
    model = Linear()
    params = model.params.tolist()
    expected = oracle(params, BATCH)
    parts = loss(model, BATCH)
    assert len(parts) == len(expected)
    for part in parts:
        assert part.shape == ()
    assert_close(torch.stack(parts), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    grads = [torch.autograd.grad(part, model.params, retain_graph=True)[0] for part in parts]
    for j in range(len(params)):
        up, down = (
            oracle([*params[:j], params[j] + h, *params[j + 1 :]], BATCH) for h in (1.0, -1.0)
        )
        for grad, above, below, value in zip(grads, up, down, expected, strict=True):
            assert grad[j].item() == pytest.approx(
                (above - below) / 2, rel=1e-8, abs=1e-12 * abs(value)
            )


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_drawn_inside(name: str) -> None:
    loss, _ = LOSSES[name]
    model = Linear()
    state = torch.get_rng_state()
    first, again = loss(model, BATCH), loss(model, BATCH)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_a_mean_over_the_batch(name: str) -> None:
    """Of samples that do not see each other: in any order, and one by one, they give the same."""
    loss, _ = LOSSES[name]
    model = Linear()
    whole = torch.stack(loss(model, BATCH))
    fields = vars(BATCH)
    flipped = replace(BATCH, **{key: value.flip(0) for key, value in fields.items()})
    singles = [
        replace(BATCH, **{key: value[i : i + 1] for key, value in fields.items()}) for i in range(3)
    ]
    assert_close(torch.stack(loss(model, flipped)), whole, rtol=1e-12, atol=0)
    assert_close(
        torch.stack([torch.stack(loss(model, one)) for one in singles]).mean(0),
        whole,
        rtol=1e-12,
        atol=0,
    )


def test_neggrad_is_minus_ddpm() -> None:
    model = Linear()
    up = neggrad_loss(model, BATCH.forget, BATCH.t, BATCH.noise, SCHEDULE)
    assert torch.equal(up, -ddpm_loss(model, BATCH.forget, BATCH.t, BATCH.noise, SCHEDULE))


@pytest.mark.parametrize(
    ("name", "field"), [("ddpm", "noise"), ("erasediff", "uniform"), ("retrack", "target")]
)
def test_a_target_of_another_shape_raises(name: str, field: str) -> None:
    """Broadcasting would train towards one target for the whole batch, without a word."""
    loss, _ = LOSSES[name]
    with pytest.raises(ValueError, match="shape"):
        loss(Linear(), replace(BATCH, **{field: getattr(BATCH, field)[:1]}))


# --- ReTrack ---


def test_the_order_of_neighbors_is_irrelevant() -> None:
    model = Linear()
    shuffled = replace(BATCH, neighbors=BATCH.neighbors[:, [2, 0, 1]])
    loss, _ = LOSSES["retrack weighted"]
    assert_close(loss(model, shuffled), loss(model, BATCH), rtol=1e-12, atol=0)


def test_capped_by_1_little_noise_asks_in_x0_units_and_much_noise_in_eps_units() -> None:
    for t in range(1000):
        steps = torch.tensor([t])
        x_t = SCHEDULE.q_sample(BATCH.forget[:1], steps, BATCH.noise[:1])
        x0, target = (
            SCHEDULE.predict_x0(x_t, steps, eps) for eps in (BATCH.noise[:1], BATCH.target[:1])
        )
        expected = min(
            float((x0 - target).square().sum()),
            float((BATCH.noise[:1] - BATCH.target[:1]).square().sum()),
        )
        loss = retrack_loss(
            lambda x, s: BATCH.noise[:1],
            BATCH.forget[:1],
            steps,
            BATCH.noise[:1],
            BATCH.target[:1],
            SCHEDULE,
            1.0,
        )
        assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_the_presets_cap_is_none() -> None:
    """10,000 is above every SNR of the linear schedule: the loss is the published one to the last
    bit.
    """
    for t in range(1000):
        b = replace(BATCH, t=torch.full((3,), t))
        plain, capped = (
            retrack_loss(Linear(), b.forget, b.t, b.noise, b.target, SCHEDULE, c)
            for c in (math.inf, 1e4)
        )
        assert torch.equal(plain, capped)


def test_copies_of_one_neighbor_are_that_neighbor() -> None:
    model = Linear()
    one = BATCH.neighbors[:, :1]
    x_t = SCHEDULE.q_sample(BATCH.forget, BATCH.t, BATCH.noise)
    target = SCHEDULE.predict_eps(x_t, BATCH.t, one[:, 0])
    copies = replace(BATCH, neighbors=one.expand(-1, 5, -1, -1, -1))
    loss, _ = LOSSES["retrack weighted"]
    expected = retrack_loss(model, BATCH.forget, BATCH.t, BATCH.noise, target, SCHEDULE)
    assert_close(loss(model, copies), (expected,), rtol=1e-10, atol=0)


def test_float32_tells_two_neighbors_apart_at_low_noise() -> None:
    """Two images 27 away, of 56 at most; by their distances, one has three times the other's
    weight.

    Their ||v||^2 is 7e6, and what decides is a difference of 2 in it: too fine for a float32 sum.
    """
    bias = torch.zeros(784, requires_grad=True)
    direction = draw(2, 784, seed=8)
    gap = 2 * math.log(3) * (1 - ALPHA_BAR[0]) / ALPHA_BAR[0]  # of the squared distances
    lengths = torch.tensor([27.0, math.sqrt(27.0**2 - gap)], dtype=torch.float64)
    neighbors = (
        (direction / direction.norm(dim=1, keepdim=True) * lengths[:, None])
        .view(1, 2, 1, 28, 28)
        .float()
    )
    origin, t = torch.zeros(1, 1, 28, 28), torch.tensor([0])
    loss = retrack_weighted_loss(
        lambda x_t, t: bias.view_as(x_t), origin, t, origin, neighbors, SCHEDULE
    )
    (grad,) = torch.autograd.grad(loss, bias)  # -2 sum_k p_k v_k, and v_k = -gamma a_k / sigma
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    expected = (
        2 * gamma(0) / sigma(0) * (weights[:, None] * neighbors[0].flatten(1).double()).sum(0)
    )
    assert_close(grad.double(), expected, rtol=0, atol=0.01 * expected.abs().max().item())


# --- SISS ---

pixels = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=D, max_size=D)


def siss_weights(
    a_r: Tensor, a_u: Tensor, t: int, noise: Tensor, from_forget: bool, lam: float
) -> tuple[float, float]:
    """(w_r, w_u) as the loss has them: a model that is wrong by one everywhere has squared errors
    of D w.
    """
    times, mask = torch.tensor([t]), torch.tensor([from_forget])

    def off_by_one(image: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda m, time: SCHEDULE.predict_eps(m, time, image) + 1

    w_r = siss_losses(off_by_one(a_r), a_r, a_u, times, noise, mask, lam, SCHEDULE)[0] / a_r.numel()
    w_u = siss_losses(off_by_one(a_u), a_r, a_u, times, noise, mask, lam, SCHEDULE)[1] / a_u.numel()
    return w_r.item(), w_u.item()


@given(
    a_r=pixels,
    a_u=pixels,
    t=st.sampled_from([0, 1, 10, 300, 999]),
    noise=st.lists(st.floats(-4, 4, width=32), min_size=D, max_size=D),
    from_forget=st.booleans(),
    lam=st.floats(0.01, 0.99),
)
@example(a_r=[1.0] * D, a_u=[-1.0] * D, t=0, noise=[4.0] * D, from_forget=False, lam=0.5)
@example(a_r=[1.0] * D, a_u=[-1.0] * D, t=0, noise=[4.0] * D, from_forget=True, lam=0.5)
@example(a_r=[1.0] * D, a_u=[-1.0] * D, t=999, noise=[-4.0] * D, from_forget=True, lam=0.99)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_siss_weights_are_bounded_and_average_to_one(
    dtype: torch.dtype,
    a_r: Floats,
    a_u: Floats,
    t: int,
    noise: Floats,
    from_forget: bool,
    lam: float,
) -> None:
    remain, forget, unit = (
        torch.tensor(values, dtype=dtype).view(1, *SHAPE) for values in (a_r, a_u, noise)
    )
    w_r, w_u = siss_weights(remain, forget, t, unit, from_forget, lam)
    slack = 1 + (
        1e-9 if dtype == torch.float64 else 1e-3
    )  # off_by_one's rounding at t = 0, where eps is up to 200
    assert 0 <= w_r <= slack / (1 - lam)
    assert 0 <= w_u <= slack / lam
    assert (1 - lam) * w_r + lam * w_u == pytest.approx(1, rel=slack - 1)
    expected = oracle_siss_weights(noised(a_u if from_forget else a_r, t, noise), t, a_r, a_u, lam)
    if dtype == torch.float64:
        assert (w_r, w_u) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("from_forget", [False, True])
@pytest.mark.parametrize("t", [0, 999])
def test_siss_weights_between_black_and_white_images(t: int, from_forget: bool) -> None:
    """The log-density of 3 x 256 x 256 pixels at t = 0 differs by 4e9: no density can be formed."""
    white = torch.ones(1, 3, 256, 256)
    noise = torch.randn(white.shape, generator=torch.Generator().manual_seed(0))
    w_r, w_u = siss_weights(white, -white, t, noise, from_forget, lam=0.5)
    if t == 0:
        assert (w_r, w_u) == pytest.approx((0, 2) if from_forget else (2, 0), rel=1e-3)
    assert 0.5 * w_r + 0.5 * w_u == pytest.approx(1, rel=1e-3)


def test_siss_at_the_ends_of_lambda_is_the_plain_loss() -> None:
    """lam = 0 samples remain images only, each with weight 1; lam = 1 forget images only."""
    model = Linear()
    images = (BATCH.remain, BATCH.forget, BATCH.t, BATCH.noise)
    none, every = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    remain, _ = siss_losses(model, *images, none, 0.0, SCHEDULE)
    _, forget = siss_losses(model, *images, every, 1.0, SCHEDULE)
    assert_close(
        remain, ddpm_loss(model, BATCH.remain, BATCH.t, BATCH.noise, SCHEDULE), rtol=1e-10, atol=0
    )
    assert_close(
        forget, ddpm_loss(model, BATCH.forget, BATCH.t, BATCH.noise, SCHEDULE), rtol=1e-10, atol=0
    )


def test_siss_passes_the_mixture_once() -> None:
    model = Linear()
    siss_losses(
        model, BATCH.remain, BATCH.forget, BATCH.t, BATCH.noise, BATCH.from_forget, 0.5, SCHEDULE
    )
    assert model.calls == 1


@pytest.mark.parametrize("lam", [0.2, 0.5])
@pytest.mark.parametrize("t", [50, 300, 700])
def test_importance_weights_leave_the_objective_unchanged(t: int, lam: float) -> None:
    """With one pixel the noise can be laid out at its quantiles: the mean over the batch is then
    the expectation.
    """
    num = 20_000
    quantiles = torch.tensor(
        [NormalDist().inv_cdf((i + 0.5) / num) for i in range(num)], dtype=torch.float64
    )
    noise = quantiles.view(num, 1, 1, 1)
    a_r, a_u = torch.full_like(noise, 0.6), torch.full_like(noise, -0.4)
    times = torch.full((num,), t)

    def model(x_t: Tensor, time: Tensor) -> Tensor:
        return torch.tanh(3 * x_t) + 0.5

    halves = [
        torch.stack(
            siss_losses(model, a_r, a_u, times, noise, torch.full((num,), half), lam, SCHEDULE)
        )
        for half in (False, True)
    ]
    plain = torch.stack([ddpm_loss(model, a, times, noise, SCHEDULE) for a in (a_r, a_u)])
    assert_close((1 - lam) * halves[0] + lam * halves[1], plain, rtol=1e-3, atol=0)


@pytest.mark.parametrize("lam", [-0.1, 1.1, math.nan])
def test_siss_refuses_a_lambda_that_is_no_probability(lam: float) -> None:
    with pytest.raises(ValueError, match="lam"):
        siss_losses(
            Linear(),
            BATCH.remain,
            BATCH.forget,
            BATCH.t,
            BATCH.noise,
            BATCH.from_forget,
            lam,
            SCHEDULE,
        )


# --- Two gradients into one: a gradient is a list of tensors, its norm and inner products those of
# the whole model. ---


def flat(gradient: list[Tensor]) -> Floats:
    return [value for tensor in gradient for value in tensor.flatten().tolist()]


def gradient(seed: int, scale: float = 1.0) -> list[Tensor]:
    return [scale * draw(2, 3, seed=seed), scale * draw(4, seed=seed + 100)]


def inner(a: Floats, b: Floats) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Floats) -> float:
    return math.sqrt(inner(a, a))


def plus(a: list[Tensor], b: list[Tensor], factor: float) -> list[Tensor]:
    return [x + factor * y for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("tilt", [-3.0, 0.0, 3.0])
@pytest.mark.parametrize("eta", [None, 0.1])
def test_erasediff_gradient(tilt: float, eta: float | None) -> None:
    g_f = gradient(seed=1)
    g_r = plus(gradient(seed=2), g_f, tilt)
    out = erasediff_gradient(g_r, g_f) if eta is None else erasediff_gradient(g_r, g_f, eta)
    r, f = flat(g_r), flat(g_f)
    eta = 1e-3 if eta is None else eta
    factor = max(eta - inner(r, f) / inner(f, f), 0)
    assert (factor > 0) == (tilt < 3)  # both branches are met
    assert [x.shape for x in out] == [x.shape for x in g_r]
    assert flat(out) == pytest.approx(
        [a + factor * b for a, b in zip(r, f, strict=True)], rel=1e-12
    )
    # What the method promises: a step along -g lowers L_f by at least eta ||g_f||^2 per unit of
    # learning rate.
    assert inner(flat(out), f) >= eta * inner(f, f) * (1 - 1e-9)


@pytest.mark.parametrize("rescale", [5.0, 0.5, 0.0, "10%", "250%", "5"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_siss_gradient(rescale: float | str, scale: float) -> None:
    """However large g_u is, what is subtracted has the norm asked for."""
    g_r, g_u = gradient(seed=1), gradient(seed=2, scale=scale)
    out = siss_gradient(g_r, g_u, rescale)
    r, u = flat(g_r), flat(g_u)
    share = isinstance(rescale, str) and rescale.endswith("%")
    length = float(rescale[:-1]) / 100 * norm(r) if share else float(rescale)
    assert [x.shape for x in out] == [x.shape for x in g_r]
    assert flat(out) == pytest.approx(
        [a - length / norm(u) * b for a, b in zip(r, u, strict=True)], rel=1e-10
    )


@pytest.mark.parametrize("rescale", ["much", "%", "-10%", "-1", -1.0, ""])
def test_siss_gradient_refuses_what_is_no_norm(rescale: float | str) -> None:
    with pytest.raises(ValueError, match="rescale"):
        siss_gradient(gradient(seed=1), gradient(seed=2), rescale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rescale", [5.0, "10%"])
def test_a_forget_gradient_of_zero_changes_nothing(
    rescale: float | str, dtype: torch.dtype
) -> None:
    """SISS meets it when a batch has no forget image and only low t: each w_u underflows to zero."""
    g_r = [x.to(dtype) for x in gradient(seed=1)]
    zero = [torch.zeros_like(x) for x in g_r]
    assert flat(siss_gradient(g_r, zero, rescale)) == flat(g_r)
    assert flat(erasediff_gradient(g_r, zero)) == flat(g_r)


@pytest.mark.parametrize("combine", [erasediff_gradient, lambda r, u: siss_gradient(r, u, 5.0)])
def test_combining_leaves_the_gradients_as_they_were(combine: Callable[..., list[Tensor]]) -> None:
    g_r, g_u = gradient(seed=1), plus(gradient(seed=2), gradient(seed=1), -2.0)
    before = flat(g_r), flat(g_u)
    combine(g_r, g_u)
    assert (flat(g_r), flat(g_u)) == before

"""Each loss, its value and its gradient, against the plain-Python oracle.

The model is linear in its weights, so each loss is a quadratic in them: the central difference of
the oracle's value is then its exact gradient, whatever the step, and shares no line with autograd.

`LOSSES` has a row for each loss, with the arguments that it takes from a `LossBatch`. Other tests
that must run every loss (of extreme images, of other dtypes) import both from here.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from tiny_retrack import losses
from tiny_retrack.losses import (
    ddpm_loss,
    dimum_loss,
    erasediff_gradient,
    erasediff_losses,
    neggrad_loss,
    regression_loss,
    retrack_loss,
    retrack_weighted_loss,
    siss_gradient,
    siss_losses,
    vdu_loss,
)
from tiny_retrack.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()
SHAPE = (1, 2, 2)
D = 4  # pixels
K = 3  # neighbours
PRIOR_WEIGHT = 0.2  # of VDU


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# --- A model of 24 weights, in torch and in plain Python ---


class Linear(nn.Module):
    """eps = weight x_t + time t / 1000 + bias, with its 24 weights in one float64 vector."""

    def __init__(self) -> None:
        super().__init__()
        self.params = nn.Parameter(draw(D * D + 2 * D, seed=7))
        self.calls = 0

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        weight, time, bias = self.params.split([D * D, D, D])
        of_x = x_t.flatten(1) @ weight.view(D, D).T
        of_t = t[:, None].double() / 1000 * time
        return (of_x + of_t + bias).view_as(x_t)


@dataclass(frozen=True)
class PlainLinear:
    """`Linear` as the oracle's denoiser."""

    params: list[float]

    def __call__(self, x_t: list[float], t: int) -> list[float]:
        eps = []
        for i in range(D):
            weight = self.params[i * D : (i + 1) * D]
            time = self.params[D * D + i]
            bias = self.params[D * D + D + i]
            eps.append(oracle.inner(weight, x_t) + time * t / 1000 + bias)
        return eps


def gradient_of_quadratic(
    losses_of: Callable[[PlainLinear], tuple[float, ...]], params: list[float]
) -> list[list[float]]:
    """The gradient of each loss in the weights, by central differences: exact for a quadratic."""
    columns = []
    for i in range(len(params)):
        above = losses_of(PlainLinear([*params[:i], params[i] + 1, *params[i + 1 :]]))
        below = losses_of(PlainLinear([*params[:i], params[i] - 1, *params[i + 1 :]]))
        columns.append([(high - low) / 2 for high, low in zip(above, below, strict=True)])
    return [list(row) for row in zip(*columns, strict=True)]


# --- What the losses are given ---


@dataclass(frozen=True)
class LossBatch:
    """All that a loss may be given for b samples. Images are [b, c, h, w], in [-1, 1]."""

    x0_remain: Tensor
    x0_forget: Tensor
    x0_alternative: Tensor
    t: Tensor  # [b]
    noise: Tensor
    uniform: Tensor  # in [0, 1)
    target: Tensor
    neighbors: Tensor  # [b, k, c, h, w]
    from_forget: Tensor  # Bool [b]


BATCH = LossBatch(
    x0_remain=draw(3, *SHAPE, seed=1).clamp(-1, 1),
    x0_forget=draw(3, *SHAPE, seed=2).clamp(-1, 1),
    x0_alternative=draw(3, *SHAPE, seed=8).clamp(-1, 1),
    t=torch.tensor([0, 400, 999]),
    noise=draw(3, *SHAPE, seed=3),
    uniform=draw(3, *SHAPE, seed=4).abs().clamp(0, 1),
    target=draw(3, *SHAPE, seed=5),
    neighbors=draw(3, K, *SHAPE, seed=6).clamp(-1, 1),
    from_forget=torch.tensor([True, False, True]),
)


def plain(batch: LossBatch) -> SimpleNamespace:
    """The batch as the oracle takes it: each image a list of floats."""
    values: dict[str, Any] = {}
    for field in fields(batch):
        tensor = getattr(batch, field.name)
        values[field.name] = tensor.tolist() if tensor.ndim == 1 else oracle.flat(tensor)
    values["neighbors"] = [oracle.flat(images) for images in batch.neighbors]
    return SimpleNamespace(**values)


def normal_prior(weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(mean, standard deviation) for each weight, all different: what VDU is held back by."""
    means = []
    stds = []
    for weight in weights:
        count = weight.numel()
        means.append(torch.linspace(-1, 1, count).to(weight.dtype).view(weight.shape))
        stds.append(torch.linspace(0.5, 2, count).to(weight.dtype).view(weight.shape))
    return means, stds


# --- The table ---


class Row(NamedTuple):
    """A loss of the product with its arguments, and the same loss of the oracle."""

    loss: Callable[[nn.Module, LossBatch], Tensor | tuple[Tensor, Tensor]]
    oracle: Callable[[PlainLinear, SimpleNamespace], float | tuple[float, float]]


def siss_row(lam: float) -> Row:
    """At lam = 0 and 1 each sample is from the only half that there is."""

    def mask(from_forget: Tensor) -> Tensor:
        return from_forget if 0 < lam < 1 else torch.full_like(from_forget, lam == 1)

    def loss(model: nn.Module, b: LossBatch) -> tuple[Tensor, Tensor]:
        from_forget = mask(b.from_forget)
        return siss_losses(
            model, b.x0_remain, b.x0_forget, b.t, b.noise, from_forget, lam, SCHEDULE
        )

    def expected(model: PlainLinear, b: SimpleNamespace) -> tuple[float, float]:
        from_forget = mask(torch.tensor(b.from_forget)).tolist()
        return oracle.siss_losses(model, b.x0_remain, b.x0_forget, b.t, b.noise, from_forget, lam)

    return Row(loss, expected)


def retrack_row(snr_cap: float) -> Row:
    return Row(
        lambda model, b: retrack_loss(
            model, b.x0_forget, b.t, b.noise, b.target, SCHEDULE, snr_cap
        ),
        lambda model, b: oracle.retrack_loss(model, b.x0_forget, b.t, b.noise, b.target, snr_cap),
    )


def product_regression(model: nn.Module, b: LossBatch) -> Tensor:
    """`regression_loss` is given predictions, not a model."""
    x_t = SCHEDULE.q_sample(b.x0_forget, b.t, b.noise)
    return regression_loss(model(x_t, b.t), b.target, b.t, SCHEDULE, snr_cap=0.5)


def product_vdu(model: nn.Module, b: LossBatch) -> Tensor:
    weights = list(model.parameters())
    mean, std = normal_prior(weights)
    return vdu_loss(model, b.x0_forget, b.t, b.noise, weights, mean, std, PRIOR_WEIGHT, SCHEDULE)


def oracle_vdu(model: PlainLinear, b: SimpleNamespace) -> float:
    mean, std = normal_prior([torch.tensor(model.params, dtype=torch.float64)])
    return oracle.vdu_loss(
        model,
        b.x0_forget,
        b.t,
        b.noise,
        model.params,
        mean[0].tolist(),
        std[0].tolist(),
        PRIOR_WEIGHT,
    )


# "name of the function" or "name of the function, setting": (the loss, its oracle).
# A new loss needs one row.
LOSSES: dict[str, Row] = {
    "ddpm_loss": Row(
        lambda model, b: ddpm_loss(model, b.x0_remain, b.t, b.noise, SCHEDULE),
        lambda model, b: oracle.ddpm_loss(model, b.x0_remain, b.t, b.noise),
    ),
    "neggrad_loss": Row(
        lambda model, b: neggrad_loss(model, b.x0_forget, b.t, b.noise, SCHEDULE),
        lambda model, b: oracle.neggrad_loss(model, b.x0_forget, b.t, b.noise),
    ),
    "erasediff_losses": Row(
        lambda model, b: erasediff_losses(
            model, b.x0_remain, b.x0_forget, b.t, b.noise, b.uniform, SCHEDULE
        ),
        lambda model, b: oracle.erasediff_losses(
            model, b.x0_remain, b.x0_forget, b.t, b.noise, b.uniform
        ),
    ),
    "siss_losses": siss_row(lam=0.3),
    "siss_losses, lambda 0": siss_row(lam=0.0),
    "siss_losses, lambda 1": siss_row(lam=1.0),
    "retrack_loss": retrack_row(snr_cap=math.inf),
    "retrack_loss, SNR cap 0.5": retrack_row(snr_cap=0.5),
    "regression_loss": Row(
        product_regression,
        lambda model, b: oracle.regression_loss(
            model, b.x0_forget, b.t, b.noise, b.target, snr_cap=0.5
        ),
    ),
    "retrack_weighted_loss": Row(
        lambda model, b: retrack_weighted_loss(
            model, b.x0_forget, b.t, b.noise, b.neighbors, SCHEDULE
        ),
        lambda model, b: oracle.retrack_weighted_loss(
            model, b.x0_forget, b.t, b.noise, b.neighbors
        ),
    ),
    "vdu_loss": Row(product_vdu, oracle_vdu),
    "dimum_loss": Row(
        lambda model, b: dimum_loss(model, b.x0_forget, b.x0_alternative, b.t, b.noise, SCHEDULE),
        lambda model, b: oracle.dimum_loss(model, b.x0_forget, b.x0_alternative, b.t, b.noise),
    ),
}


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def loss_parts(name: str, model: nn.Module, batch: LossBatch) -> Tensor:
    """The one or two losses of a row, as one vector."""
    return torch.stack(as_tuple(LOSSES[name].loss(model, batch)))


def test_every_loss_has_an_oracle() -> None:
    functions = [name for name, _ in inspect.getmembers(losses, inspect.isfunction)]
    named = {row.partition(",")[0] for row in LOSSES}
    for name in functions:
        if name.endswith(("_loss", "_losses")):
            assert name in named, (
                f"{name} has no oracle: add a row to LOSSES in tests/test_losses.py"
            )
    assert named <= set(functions)


# --- Every loss ---


@pytest.mark.parametrize("name", LOSSES)
def test_loss_value_and_gradient_equal_the_oracle(name: str) -> None:
    model = Linear()
    params = model.params.tolist()
    numbers = plain(BATCH)

    def expected_losses(model: PlainLinear) -> tuple[float, ...]:
        return as_tuple(LOSSES[name].oracle(model, numbers))

    expected = torch.tensor(expected_losses(PlainLinear(params)), dtype=torch.float64)
    parts = loss_parts(name, model, BATCH)
    assert_close(parts, expected, rtol=1e-9, atol=0)
    for part, wanted in zip(parts, gradient_of_quadratic(expected_losses, params), strict=True):
        (gradient,) = torch.autograd.grad(part, model.params, retain_graph=True)
        # a central difference has the rounding of the loss itself
        rounding = 1e-12 * abs(part.item())
        assert gradient.tolist() == pytest.approx(wanted, rel=1e-8, abs=rounding)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_draws_no_random_numbers(name: str) -> None:
    model = Linear()
    state = torch.get_rng_state()
    first = loss_parts(name, model, BATCH)
    assert torch.equal(loss_parts(name, model, BATCH), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_a_mean_over_the_batch(name: str) -> None:
    """Samples do not see each other: in any order, and one by one, they give the same mean."""
    model = Linear()
    whole = loss_parts(name, model, BATCH)
    tensors = vars(BATCH)
    flipped = LossBatch(**{key: value.flip(0) for key, value in tensors.items()})
    assert_close(loss_parts(name, model, flipped), whole, rtol=1e-12, atol=0)
    singles = []
    for i in range(3):
        single = LossBatch(**{key: value[i : i + 1] for key, value in tensors.items()})
        singles.append(loss_parts(name, model, single))
    assert_close(torch.stack(singles).mean(0), whole, rtol=1e-12, atol=0)


def test_neggrad_loss_is_minus_the_ddpm_loss() -> None:
    model = Linear()
    images = (BATCH.x0_forget, BATCH.t, BATCH.noise)
    assert torch.equal(neggrad_loss(model, *images, SCHEDULE), -ddpm_loss(model, *images, SCHEDULE))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "field"),
    [("ddpm_loss", "noise"), ("erasediff_losses", "uniform"), ("retrack_loss", "target")],
)
def test_loss_refuses_a_target_of_another_shape(name: str, field: str) -> None:
    """Broadcasting would silently train towards one target for the whole batch."""
    first_only = replace(BATCH, **{field: getattr(BATCH, field)[:1]})
    with pytest.raises(ValueError, match="shape"):
        LOSSES[name].loss(Linear(), first_only)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", LOSSES)
def test_loss_refuses_pixels_of_0_to_255(name: str) -> None:
    """gamma and sigma, cast to integers, would be 0, and x_t black."""
    images = ("x0_forget", "x0_remain", "x0_alternative")
    pixels = replace(BATCH, **{field: getattr(BATCH, field).to(torch.uint8) for field in images})
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        LOSSES[name].loss(Linear(), pixels)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("field", ["x0_forget", "x0_remain", "from_forget"])
def test_siss_losses_refuse_one_image_for_a_batch(field: str) -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        LOSSES["siss_losses"].loss(Linear(), replace(BATCH, **{field: getattr(BATCH, field)[:1]}))


# --- ReTrack ---


@pytest.mark.usefixtures("unchecked")
def test_retrack_weighted_loss_refuses_a_model_with_one_number_per_image() -> None:
    def eps_model(x_t: Tensor, t: Tensor) -> Tensor:
        return x_t.mean((1, 2, 3), keepdim=True)

    with pytest.raises(ValueError, match="shapes differ"):
        LOSSES["retrack_weighted_loss"].loss(eps_model, BATCH)


@pytest.mark.parametrize("snr_cap", [-1.0, math.nan])
def test_regression_loss_refuses_a_negative_cap(snr_cap: float) -> None:
    """It would turn the loss into ascent."""
    with pytest.raises(ValueError, match="snr_cap must be 0 or more"):
        regression_loss(BATCH.noise, BATCH.target, BATCH.t, SCHEDULE, snr_cap)


def test_retrack_weighted_loss_ignores_the_order_of_neighbors() -> None:
    model = Linear()
    shuffled = replace(BATCH, neighbors=BATCH.neighbors[:, [2, 0, 1]])
    name = "retrack_weighted_loss"
    assert_close(
        loss_parts(name, model, shuffled), loss_parts(name, model, BATCH), rtol=1e-12, atol=0
    )


def test_retrack_weighted_loss_of_copies_is_that_of_one_neighbor() -> None:
    model = Linear()
    one = BATCH.neighbors[:, :1]
    copies = replace(BATCH, neighbors=one.expand(-1, 5, -1, -1, -1))
    numbers = plain(BATCH)
    targets = []
    for a, t, e, images in zip(
        numbers.x0_forget, numbers.t, numbers.noise, numbers.neighbors, strict=True
    ):
        targets.append(oracle.implied_noise(oracle.noised(a, t, e), t, images[0]))
    expected = oracle.retrack_loss(
        PlainLinear(model.params.tolist()), numbers.x0_forget, numbers.t, numbers.noise, targets
    )
    loss = loss_parts("retrack_weighted_loss", model, copies)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.usefixtures("unchecked")
def test_retrack_weighted_loss_refuses_pixels_of_0_to_255() -> None:
    pixels = replace(BATCH, neighbors=BATCH.neighbors.to(torch.uint8))
    with pytest.raises(ValueError, match=r"neighbors are torch\.uint8"):
        loss_parts("retrack_weighted_loss", Linear(), pixels)


def test_retrack_weighted_loss_in_float32_separates_near_neighbors() -> None:
    """Two images 27 away, of 56 at most; by their distances, one has three times the other's
    weight.

    Their ||v||^2 is 7e6, and what decides is a difference of 2 in it: too fine for a float32 sum.
    """
    bias = torch.zeros(784, requires_grad=True)
    direction = draw(2, 784, seed=8)
    gap = 2 * math.log(3) / oracle.snr(0)  # of the squared distances
    lengths = torch.tensor([27.0, math.sqrt(27.0**2 - gap)], dtype=torch.float64)
    unit = direction / direction.norm(dim=1, keepdim=True)
    neighbors = (unit * lengths[:, None]).view(1, 2, 1, 28, 28).float()
    origin = torch.zeros(1, 1, 28, 28)

    def eps_model(x_t: Tensor, t: Tensor) -> Tensor:
        return bias.view_as(x_t)

    loss = retrack_weighted_loss(eps_model, origin, torch.tensor([0]), origin, neighbors, SCHEDULE)
    (gradient,) = torch.autograd.grad(loss, bias)
    # -2 sum_k p_k v_k, and v_k = -gamma a_k / sigma
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    mean = weights @ neighbors[0].flatten(1).double()
    expected = 2 * oracle.gamma(0) / oracle.sigma(0) * mean
    assert_close(gradient.double(), expected, rtol=0, atol=0.01 * expected.abs().max().item())


def test_snr_cap_of_1_takes_the_smaller_of_the_x0_and_eps_errors() -> None:
    """docs/theory.md (8): the error of x0 at little noise, that of eps at much noise."""
    numbers = plain(BATCH)
    forget, noise, target = numbers.x0_forget[0], numbers.noise[0], numbers.target[0]
    for t in range(0, 1000, 7):
        x_t = oracle.noised(forget, t, noise)
        x0_error = oracle.squared_distance(
            oracle.implied_x0(x_t, t, noise), oracle.implied_x0(x_t, t, target)
        )
        eps_error = oracle.squared_distance(noise, target)
        loss = retrack_loss(
            lambda x_t, t: BATCH.noise[:1],
            BATCH.x0_forget[:1],
            torch.tensor([t]),
            BATCH.noise[:1],
            BATCH.target[:1],
            SCHEDULE,
            1.0,
        )
        assert loss.item() == pytest.approx(min(x0_error, eps_error), rel=1e-9)


def test_snr_cap_of_10000_is_no_cap() -> None:
    """It is above every SNR of the linear schedule: the published loss to the last bit."""
    model = Linear()
    for t in range(1000):
        b = replace(BATCH, t=torch.full((3,), t))
        arguments = (model, b.x0_forget, b.t, b.noise, b.target, SCHEDULE)
        assert torch.equal(retrack_loss(*arguments), retrack_loss(*arguments, snr_cap=1e4))


# --- SISS ---

pixels = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=D, max_size=D)


def siss_weights(
    a_r: Tensor, a_u: Tensor, t: int, noise: Tensor, from_forget: bool, lam: float
) -> tuple[float, float]:
    """(w_r, w_u) as the losses have them.

    A model that is wrong by 1 at every pixel has a squared error of D, so its loss is D w.
    """
    times = torch.tensor([t])
    mask = torch.tensor([from_forget])

    def loss_part(image: Tensor, part: int) -> float:
        def off_by_one(m: Tensor, time: Tensor) -> Tensor:
            return SCHEDULE.predict_eps(m, time, image) + 1

        parts = siss_losses(off_by_one, a_r, a_u, times, noise, mask, lam, SCHEDULE)
        return parts[part].item()

    return loss_part(a_r, 0) / a_r.numel(), loss_part(a_u, 1) / a_u.numel()


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
    a_r: list[float],
    a_u: list[float],
    t: int,
    noise: list[float],
    from_forget: bool,
    lam: float,
) -> None:
    remain, forget, unit = (
        torch.tensor(values, dtype=dtype).view(1, *SHAPE) for values in (a_r, a_u, noise)
    )
    w_r, w_u = siss_weights(remain, forget, t, unit, from_forget, lam)
    # off_by_one is rounded at t = 0, where eps is up to 200
    rounding = 1e-9 if dtype == torch.float64 else 1e-3
    assert 0 <= w_r <= (1 + rounding) / (1 - lam)
    assert 0 <= w_u <= (1 + rounding) / lam
    assert (1 - lam) * w_r + lam * w_u == pytest.approx(1, rel=rounding)
    if dtype == torch.float64:
        m = oracle.noised(a_u if from_forget else a_r, t, noise)
        expected = oracle.siss_weights(m, t, a_r, a_u, lam)
        assert (w_r, w_u) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("from_forget", [False, True])
@pytest.mark.parametrize("t", [0, 999])
def test_siss_weights_are_finite_between_black_and_white_images(t: int, from_forget: bool) -> None:
    """The log-density of 3 x 256 x 256 pixels at t = 0 differs by 4e9: no density can be formed."""
    white = torch.ones(1, 3, 256, 256)
    noise = torch.randn(white.shape, generator=torch.Generator().manual_seed(0))
    w_r, w_u = siss_weights(white, -white, t, noise, from_forget, lam=0.5)
    if t == 0:
        assert (w_r, w_u) == pytest.approx((0, 2) if from_forget else (2, 0), rel=1e-3)
    assert 0.5 * w_r + 0.5 * w_u == pytest.approx(1, rel=1e-3)


def test_siss_losses_at_lambda_0_and_1_are_the_ddpm_loss() -> None:
    """lam = 0 samples remain images only, each with weight 1; lam = 1 forget images only."""
    model = Linear()
    remain_loss, _ = loss_parts("siss_losses, lambda 0", model, BATCH)
    _, forget_loss = loss_parts("siss_losses, lambda 1", model, BATCH)
    remain = ddpm_loss(model, BATCH.x0_remain, BATCH.t, BATCH.noise, SCHEDULE)
    forget = ddpm_loss(model, BATCH.x0_forget, BATCH.t, BATCH.noise, SCHEDULE)
    assert_close(remain_loss, remain, rtol=1e-10, atol=0)
    assert_close(forget_loss, forget, rtol=1e-10, atol=0)


def test_siss_losses_call_the_model_once() -> None:
    model = Linear()
    LOSSES["siss_losses"].loss(model, BATCH)
    assert model.calls == 1


@pytest.mark.parametrize("lam", [-0.1, 1.1, math.nan])
def test_siss_losses_refuse_a_lambda_outside_0_to_1(lam: float) -> None:
    b = BATCH
    images = (b.x0_remain, b.x0_forget, b.t, b.noise, b.from_forget)
    with pytest.raises(ValueError, match="lam"):
        siss_losses(Linear(), *images, lam, SCHEDULE)


# --- Two gradients into one: a gradient is a list of tensors, its norm and inner products are those
# of the whole model. ---


def flattened(gradient: list[Tensor]) -> list[float]:
    return [value for tensor in gradient for value in tensor.flatten().tolist()]


def gradient(seed: int, scale: float = 1.0) -> list[Tensor]:
    return [scale * draw(2, 3, seed=seed), scale * draw(4, seed=seed + 100)]


def plus(a: list[Tensor], b: list[Tensor], factor: float) -> list[Tensor]:
    return [x + factor * y for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("tilt", [-3.0, 0.0, 3.0])
@pytest.mark.parametrize("eta", [None, 0.1])
def test_erasediff_gradient_equals_the_oracle_and_lowers_the_forget_loss(
    tilt: float, eta: float | None
) -> None:
    g_f = gradient(seed=1)
    g_r = plus(gradient(seed=2), g_f, tilt)
    combined = erasediff_gradient(g_r, g_f) if eta is None else erasediff_gradient(g_r, g_f, eta)
    eta = 1e-3 if eta is None else eta
    r, f = flattened(g_r), flattened(g_f)
    assert [x.shape for x in combined] == [x.shape for x in g_r]
    assert flattened(combined) == pytest.approx(oracle.erasediff_gradient(r, f, eta), rel=1e-12)
    changed = flattened(combined) != r
    assert changed == (tilt < 3)  # both branches are met
    # What the method promises: a step along -g lowers L_f by at least eta ||g_f||^2 per unit of
    # learning rate.
    squared_norm = oracle.inner(f, f)
    assert oracle.inner(flattened(combined), f) >= eta * squared_norm * (1 - 1e-9)


@pytest.mark.parametrize("rescale", [5.0, 0.5, 0.0, "10%", "250%", "5"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_siss_gradient_equals_the_oracle(rescale: float | str, scale: float) -> None:
    """However large g_u is, what is subtracted has the norm asked for."""
    g_r = gradient(seed=1)
    g_u = gradient(seed=2, scale=scale)
    combined = siss_gradient(g_r, g_u, rescale)
    expected = oracle.siss_gradient(flattened(g_r), flattened(g_u), rescale)
    assert [x.shape for x in combined] == [x.shape for x in g_r]
    assert flattened(combined) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("rescale", ["much", "%", "-10%", "-1", -1.0, ""])
def test_siss_gradient_refuses_an_invalid_rescale(rescale: float | str) -> None:
    with pytest.raises(ValueError, match="rescale"):
        siss_gradient(gradient(seed=1), gradient(seed=2), rescale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rescale", [5.0, "10%"])
def test_combined_gradient_is_the_remain_gradient_where_the_forget_gradient_is_zero(
    rescale: float | str, dtype: torch.dtype
) -> None:
    """SISS meets this when a batch has no forget image and only low t: each w_u is then 0."""
    g_r = [x.to(dtype) for x in gradient(seed=1)]
    zero = [torch.zeros_like(x) for x in g_r]
    assert flattened(siss_gradient(g_r, zero, rescale)) == flattened(g_r)
    assert flattened(erasediff_gradient(g_r, zero)) == flattened(g_r)


@pytest.mark.parametrize("combine", [erasediff_gradient, lambda r, u: siss_gradient(r, u, 5.0)])
def test_combined_gradient_leaves_its_inputs_unchanged(
    combine: Callable[..., list[Tensor]],
) -> None:
    g_r = gradient(seed=1)
    g_u = plus(gradient(seed=2), gradient(seed=1), -2.0)
    before = flattened(g_r), flattened(g_u)
    combine(g_r, g_u)
    assert (flattened(g_r), flattened(g_u)) == before

"""The likelihood compared with closed forms: mixtures of Gaussians, whose denoiser and density are
known at any noise level.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from tqdm import tqdm

from tiny_retrack.likelihood import nll_bits_per_dim
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.types import NonFiniteError

LINEAR = NoiseSchedule.linear()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_alpha_bar(t: Tensor) -> Tensor:
    """The VP-SDE of arXiv 2011.13456, eq. 33, with beta from 0.1 to 20, at time t / 999."""
    s = t / 999
    return torch.exp(-(0.1 * s + 19.9 * s**2 / 2))


class Mixture:
    """sum_m weight_m N(mean_m, diag(std_m^2)).

    After noising, it is the same with N(gamma mean_m, gamma^2 std_m^2 + sigma^2).
    """

    def __init__(
        self,
        weights: list[float],
        means: list[list[float]],
        stds: list[list[float]],
        alpha_bar: Callable[[Tensor], Tensor] = linear_alpha_bar,
    ) -> None:
        self.log_weights = torch.tensor(weights, dtype=torch.float64).log()
        self.means = torch.tensor(means, dtype=torch.float64)  # [m, D]
        self.stds = torch.tensor(stds, dtype=torch.float64)
        self.alpha_bar = alpha_bar

    def logits(self, x: Tensor, alpha_bar: Tensor) -> Tensor:  # [b, D], [b] -> [b, m]
        scale, means, stds = alpha_bar[:, None, None], self.means.to(x), self.stds.to(x)
        var = scale * stds**2 + 1 - scale  # [b, m, D]
        square = (x[:, None] - scale.sqrt() * means) ** 2 / var
        return self.log_weights.to(x) - 0.5 * (square + var.log() + math.log(2 * math.pi)).sum(2)

    def bits_per_dim(self, x0: Tensor) -> Tensor:
        logits = self.logits(x0.flatten(1), x0.new_ones(len(x0)))
        return 7 - logits.logsumexp(1) / math.log(2) / x0[0].numel()

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The optimal eps: -sigma times the score."""
        x, alpha_bar = x_t.flatten(1), self.alpha_bar(t.double()).to(x_t)
        scale, means, stds = alpha_bar[:, None, None], self.means.to(x), self.stds.to(x)
        posterior = torch.softmax(self.logits(x, alpha_bar), dim=1)[:, :, None]
        score = -(
            posterior * (x[:, None] - scale.sqrt() * means) / (scale * stds**2 + 1 - scale)
        ).sum(1)
        return (-(1 - alpha_bar).sqrt()[:, None] * score).view_as(x_t)

    def draw(self, num: int, shape: tuple[int, ...]) -> Tensor:
        which = torch.multinomial(
            self.log_weights.exp(), num, replacement=True, generator=seeded(0)
        )
        noise = torch.randn(num, self.means.shape[1], dtype=torch.float64, generator=seeded(1))
        return (self.means[which] + self.stds[which] * noise).view(num, *shape)


GAUSSIAN = Mixture([1.0], [[0.5, -0.3, 0.1, -0.9]], [[0.1, 0.4, 0.2, 0.7]])
THREE = Mixture(
    [0.5, 0.3, 0.2], [[-0.8, 0.5, 0.0], [0.7, 0.6, -0.4], [0.0, -0.9, 0.3]], [[0.2, 0.3, 0.1]] * 3
)


@pytest.mark.parametrize(
    ("density", "shape"), [(GAUSSIAN, (1, 2, 2)), (THREE, (3, 1, 1))], ids=["gaussian", "mixture"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_nll_equals_the_closed_form(
    density: Mixture, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x0 = density.draw(16, shape).to(dtype)
    nll = nll_bits_per_dim(density, x0, LINEAR, seeded(), exact_trace=True)
    assert nll.shape == (16,)
    assert nll.dtype == dtype
    # They differ by the noise of time 1e-5 and by what is left of the image at the last time.
    torch.testing.assert_close(nll.double(), density.bits_per_dim(x0.double()), rtol=0, atol=0.01)


def test_nll_of_a_cosine_schedule_equals_the_closed_form() -> None:
    """A cosine schedule (arXiv 2102.09672, eq. 17) of 40 steps, integrated by a Riemann sum."""
    edges = [math.cos((i / 40 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(41)]
    beta = [min(1 - edges[i + 1] / edges[i], 0.5) for i in range(40)]
    cells = 4000
    sums = [0.0]
    for i in range(cells):
        t = (i + 0.5) / cells * 39
        left = int(t)
        sums.append(
            sums[-1] + 40 * (beta[left] + (t - left) * (beta[left + 1] - beta[left])) / cells
        )
    table = torch.tensor(sums, dtype=torch.float64)

    def alpha_bar(t: Tensor) -> Tensor:
        place = (t / 39 * cells).clamp(0, cells - 1e-6)
        left = place.long()
        return torch.exp(-torch.lerp(table[left], table[left + 1], place - left))

    density = Mixture([0.6, 0.4], [[0.5, -0.3], [-0.6, 0.2]], [[0.3, 0.4]] * 2, alpha_bar)
    x0 = density.draw(8, (1, 1, 2))
    schedule = NoiseSchedule(torch.tensor(beta, dtype=torch.float64))
    nll = nll_bits_per_dim(density, x0, schedule, seeded(), exact_trace=True)
    torch.testing.assert_close(nll, density.bits_per_dim(x0), rtol=0, atol=0.02)


def rotated(x_t: Tensor, t: Tensor) -> Tensor:
    """THREE in rotated coordinates, where the Jacobian has entries off the diagonal.

    They contribute to the estimate with a probe, but not to the trace.
    """
    a, b = math.cos(0.6), math.sin(0.6)
    first = torch.tensor([[a, -b, 0], [b, a, 0], [0, 0, 1]], dtype=torch.float64)
    second = torch.tensor([[1, 0, 0], [0, a, -b], [0, b, a]], dtype=torch.float64)
    basis = first @ second
    return (THREE((x_t.flatten(1) @ basis).view_as(x_t), t).flatten(1) @ basis.T).view_as(x_t)


IMAGE = torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64).view(1, 3, 1, 1)


def test_hutchinson_estimate_is_unbiased() -> None:
    """In 3 dimensions the 8 possible probes are 4 pairs of opposites, all equally likely.

    The mean of their 4 estimates is the value with the exact trace.
    """

    def nll_of(images: Tensor, exact_trace: bool) -> Tensor:
        return nll_bits_per_dim(
            rotated, images, LINEAR, seeded(), exact_trace=exact_trace, rtol=1e-8, atol=1e-8
        )

    exact = nll_of(IMAGE, exact_trace=True)
    nll = nll_of(IMAGE.expand(200, -1, -1, -1), exact_trace=False)
    outcomes, counts = torch.unique((nll * 1e5).round(), return_counts=True)
    assert len(outcomes) == 4
    assert counts.min() > 50 - 5 * math.sqrt(200 * 0.25 * 0.75)
    assert outcomes.diff().min() > 100  # the estimates differ, by more than 0.001 bits
    torch.testing.assert_close(outcomes.mean()[None] / 1e5, exact, rtol=0, atol=1e-5)


def test_more_probes_lower_the_spread() -> None:
    one, many = (
        nll_bits_per_dim(rotated, IMAGE.expand(100, -1, -1, -1), LINEAR, seeded(), num_probes=num)
        for num in (1, 16)
    )
    # 16 probes have a quarter of the standard deviation, which 100 draws estimate to 7%.
    assert 0.15 < many.std() / one.std() < 0.35


def test_nll_is_independent_of_the_batches() -> None:
    x0 = THREE.draw(7, (3, 1, 1))
    whole = nll_bits_per_dim(rotated, x0, LINEAR, seeded())
    generator = seeded()
    parts = [nll_bits_per_dim(rotated, part, LINEAR, generator) for part in x0.split([3, 1, 3])]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-4)


def test_nll_of_a_hard_image_is_accurate_among_easy_ones() -> None:
    """A norm averaged over the batch would loosen the hard image's tolerance 16 times."""
    two = Mixture([0.5, 0.5], [[-0.9], [0.9]], [[0.2]] * 2)
    hard = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64)  # between the two modes
    crowd = torch.cat([hard, hard.new_full((255, 1, 1, 1), 0.9)])
    nll = nll_bits_per_dim(two, crowd, LINEAR, seeded(), exact_trace=True, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(nll[:1], two.bits_per_dim(hard), rtol=0.01, atol=0)


def test_nll_depends_on_no_other_randomness_than_the_generator() -> None:
    x0 = THREE.draw(4, (3, 1, 1))
    state = torch.get_rng_state()
    first, again, other = (
        nll_bits_per_dim(rotated, x0, LINEAR, seeded(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


class Recording(nn.Module):
    """A density's eps times a weight, which records the times it is evaluated at."""

    def __init__(self, density: Mixture) -> None:
        super().__init__()
        self.density = density
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.times: list[float] = []

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x_t),)
        assert t.dtype == x_t.dtype
        self.times.append(t[0].item())
        return self.weight * self.density(x_t, t)


# Almost N(0, I), so that x hardly moves and the solver takes long steps.
ALMOST_PRIOR = Mixture([1.0], [[0.0, 0.0, 0.0]], [[0.999, 0.999, 0.999]])


@pytest.mark.parametrize("density", [THREE, ALMOST_PRIOR], ids=["three", "almost-prior"])
def test_model_is_evaluated_from_the_first_to_the_last_time(density: Mixture) -> None:
    model = Recording(density)
    nll_bits_per_dim(model, IMAGE, LINEAR, seeded())
    assert min(model.times) == pytest.approx(1e-5 * 999)
    assert max(model.times) == pytest.approx(999)


def test_nll_keeps_no_gradient() -> None:
    model = Recording(THREE)
    assert not nll_bits_per_dim(model, IMAGE, LINEAR, seeded()).requires_grad
    assert model.weight.grad is None


def test_progress_bar_is_shown_on_request(capsys, monkeypatch) -> None:
    bars = []

    class Kept(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr("tiny_retrack.likelihood.tqdm", Kept)
    nll_bits_per_dim(THREE, IMAGE, LINEAR, seeded(), progress="nll of the forgotten")
    assert "nll of the forgotten" in capsys.readouterr().err
    assert bars[0].n == pytest.approx(bars[0].total)
    nll_bits_per_dim(THREE, IMAGE, LINEAR, seeded())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda x_t, t: x_t * math.nan, "not finite"),
        (lambda x_t, t: x_t * 1000, "not finite"),  # x grows until eps overflows
        (lambda x_t, t: 10 * x_t**3, "underflow"),  # x is infinite before the last time
        (lambda x_t, t: torch.sin(1e4 * x_t), "max_num_steps"),
    ],
    ids=["nan", "overflow", "explosion", "rough"],
)
def test_broken_model_raises(
    model: Callable[[Tensor, Tensor], Tensor], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiny_retrack.likelihood.MAX_STEPS", 400)
    with pytest.raises(NonFiniteError, match=says):
        nll_bits_per_dim(model, IMAGE.float(), LINEAR, seeded())


@pytest.mark.parametrize("exact_trace", [True, False])
def test_nll_of_a_denoiser_that_looks_at_nothing_equals_the_closed_form(exact_trace: bool) -> None:
    """With eps = 0, x shrinks by gamma = exp(-int beta / 2), and its density grows by 1 / gamma."""
    gamma = linear_alpha_bar(torch.tensor(999.0, dtype=torch.float64)).sqrt()
    x = gamma * IMAGE.flatten(1)
    log_density = -0.5 * (x**2 + math.log(2 * math.pi)) + gamma.log()
    nll = nll_bits_per_dim(
        lambda x_t, t: torch.zeros_like(x_t), IMAGE, LINEAR, seeded(), exact_trace=exact_trace
    )
    assert_close(nll, 7 - log_density.mean(1) / math.log(2), rtol=1e-4, atol=0)


def test_nll_refuses_impossible_arguments() -> None:
    with pytest.raises(ValueError, match="probe"):
        nll_bits_per_dim(THREE, IMAGE, LINEAR, seeded(), num_probes=0)
    with pytest.raises(ValueError, match="time steps"):
        nll_bits_per_dim(THREE, IMAGE, NoiseSchedule.linear(1), seeded())


@pytest.mark.usefixtures("unchecked")
def test_nll_refuses_pixels_of_0_to_255() -> None:
    with pytest.raises(ValueError, match=r"x0 is torch\.uint8"):
        nll_bits_per_dim(THREE, IMAGE.to(torch.uint8), LINEAR, seeded())

"""The samplers compared with plain loops, and on data whose optimal denoiser is known: a Gaussian
and a finite set.
"""

import math
from itertools import pairwise

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import ALPHA_BAR, BETA
from torch import Tensor, nn
from torch.testing import assert_close

from tiny_retrack.posterior import ideal_eps
from tiny_retrack.sampling import (
    ddim_from,
    ddim_sample,
    ddpm_sample,
    inject_and_denoise,
    sample_many,
    timesteps,
)
from tiny_retrack.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()
# The times of 4, 10 and 1000 steps from t = 999 are integers without rounding.
TIMES = {
    1: [999],
    4: [999, 666, 333, 0],
    10: list(range(999, -1, -111)),
    1000: list(range(999, -1, -1)),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wavy(x: float, t: int) -> float:
    """A denoiser of one pixel, which belongs to no data."""
    return 0.7 * x + 0.3 * math.sin(2 * x) + t / 2000


def wavy_model(x_t: Tensor, t: Tensor) -> Tensor:
    assert t.dtype == torch.int64
    return 0.7 * x_t + 0.3 * torch.sin(2 * x_t) + (t.to(x_t.dtype) / 2000)[:, None, None, None]


class Points:
    """The ideal denoiser of a finite data set."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        return ideal_eps(x_t, t, self.data, SCHEDULE)

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(distance, index) of the data point nearest to each sample."""
        found = torch.cdist(x.flatten(1), self.data.flatten(1)).min(dim=1)
        return found.values, found.indices


# --- Times ---


@given(st.integers(0, 999), st.data())
def test_timesteps_fall_evenly_from_start_to_zero(start: int, data: st.DataObject) -> None:
    num = data.draw(st.integers(1, start + 1))
    times = timesteps(start, num).tolist()
    assert len(times) == num
    assert times[0] == start
    if num > 1:
        assert times[-1] == 0
        assert all(
            abs(times[i] - start * (num - 1 - i) / (num - 1)) <= 0.5 + 1e-9 for i in range(num)
        )
        assert all(now > after for now, after in pairwise(times))


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
@pytest.mark.parametrize("sample", [ddim_sample, ddpm_sample])
def test_samplers_refuse_impossible_numbers_of_steps(sample, num_steps: int) -> None:
    with pytest.raises(ValueError, match="steps"):
        sample(wavy_model, (1, 1, 1, 1), SCHEDULE, num_steps, seeded())


# --- Each update, as in the papers ---


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("num_steps", TIMES)
def test_ddim_equals_the_papers_loop(num_steps: int, clip: bool) -> None:
    """DDIM, arXiv 2010.02502, eq. 12 with sigma = 0; the last step returns the predicted x0."""
    noise = torch.randn(3, 1, 2, 2, generator=seeded(), dtype=torch.float64)
    expected = []
    for start in noise.flatten().tolist():
        x = start
        for t, after in zip(TIMES[num_steps], [*TIMES[num_steps][1:], None], strict=True):
            eps = wavy(x, t)
            (x0,) = oracle.implied_x0([x], t, [eps])
            if clip:
                x0 = min(max(x0, -1.0), 1.0)
                (eps,) = oracle.implied_noise([x], t, [x0])
            x = x0 if after is None else oracle.noised([x0], after, [eps])[0]
        expected.append(x)
    x0 = ddim_from(wavy_model, noise, 999, SCHEDULE, num_steps, clip)
    assert_close(
        x0, torch.tensor(expected, dtype=torch.float64).view_as(noise), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("num_steps", TIMES)
def test_ddpm_equals_the_papers_loop(num_steps: int, clip: bool) -> None:
    """DDPM, arXiv 2006.11239, eqs. 6 and 7, between the times that are used (arXiv 2102.09672,
    eq. 19).
    """
    generator = seeded()
    shape = (3, 1, 2, 2)
    x = torch.randn(shape, generator=generator).double()
    for t, after in zip(TIMES[num_steps], [*TIMES[num_steps][1:], None], strict=True):
        alpha_bar = ALPHA_BAR[t]
        alpha_bar_after = 1.0 if after is None else ALPHA_BAR[after]
        beta = 1 - alpha_bar / alpha_bar_after
        noise = torch.zeros(shape) if after is None else torch.randn(shape, generator=generator)
        stepped = []
        for pixel, n in zip(x.flatten().tolist(), noise.flatten().tolist(), strict=True):
            (x0,) = oracle.implied_x0([pixel], t, [wavy(pixel, t)])
            if clip:
                x0 = min(max(x0, -1.0), 1.0)
            mean = math.sqrt(alpha_bar_after) * beta / (1 - alpha_bar) * x0
            mean += math.sqrt(1 - beta) * (1 - alpha_bar_after) / (1 - alpha_bar) * pixel
            stepped.append(mean + math.sqrt((1 - alpha_bar_after) / (1 - alpha_bar) * beta) * n)
        x = torch.tensor(stepped, dtype=torch.float64).view(shape)
    samples = ddpm_sample(wavy_model, shape, SCHEDULE, num_steps, seeded(), clip)
    assert_close(samples.double(), x, rtol=1e-5, atol=1e-5)


# --- What comes out ---


def ddpm_of_a_gaussian(mean: float, std: float) -> tuple[float, float]:
    """Mean and standard deviation of the samples of 1,000 steps.

    Each step is linear in x_t and adds Gaussian noise, so the samples have a Gaussian distribution.
    """
    center, var = 0.0, 1.0
    for t in range(999, -1, -1):
        alpha_bar, beta = ALPHA_BAR[t], BETA[t]
        after = ALPHA_BAR[t - 1] if t else 1.0
        # E[x0 | x_t] = mean + pull (x_t - sqrt(alpha_bar) mean)
        pull = math.sqrt(alpha_bar) * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)
        of_x0 = math.sqrt(after) * beta / (1 - alpha_bar)
        of_x = math.sqrt(1 - beta) * (1 - after) / (1 - alpha_bar)
        center = of_x * center + of_x0 * (mean + pull * (center - math.sqrt(alpha_bar) * mean))
        var = (of_x + of_x0 * pull) ** 2 * var + (1 - after) / (1 - alpha_bar) * beta
    return center, math.sqrt(var)


def test_ddpm_samples_have_the_moments_of_a_gaussian() -> None:
    """Two independent pixels; 20,000 samples, within five standard errors of the exact moments."""
    num = 20_000
    mean, std = [0.5, -0.2], [0.3, 0.8]
    means, stds = torch.tensor(mean), torch.tensor(std)

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        gamma, sigma = SCHEDULE.scales(t, x_t)
        return sigma * (x_t - gamma * means) / (gamma**2 * stds**2 + sigma**2)

    x = ddpm_sample(model, (num, 1, 1, 2), SCHEDULE, 1000, seeded()).view(num, 2).double()
    for i in range(2):
        center, width = ddpm_of_a_gaussian(mean[i], std[i])
        assert (center, width) == pytest.approx((mean[i], std[i]), rel=0.02)  # close to the data's
        assert abs(x[:, i].mean().item() - center) < 5 * width / math.sqrt(num)
        assert abs(x[:, i].std().item() / width - 1) < 5 / math.sqrt(2 * num)
    assert torch.corrcoef(x.T)[0, 1].abs() < 5 / math.sqrt(num)


@pytest.mark.parametrize(("sample", "num_steps"), [(ddim_sample, 100), (ddpm_sample, 1000)])
def test_samples_of_the_ideal_denoiser_are_the_data(sample, num_steps: int) -> None:
    corners = Points(
        torch.tensor([[0.7, 0.7], [0.7, -0.7], [-0.7, 0.7], [-0.7, -0.7]]).view(4, 1, 1, 2)
    )
    distance, index = corners.nearest(
        sample(corners, (400, 1, 1, 2), SCHEDULE, num_steps, seeded())
    )
    assert distance.max() < 1e-3
    counts = torch.bincount(index, minlength=4)
    assert bool(((counts - 100).abs() < 5 * math.sqrt(400 * 0.25 * 0.75)).all())


def test_samples_occur_as_often_as_in_the_data() -> None:
    points = Points(torch.tensor([0.8, -0.8, 0.8, 0.8]).view(4, 1, 1, 1))
    x = ddim_sample(points, (2000, 1, 1, 1), SCHEDULE, 250, seeded())
    share = (x > 0).double().mean().item()
    assert abs(share - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 2000)


@pytest.mark.parametrize(("t", "num_steps"), [(0, 1), (0, 50), (5, 50), (250, 50), (250, 1)])
def test_injection_returns_a_memorised_image(t: int, num_steps: int) -> None:
    """Even at t = 250, the noise is far smaller than the distance between images of 64 pixels."""
    images = Points(torch.rand(5, 1, 8, 8, generator=seeded()) * 2 - 1)
    noise = torch.randn(5, 1, 8, 8, generator=seeded(1))
    x0 = inject_and_denoise(images, images.data, t, noise, SCHEDULE, num_steps)
    assert_close(x0, images.data, rtol=0, atol=1e-3)


def test_injection_starts_from_the_noised_image() -> None:
    x0 = torch.rand(3, 1, 2, 2, generator=seeded(), dtype=torch.float64)
    noise = torch.randn(3, 1, 2, 2, generator=seeded(1), dtype=torch.float64)
    x_t = oracle.gamma(600) * x0 + oracle.sigma(600) * noise
    expected = ddim_from(wavy_model, x_t, 600, SCHEDULE, 7)
    assert_close(
        inject_and_denoise(wavy_model, x0, 600, noise, SCHEDULE, 7), expected, rtol=1e-9, atol=1e-9
    )


# --- Randomness, gradients, batches ---


@pytest.mark.parametrize("sample", [ddim_sample, ddpm_sample])
def test_samples_depend_on_no_other_randomness_than_the_generator(sample) -> None:
    state = torch.get_rng_state()
    first, again, other = (
        sample(wavy_model, (4, 1, 2, 2), SCHEDULE, 10, seeded(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_ddim_depends_on_the_first_noise_alone() -> None:
    x = ddim_sample(wavy_model, (4, 1, 2, 2), SCHEDULE, 10, seeded())
    noise = torch.randn(4, 1, 2, 2, generator=seeded())
    assert torch.equal(x, ddim_from(wavy_model, noise, 999, SCHEDULE, 10))


@pytest.mark.parametrize("sample", [ddim_sample, ddpm_sample])
def test_samples_keep_no_gradient(sample) -> None:
    model = nn.Conv2d(1, 1, 1)
    assert not sample(lambda x_t, t: model(x_t), (2, 1, 4, 4), SCHEDULE, 4, seeded()).requires_grad


@pytest.mark.parametrize("sampler", [ddim_sample, ddpm_sample])
def test_sample_many_draws_batches_from_one_generator(sampler) -> None:
    """Clipped batches of 3, 3 and 1, one after the other."""
    x = sample_many(wavy_model, 7, (1, 2, 2), SCHEDULE, 4, seed=5, batch_size=3, sampler=sampler)
    generator = seeded(5)
    batches = [
        sampler(wavy_model, (n, 1, 2, 2), SCHEDULE, 4, generator, clip=True) for n in (3, 3, 1)
    ]
    assert torch.equal(x, torch.cat(batches))


def test_sample_many_refuses_to_draw_nothing() -> None:
    with pytest.raises(ValueError, match="num must be at least 1"):
        sample_many(wavy_model, 0, (1, 2, 2), SCHEDULE, 4)


def test_sample_many_has_defaults_for_steps_seed_and_device() -> None:
    x = sample_many(wavy_model, 3, (1, 2, 2), SCHEDULE)
    assert torch.equal(x, ddim_sample(wavy_model, (3, 1, 2, 2), SCHEDULE, 25, seeded(0), clip=True))

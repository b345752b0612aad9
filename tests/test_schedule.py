"""The forward process: equal to the oracle, invertible, and with known values of alpha_bar."""

import math
from collections.abc import Callable

import oracle
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tiny_retrack.schedule import NoiseSchedule

LINEAR = NoiseSchedule.linear()
SHAPES = [(), (5,), (3, 4), (2, 3, 4)]  # of one sample: batches of one to four dimensions
betas = st.lists(st.floats(1e-5, 0.5), min_size=1, max_size=20)


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Four images, their times (both ends among them) and unit noise."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(4, *shape, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    return x0.to(dtype), torch.tensor([0, 999, 1, 500]), noise.to(dtype)


@given(betas)
@example(oracle.BETA)
def test_schedule_scales_equal_the_oracle(beta: list[float]) -> None:
    schedule = NoiseSchedule(torch.tensor(beta, dtype=torch.float64))
    alpha_bars = oracle.alpha_bars(beta)
    gamma = [math.sqrt(alpha_bar) for alpha_bar in alpha_bars]
    sigma = [math.sqrt(1 - alpha_bar) for alpha_bar in alpha_bars]
    assert schedule.num_steps == len(beta)
    assert_close(schedule.gamma, torch.tensor(gamma, dtype=torch.float64), rtol=1e-12, atol=0)
    # 1 - alpha_bar loses the digits that alpha_bar has in front: 2e-16 of 1 in a sigma^2 of at
    # least 1e-5.
    assert_close(schedule.sigma, torch.tensor(sigma, dtype=torch.float64), rtol=1e-10, atol=0)


def test_linear_schedule_has_evenly_spaced_betas() -> None:
    expected = torch.tensor(oracle.BETA, dtype=torch.float64)
    assert_close(LINEAR.beta, expected, rtol=1e-13, atol=0)
    three = NoiseSchedule.linear(3, 0.1, 0.5).beta
    assert_close(three, torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64), rtol=1e-13, atol=0)


def test_scaled_linear_schedule_has_betas_with_evenly_spaced_roots() -> None:
    roots = oracle.linear_betas(1000, math.sqrt(0.00085), math.sqrt(0.012))
    expected = torch.tensor([root**2 for root in roots], dtype=torch.float64)
    assert_close(NoiseSchedule.scaled_linear().beta, expected, rtol=1e-13, atol=0)
    three = NoiseSchedule.scaled_linear(3, 0.04, 0.16).beta
    assert_close(three, torch.tensor([0.04, 0.09, 0.16], dtype=torch.float64), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("t", "alpha_bar"),
    [
        (0, 0.9999),
        (1, 0.99978009207207207207),
        (250, 0.52142303061852734581),
        (500, 0.07779665836502389990),
        (999, 0.000040358297653756833148),
    ],
)
def test_linear_schedule_has_golden_alpha_bars(t: int, alpha_bar: float) -> None:
    """The product of 1 - (0.0001 + i 0.0199 / 999) over i <= t, by Python's decimal module with 60
    digits.
    """
    assert LINEAR.gamma[t].item() ** 2 == pytest.approx(alpha_bar, rel=1e-12)
    assert LINEAR.sigma[t].item() ** 2 == pytest.approx(1 - alpha_bar, rel=1e-11)


@given(betas)
def test_schedule_noise_grows_and_variance_is_kept(beta: list[float]) -> None:
    schedule = NoiseSchedule(torch.tensor(beta, dtype=torch.float64))
    assert schedule.gamma.dtype == schedule.sigma.dtype == torch.float64
    assert bool((schedule.gamma.diff() < 0).all())
    assert bool((schedule.sigma.diff() > 0).all())
    ones = torch.ones(len(beta), dtype=torch.float64)
    assert_close(schedule.gamma**2 + schedule.sigma**2, ones, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_q_sample_and_its_inverses_equal_the_oracle(shape: tuple[int, ...]) -> None:
    """Each sample of the batch has its own time."""
    x0, t, noise = draw(shape, torch.float64, seed=0)
    x_t = LINEAR.q_sample(x0, t, noise)
    implied_x0 = LINEAR.predict_x0(x0, t, noise)  # of x0 as a noisy image
    implied_noise = LINEAR.predict_eps(noise, t, x0)
    for i, time in enumerate(t.tolist()):
        a = x0[i].flatten().tolist()
        e = noise[i].flatten().tolist()
        expected = oracle.noised(a, time, e)
        assert x_t[i].flatten().tolist() == pytest.approx(expected, rel=1e-10, abs=1e-13)
        expected = oracle.implied_x0(a, time, e)
        assert implied_x0[i].flatten().tolist() == pytest.approx(expected, rel=1e-10, abs=1e-10)
        expected = oracle.implied_noise(e, time, a)
        assert implied_noise[i].flatten().tolist() == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_schedule_keeps_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x0, t, noise = draw(shape, dtype, seed=1)
    for out in (
        LINEAR.q_sample(x0, t, noise),
        LINEAR.predict_x0(x0, t, noise),
        LINEAR.predict_eps(x0, t, noise),
    ):
        assert out.shape == x0.shape
        assert out.dtype == dtype
    gamma, sigma = LINEAR.scales(t, x0)
    assert gamma.shape == sigma.shape == (4, *[1] * len(shape))
    assert gamma.dtype == sigma.dtype == dtype


def test_schedule_scales_are_rounded_once() -> None:
    """gamma_t of a float32 image is the float64 value rounded to float32, not a product of rounded
    factors.
    """
    t = torch.arange(1000)
    gamma, sigma = LINEAR.scales(t, torch.zeros(1000))
    assert torch.equal(gamma, LINEAR.gamma.float())
    assert torch.equal(sigma, LINEAR.sigma.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(t=st.integers(0, 999), x=st.floats(-1, 1, width=32), noise=st.floats(-5, 5, width=32))
@example(t=999, x=1.0, noise=-5.0)
@example(t=0, x=-1.0, noise=5.0)
def test_q_sample_round_trips(dtype: torch.dtype, t: int, x: float, noise: float) -> None:
    """x_t holds x0 with the noise's rounding error over gamma, and the noise with the image's over
    sigma.
    """
    x0 = torch.tensor([[x]], dtype=dtype)
    eps = torch.tensor([[noise]], dtype=dtype)
    times = torch.tensor([t])
    x_t = LINEAR.q_sample(x0, times, eps)
    rounding = 4 * torch.finfo(dtype).eps * (abs(x) + abs(noise)) + torch.finfo(dtype).tiny
    gamma, sigma = LINEAR.gamma[t].item(), LINEAR.sigma[t].item()
    assert_close(LINEAR.predict_x0(x_t, times, eps), x0, rtol=0, atol=rounding / gamma)
    assert_close(LINEAR.predict_eps(x_t, times, x0), eps, rtol=0, atol=rounding / sigma)
    there_and_back = LINEAR.predict_eps(x_t, times, LINEAR.predict_x0(x_t, times, eps))
    assert_close(there_and_back, eps, rtol=0, atol=2 * rounding / sigma)


@pytest.mark.parametrize(
    "beta", [[], [[0.1]], [0.1, 0.0], [0.1, 1.0], [-0.1], [1.5], [math.nan]], ids=str
)
def test_schedule_refuses_invalid_betas(beta: list[float]) -> None:
    with pytest.raises(ValueError, match="beta"):
        NoiseSchedule(torch.tensor(beta, dtype=torch.float64))


def test_linear_schedule_refuses_invalid_arguments() -> None:
    with pytest.raises(ValueError, match="num_steps"):
        NoiseSchedule.linear(0)
    with pytest.raises(ValueError, match="beta"):
        NoiseSchedule.linear(10, beta_start=0.0)
    with pytest.raises(ValueError, match="beta"):
        NoiseSchedule.linear(10, beta_end=1.0)
    with pytest.raises(ValueError, match="beta"):
        NoiseSchedule.scaled_linear(10, beta_start=0.0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_q_sample_refuses_times_that_are_no_integers(dtype: torch.dtype) -> None:
    x0, t, noise = draw((1, 2, 2), torch.float64, seed=2)
    with pytest.raises(ValueError, match=r"times are integers, t.long\(\)"):
        LINEAR.q_sample(x0, t.to(dtype), noise)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("times", "noises"), [(1, 4), (4, 1)])
def test_q_sample_refuses_one_time_or_noise_for_a_batch(times: int, noises: int) -> None:
    """Broadcasting would silently give every image the same."""
    x0, t, noise = draw((1, 2, 2), torch.float64, seed=2)
    with pytest.raises(ValueError, match="shape"):
        LINEAR.q_sample(x0, t[:times], noise[:noises])


@pytest.mark.parametrize("t", [-1, 1000])
def test_q_sample_refuses_a_time_outside_the_schedule(t: int) -> None:
    with pytest.raises(ValueError, match=r"t must be in 0\.\.999"):
        LINEAR.q_sample(torch.zeros(1, 2), torch.tensor([t]), torch.zeros(1, 2))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("function", [LINEAR.q_sample, LINEAR.predict_x0, LINEAR.predict_eps])
def test_integer_images_and_other_shapes_are_refused(function: Callable[..., Tensor]) -> None:
    """In an integer dtype gamma and sigma would be 0; another shape would broadcast."""
    images, t = torch.zeros(2, 1, 4, 4), torch.tensor([3, 5])
    with pytest.raises(ValueError, match="uint8"):
        function(images.to(torch.uint8), t, images)
    with pytest.raises(ValueError, match=r"shapes differ: .* \[2, 1, 4, 4\], .* \[1, 1, 4, 4\]"):
        function(images, t, images[:1])


def test_schedules_are_close_if_they_add_the_same_noise() -> None:
    linear = NoiseSchedule.linear()
    assert linear.is_close(NoiseSchedule(linear.beta.float().double()))
    assert not linear.is_close(NoiseSchedule.scaled_linear())
    assert not linear.is_close(NoiseSchedule.linear(999))
    changed = linear.beta.clone()
    changed[500] *= 1.001
    assert not linear.is_close(NoiseSchedule(changed))

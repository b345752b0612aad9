"""The closed-form denoisers that generalise, Gaussian and local (docs/theory.md, section 13)."""

from collections.abc import Callable

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_posterior import LargestTensor, Problem, problems, random_images
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from tiny_retrack import posterior
from tiny_retrack.methods import LOCAL_BELOW, ReTrack, Task
from tiny_retrack.posterior import (
    Moments,
    exact_target,
    gaussian_moments,
    gaussian_target,
    local_target,
)
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.types import InputError

SCHEDULE = NoiseSchedule.linear()
TIMES = torch.tensor([0, 1, 50, 200, 400, 600, 999])


def noisy(data: Tensor, t: Tensor, seed: int = 1) -> Tensor:
    """x_t of the first images, one per t, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x0 = (data.float() / 127.5 - 1).double()[torch.arange(len(t)) % len(data)]
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    return SCHEDULE.q_sample(x0, t, noise)


def by_oracle(target: Callable[[list[float], int], list[float]], x_t: Tensor, t: Tensor) -> Tensor:
    rows = [target(x, step) for x, step in zip(oracle.flat(x_t), t.tolist(), strict=True)]
    return torch.tensor(rows, dtype=torch.float64).view(x_t.shape)


# --- Gaussian ---


@pytest.mark.parametrize("shape", [(9, 1, 2, 2), (5, 3, 1, 2), (2, 1, 1, 1), (3, 1, 2, 3)])
def test_gaussian_target_equals_the_oracle(shape: tuple[int, ...]) -> None:
    """Also of fewer images than pixels, whose covariance is singular."""
    data = random_images(*shape)
    x_t = noisy(data, TIMES)
    expected = by_oracle(lambda x, t: oracle.gaussian_target(x, t, oracle.flat(data)), x_t, TIMES)
    found = gaussian_target(x_t, TIMES, gaussian_moments(data), SCHEDULE)
    assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_gaussian_moments_equal_the_oracle() -> None:
    data = random_images(7, 1, 2, 2)
    moments = gaussian_moments(data)
    mean, covariance = oracle.mean_and_covariance(oracle.flat(data))
    found = moments.eigenvectors @ moments.eigenvalues.diag() @ moments.eigenvectors.T
    assert_close(moments.mean, torch.tensor(mean, dtype=torch.float64))
    assert_close(found, torch.tensor(covariance, dtype=torch.float64))


def test_gaussian_target_is_the_score_of_the_density() -> None:
    """-sigma grad log N(x_t; gamma mu, gamma^2 C + sigma^2 I), by autograd."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    mean = torch.randn(4, generator=generator, dtype=torch.float64)
    covariance = root @ root.T
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    x_t = torch.randn(len(TIMES), 4, generator=generator, dtype=torch.float64).requires_grad_()
    expected = []
    for x, t in zip(x_t, TIMES.tolist(), strict=True):
        gamma, sigma = oracle.gamma(t), oracle.sigma(t)
        noised = gamma**2 * covariance + sigma**2 * torch.eye(4, dtype=torch.float64)
        log_density = MultivariateNormal(gamma * mean, noised).log_prob(x)
        (score,) = torch.autograd.grad(log_density, x)
        expected.append(-sigma * score)
    images = x_t.detach().view(-1, 1, 2, 2)
    moments = Moments(mean, eigenvalues, eigenvectors)
    found = gaussian_target(images, TIMES, moments, SCHEDULE)
    assert_close(found.flatten(1), torch.stack(expected), rtol=1e-8, atol=1e-9)


def test_gaussian_target_ends_at_x_t_and_at_the_mean() -> None:
    """Little noise leaves what varies in the data as it is; much noise leaves the mean alone."""
    data = random_images(200, 1, 2, 2)
    moments = gaussian_moments(data)
    low, high = torch.tensor([0]), torch.tensor([999])
    x_t = noisy(data, low)
    x0 = SCHEDULE.predict_x0(x_t, low, gaussian_target(x_t, low, moments, SCHEDULE))
    assert_close(x0, x_t / SCHEDULE.gamma[0], rtol=0, atol=1e-3)
    x_t = noisy(data, high)
    x0 = SCHEDULE.predict_x0(x_t, high, gaussian_target(x_t, high, moments, SCHEDULE))
    assert_close(x0.flatten(), moments.mean, rtol=0, atol=0.01)


def test_gaussian_target_of_one_image_repeated_is_that_image() -> None:
    data = random_images(1, 1, 2, 2).repeat(5, 1, 1, 1)
    x_t = noisy(data, TIMES)
    found = gaussian_target(x_t, TIMES, gaussian_moments(data), SCHEDULE)
    assert_close(found, exact_target(x_t, TIMES, data, SCHEDULE), rtol=1e-6, atol=1e-6)


# --- Local ---


@pytest.mark.parametrize("patch", [1, 3, 5, 7])
@pytest.mark.parametrize("shape", [(6, 1, 3, 4), (4, 2, 2, 3), (3, 1, 1, 5)])
def test_local_target_equals_the_oracle(shape: tuple[int, ...], patch: int) -> None:
    data = random_images(*shape)
    x_t = noisy(data, TIMES)
    images = oracle.flat(data)
    expected = by_oracle(
        lambda x, t: oracle.local_target(x, t, images, shape[1:], patch), x_t, TIMES
    )
    found = local_target(x_t, TIMES, data, SCHEDULE, patch)
    assert_close(found, expected, rtol=1e-8, atol=1e-8)


@given(problems(), st.sampled_from([5, 7, 99]))
def test_local_target_of_a_window_that_covers_the_image_is_exact(p: Problem, patch: int) -> None:
    p = p.in_float64()
    found = local_target(p.x_t, p.t, p.data, SCHEDULE, patch)
    assert_close(found, exact_target(p.x_t, p.t, p.data, SCHEDULE), rtol=1e-6, atol=1e-6)


def test_local_target_of_one_pixel_treats_each_pixel_as_an_image() -> None:
    data = random_images(8, 1, 2, 3)
    x_t = noisy(data, TIMES)
    found = local_target(x_t, TIMES, data, SCHEDULE, 1)
    for row in range(2):
        for column in range(3):
            here = (slice(None), slice(None), slice(row, row + 1), slice(column, column + 1))
            alone = exact_target(x_t[here], TIMES, data[here], SCHEDULE)
            assert_close(found[here], alone, rtol=1e-8, atol=1e-8)


def test_local_target_at_little_noise_is_x_t_where_every_window_is_in_the_data() -> None:
    """A picture glued from two: the exact target knows neither, the local one both halves."""
    left, right = random_images(2, 1, 3, 8)
    glued = torch.cat([left[:, :, :4], right[:, :, 4:]], dim=2)[None]
    data = torch.stack([left, right, right])
    t = torch.tensor([0])
    x_t = SCHEDULE.gamma[0] * (glued.float() / 127.5 - 1).double()
    x0 = SCHEDULE.predict_x0(x_t, t, local_target(x_t, t, data, SCHEDULE, 1))
    assert_close(x0, (glued.float() / 127.5 - 1).double(), rtol=0, atol=1 / 127.5)  # a grey level


@given(problems(min_n=3), st.randoms(use_true_random=False), st.sampled_from([1, 3]))
def test_targets_do_not_depend_on_the_order_of_the_data(p: Problem, random, patch: int) -> None:
    p = p.in_float64()
    order = list(range(len(p.data)))
    random.shuffle(order)
    shuffled = p.data[order]
    for target in (
        lambda data: local_target(p.x_t, p.t, data, SCHEDULE, patch),
        lambda data: gaussian_target(p.x_t, p.t, gaussian_moments(data), SCHEDULE),
    ):
        assert_close(target(shuffled), target(p.data), rtol=1e-6, atol=1e-6)


def test_local_target_counts_duplicates_by_multiplicity() -> None:
    data = random_images(3, 1, 2, 2)
    repeated = data[[0, 0, 1, 2, 2, 2]]
    x_t = noisy(data, TIMES)
    images = oracle.flat(repeated)
    expected = by_oracle(lambda x, t: oracle.local_target(x, t, images, (1, 2, 2), 1), x_t, TIMES)
    assert_close(local_target(x_t, TIMES, repeated, SCHEDULE, 1), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("patch", [1, 3])
def test_targets_of_uint8_and_float_data_are_equal(patch: int) -> None:
    data = random_images(6, 1, 3, 3)
    pixels = data.float() / 127.5 - 1
    x_t = noisy(data, TIMES).float()
    local = [local_target(x_t, TIMES, each, SCHEDULE, patch) for each in (data, pixels)]
    assert torch.equal(*local)
    moments = [gaussian_moments(each) for each in (data, pixels)]
    gaussian = [gaussian_target(x_t, TIMES, each, SCHEDULE) for each in moments]
    assert torch.equal(*gaussian)
    assert local[0].dtype == gaussian[0].dtype == torch.float32


def test_local_target_makes_no_tensor_of_size_b_n_d() -> None:
    b, n = 32, 3000
    data = random_images(n, 1, 28, 28)
    x_t = data[:b].float() / 127.5 - 1
    with LargestTensor() as largest:
        local_target(x_t, torch.arange(b), data, SCHEDULE, 3)
    assert 0 < largest.numel <= 2**22 < b * n * 28 * 28 / 10


# --- Which one where, and what is refused ---


def test_generalizing_is_local_below_a_time_and_gaussian_above() -> None:
    data = random_images(9, 1, 4, 4)
    task = Task(data, data[:1], SCHEDULE)
    t = torch.tensor([0, LOCAL_BELOW - 1, LOCAL_BELOW, 999])
    x_t = noisy(data, t)
    found = ReTrack(target="generalizing", patch=3).prepare(task)(x_t, t, torch.zeros(4).long())
    local = local_target(x_t, t, data, SCHEDULE, 3)
    gaussian = gaussian_target(x_t, t, gaussian_moments(data), SCHEDULE)
    assert_close(found, torch.cat([local[:2], gaussian[2:]]), rtol=0, atol=0)
    assert not torch.allclose(local, gaussian)


@pytest.mark.parametrize("patch", [0, 2, -1])
@pytest.mark.parametrize("target", ["local", "generalizing"])
def test_windows_without_a_middle_are_refused(target: str, patch: int) -> None:
    data = random_images(3, 1, 2, 2)
    with pytest.raises(InputError, match=f"patch = {patch}: must be an odd number"):
        local_target(noisy(data, TIMES), TIMES, data, SCHEDULE, patch)
    with pytest.raises(InputError, match=f"patch = {patch}: must be an odd number"):
        ReTrack(target=target, patch=patch).prepare(Task(data, data[:1], SCHEDULE))


def test_gaussian_moments_refuse_images_too_large_for_a_covariance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(posterior, "MAX_COVARIANCE", 3)
    with pytest.raises(InputError, match="images of 4 numbers: the covariance of more than 3"):
        gaussian_moments(random_images(3, 1, 2, 2))


@pytest.mark.usefixtures("unchecked")
def test_moments_of_other_images_are_refused() -> None:
    data = random_images(3, 1, 2, 2)
    moments = gaussian_moments(random_images(3, 1, 1, 2))
    with pytest.raises(ValueError, match="moments of 2 numbers do not fit"):
        gaussian_target(noisy(data, TIMES), TIMES, moments, SCHEDULE)
    with pytest.raises(ValueError, match="data is empty"):
        gaussian_moments(data[:0])

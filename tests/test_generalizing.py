"""The closed-form denoisers that generalise, Gaussian and local (docs/theory.md, section 13)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import Script, assert_refused
from hypothesis import given
from hypothesis import strategies as st
from test_posterior import LargestTensor, Problem, problems, random_images
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from tiny_retrack import methods, posterior
from tiny_retrack.methods import FIT_TIMES, ReTrack, Task
from tiny_retrack.posterior import (
    LOCAL_BELOW,
    ClosedForms,
    Moments,
    combined_target,
    exact_target,
    fit_forms,
    gaussian_moments,
    gaussian_target,
    local_target,
)
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.types import EpsModel, InputError

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


def test_gaussian_target_keeps_pixels_that_never_vary() -> None:
    data = random_images(20, 1, 2, 2)
    data[:, :, 0] = 7
    x_t = noisy(random_images(7, 1, 2, 2, seed=2), TIMES)
    eps = gaussian_target(x_t, TIMES, gaussian_moments(data), SCHEDULE)
    x0 = SCHEDULE.predict_x0(x_t, TIMES, eps)
    constant = torch.full_like(x0[:, :, 0], 7 / 127.5 - 1)
    assert_close(x0[:, :, 0], constant, rtol=0, atol=1e-6)


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


@pytest.mark.parametrize("patch", [1, 3])
def test_local_target_in_pure_noise_is_the_mean(patch: int) -> None:
    loud = NoiseSchedule(torch.tensor([1 - 1e-12], dtype=torch.float64))  # gamma 1e-6
    data = random_images(9, 1, 3, 4)
    x_t = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.zeros(2, dtype=torch.int64)
    x0 = loud.predict_x0(x_t, t, local_target(x_t, t, data, loud, patch))
    mean = (data.double() / 127.5 - 1).mean(0)
    assert_close(x0, mean.expand_as(x0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("patch", [1, 3])
@pytest.mark.parametrize("is_constant", [False, True])
def test_local_target_of_one_image_repeated_is_that_image(patch: int, is_constant: bool) -> None:
    image = torch.full((1, 1, 3, 4), 9, dtype=torch.uint8)
    if not is_constant:
        image = random_images(1, 1, 3, 4)
    data = image.repeat(5, 1, 1, 1)
    x_t = noisy(random_images(7, 1, 3, 4, seed=2), TIMES)
    found = local_target(x_t, TIMES, data, SCHEDULE, patch)
    assert_close(found, exact_target(x_t, TIMES, data, SCHEDULE), rtol=1e-6, atol=1e-6)


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


# --- The mixture that a network follows ---

DATA = random_images(9, 1, 4, 4)
FORMS = ClosedForms(DATA, DATA[:7], gaussian_moments(DATA), SCHEDULE, patch=3)


def some_network(x_t: Tensor, t: Tensor) -> Tensor:
    """Of no closed form."""
    return torch.tanh(x_t) + 0.1 * x_t.flip(3)


def fit(eps_model: EpsModel, images: Tensor, times: Sequence[int]) -> Tensor:
    return fit_forms(eps_model, FORMS, images, times, torch.Generator().manual_seed(0))


def test_closed_forms_are_the_denoisers_answers() -> None:
    t = torch.tensor([0, 100, LOCAL_BELOW - 1, LOCAL_BELOW, 999])
    x_t = noisy(DATA, t)
    answers = FORMS.scaled_x0(x_t, t)
    gamma, sigma = SCHEDULE.scales(t, x_t)
    local = x_t - sigma * local_target(x_t, t, DATA[:7], SCHEDULE, 3)
    local[3:] = 0  # from LOCAL_BELOW on
    expected = [
        x_t,
        x_t - sigma * gaussian_target(x_t, t, FORMS.moments, SCHEDULE),
        local,
        x_t - sigma * exact_target(x_t, t, DATA, SCHEDULE),
        gamma.expand_as(x_t),
    ]
    assert_close(answers, torch.stack(expected, dim=1), rtol=1e-12, atol=1e-12)


@given(st.lists(st.floats(-1, 1), min_size=5, max_size=5))
def test_fit_finds_the_weights_of_a_mixture(weights: list[float]) -> None:
    def mixture(x_t: Tensor, t: Tensor) -> Tensor:
        x_t = x_t.double()
        _, sigma = SCHEDULE.scales(t, x_t)
        denoised = torch.einsum("f,bfchw->bchw", expected, FORMS.scaled_x0(x_t, t))
        return (x_t - denoised) / sigma

    expected = torch.tensor(weights, dtype=torch.float64)
    images = random_images(6, 1, 4, 4).float() / 127.5 - 1
    (found,) = fit(mixture, images, [200])
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_fit_is_least_squares() -> None:
    """No small change of the weights comes nearer to the network."""
    images = random_images(6, 1, 4, 4).float() / 127.5 - 1
    (found,) = fit(some_network, images, [150])
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((6,), 150)
    x_t = SCHEDULE.q_sample(images, t, noise)

    def distance(weights: Tensor) -> float:
        target = combined_target(x_t, t, FORMS, [0, 150, 300], weights.expand(3, 5))
        return (target.double() - some_network(x_t, t)).square().sum().item()

    smallest = distance(found)
    for form in range(5):
        for change in (-0.02, 0.02):
            changed = found.clone()
            changed[form] += change
            assert distance(changed) > smallest


def test_combined_target_is_linear_between_the_times_of_the_fit() -> None:
    times = [0, 100, 999]
    weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0, 25, 100, 250, 999])
    x_t = noisy(DATA, t)
    mixed = [
        weights[0],
        0.75 * weights[0] + 0.25 * weights[1],
        weights[1],
        (749 * weights[1] + 150 * weights[2]) / 899,
        weights[2],
    ]
    _, sigma = SCHEDULE.scales(t, x_t)
    denoised = torch.einsum("bf,bfchw->bchw", torch.stack(mixed), FORMS.scaled_x0(x_t, t))
    found = combined_target(x_t, t, FORMS, times, weights)
    assert_close(found, (x_t - denoised) / sigma, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("times", [[0], [0, 0], [100, 0]])
def test_combined_target_refuses_times_that_do_not_ascend(times: list[int]) -> None:
    weights = torch.zeros(len(times), 5, dtype=torch.float64)
    t = torch.tensor([0])
    with pytest.raises(ValueError, match="two or more, ascending"):
        combined_target(noisy(DATA, t), t, FORMS, times, weights)


def test_generalizing_refuses_a_short_schedule() -> None:
    task = Task(DATA, DATA[:1], NoiseSchedule.linear(600), eps_model=lambda x_t, t: x_t)
    with pytest.raises(InputError, match="a schedule of more than 600 steps"):
        ReTrack(target="generalizing").prepare(task)


def test_generalizing_is_fitted_to_images_that_hold_neither_set() -> None:
    """A network that is the local denoiser at all of its images is found to be that."""
    data = random_images(9, 1, 8, 8)
    seen = []

    def local(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t)
        return local_target(x_t.double(), t, data, SCHEDULE, 3)

    task = Task(data, data[:1], SCHEDULE, local)
    target = ReTrack(target="generalizing").prepare(task)
    t = torch.tensor([0, 60, 250])
    x_t = noisy(data, t)
    index = torch.zeros(3).long()
    assert_close(target(x_t, t, index), local_target(x_t, t, data, SCHEDULE, 3))
    assert len(seen) == len(FIT_TIMES)


def test_generalizing_takes_a_random_sample_for_the_local_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def recorded(x_t: Tensor, t: Tensor, data: Tensor, *rest: Any) -> Tensor:
        seen.append(data)
        return local_target(x_t, t, data, *rest)

    monkeypatch.setattr(posterior, "local_target", recorded)
    monkeypatch.setattr(methods, "LOCAL_IMAGES", 5)
    task = Task(DATA, DATA[:1], SCHEDULE, some_network)
    ReTrack(target="generalizing").prepare(task)
    images = {image.numpy().tobytes() for image in DATA}
    drawn = [image.numpy().tobytes() for image in seen[0]]
    assert len(set(drawn)) == 5
    assert set(drawn) < images
    assert drawn != [image.numpy().tobytes() for image in DATA[:5]]
    assert all(torch.equal(data, seen[0]) for data in seen)


# --- What is refused ---


def test_generalizing_without_a_model_is_refused() -> None:
    with pytest.raises(InputError, match="the target generalizing is fitted to the model"):
        ReTrack(target="generalizing").prepare(Task(DATA, DATA[:1], SCHEDULE))


@pytest.mark.parametrize("patch", [0, 2, -1])
@pytest.mark.parametrize("target", ["local", "generalizing"])
def test_windows_without_a_middle_are_refused(target: str, patch: int) -> None:
    data = random_images(3, 1, 2, 2)
    with pytest.raises(InputError, match=f"patch = {patch}: must be an odd number"):
        local_target(noisy(data, TIMES), TIMES, data, SCHEDULE, patch)
    wrong = f"patch = {patch}: must be an odd number" if patch > 0 else f"patch {patch}: must be"
    with pytest.raises(InputError, match=wrong):
        ReTrack(target=target, patch=patch)


def test_gaussian_moments_refuse_images_too_large_for_a_covariance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(posterior, "MAX_COVARIANCE", 3)
    with pytest.raises(InputError, match="images of 4 numbers: the covariance of more than 3"):
        gaussian_moments(random_images(3, 1, 2, 2))


@pytest.mark.parametrize("target", ["gaussian", "generalizing"])
def test_unlearn_refuses_images_too_large_for_a_covariance(
    target: str, base: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(posterior, "MAX_COVARIANCE", 255)
    done = script("unlearn", "--checkpoint", "base", "--target", target, cwd=base.parent)
    assert_refused(done, "images of 256 numbers: the covariance of more than 255")
    assert [*base.parent.iterdir()] == [base]


@pytest.mark.usefixtures("unchecked")
def test_moments_of_other_images_are_refused() -> None:
    data = random_images(3, 1, 2, 2)
    moments = gaussian_moments(random_images(3, 1, 1, 2))
    with pytest.raises(ValueError, match="moments of 2 numbers do not fit"):
        gaussian_target(noisy(data, TIMES), TIMES, moments, SCHEDULE)
    with pytest.raises(ValueError, match="data is empty"):
        gaussian_moments(data[:0])

"""Numbers at the edges: every target, method and sampler, at every t, on data of extreme pixels.

Methods and targets are taken from the tables of methods.py, so a new one is tested without being
named here.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tiny_retrack import NoiseSchedule
from tiny_retrack.data import to_float
from tiny_retrack.losses import retrack_weighted_loss
from tiny_retrack.methods import METHODS, SISS, TARGETS, Batch, Method, ReTrack, Task
from tiny_retrack.posterior import (
    exact_target,
    knn_target,
    log_posterior,
    nearest_neighbors,
    tail_mass,
    topk_target,
)
from tiny_retrack.sampling import ddim_sample, ddpm_sample, inject_and_denoise

SHAPE, NUM = (1, 4, 4), 4
SCHEDULE = NoiseSchedule.linear()
ALL = torch.arange(1000)  # every t
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

BLACK_AND_WHITE = 255 * torch.randint(
    2, (NUM, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
)
SETS = {  # uint8 [n, c, h, w]
    "black": torch.zeros_like(BLACK_AND_WHITE),
    "white": torch.full_like(BLACK_AND_WHITE, 255),
    "grey": torch.full_like(BLACK_AND_WHITE, 127),
    "black and white": BLACK_AND_WHITE,
    "duplicates": BLACK_AND_WHITE[:1].expand(NUM, *SHAPE),
    "two opposites": torch.cat([BLACK_AND_WHITE[:1], 255 - BLACK_AND_WHITE[:1]]),
    "one": BLACK_AND_WHITE[:1],
}
EVERY_SET = pytest.mark.parametrize("name", SETS)


class Scaled(torch.nn.Module):
    """eps = w x."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.7, dtype=dtype))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.w * x


def noise(dtype: torch.dtype, shape: tuple[int, ...] = SHAPE, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(ALL), *shape, generator=generator).to(dtype)


# --- Targets


@DTYPES
@EVERY_SET
@pytest.mark.parametrize("opposite", [False, True], ids=["one of the set", "its opposite"])
def test_targets_are_finite_at_all_t(name: str, opposite: bool, dtype: torch.dtype) -> None:
    data = to_float(SETS[name]).to(dtype)
    forget = -data[:1] if opposite else data[:1]
    x_t = SCHEDULE.q_sample(forget.expand(len(ALL), *SHAPE), ALL, noise(dtype))
    for k in {1, len(data)}:
        index, distance = nearest_neighbors(forget, data, k)
        kept = index.expand(len(ALL), k)
        assert distance.isfinite().all()
        assert knn_target(x_t, ALL, data[kept], SCHEDULE).isfinite().all()
        assert topk_target(x_t, ALL, data, SCHEDULE, k).isfinite().all()
        assert tail_mass(x_t, ALL, data, SCHEDULE, kept).isfinite().all()
    assert exact_target(x_t, ALL, data, SCHEDULE).isfinite().all()


@DTYPES
@EVERY_SET
def test_posterior_sums_to_1_at_all_t(name: str, dtype: torch.dtype) -> None:
    data = to_float(SETS[name]).to(dtype)
    x_t = SCHEDULE.q_sample(data[:1].expand(len(ALL), *SHAPE), ALL, noise(dtype))
    sums = log_posterior(x_t, ALL, data, SCHEDULE).double().exp().sum(1)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02  # of log p, as it is rounded
    assert_close(sums, torch.ones_like(sums), rtol=0, atol=tolerance)


# --- Losses and their gradients


def settings_of(name: str, num_remain: int) -> Iterator[Method]:
    """A method with its defaults, and with the settings that matter for its numbers."""
    method = METHODS[name]()
    if isinstance(method, ReTrack):
        for target in TARGETS:
            for cap in (1.0, 10_000.0):
                yield replace(method, target=target, k=min(3, num_remain), snr_cap=cap)
    elif isinstance(method, SISS):
        for lam in (0.0, 0.5, 1.0):
            yield replace(method, siss_lam=lam)
    else:
        yield method


def make_task(data: Tensor, forget: Tensor, model: Scaled) -> Task:
    kept = [[model.w.detach() + shift] for shift in (0.5, 1.0, 1.5)]
    return Task(data, forget, SCHEDULE, eps_model=model, params=[model.w], kept_params=kept)


def make_batch(task: Task, dtype: torch.dtype) -> Batch:
    """One remain and one forget image at every t."""
    index = ALL % len(task.remain)
    shape = tuple(task.remain.shape[1:])
    return Batch(
        x0_remain=to_float(task.remain[index]).to(dtype),
        x0_forget=to_float(task.forget).to(dtype).expand(len(ALL), *shape),
        forget_index=torch.zeros_like(ALL),
        t=ALL,
        t_remain=ALL.flip(0),
        noise=noise(dtype, shape),
        noise_remain=noise(dtype, shape, seed=2),
        generator=torch.Generator().manual_seed(3),
    )


@DTYPES
@EVERY_SET
@pytest.mark.parametrize("method_name", METHODS)
def test_losses_and_gradients_are_finite_at_all_t(
    method_name: str, name: str, dtype: torch.dtype
) -> None:
    data = SETS[name]
    if METHODS[method_name] is SISS:
        # Only the densities of larger images fall below the smallest float64.
        data = data.repeat(1, 1, 10, 10)
    model = Scaled(dtype)
    for forget in (data[:1], 255 - data[:1]):  # one of the set, and its opposite
        task = make_task(data, forget, model)
        for method in settings_of(method_name, len(data)):
            prepared = method.prepare(task)
            losses = method.losses(model, make_batch(task, dtype), task, prepared)
            gradients = []
            for loss in losses:
                (gradient,) = torch.autograd.grad(loss, model.w, retain_graph=True)
                assert loss.isfinite()
                assert gradient.isfinite()
                gradients.append([gradient])
            (combined,) = method.combine(*gradients)
            assert combined.isfinite()


@DTYPES
@EVERY_SET
def test_published_retrack_loss_is_finite_at_all_t(name: str, dtype: torch.dtype) -> None:
    data = to_float(SETS[name]).to(dtype)
    model = Scaled(dtype)
    neighbors = torch.stack([data[:1], -data[:1]], dim=1).expand(len(ALL), 2, *SHAPE)
    x0 = data[:1].expand(len(ALL), *SHAPE)
    loss = retrack_weighted_loss(model, x0, ALL, noise(dtype), neighbors, SCHEDULE)
    (gradient,) = torch.autograd.grad(loss, model.w)
    assert loss.isfinite()
    assert gradient.isfinite()


# --- Samplers


@DTYPES
@EVERY_SET
def test_samples_of_the_ideal_denoiser_are_finite_and_in_the_set(
    name: str, dtype: torch.dtype
) -> None:
    """The denoiser rounds as a model of this precision does."""
    data = to_float(SETS[name])

    def eps_model(x_t: Tensor, t: Tensor) -> Tensor:
        return exact_target(x_t.to(dtype), t, data, SCHEDULE).to(x_t.dtype)

    found = []
    for sampler in (ddim_sample, ddpm_sample):
        for num_steps in (1, 30):
            for clip in (False, True):
                generator = torch.Generator().manual_seed(0)
                found.append(sampler(eps_model, (3, *SHAPE), SCHEDULE, num_steps, generator, clip))
    for t in (0, 500, 999):
        e = noise(torch.float32)[:1]
        found.append(inject_and_denoise(eps_model, data[:1], t, e, SCHEDULE, 20))
    has_one_image = len(data.unique(dim=0)) == 1
    for images in found:
        assert images.isfinite().all()
        if dtype == torch.float32 and has_one_image:
            assert_close(images, data[:1].expand_as(images), rtol=0, atol=1e-3)

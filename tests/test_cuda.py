"""CUDA computes what the CPU computes, in a step never waits for the host, and resumes.

`TEST_DEVICE=cpu pytest tests/test_cuda.py` runs the same tests where there is no GPU, to test the
tests.
"""

import os
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tiny_retrack import NoiseSchedule, UNet, UNetConfig
from tiny_retrack.data import random_batch, to_float
from tiny_retrack.lab.checkpoint import load_state, save_state
from tiny_retrack.lab.presets import PRESETS
from tiny_retrack.likelihood import nll_bits_per_dim
from tiny_retrack.losses import ddpm_loss
from tiny_retrack.posterior import (
    exact_target,
    knn_target,
    log_posterior,
    nearest_neighbors,
    topk_target,
)
from tiny_retrack.sampling import ddim_from, ddim_sample, ddpm_sample, sample_many
from tiny_retrack.training import (
    EMA,
    denoiser,
    fit,
    full_float32,
    load_training_state,
    make_optimizer,
    place,
    training_state,
    use_bf16,
)
from unlearn import METHODS, TARGETS, Batch, Problem, draw_batch

DEVICE, CPU = torch.device(os.environ.get("TEST_DEVICE", "cuda")), torch.device("cpu")
pytestmark = [
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs CUDA"
    ),
    pytest.mark.filterwarnings(
        "ignore:Please use the new API settings"
    ),  # torch 2.9 on how TF32 is switched
]
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="about CUDA's own ways")

SCHEDULE = NoiseSchedule.linear()
SMALL = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
)
ROWS = [
    (name, target) for name in METHODS for target in (TARGETS if name == "retrack" else ["knn"])
]


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """These tests compare with the CPU."""
    with full_float32():
        yield


def unet(device: torch.device) -> UNet:
    torch.manual_seed(0)
    return place(UNet(SMALL), device, bf16=False)


def images(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (300, 1, 8, 8), dtype=torch.uint8, generator=generator).to(device)


def noisy(device: torch.device) -> tuple[Tensor, Tensor]:
    """x_t from the first image at all orders of t."""
    generator = torch.Generator().manual_seed(2)
    t = torch.tensor([0, 1, 10, 100, 300, 500, 700, 999])
    x0 = images(CPU)[:1].float().expand(len(t), -1, -1, -1) / 127.5 - 1
    return SCHEDULE.q_sample(x0, t, torch.randn(x0.shape, generator=generator)).to(device), t.to(
        device
    )


def problem(device: torch.device, model: UNet, target: str) -> Problem:
    remain, forget = images(device)[3:], images(device)[:3]
    neighbors, _ = nearest_neighbors(forget, remain, 5)
    params = list(model.parameters())
    moments = (
        params,
        [p.detach() + 0.1 for p in params],
        [torch.full_like(p, 2.0) for p in params],
    )
    settings = replace(PRESETS["mnist-tshirt"].unlearn, batch_size=16, k=5, lam=0.3)
    return Problem(remain, forget, neighbors, SCHEDULE, settings, target, remain[:3], moments)


def test_targets_agree_with_the_cpu() -> None:
    results = []
    for device in (CPU, DEVICE):
        x_t, t = noisy(device)
        data = images(device)
        neighbors, distances = nearest_neighbors(data[:4], data, 6)
        near = data[neighbors[:1]].expand(len(x_t), -1, -1, -1, -1)
        results.append(
            (
                neighbors.cpu(),
                distances.cpu(),
                exact_target(x_t, t, data, SCHEDULE).cpu(),
                topk_target(x_t, t, data, SCHEDULE, 6).cpu(),
                knn_target(x_t, t, near, SCHEDULE).cpu(),
                log_posterior(x_t, t, data, SCHEDULE).exp().cpu(),
            )
        )
    for here, there in zip(*results, strict=True):
        assert_close(there, here, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "target"), ROWS)
def test_losses_and_gradients_agree_with_the_cpu(name: str, target: str) -> None:
    results = []
    for device in (CPU, DEVICE):
        model = unet(device)
        p = problem(device, model, target)
        drawn = draw_batch(problem(CPU, model, target), torch.Generator().manual_seed(3))
        batch = Batch(**{f.name: getattr(drawn, f.name).to(device) for f in fields(drawn)})
        losses = METHODS[name].losses(denoiser(model, False), p, batch)
        grads = [
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            for loss in losses
        ]
        combine = METHODS[name].combine
        grad = combine(p)(*map(list, grads)) if combine else grads[0]
        results.append(([loss.detach().cpu() for loss in losses], [g.cpu() for g in grad]))
    for here, there in zip(*results, strict=True):
        for a, b in zip(here, there, strict=True):
            assert_close(b, a, rtol=1e-3, atol=1e-4 * a.abs().max().item())


@needs_gpu
@pytest.mark.parametrize(("name", "target"), ROWS)
def test_a_step_never_waits_for_the_host(name: str, target: str) -> None:
    model = unet(DEVICE)
    p = problem(DEVICE, model, target)
    combine = METHODS[name].combine
    steps = fit(
        model,
        lambda eps_model, generator: METHODS[name].losses(eps_model, p, draw_batch(p, generator)),
        make_optimizer(model, 1e-5),
        steps=4,
        lr_at=lambda step: 1e-5,
        seed=0,
        device=DEVICE,
        combine=combine(p) if combine else None,
        ema=EMA(model),
        bf16=True,
        accumulate=2,
    )
    next(steps)  # the first one moves the schedule
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert [done.step for done in steps] == [2, 3, 4]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_sampling_agrees_with_the_cpu() -> None:
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(4, 1, 8, 8, generator=generator)
    here, there = (
        ddim_from(
            denoiser(unet(device), False), noise.to(device), 999, SCHEDULE, 10, clip=True
        ).cpu()
        for device in (CPU, DEVICE)
    )
    assert_close(there, here, rtol=0, atol=2e-3)


def test_sampling_repeats() -> None:
    eps_model = denoiser(unet(DEVICE), use_bf16("auto", DEVICE))
    for sampler in (ddim_sample, ddpm_sample):
        a, b, c = (
            sample_many(
                eps_model,
                5,
                (1, 8, 8),
                SCHEDULE,
                5,
                seed=seed,
                device=DEVICE,
                batch_size=2,
                sampler=sampler,
            )
            for seed in (0, 0, 1)
        )
        assert_close(a, b, rtol=0, atol=1e-2)
        assert (a - c).abs().max() > 0.1


def train(model: UNet, steps: int, **options) -> list[float]:
    data = images(DEVICE)

    def losses(eps_model, generator: torch.Generator) -> tuple[Tensor]:
        x0, t, noise = random_batch(data, 32, SCHEDULE.num_steps, generator)
        return (ddpm_loss(eps_model, x0, t, noise, SCHEDULE),)

    options = {"optimizer": make_optimizer(model, 2e-3), **options}
    progress = fit(
        model, losses, steps=steps, lr_at=lambda step: 2e-3, seed=0, device=DEVICE, **options
    )
    return torch.stack([done.losses[0] for done in progress]).tolist()


def test_likelihood_agrees_with_the_cpu() -> None:
    def bits(device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(0)  # its probes are moved to the images
        x0 = to_float(images(device)[:4])
        return nll_bits_per_dim(
            unet(device).eval(), x0, SCHEDULE, generator, rtol=1e-3, atol=1e-3
        ).cpu()

    assert_close(bits(DEVICE), bits(torch.device("cpu")), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bf16", [False, True])
def test_training_lowers_the_loss(bf16: bool) -> None:
    history = train(unet(DEVICE), 60, bf16=bf16)
    assert sum(history[-10:]) < 0.7 * sum(history[:10])


def test_bfloat16_is_float32_to_its_precision() -> None:
    assert_close(train(unet(DEVICE), 5, bf16=True), train(unet(DEVICE), 5), rtol=0.03, atol=0)


@needs_gpu
def test_compiled_is_eager() -> None:
    assert_close(train(unet(DEVICE), 5, compiled=True), train(unet(DEVICE), 5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bf16", [False, True])
def test_resumed_equals_uninterrupted(bf16: bool, tmp_path: Path) -> None:
    whole = unet(DEVICE)
    ema_whole = EMA(whole)
    train(whole, 6, ema=ema_whole, bf16=bf16)
    half = unet(DEVICE)
    ema, optimizer = EMA(half), make_optimizer(half, 2e-3)
    train(half, 3, ema=ema, optimizer=optimizer, bf16=bf16)
    save_state(tmp_path, training_state(half, optimizer, ema), {"step": 3})
    again = place(UNet(SMALL), DEVICE, bf16=False)
    ema, optimizer = EMA(again), make_optimizer(again, 2e-3)
    tensors, meta = load_state(tmp_path)
    load_training_state(tensors, again, optimizer, ema)
    train(again, 6, start=meta["step"], ema=ema, optimizer=optimizer, bf16=bf16)
    # cuDNN may add up gradients in another order; Adam turns a gradient near 0 into a step of up to
    # 2e-3
    tolerance = {"rtol": 0, "atol": 2e-3 if DEVICE.type == "cuda" else 0}
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert_close(b, a, **tolerance, msg=name)
        assert_close(ema.shadow[name], ema_whole.shadow[name], **tolerance, msg=name)

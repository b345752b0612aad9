"""CUDA computes what the CPU computes, never waits for the host within a step, and resumes.

`TEST_DEVICE=cpu pytest tests/test_cuda.py` runs the same tests without a GPU, to test the tests.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tiny_retrack import NoiseSchedule, UNet, UNetConfig
from tiny_retrack.data import random_batch, to_float
from tiny_retrack.lab.checkpoint import load_state, save_state
from tiny_retrack.likelihood import nll_bits_per_dim
from tiny_retrack.losses import ddpm_loss
from tiny_retrack.methods import METHODS, SISS, TARGETS, Batch, Method, ReTrack, Task, draw_batch
from tiny_retrack.metrics import Classifier, fid
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
from tiny_retrack.types import EpsModel, Loss

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs CUDA"
    ),
    # How torch tells of TF32: that it is switched in another way since 2.9, and that it is off.
    pytest.mark.filterwarnings("ignore:Please use the new API settings"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="of CUDA only")

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


def every_method() -> dict[str, Method]:
    """Each method by its name, ReTrack once per target."""
    methods = {name: METHODS[name]() for name in METHODS if name != "retrack"}
    for target in TARGETS:
        methods[f"retrack-{target}"] = ReTrack(target=target, k=5, lam=0.3)
    methods["siss"] = SISS(siss_lam=0.3)
    return methods


EVERY_METHOD = pytest.mark.parametrize("name", every_method())
# The target generalizing asks in each step how many of the t are low, to spare the local denoiser
# the others.
ASKS_THE_DEVICE = {"retrack-generalizing"}


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
    """x_t from the first image, at t of all orders of magnitude."""
    generator = torch.Generator().manual_seed(2)
    t = torch.tensor([0, 1, 10, 100, 300, 500, 700, 999])
    x0 = images(CPU)[:1].float().expand(len(t), -1, -1, -1) / 127.5 - 1
    x_t = SCHEDULE.q_sample(x0, t, torch.randn(x0.shape, generator=generator))
    return x_t.to(device), t.to(device)


def make_task(device: torch.device, model: UNet) -> Task:
    params = list(model.parameters())
    kept = [[p.detach() + shift for p in params] for shift in (-1.0, 0.1, 1.0)]
    remain, forget = images(device)[3:], images(device)[:3]
    eps_model = denoiser(model, False)
    return Task(remain, forget, SCHEDULE, eps_model, params=params, kept_params=kept)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch on a device."""
    tensors = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value.to(device)
    return replace(batch, **tensors, generator=torch.Generator(device).manual_seed(5))


def targets_on(device: torch.device) -> dict[str, Tensor]:
    x_t, t = noisy(device)
    data = images(device)
    neighbors, distances = nearest_neighbors(data[:4], data, 6)
    near = data[neighbors[:1]].expand(len(x_t), -1, -1, -1, -1)
    return {
        "neighbors": neighbors.cpu(),
        "distances": distances.cpu(),
        "exact": exact_target(x_t, t, data, SCHEDULE).cpu(),
        "topk": topk_target(x_t, t, data, SCHEDULE, 6).cpu(),
        "knn": knn_target(x_t, t, near, SCHEDULE).cpu(),
        "posterior": log_posterior(x_t, t, data, SCHEDULE).exp().cpu(),
    }


def test_targets_agree_with_the_cpu() -> None:
    here, there = targets_on(CPU), targets_on(DEVICE)
    for name, value in here.items():
        assert_close(there[name], value, rtol=1e-5, atol=1e-5, msg=name)


@contextmanager
def drawn_on_the_cpu() -> Iterator[None]:
    """What is drawn comes from a generator of the CPU: the same seed gives other numbers on another
    device.
    """
    generator = torch.Generator().manual_seed(5)

    def on_the_cpu(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def drawn(*args: Any, device: torch.device, **options: Any) -> Tensor:
            return draw(*args, **{**options, "generator": generator}).to(device)

        return drawn

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rand", "randint", "randn"):
            patch.setattr(torch, name, on_the_cpu(getattr(torch, name)))
        yield


@EVERY_METHOD
def test_losses_and_gradients_agree_with_the_cpu(name: str) -> None:
    method = every_method()[name]
    drawn = draw_batch(make_task(CPU, unet(CPU)), 16, torch.Generator().manual_seed(3))
    results = []
    for device in (CPU, DEVICE):
        model = unet(device)
        params = list(model.parameters())
        task = make_task(device, model)
        with drawn_on_the_cpu():
            prepared = method.prepare(task)
            batch = to_device(drawn, device)
            losses = method.losses(denoiser(model, False), batch, task, prepared)
        gradients = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
        combined = method.combine(*gradients)
        results.append([value.detach().cpu() for value in (*losses, *combined)])
    here, there = results
    # The gradient of a key's bias is rounding alone: softmax does not see what all logits share.
    nothing = 1e-7 * max(value.abs().max().item() for value in here)
    for a, b in zip(here, there, strict=True):
        assert_close(b, a, rtol=1e-3, atol=1e-4 * a.abs().max().item() + nothing)


@needs_gpu
@pytest.mark.parametrize("name", sorted(every_method().keys() - ASKS_THE_DEVICE))
def test_step_never_waits_for_the_host(name: str) -> None:
    model = unet(DEVICE)
    method = every_method()[name]
    task = make_task(DEVICE, model)
    prepared = method.prepare(task)

    def losses(eps_model: EpsModel, generator: torch.Generator) -> tuple[Loss, ...]:
        return method.losses(eps_model, draw_batch(task, 16, generator), task, prepared)

    steps = fit(
        model,
        losses,
        make_optimizer(model, 1e-5),
        steps=4,
        lr_at=lambda step: 1e-5,
        seed=0,
        device=DEVICE,
        combine=method.combine,
        ema=EMA(model),
        bf16=True,
        accumulate=2,
    )
    next(steps)  # the first one moves the schedule to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert [done.step for done in steps] == [2, 3, 4]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_samples_agree_with_the_cpu() -> None:
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(4, 1, 8, 8, generator=generator)

    def samples(device: torch.device) -> Tensor:
        eps_model = denoiser(unet(device), False)
        return ddim_from(eps_model, noise.to(device), 999, SCHEDULE, 10, clip=True).cpu()

    assert_close(samples(DEVICE), samples(CPU), rtol=0, atol=2e-3)


@pytest.mark.parametrize("sampler", [ddim_sample, ddpm_sample])
def test_samples_repeat(sampler: Any) -> None:
    eps_model = denoiser(unet(DEVICE), use_bf16("auto", DEVICE))

    def samples(seed: int) -> Tensor:
        return sample_many(
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

    assert_close(samples(0), samples(0), rtol=0, atol=1e-2)
    assert (samples(0) - samples(1)).abs().max() > 0.1


def train(model: UNet, steps: int, **options: Any) -> list[float]:
    """The losses of a short training."""
    data = images(DEVICE)

    def losses(eps_model: EpsModel, generator: torch.Generator) -> tuple[Loss]:
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
        model = unet(device).eval()
        # At 1e-3, a change of the weights by 1e-7 of their size moves the bits by 0.4.
        return nll_bits_per_dim(model, x0, SCHEDULE, generator, rtol=1e-4, atol=1e-4).cpu()

    assert_close(bits(DEVICE), bits(CPU), rtol=1e-2, atol=1e-2)


def test_fid_agrees_with_the_cpu() -> None:
    torch.manual_seed(0)
    network = Classifier(1, 10).eval()
    data = to_float(images(CPU))

    def distance(device: torch.device) -> float:
        found = fid([data[:150].to(device)], [data[150:].to(device)], network.to(device))
        assert found is not None
        return found

    here = distance(CPU)
    assert here > 0
    assert distance(DEVICE) == pytest.approx(here, rel=1e-3)


@pytest.mark.parametrize("bf16", [False, True])
def test_training_lowers_the_loss(bf16: bool) -> None:
    history = train(unet(DEVICE), 60, bf16=bf16)
    assert sum(history[-10:]) < 0.7 * sum(history[:10])


def test_bfloat16_losses_are_close_to_float32() -> None:
    assert_close(train(unet(DEVICE), 5, bf16=True), train(unet(DEVICE), 5), rtol=0.03, atol=0)


@needs_gpu
def test_compiled_losses_equal_eager(unchecked: None) -> None:
    assert_close(train(unet(DEVICE), 5, compiled=True), train(unet(DEVICE), 5), rtol=1e-3, atol=0)


@needs_gpu
def test_compiled_step_keeps_the_graph_for_a_second_loss(unchecked: None) -> None:
    """SISS goes back through one forward pass twice, after a training of one loss, whose compiled
    passes torch may take from its cache, has let its buffers go.
    """
    train(unet(DEVICE), 1, compiled=True)
    method = SISS()
    found = []
    for compiled in (False, True):
        model = unet(DEVICE)
        task = make_task(DEVICE, model)

        def losses(
            eps_model: EpsModel, generator: torch.Generator, task: Task = task
        ) -> tuple[Loss, ...]:
            return method.losses(eps_model, draw_batch(task, 32, generator), task, None)

        steps = fit(
            model,
            losses,
            make_optimizer(model, 1e-5),
            steps=2,
            lr_at=lambda step: 1e-5,
            seed=0,
            device=DEVICE,
            combine=method.combine,
            compiled=compiled,
        )
        found.append(torch.stack([done.losses for done in steps]))
    assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def with_weights(ema: EMA) -> UNet:
    """The network whose weights an EMA holds."""
    model = unet(DEVICE)
    model.load_state_dict(ema.shadow)
    return model


@pytest.mark.parametrize("bf16", [False, True])
def test_resumed_training_equals_uninterrupted(bf16: bool, tmp_path: Path) -> None:
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
    if DEVICE.type == "cpu":
        for (name, a), b in zip(
            whole.state_dict().items(), again.state_dict().values(), strict=True
        ):
            assert torch.equal(b, a), name
            assert torch.equal(ema.shadow[name], ema_whole.shadow[name]), name
    # On CUDA gradients may be summed in another order, and Adam turns one near 0 into a whole step:
    # the networks are then the same, not all of their weights.
    for a, b in ((whole, again), (with_weights(ema_whole), with_weights(ema))):
        with torch.no_grad():
            assert_close(b(*noisy(DEVICE)), a(*noisy(DEVICE)), rtol=0, atol=0.03)

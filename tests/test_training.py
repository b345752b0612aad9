"""The training loop: its arithmetic in plain Python, determinism, convergence."""

import math
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import forks
import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tiny_retrack.losses import siss_gradient
from tiny_retrack.training import (
    EMA,
    batch_generator,
    cosine_with_warmup,
    fit,
    load_training_state,
    make_optimizer,
    place,
    training_state,
    use_bf16,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers.training_utils import EMAModel  # the reference

CPU = torch.device("cpu")


class Toy(nn.Module):
    """A denoiser with four weights."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.3, -0.2], dtype=dtype))
        self.b = nn.Parameter(torch.tensor([[0.1], [0.5]], dtype=dtype))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        of_x = self.a[0] * x_t + self.b[0] * x_t.square()
        of_t = self.a[1] * t[:, None] / 1000
        return of_x + of_t + self.b[1]


def toy_losses(eps_model, generator: torch.Generator) -> tuple[Tensor, ...]:
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    t = torch.randint(1000, (8,), generator=generator)
    eps = eps_model(x, t)
    return (eps - x).square().sum(1).mean(), (eps + 1).square().sum(1).mean()


def first(eps_model, generator):
    return toy_losses(eps_model, generator)[:1]


def run(model: nn.Module, losses=first, steps: int = 5, lr: float = 0.01, **options) -> list:
    optimizer = options.pop("optimizer", None) or make_optimizer(model, lr)
    options = {"seed": 3, "device": CPU, "lr_at": lambda step: lr, **options}
    return list(fit(model, losses, optimizer, steps=steps, **options))


def flat(tensors: Iterable[Tensor]) -> list[float]:
    return [value for tensor in tensors for value in tensor.detach().flatten().tolist()]


def gradient_of_first(theta: list[float], step: int) -> list[float]:
    """The gradient of the first loss at the weights theta, in the given step of seed 3."""
    twin = Toy()
    with torch.no_grad():
        twin.a.copy_(torch.tensor(theta[:2], dtype=torch.float64))
        twin.b.copy_(torch.tensor(theta[2:], dtype=torch.float64).view(2, 1))
    (loss,) = first(twin, batch_generator(CPU, 3, step))
    return flat(torch.autograd.grad(loss, list(twin.parameters())))


def test_fit_steps_equal_clipped_adamw_and_ema() -> None:
    """Three steps on one flat vector of weights (AdamW, arXiv 1711.05101, algorithm 2)."""
    model = Toy()
    ema = EMA(model)
    lr, clip = 0.01, 0.5
    theta = flat(model.parameters())
    shadow = list(theta)
    m = [0.0] * 4
    v = [0.0] * 4
    for step in range(3):
        grad = gradient_of_first(theta, step)
        norm = oracle.norm(grad)
        assert norm > clip  # else clipping is not tested
        decay = 1 - (1 + step) ** -0.75
        for i in range(4):
            g = grad[i] * clip / (norm + 1e-6)
            m[i] = 0.95 * m[i] + 0.05 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            m_hat = m[i] / (1 - 0.95 ** (step + 1))
            v_hat = v[i] / (1 - 0.999 ** (step + 1))
            theta[i] -= lr * 1e-6 * theta[i]  # weight decay
            theta[i] -= lr * m_hat / (math.sqrt(v_hat) + 1e-8)
            shadow[i] = decay * shadow[i] + (1 - decay) * theta[i]
    run(model, steps=3, lr=lr, grad_clip=clip, ema=ema)
    assert flat(model.parameters()) == pytest.approx(theta, rel=1e-10)
    assert flat(ema.shadow.values()) == pytest.approx(shadow, rel=1e-10)


@pytest.mark.parametrize("max_decay", [0.9999, 0.5])
def test_ema_equals_that_of_diffusers(max_decay: float) -> None:
    """Without decay after the first step, 0.405 after the second."""
    model = Toy()
    ours = EMA(model, max_decay=max_decay)
    theirs = EMAModel(model.parameters(), decay=max_decay, use_ema_warmup=True, power=0.75)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 6):
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        ours.update(model, step)
        theirs.step(model.parameters())
        assert flat(ours.shadow.values()) == pytest.approx(flat(theirs.shadow_params), rel=1e-12)
        if step == 1:
            assert flat(ours.shadow.values()) == flat(model.parameters())
    assert EMAModel.get_decay(theirs, 2) == pytest.approx(min(0.405, max_decay), abs=1e-3)


def test_fit_combines_the_gradients_of_two_losses() -> None:
    seen = []

    def combine(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        seen.append((a, b))
        return [x - 2 * y for x, y in zip(a, b, strict=True)]

    model, twin = Toy(), Toy()
    (done,) = run(model, toy_losses, steps=1, combine=combine)
    parts = toy_losses(twin, batch_generator(CPU, 3, 0))
    for got, part in zip(seen[0], parts, strict=True):
        expected = torch.autograd.grad(part, list(twin.parameters()), retain_graph=True)
        assert_close(list(got), list(expected))
    assert_close(done.losses, torch.stack(parts).detach())
    total = torch.autograd.grad(parts[0] - 2 * parts[1], list(twin.parameters()))
    assert_close(done.grad_norm, torch.cat([g.flatten() for g in total]).norm())


def test_fit_accumulate_averages_losses_and_gradients() -> None:
    model, twin = Toy(), Toy()
    (done,) = run(model, steps=1, accumulate=3)
    generators = [batch_generator(CPU, 3, number) for number in range(3)]
    mean = torch.stack([first(twin, generator)[0] for generator in generators]).mean()
    grads = torch.autograd.grad(mean, list(twin.parameters()))
    assert_close(done.losses[0], mean.detach())
    assert_close(done.grad_norm, torch.cat([g.flatten() for g in grads]).norm())


def test_fit_gives_the_same_batches_whatever_else_the_losses_draw() -> None:
    def batches(extra_draws: int) -> list[list[float]]:
        seen = []

        def losses(eps_model, generator: torch.Generator) -> tuple[Tensor]:
            seen.append(torch.randn(3, generator=generator).tolist())
            torch.randn(extra_draws, generator=generator)
            return first(eps_model, torch.Generator())

        run(Toy(), losses, steps=2, accumulate=2)
        return seen

    assert batches(extra_draws=0) == batches(extra_draws=5)
    assert len({tuple(batch) for batch in batches(extra_draws=0)}) == 4


class Conv(nn.Module):
    """A denoiser of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.conv(x_t)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_fit_ignores_the_memory_layout_of_gradients(layout: torch.memory_format) -> None:
    """Fused AdamW reads weights and gradients in memory order, whatever their strides are."""

    def conv_losses(eps_model, generator: torch.Generator) -> tuple[Tensor]:
        x = torch.randn(4, 3, 5, 5, generator=generator)
        return ((eps_model(x, torch.zeros(4)) - x).square().mean(),)

    def relaid(grads: list[Tensor]) -> list[Tensor]:
        return [g.contiguous(memory_format=layout) if g.ndim == 4 else g for g in grads]

    torch.manual_seed(0)
    plain = Conv()
    model = place(Conv(), CPU, bf16=False)
    model.load_state_dict(plain.state_dict())
    run(plain, conv_losses)
    run(model, conv_losses, combine=relaid)
    assert_close(model.conv.weight, plain.conv.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"),
    [(False, False, False), (False, True, True), (True, False, True), (True, True, True)],
)
def test_bfloat16_is_on_by_itself_on_cpus_that_compute_with_it(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool, expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert use_bf16("auto", CPU) is expected
    assert use_bf16("on", CPU)
    assert not use_bf16("off", CPU)


@pytest.mark.parametrize("bf16", [False, True])
def test_place_uses_channels_last_except_for_bfloat16_on_a_cpu(bf16: bool) -> None:
    weight = place(Conv(), CPU, bf16).conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) is not bf16
    assert weight.is_contiguous() is bf16


def test_fit_weights_are_fixed_by_the_seed_bitwise() -> None:
    a, b, c = Toy(), Toy(), Toy()
    run(a)
    torch.rand(7)  # the global generator must not matter
    run(b)
    run(c, seed=4)
    for x, y, z in zip(a.parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y)
        assert not torch.equal(x, z)


def test_fit_lowers_the_loss() -> None:
    history = run(Toy(), steps=300, lr=0.02)
    assert history[-1].losses.item() < 0.2 * history[0].losses.item()


def test_fit_resumed_equals_uninterrupted_bitwise() -> None:
    whole = Toy()
    ema_whole = EMA(whole)
    run(whole, steps=6, ema=ema_whole)
    half = Toy()
    ema, optimizer = EMA(half), make_optimizer(half, 0.01)
    run(half, steps=3, ema=ema, optimizer=optimizer)
    state = training_state(half, optimizer, ema)
    tensors = {name: value.clone() for name, value in state.items()}
    again = Toy()
    ema, optimizer = EMA(again), make_optimizer(again, 0.01)
    load_training_state(tensors, again, optimizer, ema)
    run(again, start=3, steps=6, ema=ema, optimizer=optimizer)
    for x, y in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(x, y)
    assert flat(ema_whole.shadow.values()) == flat(ema.shadow.values())


def train_together() -> None:
    """One of two processes."""
    torch.distributed.init_process_group("gloo")
    model = Toy()
    run(model, toy_losses, steps=3, accumulate=2, combine=partial(siss_gradient, rescale="10%"))
    torch.save(model.state_dict(), "model.pt")
    forks.leave_group()


def test_fit_in_two_processes_equals_one_on_the_whole_batch(tmp_path: Path) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    forks.run_ranks(train_together, folders=folders)
    model = Toy()
    optimizer = make_optimizer(model, 0.01)
    for step in range(3):
        numbers = (2 * step, 2 * step + 1)
        generators = [
            batch_generator(CPU, 3, number, rank) for rank in (0, 1) for number in numbers
        ]
        batches = [toy_losses(model, generator) for generator in generators]
        params = list(model.parameters())
        means = [torch.stack(parts).mean() for parts in zip(*batches, strict=True)]
        grads = [list(torch.autograd.grad(mean, params, retain_graph=True)) for mean in means]
        for p, g in zip(params, siss_gradient(*grads, rescale="10%"), strict=True):
            p.grad = g
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    for folder in folders:
        together = torch.load(folder / "model.pt", weights_only=True)
        for name, value in model.state_dict().items():
            assert_close(together[name], value, rtol=0, atol=1e-6)


def test_cosine_with_warmup_equals_its_formula() -> None:
    lr_at = cosine_with_warmup(2.0, warmup=4, steps=10)
    warmup = [0.5, 1.0, 1.5, 2.0]
    decay = [1 + math.cos(math.pi * i / 6) for i in range(6)]
    assert [lr_at(step) for step in range(10)] == pytest.approx(warmup + decay)


def test_batch_generator_draws_differ_by_seed_number_and_rank() -> None:
    keys = [(seed, number, rank) for seed in (0, 1) for number in range(3) for rank in (0, 1)]
    draws = [torch.rand(4, generator=batch_generator(CPU, *key)) for key in keys]
    assert len({tuple(draw.tolist()) for draw in draws}) == 12

"""One loop for training and unlearning. It yields what happened; logging, saving and pictures stay
with the caller.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tiny_retrack.types import InputError

EpsModel = Callable[[Tensor, Tensor], Tensor]
Losses = Callable[[EpsModel, torch.Generator], tuple[Tensor, ...]]
Combine = Callable[..., list[Tensor]]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Progress:
    """What one optimiser step did.

    Attributes:
        step: 1 after the first step.
        losses: Float "k", detached, still on the device: reading it waits for the device.
        grad_norm: before clipping, likewise.
        lr: the step's learning rate.
    """

    step: int
    losses: Tensor
    grad_norm: Tensor
    lr: float


class EMA:
    """Exponential moving average of a model's weights, with decay 1 - (1 + step)^-power, at most
    `max_decay`.
    """

    def __init__(self, model: nn.Module, power: float = 0.75, max_decay: float = 0.9999) -> None:
        self.power, self.max_decay = power, max_decay
        self.shadow = {name: p.detach().clone() for name, p in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(1 - (1 + step) ** -self.power, self.max_decay)
        weights = model.state_dict()
        torch._foreach_lerp_(
            list(self.shadow.values()), [weights[name] for name in self.shadow], 1 - decay
        )


def rank() -> int:
    """This process's number under torchrun, else 0; only rank 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def step_generator(device: torch.device, seed: int, step: int, rank: int = 0) -> torch.Generator:
    """The only source of randomness of a step: a resumed run draws what the uninterrupted one would
    have drawn.
    """
    digest = hashlib.blake2b(f"{seed} {rank} {step}".encode(), digest_size=4).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest))


def use_bf16(choice: str, device: torch.device) -> bool:
    """Whether to autocast to bfloat16: "on", "off", or "auto" for where the chip multiplies it
    faster than float32.

    That is read off the chip, not timed, so that runs repeat.
    """
    if choice != "auto":
        return choice == "on"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported()  # AVX-512 bfloat16 alone was measured slower


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 on CUDA, for what asks for more than its ten bits."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def denoiser(model: Callable[..., Tensor], bf16: bool) -> EpsModel:
    """The model as a callable eps_model(x_t, t), in bfloat16 autocast if asked; its output is
    float32.
    """

    def eps_model(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=bf16):
            return model(x_t, t).to(x_t.dtype)

    return eps_model


def place(model: Model, device: torch.device, bf16: bool) -> Model:
    """The model on the device, its convolutions' weights laid out as is fastest there.

    That is channels last, but on a CPU in bfloat16, where it makes torch's group norm more than ten
    times slower.
    """
    layout = torch.contiguous_format if bf16 and device.type == "cpu" else torch.channels_last
    return model.to(device, memory_format=layout)  # pyright: ignore[reportCallIssue]


def make_optimizer(model: nn.Module, lr: float, weight_decay: float = 1e-6) -> torch.optim.AdamW:
    """AdamW as in every published fine-tune (METHODS): betas 0.95 and 0.999, eps 1e-8."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=lr,
        betas=(0.95, 0.999),
        weight_decay=weight_decay,
        eps=1e-8,
        fused=True,
    )


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA
) -> dict[str, Tensor]:
    """All tensors that a resumed run needs, under flat names; its step and settings go beside them."""
    moments = optimizer.state_dict()["state"]
    return {
        **{f"model.{name}": p for name, p in model.state_dict().items()},
        **{f"ema.{name}": p for name, p in ema.shadow.items()},
        **{
            f"optimizer.{i}.{name}": value
            for i, state in moments.items()
            for name, value in state.items()
        },
    }


def load_training_state(
    tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA
) -> None:
    """Put what `training_state` took back in place.

    Raises:
        InputError: if it is the state of another model.
    """
    shapes = {
        f"{part}.{name}": p.shape
        for part in ("model", "ema")
        for name, p in model.state_dict().items()
    }
    for i, p in enumerate(model.parameters()):
        shapes |= {f"optimizer.{i}.{name}": p.shape for name in ("exp_avg", "exp_avg_sq")}
        shapes[f"optimizer.{i}.step"] = torch.Size()
    if {name: value.shape for name, value in tensors.items()} != shapes:
        raise InputError("the training state is of another model; --overwrite starts anew")
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    for name, shadow in ema.shadow.items():
        shadow.copy_(tensors[f"ema.{name}"])
    state, params = optimizer.state_dict(), list(model.parameters())
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            # fused AdamW walks weights and moments side by side in memory: they must be laid out
            # alike
            like = torch.empty_like(params[int(i)]) if value.ndim else torch.empty_like(value)
            state["state"].setdefault(int(i), {})[name] = like.copy_(value)
    optimizer.load_state_dict(state)


def cosine_with_warmup(lr: float, warmup: int, steps: int) -> Callable[[int], float]:
    """Learning rate by step (from 0): linear warm-up to `lr`, then half a cosine down to 0 at
    `steps`.
    """

    def lr_at(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / warmup
        return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return lr_at


def fit(
    model: nn.Module,
    losses: Losses,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    lr_at: Callable[[int], float],
    seed: int,
    device: torch.device,
    start: int = 0,
    combine: Combine | None = None,
    ema: EMA | None = None,
    grad_clip: float = 1.0,
    bf16: bool = False,
    compiled: bool = False,
    accumulate: int = 1,
) -> Iterator[Progress]:
    """Optimise `model` in place from step `start` to `steps`, yielding after each step.

    `losses(eps_model, generator)` draws a batch from the generator and gives one loss, or several
    whose gradients
    `combine` turns into one. With `accumulate`, each step averages the gradients of that many
    batches; under
    torch.distributed, also those of all processes, each of which draws its own batches. They are
    averaged before they
    are combined, so that the combination is that of the whole batch.
    """
    eps_model = denoiser(torch.compile(model) if compiled else model, bf16)
    params = [p for p in model.parameters() if p.requires_grad]
    for step in range(start, steps):
        generator = step_generator(device, seed, step, rank())
        parts, grads = losses_and_gradients(eps_model, losses, generator, params, accumulate)
        grad = combine(*grads) if combine else grads[0]
        for p, g in zip(params, grad, strict=True):
            # fused AdamW walks both side by side in memory, and autograd.grad promises no layout
            p.grad = g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
        norm = nn.utils.clip_grad_norm_(params, grad_clip, foreach=True)
        lr = lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        if ema is not None:
            ema.update(model, step + 1)
        yield Progress(step + 1, parts, norm, lr)


def losses_and_gradients(
    eps_model: EpsModel,
    losses: Losses,
    generator: torch.Generator,
    params: list[nn.Parameter],
    accumulate: int,
) -> tuple[Tensor, list[list[Tensor]]]:
    """The losses and their gradients, averaged over `accumulate` batches and over all processes."""
    share = accumulate * (dist.get_world_size() if dist.is_initialized() else 1)
    values: list[Tensor] = []
    total: list[list[Tensor]] = []
    for _ in range(accumulate):
        parts = losses(eps_model, generator)
        values.append(torch.stack([part.detach() for part in parts]))
        for i, part in enumerate(parts):  # they may share a forward pass
            grads = list(torch.autograd.grad(part / share, params, retain_graph=i + 1 < len(parts)))
            if len(total) == i:
                total.append(grads)
            else:
                torch._foreach_add_(total[i], grads)
    for grads in total if dist.is_initialized() else ():
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, reduced in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(reduced.view_as(g))
    return torch.stack(values).mean(0), total

"""One loop for training and unlearning, a generator: it yields what each step did.

Logging, saving and pictures stay with the caller.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch._functorch.config
import torch.distributed as dist
from torch import Tensor, nn

from tiny_retrack.types import EpsModel, InputError, Loss

Losses = Callable[[EpsModel, torch.Generator], tuple[Loss, ...]]
Combine = Callable[..., Sequence[Tensor]]
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
    """Exponential moving average of a model's weights.

    Its decay is 1 - step^-power, at most `max_decay`: 0 after the first step, as the weights before
    it are random. This is diffusers' `EMAModel` with `use_ema_warmup`.
    """

    def __init__(self, model: nn.Module, power: float = 0.75, max_decay: float = 0.9999) -> None:
        self.power = power
        self.max_decay = max_decay
        self.shadow = {name: p.detach().clone() for name, p in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """`step` is 1 after the first optimiser step."""
        decay = min(1 - step**-self.power, self.max_decay)
        weights = model.state_dict()
        current = [weights[name] for name in self.shadow]
        torch._foreach_lerp_(list(self.shadow.values()), current, 1 - decay)


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
    whose gradients `combine` turns into one. With `accumulate`, each step averages the gradients of
    that many batches; under torch.distributed, also those of all processes, each of which draws its
    own batches. `combine` gets the averages, so it sees the gradients of the whole batch. Losses
    are not checked: the caller reads them in `Progress`.

    Args:
        lr_at: the learning rate of step 0, 1, ...
        seed: with a batch's number and the process's rank, it seeds all draws of that batch.
        device: of the generators; the model is there already.
        ema: updated after each step.
        grad_clip: the largest norm of the combined gradient.
        bf16: autocast to bfloat16.
        compiled: run the model through torch.compile.
    """
    if compiled:
        # A second loss may go back through the same forward pass, as SISS's does.
        torch._functorch.config.donated_buffer = False
    eps_model = denoiser(torch.compile(model) if compiled else model, bf16)
    params = [p for p in model.parameters() if p.requires_grad]
    for step in range(start, steps):
        numbers = range(step * accumulate, (step + 1) * accumulate)
        generators = [batch_generator(device, seed, number, rank()) for number in numbers]
        values, gradients = losses_and_gradients(eps_model, losses, generators, params)
        gradient = combine(*gradients) if combine else gradients[0]
        for p, g in zip(params, gradient, strict=True):
            # Fused AdamW reads weight and gradient in the order in which they lie in memory, and
            # autograd.grad promises no layout.
            p.grad = g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
        norm = nn.utils.clip_grad_norm_(params, grad_clip, foreach=True)
        lr = lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        if ema is not None:
            ema.update(model, step + 1)
        yield Progress(step + 1, values, norm, lr)


def losses_and_gradients(
    eps_model: EpsModel,
    losses: Losses,
    generators: Sequence[torch.Generator],
    params: list[nn.Parameter],
) -> tuple[Tensor, list[list[Tensor]]]:
    """The k losses, averaged over this process's batches; and the gradient of each, averaged over
    the batches of all processes.
    """
    num_batches = len(generators) * num_processes()
    values: list[Tensor] = []  # by batch
    totals: list[list[Tensor]] = []  # by loss
    for generator in generators:
        batch_losses = losses(eps_model, generator)
        values.append(torch.stack([loss.detach() for loss in batch_losses]))
        gradients = []
        for number, loss in enumerate(batch_losses, start=1):
            # The losses may share a forward pass: all but the last one keep its graph.
            is_last = number == len(batch_losses)
            grads = torch.autograd.grad(loss / num_batches, params, retain_graph=not is_last)
            gradients.append(list(grads))
        if not totals:
            totals = gradients
        else:
            for total, grads in zip(totals, gradients, strict=True):
                torch._foreach_add_(total, grads)
    if dist.is_initialized():
        for total in totals:
            _sum_over_processes(total)
    return torch.stack(values).mean(0), totals


def _sum_over_processes(grads: list[Tensor]) -> None:
    """Sum the gradients over all processes, in place, with a single all-reduce."""
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    sizes = [g.numel() for g in grads]
    for g, summed in zip(grads, flat.split(sizes), strict=True):
        g.copy_(summed.view_as(g))


def batch_generator(device: torch.device, seed: int, number: int, rank: int = 0) -> torch.Generator:
    """The generator of all random draws of a batch, seeded by the batch's number.

    A resumed run therefore draws the same as an uninterrupted one, and extra draws of one method do
    not change later batches.
    """
    digest = hashlib.blake2b(f"{seed} {rank} {number}".encode(), digest_size=4).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest))


def cosine_with_warmup(lr: float, warmup: int, steps: int) -> Callable[[int], float]:
    """Learning rate at step 0, 1, ...: linear warm-up to `lr`, then a cosine to 0 at `steps`."""

    def lr_at(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / warmup
        share_done = (step - warmup) / max(1, steps - warmup)
        return lr * 0.5 * (1 + math.cos(math.pi * share_done))

    return lr_at


def make_optimizer(model: nn.Module, lr: float, weight_decay: float = 1e-6) -> torch.optim.AdamW:
    """AdamW with the settings of ReTrack's and SISS's codes: betas 0.95 and 0.999, eps 1e-8."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=lr,
        betas=(0.95, 0.999),
        weight_decay=weight_decay,
        eps=1e-8,
        fused=True,
    )


# --- Where and how it is computed -----------------------------------------------------------------


def denoiser(model: Callable[..., Tensor], bf16: bool) -> EpsModel:
    """The model as a callable eps_model(x_t, t), in bfloat16 autocast if asked.

    Its output has the dtype of x_t. A model with prompts is called as eps_model(x_t, t, prompts).
    """

    def eps_model(x_t: Tensor, t: Tensor, *prompts: Tensor) -> Tensor:
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=bf16):
            return model(x_t, t, *prompts).to(x_t.dtype)

    return eps_model


def place(model: Model, device: torch.device, bf16: bool) -> Model:
    """The model on the device, its convolutions' weights laid out as is fastest there.

    That is channels last, except on a CPU in bfloat16, where it makes torch's group norm more than
    ten times slower.
    """
    layout = torch.contiguous_format if bf16 and device.type == "cpu" else torch.channels_last
    return model.to(device, memory_format=layout)  # pyright: ignore[reportCallIssue]


def use_bf16(choice: str, device: torch.device) -> bool:
    """Whether to autocast to bfloat16: "on", "off", or "auto" for where the chip is faster with it.

    "auto" depends on the chip alone, not on a timing, so that runs are reproducible.
    """
    if choice != "auto":
        return choice == "on"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 on CUDA, for what needs more than its ten bits."""
    convolutions = torch.backends.cudnn.allow_tf32
    products = torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def rank() -> int:
    """This process's number under torchrun, else 0; only rank 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def largest(value: int, device: torch.device) -> int:
    """The largest of the values of all processes, which wait for each other here."""
    if not dist.is_initialized():
        return value
    values = torch.tensor(value, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)


def num_processes() -> int:
    """How many processes train together: those of torchrun, else 1."""
    return dist.get_world_size() if dist.is_initialized() else 1


# --- The state of a training ----------------------------------------------------------------


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA
) -> dict[str, Tensor]:
    """All tensors that a resumed run needs, under flat names; step and settings go beside them."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.shadow.items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": value for name, value in moments.items()}
    return tensors


def load_training_state(
    tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA
) -> None:
    """Put what `training_state` took back in place.

    Raises:
        InputError: if it is the state of another model.
    """
    if {name: value.shape for name, value in tensors.items()} != _state_shapes(model):
        raise InputError("the training state is of another model; --overwrite starts again")
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    for name, shadow in ema.shadow.items():
        shadow.copy_(tensors[f"ema.{name}"])
    state = optimizer.state_dict()
    params = list(model.parameters())
    for key, value in tensors.items():
        part, _, rest = key.partition(".")
        if part != "optimizer":
            continue
        index, name = rest.split(".")
        # Fused AdamW reads weights and moments in the order in which they lie in memory. The step
        # is a scalar; the moments have the shape of their weight, and need its layout.
        like = value if name == "step" else params[int(index)]
        state["state"].setdefault(int(index), {})[name] = torch.empty_like(like).copy_(value)
    optimizer.load_state_dict(state)


def _state_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shapes of the training state of a model that has taken a step."""
    shapes = {}
    for name, value in model.state_dict().items():
        shapes[f"model.{name}"] = value.shape
        shapes[f"ema.{name}"] = value.shape
    for i, p in enumerate(model.parameters()):
        shapes[f"optimizer.{i}.step"] = torch.Size()
        shapes[f"optimizer.{i}.exp_avg"] = p.shape
        shapes[f"optimizer.{i}.exp_avg_sq"] = p.shape
    return shapes

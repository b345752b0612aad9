"""Training and sampling images a second: our loop and UNet against diffusers' UNet2DModel of the
same layout; and how near a training step comes to what the card can do.

Ours is what train_ddpm.py runs, the EMA included, eager and compiled; on CUDA also with another
memory layout and with cuDNN's search for the fastest algorithm. diffusers' is the loop of its own
training example: float32, AdamW, clipping, no EMA. All have their images on the device and, on
CUDA, TF32. They take turns in one process.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_retrack import NoiseSchedule, UNet
from tiny_retrack.data import random_batch, to_float
from tiny_retrack.lab import flags, runs
from tiny_retrack.lab.presets import PRESETS
from tiny_retrack.lab.unet_config import unet_config_to_dict
from tiny_retrack.losses import ddpm_loss
from tiny_retrack.sampling import ddim_sample
from tiny_retrack.training import EMA, denoiser, fit, make_optimizer, place, use_bf16
from tiny_retrack.types import EpsModel

LR = 1e-4
OURS = "ours, float32"
THEIRS = "diffusers, float32"
# Of torch.compile; "default" is what --compile of the scripts does.
COMPILED = {"default": "ours, --compile", "reduce-overhead": "ours, CUDA graphs"}


@dataclass(frozen=True)
class Variant:
    """A way to run our loop.

    Attributes:
        mode: of torch.compile; None for eager.
        contiguous: whether weights are laid out as NCHW, in place of what `place` takes.
        search: whether cuDNN times its algorithms and takes the fastest.
    """

    bf16: bool = False
    mode: str | None = None
    contiguous: bool = False
    search: bool = False


@dataclass(frozen=True)
class Loop:
    """A training to be timed.

    Attributes:
        step: takes a training step; returns its loss.
        eps_model: to sample from; None for a compiled model, as the scripts sample eagerly.
        bf16: whether it computes in bfloat16.
    """

    step: Callable[[], Tensor | None]
    eps_model: EpsModel | None
    bf16: bool = False


def variants(modes: list[str], bf16: bool, device: torch.device) -> dict[str, Variant]:
    """By the name of their rows."""
    chosen = {OURS: Variant()}
    if bf16:
        chosen["ours, bfloat16"] = Variant(bf16)
    if device.type == "cuda":
        chosen["ours, NCHW weights"] = Variant(bf16, contiguous=True)
        chosen["ours, cuDNN's search"] = Variant(bf16, search=True)
    for mode in modes:
        chosen[COMPILED[mode]] = Variant(bf16, mode)
    return chosen


def our_loop(case: str, images: Tensor, b: int, variant: Variant) -> Loop:
    """What train_ddpm.py runs."""
    torch.manual_seed(0)
    schedule, device = NoiseSchedule.linear(), images.device
    model = place(UNet(PRESETS[case].unet), device, variant.bf16)
    if variant.contiguous:
        model = model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    callable_model = torch.compile(model, mode=variant.mode) if variant.mode else model
    eps_model = denoiser(callable_model, variant.bf16)

    def losses(_: EpsModel, generator: torch.Generator) -> tuple[Tensor]:
        x0, t, noise = random_batch(images, b, schedule.num_steps, generator)
        return (ddpm_loss(eps_model, x0, t, noise, schedule),)

    steps = fit(
        model,
        losses,
        make_optimizer(model, LR),
        steps=10**9,
        lr_at=lambda step: LR,
        seed=0,
        device=device,
        ema=EMA(model),
        bf16=variant.bf16,
    )

    def step() -> Tensor:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = variant.search
        if variant.mode:
            torch.compiler.cudagraph_mark_step_begin()  # what the last step's graphs hold may go
        loss = next(steps).losses[0]
        torch.backends.cudnn.benchmark = before
        return loss

    return Loop(step, None if variant.mode else eps_model, variant.bf16)


def their_loop(case: str, images: Tensor, b: int) -> Loop:
    """The loop of diffusers' examples/unconditional_image_generation."""
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    device = images.device
    options = unet_config_to_dict(PRESETS[case].unet)
    config = {key: value for key, value in options.items() if key != "_class_name"}
    model = UNet2DModel(**config).train()
    model.to(device)  # pyright: ignore[reportArgumentType]
    scheduler, num_steps = DDPMScheduler(num_train_timesteps=1000), 1000
    optimizer = torch.optim.AdamW(
        model.parameters(), LR, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )

    def steps() -> Iterator[None]:
        while True:
            x0 = to_float(images[torch.randint(len(images), (b,), device=device)])
            noise = torch.randn(x0.shape, device=device)
            t = torch.randint(num_steps, (b,), device=device)
            x_t = scheduler.add_noise(x0, noise, t)  # pyright: ignore[reportArgumentType]
            loss = F.mse_loss(model(x_t, t).sample, noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield

    run = steps()
    return Loop(lambda: next(run), lambda x_t, t: model(x_t, t).sample)


def make_loops(
    case: str, images: Tensor, b: int, args: argparse.Namespace
) -> tuple[dict[str, Loop], dict[str, float | None]]:
    """The loops by the name of their rows, and the losses of their first steps, which are taken.

    Ours all begin with the same weights and batch: their losses differ by rounding alone. A
    compiled loop, or diffusers', that fails here is left out with a line.
    """
    makers: dict[str, Callable[[], Loop]] = {}
    bf16 = use_bf16(args.bf16, images.device)
    for name, variant in variants(args.compile, bf16, images.device).items():
        makers[name] = lambda variant=variant: our_loop(case, images, b, variant)
    if importlib.util.find_spec("diffusers"):
        makers[THEIRS] = lambda: their_loop(case, images, b)
    else:
        print("diffusers is not installed: no ratios")
    loops: dict[str, Loop] = {}
    losses: dict[str, float | None] = {}
    for name, make in makers.items():
        try:
            loop = make()
            loss = loop.step()
            if name in COMPILED.values():
                loop.step()  # with CUDA graphs the second step records,
                loop.step()  # and the third replays
        except Exception as error:
            if name not in (THEIRS, *COMPILED.values()):
                raise
            reason = (str(error).splitlines() or [""])[0]
            print(f"{case}: {name} is left out: {type(error).__name__}: {reason:.200}")
            continue
        loops[name] = loop
        losses[name] = None if loss is None else loss.item()
    return loops, losses


def sampling_seconds(
    loops: dict[str, Loop], images: Tensor, args: argparse.Namespace
) -> dict[str, list[float]]:
    """By turns, of the loops whose model can be sampled from."""

    def sample(eps_model: EpsModel) -> None:
        generator = torch.Generator(images.device).manual_seed(0)
        shape = (args.samples, *images.shape[1:])
        ddim_sample(eps_model, shape, NoiseSchedule.linear(), args.sampler_steps, generator)

    samplers = {
        name: lambda eps_model=loop.eps_model: sample(eps_model)
        for name, loop in loops.items()
        if loop.eps_model is not None
    }
    return common.take_turns(samplers, args.turns, images.device)


def limits(loop: Loop, flop: int, seconds: float, device: torch.device) -> dict[str, object]:
    """The columns that say what binds a step of `seconds`: arithmetic, or the starting of kernels.

    Args:
        flop: of a step.
    """
    peak = common.peak_tflops(device, loop.bf16)
    tflops = flop / seconds / 1e12
    kernels = common.kernels_of(loop.step, device)
    return {
        "ms a step": seconds * 1e3,
        "TFLOP/s": tflops,
        "of the card's peak": tflops / peak if peak else None,
        "kernels a step": kernels[0] if kernels else None,
        "of the time in kernels": kernels[1] / seconds if kernels else None,
    }


def measure(case: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    b = common.batch_size(case, args)
    images = common.random_images(case, device)
    loops, losses = make_loops(case, images, b, args)
    flop = common.count_flop(loops[OURS].step)

    def train(name: str) -> None:
        for _ in range(args.steps):
            loops[name].step()

    training = common.take_turns(
        {name: lambda name=name: train(name) for name in loops}, args.turns, device
    )
    memory = {name: common.peak_mib(loop.step, device) for name, loop in loops.items()}
    sampling = sampling_seconds(loops, images, args)

    def to_theirs(seconds: dict[str, list[float]], name: str) -> float | None:
        if THEIRS not in seconds or name not in seconds:
            return None
        return common.times_as_fast(seconds[name], seconds[THEIRS])

    rows = []
    for name, loop in loops.items():
        rate = f"sampling ({args.sampler_steps} steps), images/s"
        drawn = common.median_rate(args.samples, sampling[name]) if name in sampling else None
        step_seconds = statistics.median(training[name]) / args.steps
        row = {
            "layout": case,
            "batch": b,
            "loop": name,
            "training, images/s": common.median_rate(b * args.steps, training[name]),
            "to diffusers": to_theirs(training, name),
            "a step's memory, MiB": memory[name],
            rate: drawn,
            "to diffusers ": to_theirs(sampling, name),
            **limits(loop, flop, step_seconds, device),
            "first loss": losses[name],
        }
        rows.append(row)
    return rows


def main() -> None:
    parser = common.make_parser(__doc__, "bench_unet")
    parser.add_argument(
        "--samples", type=flags.positive, default=64, help="images to sample at once"
    )
    parser.add_argument("--sampler-steps", type=flags.positive, default=5, help="DDIM steps")
    parser.add_argument(
        "--compile",
        type=flags.one_of(COMPILED),
        nargs="+",
        default=[],
        metavar="MODE",
        help="also with torch.compile: default, as --compile of the scripts; reduce-overhead, with "
        "CUDA graphs",
    )
    common.run_cases(parser.parse_args(), measure)


if __name__ == "__main__":
    runs.run_command(main)

"""Training and sampling images a second: our loop and UNet against diffusers' UNet2DModel of the
same layout.

Ours is what train_ddpm.py runs, the EMA included. diffusers' is the loop of its own training
example: float32, AdamW, clipping, no EMA. Both have their images on the device and, on CUDA, TF32.
They take turns in one process.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator

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
THEIRS = "diffusers, float32"


def our_loop(
    case: str, images: Tensor, b: int, bf16: bool, compiled: bool
) -> tuple[Callable[[], object], Callable[..., Tensor]]:
    """A training step, and the model."""
    torch.manual_seed(0)
    schedule, device = NoiseSchedule.linear(), images.device
    model = place(UNet(PRESETS[case].unet), device, bf16)

    def losses(eps_model: EpsModel, generator: torch.Generator) -> tuple[Tensor]:
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
        bf16=bf16,
        compiled=compiled,
    )
    return lambda: next(steps), denoiser(model, bf16)


def their_loop(
    case: str, images: Tensor, b: int
) -> tuple[Callable[[], object], Callable[..., Tensor]]:
    """A training step of diffusers' examples/unconditional_image_generation, and the model."""
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
    return lambda: next(run), lambda x_t, t: model(x_t, t).sample


def measure(case: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    b = common.batch_size(case, args)
    images = common.random_images(case, device)
    schedule = NoiseSchedule.linear()
    bf16 = use_bf16(args.bf16, device)
    loops = {"ours, float32": our_loop(case, images, b, bf16=False, compiled=False)}
    if bf16:
        loops["ours, bfloat16"] = our_loop(case, images, b, bf16=True, compiled=False)
    if args.compile:
        loops["ours, --compile"] = our_loop(case, images, b, bf16, compiled=True)
    if importlib.util.find_spec("diffusers"):
        loops[THEIRS] = their_loop(case, images, b)
    else:
        print("diffusers is not installed: no ratios")

    def train(name: str) -> None:
        for _ in range(args.steps):
            loops[name][0]()

    def sample(name: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        ddim_sample(
            loops[name][1],
            (args.samples, *images.shape[1:]),
            schedule,
            args.sampler_steps,
            generator,
        )

    training = common.take_turns(
        {name: lambda name=name: train(name) for name in loops}, args.turns, device
    )
    memory = {name: common.peak_mib(step, device) for name, (step, _) in loops.items()}
    sampling = common.take_turns(
        {name: lambda name=name: sample(name) for name in loops}, args.turns, device
    )

    def to_theirs(seconds: dict[str, list[float]], name: str) -> float | None:
        if THEIRS not in loops:
            return None
        return common.times_as_fast(seconds[name], seconds[THEIRS])

    sampling_rate = f"sampling ({args.sampler_steps} steps), images/s"
    return [
        {
            "layout": case,
            "batch": b,
            "loop": name,
            "training, images/s": common.median_rate(b * args.steps, training[name]),
            "to diffusers": to_theirs(training, name),
            "a step's memory, MiB": memory[name],
            sampling_rate: common.median_rate(args.samples, sampling[name]),
            "to diffusers ": to_theirs(sampling, name),
        }
        for name in loops
    ]


def main() -> None:
    parser = common.make_parser(__doc__, "bench_unet")
    parser.add_argument(
        "--samples", type=flags.positive, default=64, help="images to sample at once"
    )
    parser.add_argument("--sampler-steps", type=flags.positive, default=5, help="DDIM steps")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    common.run_cases(parser.parse_args(), measure)


if __name__ == "__main__":
    runs.run_command(main)

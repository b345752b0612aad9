"""What a step of each unlearning method costs, compared with one of vanilla fine-tuning.

Every method, ReTrack with each target, on random images and a random UNet of the data set's preset:
the arithmetic does not depend on them. The methods take turns in one process.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import common
import torch
from torch import Tensor

from tiny_retrack import NoiseSchedule, UNet
from tiny_retrack.lab import flags, runs
from tiny_retrack.lab.presets import PRESETS
from tiny_retrack.lab.spec import Spec, method_names
from tiny_retrack.methods import VDU, Task, draw_batch
from tiny_retrack.training import denoiser, fit, make_optimizer, place, use_bf16
from tiny_retrack.types import EpsModel, Loss

ROWS = [name for name in method_names() if name != "retrain"]


def method_loop(label: str, case: str, images: Tensor, b: int, bf16: bool) -> Callable[[], object]:
    """A step of unlearning, as unlearn.py takes it: one forget image, the others remain."""
    torch.manual_seed(0)
    model = place(UNet(PRESETS[case].unet), images.device, bf16)
    settings, method = Spec(label).configure(case)
    eps_model = denoiser(model, bf16)
    task = Task(images[1:], images[:1], NoiseSchedule.linear(), eps_model)
    if isinstance(method, VDU):
        params = list(model.parameters())
        checkpoints = [[p.detach() + shift for p in params] for shift in (0.0, 1.0)]
        task = replace(task, params=params, kept_params=checkpoints)
    prepared = method.prepare(task)

    def losses(eps_model: EpsModel, generator: torch.Generator) -> tuple[Loss, ...]:
        return method.losses(eps_model, draw_batch(task, b, generator), task, prepared)

    steps = fit(
        model,
        losses,
        make_optimizer(model, settings.lr),
        steps=10**9,
        lr_at=lambda step: 0.0,
        seed=0,
        device=images.device,
        combine=method.combine,
        bf16=bf16,
    )
    return lambda: next(steps)


def measure(case: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    b = common.batch_size(case, args)
    images = common.random_images(case, device)
    bf16 = use_bf16(args.bf16, device)
    labels = list(dict.fromkeys(["vanilla", *args.methods]))
    loops = {label: method_loop(label, case, images, b, bf16) for label in labels}

    def steps(label: str) -> None:
        for _ in range(args.steps):
            loops[label]()

    seconds = common.take_turns(
        {label: lambda label=label: steps(label) for label in labels}, args.turns, device
    )
    return [
        {
            "layout": case,
            "batch": b,
            "method": label,
            "steps/s": common.median_rate(args.steps, seconds[label]),
            "to vanilla": common.times_as_fast(seconds[label], seconds["vanilla"]),
            "a step's memory, MiB": common.peak_mib(loops[label], device),
        }
        for label in labels
    ]


def main() -> None:
    parser = common.make_parser(__doc__, "bench_methods")
    parser.add_argument(
        "--methods",
        nargs="+",
        type=flags.one_of(ROWS),
        default=ROWS,
        help=f"some of {', '.join(ROWS)}",
    )
    common.run_cases(parser.parse_args(), measure)


if __name__ == "__main__":
    runs.run_command(main)

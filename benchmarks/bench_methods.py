"""What a step of each unlearning method costs, against one of vanilla fine-tuning.

Each row of METHODS in unlearn.py, ReTrack with each target, on random images and a random UNet of
the data set's
preset: the arithmetic does not look at them. They take turns in one process.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from common import (
    batch_size,
    finish,
    make_parser,
    peak_mib,
    random_images,
    take_turns,
    times_as_fast,
)
from torch import Tensor

from tiny_retrack import NoiseSchedule, UNet
from tiny_retrack.lab import flags, runs
from tiny_retrack.lab.presets import PRESETS
from tiny_retrack.posterior import nearest_neighbors
from tiny_retrack.training import fit, make_optimizer, place, use_bf16
from unlearn import METHODS, TARGETS, Problem, draw_batch

ROWS = [name for name in METHODS if name != "retrack"] + [f"retrack-{target}" for target in TARGETS]


def method_loop(label: str, case: str, images: Tensor, b: int, bf16: bool) -> Callable[[], object]:
    """A step of unlearning, as unlearn.py takes it: one forget image, the others remain."""
    name, _, target = label.partition("-") if label.startswith("retrack-") else (label, "", "")
    torch.manual_seed(0)
    preset, schedule = PRESETS[case], NoiseSchedule.linear()
    model = place(UNet(preset.unet), images.device, bf16)
    params = list(model.parameters())
    settings = replace(preset.unlearn, batch_size=b)
    forget, remain = images[:1], images[1:]
    neighbors, _ = nearest_neighbors(forget, remain, settings.k)
    moments = (
        params,
        [p.detach().clone() for p in params],
        [torch.ones_like(p) for p in params],
    )  # for vdu
    problem = Problem(remain, forget, neighbors, schedule, settings, target, remain[:1], moments)
    method = METHODS[name]
    steps = fit(
        model,
        lambda eps_model, generator: method.losses(
            eps_model, problem, draw_batch(problem, generator)
        ),
        make_optimizer(model, settings.lr),
        steps=10**9,
        lr_at=lambda step: 0.0,
        seed=0,
        device=images.device,
        combine=method.combine(problem) if method.combine else None,
        bf16=bf16,
    )
    return lambda: next(steps)


def measure(case: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    b, images, bf16 = (
        batch_size(case, args),
        random_images(case, device),
        use_bf16(args.bf16, device),
    )
    labels = list(dict.fromkeys(["vanilla", *args.methods]))
    loops = {label: method_loop(label, case, images, b, bf16) for label in labels}

    def steps(label: str) -> None:
        for _ in range(args.steps):
            loops[label]()

    seconds = take_turns(
        {label: lambda label=label: steps(label) for label in labels}, args.turns, device
    )
    return [
        {
            "layout": case,
            "batch": b,
            "method": label,
            "steps/s": args.steps / sorted(seconds[label])[args.turns // 2],
            "to vanilla": times_as_fast(seconds[label], seconds["vanilla"]),
            "a step's memory, MiB": peak_mib(loops[label], device),
        }
        for label in labels
    ]


def main() -> None:
    parser = make_parser(__doc__, "bench_methods")
    parser.add_argument(
        "--methods",
        nargs="+",
        type=flags.one_of(ROWS),
        default=ROWS,
        help=f"some of {', '.join(ROWS)}",
    )
    args = parser.parse_args()
    device = runs.pick_device(args.device)
    finish([row for case in args.cases for row in measure(case, args, device)], args, device)


if __name__ == "__main__":
    runs.run_command(main)

"""What the targets cost: a ReTrack step with the exact and with the generalizing one, against one
with k = 10 neighbours, and their arithmetic alone.

Random images (the arithmetic does not look at them) and a random UNet of the data set's preset. The
formula as it stands, with all v_n in one b x N x D tensor, is timed against exact_target on the
first few images.
"""

import argparse
import statistics

import torch
from bench_methods import method_loop
from common import (
    batch_size,
    make_parser,
    peak_mib,
    random_images,
    run_cases,
    take_turns,
    times_as_fast,
)
from torch import Tensor

from tiny_retrack import NoiseSchedule
from tiny_retrack.data import to_float
from tiny_retrack.lab import flags, runs
from tiny_retrack.posterior import (
    exact_target,
    gaussian_moments,
    gaussian_target,
    local_target,
    topk_target,
)
from tiny_retrack.training import use_bf16

SCHEDULE = NoiseSchedule.linear()


def naive_target(x_t: Tensor, t: Tensor, images: Tensor, schedule: NoiseSchedule) -> Tensor:
    """eps* as its formula stands, in float32."""
    gamma, sigma = schedule.scales(t, x_t[:, None])
    v = (x_t[:, None] - gamma * to_float(images)) / sigma  # [b, n, c, h, w]
    p = torch.softmax(-0.5 * v.square().flatten(2).sum(2), dim=1)
    return (p[:, :, None, None, None] * v).sum(1)


def measure(case: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    b, images, bf16 = (
        batch_size(case, args),
        random_images(case, device)[: args.images],
        use_bf16(args.bf16, device),
    )
    few, few_b = images[: args.naive_images], min(b, 16)
    generator = torch.Generator(device).manual_seed(1)
    t = torch.randint(SCHEDULE.num_steps, (b,), device=device, generator=generator)
    x0 = to_float(images[:1]).expand(b, *images.shape[1:])
    x_t = SCHEDULE.q_sample(x0, t, torch.randn(x0.shape, device=device, generator=generator))
    loops = {
        target: method_loop(f"retrack-{target}", case, images, b, bf16)
        for target in ("knn", "exact", "generalizing")
    }

    def steps(target: str) -> None:
        for _ in range(args.steps):
            loops[target]()

    whole = {
        "step, 10 neighbours of a_u": lambda: steps("knn"),
        "step, exact": lambda: steps("exact"),
        "step, generalizing": lambda: steps("generalizing"),
    }
    moments = gaussian_moments(images)
    alone = {
        "exact_target": lambda: exact_target(x_t, t, images, SCHEDULE),
        "topk_target, k = 10": lambda: topk_target(x_t, t, images, SCHEDULE, 10),
        "gaussian_target": lambda: gaussian_target(x_t, t, moments, SCHEDULE),
    }
    window = {
        "exact_target": lambda: exact_target(x_t, t, few, SCHEDULE),
        "local_target, 3 x 3": lambda: local_target(x_t, t, few, SCHEDULE, 3),
    }
    small = {
        "b x N x D in one tensor": lambda: naive_target(x_t[:few_b], t[:few_b], few, SCHEDULE),
        "exact_target": lambda: exact_target(x_t[:few_b], t[:few_b], few, SCHEDULE),
    }
    rows: list[dict[str, object]] = []
    for group, n, size, count in (
        (whole, images, b, args.steps),
        (alone, images, b, 1),
        (window, few, b, 1),
        (small, few, few_b, 1),
    ):
        seconds = take_turns(group, args.turns, device)
        first = next(iter(group))
        rows += [
            {
                "layout": case,
                "batch": size,
                "what": what,
                "N": len(n),
                "seconds": statistics.median(seconds[what]) / count,
                "to the first": times_as_fast(seconds[first], seconds[what]),
                "memory, MiB": peak_mib(run, device),
            }
            for what, run in group.items()
        ]
    return rows


def main() -> None:
    parser = make_parser(__doc__, "bench_posterior")
    parser.add_argument("--images", type=flags.positive, help="N (default: the data set's)")
    parser.add_argument(
        "--naive-images", type=flags.positive, default=2000, help="N for b x N x D in one tensor"
    )
    run_cases(parser.parse_args(), measure)


if __name__ == "__main__":
    runs.run_command(main)

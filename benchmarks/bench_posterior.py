"""What the exact target costs: an unlearning step with it against one with 10 neighbours, and against b x N x D.

`python benchmarks/bench_posterior.py` runs at the size of MNIST and CIFAR-10, on random images (the arithmetic does not
look at them) and a random UNet of the data set's preset. On 2 CPU cores a step takes tens of seconds.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts of the repository are no package

from tiny_retrack import NoiseSchedule, UNet, cli
from tiny_retrack.checkpoint import write_json
from tiny_retrack.posterior import exact_target, nearest_neighbors, topk_target
from tiny_retrack.presets import PRESETS
from tiny_retrack.report import table
from tiny_retrack.training import fit, make_optimizer, use_bf16
from unlearn import METHODS, Problem, draw_batch

SIZES = {"mnist-tshirt": (60_000, 1, 28, 28), "cifar10": (50_000, 3, 32, 32), "digits-tshirt": (1_797, 1, 16, 16)}
MIB = 2**20


def random_images(dataset: str, n: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(0, 256, (n, *SIZES[dataset][1:]), dtype=torch.uint8, device=device, generator=generator)


def step_seconds(dataset: str, images: Tensor, batch_size: int, steps: int, bf16: bool) -> dict[str, float]:
    """The median step with each target, as unlearn.py takes it. They take turns, so that a busy machine is fair."""
    preset, schedule, device = PRESETS[dataset], NoiseSchedule.linear(), images.device
    settings = replace(preset.unlearn, batch_size=batch_size, k=10)
    remain, forget = images[1:], images[:1]
    neighbors, _ = nearest_neighbors(forget, remain, settings.k)
    runs = {}
    for target in ("knn", "exact"):
        torch.manual_seed(0)
        model = UNet(preset.unet).to(device).to(memory_format=torch.channels_last)
        problem = Problem(remain, forget, neighbors, schedule, settings, target)
        runs[target] = fit(
            model,
            lambda eps_model, generator, problem=problem: METHODS["retrack"].losses(
                eps_model, problem, draw_batch(problem, generator)
            ),
            make_optimizer(model, settings.lr),
            steps=steps + 1,
            lr_at=lambda step: 0.0,
            seed=0,
            device=device,
            bf16=bf16,
        )
    seconds: dict[str, list[float]] = {target: [] for target in runs}
    for _ in range(steps + 1):
        for target, run in runs.items():
            seconds[target].append(clock(lambda run=run: next(run), device))
    return {target: median(times[1:]) for target, times in seconds.items()}  # the first one warms up


def clock(run: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def draws(images: Tensor, batch_size: int, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """x_t from the first image, and t, over all times."""
    generator = torch.Generator(images.device).manual_seed(1)
    t = torch.randint(schedule.num_steps, (batch_size,), device=images.device, generator=generator)
    x0 = (images[:1].float() / 127.5 - 1).expand(batch_size, *images.shape[1:])
    return schedule.q_sample(x0, t, torch.randn(x0.shape, device=images.device, generator=generator)), t


def target_seconds(images: Tensor, batch_size: int) -> dict[str, float]:
    schedule = NoiseSchedule.linear()
    x_t, t = draws(images, batch_size, schedule)
    runs = {
        "exact": lambda: exact_target(x_t, t, images, schedule),
        "topk": lambda: topk_target(x_t, t, images, schedule, 10),
    }
    return {name: median([clock(run, images.device) for _ in range(4)][1:]) for name, run in runs.items()}


def naive_target(x_t: Tensor, t: Tensor, images: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The formula as it stands, with all v_n at once, in float32."""
    gamma, sigma = schedule.scales(t, x_t[:, None])
    v = (x_t[:, None] - gamma * (images.float() / 127.5 - 1)) / sigma  # [b, n, c, h, w]
    p = torch.softmax(-0.5 * v.square().flatten(2).sum(2), dim=1)
    return (p[:, :, None, None, None] * v).sum(1)


def peak_bytes(dataset: str, n: int, batch_size: int, device: str, naive: bool) -> int:
    """How much memory a target takes above the data. To be run in a process of its own: the CPU's peak never falls."""
    images, schedule = random_images(dataset, n, torch.device(device)), NoiseSchedule.linear()
    x_t, t = draws(images, batch_size, schedule)
    target = naive_target if naive else exact_target
    target(x_t[:1], t[:1], images[:1], schedule)  # what the libraries allocate once
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        target(x_t, t, images, schedule)
        return torch.cuda.max_memory_allocated() - before
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    target(x_t, t, images, schedule)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def measure(dataset: str, args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, object]]:
    n, b = args.images or SIZES[dataset][0], args.batch_size
    images = random_images(dataset, n, device)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        small_b, small_n = min(b, 16), min(n, args.naive_images)
        peak = pool.apply(peak_bytes, (dataset, n, b, device.type, False))
        naive_peak = pool.apply(peak_bytes, (dataset, small_n, small_b, device.type, True))
    target = target_seconds(images, b)
    schedule = NoiseSchedule.linear()
    few = images[:small_n]
    x_t, t = draws(few, small_b, schedule)
    naive = median([clock(lambda: naive_target(x_t, t, few, schedule), device) for _ in range(4)][1:])
    fast = median([clock(lambda: exact_target(x_t, t, few, schedule), device) for _ in range(4)][1:])
    step = step_seconds(dataset, images, b, args.steps, use_bf16(args.bf16, device))
    name = {"data": dataset, "N": n, "D": images[0].numel(), "b": b}
    return {
        "step": {
            **name,
            "knn k=10 step, s": step["knn"],
            "exact step, s": step["exact"],
            "ratio": step["exact"] / step["knn"],
            "exact target alone, s": target["exact"],
            "topk target alone, s": target["topk"],
            "share of the step": target["exact"] / step["knn"],
            "exact target's memory, MiB": peak / MIB,
        },
        "naive": {
            **name,
            "N": small_n,
            "b": small_b,
            "b x N x D, s": naive,
            "exact_target, s": fast,
            "times as fast": naive / fast,
            "b x N x D, MiB": naive_peak / MIB,
        },
    }


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", nargs="+", type=cli.one_of(SIZES), default=["mnist-tshirt", "cifar10"], help="sizes to run at")
    add("--images", type=cli.positive, help="N (default: the data set's)")
    add("--naive-images", type=cli.positive, default=2000, help="N for the comparison with b x N x D")
    add("--batch-size", type=cli.positive, default=128)
    add("--steps", type=cli.positive, default=2, help="steps of each kind, after one to warm up")
    add("--device", type=cli.one_of(("auto", "cpu", "cuda")), default="auto", help="auto, cpu or cuda")
    add("--bf16", type=cli.one_of(("auto", "on", "off")), default="auto", help="bfloat16 autocast in the UNet")
    add("--out", type=Path, default=Path("runs/bench_posterior.json"))
    args = parser.parse_args()
    device = cli.pick_device(args.device)
    results = [measure(dataset, args, device) for dataset in args.cases]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {"results": results, "bf16": use_bf16(args.bf16, device), **cli.provenance(device)})
    print(f"wrote {args.out}\n")
    print("\n\n".join(table([result[kind] for result in results]) for kind in ("step", "naive")))


if __name__ == "__main__":
    cli.run_command(main)

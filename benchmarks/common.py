"""What the benchmarks share: timing by turns, peak memory, the table and the JSON."""

import argparse
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts of the repository are no package

from tiny_retrack.lab import flags, runs
from tiny_retrack.lab.checkpoint import write_json
from tiny_retrack.lab.plots import table
from tiny_retrack.lab.presets import PRESETS

SIZES = {
    "digits-tshirt": (1_797, 1, 16, 16),
    "mnist-tshirt": (60_000, 1, 28, 28),
    "small-mnist": (60_000, 1, 28, 28),
    "cifar10": (50_000, 3, 32, 32),
}
MIB = 2**20

# Dense TFLOP/s of the makers' data sheets: bfloat16, and TF32 for what stays in float32. A card is
# known by a part of its name; "H100" alone is no name, as the PCIe card is slower.
PEAKS = {
    "H200": (989.4, 494.7),
    "H100 80GB HBM3": (989.4, 494.7),
    "H100 PCIe": (756.0, 378.0),
    "A100": (312.0, 156.0),
}


def make_parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """The flags of every benchmark that takes turns."""
    parser = flags.Parser(doc)
    add = parser.add_argument
    add(
        "--cases",
        nargs="+",
        type=flags.one_of(SIZES),
        default=["digits-tshirt"],
        help=", ".join(SIZES),
    )
    add("--batch-size", type=flags.positive, help="images a step (default: the preset's)")
    add(
        "--turns",
        type=flags.positive,
        default=7,
        help="how often each takes its turn, after one to warm up",
    )
    add("--steps", type=flags.positive, default=2, help="steps a turn")
    add(
        "--device",
        type=flags.one_of(("auto", "cpu", "cuda")),
        default="auto",
        help="auto, cpu or cuda",
    )
    add(
        "--bf16", type=flags.one_of(("auto", "on", "off")), default="auto", help="bfloat16 autocast"
    )
    add("--out", type=Path, default=Path(f"runs/{name}.json"), help="the JSON")
    return parser


def random_images(case: str, device: torch.device) -> torch.Tensor:
    """uint8, of the size of the data set: the arithmetic does not look at them."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(0, 256, SIZES[case], dtype=torch.uint8, device=device, generator=generator)


def batch_size(case: str, args: argparse.Namespace) -> int:
    return args.batch_size or PRESETS[case].train.batch_size


def clock(run: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def take_turns(
    runs: Mapping[str, Callable[[], object]], turns: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each run, turn by turn, the order reversed each time: a busy machine is busy for
    all.

    One more turn comes first and is left out: it warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            seconds[name].append(clock(runs[name], device))
    return {name: times[1:] for name, times in seconds.items()}


def times_as_fast(a: Sequence[float], b: Sequence[float]) -> float:
    """How many times as fast `a` is as `b`: the median of the turns' ratios."""
    return statistics.median(y / x for x, y in zip(a, b, strict=True))


def peak_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """How much memory a run takes above what was there before it; None where the system cannot
    tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with suppress(OSError, AttributeError):
        # What was freed and kept, or is freed meanwhile, would hide what the run takes.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
        before = _resident_kib("VmRSS")
        run()
        return (_resident_kib("VmHWM") - before) / 1024
    return None


def _resident_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def count_flop(run: Callable[[], object]) -> int:
    """Floating-point operations of a run's convolutions, matrix products and attention, counted
    from their shapes: a multiplication and an addition are two.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def peak_tflops(device: torch.device, bf16: bool) -> float | None:
    """What the card's data sheet promises; None for a card that `PEAKS` does not know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, (in_bfloat16, in_tf32) in PEAKS.items():
        if part in name:
            return in_bfloat16 if bf16 else in_tf32
    return None


def kernels_of(run: Callable[[], object], device: torch.device) -> tuple[int, float] | None:
    """How many kernels and copies a run starts on the GPU, and how many seconds these take; None on
    a CPU.

    Where the run takes much longer than its kernels, it is the starting of them that binds.
    """
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [
        event
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    microseconds = sum(event.self_device_time_total for event in events)
    return sum(event.count for event in events), microseconds / 1e6


def run_cases(
    args: argparse.Namespace,
    measure: Callable[[str, argparse.Namespace, torch.device], list[dict[str, object]]],
) -> None:
    """Measure each of `--cases` and print the table last. The JSON is written after each case: what
    was measured is kept if the next one fails or is stopped.
    """
    device = runs.pick_device(args.device)
    rows = []
    for case in args.cases:
        rows += measure(case, args, device)
        write_rows(rows, args, device)
    print(f"wrote {args.out}\n\n{table(rows)}")


def median_rate(count: float, seconds: Sequence[float]) -> float:
    """How many a second, if a turn has `count`: at the median of the turns' seconds."""
    return count / sorted(seconds)[len(seconds) // 2]


def write_rows(
    rows: list[dict[str, object]], args: argparse.Namespace, device: torch.device
) -> None:
    """The JSON: the rows, the settings, and what ran on what."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    write_json(args.out, {"rows": rows, "settings": settings, **runs.provenance(device)})

"""What gpu_session.sh asks Python: how many steps fit, a report of the figures, smaller weights."""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts of the repository are no package

EAGER = ("ours, bfloat16", "ours, float32")  # what train_ddpm.py runs: the first that was measured
COMPILED = "ours, --compile"
PAYS = 1.15  # times as fast: from here on torch.compile is worth the wait for it
TRACING = 20.0  # seconds that torch.compile takes, once its cache holds the kernels
MARGIN = 0.9  # of the measured speed: checkpoints and the log take time, too
WEIGHTS = "diffusion_pytorch_model.safetensors"
Row = dict[str, Any]

# SISS's paper (2503.01034) on MNIST T-Shirt, 50 sampler steps, five seeds. Its training is longer
# and its classifier behind IS another one, so only the order of the methods can be compared.
PAPER: list[Row] = [
    {"model": "pretrained", "hits": "0.74%", "IS": 9.6, "NLL forgotten": 1.00},
    {"model": "retrained", "hits": "0", "IS": 9.6, "NLL forgotten": 6.17},
    {"model": "vanilla", "hits": "0.04%", "IS": 9.5, "NLL forgotten": 1.19},
    {"model": "SISS, 300 x 64", "hits": "0", "IS": 9.2, "NLL forgotten": 8.09},
    {"model": "EraseDiff", "hits": None, "IS": 5.1, "NLL forgotten": 12.04},
]


def choose_steps(folder: Path, case: str, batch_size: int, seconds: float) -> str:
    """How many steps fit into the seconds at the measured speed, and "--compile" where it pays: the
    words for train_ddpm.py's --steps. Empty if the speed was not measured.
    """
    speeds: dict[str, float] = {}
    for path in sorted(folder.glob("bench_unet*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            if row["layout"] == case:
                speeds[row["loop"]] = row["training, images/s"]
    measured = [speeds[name] for name in EAGER if name in speeds]
    if not measured:
        return ""
    eager = MARGIN * seconds * measured[0] / batch_size
    compiled = MARGIN * (seconds - TRACING) * speeds.get(COMPILED, 0.0) / batch_size
    if compiled > PAYS * eager:
        return f"{int(compiled)} --compile"
    return f"{max(1, int(eager))}"


def find(folder: Path, name: str) -> Iterator[Path]:
    """The files of that name, in order, but for the copies in results/."""
    for path in sorted(folder.rglob(name)):
        if path.relative_to(folder).parts[0] != "results":
            yield path


def describe_trainings(folder: Path) -> Iterator[Row]:
    """A row for each training: how far it came, and its mean loss over the last tenth."""
    for path in find(folder, "run.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        if "train" not in run:
            continue
        lines = path.with_name("log.jsonl").read_text(encoding="utf-8").splitlines()
        log = [json.loads(line) for line in lines]
        last = log[-max(1, len(log) // 10) :]
        images = run["step"] * run["train"]["batch_size"] * run["train"]["accumulate"]
        yield {
            "training": str(path.parent.relative_to(folder)),
            "steps": f"{run['step']} of {run['train']['steps']}",
            "batch": run["train"]["batch_size"],
            "images seen": images,
            "loss": statistics.fmean(record["loss"] for record in last),
            "images/s": statistics.median(record["images_per_s"] for record in log),
            "device": run["device"],
        }


def describe_models(folder: Path) -> Iterator[Row]:
    """A row for each evaluated model."""
    for path in find(folder, "metrics.json"):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        run_path = path.with_name("run.json")
        run = json.loads(run_path.read_text(encoding="utf-8")) if run_path.exists() else {}
        injection = metrics["injection"] or {}
        yield {
            "model": str(path.parent.relative_to(folder)),
            "samples": metrics["num_samples"],
            "sampler": f"{metrics['sampler']} {metrics['sampler_steps']}",
            "hits": metrics["hit_frequency"],
            "FID": metrics["fid"],
            "IS": metrics["inception_score"],
            "NLL remain": metrics["nll"]["remain"],
            "NLL forgotten": metrics["nll"]["forget"],
            "inject t=250": injection.get("250", {}).get("l2"),
            "unlearning, s": run.get("seconds"),
        }


def write_report(folder: Path, out: Path) -> None:
    """Every figure of a session as Markdown tables, whatever became of the comparisons."""
    from tiny_retrack.lab.checkpoint import atomic  # here, as to import torch takes seconds
    from tiny_retrack.lab.plots import table

    parts = []
    for path in sorted(folder.glob("bench_*.json")):
        bench = json.loads(path.read_text(encoding="utf-8"))
        parts.append(f"## {bench['command']}\n\n{bench['device']}\n\n{table(bench['rows'])}")
    parts.append(f"## Trainings\n\n{table([*describe_trainings(folder)])}")
    parts.append(f"## Models\n\n{table([*describe_models(folder)])}")
    parts.append(f"## SISS's paper, 30,720 samples\n\n{table(PAPER)}")
    with atomic(out) as path:
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def halve_weights(checkpoint: Path, out: Path) -> None:
    """A copy of a checkpoint whose weights are float16; it loads like the checkpoint itself."""
    import numpy as np
    from safetensors import safe_open
    from safetensors.numpy import save_file

    others = shutil.ignore_patterns("*.safetensors", "*.png", "metrics.json", "state.json", ".*")
    shutil.copytree(checkpoint, out, ignore=others, dirs_exist_ok=True)
    with safe_open(checkpoint / WEIGHTS, framework="np") as file:
        names = list(file.keys())
        weights = {name: file.get_tensor(name).astype(np.float16) for name in names}
        save_file(weights, out / WEIGHTS, metadata=file.metadata())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    steps = commands.add_parser("steps", help="how many training steps fit into some seconds")
    steps.add_argument("folder", type=Path, help="of the benchmarks' JSON")
    steps.add_argument("--case", required=True, help="the layout, as bench_unet.py calls it")
    steps.add_argument("--batch-size", type=int, required=True)
    steps.add_argument("--seconds", type=float, required=True)
    report = commands.add_parser("report", help="all figures of a session as Markdown")
    report.add_argument("folder", type=Path)
    report.add_argument("out", type=Path)
    half = commands.add_parser("half", help="a copy of a checkpoint with float16 weights")
    half.add_argument("checkpoint", type=Path)
    half.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.command == "steps":
        print(choose_steps(args.folder, args.case, args.batch_size, args.seconds))
    elif args.command == "report":
        write_report(args.folder, args.out)
    else:
        halve_weights(args.checkpoint, args.out)


if __name__ == "__main__":
    main()

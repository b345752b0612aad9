"""Is it forgotten, is the rest intact?

`python evaluate.py` holds the last unlearned model against its base; `python evaluate.py DIR ...` any checkpoints;
`python evaluate.py compare --methods ... --seeds ...` unlearns with every method and seed, then tells them apart.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import train_ddpm
import unlearn
from tiny_retrack import NoiseSchedule, cli, load_model
from tiny_retrack.checkpoint import atomic, read_json, write_json
from tiny_retrack.data import Split, to_float, to_uint8
from tiny_retrack.errors import InputError, NonFiniteError
from tiny_retrack.losses import EpsModel
from tiny_retrack.metrics import Classifier, fid, fit_classifier, inception_score, is_hit, oracle_distance
from tiny_retrack.posterior import exact_target, nearest_neighbors
from tiny_retrack.presets import PRESETS, EvalSettings, add_flags, resolve
from tiny_retrack.report import mean_and_spread, save_curves, save_grid, save_pareto, save_rows, table
from tiny_retrack.sampling import sample_many
from tiny_retrack.training import denoiser, place, use_bf16

BANDS = ((0, 200), (200, 400), (400, 1000))  # of t, for the distance to the oracle


@dataclass(frozen=True)
class Judge:
    """What all compared models share: data, feature network, sampling noise."""

    split: Split
    data: dict[str, Any]
    network: Classifier
    features: str
    settings: EvalSettings
    seed: int
    device: torch.device
    bf16: bool


def make_judge(args: cli.argparse.Namespace, folder: Path) -> Judge:
    """The judge for the data that the checkpoint in `folder` was made with; says what a hit is."""
    device = cli.pick_device(args.device)
    data = cli.data_settings(args, cli.recorded_data(folder))
    settings = resolve(PRESETS[data["dataset"]].evaluate, args)
    split = cli.load_data(data, args.download).to(device)
    network, features = feature_network(split, data, Path("runs", data["dataset"], "features"))
    print(f"features: {features}")
    if len(split.forget):
        nearest = nearest_neighbors(split.targets, split.remain, 1)[1].min().item() / 2  # [0, 1] pixels
        print(
            f"a hit: within {settings.threshold:.2f} of a forgotten image; the nearest remain image is at {nearest:.2f}"
        )
        if nearest <= settings.threshold:
            print(f"beware: a remain image would count as a hit, take --threshold below {nearest:.2f}")
    return Judge(split, data, network, features, settings, args.seed, device, use_bf16(args.bf16, device))


def feature_network(split: Split, data: dict[str, Any], folder: Path) -> tuple[Classifier, str]:
    """The data set's own classifier, trained once and kept in `folder`; and how metrics.json calls it."""
    about = {"data": data, "images": len(split.remain)}
    weights, card = folder / "classifier.safetensors", folder / "classifier.json"
    if weights.exists() and card.exists() and (known := read_json(card)).get("about") == about:
        tensors, accuracy = load_file(weights), known["accuracy"]
        network = Classifier(split.remain.shape[1], len(tensors["head.bias"]))
        network.load_state_dict(tensors)
        network = network.to(split.remain.device).eval()
    else:
        network, accuracy = fit_classifier(lambda index: to_float(split.remain[index]), split.labels, seed=0)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(weights) as path:
            save_file(network.state_dict(), path)
        write_json(card, {"about": about, "accuracy": accuracy})
    return network, f"own classifier, held-out accuracy {accuracy:.3f}"


@torch.no_grad()
def oracle_bands(
    eps_model: EpsModel, split: Split, schedule: NoiseSchedule, seed: int, draws: int = 64
) -> dict[str, float]:
    """Mean distance a pixel, in x0 units, to the ideal denoiser of the remain set, by bands of t."""
    generator = torch.Generator(split.remain.device).manual_seed(seed)
    random = {"generator": generator, "device": split.remain.device}
    targets, result = to_float(split.targets), {}
    for low, high in BANDS:
        x0 = targets[torch.randint(len(targets), (draws,), **random)]
        t = torch.randint(low, high, (draws,), **random)
        x_t = schedule.q_sample(x0, t, torch.randn(x0.shape, **random))
        distance = oracle_distance(eps_model, lambda x, t: exact_target(x, t, split.remain, schedule), x_t, t)
        gamma, sigma = schedule.scales(t, distance)
        result[f"{low}-{high - 1}"] = (distance * (sigma / gamma) ** 2).mean().item()
    return result


def evaluate(folder: Path, judge: Judge) -> dict[str, Any]:
    """Sample from one checkpoint and measure; writes metrics.json, samples.png and its images into the folder."""
    model, schedule = load_model(folder)
    cli.check_model_fits(model.config, judge.split, folder)
    eps_model = denoiser(place(model, judge.device).eval(), judge.bf16)
    settings, split = judge.settings, judge.split
    shape = tuple(split.remain.shape[1:])
    clock = time.perf_counter()
    samples = sample_many(
        eps_model, settings.num_samples, shape, schedule, settings.sampler_steps,
        seed=judge.seed, device=judge.device, progress=f"sampling {folder.name}",
    )  # fmt: skip
    seconds = time.perf_counter() - clock
    hits = torch.zeros(len(samples), dtype=torch.bool)
    if len(split.forget):
        hits = is_hit((samples + 1) / 2, split.targets.cpu() / 255, settings.threshold)
    rest = samples[~hits]
    result = {
        "hit_frequency": hits.float().mean().item(),
        "fid": fid(rest.split(500), map(to_float, split.remain.split(500)), judge.network),
        "inception_score": inception_score(rest, judge.network) if len(rest) else None,
        "oracle_distance": oracle_bands(eps_model, split, schedule, judge.seed) if len(split.forget) else None,
        **asdict(settings),
        "features": judge.features,
        "seed": judge.seed,
        "images_per_s": round(len(samples) / seconds, 1),
    }
    write_json(folder / "metrics.json", result)
    with atomic(folder / "samples.safetensors") as path:
        save_file({"samples": to_uint8(samples[:64])}, path)
    with atomic(folder / "samples.png") as path:
        save_grid(path, to_uint8(samples[:64]), columns=8, scale=max(1, 64 // shape[-1]))
    return result


def shown(result: dict[str, Any]) -> dict[str, Any]:
    """The columns of a table, from a metrics.json."""
    distances = {f"oracle t={band}": value for band, value in (result["oracle_distance"] or {}).items()}
    return {name: result[name] for name in ("hit_frequency", "fid", "inception_score")} | distances


def default_folders(runs: Path) -> list[Path]:
    """The base model and the last unlearned one."""
    unlearned = [path for path in runs.glob("*/run.json") if "method" in read_json(path)]
    return [runs / "base", *[path.parent for path in sorted(unlearned, key=lambda p: p.stat().st_mtime)[-1:]]]


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return compare(argv[1:])
    parser = cli.make_parser(__doc__)
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="checkpoints (default: base and newest)")
    add_flags(parser, EvalSettings)
    args = parser.parse_args(argv)
    folders = args.folders or default_folders(Path("runs", args.dataset or cli.DATA_DEFAULTS["dataset"]))
    judge = make_judge(args, folders[-1])  # the last one knows what it was to forget
    print(table([{"model": str(folder), **shown(evaluate(folder, judge))} for folder in folders]))


DEFAULT_METHODS = [name for name in unlearn.METHODS if name != "retrack"] + [f"retrack-{t}" for t in unlearn.TARGETS]
LOWER_IS_BETTER = {"hit_frequency": True, "fid": True, "inception_score": False}  # the distances: lower


def flags_of(label: str) -> list[str]:
    """What unlearn.py is to be told: "retrack-knn:k=1,lam=0.05" -> --method retrack --target knn --k 1 --lam 0.05."""
    name, _, options = label.partition(":")
    method, target = ("retrack", name.removeprefix("retrack-")) if name.startswith("retrack-") else (name, None)
    flags = ["--method", method, *(["--target", target] if target else [])]
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        flags += [f"--{key}", value]
    return flags


def is_done(folder: Path) -> bool:
    """Whether a run ended: run.json is unlearn.py's last file, and tells how far train_ddpm.py came."""
    run = read_json(folder / "run.json") if (folder / "run.json").exists() else None
    return run is not None and ("train" not in run or run["step"] == run["train"]["steps"])


def run_one(label: str, seed: int, base: Path, folder: Path, common: list[str], curve_every: int | None) -> None:
    """Unlearn, or retrain, into `folder`.

    Raises:
        NonFiniteError: if it diverges.
    """
    flags = [*common, "--seed", str(seed), "--out", str(folder)]
    if label == "retrain":
        train = read_json(base / "run.json")["train"]
        settings = [text for name, value in train.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        go_on = "--resume" if (folder / "state.json").exists() else "--overwrite"
        train_ddpm.main([*flags, *settings, "--remain-only", go_on])
    else:
        snapshots = ["--save-every", str(curve_every)] if curve_every else []
        unlearn.main([*flags, *flags_of(label), *snapshots, "--checkpoint", str(base), "--overwrite"])


def measured(folder: Path, judge: Judge) -> dict[str, Any]:
    """metrics.json of a checkpoint, made anew if it was measured otherwise or not yet."""
    path = folder / "metrics.json"
    wanted = {**asdict(judge.settings), "features": judge.features, "seed": judge.seed}
    if path.exists() and wanted.items() <= (known := read_json(path)).items():
        return known
    return evaluate(folder, judge)


def summarise(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, str]]:
    """One row a method: mean and standard deviation over seeds, the best bold if it leads by more than the spread.

    The base and the retrained model are what methods are held against, and do not compete.
    """
    columns = list(shown(next(iter(results.values()))[0]))
    stats = {
        label: {name: mean_and_spread([shown(run)[name] for run in runs]) for name in columns}
        for label, runs in results.items()
    }
    rows = {label: {"method": label, "seeds": str(len(runs))} for label, runs in results.items()}
    for name in columns:
        sign = 1 if LOWER_IS_BETTER.get(name, True) else -1
        ranked = sorted((sign * stats[label][name][0], label) for label in results if label not in ("base", "retrain"))
        leads = len(ranked) > 1 and ranked[1][0] - ranked[0][0] > max(stats[label][name][1] for _, label in ranked[:2])
        for label in results:
            mean, spread = stats[label][name]
            text = f"{mean:.4g}" + (f" ± {spread:.2g}" if len(results[label]) > 1 else "")
            rows[label][name] = f"**{text}**" if leads and label == ranked[0][1] else text
    return list(rows.values())


def compare(argv: Sequence[str]) -> None:
    """Unlearn with every method and seed, evaluate all, write a table and pictures. What exists is not run again."""
    parser = cli.make_parser(compare.__doc__)
    parser.prog = "evaluate.py compare"
    parser.add_argument("--base", type=Path, help="the checkpoint that is to forget (default: runs/DATASET/base)")
    parser.add_argument(
        "--methods", nargs="+", default=[*DEFAULT_METHODS, "retrain"], metavar="METHOD[:FLAG=VALUE,...]",
        help=f"e.g. retrack-knn:k=1,lam=0.05 (default: {' '.join(DEFAULT_METHODS)} retrain)",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="one run of each method a seed")
    parser.add_argument("--curve-every", type=cli.positive, help="also measure every N steps of the first seed's runs")
    parser.add_argument("--out", type=Path, help="folder for runs, table and pictures (default: runs/DATASET/compare)")
    add_flags(parser, EvalSettings)
    args = parser.parse_args(argv)
    runs = Path("runs", args.dataset or cli.DATA_DEFAULTS["dataset"])
    base, out = args.base or runs / "base", args.out or runs / "compare"
    for label in args.methods:
        name = label.partition(":")[0]
        if name not in DEFAULT_METHODS and name != "retrain":
            raise InputError(f"--methods {label}: take some of {', '.join(DEFAULT_METHODS)}, retrain")
    judge = make_judge(args, base)
    common = [*cli.data_flags(judge.data), "--device", args.device, "--bf16", args.bf16]

    results, curves, grids, failures = {"base": [measured(base, judge)]}, {}, {"base": base}, {}
    for label in args.methods:
        for seed in args.seeds:
            folder = out / label.replace(":", "_") / f"seed-{seed}"
            first = seed == args.seeds[0]
            if not is_done(folder):
                try:
                    run_one(label, seed, base, folder, common, args.curve_every if first else None)
                except NonFiniteError as error:
                    failures[f"{label}, seed {seed}"] = str(error)
                    continue
            results.setdefault(label, []).append(measured(folder, judge))
            if first:
                grids[label] = folder
                steps = sorted(folder.glob("step-*"), key=lambda path: int(path.name[5:]))
                points = [(int(path.name[5:]), measured(path, judge)) for path in steps]
                if points:
                    curves[label] = [(0, results["base"][0]), *points]
    rows = summarise(results)
    write_json(out / "summary.json", {"table": rows, "results": results, "failures": failures, "seeds": args.seeds})
    text = table(rows) + "".join(f"\n\n{run}: {why}" for run, why in failures.items()) + "\n"
    with atomic(out / "table.md") as path:
        path.write_text(text)
    print(text)
    draw(out, results, curves, grids)


def draw(out: Path, results: dict[str, list], curves: dict[str, list], grids: dict[str, Path]) -> None:
    """The comparison's pictures: forgetting against quality, both against steps, and one row of samples a method."""
    distance = f"oracle t={BANDS[1][0]}-{BANDS[1][1] - 1}"
    for name in (distance, "hit_frequency"):
        points = {label: [(shown(r)[name], r["fid"]) for r in runs if r["fid"]] for label, runs in results.items()}
        with atomic(out / f"pareto_{name.split()[0]}.png") as path:
            save_pareto(path, points, f"{name} (lower: better forgotten)", "FID (lower: better kept)")
    for name in (distance, "hit_frequency", "fid") if curves else ():
        lines = {
            label: ([p[0] for p in points], [shown(p[1])[name] for p in points]) for label, points in curves.items()
        }
        with atomic(out / f"curve_{name.split()[0]}.png") as path:
            save_curves(path, lines, "unlearning step", name)
    with atomic(out / "samples.png") as path:
        save_rows(path, {label: first_samples(folder) for label, folder in grids.items()}, "the same noise for all")


def first_samples(folder: Path, columns: int = 16) -> Tensor:
    """The first row's worth of a checkpoint's samples, read back from metrics' own grid."""
    return load_file(folder / "samples.safetensors")["samples"][:columns]


if __name__ == "__main__":
    cli.run_command(main)

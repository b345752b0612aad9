"""Is it forgotten, is the rest intact?

`python evaluate.py` holds the last unlearned model against its base; `python evaluate.py DIR ...`
any checkpoints; `python evaluate.py compare --methods ... --seeds ...` unlearns with every method
and seed, then tells them apart.
"""

import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torchvision.models import Inception_V3_Weights
from tqdm import tqdm

import train_ddpm
import unlearn
from tiny_retrack import NoiseSchedule, UNet, load_model
from tiny_retrack.attacks import augmented, membership_inference, relearning_curve
from tiny_retrack.data import Split, to_float, to_uint8
from tiny_retrack.lab import flags, runs
from tiny_retrack.lab.checkpoint import (
    atomic,
    fingerprint,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from tiny_retrack.lab.plots import (
    mean_and_spread,
    save_grid,
    save_panels,
    save_pareto,
    save_rows,
    table,
)
from tiny_retrack.lab.presets import PRESETS, EvalSettings, UnlearnSettings, add_flags, resolve
from tiny_retrack.likelihood import nll_bits_per_dim
from tiny_retrack.losses import EpsModel
from tiny_retrack.metrics import (
    Classifier,
    Inception,
    fid,
    fit_classifier,
    inception_score,
    injection_similarity,
    is_hit,
    nearest_distance,
    oracle_distance,
)
from tiny_retrack.posterior import exact_target, nearest_neighbors
from tiny_retrack.sampling import inject_and_denoise, sample_many
from tiny_retrack.training import denoiser, full_float32, place, use_bf16
from tiny_retrack.types import InputError, NonFiniteError

BANDS = ((0, 200), (200, 400), (400, 1000))  # of t, for the distance to the oracle
INJECT_AT = (100, 250, 500)
# --attack: when to look, how to train, how many samples to look at, how many look-alikes the strong
# attacker has, how many draws of noise membership inference averages over, at which t, and what
# share of hits counts as brought back.
ATTACK: dict[str, Any] = {"at": [15, 60], "batch_size": 64, "lr": 5e-4}
ATTACK |= {"samples": 100, "copies": 4, "draws": 16, "t": 200, "back": 0.05}
ATTACKERS = ("remain", "samples", "augmented")  # what they train on


@dataclass(frozen=True)
class Judge:
    """What all compared models share: data, feature network, sampling noise."""

    split: Split
    data: dict[str, Any]
    network: Classifier | Inception
    features: str
    tolerance: float  # of the ODE behind the likelihood
    settings: EvalSettings
    seed: int
    device: torch.device
    bf16: bool
    attackers: Sequence[str]


def run_of(folder: Path) -> dict[str, Any]:
    """run.json of a checkpoint; empty for one from elsewhere."""
    return read_json(folder / "run.json") if (folder / "run.json").exists() else {}


def load_fitting(folder: Path, split: Split) -> tuple[UNet, NoiseSchedule]:
    """The checkpoint in a folder; refused if it is not of the data's images."""
    model, schedule = load_model(folder)
    runs.check_model_fits(model.config, schedule.num_steps, split, folder)
    return model, schedule


def load_placed(folder: Path, judge: Judge) -> tuple[UNet, NoiseSchedule]:
    """The same where the judge computes, ready to be measured."""
    model, schedule = load_fitting(folder, judge.split)
    return place(model, judge.device, judge.bf16).eval(), schedule


def make_judge(args: flags.argparse.Namespace, folders: Sequence[Path]) -> Judge:
    """The judge of some checkpoints, for the data of the last one that was unlearned, else of the
    last.
    """
    device = runs.pick_device(args.device)
    unlearned = [folder for folder in folders if "method" in run_of(folder)]
    data = flags.data_settings(args, runs.recorded_data((unlearned or folders)[-1]))
    settings = resolve(PRESETS[data["dataset"]].evaluate, args)
    if not 1e-12 <= args.nll_tolerance <= 1:
        raise InputError(f"--nll-tolerance {args.nll_tolerance}: must be from 1e-12 to 1")
    split = runs.load_data(data, args.download).to(device)
    if args.attack is not None and not len(split.forget):
        raise InputError(
            "--attack: there is nothing to bring back, say with --forget what was forgotten"
        )
    if settings.threshold == 0:
        settings = replace(settings, threshold=10 * math.sqrt(split.remain[0].numel() / 784))
    for folder in folders:
        load_fitting(folder, split)  # a broken one is told before the work
    if args.features == "own":
        network, features = feature_network(split, data, Path("runs", data["dataset"], "features"))
    else:
        network, features = inception(args.features, args.download)
        network = network.to(device).eval()
    bf16 = use_bf16(args.bf16, device)
    return Judge(
        split,
        data,
        network,
        features,
        args.nll_tolerance,
        settings,
        args.seed,
        device,
        bf16,
        args.attack or ATTACKERS,
    )


def describe(judge: Judge) -> None:
    """Say what FID is over and what a hit is."""
    print(f"features: {judge.features}")
    if len(judge.split.forget):
        threshold = judge.settings.threshold
        nearest = (
            nearest_neighbors(judge.split.targets, judge.split.remain, 1)[1].min().item() / 2
        )  # [0, 1] pixels
        print(
            f"a hit: within {threshold:.2f} of a forgotten image; the nearest remain image is at {nearest:.2f}"
        )
        if nearest <= threshold:
            print(
                f"beware: a remain image would count as a hit, take --threshold below {nearest:.2f}"
            )


def add_judge_flags(parser: flags.argparse.ArgumentParser) -> None:
    add_flags(parser, EvalSettings)
    parser.add_argument(
        "--features", default="own", metavar="own|inception|FILE",
        help="the network behind FID and IS: the data set's own classifier, or torchvision's Inception v3, "
        "from a file of its weights or fetched by --download",
    )  # fmt: skip
    parser.add_argument(
        "--attack", type=flags.one_of(ATTACKERS), nargs="*",
        help=f"also try to bring the forgotten images back, with the means of: {', '.join(ATTACKERS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--nll-tolerance",
        type=float,
        default=1e-3,
        help="rtol and atol of the likelihood's ODE (1e-5: published)",
    )


def inception(name: str, download: bool) -> tuple[Inception, str]:
    """Inception v3 from a file of weights, or from torch.hub's cache, and how metrics.json calls
    it.
    """
    url = Inception_V3_Weights.IMAGENET1K_V1.url
    file = (
        Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
        if name == "inception"
        else Path(name)
    )
    if name == "inception" and download and not file.exists():
        try:
            torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:  # no network; or what came has another hash
            raise InputError(f"--features inception: {url} cannot be fetched ({error})") from None
    if not file.exists():
        raise InputError(
            f"--features {name}: no weights at {file}; fetch them with --features inception --download"
        )
    try:
        return Inception(
            torch.load(file, map_location="cpu", weights_only=True)
        ), f"inception_v3, {file.name}"
    except Exception as error:  # a stranger's file: torch names many kinds of damage
        raise InputError(
            f"{file} is not torchvision's inception_v3: {str(error).splitlines()[0]:.80}"
        ) from None


def feature_network(split: Split, data: dict[str, Any], folder: Path) -> tuple[Classifier, str]:
    """The data set's own classifier, trained once and kept in `folder`; and how metrics.json calls
    it.
    """
    about = {"data": data, "images": len(split.remain)}
    weights, card = folder / "classifier.safetensors", folder / "classifier.json"
    if weights.exists() and card.exists() and (known := read_json(card)).get("about") == about:
        (tensors, _), accuracy = read_tensors(weights), known["accuracy"]
        try:
            network = Classifier(split.remain.shape[1], len(tensors["head.bias"]))
            network.load_state_dict(tensors)
        except (KeyError, RuntimeError):
            raise InputError(
                f"{weights} is not the feature network that it was: delete {folder}"
            ) from None
        if not all(bool(p.isfinite().all()) for p in tensors.values()):
            raise InputError(f"{weights} holds values that are not finite: delete {folder}")
        network = network.to(split.remain.device).eval()
    else:
        labels = (
            split.labels - split.labels.min()
        )  # images without a label are a class of their own
        network, accuracy = fit_classifier(
            lambda index: to_float(split.remain[index]), labels, seed=0
        )
        card.unlink(missing_ok=True)  # it must never lie beside the weights of another data set
        write_tensors(weights, network.state_dict(), {})
        write_json(card, {"about": about, "accuracy": accuracy})
    return network, f"own classifier, held-out accuracy {accuracy:.3f}"


@torch.no_grad()
def oracle_bands(
    eps_model: EpsModel,
    oracle: EpsModel,
    split: Split,
    schedule: NoiseSchedule,
    seed: int,
    draws: int = 64,
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean distance a pixel to another denoiser at x_t of the forget set, by bands of t: in x0 and
    in eps units.
    """
    generator = torch.Generator(split.remain.device).manual_seed(seed)
    random = {"generator": generator, "device": split.remain.device}
    targets, in_x0, in_eps = to_float(split.targets), {}, {}
    for low, high in BANDS:
        x0 = targets[torch.randint(len(targets), (draws,), **random)]
        t = torch.randint(low, high, (draws,), **random)
        x_t = schedule.q_sample(x0, t, torch.randn(x0.shape, **random))
        distance = oracle_distance(eps_model, oracle, x_t, t)
        gamma, sigma = schedule.scales(t, distance)
        in_x0[f"{low}-{high - 1}"] = (distance * (sigma / gamma) ** 2).mean().item()
        in_eps[f"{low}-{high - 1}"] = distance.mean().item()
    return in_x0, in_eps


def mean_nll(
    eps_model: EpsModel, images: Tensor, judge: Judge, schedule: NoiseSchedule, probes: int = 8
) -> float | None:
    """Mean bits per dimension of uint8 images; None if the model is too broken to have a
    likelihood.
    """
    images = images.repeat(
        math.ceil(probes / len(images)), 1, 1, 1
    )  # of few images copies, each with its own probe
    generator = torch.Generator(judge.device).manual_seed(judge.seed)
    tolerance = judge.tolerance
    options: dict[str, Any] = {"rtol": tolerance, "atol": tolerance, "progress": "likelihood"}
    try:
        with full_float32():
            bits = nll_bits_per_dim(eps_model, to_float(images), schedule, generator, **options)
    except NonFiniteError:
        return None
    return bits.mean().item()


def injections(
    eps_model: EpsModel, judge: Judge, schedule: NoiseSchedule, times: Sequence[int] = INJECT_AT
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """Injection similarity by t, and its pictures; the same noise for all models."""
    generator = torch.Generator(judge.device).manual_seed(judge.seed)
    targets = to_float(judge.split.targets)
    x0 = targets[torch.arange(16, device=judge.device) % len(targets)]
    noise = torch.randn(x0.shape, generator=generator, device=judge.device)
    result, pictures = {}, {"forgotten": to_uint8(x0).cpu()}
    for t in times:
        denoised = inject_and_denoise(
            eps_model, x0, t, noise, schedule, judge.settings.sampler_steps
        )
        distance, cosine = injection_similarity(x0, denoised, judge.network)
        result[str(t)] = {"l2": distance.mean().item(), "cosine": cosine.mean().item()}
        pictures[f"from t={t}"] = to_uint8(denoised).cpu()
    return result, pictures


def finite(figures: Any) -> Any:
    """The same with None for what is not a number: a broken model has no figure."""
    if isinstance(figures, dict):
        return {name: finite(value) for name, value in figures.items()}
    return None if isinstance(figures, float) and not math.isfinite(figures) else figures


def setting(folder: Path, judge: Judge) -> dict[str, Any]:
    """All that the figures of a checkpoint depend on: what was measured with the same is not
    measured again.
    """
    about = {
        "features": judge.features,
        "nll_tolerance": judge.tolerance,
        "seed": judge.seed,
        "bf16": judge.bf16,
    }
    return {**asdict(judge.settings), **about, "data": judge.data, "weights": fingerprint(folder)}


def evaluate(folder: Path, judge: Judge) -> dict[str, Any]:
    """Sample from one checkpoint and measure; writes metrics.json, samples.png and its images into
    the folder.
    """
    model, schedule = load_placed(folder, judge)
    eps_model = denoiser(model, judge.bf16)
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
    kept = split.remain[:: math.ceil(len(split.remain) / 16)]  # whose likelihood should not move
    result = {
        "hit_frequency": hits.double().mean().item(),
        "fid": fid(rest.split(500), map(to_float, split.remain.split(500)), judge.network),
        "inception_score": inception_score(rest, judge.network) if len(rest) else None,
        "nll": {
            "remain": mean_nll(denoiser(model, bf16=False), kept, judge, schedule),
            "forget": None,
        },
        "injection": None,
        "oracle_distance": None,
        "oracle_distance_eps": None,
        **setting(folder, judge),
        "images_per_s": round(len(samples) / seconds, 1),
    }
    if len(split.forget):
        result["nll"]["forget"] = mean_nll(
            denoiser(model, bf16=False), split.targets[:16], judge, schedule
        )
        distances = oracle_bands(eps_model, ideal(judge, schedule), split, schedule, judge.seed)
        result["oracle_distance"], result["oracle_distance_eps"] = distances
        result["injection"], pictures = injections(eps_model, judge, schedule)
        with atomic(folder / "injection.png") as path:
            save_rows(path, pictures, "the forgotten image, noised to t and denoised")
    write_tensors(folder / "samples.safetensors", {"samples": to_uint8(samples[:64])}, {})
    with atomic(folder / "samples.png") as path:
        save_grid(path, to_uint8(samples[:64]), columns=8, scale=max(1, 64 // shape[-1]))
    result = finite(result)
    write_json(folder / "metrics.json", result)  # last: it tells `measured` that all is there
    return result


def ideal(judge: Judge, schedule: NoiseSchedule) -> EpsModel:
    """The optimal denoiser of the remain set."""
    return lambda x_t, t: exact_target(x_t, t, judge.split.remain, schedule)


def attack(folder: Path, judge: Judge) -> dict[str, Any]:
    """How fast the forgotten images come back, by what the attacker trains on; and whether their
    loss tells of them.

    Writes attack.json into the folder; what was attacked with the same settings is not attacked
    again.
    """
    wanted = {**setting(folder, judge), **ATTACK, "attackers": list(judge.attackers)}
    path, split, settings = folder / "attack.json", judge.split, judge.settings
    if known := known_result(path, wanted, attack_shown):
        return known
    shape = tuple(split.remain.shape[1:])

    def draw(eps_model: EpsModel, num: int, seed: int) -> Tensor:
        steps = settings.sampler_steps
        return sample_many(eps_model, num, shape, schedule, steps, seed=seed, device=judge.device)

    def measure(eps_model: EpsModel) -> dict[str, Any]:
        samples = ((draw(eps_model, ATTACK["samples"], judge.seed) + 1) / 2).clamp(0, 1)
        target, look_alikes = split.targets.cpu() / 255, few.cpu() / 255
        nearer = nearest_distance(samples, target) < nearest_distance(
            samples, look_alikes
        )  # no look-alike is a hit
        return {
            "hit_frequency": (is_hit(samples, target, settings.threshold) & nearer)
            .double()
            .mean()
            .item(),
            "inject": injections(eps_model, judge, schedule, times=[250])[0]["250"]["l2"],
            "nll": mean_nll(
                denoiser(model, bf16=False), split.targets[:16], judge, schedule, probes=2
            ),
        }

    model, schedule = load_placed(folder, judge)
    eps_model = denoiser(model, judge.bf16)
    copies = augmented(split.targets, shift=1)
    few = copies[
        torch.randperm(len(copies), generator=torch.Generator().manual_seed(judge.seed))[
            : ATTACK["copies"]
        ]
    ]
    auxiliaries = {
        "remain": lambda: split.remain,
        "samples": lambda: to_uint8(draw(eps_model, settings.num_samples, judge.seed + 1)).to(
            judge.device
        ),
        "augmented": lambda: torch.cat(
            [split.remain, few.repeat(math.ceil(len(split.remain) / len(few)), 1, 1, 1)]
        ),
    }
    generator = torch.Generator(judge.device).manual_seed(judge.seed)
    t = torch.full((ATTACK["draws"],), ATTACK["t"], device=judge.device)
    noise = torch.randn((len(t), *shape), generator=generator, device=judge.device)
    never_seen = to_float(augmented(split.targets, shift=3, gains=(1.0, 0.9)))
    try:
        auc, tpr = membership_inference(
            eps_model, to_float(split.targets), never_seen, t, noise, schedule
        )
    except ValueError:  # a model too broken to have losses
        auc = tpr = None
    result = {**wanted, "membership": {"auc": auc, "tpr_at_1_percent": tpr}, "curves": {}}
    for name in judge.attackers:
        images = auxiliaries[name]()
        model, schedule = load_placed(folder, judge)
        result["curves"][name] = relearning_curve(
            model, images, measure, schedule, at=ATTACK["at"], batch_size=ATTACK["batch_size"], lr=ATTACK["lr"],
            seed=judge.seed, bf16=judge.bf16,
        )  # fmt: skip
    result = finite(result)
    write_json(path, result)
    return result


def known_result(
    path: Path, wanted: dict[str, Any], columns: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any] | None:
    """What a JSON file holds, if it was made with what is wanted and has all that a table shows of
    it.
    """
    with suppress(
        KeyError, TypeError, AttributeError, IndexError
    ):  # of an older version, or edited
        if path.exists() and wanted.items() <= (known := read_json(path)).items():
            columns(known)
            return known
    return None


def attack_shown(result: dict[str, Any]) -> dict[str, Any]:
    """The columns of a table, from an attack.json: what each attacker has in the end, and when the
    image was back.
    """
    row = {}
    for name, curve in result["curves"].items():
        back = [point["step"] for point in curve if point["hit_frequency"] >= ATTACK["back"]]
        row |= {f"{name}: {key}": curve[-1][key] for key in ("hit_frequency", "inject", "nll")}
        row[f"{name}: back at step"] = back[0] if back else None
    return row | {f"membership {name}": value for name, value in result["membership"].items()}


def shown(result: dict[str, Any]) -> dict[str, Any]:
    """The columns of a table, from a metrics.json."""
    row = {name: result[name] for name in ("hit_frequency", "fid", "inception_score")}
    row |= {f"nll {name}": value for name, value in result["nll"].items()}
    row |= {f"inject t={t}": value["l2"] for t, value in (result["injection"] or {}).items()}
    row |= {f"oracle t={band}": value for band, value in (result["oracle_distance"] or {}).items()}
    return row | {
        f"retrained t={band}": value for band, value in result.get("retrained_distance", {}).items()
    }


def default_folders(runs: Path) -> list[Path]:
    """The last unlearned model, after the one that it was made from; without any, the base."""
    unlearned = [path for path in runs.glob("*/run.json") if "method" in read_json(path)]
    if not unlearned:
        return [runs / "base"]
    last = max(unlearned, key=lambda path: path.stat().st_mtime)
    run = read_json(last)
    base = Path(run["checkpoint"]) if Path(run["checkpoint"]).exists() else runs / "base"
    if fingerprint(base) != run.get("base"):
        print(f"beware: {last.parent} was not made from what is now in {base}, unlearn it anew")
    return [base, last.parent]


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return compare(argv[1:])
    parser = flags.make_parser(__doc__)
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="DIR",
        help="checkpoints (default: base and newest)",
    )
    add_judge_flags(parser)
    args = parser.parse_args(argv)
    folders = args.folders or default_folders(
        Path("runs", args.dataset or flags.DATA_DEFAULTS["dataset"])
    )
    judge = make_judge(args, folders)  # the last one knows what it was to forget
    describe(judge)
    print(table([{"model": str(folder), **shown(evaluate(folder, judge))} for folder in folders]))
    if args.attack is not None:
        results = {str(folder): [attack(folder, judge)] for folder in folders}
        print(
            table([{"model": folder, **attack_shown(runs[0])} for folder, runs in results.items()])
        )
        draw_attacks(folders[-1] / "attack.png", results)


ALL_METHODS = [name for name in unlearn.METHODS if name != "retrack"]
ALL_METHODS += [*(f"retrack-{target}" for target in unlearn.TARGETS), "retrain"]
# 1: lower is better, -1: higher. The other columns should be where the retrained model's are.
BETTER = {"hit_frequency": 1, "fid": 1, "inception_score": -1} | {
    f"retrained t={a}-{b - 1}": 1 for a, b in BANDS
}


def method_label(text: str) -> str:
    """A flag's type: a method that there is; its settings are looked at once the data set is known."""
    flags.one_of(ALL_METHODS)(text.partition(":")[0])
    return text


def flags_of(label: str) -> list[str]:
    """What unlearn.py is to be told: "retrack-knn:k=1,lam=0.05" -> --method retrack --target knn
    --k 1 --lam 0.05.
    """
    name, _, options = label.partition(":")
    method, target = (
        ("retrack", name.removeprefix("retrack-")) if name.startswith("retrack-") else (name, None)
    )
    flags = ["--method", method, *(["--target", target] if target else [])]
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        flags += [f"--{key}", value]
    return flags


def unlearn_settings(label: str, data: dict[str, Any]) -> UnlearnSettings:
    """What unlearn.py will run with.

    Raises:
        InputError: if the label asks for what is none of the method's settings.
    """
    options = {
        option.partition("=")[0].replace("-", "_")
        for option in label.partition(":")[2].split(",")
        if option
    }
    strange = options - {f.name for f in fields(UnlearnSettings)}
    if strange or (options and label.startswith("retrain")):
        raise InputError(
            f"--methods {label}: {', '.join(sorted(strange or options))} cannot be set here"
        )
    if label == "retrain":
        return PRESETS[data["dataset"]].unlearn
    return resolve(
        PRESETS[data["dataset"]].unlearn, unlearn.make_parser().parse_args(flags_of(label))
    )


# --sweep: for each method the learning rate, the steps, and the weight that the method has of its
# own.
SWEEP = {"lr": ("2e-5", "5e-5", "1e-4"), "steps": ("50", "200")}
SWEEP_OWN = {
    "siss": {"rescale": ("1", "5")},
    "retrack": {"lam": ("0.005", "0.03")},
    "dimum": {"lam": ("0.005", "0.03")},
    "vdu": {"gamma": ("5e-3", "1e-2")},
}
RULE = (
    "hit_frequency",
    "fid",
)  # of two settings the one with fewer hits and then the lower FID is better


def sweep_labels(label: str) -> list[str]:
    """The settings of the grid for one method: "vanilla" -> "vanilla:lr=2e-5,steps=50" and so on."""
    if label == "retrain":
        return [label]
    method, _, given = label.partition(":")
    named = {option.partition("=")[0] for option in given.split(",")}
    grid = SWEEP | SWEEP_OWN.get(method.partition("-")[0], {})
    grid = {name: values for name, values in grid.items() if name not in named}
    if not grid:
        return [label]
    settings = [
        ",".join(map("=".join, zip(grid, values, strict=True)))
        for values in itertools.product(*grid.values())
    ]
    return [f"{label}{',' if ':' in label else ':'}{setting}" for setting in settings]


def best_settings(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Each method's best setting by RULE, over the mean of the seeds; a seed that diverged, or no
    FID, is the worst.
    """

    def rank(label: str) -> tuple[float, ...]:
        columns = [
            [math.inf if run[name] is None else run[name] for run in results[label]]
            for name in RULE
        ]
        return (-len(results[label]), *(sum(values) / len(values) for values in columns))

    methods = dict.fromkeys(label.partition(":")[0] for label in results)
    return [
        min((each for each in results if each.partition(":")[0] == method), key=rank)
        for method in methods
    ]


def is_trained(run: dict[str, Any]) -> bool:
    """Whether train_ddpm.py came to the end of the run that this run.json tells of."""
    return isinstance(run.get("train"), dict) and run.get("step") == run["train"].get("steps")


def is_done(label: str, folder: Path, base: Path, judge: Judge, snapshots: Sequence[int]) -> bool:
    """Whether a run ended that was made as it would be now, with these snapshots."""
    run = run_of(folder)
    if (run.get("data"), run.get("bf16")) != (judge.data, judge.bf16):
        return False
    if label == "retrain":
        return is_trained(run) and run["train"] == run_of(base).get("train")
    same = (run.get("base"), run.get("unlearn")) == (
        fingerprint(base),
        asdict(unlearn_settings(label, judge.data)),
    )
    return same and all((folder / f"step-{step}").exists() for step in snapshots)


def snapshots_of(label: str, judge: Judge, every: int | None) -> list[int]:
    """The steps before the last at which a run is also to be measured."""
    return (
        list(range(every, unlearn_settings(label, judge.data).steps, every))
        if every and label != "retrain"
        else []
    )


def run_one(
    args: flags.argparse.Namespace,
    label: str,
    seed: int,
    folder: Path,
    judge: Judge,
    every: int | None,
) -> None:
    """Unlearn, or retrain, into `folder`.

    Raises:
        NonFiniteError: if it diverges.
    """
    base = args.base
    flags = [*flags.data_flags(judge.data), "--device", args.device, "--bf16", args.bf16]
    flags += ["--seed", str(seed), "--out", str(folder)]
    if label == "retrain":
        train, before = run_of(base)["train"], run_of(folder)
        settings = [
            text
            for name, value in train.items()
            for text in (f"--{name.replace('_', '-')}", str(value))
        ]
        settings += ["--widths", *map(str, load_model(base)[0].config.block_out_channels)]
        same = (train, judge.data, judge.bf16) == tuple(
            before.get(name) for name in ("train", "data", "bf16")
        )
        train_ddpm.main([*flags, *settings, "--remain-only", "--resume" if same else "--overwrite"])
    else:
        snapshots = ["--save-every", str(every)] if every else []
        unlearn.main(
            [*flags_of(label), *flags, *snapshots, "--checkpoint", str(base), "--overwrite"]
        )


def measured(folder: Path, judge: Judge) -> dict[str, Any]:
    """metrics.json of a checkpoint, made anew if it was measured otherwise or not yet."""
    return known_result(folder / "metrics.json", setting(folder, judge), shown) or evaluate(
        folder, judge
    )


@torch.no_grad()
def to_retrained(folder: Path, retrained: Sequence[Path], judge: Judge) -> dict[str, float | None]:
    """Distance to the first retrained model, of that one to the second: the oracle bands with a
    network as oracle.
    """
    others = [other for other in retrained if other != folder]
    if not others:
        return {f"{low}-{high - 1}": None for low, high in BANDS}
    (model, schedule), (oracle, _) = (load_placed(each, judge) for each in (folder, others[0]))
    eps_model, oracle = denoiser(model, judge.bf16), denoiser(oracle, judge.bf16)
    return finite(oracle_bands(eps_model, oracle, judge.split, schedule, judge.seed)[0])


def summarise(
    results: dict[str, list[dict[str, Any]]],
    shown: Callable[[dict[str, Any]], dict[str, Any]] = shown,
) -> list[dict[str, str]]:
    """One row a method: mean and standard deviation over seeds, the best bold if it leads by more
    than the spread.

    The base and the retrained model are what methods are held against, and do not compete.
    """
    rows = {label: {"method": label, "seeds": str(len(runs))} for label, runs in results.items()}
    for name in shown(next(iter(results.values()))[0]):
        values = {label: [shown(run)[name] for run in runs] for label, runs in results.items()}
        known = {
            label: [value for value in column if value is not None]
            for label, column in values.items()
        }
        stats = {label: mean_and_spread(column) for label, column in known.items() if column}
        whole = {label for label in stats if len(known[label]) == len(values[label])} - {
            "base",
            "retrain",
        }
        ranked = sorted((BETTER.get(name, 1) * stats[label][0], label) for label in whole)
        first, second = ranked[:2] if len(ranked) > 1 else (None, None)
        leads = False
        if (
            first and second and min(len(values[label]) for _, label in (first, second)) > 1
        ):  # one run has no spread
            leads = second[0] - first[0] > max(stats[label][1] for _, label in (first, second))
        for label, row in rows.items():
            row[name] = "-"
            if label in stats:
                mean, spread = stats[label]
                row[name] = f"{mean:.4g}" + (f" ± {spread:.2g}" if len(known[label]) > 1 else "")
                if len(known[label]) < len(values[label]):
                    row[name] += f" ({len(known[label])} of {len(values[label])})"
                if name in BETTER and leads and label == ranked[0][1]:
                    row[name] = f"**{row[name]}**"
    return list(rows.values())


@dataclass(frozen=True)
class Run:
    """What came of one run of a comparison; without metrics, why it has none."""

    label: str
    seed: int
    metrics: dict[str, Any] | None = None
    curve: Sequence[tuple[int, dict[str, Any]]] = ()  # (step, metrics) on the way
    attack: dict[str, Any] | None = None
    failure: str = ""


def folder_of(args: flags.argparse.Namespace, label: str, seed: int) -> Path:
    return args.base if label == "base" else args.out / label.replace(":", "_") / f"seed-{seed}"


def one_run(args: flags.argparse.Namespace, label: str, seed: int) -> Run:
    """Unlearn, measure and attack, as far as that was not done before."""
    judge, folder = make_judge(args, [args.base]), folder_of(args, label, seed)
    every = args.curve_every if label != "base" and seed == args.seeds[0] else None
    snapshots = snapshots_of(label, judge, every)
    if label != "base" and not is_done(label, folder, args.base, judge, snapshots):
        try:
            run_one(args, label, seed, folder, judge, every)
        except NonFiniteError as error:
            return Run(label, seed, failure=str(error))
    metrics = measured(folder, judge)
    curve = [(step, measured(folder / f"step-{step}", judge)) for step in snapshots]
    if curve:
        curve.append((unlearn_settings(label, judge.data).steps, metrics))
    return Run(
        label, seed, metrics, curve, attack(folder, judge) if args.attack is not None else None
    )


def start_job(threads: int, log: Path) -> None:
    """In a process of its own: its share of the cores, its progress bars in a file, and no life
    after its parent's.
    """
    parent = parent_process()
    assert parent is not None
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = log.open("a")


def run_all(args: flags.argparse.Namespace, tasks: Sequence[tuple[str, int]]) -> Iterator[Run]:
    """`one_run` of each task, in order; in `--jobs` processes that share the cores."""
    if args.jobs == 1:
        yield from (one_run(args, *task) for task in tasks)
        return
    threads, log = max(1, torch.get_num_threads() // args.jobs), args.out / "jobs.log"
    try:
        with ProcessPoolExecutor(
            args.jobs, get_context("spawn"), start_job, (threads, log)
        ) as pool:
            yield from pool.map(one_run, itertools.repeat(args), *zip(*tasks, strict=True))
    except BrokenProcessPool:
        raise InputError(
            f"a job was killed, for lack of memory if by the system: lower --jobs {args.jobs}"
        ) from None


def compare(argv: Sequence[str]) -> None:
    """Unlearn with every method and seed, evaluate all, write a table and pictures. What exists is
    not run again.
    """
    parser = flags.make_parser(compare.__doc__)
    parser.prog = "evaluate.py compare"
    parser.add_argument(
        "--base", type=Path, help="the checkpoint that is to forget (default: runs/DATASET/base)"
    )
    parser.add_argument(
        "--methods", nargs="+", type=method_label, metavar="METHOD[:FLAG=VALUE,...]",
        help=f"e.g. retrack-knn:k=1,lam=0.05 (default: {' '.join(ALL_METHODS)}; vdu only if the base kept checkpoints, "
        "retrain only if it says how it was trained)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=flags.seed,
        default=[*range(5)],
        help="one run of each method a seed",
    )
    parser.add_argument(
        "--curve-every",
        type=flags.positive,
        help="also measure every N steps of the first seed's runs",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="try a grid of settings for each method, and also report each one's best",
    )
    parser.add_argument(
        "--jobs",
        type=flags.positive,
        default=1,
        help="runs at a time; one a core is the fastest on a CPU (default: 1)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for runs, table and pictures (default: runs/DATASET/compare)",
    )
    add_judge_flags(parser)
    args = parser.parse_args(argv)
    runs = Path("runs", args.dataset or flags.DATA_DEFAULTS["dataset"])
    args.base, args.out = args.base or runs / "base", args.out or runs / "compare"
    args.seeds = [*dict.fromkeys(args.seeds)]
    trained, kept = "train" in run_of(args.base), len([*args.base.glob("step-*")])
    methods = [*dict.fromkeys(args.methods or ALL_METHODS)]
    if not args.methods:
        methods = [
            name
            for name in methods
            if (name != "vdu" or kept > 1) and (name != "retrain" or trained)
        ]
    elif "retrain" in methods and not trained:
        raise InputError(
            f"--methods retrain: {args.base} does not say how it was trained, only train_ddpm.py's do"
        )
    judge = make_judge(args, [args.base])
    labels = [
        each for label in methods for each in (sweep_labels(label) if args.sweep else [label])
    ]
    for label in labels:
        unlearn_settings(label, judge.data)  # what cannot be run is told before the work
    runs.claim_folder(args.out)
    describe(judge)
    if trained and not is_trained(run_of(args.base)):
        print(
            f"beware: the training of {args.base} was stopped before its end, train_ddpm.py --resume goes on"
        )

    longest_first = sorted(
        labels, key=lambda label: label != "retrain"
    )  # else it may end on one core alone
    tasks = [("base", args.seeds[0]), *itertools.product(longest_first, args.seeds)]
    done = [*tqdm(run_all(args, tasks), "runs", total=len(tasks), unit="run")]
    ended = {
        label: [run for run in done if run.label == label and run.metrics]
        for label in ["base", *labels]
    }
    ended = {label: runs for label, runs in ended.items() if runs}
    results = {label: [run.metrics for run in runs if run.metrics] for label, runs in ended.items()}
    retrained = [folder_of(args, run.label, run.seed) for run in ended.get("retrain", [])]
    for run in done if retrained and len(judge.split.forget) else ():
        if run.metrics:
            folder = folder_of(args, run.label, run.seed)
            run.metrics["retrained_distance"] = to_retrained(folder, retrained, judge)
    failures = {f"{run.label}, seed {run.seed}": run.failure for run in done if run.failure}
    rows = summarise(results)
    curves = {run.label: [(0, results["base"][0]), *run.curve] for run in done if run.curve}
    summary = {
        "table": rows,
        "results": results,
        "curves": curves,
        "failures": failures,
        "seeds": args.seeds,
    }
    write_json(
        args.out / "summary.json", {**summary, "jobs": args.jobs, **runs.provenance(judge.device)}
    )
    text = table(rows)
    if args.attack is not None:
        attacks = {
            label: [run.attack for run in runs if run.attack] for label, runs in ended.items()
        }
        text += f"\n\nAttacked:\n\n{table(summarise(attacks, attack_shown))}"
        draw_attacks(args.out / "attack.png", attacks)
    best, clouds = [*results], results
    if args.sweep:  # one colour a method, and its best setting in the pictures
        best, clouds = best_settings(results), {}
        for label, runs in results.items():
            clouds.setdefault(label.partition(":")[0], []).extend(runs)
        text += f"\n\nFewest hits, then lowest FID:\n\n{table([row for row in rows if row['method'] in best])}"
    text += "".join(f"\n\n{run}: {why}" for run, why in failures.items()) + "\n"
    with atomic(args.out / "table.md") as path:
        path.write_text(text)
    print(text)
    curves = {label: curve for label, curve in curves.items() if label in best}
    draw(
        args.out,
        clouds,
        curves,
        {label: folder_of(args, label, ended[label][0].seed) for label in best},
    )


def number(figure: float | None) -> float:
    """What a plot leaves out."""
    return math.nan if figure is None else figure


def draw_attacks(path: Path, attacks: dict[str, list[dict[str, Any]]]) -> None:
    """One row of plots for each kind of attacker, one curve a model: the mean over its seeds, by
    attack step.
    """
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for label, runs in attacks.items():
        for name in runs[0]["curves"]:
            points = list(
                zip(*(run["curves"][name] for run in runs), strict=True)
            )  # by step, one a seed
            for key in ("hit_frequency", "inject", "nll"):
                y = [statistics.fmean(number(p[key]) for p in seeds) for seeds in points]
                panels.setdefault(f"{name}: {key}", {})[label] = (
                    [seeds[0]["step"] for seeds in points],
                    y,
                )
    with atomic(path) as temporary:
        save_panels(temporary, panels, "attack step", columns=3)


def draw(
    out: Path, results: dict[str, list], curves: dict[str, list], grids: dict[str, Path]
) -> None:
    """The comparison's pictures: forgetting against quality, both against steps, and one row of
    samples a method.
    """
    distance = f"oracle t={BANDS[1][0]}-{BANDS[1][1] - 1}"
    for name in (distance, "hit_frequency"):
        points = {
            label: [(shown(r)[name], r["fid"]) for r in runs] for label, runs in results.items()
        }
        points = {label: [xy for xy in pairs if None not in xy] for label, pairs in points.items()}
        points = {label: pairs for label, pairs in points.items() if pairs}
        with atomic(out / f"pareto_{name.split()[0]}.png") as path:
            save_pareto(
                path, points, f"{name} (lower: better forgotten)", "FID (lower: better kept)"
            )
    if curves:
        panels = {
            name: {
                label: (
                    [step for step, _ in points],
                    [number(shown(run)[name]) for _, run in points],
                )
                for label, points in curves.items()
            }
            for name in ("hit_frequency", distance, "fid")
        }
        with atomic(out / "curves.png") as path:
            save_panels(path, panels, "unlearning step", columns=3, log=(distance, "fid"))
    with atomic(out / "samples.png") as path:
        save_rows(
            path,
            {label: first_samples(folder) for label, folder in grids.items()},
            "the same noise for all",
        )


def first_samples(folder: Path, columns: int = 16) -> Tensor:
    """The first row's worth of a checkpoint's samples, read back from metrics' own grid."""
    return read_tensors(folder / "samples.safetensors")[0]["samples"][:columns]


if __name__ == "__main__":
    runs.run_command(main)

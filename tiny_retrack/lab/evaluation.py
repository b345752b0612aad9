"""Evaluation of checkpoints: is the image forgotten, is the rest intact, can it be brought back?

docs/evaluation.md defines every figure, its unit and its range of t.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from tqdm import tqdm

from tiny_retrack.attacks import ATTACKERS, augmented, membership_inference, relearning_curve
from tiny_retrack.data import Split, to_float, to_uint8
from tiny_retrack.lab import datasets, runs
from tiny_retrack.lab.checkpoint import (
    atomic,
    fingerprint,
    read_json,
    write_json,
    write_tensors,
)
from tiny_retrack.lab.features import inception_features, own_features
from tiny_retrack.lab.hits import HitThreshold, choose_threshold, draw_nearest
from tiny_retrack.lab.plots import (
    AttackCurve,
    AttackPlot,
    save_attacks,
    save_grid,
    save_rows,
    table,
)
from tiny_retrack.lab.presets import EvalSettings
from tiny_retrack.lab.yardstick import BANDS, Yardstick, band_name, ratio_row
from tiny_retrack.likelihood import nll_bits_per_dim
from tiny_retrack.metrics import (
    FeatureNetwork,
    eps_distance,
    fid,
    inception_score,
    injection_similarity,
    is_hit,
    nearest_reference,
    to_x0_units,
)
from tiny_retrack.posterior import ideal_denoiser
from tiny_retrack.sampling import SAMPLERS, inject_and_denoise, sample_many
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.training import denoiser, full_float32, place
from tiny_retrack.types import EpsModel, Images, InputError, NonFiniteError, Pixels
from tiny_retrack.unet import UNet

Metrics = dict[str, Any]  # what metrics.json or attack.json holds

T_RANGES = ((0, 200), (200, 400), (400, 1000))  # of the distances between denoisers; half open
INJECTION_TIMES = (100, 250, 500)
ATTACK_INJECTION_TIME = 250
INJECTION_TITLE = (
    "forgotten images, noised to t and denoised: a model that knows them brings the first row "
    "back,\none that forgot them ends elsewhere, the further the larger t"
)


@dataclass(frozen=True)
class AttackSettings:
    """How checkpoints are attacked, and what is measured of the attacked models.

    Attributes:
        at: optimiser steps after which the attacked model is measured; the attack ends with the
            last one.
        batch_size: images per step.
        lr: learning rate, constant.
        samples: how many samples are drawn to count hits.
        copies: how many look-alikes the attacker "augmented" has.
        draws: pairs of t and noise over which membership inference averages a loss.
        t: the time of these pairs.
        back: the share of hits from which an image counts as brought back.
    """

    at: tuple[int, ...] = (15, 60)
    batch_size: int = 64
    lr: float = 5e-4
    samples: int = 100
    copies: int = 4
    draws: int = 16
    t: int = 200
    back: float = 0.05


@dataclass(frozen=True)
class Evaluator:
    """What all compared models share.

    Attributes:
        split: the data, on the device.
        data: the settings that `split` was loaded from.
        network: of FID, the Inception Score and the injection's cosine; on the device, in eval
            mode.
        features: how metrics.json names the network.
        settings: number of samples, sampler and its steps.
        threshold: of a hit; it takes the place of the settings' own.
        nll_tolerance: rtol and atol of the likelihood's ODE solver.
        seed: of the sampling noise, and of all else that is drawn.
        bf16: whether models run in bfloat16 autocast (the likelihood never does).
        attackers: which of ATTACKERS `attack_checkpoint` tries.
    """

    split: Split
    data: Mapping[str, Any]
    network: FeatureNetwork
    features: str
    settings: EvalSettings
    threshold: HitThreshold
    nll_tolerance: float
    seed: int
    device: torch.device
    bf16: bool
    attackers: Sequence[str] = ATTACKERS
    attack: AttackSettings = field(default_factory=AttackSettings)


# --- Loading checkpoints and data -----------------------------------------------------------------


def newest_checkpoints(runs_folder: Path) -> list[Path]:
    """The last unlearned model, after the one that it was made from; without any, the base.

    Prints a warning if the base changed since.
    """
    unlearned = [path for path in runs_folder.glob("*/run.json") if "method" in read_json(path)]
    if not unlearned:
        return [runs_folder / "base"]
    newest = max(unlearned, key=lambda path: path.stat().st_mtime)
    run = read_json(newest)
    base = Path(run["checkpoint"])
    if not base.exists():
        base = runs_folder / "base"
    if fingerprint(base) != run.get("base"):
        print(f"warning: {newest.parent} was not made from the model that is now in {base}")
    return [base, newest.parent]


def recorded_data(folders: Sequence[Path], is_forget_given: bool = False) -> dict[str, Any] | None:
    """The data settings recorded by the last unlearned checkpoint, or by the last one if none is.

    An unlearned checkpoint records which images were to be forgotten; its base may not.

    Raises:
        InputError: unless --forget is given: for unlearned checkpoints of different data, or that
            were to forget different images.
    """
    unlearned = [folder for folder in folders if "method" in runs.read_run(folder)]
    if not unlearned:
        return runs.recorded_data(folders[-1])
    data = runs.recorded_data(unlearned[-1])
    for folder in unlearned:
        differing = runs.differing_data(folder, data or {})
        if differing and not is_forget_given:
            raise InputError(
                f"{folder} and {unlearned[-1]} differ in {differing}: evaluate them one by one, or "
                "say with --forget what all are measured by"
            )
    return data


def load_checkpoint(folder: Path, evaluator: Evaluator) -> tuple[UNet, NoiseSchedule]:
    """The model on the evaluator's device, in eval mode, and its schedule.

    Raises:
        InputError: as `load_model`; or if its images are not of the data's shape.
    """
    model, schedule = runs.load_fitting(folder, evaluator.split)
    return place(model, evaluator.device, evaluator.bf16).eval(), schedule


def check_checkpoints(folders: Sequence[Path], data: Mapping[str, Any], split: Split) -> None:
    """Load each, and print a warning for one that may have seen the images that are held out.

    Raises:
        InputError: if one is damaged, or does not fit the data.
    """
    for folder in folders:
        runs.load_fitting(folder, split)
        recorded = runs.recorded_data(folder) or {}
        if data["hold_out"] and recorded.get("hold_out") != data["hold_out"]:
            print(
                f"warning: {folder} does not record --hold-out {data['hold_out']}: it may have "
                "been trained on the images that are held out here"
            )


def build_evaluator(
    folders: Sequence[Path],
    data: Mapping[str, Any],
    settings: EvalSettings,
    *,
    outs: Sequence[Path] = (),
    threshold: float | None = None,
    features: str = "own",
    nll_tolerance: float = 1e-3,
    attackers: Sequence[str] | None = None,
    attack: Mapping[str, Any] | None = None,
    check: Callable[[Split], None] = lambda split: None,
    seed: int = 0,
    device: torch.device | None = None,
    bf16: bool = False,
    download: bool = False,
) -> Evaluator:
    """The evaluator of some checkpoints. All input is checked before the feature network is made.

    Args:
        folders: the checkpoints.
        data: as of `flags.data_settings`.
        settings: its threshold is the data set's own, as of `choose_threshold`.
        outs: the folders into which results will be written.
        threshold: of a hit, in place of the data set's own.
        features: "own", "inception", or a file of Inception weights.
        attackers: of ATTACKERS; None if no attack is wanted, empty for all.
        attack: settings by the names of `AttackSettings`, in place of its defaults.
        check: raises InputError for data that cannot be evaluated as asked.
        download: fetch what is missing of the data set, or the Inception weights.

    Raises:
        InputError: if a checkpoint, the data, the weights or an argument is wrong; or if a folder
            cannot be written to, or holds results that would be lost.
    """
    device = device or torch.device("cpu")
    if not 1e-12 <= nll_tolerance <= 1:
        raise InputError(f"--nll-tolerance {nll_tolerance}: must be from 1e-12 to 1")
    data, split = datasets.load_data(data, download)
    check(split)
    split = split.to(device)
    if attackers is not None and not len(split.forget):
        raise InputError(
            "--attack: there is nothing to bring back, say with --forget what was forgotten"
        )
    check_checkpoints(folders, data, split)
    for out in outs:
        _check_results(out, split)
    channels = split.remain.shape[1]
    network, name = _make_features(features, data, channels, device, download)
    return Evaluator(
        split,
        data,
        network.to(device).eval(),
        name,
        settings,
        choose_threshold(split, settings.threshold, threshold),
        nll_tolerance,
        seed,
        device,
        bf16,
        attackers=tuple(attackers or ATTACKERS),
        attack=AttackSettings(**(attack or {})),
    )


def _make_features(
    features: str, data: Mapping[str, Any], channels: int, device: torch.device, download: bool
) -> tuple[FeatureNetwork, str]:
    """The feature network, and its name."""
    if features != "own":
        return inception_features(features, download)
    load = partial(datasets.load_image_set, data, download)
    cache = Path("runs", data["dataset"], "features")
    return own_features(load, data["digest"], channels, cache, device)


def _check_results(folder: Path, split: Split) -> None:
    """Check that results can be written into a folder without losing figures of forgetting.

    Raises:
        InputError: if the folder is not writable, or if metrics.json has such figures and this
            evaluation would have none.
    """
    runs.check_writable(folder, "the results are kept there; evaluate a copy")
    path = folder / "metrics.json"
    if len(split.forget) or not path.exists():
        return
    forgotten = read_json(path).get("data")
    forgotten = forgotten.get("forget") if isinstance(forgotten, dict) else None
    if forgotten:
        names = " ".join(map(str, forgotten))
        raise InputError(
            f"{path} has figures of what was to be forgotten, which would be lost: "
            f"give --forget {names:.80} again, or delete it"
        )


def describe(evaluator: Evaluator) -> None:
    """Print what FID is over, what a hit is, and the units of the table's columns."""
    describe_samples(evaluator)
    if not len(evaluator.split.forget):
        return
    print("nll: bits per dimension; inject: L2 norm, pixels in [0, 1], after noising to t")
    print("x0-mse: squared distance per pixel of x0, in [-1, 1], at x_t of the forgotten images")


def describe_samples(evaluator: Evaluator) -> None:
    """Print the feature network behind FID, and the threshold of a hit."""
    print(f"features: {evaluator.features}")
    if not len(evaluator.split.forget):
        return
    threshold = evaluator.threshold
    if threshold.value is None:
        print(f"warning: hits are not counted, and not left out of FID and IS: {threshold.about}")
    else:
        print(f"a hit: within {threshold.value:.2f} of a forgotten image ({threshold.about})")


# --- Results on disk ------------------------------------------------------------------------------


def cache_key(folder: Path, evaluator: Evaluator) -> Metrics:
    """All that a checkpoint's metrics depend on: with the same key they are not computed again."""
    return {
        **asdict(evaluator.settings),
        "threshold": evaluator.threshold.value,
        "threshold_about": evaluator.threshold.about,
        "features": evaluator.features,
        "nll_tolerance": evaluator.nll_tolerance,
        "seed": evaluator.seed,
        "bf16": evaluator.bf16,
        "data": dict(evaluator.data),
        "weights": fingerprint(folder),
    }


def attack_key(folder: Path, evaluator: Evaluator) -> Metrics:
    """All that an attack's figures depend on."""
    settings = asdict(evaluator.attack)
    settings["at"] = list(evaluator.attack.at)  # JSON has no tuples
    attackers = list(evaluator.attackers)
    return {**cache_key(folder, evaluator), **settings, "attackers": attackers}


def read_cached(
    path: Path, key: Metrics, row: Callable[[Metrics], Mapping[str, object]]
) -> Metrics | None:
    """A result from disk, if it was computed under `key` and has all that its `row` shows.

    Raises:
        InputError: if the file is not JSON.
    """
    if not path.exists():
        return None
    result = read_json(path)
    if not key.items() <= result.items():
        return None
    try:
        row(result)
    except (KeyError, TypeError, AttributeError, IndexError):
        return None  # written by an older version, or edited
    return result


def nan_to_none(value: Any) -> Any:
    """The same with None in place of NaN and infinity, which JSON does not have; into dicts."""
    if isinstance(value, Mapping):
        return {name: nan_to_none(each) for name, each in value.items()}
    if isinstance(value, list):
        return [nan_to_none(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def none_to_nan(value: float | None) -> float:
    """A figure as plots take it: they leave NaN out."""
    return math.nan if value is None else value


def metrics_row(metrics: Metrics) -> dict[str, Any]:
    """The columns of a table, from what metrics.json holds; None where there is no figure."""
    row = {name: metrics[name] for name in ("hit_frequency", "fid", "inception_score")}
    if "fid_held_out" in metrics:
        row["fid held-out"] = metrics["fid_held_out"]
    for name, value in metrics["nll"].items():
        row[f"nll {name}"] = value
    for t, value in (metrics["injection"] or {}).items():
        row[f"inject t={t}"] = value["l2"]
    for t_range, value in (metrics["oracle_distance"] or {}).items():
        row[f"oracle x0-mse t={t_range}"] = value
    if "retrain_ratio" in metrics:
        row |= ratio_row(metrics["retrain_ratio"])
        row["loss z"] = metrics["loss_z"]
    return row


def table_row(metrics: Metrics) -> dict[str, Any]:
    """`metrics_row` without the retrain ratios at other images than the forgotten ones."""
    row = metrics_row(metrics)
    return {name: value for name, value in row.items() if not name.startswith("ratio at ")}


def attack_row(attack: Metrics) -> dict[str, Any]:
    """The columns of a table, from what attack.json holds.

    For each attacker the figures after the last step, and the first measured step at which the
    image was back.
    """
    row = {}
    for name, curve in attack["curves"].items():
        last = curve[-1]
        back = []
        for point in curve:
            if (point["hit_frequency"] or 0) >= attack["back"]:
                back.append(point["step"])
        row[f"{name}: hit_frequency"] = last["hit_frequency"]
        row[f"{name}: inject t={ATTACK_INJECTION_TIME}"] = last["inject"]
        row[f"{name}: nll"] = last["nll"]
        row[f"{name}: back at step"] = back[0] if back else None
    for name, value in attack["membership"].items():
        row[f"membership {name}"] = value
    return row


# --- Evaluation -----------------------------------------------------------------------------------


def evaluate_checkpoint(folder: Path, evaluator: Evaluator, out: Path | None = None) -> Metrics:
    """Sample from a checkpoint and compute its metrics.

    Writes metrics.json, samples.png, samples.safetensors (the first 64) and, if something is to be
    forgotten, injection.png and hits.png.

    Args:
        folder: the checkpoint.
        out: where the files go; by default into the checkpoint's folder.
    """
    out = out or folder
    model, schedule = load_checkpoint(folder, evaluator)
    key = cache_key(folder, evaluator)
    eps_model = denoiser(model, evaluator.bf16)
    start = time.perf_counter()
    num = evaluator.settings.num_samples
    samples = draw_samples(
        eps_model, num, evaluator.seed, schedule, evaluator, f"sampling {folder.name}"
    )
    seconds = time.perf_counter() - start
    metrics = {
        **sample_metrics(samples, evaluator),
        "nll": nll_metrics(model, schedule, evaluator),
        **forgetting_metrics(eps_model, schedule, evaluator, out),
        **key,
        "images_per_s": round(num / seconds, 1),
    }
    if len(evaluator.split.forget):
        targets = to_float(evaluator.split.targets.cpu())
        draw_nearest(out / "hits.png", samples, targets, evaluator.threshold)
    first = to_uint8(samples[:64])
    write_tensors(out / "samples.safetensors", {"samples": first}, {})
    with atomic(out / "samples.png") as path:
        save_grid(path, first, columns=8, scale=max(1, 64 // first.shape[-1]))
    metrics = nan_to_none(metrics)
    write_json(out / "metrics.json", metrics)  # last: with it, `read_cached` takes all as there
    return metrics


def forgetting_metrics(
    eps_model: EpsModel, schedule: NoiseSchedule, evaluator: Evaluator, out: Path
) -> Metrics:
    """What is measured at the forgotten images; None where there are none.

    Writes injection.png into `out`.
    """
    if not len(evaluator.split.forget):
        return dict.fromkeys(("injection", "oracle_distance", "oracle_distance_eps"))
    injection = inject(eps_model, evaluator, schedule)
    with atomic(out / "injection.png") as path:
        save_rows(path, injection.pictures, INJECTION_TITLE)
    oracle = ideal_denoiser(evaluator.split.remain, schedule)
    distance = denoiser_distance(eps_model, oracle, evaluator, schedule)
    return {
        "injection": injection.similarity,
        "oracle_distance": distance.x0,
        "oracle_distance_eps": distance.eps,
    }


def evaluate_once(folder: Path, evaluator: Evaluator, out: Path | None = None) -> Metrics:
    """The metrics of a checkpoint, from its metrics.json if nothing changed since.

    Without those of `with_retrain_ratio`, which depend on other networks.
    """
    key = cache_key(folder, evaluator)
    cached = read_cached((out or folder) / "metrics.json", key, metrics_row)
    if cached is None:
        return evaluate_checkpoint(folder, evaluator, out)
    return {name: value for name, value in cached.items() if name not in OF_RETRAINED}


def evaluate_all(
    folders: Sequence[Path], evaluator: Evaluator, retrained: Sequence[Path] = ()
) -> str:
    """Evaluate checkpoints; returns a table with one row per checkpoint.

    Args:
        retrained: checkpoints of networks that never saw the forgotten images, to hold all against.
    """
    yardstick = build_yardstick(retrained, evaluator) if retrained else None
    rows = []
    for folder in tqdm(folders, "models", unit="model", leave=False):
        metrics = evaluate_checkpoint(folder, evaluator)
        if yardstick:
            metrics = with_retrain_ratio(metrics, folder, yardstick)
            write_json(folder / "metrics.json", metrics)
        rows.append({"model": str(folder), **table_row(metrics)})
    return table(rows)


def draw_samples(
    eps_model: EpsModel,
    num: int,
    seed: int,
    schedule: NoiseSchedule,
    evaluator: Evaluator,
    progress: str = "",
) -> Images:
    """`num` images in [-1, 1], on the CPU, by the settings' sampler."""
    return sample_many(
        eps_model,
        num,
        tuple(evaluator.split.remain.shape[1:]),
        schedule,
        evaluator.settings.sampler_steps,
        seed=seed,
        device=evaluator.device,
        sampler=SAMPLERS[evaluator.settings.sampler],
        progress=progress,
    )


def sample_metrics(samples: Images, evaluator: Evaluator) -> Metrics:
    """Share of hits among the samples; FID to the remain and the held-out set, and Inception Score
    of the others.

    None where a figure does not exist: hits without a threshold or of samples that are not finite,
    an Inception Score over a network that knows no classes.
    """
    split, network = evaluator.split, evaluator.network
    hit_frequency = None
    others = samples
    if evaluator.threshold.value is not None and bool(samples.isfinite().all()):
        targets = split.targets.cpu() / 255
        hits = is_hit((samples + 1) / 2, targets, evaluator.threshold.value)
        hit_frequency = hits.double().mean().item()
        others = samples[~hits]
    has_score = network.has_classes and len(others)
    metrics = {
        "hit_frequency": hit_frequency,
        "fid": fid(others.split(500), map(to_float, split.remain.split(500)), network),
        "inception_score": inception_score(others, network) if has_score else None,
    }
    if split.held_out is not None:
        reference = map(to_float, split.held_out.split(500))
        metrics["fid_held_out"] = fid(others.split(500), reference, network)
    return metrics


def evenly_spaced(images: Pixels, num: int) -> UInt8[Tensor, "m c h w"]:
    """`num` of the images, evenly spaced in their order, each once; all if there are no more."""
    num = min(num, len(images))
    return images[torch.arange(num, device=images.device) * len(images) // num]


def nll_metrics(
    model: nn.Module, schedule: NoiseSchedule, evaluator: Evaluator
) -> dict[str, float | None]:
    """Mean bits per dimension of 16 evenly spaced remain, forgotten and held-out images."""
    split = evaluator.split
    remain = evenly_spaced(split.remain, 16)
    nll = {"remain": mean_nll(model, remain, evaluator, schedule), "forget": None}
    if len(split.forget):
        forget = evenly_spaced(split.targets, 16)
        nll["forget"] = mean_nll(model, forget, evaluator, schedule)
    if split.held_out is not None:
        held_out = evenly_spaced(split.held_out, 16)
        nll["held-out"] = mean_nll(model, held_out, evaluator, schedule)
    return nll


def mean_nll(
    model: nn.Module,
    images: Pixels,
    evaluator: Evaluator,
    schedule: NoiseSchedule,
    probes: int = 8,
) -> float | None:
    """Mean bits per dimension, always in float32; None if the model is too broken to have any.

    Fewer images than `probes` are repeated, so that each copy has its own Hutchinson probe.
    """
    copies = math.ceil(probes / len(images))
    images = images.repeat(copies, 1, 1, 1)
    generator = torch.Generator(evaluator.device).manual_seed(evaluator.seed)
    try:
        with full_float32():
            bits = nll_bits_per_dim(
                denoiser(model, bf16=False),
                to_float(images),
                schedule,
                generator,
                rtol=evaluator.nll_tolerance,
                atol=evaluator.nll_tolerance,
                progress="likelihood",
            )
    except NonFiniteError:
        return None
    return bits.mean().item()


@dataclass(frozen=True)
class Injection:
    """What came of forgotten images that were noised to t and denoised.

    Attributes:
        similarity: by t, the mean L2 norm ("l2", pixels in [0, 1]) and cosine of features
            ("cosine") to the original.
        pictures: 16 images by label, the originals first.
    """

    similarity: dict[str, dict[str, float]]
    pictures: dict[str, Pixels]


def inject(
    eps_model: EpsModel,
    evaluator: Evaluator,
    schedule: NoiseSchedule,
    times: Sequence[int] = INJECTION_TIMES,
) -> Injection:
    """Noise forgotten images to each t and denoise from there by DDIM; the same noise for all
    models.

    16 evenly spaced ones; fewer are repeated, so that each has several noises.
    """
    device = evaluator.device
    generator = torch.Generator(device).manual_seed(evaluator.seed)
    targets = to_float(evenly_spaced(evaluator.split.targets, 16))
    x0 = targets[torch.arange(16, device=device) % len(targets)]
    noise = torch.randn(x0.shape, generator=generator, device=device)
    similarity = {}
    pictures = {"forgotten": to_uint8(x0).cpu()}
    for t in times:
        steps = evaluator.settings.sampler_steps
        denoised = inject_and_denoise(eps_model, x0, t, noise, schedule, steps)
        distance, cosine = injection_similarity(x0, denoised, evaluator.network)
        similarity[str(t)] = {"l2": distance.mean().item(), "cosine": cosine.mean().item()}
        pictures[f"from t={t}"] = to_uint8(denoised).cpu()
    return Injection(similarity, pictures)


@dataclass(frozen=True)
class Distance:
    """Mean squared difference per pixel of two denoisers by range of t ("0-199"), in two units.

    Attributes:
        x0: of the x0 that they predict, images in [-1, 1].
        eps: of their outputs.
    """

    x0: dict[str, float]
    eps: dict[str, float]


@torch.no_grad()
def denoiser_distance(
    eps_model: EpsModel,
    other: EpsModel,
    evaluator: Evaluator,
    schedule: NoiseSchedule,
    draws: int = 64,
) -> Distance:
    """Mean over `draws` x_t of the forgotten images per range of t; the same x_t for all models."""
    device = evaluator.device
    generator = torch.Generator(device).manual_seed(evaluator.seed)
    random: dict[str, Any] = {"generator": generator, "device": device}
    targets = to_float(evaluator.split.targets)
    in_x0 = {}
    in_eps = {}
    for low, high in T_RANGES:
        x0 = targets[torch.randint(len(targets), (draws,), **random)]
        t = torch.randint(low, high, (draws,), **random)
        x_t = schedule.q_sample(x0, t, torch.randn(x0.shape, **random))
        distance = eps_distance(eps_model, other, x_t, t)
        in_x0[f"{low}-{high - 1}"] = to_x0_units(distance, t, schedule).mean().item()
        in_eps[f"{low}-{high - 1}"] = distance.mean().item()
    return Distance(in_x0, in_eps)


# --- Held against retrained networks --------------------------------------------------------------


def build_yardstick(retrained: Sequence[Path], evaluator: Evaluator) -> Yardstick:
    """The yardstick of some retrained networks. Prints how well its unit is known, and a warning
    for a network that knows what was to be forgotten.

    Raises:
        InputError: as `load_model`.
    """
    seeded = []
    for folder in retrained:
        if not runs.read_run(folder).get("remain_only"):
            print(f"warning: {folder} does not say that it was trained with --remain-only")
        differing = runs.differing_data(folder, evaluator.data)
        if differing:
            print(
                f"warning: {folder} was trained with another {differing}: it may have seen what is "
                "to be forgotten"
            )
        if not runs.is_from_scratch(folder):
            print(
                f"warning: {folder} was trained with --checkpoint: networks that share a start are "
                "nearer to each other than independent ones"
            )
        seeded.append((folder, runs.initial_seed(folder)))

    def load(folder: Path) -> tuple[EpsModel, NoiseSchedule]:
        model, schedule = load_checkpoint(folder, evaluator)
        return denoiser(model, evaluator.bf16), schedule

    yardstick = Yardstick(evaluator.split, seeded, load, seed=evaluator.seed)
    print(describe_unit(yardstick))
    return yardstick


def describe_unit(yardstick: Yardstick) -> str:
    """How well the unit of the retrain ratios is known."""
    number = len(yardstick.retrained)
    if number < 3:
        return "retrain ratio: how well two networks give its unit cannot be said; train a third"
    errors = yardstick.unit_errors()
    below_700 = [errors[band_name(band)] for band in BANDS[:-1]]
    return (
        f"retrain ratio: its unit, the mean distance of two of {number} retrained networks, has a "
        f"standard error of {min(below_700):.0%} to {max(below_700):.0%}, depending on t"
    )


OF_RETRAINED = ("retrain_ratio", "loss_z")  # the metrics that need retrained networks


def with_retrain_ratio(metrics: Metrics, folder: Path, yardstick: Yardstick) -> Metrics:
    """The metrics, with what `Yardstick.measure` says of the checkpoint."""
    measured = yardstick.measure(folder, runs.initial_seed(folder))
    return nan_to_none({**metrics, "retrain_ratio": measured.ratios, "loss_z": measured.z})


# --- Attacks --------------------------------------------------------------------------------------


def attack_checkpoint(folder: Path, evaluator: Evaluator, out: Path | None = None) -> Metrics:
    """How fast each attacker brings the forgotten images back; whether the loss shows membership.

    Writes attack.json; what was attacked with the same settings is not attacked again.

    Args:
        folder: the checkpoint.
        out: where the file goes; by default into the checkpoint's folder.
    """
    path = (out or folder) / "attack.json"
    key = attack_key(folder, evaluator)
    cached = read_cached(path, key, attack_row)
    if cached:
        return cached
    attack = {**key, "membership": membership(folder, evaluator), "curves": {}}
    for attacker in evaluator.attackers:
        attack["curves"][attacker] = relearn(folder, attacker, evaluator)
    attack = nan_to_none(attack)
    write_json(path, attack)
    return attack


def attack_all(folders: Sequence[Path], evaluator: Evaluator) -> str:
    """Attack checkpoints; returns a table with one row per checkpoint.

    Writes attack.png into the last folder.
    """
    attacks = {str(folder): [attack_checkpoint(folder, evaluator)] for folder in folders}
    draw_attacks(folders[-1] / "attack.png", attacks, reference="")
    return table([{"model": name, **attack_row(attack)} for name, (attack,) in attacks.items()])


def membership(folder: Path, evaluator: Evaluator) -> dict[str, float | None]:
    """Whether the loss tells the forgotten images from look-alikes that no model has seen.

    AUC, and of several forgotten images the true-positive rate at 1% false positives; None for a
    model without finite losses.
    """
    model, schedule = load_checkpoint(folder, evaluator)
    targets = evaluator.split.targets
    device = evaluator.device
    generator = torch.Generator(device).manual_seed(evaluator.seed)
    t = torch.full((evaluator.attack.draws,), evaluator.attack.t, device=device)
    noise = torch.randn((len(t), *targets.shape[1:]), generator=generator, device=device)
    never_seen = augmented(targets, shift=3, gains=(1.0, 0.9))
    eps_model = denoiser(model, evaluator.bf16)
    try:
        auc, tpr = membership_inference(
            eps_model, to_float(targets), to_float(never_seen), t, noise, schedule
        )
    except NonFiniteError:
        return {"auc": None, "tpr_at_1_percent": None}
    several = len(targets) > 1  # the AUC of one member is its rank, and its rate is 0 or 1
    return {"auc": auc, "tpr_at_1_percent": tpr if several else None}


def relearn(folder: Path, attacker: str, evaluator: Evaluator) -> list[dict[str, Any]]:
    """`relearning_curve` of one attacker: by step, hits, injection at t = 250 and NLL."""
    attack = evaluator.attack
    model, schedule = load_checkpoint(folder, evaluator)
    look_alikes = pick_look_alikes(evaluator)

    def measure(eps_model: EpsModel) -> dict[str, Any]:
        injection = inject(eps_model, evaluator, schedule, times=[ATTACK_INJECTION_TIME])
        targets = evenly_spaced(evaluator.split.targets, 16)
        return {
            "hit_frequency": attacked_hit_frequency(eps_model, look_alikes, evaluator, schedule),
            "inject": injection.similarity[str(ATTACK_INJECTION_TIME)]["l2"],
            "nll": mean_nll(model, targets, evaluator, schedule, probes=2),
        }

    return relearning_curve(
        model,
        auxiliary_images(attacker, model, look_alikes, evaluator, schedule),
        measure,
        schedule,
        at=attack.at,
        batch_size=attack.batch_size,
        lr=attack.lr,
        seed=evaluator.seed,
        bf16=evaluator.bf16,
        progress=f"attack on {folder.name}",
    )


def pick_look_alikes(evaluator: Evaluator) -> Pixels:
    """The look-alikes that the attacker "augmented" has: shifted by a pixel, mirrored or not.

    Raises:
        InputError: if the forgotten image does not change when shifted or mirrored.
    """
    copies = augmented(evaluator.split.targets, shift=1)
    if not len(copies):
        raise InputError("--attack: the forgotten image is blank, it has no look-alikes")
    generator = torch.Generator().manual_seed(evaluator.seed)
    order = torch.randperm(len(copies), generator=generator)
    return copies[order[: evaluator.attack.copies]]


def auxiliary_images(
    attacker: str,
    model: nn.Module,
    look_alikes: Pixels,
    evaluator: Evaluator,
    schedule: NoiseSchedule,
) -> UInt8[Tensor, "m c h w"]:
    """What an attacker trains on, on the device; look-alikes are as many as the remain images."""
    remain = evaluator.split.remain
    if attacker == "remain":
        return remain
    if attacker == "augmented":
        copies = math.ceil(len(remain) / len(look_alikes))
        return torch.cat([remain, look_alikes.repeat(copies, 1, 1, 1)])
    samples = draw_samples(
        denoiser(model, evaluator.bf16),
        evaluator.settings.num_samples,
        evaluator.seed + 1,  # not the samples of the evaluation
        schedule,
        evaluator,
    )
    return to_uint8(samples).to(evaluator.device)


def attacked_hit_frequency(
    eps_model: EpsModel, look_alikes: Pixels, evaluator: Evaluator, schedule: NoiseSchedule
) -> float | None:
    """The share of samples that are hits, and closer to a forgotten image than to a look-alike.

    None without a threshold, or if the attack diverged and the samples are not finite.
    """
    if evaluator.threshold.value is None:
        return None
    drawn = draw_samples(eps_model, evaluator.attack.samples, evaluator.seed, schedule, evaluator)
    if not bool(drawn.isfinite().all()):
        return None
    samples = (drawn + 1) / 2
    targets = evaluator.split.targets.cpu() / 255
    to_targets, _ = nearest_reference(samples, targets)
    to_look_alikes, _ = nearest_reference(samples, look_alikes.cpu() / 255)
    hits = is_hit(samples, targets, evaluator.threshold.value) & (to_targets < to_look_alikes)
    return hits.double().mean().item()


# The figures of an attacked model that are drawn, in words.
ATTACK_AXES = {
    "hit_frequency": "share of samples that are hits",
    "inject": f"L2 distance of what comes back\nafter noising to t = {ATTACK_INJECTION_TIME}",
    "nll": "NLL of the forgotten images,\nbits per dimension",
}
_CURVES_PER_PLOT = 6


def draw_attacks(
    path: Path, attacks: Mapping[str, Sequence[Metrics]], reference: str = "retrain"
) -> None:
    """A PNG of what the attackers bring back: per attacker, rows of plots against its steps.

    Args:
        attacks: by label, what attack.json holds of each model; a curve is their mean.
        reference: the label whose models are drawn as a band from their lowest to their highest;
            empty for none.
    """
    labels = [label for label in attacks if label != reference]
    groups = [labels[i : i + _CURVES_PER_PLOT] for i in range(0, len(labels), _CURVES_PER_PLOT)]
    rows = []
    for attacker in next(iter(attacks.values()))[0]["curves"]:
        for group in groups:
            row = []
            for key in ATTACK_AXES:
                curves = {label: attack_curve(attacks[label], attacker, key) for label in group}
                band = None
                if reference in attacks:
                    band = attack_curve(attacks[reference], attacker, key)
                row.append(AttackPlot(ATTACK_AXES[key], curves, band))
            rows.append((f"attacked with: {attacker}", row))
    with atomic(path) as temporary:
        save_attacks(temporary, rows, reference)


def attack_curve(attacks: Sequence[Metrics], attacker: str, key: str) -> AttackCurve:
    """A figure by step of the attack: its mean, lowest and highest over the attacked models."""
    curves = [attack["curves"][attacker] for attack in attacks]
    steps = [point["step"] for point in curves[0]]
    values = []
    for points in zip(*curves, strict=True):  # of one step, one per model
        values.append([none_to_nan(point[key]) for point in points])
    return AttackCurve(
        steps,
        mean=[statistics.fmean(each) for each in values],
        low=[min(each) for each in values],
        high=[max(each) for each in values],
    )

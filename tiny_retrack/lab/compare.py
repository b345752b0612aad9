"""A comparison: unlearn one base with many methods and seeds, evaluate all, and summarise.

Plan (`Comparison`), run (`run_task`), summarise (`summarise`, `write_csv`), draw (`draw`). What
exists already, made with the same settings, is not run again. With several bases, or several images
that are each forgotten alone, there is a part for each, and a report over all.
"""

import csv
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from tqdm import tqdm

from tiny_retrack.data import Split
from tiny_retrack.lab import runs
from tiny_retrack.lab.checkpoint import atomic, fingerprint, load_model, read_tensors, write_json
from tiny_retrack.lab.evaluation import (
    T_RANGES,
    Evaluator,
    Metrics,
    attack_checkpoint,
    attack_row,
    build_yardstick,
    describe,
    draw_attacks,
    evaluate_once,
    metrics_row,
    none_to_nan,
    table_row,
    with_retrain_ratio,
)
from tiny_retrack.lab.intervals import (
    half_width,
    holm,
    means_by_cluster,
    p_value,
    paired_differences,
)
from tiny_retrack.lab.jobs import run_jobs
from tiny_retrack.lab.plots import save_panels, save_pareto, save_ratios, save_rows, table
from tiny_retrack.lab.presets import PRESETS, resolve
from tiny_retrack.lab.pretraining import PretrainPlan, pretrain
from tiny_retrack.lab.spec import BASE, RETRAIN, Spec, method_names
from tiny_retrack.lab.unlearning import (
    UnlearnPlan,
    digest_alternative,
    read_alternative,
    unlearn,
)
from tiny_retrack.lab.yardstick import BANDS, band_name
from tiny_retrack.methods import DiMUM, ReTrack
from tiny_retrack.posterior import MAX_COVARIANCE, check_covariance, check_k
from tiny_retrack.types import InputError, NonFiniteError, Pixels

# 1: lower is better, -1: higher is better. Other columns should be where the retrained model's are.
BETTER = {"hit_frequency": 1, "fid": 1, "inception_score": -1}
BETTER |= {f"ratio t={band_name(band)}": 1 for band in BANDS}
PLOTTED_DISTANCE = f"oracle x0-mse t={T_RANGES[1][0]}-{T_RANGES[1][1] - 1}"
COVARIANCE_TARGETS = ("gaussian", "generalizing")  # ReTrack's, which `check_covariance` bounds
AXES = {  # what pictures call a column
    "hit_frequency": "share of samples that are hits",
    PLOTTED_DISTANCE: PLOTTED_DISTANCE.replace("oracle x0-mse t=", "distance to the oracle, t = "),
    "fid": "FID",
}


# --- Plan -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        bases: the checkpoints that are to forget.
        out: the folder of runs, tables and pictures.
        specs: all models but the bases.
        seeds: of the fine-tunes: one run of each spec per seed.
        curve_every: also evaluate every so many steps of the first seed's runs.
        attack: whether to attack each model.
        jobs: runs at a time.
        forget_each: images, as --forget names them; each is forgotten by models of its own.
        retrained: networks that never saw the forgotten images, trained before.
        command: of `runs.command_line`, for the record.
    """

    bases: Sequence[Path]
    out: Path
    specs: Sequence[Spec]
    seeds: Sequence[int]
    curve_every: int | None = None
    attack: bool = False
    jobs: int = 1
    forget_each: Sequence[str] = ()
    retrained: Sequence[Path] = ()
    command: str | None = None

    @property
    def base(self) -> Path:
        """The base; of several, the first."""
        return self.bases[0]

    def folder(self, spec: Spec, seed: int) -> Path:
        """Where a model is."""
        return self.base if spec == BASE else self.results_folder(spec, seed)

    def results_folder(self, spec: Spec, seed: int) -> Path:
        """Where the results of a model are. Those of the base do not go into its own folder."""
        name = quote(str(spec).replace(":", "_"), safe="=,+%")  # a value may be a path
        return self.out / name / f"seed-{seed}"

    def parts(self) -> list["Comparison"]:
        """The comparisons with one base and at most one image of `forget_each`, in folders of
        their own; itself if it is one of these.
        """
        if len(self.bases) == 1 and not self.forget_each:
            return [self]
        parts = []
        for base, image in itertools.product(self.bases, self.forget_each or [None]):
            out = self.out
            if len(self.bases) > 1:
                out /= self.base_name(base)
            if image is not None:
                out /= f"forget-{quote(image, safe='')}"
            chosen = [] if image is None else [image]
            parts.append(replace(self, bases=[base], out=out, forget_each=chosen))
        return parts

    def base_name(self, base: Path) -> str:
        """How folders and tables call one of the bases."""
        names = [each.name for each in self.bases]
        return base.name if names.count(base.name) == 1 else quote(str(base), safe="")

    def snapshots(self, spec: Spec, seed: int, preset: str) -> list[int]:
        """The steps before the last at which a run is also evaluated."""
        if not self.curve_every or not spec.is_unlearned or seed != self.seeds[0]:
            return []
        settings, _ = spec.configure(preset)
        return [*range(self.curve_every, settings.steps, self.curve_every)]

    def tasks(self) -> list[tuple[Spec, int]]:
        """All (spec, seed); the longest runs first, else one may end alone on one core."""
        longest_first = sorted(self.specs, key=lambda spec: spec != RETRAIN)
        return [(BASE, self.seeds[0]), *itertools.product(longest_first, self.seeds)]


def plan_comparison(comparison: Comparison, data: Mapping[str, Any]) -> Comparison:
    """The comparison with its specs chosen, each once, and checked.

    Without specs all methods are compared, but vdu only if the bases kept checkpoints of their
    training, retrain only if it is trained once and can be (`why_no_retrain`), and no target that
    cannot hold the covariance of such large images.

    Args:
        data: as of `flags.data_settings`.

    Raises:
        InputError: for what cannot be run.
    """
    bases = [*dict.fromkeys(comparison.bases)]
    no_retrain = why_no_retrain(replace(comparison, bases=bases))
    if len(bases) > 1 and not all(map(runs.is_from_scratch, bases)):
        print(
            "warning: bases that were trained with --checkpoint may share a start: intervals over "
            "them take them for independent"
        )
    unkept = [base for base in bases if len([*base.glob("step-*")]) < 2]
    specs = [spec for spec in dict.fromkeys(comparison.specs) if spec != BASE]
    if comparison.specs and not specs:
        raise InputError("--methods base: the base is always evaluated, name a method beside it")
    if not specs:
        left_out = set()
        if unkept:
            left_out.add("vdu")
        if no_retrain or comparison.forget_each:
            left_out.add("retrain")
        if no_retrain and not comparison.retrained:
            print(f"left out: {no_retrain.removeprefix('--methods ')}")
        if data["dataset"] == "folder" and data["channels"] * data["size"] ** 2 > MAX_COVARIANCE:
            left_out |= {f"retrack-{target}" for target in COVARIANCE_TARGETS}
        specs = [Spec(name) for name in method_names() if name not in left_out]
    if RETRAIN in specs and no_retrain:
        raise InputError(no_retrain)
    if unkept and any(spec.method == "vdu" for spec in specs):
        raise InputError(
            f"--methods vdu: {unkept[0]} kept no checkpoints of its training: train with --keep N"
        )
    for spec in specs:
        spec.check(data["preset"])
    return replace(
        comparison,
        bases=bases,
        specs=specs,
        seeds=[*dict.fromkeys(comparison.seeds)],
        forget_each=[*dict.fromkeys(comparison.forget_each)],
    )


def why_no_retrain(comparison: Comparison) -> str:
    """Why the comparison cannot have `retrain` among its methods; empty if it can."""
    if comparison.retrained:
        return "--methods retrain and --retrained exclude each other: give one"
    if len(comparison.bases) > 1:
        return (
            "--methods retrain: with several bases, train the networks once, by train_ddpm.py "
            "--remain-only, and give them as --retrained"
        )
    if not isinstance(runs.read_run(comparison.base).get("train"), dict):
        return (
            f"--methods retrain: {comparison.base} does not say how it was trained, only "
            "train_ddpm.py's do"
        )
    if not runs.is_from_scratch(comparison.base):
        return (
            f"--methods retrain: {comparison.base} was not trained from scratch, but with "
            "--checkpoint; train the networks by train_ddpm.py --remain-only, and give them as "
            "--retrained"
        )
    processes = runs.read_run(comparison.base).get("processes", 1)
    if processes != 1:
        return (
            f"--methods retrain: {comparison.base} was trained by {processes} processes, a "
            "comparison trains by one; train the networks by torchrun and train_ddpm.py "
            "--remain-only, and give them as --retrained"
        )
    return ""


# --- Run ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What came of one run.

    Attributes:
        folder: of the model.
        out: of its results.
        metrics: None if it failed.
        curve: (step, metrics) before the last step, and after it.
        attack: None if it was not attacked.
        failure: why it has no metrics.
        base: the name of the base, where there are several.
        image: which image of `forget_each` the model was to forget.
    """

    spec: Spec
    seed: int
    folder: Path
    out: Path
    metrics: Metrics | None = None
    curve: Sequence[tuple[int, Metrics]] = ()
    attack: Metrics | None = None
    failure: str = ""
    base: str = ""
    image: str = ""


def run_task(comparison: Comparison, evaluator: Evaluator, task: tuple[Spec, int]) -> Result:
    """Make a model, evaluate and attack it, as far as that was not done before."""
    spec, seed = task
    preset = evaluator.data["preset"]
    # Each seed of the fine-tune is also looked at with noise of its own, the same for all methods.
    evaluator = replace(evaluator, seed=evaluator.seed + seed)
    folder, out = comparison.folder(spec, seed), comparison.results_folder(spec, seed)
    snapshots = comparison.snapshots(spec, seed, preset)
    try:
        if spec == RETRAIN:
            retrain(comparison, evaluator, seed)
        elif spec != BASE:
            unlearn_base(comparison, evaluator, spec, seed)
    except NonFiniteError as error:
        return Result(spec, seed, folder, out, failure=str(error))
    metrics = evaluate_once(folder, evaluator, out)
    curve = [(step, evaluate_once(folder / f"step-{step}", evaluator)) for step in snapshots]
    if curve:
        settings, _ = spec.configure(preset)
        curve.append((settings.steps, metrics))
    attack = attack_checkpoint(folder, evaluator, out) if comparison.attack else None
    return Result(spec, seed, folder, out, metrics, curve, attack)


def unlearn_base(comparison: Comparison, evaluator: Evaluator, spec: Spec, seed: int) -> None:
    """Unlearn into the run's folder, unless a run with the same settings is there.

    Raises:
        NonFiniteError: if it diverges.
    """
    folder = comparison.folder(spec, seed)
    settings, method = spec.configure(evaluator.data["preset"])
    snapshots = comparison.snapshots(spec, seed, evaluator.data["preset"])
    run = runs.read_run(folder)
    wanted = {
        "base": fingerprint(comparison.base),
        "unlearn": {**asdict(settings), **asdict(method)},  # pyright: ignore[reportArgumentType]
        "alternative": digest_alternative(method),
        "data": evaluator.data,
        "bf16": evaluator.bf16,
    }
    is_same = all(run.get(name) == value for name, value in wanted.items())
    if is_same and all((folder / f"step-{step}").exists() for step in snapshots):
        return
    plan = UnlearnPlan(
        checkpoint=comparison.base,
        out=folder,
        data=dict(evaluator.data),
        method_name=spec.method_name,
        method=method,
        settings=settings,
        seed=seed,
        device=evaluator.device,
        bf16=evaluator.bf16,
        save_every=comparison.curve_every if snapshots else None,
        command=comparison.command,
        overwrite=True,
    )
    unlearn(plan, evaluator.split)


def retrain(comparison: Comparison, evaluator: Evaluator, seed: int) -> None:
    """Train on the remain set with the base's settings; resume such a run, or skip a finished one.

    Raises:
        NonFiniteError: if it diverges.
    """
    folder = comparison.folder(RETRAIN, seed)
    train = runs.read_run(comparison.base)["train"]
    base, _ = load_model(comparison.base)
    wanted = {
        "train": train,
        "widths": [*base.config.block_out_channels],
        "data": evaluator.data,
        "bf16": evaluator.bf16,
    }
    run = runs.read_run(folder)
    is_same = all(run.get(name) == value for name, value in wanted.items())
    if is_same and is_trained(run):
        return
    preset = PRESETS[evaluator.data["preset"]].train
    plan = PretrainPlan(
        out=folder,
        data=dict(evaluator.data),
        settings=resolve(preset, train),
        unet=base.config,
        remain_only=True,
        seed=seed,
        device=evaluator.device,
        bf16=evaluator.bf16,
        command=comparison.command,
        overwrite=not is_same,
        resume=is_same,
    )
    pretrain(plan, evaluator.split)


def is_trained(run: Mapping[str, Any]) -> bool:
    """Whether the training that a run.json records came to its end."""
    train = run.get("train")
    return isinstance(train, dict) and run.get("step") == train.get("steps")


def compare(
    comparison: Comparison, data: Mapping[str, Any], build: Callable[..., Evaluator]
) -> list[Result]:
    """Run and report. `comparison` comes from `plan_comparison`.

    Args:
        data: as of `flags.data_settings`.
        build: gives the evaluator for data, checkpoints, the folders of results, and a check of the
            data, as of `evaluation.build_evaluator`.

    Raises:
        InputError: if the folder holds something else, or a process is killed; and as `build` and
            `check_data`.
    """
    runs.check_claim(comparison.out)
    parts = comparison.parts()
    results: list[Result] = []
    device = torch.device("cpu")
    for part in parts:
        forget = part.forget_each or data["forget"]
        checkpoints = [*part.bases, *part.retrained]
        outs = [part.out, *part.retrained]
        check = partial(check_data, part, data["preset"])
        evaluator = build({**data, "forget": forget}, checkpoints, outs, check)
        runs.claim_folder(comparison.out)  # not before: what is refused leaves no folder
        done = compare_part(part, evaluator)
        device = evaluator.device
        report(part, done, device)
        if part == comparison:
            return done
        base = comparison.base_name(part.base) if len(comparison.bases) > 1 else ""
        image = part.forget_each[0] if part.forget_each else ""
        for result in done:
            if result.folder not in part.retrained:
                results.append(replace(result, base=base, image=image, curve=()))
            elif part is parts[0]:  # the retrained networks are the same for all parts
                results.append(result)
    print(f"over {len(parts)} parts:")
    report(comparison, results, device)
    return results


def compare_part(comparison: Comparison, evaluator: Evaluator) -> list[Result]:
    """Make and evaluate the models of one base and at most one image."""
    runs.claim_folder(comparison.out)
    describe(evaluator)
    base_run = runs.read_run(comparison.base)
    if "train" in base_run and not is_trained(base_run):
        print(
            f"warning: the training of {comparison.base} was stopped before its end, "
            "train_ddpm.py --resume goes on"
        )
    tasks = comparison.tasks()
    run = partial(run_task, comparison, evaluator)
    log = comparison.out / "jobs.log"
    running = run_jobs(run, tasks, comparison.jobs, evaluator.device, log)
    results = [*tqdm(running, "runs", total=len(tasks), unit="run")]
    results += evaluate_retrained(comparison, evaluator)
    return with_ratios(results, evaluator)


def check_data(comparison: Comparison, preset: str, split: Split) -> None:
    """Raise InputError if the forget set is empty, or for a method that needs more neighbours than
    there are remain images, the covariance of images that are too large, prompts, or an
    alternative image that cannot be read.
    """
    if not len(split.forget):
        raise InputError("nothing to forget: say with --forget what the base is to forget")
    for spec in comparison.specs:
        if spec == RETRAIN:
            continue
        _, method = spec.configure(preset)
        if isinstance(method, ReTrack) and method.target in ("knn", "topk"):
            check_k(method.k, len(split.remain))
        if isinstance(method, ReTrack) and method.target in COVARIANCE_TARGETS:
            check_covariance(split.remain[0].numel())
        if isinstance(method, DiMUM):
            if method.replaces == "prompt":
                raise InputError(f"--methods {spec}: the data set has no prompts")
            read_alternative(method, split)


def evaluate_retrained(comparison: Comparison, evaluator: Evaluator) -> list[Result]:
    """The results of the retrained networks that were given, in their own folders."""
    results = []
    for folder in comparison.retrained:
        seed = runs.recorded_seed(folder)
        metrics = evaluate_once(folder, evaluator)
        attack = attack_checkpoint(folder, evaluator) if comparison.attack else None
        number = comparison.retrained.index(folder) if seed is None else seed
        results.append(Result(RETRAIN, number, folder, folder, metrics, attack=attack))
    return results


def with_ratios(results: Sequence[Result], evaluator: Evaluator) -> list[Result]:
    """The results, with the retrain ratio in their metrics if models were retrained."""
    retrained = [result.folder for result in results if result.spec == RETRAIN and result.metrics]
    if not retrained:
        return [*results]
    if len(retrained) == 1:
        print("warning: no retrain ratio, which takes two retrained networks or more")
        return [*results]
    yardstick = build_yardstick(retrained, evaluator)
    extended = []
    for result in tqdm(results, "retrain ratio", unit="model", leave=False):
        metrics = result.metrics
        if metrics:
            metrics = with_retrain_ratio(metrics, result.folder, yardstick)
        extended.append(replace(result, metrics=metrics))
    return extended


def recorded_data(bases: Sequence[Path]) -> dict[str, Any] | None:
    """The data settings that all bases record.

    Raises:
        InputError: if they do not record the same.
    """
    first = runs.recorded_data(bases[0])
    for base in bases[1:]:
        if runs.recorded_data(base) != first:
            raise InputError(
                f"--base {bases[0]} {base}: they were not trained on the same data, compare them "
                f"one by one"
            )
    return first


def report(comparison: Comparison, results: Sequence[Result], device: torch.device) -> None:
    """Write summary.json, results.csv, table.md and pictures into `comparison.out`; print the
    table.
    """
    by_label = group_by_label(results, [BASE, *comparison.specs, RETRAIN])
    write_csv(comparison.out / "results.csv", by_label)
    text = write_summary(comparison, device, results, by_label)
    print(text)
    draw(comparison, by_label)


# --- Summarise ------------------------------------------------------------------------------------

Results = Mapping[str, Sequence[Result]]  # by label; only those that have metrics


def group_by_label(results: Sequence[Result], specs: Sequence[Spec]) -> dict[str, list[Result]]:
    """The results that have metrics, by their spec's text, in the order of the specs."""
    groups: dict[str, list[Result]] = {}
    for spec in specs:
        group = [result for result in results if result.spec == spec and result.metrics]
        if group:
            groups[str(spec)] = group
    return groups


def rows_of(results: Results) -> dict[str, list[dict[str, Any]]]:
    """`table_row` of each result."""
    rows = {}
    for label, group in results.items():
        rows[label] = [table_row(result.metrics) for result in group if result.metrics]
    return rows


def write_csv(path: Path, results: Results) -> None:
    """One row per model: method, seed, then the columns of `metrics_row`; empty where None.

    Before the seed, the base and the forgotten image if there were several.
    """
    rows = []
    several = {
        name: any(getattr(result, name) for group in results.values() for result in group)
        for name in ("base", "image")
    }
    for label, group in results.items():
        for result in group:
            part = {name: getattr(result, name) for name, is_shown in several.items() if is_shown}
            row = metrics_row(result.metrics or {})
            rows.append({"method": label, **part, "seed": result.seed, **row})
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@dataclass(frozen=True)
class Table:
    """The figures of all models, before they become text.

    Attributes:
        rows: by label, one row per run, all with the same columns.
        clusters: by label, for each run what its chance came from, as of `clusters_of`. Intervals
            and differences are over these.
    """

    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    clusters: Mapping[str, Sequence[str]]

    def columns(self) -> list[str]:
        return list(next(iter(self.rows.values()))[0])

    def values(self, label: str, column: str) -> list[float | None]:
        return [row[column] for row in self.rows[label]]

    def means(self, label: str, column: str) -> dict[str, float]:
        """The mean of each cluster that has a figure."""
        return means_by_cluster(self.values(label, column), self.clusters[label])


def clusters_of(results: Results) -> dict[str, list[str]]:
    """The cluster of each result: its base if there are several, else its image if there are
    several, else its seed.
    """
    clusters = {}
    for label, group in results.items():
        clusters[label] = [result.base or result.image or f"seed {result.seed}" for result in group]
    return clusters


def summarise(figures: Table, count: str = "seeds") -> list[dict[str, str]]:
    """One row per method: mean and half of its 95% interval.

    The best value of a column in BETTER is bold if it differs from every other method's, see
    `leader`. The base and the retrained model are references, and do not compete.

    Args:
        count: the name of the column with the number of runs.
    """
    rows = figures.rows
    summary = {label: {"method": label, count: str(len(group))} for label, group in rows.items()}
    for column in figures.columns():
        best = leader(figures, column) if column in BETTER else None
        for label, row in summary.items():
            text = mean_cell(figures.values(label, column), figures.clusters[label])
            row[column] = f"**{text}**" if label == best else text
    return list(summary.values())


def mean_cell(values: Sequence[float | None], clusters: Sequence[str]) -> str:
    """Mean over the clusters' means, half of its 95% interval, and how many of the values exist if
    not all.
    """
    means = [*means_by_cluster(values, clusters).values()]
    if not means:
        return "-"
    text = f"{statistics.fmean(means):.4g}"
    if len(means) > 1:
        text += f" ± {half_width(means):.2g}"
    known = sum(value is not None for value in values)
    if known < len(values):
        text += f" ({known} of {len(values)})"
    return text


def leader(figures: Table, column: str) -> str | None:
    """The label whose mean is best; None unless it differs from that of every other method by
    p < 0.05: differences are paired by cluster, and Holm's correction is over the other methods.

    Only labels compete whose values all exist.
    """
    means = {}
    for label in figures.rows:
        complete = None not in figures.values(label, column)
        if label not in ("base", "retrain") and complete:
            means[label] = figures.means(label, column)
    if len(means) < 2:
        return None
    best = min(means, key=lambda label: BETTER[column] * statistics.fmean(means[label].values()))
    p_values = {}
    for label in means:
        if label != best:
            p_values[label] = p_value(paired_differences(means[label], means[best]))
    return best if all(p < 0.05 for p in holm(p_values).values()) else None


def differences(figures: Table, reference: str) -> list[dict[str, str]]:
    """One row per method: its mean difference from the reference, half of the 95% interval, and p.

    Differences are paired by cluster; Holm's correction is over the methods of a column. A method
    that shares fewer than two clusters with the reference has no row.
    """
    compared = {}
    for label in figures.rows:
        shared = {*figures.clusters[label]} & {*figures.clusters[reference]}
        if label not in (reference, "base", "retrain") and len(shared) > 1:
            compared[label] = {"method": label}
    for column in figures.columns():
        theirs = figures.means(reference, column)
        paired = {}
        for label in compared:
            paired[label] = paired_differences(figures.means(label, column), theirs)
        adjusted = holm({label: p_value(each) for label, each in paired.items()})
        for label, row in compared.items():
            row[column] = difference_cell(paired[label], adjusted[label])
    return list(compared.values())


def difference_cell(paired: Sequence[float], p: float) -> str:
    if len(paired) < 2:
        return "-"
    return f"{statistics.fmean(paired):+.3g} ± {half_width(paired):.2g} (p {p:.2g})"


def write_summary(
    comparison: Comparison, device: torch.device, results: Sequence[Result], by_label: Results
) -> str:
    """Write summary.json and table.md; returns the text of the latter."""
    count = "runs" if comparison.forget_each or len(comparison.bases) > 1 else "seeds"
    clusters = clusters_of(by_label)
    figures = Table(rows_of(by_label), clusters)
    rows = summarise(figures, count)
    failures = {}
    for run in results:
        if run.failure:
            part = "".join(f", {name}" for name in (run.base, run.image) if name)
            failures[f"{run.spec}, seed {run.seed}{part}"] = run.failure
    text = table(rows)
    reference = str(comparison.specs[0])
    paired = differences(figures, reference) if reference in by_label else []
    if paired:
        text += f"\n\nDifferences from {reference}:\n\n{table(paired)}"
    if comparison.attack:
        attacks = attacks_of(by_label)
        attack_rows = {
            label: [attack_row(attack) for attack in group] for label, group in attacks.items()
        }
        text += f"\n\nAttacked:\n\n{table(summarise(Table(attack_rows, clusters), count))}"
    for run, reason in failures.items():
        text += f"\n\n{run}: {reason}"
    text += "\n"
    summary = {
        "table": rows,
        "differences": {"from": reference, "table": paired},
        "results": {label: [run.metrics for run in group] for label, group in by_label.items()},
        "curves": curves_of(by_label),
        "failures": failures,
        "seeds": [*comparison.seeds],
        "forget_each": [*comparison.forget_each],
        "jobs": comparison.jobs,
        **runs.provenance(device, comparison.command),
    }
    write_json(comparison.out / "summary.json", summary)
    with atomic(comparison.out / "table.md") as path:
        path.write_text(text, encoding="utf-8")
    return text


def attacks_of(results: Results) -> dict[str, list[Metrics]]:
    """What attack.json holds, by label, one per seed."""
    attacks = {}
    for label, group in results.items():
        attacks[label] = [result.attack for result in group if result.attack]
    return attacks


def curves_of(results: Results) -> dict[str, list[tuple[int, Metrics]]]:
    """(step, metrics) of the runs that were evaluated on the way; step 0 is the base."""
    base = results["base"][0].metrics
    curves = {}
    for label, group in results.items():
        for result in group:
            if result.curve and base:
                curves[label] = [(0, base), *result.curve]
    return curves


# --- Draw -----------------------------------------------------------------------------------------


def draw(comparison: Comparison, results: Results) -> None:
    """Forgetting against quality, both against steps, attacks, and a row of samples per method."""
    out = comparison.out
    draw_pareto(out / "pareto_oracle.png", results, PLOTTED_DISTANCE)
    draw_pareto(out / "pareto_hit_frequency.png", results, "hit_frequency")
    curves = curves_of(results)
    if curves:
        draw_curves(out / "curves.png", curves)
    draw_ratios(out / "ratio.png", results)
    if comparison.attack:
        draw_attacks(out / "attack.png", attacks_of(results))
    samples = {label: first_samples(group[0].out) for label, group in results.items()}
    with atomic(out / "samples.png") as path:
        save_rows(path, samples, "the same noise for all")


def draw_pareto(path: Path, results: Results, column: str) -> None:
    """FID against a measure of forgetting, one point per model; no picture where none has both."""
    points: dict[str, list[tuple[float, float]]] = {}
    for label, rows in rows_of(results).items():
        for row in rows:
            if row[column] is not None and row["fid"] is not None:
                points.setdefault(label, []).append((row[column], row["fid"]))
    if not points:
        path.unlink(missing_ok=True)
        return
    with atomic(path) as temporary:
        save_pareto(temporary, points, AXES[column], "FID (lower: better kept)")


def draw_ratios(path: Path, results: Results) -> None:
    """The retrain ratio at the forgotten images by band of t, below 700; no picture without one."""
    rows = rows_of(results)
    bands = [band_name(band) for band in BANDS[:-1]]
    figures = Table(rows, clusters_of(results))
    if f"ratio t={bands[0]}" not in figures.columns():
        path.unlink(missing_ok=True)
        return
    ratios = {}
    for label in rows:
        points = []
        for band in bands:
            means = [*figures.means(label, f"ratio t={band}").values()]
            mean = statistics.fmean(means) if means else math.nan
            points.append((mean, half_width(means) if len(means) > 1 else 0.0))
        ratios[label] = points
    with atomic(path) as temporary:
        save_ratios(temporary, ratios, bands)


def draw_curves(path: Path, curves: Mapping[str, Sequence[tuple[int, Metrics]]]) -> None:
    """Hits, distance to the oracle and FID by unlearning step."""
    panels = {}
    for column, name in AXES.items():
        panels[name] = {}
        for label, points in curves.items():
            steps = [step for step, _ in points]
            values = [none_to_nan(metrics_row(metrics)[column]) for _, metrics in points]
            panels[name][label] = (steps, values)
    log = (AXES[PLOTTED_DISTANCE], AXES["fid"])
    with atomic(path) as temporary:
        save_panels(temporary, panels, "unlearning step", columns=3, log=log)


def first_samples(folder: Path, num: int = 16) -> Pixels:
    """The first samples that `evaluate_checkpoint` drew of a checkpoint."""
    tensors, _ = read_tensors(folder / "samples.safetensors")
    return tensors["samples"][:num]

"""A comparison: unlearn one base with many methods and seeds, evaluate all, and summarise.

Plan (`Comparison`), run (`run_task`), summarise (`summarise`, `write_csv`), draw (`draw`). What
exists already, made with the same settings, is not run again. `compare_each` does this for one
forgotten image after the other.
"""

import csv
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from tqdm import tqdm

from tiny_retrack.lab import runs
from tiny_retrack.lab.checkpoint import atomic, fingerprint, load_model, read_tensors, write_json
from tiny_retrack.lab.evaluation import (
    T_RANGES,
    Evaluator,
    Metrics,
    attack_checkpoint,
    attack_row,
    describe,
    draw_attacks,
    evaluate_once,
    metrics_row,
    none_to_nan,
    read_run,
    retrained_distance,
)
from tiny_retrack.lab.jobs import run_jobs
from tiny_retrack.lab.plots import mean_and_spread, save_panels, save_pareto, save_rows, table
from tiny_retrack.lab.presets import PRESETS, resolve
from tiny_retrack.lab.pretraining import PretrainPlan, pretrain
from tiny_retrack.lab.spec import BASE, RETRAIN, Spec, method_names
from tiny_retrack.lab.unlearning import UnlearnPlan, unlearn
from tiny_retrack.types import InputError, NonFiniteError, Pixels

# 1: lower is better, -1: higher is better. Other columns should be where the retrained model's are.
BETTER = {"hit_frequency": 1, "fid": 1, "inception_score": -1}
BETTER |= {f"retrained x0-mse t={low}-{high - 1}": 1 for low, high in T_RANGES}
PLOTTED_DISTANCE = f"oracle x0-mse t={T_RANGES[1][0]}-{T_RANGES[1][1] - 1}"


# --- Plan -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        base: the checkpoint that is to forget.
        out: the folder of runs, tables and pictures.
        specs: all models but the base.
        seeds: of the fine-tunes: one run of each spec per seed.
        curve_every: also evaluate every so many steps of the first seed's runs.
        attack: whether to attack each model.
        jobs: runs at a time.
        forget_each: images, as --forget names them; each is forgotten by models of its own.
        command: of `runs.command_line`, for the record.
    """

    base: Path
    out: Path
    specs: Sequence[Spec]
    seeds: Sequence[int]
    curve_every: int | None = None
    attack: bool = False
    jobs: int = 1
    forget_each: Sequence[str] = ()
    command: str | None = None

    def folder(self, spec: Spec, seed: int) -> Path:
        """Where a model is."""
        return self.base if spec == BASE else self.results_folder(spec, seed)

    def results_folder(self, spec: Spec, seed: int) -> Path:
        """Where the results of a model are. Those of the base do not go into its own folder."""
        name = quote(str(spec).replace(":", "_"), safe="=,+%")  # a value may be a path
        return self.out / name / f"seed-{seed}"

    def of_image(self, image: str) -> "Comparison":
        """The comparison of the models that forget one image of `forget_each`."""
        out = self.out / f"forget-{quote(image, safe='')}"
        return replace(self, out=out, forget_each=[])

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


def plan_comparison(comparison: Comparison, preset: str) -> Comparison:
    """The comparison with its specs chosen, each once, and checked.

    Without specs all methods are compared, but vdu only if the base kept checkpoints of its
    training, and retrain only if it records how it was trained and is trained once, not for each
    image of `forget_each`.

    Raises:
        InputError: for what cannot be run.
    """
    base = comparison.base
    is_recorded = isinstance(read_run(base).get("train"), dict)
    specs = [spec for spec in dict.fromkeys(comparison.specs) if spec != BASE]
    if not specs:
        left_out = set()
        if len([*base.glob("step-*")]) < 2:
            left_out.add("vdu")
        if not is_recorded or comparison.forget_each:
            left_out.add("retrain")
        specs = [Spec(name) for name in method_names() if name not in left_out]
    if RETRAIN in specs and not is_recorded:
        raise InputError(
            f"--methods retrain: {base} does not say how it was trained, only train_ddpm.py's do"
        )
    for spec in specs:
        spec.check(preset)
    return replace(
        comparison,
        specs=specs,
        seeds=[*dict.fromkeys(comparison.seeds)],
        forget_each=[*dict.fromkeys(comparison.forget_each)],
    )


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
    image: str = ""


def run_task(comparison: Comparison, evaluator: Evaluator, task: tuple[Spec, int]) -> Result:
    """Make a model, evaluate and attack it, as far as that was not done before."""
    spec, seed = task
    preset = evaluator.data["preset"]
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
    run = read_run(folder)
    wanted = {
        "base": fingerprint(comparison.base),
        "unlearn": {**asdict(settings), **asdict(method)},  # pyright: ignore[reportArgumentType]
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
    """Train on the remain set alone, as the base was trained, or go on; unless that is done.

    Raises:
        NonFiniteError: if it diverges.
    """
    folder = comparison.folder(RETRAIN, seed)
    train = read_run(comparison.base)["train"]
    wanted = {"train": train, "data": evaluator.data, "bf16": evaluator.bf16}
    run = read_run(folder)
    is_same = all(run.get(name) == value for name, value in wanted.items())
    if is_same and is_trained(run):
        return
    base, _ = load_model(comparison.base)
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


def compare(comparison: Comparison, evaluator: Evaluator) -> list[Result]:
    """Run and report. `comparison` comes from `plan_comparison`.

    Raises:
        InputError: if the folder holds something else, or a process is killed.
    """
    if not len(evaluator.split.forget):
        raise InputError("nothing to forget: say with --forget what the base is to forget")
    runs.claim_folder(comparison.out)
    describe(evaluator)
    base_run = read_run(comparison.base)
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
    results = with_retrained_distance(results, evaluator)
    report(comparison, results, evaluator.device)
    return results


def compare_each(
    comparison: Comparison, build: Callable[[list[str], Path], Evaluator], device: torch.device
) -> None:
    """`compare` for each image of `forget_each` in a folder of its own; then a report over all.

    Args:
        build: gives the evaluator under which some images are to be forgotten, and whose results go
            into a folder.
        device: of the evaluators.

    Raises:
        InputError: as `compare` and `build`.
    """
    runs.claim_folder(comparison.out)
    results: list[Result] = []
    for image in comparison.forget_each:
        of_image = comparison.of_image(image)
        for result in compare(of_image, build([image], of_image.out)):
            results.append(replace(result, image=image, curve=()))  # curves are of one image each
    print(f"over {len(comparison.forget_each)} images, each forgotten alone:")
    report(comparison, results, device)


def report(comparison: Comparison, results: Sequence[Result], device: torch.device) -> None:
    """Write summary.json, results.csv, table.md and pictures into `comparison.out`; print the
    table.
    """
    by_label = group_by_label(results, [BASE, *comparison.specs])
    write_csv(comparison.out / "results.csv", by_label)
    text = write_summary(comparison, device, results, by_label)
    print(text)
    draw(comparison, by_label)


def with_retrained_distance(results: Sequence[Result], evaluator: Evaluator) -> list[Result]:
    """The results, with "retrained_distance" in their metrics if models were retrained."""
    if not any(result.spec == RETRAIN for result in results):
        return [*results]
    retrained = [result.folder for result in results if result.spec == RETRAIN and result.metrics]
    extended = []
    for result in results:
        metrics = result.metrics
        if metrics:
            distance = retrained_distance(result.folder, retrained, evaluator)
            metrics = {**metrics, "retrained_distance": distance}
        extended.append(replace(result, metrics=metrics))
    return extended


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
    """`metrics_row` of each result."""
    rows = {}
    for label, group in results.items():
        rows[label] = [metrics_row(result.metrics) for result in group if result.metrics]
    return rows


def write_csv(path: Path, results: Results) -> None:
    """One row per model: method, seed, then the columns of `metrics_row`; empty where None.

    Before the seed, the forgotten image if there were several in turn.
    """
    rows = []
    for label, group in results.items():
        for result, row in zip(group, rows_of({label: group})[label], strict=True):
            image = {"image": result.image} if result.image else {}
            rows.append({"method": label, **image, "seed": result.seed, **row})
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def summarise(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], count: str = "seeds"
) -> list[dict[str, str]]:
    """One row per method: mean and standard deviation over its runs.

    The best value of a column in BETTER is bold if it leads the second by more than their spread.
    The base and the retrained model are references, and do not compete.

    Args:
        rows: by label, one row per run, all with the same columns.
        count: the name of the column with the number of runs.
    """
    summary = {label: {"method": label, count: str(len(group))} for label, group in rows.items()}
    for column in next(iter(rows.values()))[0]:
        values = {label: [row[column] for row in group] for label, group in rows.items()}
        best = leader(values, BETTER[column]) if column in BETTER else None
        for label, row in summary.items():
            text = mean_cell(values[label])
            row[column] = f"**{text}**" if label == best else text
    return list(summary.values())


def mean_cell(values: Sequence[float | None]) -> str:
    """Mean and standard deviation of the values that exist, and how many do if not all."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean, spread = mean_and_spread(known)
    text = f"{mean:.4g}"
    if len(known) > 1:
        text += f" ± {spread:.2g}"
    if len(known) < len(values):
        text += f" ({len(known)} of {len(values)})"
    return text


def leader(values: Mapping[str, Sequence[float | None]], sign: int) -> str | None:
    """The label whose mean is best by more than its spread and the second's; None if there is none.

    Only labels compete whose values all exist. A label with one seed has no spread: neither it nor
    a lead over it counts.

    Args:
        sign: 1 if lower is better, -1 if higher is.
    """
    ranked = []
    for label, column in values.items():
        known = [value for value in column if value is not None]
        if label in ("base", "retrain") or not known or len(known) < len(column):
            continue
        mean, spread = mean_and_spread(known)
        ranked.append((sign * mean, label, spread, len(known)))
    if len(ranked) < 2:
        return None
    (first, label, spread, seeds), (second, _, other_spread, other_seeds) = sorted(ranked)[:2]
    has_spread = min(seeds, other_seeds) > 1
    return label if has_spread and second - first > max(spread, other_spread) else None


def write_summary(
    comparison: Comparison, device: torch.device, results: Sequence[Result], by_label: Results
) -> str:
    """Write summary.json and table.md; returns the text of the latter."""
    count = "runs" if comparison.forget_each else "seeds"
    rows = summarise(rows_of(by_label), count)
    failures = {}
    for run in results:
        if run.failure:
            image = f", image {run.image}" if run.image else ""
            failures[f"{run.spec}, seed {run.seed}{image}"] = run.failure
    text = table(rows)
    if comparison.attack:
        attacks = attacks_of(by_label)
        attack_rows = {
            label: [attack_row(attack) for attack in group] for label, group in attacks.items()
        }
        text += f"\n\nAttacked:\n\n{table(summarise(attack_rows, count))}"
    for run, reason in failures.items():
        text += f"\n\n{run}: {reason}"
    text += "\n"
    summary = {
        "table": rows,
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
        xlabel = f"{column} (lower: better forgotten)"
        save_pareto(temporary, points, xlabel, "FID (lower: better kept)")


def draw_curves(path: Path, curves: Mapping[str, Sequence[tuple[int, Metrics]]]) -> None:
    """Hits, distance to the oracle and FID by unlearning step."""
    panels = {}
    for column in ("hit_frequency", PLOTTED_DISTANCE, "fid"):
        panels[column] = {}
        for label, points in curves.items():
            steps = [step for step, _ in points]
            values = [none_to_nan(metrics_row(metrics)[column]) for _, metrics in points]
            panels[column][label] = (steps, values)
    with atomic(path) as temporary:
        save_panels(temporary, panels, "unlearning step", columns=3, log=(PLOTTED_DISTANCE, "fid"))


def first_samples(folder: Path, num: int = 16) -> Pixels:
    """The first samples that `evaluate_checkpoint` drew of a checkpoint."""
    tensors, _ = read_tensors(folder / "samples.safetensors")
    return tensors["samples"][:num]

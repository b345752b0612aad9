"""Comparisons: what is run, and how models are told apart.

In several processes: test_compare_jobs.py.
"""

import csv
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_json
from conftest import TINY_UNET, Script, assert_refused
from PIL import Image
from torch import Tensor

import train_ddpm
from tiny_retrack import NoiseSchedule, UNet, load_model, load_split, save_model
from tiny_retrack.data import Split
from tiny_retrack.lab import compare, evaluation, features, pretraining, runs
from tiny_retrack.lab.checkpoint import fingerprint, write_json, write_tensors
from tiny_retrack.lab.compare import Comparison, Result
from tiny_retrack.lab.evaluation import AttackSettings, Evaluator
from tiny_retrack.lab.hits import HitThreshold
from tiny_retrack.lab.presets import EvalSettings
from tiny_retrack.lab.spec import BASE, RETRAIN, Spec, method_names
from tiny_retrack.lab.yardstick import Yardstick
from tiny_retrack.metrics import Classifier, fit_classifier
from tiny_retrack.types import EpsModel, InputError

RUNS = Path("runs/digits-tshirt")
QUICK = ["--num-samples", "70", "--sampler-steps", "2", "--bf16", "off"]


def one_loss_as_likelihood(
    eps_model: EpsModel,
    x0: Tensor,
    schedule: NoiseSchedule,
    generator: torch.Generator,
    **options: Any,
) -> Tensor:
    """In place of the likelihood's ODE: a figure that depends on the model, from one call of it."""
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.full((len(x0),), 200)
    eps = eps_model(schedule.q_sample(x0, t, noise), t)
    return (eps - noise).square().flatten(1).mean(1).detach()


def blank_samples(
    eps_model: EpsModel, num: int, shape: tuple[int, ...], *_: Any, **__: Any
) -> Tensor:
    """In place of what training draws when it has ended."""
    return torch.zeros(num, *shape)


@pytest.fixture(scope="module", autouse=True)
def _quick(tiny_unets: None) -> Iterator[None]:
    """Attacks of one step, a feature network that is hardly trained, likelihoods without an ODE."""
    build = evaluation.build_evaluator
    attack = AttackSettings(at=(1,), batch_size=4, samples=4, copies=2, draws=2)

    def build_quick(*args: Any, **options: Any) -> Evaluator:
        return replace(build(*args, **options), attack=attack)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "Yardstick", partial(Yardstick, draws=4))
        patch.setattr(evaluation, "build_evaluator", build_quick)
        patch.setattr(features, "fit_classifier", partial(fit_classifier, steps=5))
        patch.setattr(evaluation, "nll_bits_per_dim", one_loss_as_likelihood)
        patch.setattr(pretraining, "sample_many", blank_samples)
        yield


@pytest.fixture(scope="module")
def trained(_quick: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which train_ddpm.py has run for six steps."""
    cwd = tmp_path_factory.mktemp("trained")
    flags = "--steps 6 --batch-size 4 --warmup 2 --bf16 off --widths 6 8"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        train_ddpm.main(flags.split())
    return cwd


def quick_evaluator(data: dict[str, Any], bf16: bool = False) -> Evaluator:
    return Evaluator(
        load_split("digits-tshirt"),
        data=data,
        network=Classifier(1, 10),
        features="untrained",
        settings=EvalSettings(num_samples=4, sampler_steps=2, threshold=0),
        threshold=HitThreshold(5.7, "the data set's own"),
        nll_tolerance=1e-3,
        seed=0,
        device=torch.device("cpu"),
        bf16=bf16,
    )


def width(picture: Path) -> int:
    with Image.open(picture) as image:
        return image.width


# --- Specs ---


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("vanilla", Spec("vanilla")),
        ("retrain", RETRAIN),
        ("base", BASE),
        ("retrack-knn:k=1,lam=0.05", Spec("retrack-knn", (("k", "1"), ("lam", "0.05")))),
        ("siss:batch-size=4,rescale=10%", Spec("siss", (("batch-size", "4"), ("rescale", "10%")))),
        ("dimum:alternative=a=b.png", Spec("dimum", (("alternative", "a=b.png"),))),
    ],
)
def test_spec_round_trips_through_text(text: str, spec: Spec) -> None:
    assert Spec.parse(text) == spec
    assert str(spec) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("retrai", "unknown 'retrai', did you mean 'retrain'"),
        ("retrack", "unknown 'retrack', did you mean 'retrack-"),
        ("", "unknown ''"),
        ("siss:", "write METHOD:SETTING=VALUE"),
        ("siss:lr", "write METHOD:SETTING=VALUE"),
        ("siss:lr=1,,steps=2", "write METHOD:SETTING=VALUE"),
        ("siss:lr=1,lr=2", "lr is given twice"),
    ],
)
def test_spec_refuses_other_text(text: str, says: str) -> None:
    with pytest.raises(InputError, match=f"--methods.*{says}"):
        Spec.parse(text)


def test_spec_configures_method_and_loop() -> None:
    settings, method = Spec.parse("retrack-topk:batch-size=4,k=3").configure("digits-tshirt")
    assert (settings.batch_size, settings.steps) == (4, 200)
    expected = {"target": "topk", "k": 3, "lam": 0.03, "snr_cap": 10_000.0}
    assert vars(method).items() >= expected.items()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vanilla:out=x", "vanilla:out=x: vanilla has no --out"),
        ("vanilla:k=3", "vanilla has no --k"),
        ("siss:lamb=1", "siss has no --lamb"),
        ("siss:steps=0", "--steps 0: must be from 1"),
        ("siss:rescale=much", "rescale much"),
        ("retrack-local:patch=2", "patch = 2: must be an odd number"),
        ("retrack-knn:target=exact", "write the target as retrack-knn"),
        ("retrain:steps=1", "retrain:steps=1: steps cannot be set here"),
        ("base:steps=1", "base:steps=1: steps cannot be set here"),
    ],
)
def test_spec_refuses_what_cannot_be_set(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Spec.parse(text).check("digits-tshirt")


def test_specs_of_different_text_have_different_folders(tmp_path: Path) -> None:
    texts = [
        "siss:rescale=10%",
        "siss:rescale=10",
        "dimum:alternative=a/b",
        "dimum:alternative=a_b",
    ]
    comparison = Comparison([tmp_path / "base"], tmp_path / "out", [], [0])
    folders = [comparison.folder(Spec.parse(text), 1) for text in texts]
    assert len(set(folders)) == 4
    for folder in folders:
        assert folder.parents[1] == tmp_path / "out"
        assert folder.name == "seed-1"
    assert comparison.folder(BASE, 0) == tmp_path / "base"
    assert comparison.results_folder(BASE, 0) == tmp_path / "out/base/seed-0"
    parts = replace(comparison, forget_each=["a/b.png", "a_b.png", "7"]).parts()
    images = [part.out for part in parts]
    assert [part.forget_each for part in parts] == [["a/b.png"], ["a_b.png"], ["7"]]
    assert len(set(images)) == 3
    assert all(out.parent == tmp_path / "out" for out in images)
    assert images[2].name == "forget-7"


def test_parts_are_of_one_base_each_in_folders_of_their_own(tmp_path: Path) -> None:
    one = Comparison([tmp_path / "a"], tmp_path / "out", [], [0])
    assert one.parts() == [one]
    bases = [tmp_path / "a", tmp_path / "b"]
    parts = replace(one, bases=bases, forget_each=["7", "8"]).parts()
    assert [part.bases for part in parts] == [[bases[0]]] * 2 + [[bases[1]]] * 2
    folders = [str(part.out.relative_to(tmp_path / "out")) for part in parts]
    assert folders == ["a/forget-7", "a/forget-8", "b/forget-7", "b/forget-8"]
    same_name = replace(one, bases=[tmp_path / "a/base", tmp_path / "b/base"])
    assert len({part.out for part in same_name.parts()}) == 2


# --- Plan ---

DIGITS = {"dataset": "digits-tshirt", "preset": "digits-tshirt"}


def test_plan_leaves_out_what_the_base_cannot_do(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_model(base, UNet(TINY_UNET), NoiseSchedule.linear())
    comparison = Comparison([base], tmp_path / "out", [], [1, 0, 1])

    def planned() -> set[str]:
        return {str(spec) for spec in compare.plan_comparison(comparison, DIGITS).specs}

    assert planned() == {*method_names()} - {"vdu", "retrain"}
    with pytest.raises(InputError, match="base does not say how it was trained"):
        compare.plan_comparison(replace(comparison, specs=[RETRAIN]), DIGITS)
    for step in (1, 2):
        save_model(base / f"step-{step}", UNet(TINY_UNET), NoiseSchedule.linear())
    write_json(base / "run.json", {"train": {"steps": 2}})
    assert planned() == {*method_names()}
    each = compare.plan_comparison(replace(comparison, forget_each=["3", "3"]), DIGITS)
    assert {str(spec) for spec in each.specs} == {*method_names()} - {"retrain"}
    assert each.forget_each == ["3"]
    assert compare.plan_comparison(comparison, DIGITS).seeds == [1, 0]


def test_plan_leaves_out_what_does_not_fit_the_data_or_several_bases(tmp_path: Path) -> None:
    for name in ("base", "other"):
        save_model(tmp_path / name, UNet(TINY_UNET), NoiseSchedule.linear())
        write_json(tmp_path / name / "run.json", {"train": {"steps": 2}})
    comparison = Comparison([tmp_path / "base"], tmp_path / "out", [], [0])
    folder = {"dataset": "folder", "preset": "small-folder", "size": 64, "channels": 1}
    usual = {*method_names()} - {"vdu"}
    for channels, left_out in ((1, set()), (3, {"retrack-gaussian", "retrack-generalizing"})):
        planned = compare.plan_comparison(comparison, {**folder, "channels": channels})
        assert {str(spec) for spec in planned.specs} == usual - left_out
    several = replace(comparison, bases=[tmp_path / "base", tmp_path / "other"])
    planned = compare.plan_comparison(several, DIGITS)
    assert {str(spec) for spec in planned.specs} == usual - {"retrain"}
    with pytest.raises(InputError, match="with several bases, train the networks once"):
        compare.plan_comparison(replace(several, specs=[RETRAIN]), DIGITS)


def test_plan_takes_each_spec_once_and_starts_with_the_longest(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_json(base / "run.json", {"train": {"steps": 2}})
    specs = [Spec("vanilla"), BASE, RETRAIN, Spec("vanilla")]
    comparison = compare.plan_comparison(Comparison([base], tmp_path, specs, [4, 7]), DIGITS)
    assert comparison.specs == [Spec("vanilla"), RETRAIN]
    tasks = [(str(spec), seed) for spec, seed in comparison.tasks()]
    assert tasks == [("base", 4), ("retrain", 4), ("retrain", 7), ("vanilla", 4), ("vanilla", 7)]


def test_snapshots_are_of_the_first_seeds_unlearning(tmp_path: Path) -> None:
    comparison = Comparison([tmp_path], tmp_path, [], [3, 4], curve_every=50)
    spec = Spec.parse("siss:steps=150")
    assert comparison.snapshots(spec, 3, "digits-tshirt") == [50, 100]
    assert comparison.snapshots(spec, 4, "digits-tshirt") == []
    assert comparison.snapshots(RETRAIN, 3, "digits-tshirt") == []
    assert comparison.snapshots(BASE, 3, "digits-tshirt") == []


# --- Run, through the script ---

QUICK_RUN = "steps=2,batch-size=4"
LABELS = [
    f"vanilla:{QUICK_RUN}",
    f"retrack-topk:{QUICK_RUN},k=3",
    f"neggrad:{QUICK_RUN},lr=1e30",
    "retrain",
]
DIVERGES = LABELS[2]


@pytest.fixture(scope="module")
def compared(trained: Path) -> Path:
    """A comparison with seeds, curves, attacks, and a method that diverges."""
    import evaluate

    flags = ["compare", "--methods", *LABELS, "--seeds", "0", "1", "--curve-every", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        evaluate.main([*flags, "--out", "c", *QUICK, "--attack", "augmented"])
    return trained / "c"


def test_compare_summarises_every_model(compared: Path) -> None:
    summary = json.loads((compared / "summary.json").read_text())
    sizes = {label: len(results) for label, results in summary["results"].items()}
    assert sizes == {"base": 1, LABELS[0]: 2, LABELS[1]: 2, "retrain": 2}
    for result in summary["results"][LABELS[0]]:
        assert list(result["retrain_ratio"]) == ["forgotten", "remain"]
        assert result["retrain_ratio"]["forgotten"]["20-99"] > 0
    for result in summary["results"]["retrain"]:  # two of them: their distance is the unit
        for bands in result["retrain_ratio"].values():
            assert bands == pytest.approx(dict.fromkeys(bands, 1.0))
    assert [row["method"] for row in summary["table"]] == ["base", *LABELS[:2], "retrain"]
    text = (compared / "table.md").read_text()
    assert "ratio t=400-699" in text
    assert "ratio at remain" not in text
    assert "| augmented: hit_frequency |" in text
    for picture in (
        *("pareto_oracle", "pareto_hit_frequency", "curves", "samples", "ratio", "attack"),
    ):
        assert width(compared / f"{picture}.png") > 100


def test_compare_reports_a_run_that_diverges_and_goes_on(compared: Path) -> None:
    summary = json.loads((compared / "summary.json").read_text())
    assert sorted(summary["failures"]) == [f"{DIVERGES}, seed {seed}" for seed in (0, 1)]
    assert f"{DIVERGES}, seed 0: neggrad diverged at step" in (compared / "table.md").read_text()
    assert DIVERGES not in summary["results"]


def test_compare_draws_curves_from_the_base_to_the_last_step(compared: Path) -> None:
    summary = json.loads((compared / "summary.json").read_text())
    assert list(summary["curves"]) == LABELS[:2]
    base = summary["results"]["base"][0]
    for label, points in summary["curves"].items():
        assert [step for step, _ in points] == [0, 1, 2]
        assert points[0][1] == base
        last = summary["results"][label][0]
        assert points[2][1].items() <= last.items()
        assert points[1][1]["weights"] not in (base["weights"], last["weights"])


def test_compare_writes_a_csv_row_per_model(compared: Path) -> None:
    summary = json.loads((compared / "summary.json").read_text())
    with (compared / "results.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [(row["method"], row["seed"]) for row in rows] == [
        *(("base", "0"), (LABELS[0], "0"), (LABELS[0], "1"), (LABELS[1], "0"), (LABELS[1], "1")),
        *(("retrain", "0"), ("retrain", "1")),
    ]
    results = [result for group in summary["results"].values() for result in group]
    for row, result in zip(rows, results, strict=True):
        expected = evaluation.metrics_row(result)
        assert list(row) == ["method", "seed", *expected]
        for name, value in expected.items():
            assert row[name] == ("" if value is None else str(value))


def test_compare_runs_each_spec_with_its_settings(compared: Path, trained: Path) -> None:
    run = json.loads((compared / f"{LABELS[1].replace(':', '_')}/seed-1/run.json").read_text())
    assert (run["method"], run["target"], run["seed"]) == ("retrack", "topk", 1)
    assert run["unlearn"].items() >= {"steps": 2, "batch_size": 4, "k": 3}.items()
    assert not (trained / RUNS / "base/metrics.json").exists()
    assert (compared / "base/seed-0/metrics.json").exists()
    run = json.loads((compared / "retrain/seed-0/run.json").read_text())
    assert (run["remain_only"], run["train"]["steps"], run["widths"]) == (True, 6, [6, 8])
    assert load_model(compared / "retrain/seed-0")[0].config.block_out_channels == (6, 8)


def test_compare_runs_only_what_is_missing_or_changed(
    compared: Path, trained: Path, script: Script
) -> None:
    flags = ["compare", "--methods", *LABELS, "--seeds", "0", "1", "--out", "c"]
    flags += ["--curve-every", "1", *QUICK, "--attack", "augmented"]
    changed = compared / f"{LABELS[1].replace(':', '_')}/seed-1"
    record = (changed / "run.json").read_text()
    base = fingerprint(trained / RUNS / "base")
    (changed / "run.json").write_text(record.replace(base, "0" * len(base)))
    written = {path: path.stat().st_mtime_ns for path in compared.glob("*/seed-*/*.safetensors")}
    assert script("evaluate", *flags, cwd=trained).code == 0
    assert json.loads((changed / "run.json").read_text())["base"] == base
    after = {path: path.stat().st_mtime_ns for path in written}
    assert {path.parent for path in written if after[path] != written[path]} == {changed}


def test_compare_refuses_before_the_work(
    trained: Path, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_features(*_: Any) -> None:
        raise AssertionError("refused only after the feature network was made")

    monkeypatch.setattr(evaluation, "_make_features", make_features)
    save_model(tmp_path / "foreign", UNet(TINY_UNET), NoiseSchedule.linear())
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/a.txt").touch()
    retrain_foreign = ["--base", tmp_path / "foreign", "--methods", "retrain"]
    shutil.copytree(tmp_path / "foreign", tmp_path / "copy")
    for says, flags in {
        "did you mean 'retrain'": ["--methods", "retrai"],
        "--methods base: the base is always evaluated": ["--methods", "base"],
        "vanilla has no --out": ["--methods", "vanilla:out=x"],
        "--steps 0: must be from 1": ["--methods", "vanilla", "siss:steps=0"],
        "foreign does not say how it was trained": retrain_foreign,
        "base kept no checkpoints of its training": ["--methods", "vdu"],
        "k = 5000: must be from 1 to": ["--methods", "retrack-knn:k=5000"],
        "--alternative x.png: neither": ["--methods", "dimum:alternative=x.png"],
        "dimum:replaces=prompt: the data set has no": ["--methods", "dimum:replaces=prompt"],
        "folders hold the same network": ["--retrained", tmp_path / "foreign", tmp_path / "copy"],
        "letters holds a run or other files": ["--out", tmp_path / "letters"],
        "base holds a run or other files": ["--out", trained / RUNS / "base"],
        "a.txt is a file, not a folder": ["--out", tmp_path / "letters/a.txt/out"],
    }.items():
        done = script("evaluate", "compare", "--out", tmp_path / "out", *QUICK, *flags, cwd=trained)
        assert (done.code, says in done.err.splitlines()[-1]) == (2, True), done.err
        assert "sampling" not in done.err
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["a.txt"]


def test_compare_refuses_targets_whose_covariance_is_too_large(tmp_path: Path) -> None:
    images = torch.zeros(12, 3, 40, 40, dtype=torch.uint8)
    split = Split(images, images[:1] + 1, torch.zeros(12, dtype=torch.long))
    for target in ("gaussian", "generalizing"):
        specs = [Spec("vanilla"), Spec(f"retrack-{target}")]
        comparison = Comparison([tmp_path], tmp_path, specs, [0])
        with pytest.raises(InputError, match="images of 4800 numbers: the covariance of more than"):
            compare.check_data(comparison, "small-folder", split)


def test_compare_retrains_anew_for_another_architecture(
    compared: Path, trained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "c/retrain/seed-0"
    shutil.copytree(compared / "retrain/seed-0", folder)
    record = json.loads((folder / "run.json").read_text())
    evaluator = quick_evaluator(record["data"], record["bf16"])
    base = tmp_path / "base"
    for widths, is_new in (("6 8", False), ("8 8", True)):
        flags = f"--steps 6 --batch-size 4 --warmup 2 --bf16 off --widths {widths} --overwrite"
        train_ddpm.main([*flags.split(), "--out", str(base)])
        comparison = Comparison([base], tmp_path / "c", [RETRAIN], [0])
        compare.retrain(comparison, evaluator, 0)
        assert (json.loads((folder / "run.json").read_text()) != record) == is_new
        assert load_model(folder)[0].config.block_out_channels == tuple(map(int, widths.split()))


def stand_in(out: Path, fid: float) -> dict[str, Any]:
    """Metrics that nobody measured; writes the samples that pictures show."""
    pixels = torch.zeros(16, 1, 16, 16, dtype=torch.uint8)
    write_tensors(out / "samples.safetensors", {"samples": pixels}, {})
    figures = {"hit_frequency": 0.5, "fid": fid, "inception_score": 1.0}
    oracle = dict.fromkeys(("0-199", "200-399", "400-999"), 0.5)
    return {**figures, "nll": {}, "injection": None, "oracle_distance": oracle}


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], Path]]:
    """What is run: model, what it is to forget, where to. FID is the last digit of the image."""
    seen = []

    def run(comparison: Comparison, evaluator: Evaluator, task: tuple[Spec, int]) -> Result:
        spec, seed = task
        (image,) = evaluator.data["forget"]
        folder = comparison.folder(spec, seed)
        out = comparison.results_folder(spec, seed)
        seen.append((str(spec), evaluator.data["forget"], out.relative_to(Path.cwd())))
        if spec.method == "siss" and image == "13":
            return Result(spec, seed, folder, out, failure="siss diverged")
        metrics = stand_in(out, float(image[-1]))
        return Result(spec, seed, folder, out, metrics, curve=[(1, metrics)])

    monkeypatch.setattr(compare, "run_task", run)
    return seen


def test_compare_forgets_each_image_alone_and_averages(
    base: Path, tasks: list[tuple[str, list[str], Path]], script: Script
) -> None:
    flags = ["compare", "--base", base, "--out", base.parent / "c", *QUICK]
    methods = ["--methods", "vanilla", "siss:steps=300,batch-size=64"]
    done = script("evaluate", *flags, *methods, "--forget-each", "11", "13", cwd=base.parent)
    assert done.code == 0, done.err
    siss = "siss:steps=300,batch-size=64"
    assert tasks == [
        (label, [image], Path(f"c/forget-{image}", label.replace(":", "_"), "seed-0"))
        for image in ("11", "13")
        for label in ("base", "vanilla", siss)
    ]
    table = (base.parent / "c/table.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:5]] for line in table.splitlines()]
    assert cells[0] == ["method", "runs", "hit_frequency", "fid"]
    assert cells[2] == ["base", "2", "0.5 ± 0", "2 ± 13"]
    assert cells[3] == ["vanilla", "2", "0.5 ± 0", "2 ± 13"]
    assert cells[4] == [siss, "1", "0.5", "1"]
    assert f"{siss}, seed 0, 13: siss diverged" in table
    with (base.parent / "c/results.csv").open(newline="") as file:
        rows = [(row["method"], row["image"], row["seed"]) for row in csv.DictReader(file)]
    assert rows == [
        *(("base", "11", "0"), ("base", "13", "0")),
        *(("vanilla", "11", "0"), ("vanilla", "13", "0"), (siss, "11", "0")),
    ]
    summary = json.loads((base.parent / "c/summary.json").read_text())
    assert (summary["forget_each"], summary["curves"]) == (["11", "13"], {})
    assert summary["command"].startswith("evaluate.py compare --base ")
    one = json.loads((base.parent / "c/forget-13/summary.json").read_text())
    assert one["results"]["vanilla"][0]["fid"] == 3.0
    assert done.out.count("over 2 parts:") == 1
    assert sorted(path.name for path in base.iterdir() if "metrics" in path.name) == []


def test_compare_of_several_bases_reports_over_them(
    base: Path, tasks: list[tuple[str, list[str], Path]], script: Script
) -> None:
    """FID is the last digit of what is forgotten, plus 1 for the second base."""
    other = base.parent / "other"
    shutil.copytree(base, other)
    flags = ["compare", "--base", base, other, "--forget", "13", "--out", base.parent / "c"]
    flags += ["--methods", "vanilla", "--seeds", "0", "1", *QUICK]
    done = script("evaluate", *flags, cwd=base.parent)
    assert done.code == 0, done.err
    assert [(label, folder.parts[-3]) for label, _, folder in tasks] == [
        (label, name) for name in ("base", "other") for label in ("base", "vanilla", "vanilla")
    ]
    with (base.parent / "c/results.csv").open(newline="") as file:
        rows = [(row["method"], row["base"], row["seed"]) for row in csv.DictReader(file)]
    assert rows == [
        *(("base", "base", "0"), ("base", "other", "0")),
        *(("vanilla", name, seed) for name in ("base", "other") for seed in ("0", "1")),
    ]
    summary = json.loads((base.parent / "c/summary.json").read_text())
    assert [row["runs"] for row in summary["table"]] == ["2", "4"]
    assert (base.parent / "c/other/summary.json").exists()


def test_compare_shows_retrained_networks_in_each_part_and_once_over_all(
    base: Path,
    tasks: list[tuple[str, list[str], Path]],
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = base.parent / "other"
    shutil.copytree(base, other)
    networks = [base.parent / "re-4", base.parent / "re-5"]
    for seed, folder in enumerate(networks, 4):
        torch.manual_seed(seed)
        save_model(folder, UNet(TINY_UNET), NoiseSchedule.linear())
        write_json(folder / "run.json", {"seed": seed, "remain_only": True})

    monkeypatch.setattr(compare, "evaluate_once", lambda folder, _: stand_in(folder, 1.0))
    monkeypatch.setattr(compare, "with_ratios", lambda results, _: results)
    flags = ["compare", "--base", base, other, "--forget", "13", "--out", base.parent / "c"]
    flags += ["--methods", "vanilla", "--seeds", "0", "--retrained", *networks, *QUICK]
    done = script("evaluate", *flags, cwd=base.parent)
    assert done.code == 0, done.err
    for folder in ("c", "c/base", "c/other"):
        with (base.parent / folder / "results.csv").open(newline="") as file:
            rows = [row["seed"] for row in csv.DictReader(file) if row["method"] == "retrain"]
        assert rows == ["4", "5"]


def test_compare_goes_by_default_into_the_folder_of_the_bases_data_set(
    base: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[Comparison] = []
    monkeypatch.setattr(compare, "compare", lambda comparison, *_: planned.append(comparison))
    write_json(base / "run.json", {"data": {"dataset": "mnist-tshirt"}})
    flags = ["compare", "--base", base, "--methods", "vanilla"]
    assert script("evaluate", *flags, cwd=base.parent).code == 0
    assert script("evaluate", *flags, "--out", "c", cwd=base.parent).code == 0
    assert [each.out for each in planned] == [Path("runs/mnist-tshirt/compare"), Path("c")]


def test_compare_refuses_bases_of_other_data(base: Path, script: Script) -> None:
    other = base.parent / "other"
    shutil.copytree(base, other)
    write_json(other / "run.json", {"data": {"dataset": "mnist-tshirt"}})
    done = script("evaluate", "compare", "--base", base, other, *QUICK, cwd=base.parent)
    assert_refused(done, "they were not trained on the same data")


def test_compare_refuses_retrain_beside_retrained(base: Path, script: Script) -> None:
    other = base.parent / "other"
    flags = ["compare", "--base", base, "--retrained", base, other, "--methods", "retrain"]
    done = script("evaluate", *flags, cwd=base.parent)
    assert_refused(done, "--methods retrain and --retrained exclude each other")
    done = script("evaluate", "compare", "--base", base, "--retrained", base, cwd=base.parent)
    assert_refused(done, "--retrained: give at least two different")
    done = script("evaluate", *flags[:5], base / ".", cwd=base.parent)
    assert_refused(done, "--retrained: give at least two different")
    done = script("evaluate", *flags[:-2], "--forget-each", "3", cwd=base.parent)
    assert_refused(done, "--retrained: --forget-each needs other")


def test_compare_refuses_to_retrain_a_base_that_started_from_a_checkpoint(
    base: Path, script: Script
) -> None:
    start = {"checkpoint": "elsewhere", "weights": "0123456789abcdef"}
    edit_json(base / "run.json", train={"steps": 1}, start=start)
    done = script("evaluate", "compare", "--base", base, "--methods", "retrain", cwd=base.parent)
    assert_refused(done, "--methods retrain: ", "was not trained from scratch")


def test_compare_refuses_to_retrain_a_base_of_several_processes(base: Path, script: Script) -> None:
    edit_json(base / "run.json", train={"steps": 1}, processes=4)
    done = script("evaluate", "compare", "--base", base, "--methods", "retrain", cwd=base.parent)
    assert_refused(done, "--methods retrain: ", "was trained by 4 processes")


def test_compare_says_what_it_leaves_out_and_which_bases_may_share_a_start(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = base.parent / "other"
    shutil.copytree(base, other)
    edit_json(other / "run.json", start={"checkpoint": "base"})
    data = {"dataset": "digits-tshirt", "preset": "digits-tshirt"}
    asked = Comparison(bases=[base, other], out=base, specs=[], seeds=[0])
    plan = compare.plan_comparison(asked, data)
    assert RETRAIN not in plan.specs
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("warning: bases that were trained with --checkpoint may share a")
    assert said[1].startswith("left out: retrain: with several bases, train the networks once")


def test_compare_unlearns_again_with_another_image_of_the_same_name(base: Path) -> None:
    evaluator = quick_evaluator({"dataset": "digits-tshirt", "preset": "digits-tshirt"})
    picture = base.parent / "alternative.png"
    method = Spec.parse(f"dimum:alternative={picture},steps=1,batch-size=2")
    plan = Comparison(bases=[base], out=base.parent / "c", specs=[method], seeds=[0])
    finished = []
    for grey in (10, 10, 200):
        Image.new("L", (16, 16), grey).save(picture)
        compare.unlearn_base(plan, evaluator, method, 0)
        finished.append((plan.folder(method, 0) / "run.json").stat().st_mtime_ns)
    assert finished[0] == finished[1] < finished[2]


def test_compare_refuses_any_wrong_image_before_the_first(
    base: Path, tasks: list[tuple[str, list[str], Path]], script: Script
) -> None:
    flags = ["compare", "--base", base, "--out", base.parent / "c", *QUICK]
    done = script("evaluate", *flags, "--forget-each", "11", "9999", cwd=base.parent)
    assert_refused(done, "--forget 9999: not an index from 0 to 1891")
    assert tasks == []
    assert not (base.parent / "c").exists()


def test_documented_comparisons_are_understood() -> None:
    """Flags and names of models, in docs/evaluation.md."""
    import evaluate

    text = (Path(__file__).parents[1] / "docs/evaluation.md").read_text(encoding="utf-8")
    text = text.replace("\\\n", " ").replace("$(seq 20000 20009)", "20000 20009")
    commands = re.findall(r"^python evaluate.py compare(.*)$", text, flags=re.MULTILINE)
    assert len(commands) >= 6
    for command in commands:
        args = evaluate.make_compare_parser().parse_args(shlex.split(command, comments=True))
        for spec in args.methods:
            Spec.parse(spec).check(args.dataset or "mnist-tshirt")


def test_compare_refuses_forget_beside_forget_each(base: Path, script: Script) -> None:
    flags = ["compare", "--forget", "1", "--forget-each", "2", "3"]
    done = script("evaluate", *flags, cwd=base.parent)
    assert_refused(done, "--forget and --forget-each exclude each other")


def test_compare_takes_up_runs_that_were_put_into_its_folder(tmp_path: Path) -> None:
    (tmp_path / "runs/retrain/seed-0").mkdir(parents=True)  # such as from another machine
    runs.claim_folder(tmp_path / "runs")


def test_compare_without_a_forget_set_is_refused(tmp_path: Path, script: Script) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.new("L", (16, 16), i).save(tmp_path / f"pictures/{i}.png")
    save_model(tmp_path / "model", UNet(TINY_UNET), NoiseSchedule.linear())
    flags = ["--dataset", "folder", "--data-dir", "pictures", "--size", "16", "--channels", "1"]
    done = script("evaluate", "compare", "--base", "model", *flags, *QUICK, cwd=tmp_path)
    assert (done.code, "nothing to forget: say with --forget" in done.err) == (2, True)
    done = script("evaluate", "model", *flags, *QUICK, "--attack", cwd=tmp_path)
    assert (done.code, "--attack: there is nothing to bring back" in done.err) == (2, True)
    done = script("evaluate", "model", *flags, *QUICK, "--retrained", "a", "b", cwd=tmp_path)
    assert (done.code, "--retrained: say with --forget what the net" in done.err) == (2, True)


# --- Summarise ---


def figures_of_fid(**values: list[float | None]) -> compare.Table:
    """Runs with these FIDs, the first of seed 0 and so on."""
    rows = {}
    clusters = {}
    for label, fids in values.items():
        rows[label] = [{"fid": fid, "nll forget": fid} for fid in fids]
        clusters[label] = [f"seed {seed}" for seed in range(len(fids))]
    return compare.Table(rows, clusters)


def test_summary_shows_intervals_and_marks_only_an_established_lead() -> None:
    # Student's t with 2 degrees of freedom: 4.3027 s / sqrt(3), for s = 0.1.
    rows = compare.summarise(
        figures_of_fid(base=[0.1], a=[1.0, 1.1, 1.2], b=[2.0, 2.1, 2.21], retrain=[0.1, 0.1])
    )
    assert [row["fid"] for row in rows][:2] == ["0.1", "**1.1 ± 0.25**"]
    assert [row["nll forget"] for row in rows][:2] == ["0.1", "1.1 ± 0.25"]
    assert [row["seeds"] for row in rows] == ["1", "3", "3", "2"]
    assert rows[3]["fid"] == "0.1 ± 0"
    close = figures_of_fid(base=[0.1], a=[1.0, 1.1, 1.2], b=[1.1, 1.3, 1.15])
    assert "**" not in str(compare.summarise(close))
    single = figures_of_fid(base=[0.1], a=[1.0], b=[2.0, 2.0])
    assert "**" not in str(compare.summarise(single))  # one run has no interval


def test_clusters_are_bases_else_images_else_seeds(tmp_path: Path) -> None:
    def clusters(**part: str) -> list[str]:
        result = Result(Spec("vanilla"), 7, tmp_path, tmp_path, {}, **part)
        return compare.clusters_of({"vanilla": [result]})["vanilla"]

    assert clusters() == ["seed 7"]
    assert clusters(image="3") == ["3"]
    assert clusters(base="a", image="3") == ["a"]


def test_summary_counts_each_base_once() -> None:
    rows = {"a": [{"fid": fid} for fid in (1.0, 3.0, 4.0)]}
    figures = compare.Table(rows, {"a": ["one", "one", "two"]})
    # Means of the bases 2 and 4: 3, and 12.706 s / sqrt(2) with s = sqrt(2).
    assert compare.summarise(figures)[0]["fid"] == "3 ± 13"


def test_summary_counts_figures_that_do_not_exist() -> None:
    figures = figures_of_fid(base=[0.1], a=[1.0, 2.0, None], b=[9.0, 9.0], c=[None])
    rows = compare.summarise(figures)
    assert [row["fid"] for row in rows] == ["0.1", "1.5 ± 6.4 (2 of 3)", "9 ± 0", "-"]


def test_leader_is_the_highest_where_higher_is_better() -> None:
    values = {"a": [1.0, 1.1, 1.2], "b": [5.0, 5.1, 5.3], "c": [3.0, 3.1, 3.15]}
    rows = {}
    for label, column in values.items():
        rows[label] = [{"fid": value, "inception_score": value} for value in column]
    clusters = {label: ["0", "1", "2"] for label in rows}
    figures = compare.Table(rows, clusters)
    assert compare.leader(figures, "fid") == "a"
    assert compare.leader(figures, "inception_score") == "b"
    alone = compare.Table({"a": rows["a"]}, {"a": clusters["a"]})
    assert compare.leader(alone, "fid") is None


def test_differences_are_paired() -> None:
    """Runs that differ much from seed to seed, and always by the same from each other."""
    figures = figures_of_fid(
        base=[0.5], a=[1.0, 5.0, 9.0], b=[1.5, 5.6, 9.4], c=[1.0], retrain=[1, 2]
    )
    (row,) = compare.differences(figures, "a")
    assert row["method"] == "b"
    assert row["fid"].startswith("+0.5 ± 0.25 (p 0.013")


def test_plots_leave_out_what_has_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = {"fid": 2.0, "inception_score": 1.0, "nll": {}, "injection": None}
    metrics |= {"oracle_distance": {"200-399": 0.5}}

    def result(label: str, **changed: Any) -> list[Result]:
        full = {**metrics, "hit_frequency": 0.25, **changed}
        return [Result(Spec(label), 0, tmp_path, tmp_path, full)]

    results = {"base": result("base"), "vanilla": result("vanilla", fid=None)}
    drawn = {}
    monkeypatch.setattr(
        compare, "save_pareto", lambda path, points, *_: drawn.update(points) or path.touch()
    )
    compare.draw_pareto(tmp_path / "p.png", results, "hit_frequency")
    assert drawn == {"base": [(0.25, 2.0)]}
    compare.draw_pareto(tmp_path / "p.png", results, compare.PLOTTED_DISTANCE)
    assert drawn == {"base": [(0.5, 2.0)]}
    compare.draw_pareto(tmp_path / "p.png", {"base": result("base", fid=None)}, "hit_frequency")
    assert not (tmp_path / "p.png").exists()  # nor is one left that is not of these models


# --- Single checkpoints ---


def test_attack_writes_only_complete_files(
    trained: Path, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "base", load_model(trained / RUNS / "base")[0], NoiseSchedule.linear())
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    renamed = set()
    replace_file = Path.replace

    def recorded(path: Path, target: Path) -> Path:
        renamed.add(Path(target).resolve())
        return replace_file(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", recorded)
        done = script("evaluate", "base", *QUICK, "--attack", cwd=tmp_path)
    assert done.code == 0, done.err
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert {path.name for path in written} >= {"attack.json", "attack.png", "metrics.json"}
    assert written <= renamed  # each came under its name by a rename
    assert "| remain: back at step |" in done.out
    assert "x0-mse: squared distance per pixel" in done.out
    assert width(tmp_path / "base/attack.png") > 100
    attack = json.loads((tmp_path / "base/attack.json").read_text())
    assert list(attack["curves"]) == ["remain", "samples", "augmented"]
    assert [point["step"] for point in attack["curves"]["samples"]] == [0, 1]


def test_newest_checkpoints_are_the_last_unlearned_model_and_its_base(
    trained: Path, tmp_path: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / RUNS, tmp_path / RUNS)
    folder = tmp_path / RUNS
    assert evaluation.newest_checkpoints(folder) == [folder / "base"]
    quick = ["--steps", "1", "--batch-size", "2", "--bf16", "off"]
    assert script("unlearn", *quick, cwd=tmp_path).code == 0
    shutil.move(folder / "base", tmp_path / "elsewhere")
    moved = ["--checkpoint", tmp_path / "elsewhere", "--overwrite"]
    assert script("unlearn", *quick, *moved, cwd=tmp_path).code == 0
    newest = [tmp_path / "elsewhere", folder / "retrack-knn"]
    assert evaluation.newest_checkpoints(folder) == newest
    assert "warning" not in capsys.readouterr().out
    config = load_model(folder / "retrack-knn")[0].config
    save_model(tmp_path / "elsewhere", UNet(config), NoiseSchedule.linear())
    assert evaluation.newest_checkpoints(folder) == newest
    assert "warning: " in capsys.readouterr().out

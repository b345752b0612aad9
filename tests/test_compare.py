"""evaluate.py compare and --attack, through the scripts, on a model of few weights."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import Script
from PIL import Image

import evaluate
import train_ddpm
from tiny_retrack import load_model
from tiny_retrack.checkpoint import fingerprint
from tiny_retrack.metrics import fit_classifier

RUNS = Path("runs/digits-tshirt")
QUICK = ["--num-samples", "70", "--sampler-steps", "2", "--nll-tolerance", "0.1", "--bf16", "off"]


@pytest.fixture(scope="module", autouse=True)
def _quick(tiny_unets: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"at": [1], "batch_size": 4, "samples": 4, "copies": 2, "draws": 2}.items():
            patch.setitem(evaluate.ATTACK, name, value)
        patch.setattr(evaluate, "fit_classifier", partial(fit_classifier, steps=5))
        yield


@pytest.fixture(scope="module")
def trained(_quick: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        train_ddpm.main(["--steps", "6", "--batch-size", "4", "--warmup", "2", "--bf16", "off", "--widths", "6", "8"])
    return cwd


def width(picture: Path) -> int:
    with Image.open(picture) as image:
        return image.width


def test_compare_runs_what_is_missing_and_tells_methods_apart(trained: Path, tmp_path: Path, script: Script) -> None:
    quick = "steps=2,batch-size=4"
    labels = [f"vanilla:{quick}", f"retrack-topk:{quick},k=3", f"neggrad:{quick},lr=1e30", "retrain"]
    flags = ["compare", "--methods", *labels, "--seeds", "0", "1", "--curve-every", "1", "--out", tmp_path / "c"]
    flags += [*QUICK, "--attack", "augmented"]
    done = script("evaluate", *flags, cwd=trained)
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "c/summary.json").read_text())
    assert set(summary["results"]) == {"base", *labels} - {labels[2]}
    assert {key: len(runs) for key, runs in summary["results"].items()} == {
        "base": 1,
        **dict.fromkeys(labels[:2], 2),
        "retrain": 2,
    }
    steps = {label: [step for step, _ in points] for label, points in summary["curves"].items()}
    assert steps == {key: [0, 1, 2] for key in labels[:2]}
    assert summary["curves"][labels[0]][-1][1] == summary["results"][labels[0]][0]
    assert sorted(summary["failures"]) == [f"{labels[2]}, seed {seed}" for seed in (0, 1)]
    assert "neggrad diverged at step" in (tmp_path / "c/table.md").read_text()
    near, far = (dict(summary["results"][label][0]["retrained_distance"]) for label in ("retrain", "base"))
    assert list(near) == list(far) == ["0-199", "200-399", "400-999"]
    assert all(value > 0 for value in [*near.values(), *far.values()])  # of one retrained model to the other
    assert "augmented: hit_frequency" in (tmp_path / "c/table.md").read_text()
    for picture in ("pareto_oracle", "pareto_hit_frequency", "curve_oracle", "curve_fid", "samples", "attack"):
        assert width(tmp_path / f"c/{picture}.png") > 100
    again = json.loads((tmp_path / f"c/{labels[1].replace(':', '_')}/seed-1/run.json").read_text())
    assert (again["method"], again["target"], again["unlearn"]["k"], again["seed"]) == ("retrack", "topk", 3, 1)
    oracle = json.loads((tmp_path / "c/retrain/seed-0/run.json").read_text())
    assert (oracle["remain_only"], oracle["train"]["steps"], oracle["widths"]) == (True, 6, [6, 8])
    assert load_model(tmp_path / "c/retrain/seed-0")[0].config.block_out_channels == (6, 8)

    retrack = tmp_path / f"c/{labels[1].replace(':', '_')}/seed-1"
    before = (retrack / "run.json").read_text()
    (retrack / "run.json").write_text(before.replace(fingerprint(trained / RUNS / "base"), "0" * 16))
    assert script("evaluate", *flags, cwd=trained).code == 0  # made from another base: made again
    assert json.loads((retrack / "run.json").read_text())["base"] == fingerprint(trained / RUNS / "base")

    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("*/seed-*/*.safetensors")}
    assert script("evaluate", *flags, cwd=trained).code == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_attack_of_single_checkpoints(trained: Path, script: Script) -> None:
    done = script("evaluate", RUNS / "base", *QUICK, "--attack", cwd=trained)
    assert done.code == 0, done.err
    assert "remain: back at step" in done.out
    assert width(trained / RUNS / "base/attack.png") > 100
    attack = json.loads((trained / RUNS / "base/attack.json").read_text())
    assert list(attack["curves"]) == ["remain", "samples", "augmented"]
    assert [point["step"] for point in attack["curves"]["samples"]] == [0, 1]
    assert 0 <= attack["membership"]["auc"] <= 1


def test_sweep_reports_each_methods_best(trained: Path, tmp_path: Path, script: Script, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "SWEEP", {"lr": ("1e-5", "1e-4"), "steps": ("1",)})
    flags = ["compare", "--sweep", "--methods", "vanilla:batch-size=4", "--seeds", "0", "--out", tmp_path / "s"]
    done = script("evaluate", *flags, *QUICK, cwd=trained)
    assert done.code == 0, done.err
    everything, best = (tmp_path / "s/table.md").read_text().split("Fewest hits, then lowest FID:")
    assert all(f"vanilla:batch-size=4,lr={lr},steps=1" in everything for lr in ("1e-5", "1e-4"))
    assert best.count("vanilla") == 1


def test_runs_in_parallel_are_those_in_turn(trained: Path, tmp_path: Path, script: Script) -> None:
    """Two processes, each with the thread that the tests have: the same figures to the last bit."""
    labels = ["vanilla:steps=2,batch-size=4", "neggrad:steps=2,batch-size=4,lr=1e30"]
    flags = ["compare", "--methods", *labels, "--seeds", "0", "1", *QUICK]
    summaries = []
    for jobs in ("1", "2"):
        done = script("evaluate", *flags, "--jobs", jobs, "--out", tmp_path / jobs, cwd=trained)
        assert done.code == 0, done.err
        summary = json.loads((tmp_path / jobs / "summary.json").read_text())
        for run in (run for runs in summary["results"].values() for run in runs):
            del run["images_per_s"]
        summaries.append([summary["results"], summary["failures"]])
    assert summaries[0] == summaries[1]
    assert len(summaries[0][0][labels[0]]) == len(summaries[0][1]) == 2
    assert "vanilla" in (tmp_path / "2/jobs.log").read_text()  # whose progress bars would write over each other

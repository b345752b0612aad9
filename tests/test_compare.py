"""evaluate.py compare and --attack, through the scripts, on a model of few weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY_UNET, Script
from PIL import Image

import evaluate
import train_ddpm
from tiny_retrack import NoiseSchedule, UNet, load_model, save_model
from tiny_retrack.lab.checkpoint import fingerprint
from tiny_retrack.lab.presets import PRESETS
from tiny_retrack.metrics import fit_classifier
from tiny_retrack.types import InputError

RUNS = Path("runs/digits-tshirt")
QUICK = ["--num-samples", "70", "--sampler-steps", "2", "--nll-tolerance", "0.1", "--bf16", "off"]


@pytest.fixture(scope="module", autouse=True)
def _quick(tiny_unets: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "at": [1],
            "batch_size": 4,
            "samples": 4,
            "copies": 2,
            "draws": 2,
        }.items():
            patch.setitem(evaluate.ATTACK, name, value)
        patch.setattr(evaluate, "fit_classifier", partial(fit_classifier, steps=5))
        yield


@pytest.fixture(scope="module")
def trained(_quick: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        train_ddpm.main(
            [
                "--steps",
                "6",
                "--batch-size",
                "4",
                "--warmup",
                "2",
                "--bf16",
                "off",
                "--widths",
                "6",
                "8",
            ]
        )
    return cwd


def width(picture: Path) -> int:
    with Image.open(picture) as image:
        return image.width


def test_compare_runs_what_is_missing_and_tells_methods_apart(
    trained: Path, tmp_path: Path, script: Script
) -> None:
    quick = "steps=2,batch-size=4"
    labels = [
        f"vanilla:{quick}",
        f"retrack-topk:{quick},k=3",
        f"neggrad:{quick},lr=1e30",
        "retrain",
    ]
    flags = [
        "compare",
        "--methods",
        *labels,
        "--seeds",
        "0",
        "1",
        "--curve-every",
        "1",
        "--out",
        tmp_path / "c",
    ]
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
    near, far = (
        dict(summary["results"][label][0]["retrained_distance"]) for label in ("retrain", "base")
    )
    assert list(near) == list(far) == ["0-199", "200-399", "400-999"]
    assert all(
        value > 0 for value in [*near.values(), *far.values()]
    )  # of one retrained model to the other
    assert "augmented: hit_frequency" in (tmp_path / "c/table.md").read_text()
    for picture in ("pareto_oracle", "pareto_hit_frequency", "curves", "samples", "attack"):
        assert width(tmp_path / f"c/{picture}.png") > 100
    again = json.loads((tmp_path / f"c/{labels[1].replace(':', '_')}/seed-1/run.json").read_text())
    assert (again["method"], again["target"], again["unlearn"]["k"], again["seed"]) == (
        "retrack",
        "topk",
        3,
        1,
    )
    oracle = json.loads((tmp_path / "c/retrain/seed-0/run.json").read_text())
    assert (oracle["remain_only"], oracle["train"]["steps"], oracle["widths"]) == (True, 6, [6, 8])
    assert load_model(tmp_path / "c/retrain/seed-0")[0].config.block_out_channels == (6, 8)

    retrack = tmp_path / f"c/{labels[1].replace(':', '_')}/seed-1"
    before = (retrack / "run.json").read_text()
    (retrack / "run.json").write_text(
        before.replace(fingerprint(trained / RUNS / "base"), "0" * 16)
    )
    assert script("evaluate", *flags, cwd=trained).code == 0  # made from another base: made again
    assert json.loads((retrack / "run.json").read_text())["base"] == fingerprint(
        trained / RUNS / "base"
    )

    finished = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("*/seed-*/*.safetensors")
    }
    assert script("evaluate", *flags, cwd=trained).code == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_attack_of_single_checkpoints(
    trained: Path, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "base", load_model(trained / RUNS / "base")[0], NoiseSchedule.linear())
    renamed, replace_file, before = (
        set(),
        Path.replace,
        {path for path in tmp_path.rglob("*") if path.is_file()},
    )

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
    assert "remain: back at step" in done.out
    assert width(tmp_path / "base/attack.png") > 100
    attack = json.loads((tmp_path / "base/attack.json").read_text())
    assert list(attack["curves"]) == ["remain", "samples", "augmented"]
    assert [point["step"] for point in attack["curves"]["samples"]] == [0, 1]
    assert 0 <= attack["membership"]["auc"] <= 1


def test_sweep_reports_each_methods_best(
    trained: Path, tmp_path: Path, script: Script, monkeypatch
) -> None:
    monkeypatch.setattr(evaluate, "SWEEP", {"lr": ("1e-5", "1e-4"), "steps": ("1",)})
    flags = [
        "compare",
        "--sweep",
        "--methods",
        "vanilla:batch-size=4",
        "--seeds",
        "0",
        "--out",
        tmp_path / "s",
    ]
    clouds, rows = {}, []
    monkeypatch.setattr(
        evaluate, "save_pareto", lambda path, points, *names: clouds.update(points) or path.touch()
    )
    monkeypatch.setattr(
        evaluate,
        "save_rows",
        lambda path, pictures, title: rows.append([*pictures]) or path.touch(),
    )
    done = script("evaluate", *flags, *QUICK, cwd=trained)
    assert done.code == 0, done.err
    everything, best = (tmp_path / "s/table.md").read_text().split("Fewest hits, then lowest FID:")
    assert all(f"vanilla:batch-size=4,lr={lr},steps=1" in everything for lr in ("1e-5", "1e-4"))
    assert best.count("vanilla") == 1
    assert {method: len(points) for method, points in clouds.items()} == {"base": 1, "vanilla": 2}
    assert [label.partition(":")[0] for label in rows[-1]] == [
        "base",
        "vanilla",
    ]  # of the best setting alone


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
    assert (
        "vanilla" in (tmp_path / "2/jobs.log").read_text()
    )  # whose progress bars would write over each other


def test_what_cannot_be_compared_is_told_before_the_work(
    trained: Path, tmp_path: Path, script: Script
) -> None:
    save_model(tmp_path / "foreign", UNet(TINY_UNET), NoiseSchedule.linear())
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/a.txt").touch()
    for says, flags in {
        "did you mean 'retrain'": ["--methods", "retrai"],
        "vanilla:out=x: out cannot be set here": ["--methods", "vanilla:out=x"],
        "siss:lamb=1: lamb cannot be set here": ["--methods", "siss:lamb=1"],
        "retrain:steps=1: steps cannot be set here": ["--methods", "retrain:steps=1"],
        "--steps 0: must be from 1": ["--methods", "vanilla", "siss:steps=0"],
        "foreign does not say how it was trained": [
            "--base",
            tmp_path / "foreign",
            "--methods",
            "retrain",
        ],
        "letters holds a run or other files": ["--out", tmp_path / "letters"],
        "base holds a run or other files": ["--out", trained / RUNS / "base"],
    }.items():
        done = script("evaluate", "compare", "--out", tmp_path / "out", *QUICK, *flags, cwd=trained)
        assert (done.code, says in done.err.splitlines()[-1]) == (2, True), done.err
        assert "sampling" not in done.err
    assert not (tmp_path / "out").exists()
    (tmp_path / "runs/retrain/seed-0").mkdir(
        parents=True
    )  # made before the comparison, as on a GPU by stages
    evaluate.runs.claim_folder(tmp_path / "runs")
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["a.txt"]


def test_a_published_base_is_compared_without_what_it_cannot_do(
    trained: Path, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "foreign", UNet(TINY_UNET), NoiseSchedule.linear())
    asked = []
    monkeypatch.setattr(evaluate, "run_all", lambda args, tasks: asked.extend(tasks) or [])
    with pytest.raises(StopIteration):  # no results, no table
        script(
            "evaluate",
            "compare",
            "--base",
            tmp_path / "foreign",
            "--out",
            tmp_path / "c",
            *QUICK,
            cwd=trained,
        )
    names = {label for label, _ in asked}
    assert names == {"base", *evaluate.ALL_METHODS} - {"vdu", "retrain"}


def test_figures_are_measured_anew_when_anything_behind_them_changes(
    trained: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(trained / RUNS / "base", tmp_path / "model")
    flags = ["--num-samples", "70", "--sampler-steps", "1", "--nll-tolerance", "0.1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        parser = evaluate.flags.make_parser(None)
        evaluate.add_judge_flags(parser)
        judge = evaluate.make_judge(parser.parse_args(flags), [folder])
    assert not evaluate.known_result(
        folder / "metrics.json", evaluate.setting(folder, judge), evaluate.shown
    )
    before = evaluate.measured(folder, judge)

    def known(judge: evaluate.Judge) -> dict | None:
        return evaluate.known_result(
            folder / "metrics.json", evaluate.setting(folder, judge), evaluate.shown
        )

    assert known(judge) == json.loads((folder / "metrics.json").read_text()) == before
    assert not known(replace(judge, bf16=not judge.bf16))
    assert not known(replace(judge, data={**judge.data, "forget": ["3"]}))
    assert not known(replace(judge, seed=1))
    edited = {name: value for name, value in before.items() if name != "fid"}
    (folder / "metrics.json").write_text(json.dumps(edited))
    assert not known(judge)
    (folder / "metrics.json").write_text(json.dumps(before))
    model, schedule = load_model(folder)
    with torch.no_grad():
        model.conv_in.bias.add_(1)
    save_model(folder, model, schedule)
    assert not known(judge)


def test_an_attack_needs_something_to_bring_back(tmp_path: Path, script: Script) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.new("L", (16, 16), i).save(tmp_path / f"pictures/{i}.png")
    save_model(tmp_path / "model", UNet(TINY_UNET), NoiseSchedule.linear())
    flags = ["--dataset", "folder", "--data-dir", "pictures", "--size", "16", "--channels", "1"]
    done = script("evaluate", "model", *flags, *QUICK, "--attack", cwd=tmp_path)
    assert (done.code, "--attack: there is nothing to bring back" in done.err) == (2, True)


def test_the_default_is_the_last_unlearned_model_and_the_one_it_was_made_from(
    trained: Path, tmp_path: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / RUNS, tmp_path / RUNS)
    assert (
        script("unlearn", "--steps", "1", "--batch-size", "2", "--bf16", "off", cwd=tmp_path).code
        == 0
    )
    shutil.move(tmp_path / RUNS / "base", tmp_path / "elsewhere")
    flags = [
        "--checkpoint",
        tmp_path / "elsewhere",
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--overwrite",
    ]
    assert script("unlearn", *flags, cwd=tmp_path).code == 0
    runs = tmp_path / RUNS
    assert evaluate.default_folders(runs) == [tmp_path / "elsewhere", runs / "retrack-knn"]
    assert "beware" not in capsys.readouterr().out
    save_model(
        tmp_path / "elsewhere",
        UNet(load_model(runs / "retrack-knn")[0].config),
        NoiseSchedule.linear(),
    )
    evaluate.default_folders(runs)
    assert "was not made from what is now in" in capsys.readouterr().out


def test_a_hit_is_scaled_with_the_images(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    parser = evaluate.flags.make_parser(None)
    evaluate.add_judge_flags(parser)
    args = parser.parse_args(["--threshold", "0"])
    judge = evaluate.make_judge(args, [trained / RUNS / "base"])
    assert judge.settings.threshold == pytest.approx(10 * 16 / 28)
    assert [PRESETS[name].evaluate.threshold for name in ("mnist-tshirt", "cifar10", "folder")] == [
        10,
        0,
        0,
    ]


def die(args: Namespace, label: str, seed: int) -> None:
    """A run that the system kills."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_job_that_is_killed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "one_run", die)
    with pytest.raises(InputError, match=r"a job was killed, .* lower --jobs 2"):
        list(evaluate.run_all(Namespace(jobs=2, out=tmp_path), [("vanilla", 0)]))


ORPHANS = """
import os, sys, time
from argparse import Namespace
from pathlib import Path
import evaluate

def sleep(args, label, seed):
    (args.out / str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    evaluate.one_run = sleep
    list(evaluate.run_all(Namespace(jobs=1 + 1, out=Path(sys.argv[1])), [("a", 0), ("b", 0)]))
"""


def is_running(pid: str) -> bool:
    stat = Path("/proc", pid, "stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_jobs_do_not_outlive_their_parent(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(ORPHANS)
    (tmp_path / "out").mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(evaluate.__file__).parent)}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", tmp_path / "out"], env=environment
    )

    def wait_for(what) -> None:
        end = time.monotonic() + 60
        while not what():
            assert time.monotonic() < end
            time.sleep(0.1)

    def jobs() -> list[str]:
        return [path.name for path in (tmp_path / "out").iterdir() if path.name.isdigit()]

    wait_for(jobs)
    parent.terminate()
    assert parent.wait() == -signal.SIGTERM
    wait_for(lambda: not any(map(is_running, jobs())))

"""The benchmarks at tiny sizes: what they time, what they write; and how gpu_session.sh resumes."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import unlearn
from tiny_retrack import NoiseSchedule
from tiny_retrack.lab import flags, runs
from tiny_retrack.lab.presets import UnlearnSettings, configure
from tiny_retrack.lab.spec import method_names
from tiny_retrack.methods import METHODS
from tiny_retrack.posterior import exact_target

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")
SCHEDULE = NoiseSchedule.linear()


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_take_turns_alternates_and_drops_the_first_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    common = importlib.import_module("common")
    order, now = [], 0.0
    cost = {"a": 1.0, "b": 3.0}

    def run(name: str) -> None:
        nonlocal now
        order.append(name)
        now += cost[name] * (
            100 if len(order) <= 2 else len(order)
        )  # slow at first, then ever slower

    monkeypatch.setattr(common.time, "perf_counter", lambda: now)
    seconds = common.take_turns({name: lambda name=name: run(name) for name in cost}, 4, CPU)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b", "b", "a"]
    assert seconds == {"a": [3.0, 6.0, 7.0, 10.0], "b": [12.0, 15.0, 24.0, 27.0]}
    assert common.times_as_fast(seconds["a"], seconds["b"]) == pytest.approx((27 / 10 + 24 / 7) / 2)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux has a peak that can be reset"
)
def test_peak_mib_is_that_of_the_run() -> None:
    common = importlib.import_module("common")
    for size in (64, 16):  # the smaller one second: an old peak must not show
        assert common.peak_mib(lambda size=size: torch.ones(size, 2**18), CPU) == pytest.approx(
            size, rel=0.1, abs=2
        )


@pytest.mark.parametrize(
    ("name", "options", "labels"),
    [
        (
            "bench_unet",
            ["--samples", "2", "--sampler-steps", "2"],
            ["ours, float32", "diffusers, float32"],
        ),
        (
            "bench_methods",
            ["--methods", "siss", "retrack-topk"],
            ["vanilla", "siss", "retrack-topk"],
        ),
    ],
)
def test_benchmark_writes_json_and_prints_its_table_last(
    name: str, options: list[str], labels: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    out = tmp_path / "new/folder.json"
    options = [*options, "--batch-size", "2", "--turns", "1", "--steps", "1"]
    options += ["--bf16", "off", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    runs.run_command(importlib.import_module(name).main)
    found = json.loads(out.read_text())
    assert [row.get("loop") or row["method"] for row in found["rows"]] == labels
    for row in found["rows"]:
        assert row["batch"] == 2
        assert all(value > 0 for value in row.values() if isinstance(value, float))
    yardstick = "diffusers" if name == "bench_unet" else "vanilla"
    ratios = {row.get("loop") or row["method"]: row[f"to {yardstick}"] for row in found["rows"]}
    assert [label for label, ratio in ratios.items() if ratio == 1] == [
        labels[-1 if name == "bench_unet" else 0]
    ]
    assert {"torch", "python"} <= set(found["versions"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[3].strip() for line in lines[-len(labels) :]] == labels


def test_naive_target_equals_the_exact_target() -> None:
    """What the benchmark compares with computes the same."""
    bench = importlib.import_module("bench_posterior")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 1, 3, 3), dtype=torch.uint8, generator=generator)
    x_t = torch.ones(2, 1, 3, 3)
    t = torch.tensor([300, 900])
    exact = exact_target(x_t, t, images, SCHEDULE)
    assert_close(bench.naive_target(x_t, t, images, SCHEDULE), exact)


def test_posterior_benchmark_writes_the_rows_that_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    options = ["--batch-size", "2", "--images", "60", "--naive-images", "40"]
    options += ["--turns", "1", "--steps", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_posterior.py", *options])
    importlib.import_module("bench_posterior").main()
    rows = json.loads(out.read_text())["rows"]
    sizes = [3, 3, 2, 2]  # of the groups, each with a first row that the others are compared with
    assert [row["N"] for row in rows] == [60] * 6 + [40] * 4
    for size in sizes:
        first, *others = rows[:size]
        rows = rows[size:]
        assert first["to the first"] == 1
        for other in others:
            assert other["seconds"] == pytest.approx(first["seconds"] * other["to the first"])
    assert "step, generalizing" in capsys.readouterr().out


@pytest.fixture
def session(tmp_path: Path):
    """gpu_session.sh with a python3 that logs its arguments, writes a file, may fail or hang."""
    fake = tmp_path / "bin/python3"
    fake.parent.mkdir()
    fake.write_text(
        """#!/bin/sh
echo "$*" >>"$NOTES"
case "$*" in
  *method_names*) echo vanilla siss retrain; exit ;;
  *speed/log.jsonl*) echo 77; exit ;;
esac
[ -n "${FAIL:-}" ] && case "$*" in *"$FAIL"*) exit 3 ;; esac
while [ "$1" != --out ] && [ $# -gt 1 ]; do shift; done
case "${2:-}" in ?*.json) touch "$2" ;; ?*) mkdir -p "$2" && touch "$2/state.json" ;; esac
[ -z "${HANG:-}" ] || exec sleep 60
"""
    )
    fake.chmod(0o755)
    for folder in ("mnist/MNIST", "cifar"):
        (tmp_path / folder).mkdir(parents=True)

    def run(*stages: str, **settings: str) -> tuple[int, str, list[str]]:
        notes = tmp_path / "notes"
        notes.write_text("")
        environment = {
            "PATH": f"{fake.parent}:{os.environ['PATH']}",
            "NOTES": str(notes),
            "SESSION": "session",
        }
        environment |= {"MNIST_DIR": "mnist", "CIFAR_DIR": "cifar"} | settings
        command = ["bash", BENCHMARKS / "gpu_session.sh", *stages]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr, notes.read_text().splitlines()

    return run


needs_bash = pytest.mark.skipif(
    not shutil.which("bash") or sys.platform == "win32", reason="a script for bash"
)


def test_session_asks_for_the_method_names_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    text = (BENCHMARKS / "gpu_session.sh").read_text()
    (code,) = re.findall(r"python3 -c '(from tiny_retrack[^']*)'", text)
    exec(code, {})
    assert capsys.readouterr().out.split() == method_names()


def test_session_gives_retrack_only_flags_that_it_has() -> None:
    text = (BENCHMARKS / "gpu_session.sh").read_text()
    settings = re.findall(r"unlearn=\(([^)]*)\)", text)
    assert len(settings) == 2  # the tiny and the published one
    for words in settings:
        args = unlearn.make_parser().parse_args(words.split())
        given = flags.given(args, UnlearnSettings, *METHODS.values())
        loop, _ = configure("folder", "retrack", given)
        assert loop.steps == int(words.split()[1])


@needs_bash
def test_session_does_every_stage_once(session) -> None:
    code, _, calls = session("all")
    assert code == 0
    scripts = [
        word.rpartition("/")[2] for call in calls for word in call.split() if word.endswith(".py")
    ]
    benches = ["bench_unet.py", "bench_methods.py", "bench_posterior.py"]
    trainings = [
        "train_ddpm.py",
        "train_ddpm.py",
        "train_ddpm.py",
    ]  # the first one measures the speed
    cifar = ["train_ddpm.py", "train_ddpm.py", "unlearn.py", "evaluate.py"]
    assert scripts == [
        "test_cuda.py",
        *benches * 3,
        *trainings,
        "evaluate.py",
        *cifar,
    ]  # three layouts
    train, retrain = (call for call in calls if "mnist/" in call and "--steps 77" in call)
    assert "--remain-only" in retrain
    assert "--remain-only" not in train
    for call in calls:  # what train_ddpm.py would refuse: more checkpoints to keep than it saves
        words = call.split()
        if "--keep" in words and "--save-every" in words:
            keep, steps, every = (
                int(words[words.index(flag) + 1]) for flag in ("--keep", "--steps", "--save-every")
            )
            assert keep <= steps // every
    probe = next(call for call in calls if "mnist/base-speed" in call)
    assert "--keep 3" in probe
    assert "--save-every 100" in probe
    (compare,) = (call for call in calls if " compare " in call)
    assert "--methods vanilla siss retrain --seeds 0 --num-samples 10000" in compare
    assert (
        "evaluate.py cifar/base cifar/retrack --" in calls[-2]
    )  # after --forget they would be names of images
    code, said, calls = session("all")
    assert (code, len(calls)) == (0, 1)  # only the last stage, which collects
    assert said.count("done before") == 7


@needs_bash
def test_session_forgets_the_papers_cifar_image_where_the_order_is_known(
    session, tmp_path: Path
) -> None:
    """The papers' image 10000 is 20000 in torchvision's order; pictures do not tell theirs."""
    _, _, calls = session("cifar_train", CIFAR_STEPS="5")
    assert "--dataset folder" in calls[0]
    (tmp_path / "original/cifar-10-batches-py").mkdir(parents=True)
    again = {"CIFAR_STEPS": "5", "CIFAR_DIR": "original", "SESSION": "other"}
    _, _, calls = session("cifar_train", **again)
    assert f"--dataset cifar10 --data-dir {tmp_path}/original --forget 20000" in calls[0]


@needs_bash
def test_session_goes_on_without_data_and_after_failures(session) -> None:
    code, said, calls = session("train", MNIST_DIR="nowhere")
    assert (code, said.count("\n"), calls) == (0, 2, [])  # the stage's name, and what is missing
    code, said, calls = session("all", MNIST_DIR="nowhere", FAIL="bench_methods")
    assert code == 1
    assert "nowhere/MNIST: set MNIST_DIR" in said
    assert said.count("waits for stage train") == 2
    assert "bench: failed (3)" in said
    assert sum("bench_" in call for call in calls) == 2
    assert any("cifar/base" in call for call in calls)
    assert (
        sum("bench_" in call for call in session("bench")[2]) == 8
    )  # all but the one that had ended well


@needs_bash
def test_session_stops_at_the_limit_and_resumes(session) -> None:
    code, said, calls = session("train", STEPS="50", LIMIT="1", HANG="1")
    assert (code, "train: stopped after 1 s" in said, len(calls)) == (1, True, 1)
    assert calls[0].endswith("--steps 50 --out mnist/base --overwrite")
    code, _, calls = session("train", STEPS="50")
    assert code == 0
    assert calls[0].endswith("--steps 50 --out mnist/base --resume")
    assert session("no-such-stage")[0] == 2


@needs_bash
@pytest.mark.skipif(
    "RUN_GPU_SESSION" not in os.environ, reason="takes minutes: RUN_GPU_SESSION=1 pytest"
)
def test_session_at_tiny_sizes_leaves_every_result(tmp_path: Path) -> None:
    environment = os.environ | {"TINY": "1", "SESSION": str(tmp_path)}
    command = ["bash", BENCHMARKS / "gpu_session.sh", "all"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    results = tmp_path / "results"
    rows = json.loads((results / "mnist/compare/summary.json").read_text())["results"]
    assert {"base", "retrain", "vanilla:steps=1,batch-size=4"} <= set(rows)
    for name in (
        "bench_unet_digits-tshirt.json",
        "mnist/compare/table.md",
        "cifar/retrack/before_after.png",
        "machine.txt",
    ):
        assert (results / name).exists()

"""The benchmarks at tiny sizes: what they time, what they write; and how gpu_session.sh goes on."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import evaluate
import train_ddpm
from tiny_retrack import NoiseSchedule, load_model
from tiny_retrack.lab import runs
from tiny_retrack.lab.checkpoint import write_json
from tiny_retrack.lab.presets import PRESETS
from tiny_retrack.lab.spec import Spec
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


def test_flop_of_a_step_are_those_of_its_products() -> None:
    """A convolution: 2 h w c_in c_out k^2 an image, and as much again for each of its gradients."""
    common = importlib.import_module("common")
    convolution = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    x = torch.ones(5, 2, 8, 8, requires_grad=True)
    forward = 2 * 5 * 8 * 8 * 2 * 3 * 3**2
    assert common.count_flop(lambda: convolution(x)) == forward
    assert common.count_flop(lambda: convolution(x).sum().backward()) == 3 * forward


def test_peak_is_known_by_the_cards_name(monkeypatch: pytest.MonkeyPatch) -> None:
    common = importlib.import_module("common")
    cuda = torch.device("cuda")
    names = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4, "NVIDIA T4": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert common.peak_tflops(cuda, bf16=True) == peak
        assert common.peak_tflops(cuda, bf16=False) == (peak and peak / 2)
    assert common.peak_tflops(CPU, bf16=True) is None


def test_json_is_there_after_each_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = importlib.import_module("common")
    out = tmp_path / "rows.json"
    monkeypatch.setattr(
        sys, "argv", ["x", "--cases", "digits-tshirt", "cifar10", "--out", str(out)]
    )

    def measure(case: str, args: object, device: torch.device) -> list[dict[str, object]]:
        if case == "cifar10":
            raise MemoryError
        return [{"layout": case}]

    with pytest.raises(MemoryError):
        common.run_cases(common.make_parser("", "x").parse_args(), measure)
    assert json.loads(out.read_text())["rows"] == [{"layout": "digits-tshirt"}]


def test_compiled_loop_that_fails_is_left_out_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_unets: None
) -> None:
    bench = importlib.import_module("bench_unet")
    images = importlib.import_module("common").random_images("digits-tshirt", CPU)

    def refuse(*_: object, **options: object) -> None:
        raise RuntimeError(f"no {options['mode']}\nand more")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    args = bench.argparse.Namespace(compile=["reduce-overhead"], bf16="off")
    loops, losses = bench.make_loops("digits-tshirt", images, 2, args)
    assert [*loops] == [*losses] == ["ours, float32"]
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == (
        "digits-tshirt: ours, CUDA graphs is left out: RuntimeError: no reduce-overhead"
    )


def write_speeds(path: Path, **speeds: float) -> None:
    """The JSON of bench_unet.py, with images/s by the last word of a loop's name."""
    rows = [
        {"layout": "mnist-tshirt", "loop": f"ours, {name}", "training, images/s": speed}
        for name, speed in speeds.items()
    ]
    write_json(path, {"rows": rows})


def test_steps_fill_the_time_at_the_measured_speed(tmp_path: Path) -> None:
    session = importlib.import_module("session")

    def steps(seconds: float) -> str:
        return session.choose_steps(tmp_path, "mnist-tshirt", 128, seconds)

    assert steps(100) == ""
    write_speeds(tmp_path / "bench_unet.json", float32=640.0, bfloat16=1280.0)
    assert steps(100) == "900"  # of bfloat16, and a tenth less
    assert steps(0) == "1"
    write_speeds(tmp_path / "bench_unet_compiled.json", **{"--compile": 2560.0})
    assert steps(100) == "1440 --compile"  # in the 80 s that are left after tracing
    assert steps(40) == "360"  # it would take half of these


def test_report_holds_trainings_and_models(tmp_path: Path) -> None:
    session = importlib.import_module("session")
    train = {"steps": 50, "batch_size": 8, "accumulate": 2}
    run = {"train": train, "step": 40, "device": "cpu"}
    write_json(tmp_path / "mnist/base/run.json", run)
    log = [{"loss": 40.0 - step, "images_per_s": 2.5} for step in range(20)]
    lines = "\n".join(json.dumps(record) for record in log)
    (tmp_path / "mnist/base/log.jsonl").write_text(lines)
    metrics = {
        "num_samples": 7,
        "sampler": "ddpm",
        "sampler_steps": 50,
        "hit_frequency": 0.25,
        "fid": None,
        "inception_score": 3.0,
        "nll": {"remain": 1.5, "forget": None},
        "injection": None,
    }
    write_json(tmp_path / "mnist/base/metrics.json", metrics)
    shutil.copytree(tmp_path / "mnist", tmp_path / "results/mnist")  # a copy, no other model
    (training,) = session.describe_trainings(tmp_path)
    assert training["steps"] == "40 of 50"
    assert training["images seen"] == 40 * 8 * 2
    assert training["loss"] == 21.5  # the mean of the last two of 20 lines
    (model,) = session.describe_models(tmp_path)
    assert model["model"] == "mnist/base"
    assert (model["sampler"], model["hits"], model["NLL remain"]) == ("ddpm 50", 0.25, 1.5)
    session.write_report(tmp_path, tmp_path / "report.md")
    report = (tmp_path / "report.md").read_text()
    assert "| mnist/base | 40 of 50 |" in report
    assert "| retrained      | 0     | 9.6 | 6.17          |" in report  # the paper's, beside them


def test_halved_weights_load_and_are_half_as_large(base: Path, tmp_path: Path) -> None:
    session = importlib.import_module("session")
    session.halve_weights(base, tmp_path / "half")
    whole, _ = load_model(base)
    half, _ = load_model(tmp_path / "half")
    assert half.config == whole.config
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(a.half().float(), b)
    name = "diffusion_pytorch_model.safetensors"
    sizes = [(folder / name).stat().st_size for folder in (base, tmp_path / "half")]
    assert sizes[1] < 0.75 * sizes[0]  # the header has a size, too


@pytest.fixture
def session(tmp_path: Path):
    """gpu_session.sh with a python3 that logs its arguments, writes a file, may fail or hang."""
    fake = tmp_path / "bin/python3"
    fake.parent.mkdir()
    fake.write_text(
        """#!/bin/sh
echo "$*" >>"$NOTES"
case "$*" in
  *"session.py steps"*) echo 77; exit ;;
  *"session.py report"*) echo report >"$4"; exit ;;
  *"session.py half"*) mkdir -p "$4" && touch "$4/config.json"; exit ;;
esac
[ -n "${FAIL:-}" ] && case "$*" in *"$FAIL"*) exit 3 ;; esac
while [ "$1" != --out ] && [ $# -gt 1 ]; do shift; done
out=${2:-}
case "$out" in ?*.json) touch "$out" ;; ?*) mkdir -p "$out" && touch "$out/state.json" ;; esac
[ "${HANG:-}" != early ] || exec sleep 60
case "$out" in *.json) ;; ?*) touch "$out/run.json" ;; esac
[ "${HANG:-}" != late ] || exec sleep 60
"""
    )
    fake.chmod(0o755)
    for folder in ("mnist/MNIST/raw", "cifar"):
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
        calls = notes.read_text().splitlines()
        return (
            done.returncode,
            done.stdout + done.stderr,
            [c for c in calls if "session.py" not in c],
        )

    return run


needs_bash = pytest.mark.skipif(
    not shutil.which("bash") or sys.platform == "win32", reason="a script for bash"
)
STAGES = [
    "tests",
    "speed",
    "train",
    "unlearn",
    "narrow",
    "cifar",
    "ancestral",
    "seeds",
    "retrain",
    "compile",
]


def script_of(call: str) -> str:
    """The script that a command line runs, without its folder."""
    (path,) = [word for word in call.split() if word.endswith(".py")]
    return path.rpartition("/")[2]


def check_flags(calls: list[str]) -> None:
    """The scripts' own parsers take the flags, and the methods have the settings."""
    for call in calls:
        words = call.split()[1:]
        if script_of(call) == "train_ddpm.py":
            train_ddpm.make_parser().parse_args(words)
        elif words[0] == "compare":
            args = evaluate.make_compare_parser().parse_args(words[1:])
            for text in args.methods:
                Spec.parse(text).check(args.preset or args.dataset)
        elif script_of(call) == "evaluate.py":
            args, folders = evaluate.make_parser("").parse_known_args(words)
            assert (args.sampler, folders) == ("ddpm", ["mnist/base"])


@needs_bash
def test_session_does_every_stage_once_in_order(session) -> None:
    code, said, calls = session("all")
    assert code == 0
    begun = [line.split()[1] for line in said.splitlines() if ", in at most" in line]
    assert [name.strip(",") for name in begun] == STAGES
    scripts = [script_of(call) for call in calls]
    assert {*scripts[:2]} == {"test_cuda.py", "bench_unet.py"}  # at the same time
    assert scripts[2:] == [
        *("bench_unet.py", "bench_posterior.py", "bench_unet.py"),
        *("train_ddpm.py", "evaluate.py"),
        *("train_ddpm.py", "evaluate.py"),  # narrow
        *("train_ddpm.py", "evaluate.py"),  # cifar
        "evaluate.py",  # ancestral
        *("evaluate.py", "evaluate.py"),  # seeds 0 1, seeds 0 1 2
        *("train_ddpm.py", "train_ddpm.py", "evaluate.py"),  # retrain
        "bench_unet.py",
    ]
    trainings = [call for call in calls if script_of(call) == "train_ddpm.py"]
    assert ["--remain-only --seed" in call for call in trainings] == [False] * 3 + [True] * 2
    assert all("--save-every 20" in call and call.endswith("--steps 77") for call in trainings)
    check_flags(calls)
    code, said, calls = session("all")
    assert (code, calls) == (0, [])
    assert said.count("done before") == len(STAGES)


@needs_bash
def test_session_measures_the_layouts_that_it_trains(session) -> None:
    _, _, calls = session("speed")
    common = importlib.import_module("common")
    assert {"mnist-tshirt", "cifar10", "small-mnist"} <= {*common.SIZES} & {*PRESETS}
    assert "--cases mnist-tshirt cifar10 small-mnist" in calls[0]
    assert "--cases mnist-tshirt --compile default reduce-overhead" in calls[2]


@needs_bash
def test_session_unpacks_its_data_and_packs_its_figures(session, tmp_path: Path) -> None:
    for name, member in (("mnist", "MNIST/raw/x"), ("cifar", "cifar-10-batches-py/data_batch_1")):
        (tmp_path / "in" / member).parent.mkdir(parents=True)
        (tmp_path / "in" / member).touch()
        with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as archive:
            archive.add(tmp_path / "in" / Path(member).parts[0], Path(member).parts[0])
    packed = {"MNIST_TAR": "mnist.tar.gz", "CIFAR_TAR": "cifar.tar.gz", "KEEP": "kept"}
    code, _, calls = session("train", "cifar", **packed)
    assert code == 0
    data = tmp_path / "session/data"
    assert f"--dataset mnist-tshirt --data-dir {data}/mnist" in calls[0]
    assert (data / "mnist/MNIST/raw/x").exists()
    # The papers' image 10000 is 20000 in torchvision's order; pictures do not tell theirs.
    assert f"--dataset cifar10 --data-dir {data}/cifar --forget 20000" in calls[1]
    names = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert names == ["base-weights.tar.aa", "results.tar.gz"]
    with tarfile.open(tmp_path / "kept/results.tar.gz") as archive:
        inside = archive.getnames()
    assert {"results/commands.txt", "results/machine.txt", "results/mnist/base/run.json"} <= {
        *inside
    }
    assert not any("data" in name for name in inside)
    _, _, calls = session("cifar", SESSION="other")
    assert f"--dataset folder --data-dir {tmp_path}/cifar --size 32 --forget 10000" in calls[0]


@needs_bash
def test_session_keeps_to_its_budget(session) -> None:
    code, said, calls = session("all", BUDGET="50")
    assert code == 0
    assert "== tests, in at most 38 s" in said  # 12 s are for the report
    for stage in ("speed", "train", "unlearn", "narrow", "cifar"):
        assert f"== {stage}: skipped, as " in said
    assert {script_of(call) for call in calls} == {"test_cuda.py", "bench_unet.py"}


@needs_bash
def test_session_goes_on_without_data_and_after_failures(session) -> None:
    code, said, calls = session("train", "unlearn", MNIST_DIR="nowhere")
    assert (code, calls) == (0, [])
    assert "nowhere/MNIST/raw: set MNIST_DIR or MNIST_TAR" in said
    assert "waits for stage train" in said
    code, said, calls = session("speed", "cifar", FAIL="bench_posterior")
    assert code == 1
    assert "speed: failed (3)" in said
    assert [script_of(call) for call in calls][:2] == ["bench_unet.py", "bench_posterior.py"]
    assert any("cifar/base" in call for call in calls)
    calls = session("speed")[2]
    assert [script_of(call) for call in calls] == ["bench_posterior.py", "bench_unet.py"]


@needs_bash
def test_session_compares_one_by_one_where_several_at_a_time_fail(session) -> None:
    assert session("train")[0] == 0
    code, said, calls = session("unlearn", FAIL="--jobs 3")
    assert code == 0
    assert "--jobs 3 failed (3); again with --jobs 1" in said
    assert [call.split()[-1] for call in calls] == ["3", "1"]


@needs_bash
def test_session_stops_at_the_limit_and_goes_on(session) -> None:
    code, said, calls = session("train", LIMIT_train="4", HANG="early")
    assert (code, "train: stopped after 4 s" in said, len(calls)) == (1, True, 1)
    assert calls[0].endswith("--out mnist/base --overwrite --steps 77")
    code, _, calls = session("train", STEPS="50")
    assert code == 0
    assert calls[0].endswith("--out mnist/base --resume --steps 77")  # chosen once
    assert session("no-such-stage")[0] == 2


@needs_bash
def test_session_takes_a_training_that_saved_at_its_limit(session) -> None:
    code, said, _ = session("train", STEPS="50", LIMIT_train="4", HANG="late")
    assert (code, "is taken as it is" in said) == (0, True)
    code, _, calls = session("train", "unlearn")
    assert code == 0
    assert [script_of(call) for call in calls] == ["evaluate.py"]


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
    assert {"base", "retrain", "siss:steps=2,batch-size=2"} <= set(rows)
    for name in (
        "bench_unet.json",
        "bench_posterior.json",
        "report.md",
        "narrow/compare/table.md",
        "cifar/compare/table.md",
        "machine.txt",
    ):
        assert (results / name).exists()

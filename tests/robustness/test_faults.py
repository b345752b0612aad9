"""Nothing is lost: kills, full disks, folders that hold something, divergence; and the table of
SECURITY.md.

Untrusted inputs: test_untrusted_inputs.py and test_hostile_files.py.
"""

import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forks
import jaxtyping
import pytest
import torch
from checkpoints import WEIGHTS, same_tensors
from conftest import Script, assert_refused, tree
from PIL import Image
from torch import Tensor

import train_ddpm
from tiny_retrack import load_model
from tiny_retrack.lab import datasets, flags, pretraining, runs, unlearning
from tiny_retrack.lab.checkpoint import atomic, load_state, read_json, save_state
from tiny_retrack.lab.plots import save_grid
from tiny_retrack.types import InputError

TRAIN = ["--steps", "6", "--batch-size", "4", "--warmup", "2", "--bf16", "off", "--out", "base"]
UNLEARN = ["--checkpoint", "base", "--batch-size", "2", "--bf16", "off", "--out", "after"]


pytestmark = pytest.mark.usefixtures("tiny_unets")


@pytest.fixture(scope="module")
def _trained_once(tiny_unets: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        train_ddpm.main(TRAIN)
    return cwd


@pytest.fixture
def trained(_trained_once: Path, tmp_path: Path) -> Path:
    """A folder of this test's own in which `python train_ddpm.py` has run with TRAIN."""
    return shutil.copytree(_trained_once, tmp_path / "trained")


def weights(folder: Path) -> dict[str, Tensor]:
    return load_model(folder)[0].state_dict()


# --- Kills


def kill_trainings(whole: Path, killed: Path, kills: int, report: Path) -> None:
    """In a process of its own: train into `whole`. Then train into `killed`, kill it again and
    again while it saves, and write into `report` what each kill left.

    Flushing to the disk takes 10 ms here, so that most of a save is writing.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    os.fsync = lambda handle: time.sleep(0.01)
    loaded = datasets.load_data(flags.DATA_DEFAULTS, download=False)
    datasets.load_data = lambda *_: loaded
    runs.provenance = lambda *_: {}
    pretraining.sample_many = lambda *_, **__: torch.zeros(64, 1, 16, 16)
    settings = ["--steps", "90", "--batch-size", "2", "--warmup", "2", "--bf16", "off"]
    settings += ["--log-every", "1", "--device", "cpu"]  # a fork cannot take up CUDA
    train_ddpm.main([*settings, "--out", str(whole)])

    moments = random.Random(0)
    rows = []
    settings += ["--out", str(killed)]
    for i in range(kills):
        resume = ["--resume"] if i else []
        kill_one([*settings, "--save-every", "1", *resume], moments)
        load_model(killed)
        step = load_state(killed)[1]["step"]
        logged = [record["step"] for record in pretraining.read_log(killed / "log.jsonl", step)]
        told = [read_json(killed / name)["step"] for name in ("state.json", "run.json")]
        rows.append([step, logged == list(range(1, step + 1)), told])
    report.write_text(json.dumps({"rows": rows, "leftovers": len(list(killed.glob(".tmp-*")))}))
    train_ddpm.main([*settings, "--resume"])


def kill_one(settings: list[str], moments: random.Random) -> None:
    """Start a training that saves after each step; kill it at a random moment of a save."""
    listen, tell = os.pipe()
    child = os.fork()
    if not child:
        save = pretraining.Training.save
        durations: list[float] = []

        def telling(training: pretraining.Training, step: int) -> None:
            if len(durations) == 1:  # at the second save, how long the first one took
                os.write(tell, struct.pack("d", durations[0]))
            begun = time.monotonic()
            save(training, step)
            durations.append(time.monotonic() - begun)

        pretraining.Training.save = telling
        train_ddpm.main(settings)
        os._exit(0)
    os.close(tell)
    (duration,) = struct.unpack("d", os.read(listen, 8))
    time.sleep(moments.uniform(0, duration))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    os.close(listen)


def test_training_killed_during_30_saves_ends_as_if_never_killed(tmp_path: Path) -> None:
    kills = 30
    whole, killed, report = (tmp_path / name for name in ("whole", "killed", "report.json"))
    process = forks.start(kill_trainings, whole, killed, kills, report, cwd=tmp_path)
    process.join(timeout=300)
    assert process.exitcode == 0
    rows, leftovers = read_json(report).values()
    assert len(rows) == kills
    for step, log_is_whole, told in rows:
        assert log_is_whole
        assert set(told) <= {step, step - 1}  # what people read is written after the state
    steps = [step for step, *_ in rows]
    assert steps == sorted(set(steps))  # each training continued from the last
    assert leftovers > 0  # some were killed while writing
    assert same_tensors(weights(killed), weights(whole))
    assert same_tensors(load_state(killed)[0], load_state(whole)[0])


def test_outputs_get_their_names_by_a_rename(script: Script, tmp_path: Path, monkeypatch) -> None:
    """All but log.jsonl, which grows and whose last line may be cut, and the empty file that marks
    a run's folder.
    """
    renamed: set[Path] = set()
    replace_file = Path.replace

    def recorded(path: Path, target: Path) -> Path:
        renamed.add(Path(target).resolve())
        return replace_file(path, target)

    monkeypatch.setattr(Path, "replace", recorded)
    assert script("train_ddpm", *TRAIN, "--save-every", "3", cwd=tmp_path).code == 0
    unlearn = [*UNLEARN, "--steps", "3", "--save-every", "1"]
    assert script("unlearn", *unlearn, cwd=tmp_path).code == 0
    written = {path for path in tmp_path.rglob("*") if path.is_file()}
    in_place = {tmp_path / name for name in ("base/.run", "base/log.jsonl", "after/.run")}
    assert written - renamed == in_place
    assert len(written) > 20


# --- A full disk


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """A limit on the size of a file stands in for a full disk: a write stops half-way with an
    OSError.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_full_disk_ends_training_with_one_line(
    share: float, script: Script, tmp_path: Path, small_files, monkeypatch
) -> None:
    """The limit is a share of the model's size, so the second save fails at the model."""
    real_fit = pretraining.fit

    def first_steps(*args: Any, **options: Any) -> Iterator[Any]:
        for done in real_fit(*args, **options):
            if done.step == 4:
                small_files(int(share * (tmp_path / "base" / WEIGHTS).stat().st_size))
            yield done

    monkeypatch.setattr(pretraining, "fit", first_steps)
    done = script("train_ddpm", *TRAIN, "--save-every", "3", cwd=tmp_path)
    assert done.code == 2
    reason = f"{os.strerror(errno.EFBIG)}; what was saved before is intact"
    assert done.err.splitlines()[-1] == f"train_ddpm.py: base/{WEIGHTS}: {reason}"
    assert "Traceback" not in done.err
    load_model(tmp_path / "base")
    assert load_state(tmp_path / "base")[1]["step"] == 3
    assert not list(tmp_path.rglob(".tmp-*"))


def test_full_disk_keeps_the_old_picture(tmp_path: Path, small_files) -> None:
    path = tmp_path / "samples.png"
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    path.write_bytes(b"old")
    small_files(500)
    with pytest.raises(OSError, match=r"samples\.png") as caught, atomic(path) as temporary:
        save_grid(temporary, noise, columns=2)
    assert caught.value.errno == errno.EFBIG
    assert [p.name for p in tmp_path.iterdir()] == ["samples.png"]
    assert path.read_bytes() == b"old"


# --- Folders that hold something


def test_overwrite_keeps_the_old_run_until_the_new_is_saved(
    script: Script, trained: Path, monkeypatch
) -> None:
    before = weights(trained / "base")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for _ in range(2):  # the second must not take the place of the first
        with monkeypatch.context() as patch:
            patch.setattr(pretraining, "fit", killed)
            assert script("train_ddpm", *TRAIN, "--overwrite", cwd=trained).code == 130
        kept = [
            folder for folder in (trained / ".old-base").iterdir() if (folder / WEIGHTS).exists()
        ]
        assert [same_tensors(weights(folder), before) for folder in kept] == [True]
    assert script("train_ddpm", *TRAIN, "--seed", "1", "--overwrite", cwd=trained).code == 0
    assert not same_tensors(weights(trained / "base"), before)
    assert [path.name for path in trained.iterdir()] == ["base"]


def test_unlearn_overwrite_leaves_only_the_new_run(script: Script, trained: Path) -> None:
    for seed in ("0", "1"):
        settings = [*UNLEARN, "--overwrite", "--steps", "1", "--seed", seed]
        assert script("unlearn", *settings, cwd=trained).code == 0
    assert read_json(trained / "after/run.json")["seed"] == 1
    assert sorted(path.name for path in trained.iterdir()) == ["after", "base"]


def checkpoint_of(name: str) -> list[str]:
    return ["--checkpoint", "base"] if name == "unlearn" else []


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["plain", "overwrite"])
def test_foreign_folder_is_never_touched(overwrite: list[str], base: Path, script: Script) -> None:
    home = base.parent / "home"
    (home / "letters").mkdir(parents=True)
    (home / "config.json").write_text("{}")
    before = tree(home)
    for name in ("train_ddpm", "unlearn"):
        done = script(name, "--out", home, *overwrite, *checkpoint_of(name), cwd=base.parent)
        assert_refused(done, "home", "another --out")
    for above in (base.parent, "/"):  # a folder that holds a run is no run
        done = script("train_ddpm", "--out", above, *overwrite, cwd=base.parent)
        assert_refused(done, "another --out")
    assert tree(home) == before


def test_overwrite_refuses_the_checkpoint_and_the_current_folder(
    base: Path, script: Script
) -> None:
    (base / ".run").touch()
    shutil.copytree(base, base / "step-1")
    before = tree(base.parent)
    for checkpoint in ("base", "base/step-1", "base/../base"):
        settings = ["--checkpoint", checkpoint, "--out", "base", "--overwrite"]
        done = script("unlearn", *settings, cwd=base.parent)
        assert_refused(done, "is the checkpoint itself, or holds it")
    for here, out in ((base, "."), (base / "step-1", "..")):
        done = script("train_ddpm", "--out", out, "--overwrite", cwd=here)
        assert_refused(done, "is the current folder, or holds it")
    assert tree(base.parent) == before


def test_unwritable_output_is_refused_before_any_work(
    base: Path, script: Script, monkeypatch
) -> None:
    (base.parent / "file").write_text("in the way")
    before = tree(base.parent)
    for out in ("file", "file/below"):
        for name in ("train_ddpm", "unlearn"):
            done = script(name, "--out", out, *checkpoint_of(name), cwd=base.parent)
            assert_refused(done, "file is a file, not a folder")
    done = script("train_ddpm", "--out", "x" * 300, cwd=base.parent)
    assert_refused(done, "x" * 300, os.strerror(errno.ENAMETOOLONG))
    done = script("train_ddpm", "--overwrite", "--resume", cwd=base.parent)
    assert_refused(done, "exclude each other")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    done = script("train_ddpm", "--out", "new", cwd=base.parent)
    assert_refused(done, "may not be written to")
    assert tree(base.parent) == before


# --- Resuming


def test_resume_names_each_setting_that_differs(script: Script, trained: Path) -> None:
    before = tree(trained)
    changed = ["--resume", "--lr", "0.5", "--seed", "3", "--forget", "7"]
    done = script("train_ddpm", *TRAIN, *changed, cwd=trained)
    assert_refused(done, "forget = [] (now ['7']), lr = 0.001 (now 0.5), seed = 0 (now 3)")
    assert tree(trained) == before


@pytest.mark.parametrize(
    ("tensors", "notes", "says"),
    [
        ({}, {"step": None}, "is not of a training run"),
        ({}, {"step": -1}, "is not of a training run"),
        ({}, {"step": True}, "is not of a training run"),
        ({}, {"run": ["lr"]}, "is not of a training run"),
        ({}, {"extended": 3}, "is not of a training run"),
        ({}, {"run": {"lr": 1, "a": {"b": "\x1b[31m"}}}, "lr = 1 (now 0.001)"),
        ({"model.conv_in.bias": torch.zeros(5)}, {}, "state is of another model"),
        ({"optimizer.999.step": torch.zeros(())}, {}, "state is of another model"),
        ({"more": torch.zeros(1)}, {}, "state is of another model"),
        ({"ema.conv_in.bias": torch.full((4,), torch.nan)}, {}, "NaN"),
    ],
)
def test_resume_refuses_an_untrusted_state(
    tensors: dict, notes: dict, says: str, script: Script, trained: Path
) -> None:
    real, real_notes = load_state(trained / "base")
    save_state(trained / "base", {**real, **tensors}, {**real_notes, **notes})
    before = tree(trained)
    assert_refused(script("train_ddpm", *TRAIN, "--resume", cwd=trained), says)
    assert tree(trained) == before


def test_resume_refuses_an_empty_state(script: Script, trained: Path) -> None:
    _, notes = load_state(trained / "base")
    save_state(trained / "base", {}, notes)
    assert_refused(
        script("train_ddpm", *TRAIN, "--resume", cwd=trained), "state is of another model"
    )


def test_resume_of_a_finished_training_whose_log_is_lost(script: Script, trained: Path) -> None:
    (trained / "base/log.jsonl").write_text("")
    done = script("train_ddpm", *TRAIN, "--resume", cwd=trained)
    assert done.code == 0, done.err


def test_resume_to_more_steps_goes_on_and_records_it(script: Script, trained: Path) -> None:
    more = [*TRAIN, "--resume", "--steps"]
    done = script("train_ddpm", *more, "8", cwd=trained)
    assert done.code == 0, done.err
    said = "was started with steps = 6 (now 8): from step 6 on, the learning rate is that of the"
    assert said in done.err
    run = read_json(trained / "base/run.json")
    assert (run["step"], run["train"]["steps"]) == (8, 8)
    assert [(was["step"], was["steps"]) for was in run["extended"]] == [(6, 6)]
    log = pretraining.read_log(trained / "base/log.jsonl", 8)
    assert [record["step"] for record in log] == [6, 8]
    assert 0 < log[-1]["lr"] < 1e-3
    # Twice, the second time with another warm-up; not to fewer steps.
    assert script("train_ddpm", *more, "9", "--warmup", "3", cwd=trained).code == 0
    run = read_json(trained / "base/run.json")
    assert [(was["step"], was["steps"]) for was in run["extended"]] == [(6, 6), (8, 8)]
    done = script("train_ddpm", *more, "7", "--warmup", "3", cwd=trained)
    assert_refused(done, "was started with steps = 9 (now 7)")


def test_resume_to_more_steps_with_kept_checkpoints_is_refused(
    script: Script, tmp_path: Path
) -> None:
    """They are to be the last ones of the whole training."""
    keep = [*TRAIN, "--save-every", "2", "--keep", "2"]
    assert script("train_ddpm", *keep, cwd=tmp_path).code == 0
    before = tree(tmp_path)
    done = script("train_ddpm", *keep, "--resume", "--steps", "8", cwd=tmp_path)
    assert_refused(done, "steps = 6 (now 8)", "without --keep")
    assert tree(tmp_path) == before


def test_damaged_log_is_read_up_to_the_damage(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    one, two = (
        {"step": step, "loss": 0.5, "grad_norm": 1.0, "lr": 0.1, "images_per_s": 9.0}
        for step in (1, 2)
    )
    intact = (json.dumps(one) + "\n" + json.dumps(two) + "\n").encode()
    log.write_bytes(intact + b'{"st')
    assert pretraining.read_log(log, 5) == [one, two]
    log.write_bytes(intact + b'{"st\xff\n{"step": 3}\n')
    assert pretraining.read_log(log, 1) == [one]
    for line in (b"5", b'{"step": 3}', b'{"step": "x", "loss": 0.5, "images_per_s": 9.0}', b"[]"):
        log.write_bytes(intact + line + b"\n")
        assert pretraining.read_log(log, 5) == [one, two]


# --- Divergence


def test_training_that_diverges_names_the_last_good_checkpoint(
    script: Script, tmp_path: Path, monkeypatch
) -> None:
    calls: list[None] = []
    loss = pretraining.ddpm_loss

    def nan_at_step_5(*args: Any) -> Tensor:
        calls.append(None)
        return loss(*args) * (torch.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(pretraining, "ddpm_loss", nan_at_step_5)
    done = script("train_ddpm", *TRAIN, "--save-every", "2", "--log-every", "1", cwd=tmp_path)
    assert done.code == 1
    says = "the loss is not finite by step 5; base holds step 4; lower --lr"
    assert says in done.err.splitlines()[-1]
    load_model(tmp_path / "base")
    assert load_state(tmp_path / "base")[1]["step"] == 4


def test_training_that_diverged_at_once_can_be_repeated(
    script: Script, tmp_path: Path, monkeypatch
) -> None:
    """Into the same folder, without --overwrite: no checkpoint lies there."""
    fast = [*TRAIN, "--log-every", "1"]
    loss = pretraining.ddpm_loss
    calls: list[None] = []

    def nan_at_step_3(*args: Any) -> Tensor:
        calls.append(None)
        return loss(*args) * (torch.nan if len(calls) == 3 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "ddpm_loss", nan_at_step_3)
        done = script("train_ddpm", *fast, cwd=tmp_path)
    assert done.code == 1
    assert "by step 3; nothing was saved yet; lower --lr" in done.err.splitlines()[-1]
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == [".run", "log.jsonl"]
    assert script("train_ddpm", *fast, cwd=tmp_path).code == 0
    log = pretraining.read_log(tmp_path / "base/log.jsonl", 6)
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5, 6]
    assert_refused(script("train_ddpm", *fast, cwd=tmp_path), "holds an earlier run")


def test_unlearning_that_diverges_in_the_last_step_saves_nothing(
    base: Path, script: Script
) -> None:
    """The loss is that before the step, and the weights are large but finite: only the output of
    the model shows it.
    """
    done = script("unlearn", *UNLEARN, "--steps", "1", "--lr", "1e30", cwd=base.parent)
    assert done.code == 1
    assert "retrack-knn diverged at step 1" in done.err.splitlines()[-1]
    assert not (base.parent / "after").exists()


def test_unlearning_that_diverges_ends_soon(base: Path, script: Script, monkeypatch) -> None:
    monkeypatch.setattr(unlearning, "LOOK_EVERY", 2)
    settings = ["--method", "neggrad", "--steps", "1000000", "--lr", "1e30"]
    done = script("unlearn", *UNLEARN, *settings, cwd=base.parent)
    assert done.code == 1
    assert "neggrad diverged at step 2" in done.err.splitlines()[-1]
    assert not (base.parent / "after").exists()


# --- Other conditions that are legal


def test_training_without_git_records_no_commit(
    script: Script, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script("train_ddpm", *TRAIN, cwd=tmp_path).code == 0
    assert read_json(tmp_path / "base/run.json")["git_commit"] is None


def test_batch_may_be_larger_than_the_set(script: Script, tmp_path: Path) -> None:
    """Images are drawn with replacement."""
    (tmp_path / "two").mkdir()
    for i in range(2):
        Image.new("L", (16, 16), 90 * i).save(tmp_path / f"two/{i}.png")
    data = ["--dataset", "folder", "--data-dir", "two", "--size", "16", "--channels", "1"]
    assert script("train_ddpm", *TRAIN, *data, cwd=tmp_path).code == 0
    settings = ["--forget", "1.png", "--k", "1", "--steps", "2", "--batch-size", "5"]
    settings += ["--accumulate", "1"]
    assert script("unlearn", *UNLEARN, *settings, cwd=tmp_path).code == 0
    assert not same_tensors(weights(tmp_path / "after"), weights(tmp_path / "base"))


def test_main_off_the_main_thread_trains(tmp_path: Path) -> None:
    """As in some notebooks and servers: Python allows no signal handlers there."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            train_ddpm.main([*TRAIN[:-1], str(tmp_path / "base")])
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    load_model(tmp_path / "base")


@pytest.mark.parametrize(
    "missing", [["RANK"], ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]]
)
def test_incomplete_environment_of_torchrun_is_one_line(
    missing: list[str], script: Script, tmp_path: Path, monkeypatch
) -> None:
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    for name in missing:
        monkeypatch.delenv(name)
    done = script("train_ddpm", *TRAIN, cwd=tmp_path)
    assert_refused(done, f"LOCAL_RANK is set, as by torchrun, but not {', '.join(missing)}: start")


# --- How a run ends


def raises(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def asks_for_too_much() -> None:
    torch.empty(2**60)


def compiles_without_a_compiler() -> None:
    def backend(*_: object) -> None:
        raise RuntimeError("no C++ compiler")

    torch.compile(torch.neg, backend=backend)(torch.ones(1))


@pytest.mark.parametrize(
    ("main", "code", "says"),
    [
        (compiles_without_a_compiler, 2, "--compile: torch.compile failed (BackendCompilerFailed)"),
        (asks_for_too_much, 2, "out of memory: lower --batch-size"),
        (
            raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")),
            2,
            "out of memory: lower",
        ),
        (raises(MemoryError()), 2, "out of memory: lower"),
        (
            raises(OSError(errno.ENOSPC, "", "a/b")),
            2,
            "a/b: No space left on device; what was saved before is intact",
        ),
        (raises(PermissionError(errno.EACCES, "")), 2, "the output: Permission denied"),
        (raises(InputError("two\nlines \x1b[31m \udcff é")), 2, r"two\nlines \x1b[31m \udcff é"),
        (raises(KeyboardInterrupt()), 130, ""),
    ],
)
def test_faults_are_one_line(main: Callable[[], None], code: int, says: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        runs.run_command(main)
    err = capsys.readouterr().err
    assert caught.value.code == code
    assert says in err
    assert err.count("\n") == (1 if says else 0)


def test_console_of_any_encoding_is_printed_to(monkeypatch) -> None:
    """Results hold "±", which ASCII has not."""
    raw = io.BytesIO()
    console = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    runs.run_command(lambda: print("1 ± 2"))
    console.flush()
    assert raw.getvalue() == b"1 ? 2\n"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug"), OSError("a bug")])
def test_bugs_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error), match="a bug"):
        runs.run_command(raises(error))

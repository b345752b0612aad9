"""Nothing lost, nothing let in: what SECURITY.md promises, as far as no other file tests it."""

import errno
import inspect
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_UNET
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from tqdm import tqdm

import train_ddpm
import unlearn
from tiny_retrack import NoiseSchedule, UNet, load_model, losses, save_model
from tiny_retrack.lab import flags, runs
from tiny_retrack.lab.checkpoint import (
    atomic,
    load_state,
    read_json,
    save_state,
    write_json,
    write_tensors,
)
from tiny_retrack.lab.plots import save_grid
from tiny_retrack.lab.presets import PRESETS
from tiny_retrack.metrics import Classifier
from tiny_retrack.posterior import (
    exact_target,
    knn_target,
    log_posterior,
    nearest_neighbors,
    tail_mass,
    topk_target,
)
from tiny_retrack.sampling import ddim_sample, ddpm_sample, inject_and_denoise
from tiny_retrack.types import InputError

ROOT = Path(__file__).parents[1]
TRAIN = ["--steps", "6", "--batch-size", "4", "--warmup", "2", "--bf16", "off", "--out", "base"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _fast(tiny_unets: None) -> Iterator[None]:
    """Tiny models, and no waiting for the disk, which tells only after a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint of digits-tshirt, as train_ddpm.py leaves it."""
    torch.manual_seed(0)
    save_model(tmp_path / "base", UNet(TINY_UNET), NoiseSchedule.linear())
    write_json(tmp_path / "base/run.json", {"data": {"dataset": "digits-tshirt"}})
    return tmp_path / "base"


@pytest.fixture(scope="module")
def _trained_once(_fast: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        train_ddpm.main(TRAIN)
    return cwd


@pytest.fixture
def trained(_trained_once: Path, tmp_path: Path) -> Path:
    """A folder of one's own in which `python train_ddpm.py` has run with TRAIN."""
    return shutil.copytree(_trained_once, tmp_path / "trained")


def weights(folder: Path) -> dict[str, Tensor]:
    return load_model(folder)[0].state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def tree(folder: Path) -> dict[Path, int]:
    """Everything in a folder, and when it last changed."""
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def refused(done, *parts: str) -> None:
    """Exit code 2, one line, with each of the parts."""
    assert done.code == 2
    *above, line, rest = re.split(r"[\r\n]", done.err)
    assert rest == ""
    assert line.isprintable()
    assert re.match(r"\w+\.py: ", line)
    assert all(text.strip() == "" or "reading images" in text for text in above)
    for part in parts:
        assert part in line


# --- Kills


def kill_trainings(whole: Path, killed: Path, kills: int) -> None:
    """Train into `whole`; then into `killed`, killed again and again while it saves, and print what
    each left.

    Forks, so that one import of torch serves all. Waiting for the disk takes 2 ms, so that most of
    a save is writing.
    """
    torch.set_num_threads(1)
    tqdm.set_lock(
        threading.RLock()
    )  # its own lock is shared with forks, and stays locked if its holder is killed
    tqdm.monitor_interval = 0  # no thread that a fork would lose
    os.fsync = lambda handle: time.sleep(0.002)
    PRESETS["digits-tshirt"] = replace(PRESETS["digits-tshirt"], unet=TINY_UNET)
    split = runs.load_data(flags.DATA_DEFAULTS, download=False)
    runs.load_data, runs.provenance = lambda *_: split, lambda _: {}
    train_ddpm.sample_many = lambda *_, **__: torch.zeros(64, 1, 16, 16)
    flags = [
        "--steps",
        "90",
        "--batch-size",
        "2",
        "--warmup",
        "2",
        "--bf16",
        "off",
        "--log-every",
        "1",
    ]
    train_ddpm.main([*flags, "--out", str(whole)])

    moments, save = random.Random(0), train_ddpm.save_model
    for i in range(kills):
        listen, tell = os.pipe()
        child = os.fork()
        if not child:
            begun = []

            def telling(
                *args: Any, begun: list[float] = begun, tell: int = tell, **options: Any
            ) -> None:
                begun.append(time.monotonic())
                if len(begun) == 2:  # the second save begins: how long was it since the first?
                    os.write(tell, struct.pack("d", begun[1] - begun[0]))
                save(*args, **options)

            train_ddpm.save_model = telling
            train_ddpm.main(
                [*flags, "--out", str(killed), "--save-every", "1", *(["--resume"] if i else [])]
            )
            os._exit(0)
        os.close(tell)
        (duration,) = struct.unpack("d", os.read(listen, 8))
        time.sleep(moments.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        os.close(listen)
        load_model(killed)
        step = load_state(killed)[1]["step"]
        logged = [record["step"] for record in train_ddpm.read_log(killed / "log.jsonl", step)]
        told = [read_json(killed / name)["step"] for name in ("state.json", "run.json")]
        print(json.dumps([step, logged == list(range(1, step + 1)), told]))
    print(len(list(killed.glob(".tmp-*"))))
    train_ddpm.main([*flags, "--out", str(killed), "--resume"])


def test_kill_9_at_30_random_moments_of_the_saves_of_a_training(tmp_path: Path) -> None:
    kills, paths = 30, [str(ROOT / "tests"), str(ROOT)]
    call = f"from test_faults import *; kill_trainings(Path('whole'), Path('killed'), {kills})"
    done = subprocess.run(
        [sys.executable, "-c", call],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(rows) == kills
    for step, log_is_whole, told in rows:
        assert log_is_whole
        assert set(told) <= {step, step - 1}  # what people read comes after what is resumed from
    steps = [step for step, *_ in rows]
    assert steps == sorted(set(steps))  # each went on from the last
    leftovers = next(int(line) for line in done.stdout.splitlines() if line.isdigit())
    assert leftovers > 0  # some were killed while writing
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert same(load_state(tmp_path / "killed")[0], load_state(tmp_path / "whole")[0])


def test_every_output_comes_under_its_name_by_a_rename(script, tmp_path: Path, monkeypatch) -> None:
    """But log.jsonl, which grows, and whose last line may be cut; and the empty file that marks a
    run's folder.
    """
    renamed, replace_file = set(), Path.replace

    def recorded(path: Path, target: Path) -> Path:
        renamed.add(Path(target).resolve())
        return replace_file(path, target)

    monkeypatch.setattr(Path, "replace", recorded)
    assert script("train_ddpm", *TRAIN, "--save-every", "3", cwd=tmp_path).code == 0
    unlearn = [
        "--checkpoint",
        "base",
        "--steps",
        "3",
        "--batch-size",
        "2",
        "--save-every",
        "1",
        "--bf16",
        "off",
    ]
    assert script("unlearn", *unlearn, "--out", "after", cwd=tmp_path).code == 0
    written = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert written - renamed == {
        tmp_path / name for name in ("base/.run", "base/log.jsonl", "after/.run")
    }
    assert len(written) > 20


# --- A full disk


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """A limit on the size of a file stands in for the full disk: a write stops half-way with an
    OSError.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_full_disk_ends_training_with_one_line_and_the_old_checkpoint(
    share: float, script, tmp_path: Path, small_files
) -> None:
    """The limit is a share of the model's size, so the save stops at the model."""
    real_fit = train_ddpm.fit

    def first_steps(*args, **options):
        for done in real_fit(*args, **options):
            if done.step == 4:
                small_files(int(share * (tmp_path / "base" / WEIGHTS).stat().st_size))
            yield done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ddpm, "fit", first_steps)
        done = script("train_ddpm", *TRAIN, "--save-every", "3", cwd=tmp_path)
    assert done.code == 2
    line = done.err.splitlines()[-1]
    assert (
        line
        == f"train_ddpm.py: base/{WEIGHTS}: {os.strerror(errno.EFBIG)}; what was saved before is intact"
    )
    assert "Traceback" not in done.err
    load_model(tmp_path / "base")
    assert load_state(tmp_path / "base")[1]["step"] == 3
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_full_disk_leaves_the_old_picture(tmp_path: Path, small_files) -> None:
    path = tmp_path / "samples.png"
    noise = torch.randint(
        0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    path.write_bytes(b"old")
    small_files(500)
    with pytest.raises(OSError, match=r"samples\.png") as caught, atomic(path) as temporary:
        save_grid(temporary, noise, columns=2)
    assert caught.value.errno == errno.EFBIG
    assert [p.name for p in tmp_path.iterdir()] == ["samples.png"]
    assert path.read_bytes() == b"old"


# --- Folders that hold something


def test_what_is_overwritten_stays_until_the_new_run_is_saved(
    script, trained: Path, monkeypatch
) -> None:
    before = weights(trained / "base")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for _ in range(2):  # and the second one does not take the first one's place
        with monkeypatch.context() as patch:
            patch.setattr(train_ddpm, "fit", killed)
            assert script("train_ddpm", *TRAIN, "--overwrite", cwd=trained).code == 130
        aside = [
            folder for folder in (trained / ".old-base").iterdir() if (folder / WEIGHTS).exists()
        ]
        assert [same(weights(folder), before) for folder in aside] == [True]
    assert script("train_ddpm", *TRAIN, "--seed", "1", "--overwrite", cwd=trained).code == 0
    assert not same(weights(trained / "base"), before)
    for seed in ("0", "1"):
        flags = [
            "--checkpoint",
            "base",
            "--out",
            "after",
            "--overwrite",
            "--steps",
            "1",
            "--batch-size",
            "2",
        ]
        assert script("unlearn", *flags, "--seed", seed, cwd=trained).code == 0
    assert read_json(trained / "after/run.json")["seed"] == 1
    assert sorted(path.name for path in trained.iterdir()) == ["after", "base"]


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_folder_that_no_run_made_is_never_touched(flags: list[str], base: Path, script) -> None:
    home = base.parent / "home"
    (home / "letters").mkdir(parents=True)
    (home / "config.json").write_text("{}")
    before = tree(home)
    for name in ("train_ddpm", "unlearn"):
        refused(
            script(name, "--out", home, *flags, *checkpoint_of(name), cwd=base.parent),
            "home",
            "another --out",
        )
    for above in (base.parent, "/"):  # what holds a run is no run
        refused(script("train_ddpm", "--out", above, *flags, cwd=base.parent), "another --out")
    assert tree(home) == before


def checkpoint_of(name: str) -> list[str]:
    return ["--checkpoint", "base"] if name == "unlearn" else []


def test_the_checkpoint_and_the_current_folder_are_not_overwritten(base: Path, script) -> None:
    (base / ".run").touch()
    shutil.copytree(base, base / "step-1")
    before = tree(base.parent)
    for checkpoint in ("base", "base/step-1", "base/../base"):
        flags = ["--checkpoint", checkpoint, "--out", "base", "--overwrite"]
        refused(script("unlearn", *flags, cwd=base.parent), "is the checkpoint itself, or holds it")
    for here, out in ((base, "."), (base / "step-1", "..")):
        refused(
            script("train_ddpm", "--out", out, "--overwrite", cwd=here),
            "is the current folder, or holds it",
        )
    assert tree(base.parent) == before


def test_outputs_that_cannot_be_written_are_told_before_the_work(
    base: Path, script, monkeypatch
) -> None:
    (base.parent / "file").write_text("in the way")
    before = tree(base.parent)
    for out in ("file", "file/below"):
        for name in ("train_ddpm", "unlearn"):
            flags = ["--out", out, *checkpoint_of(name)]
            refused(script(name, *flags, cwd=base.parent), "file is a file, not a folder")
    refused(
        script("train_ddpm", "--out", "x" * 300, cwd=base.parent),
        "x" * 300,
        os.strerror(errno.ENAMETOOLONG),
    )
    refused(script("train_ddpm", "--overwrite", "--resume", cwd=base.parent), "exclude each other")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(script("train_ddpm", "--out", "new", cwd=base.parent), "may not be written to")
    assert tree(base.parent) == before


# --- Resuming


def test_resuming_with_other_settings_names_each_that_differs(script, trained: Path) -> None:
    before = tree(trained)
    done = script(
        "train_ddpm", *TRAIN, "--resume", "--lr", "0.5", "--seed", "3", "--forget", "7", cwd=trained
    )
    refused(done, "forget = [] (now ['7']), lr = 0.001 (now 0.5), seed = 0 (now 3)")
    assert tree(trained) == before


@pytest.mark.parametrize(
    ("tensors", "notes", "says"),
    [
        ({}, {"step": None}, "is not of a training run"),
        ({}, {"step": -1}, "is not of a training run"),
        ({}, {"step": True}, "is not of a training run"),
        ({}, {"run": ["lr"]}, "is not of a training run"),
        ({}, {"run": {"lr": 1, "a": {"b": "\x1b[31m"}}}, "lr = 1 (now 0.001)"),
        ({"model.conv_in.bias": torch.zeros(5)}, {}, "state is of another model"),
        ({"optimizer.999.step": torch.zeros(())}, {}, "state is of another model"),
        ({"more": torch.zeros(1)}, {}, "state is of another model"),
        ({"ema.conv_in.bias": torch.full((4,), torch.nan)}, {}, "NaN"),
    ],
)
def test_a_strangers_training_state_is_refused(
    tensors: dict, notes: dict, says: str, script, trained: Path
) -> None:
    real, real_notes = load_state(trained / "base")
    save_state(trained / "base", {**real, **tensors}, {**real_notes, **notes})
    before = tree(trained)
    refused(script("train_ddpm", *TRAIN, "--resume", cwd=trained), says)
    assert tree(trained) == before


def test_a_training_state_of_nothing_is_refused(script, trained: Path) -> None:
    _, notes = load_state(trained / "base")
    save_state(trained / "base", {}, notes)
    refused(script("train_ddpm", *TRAIN, "--resume", cwd=trained), "state is of another model")


def test_a_torn_log_is_read_up_to_the_tear(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    one, two = (
        {"step": step, "loss": 0.5, "grad_norm": 1.0, "lr": 0.1, "images_per_s": 9.0}
        for step in (1, 2)
    )
    sound = (json.dumps(one) + "\n" + json.dumps(two) + "\n").encode()
    log.write_bytes(sound + b'{"st')
    assert train_ddpm.read_log(log, 5) == [one, two]
    log.write_bytes(sound + b'{"st\xff\n{"step": 3}\n')
    assert train_ddpm.read_log(log, 1) == [one]
    for line in (b"5", b'{"step": 3}', b'{"step": "x", "loss": 0.5, "images_per_s": 9.0}', b"[]"):
        log.write_bytes(sound + line + b"\n")
        assert train_ddpm.read_log(log, 5) == [one, two]


# --- Divergence


def test_a_loss_that_is_not_finite_names_the_step_and_the_last_good_checkpoint(
    script, tmp_path, monkeypatch
) -> None:
    calls, loss = [], train_ddpm.ddpm_loss

    def breaks_at_step_5(*args: object) -> Tensor:
        calls.append(None)
        return loss(*args) * (torch.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(train_ddpm, "ddpm_loss", breaks_at_step_5)
    done = script("train_ddpm", *TRAIN, "--save-every", "2", "--log-every", "1", cwd=tmp_path)
    assert done.code == 1
    assert (
        "the loss is not finite by step 5; base holds step 4; lower --lr"
        in done.err.splitlines()[-1]
    )
    load_model(tmp_path / "base")
    assert load_state(tmp_path / "base")[1]["step"] == 4


def test_a_model_that_the_last_step_broke_is_not_saved(base: Path, script) -> None:
    """Its loss is that before the step, and its weights are large but finite: only its output
    tells.
    """
    flags = [
        "--checkpoint",
        "base",
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--lr",
        "1e30",
        "--out",
        "after",
    ]
    done = script("unlearn", *flags, cwd=base.parent)
    assert (done.code, "retrack-knn diverged at step 1" in done.err.splitlines()[-1]) == (1, True)
    assert not (base.parent / "after").exists()


def test_unlearning_that_diverges_ends_soon(base: Path, script, monkeypatch) -> None:
    monkeypatch.setattr(unlearn, "LOOK_EVERY", 2)
    flags = [
        "--method",
        "neggrad",
        "--checkpoint",
        "base",
        "--steps",
        "1000000",
        "--batch-size",
        "2",
        "--lr",
        "1e30",
    ]
    done = script("unlearn", *flags, "--out", "after", cwd=base.parent)
    assert (done.code, "neggrad diverged at step 2" in done.err.splitlines()[-1]) == (1, True)


def test_a_machine_without_git_trains(script, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script("train_ddpm", *TRAIN, cwd=tmp_path).code == 0
    assert read_json(tmp_path / "base/run.json")["git_commit"] is None


# --- Files from strangers


def edit_json(path: Path, **options: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def bomb(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"conv_in.weight": Bomb(folder / "it ran")}, (folder / WEIGHTS).with_suffix(".bin"))


# damage: what the line must name. The functions that read are put to every kind of damage in
# test_checkpoint.py.
STRANGERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "none": (shutil.rmtree, "base is no checkpoint"),
    "cut": (lambda f: os.truncate(f / WEIGHTS, 2000), WEIGHTS),
    "code": (bomb, "diffusion_pytorch_model.bin"),
    "channels": (
        lambda f: edit_json(f / "config.json", block_out_channels=[10**9, 10**9]),
        "block_out_channels",
    ),
    "another layout": (lambda f: edit_json(f / "config.json", in_channels=3), "config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("\x1b[31m{"), "config.json"),
    "ten steps": (
        lambda f: save_model(f, load_model(f)[0], NoiseSchedule.linear(10)),
        "10 diffusion steps",
    ),
    "another size": (
        lambda f: save_model(f, UNet(replace(TINY_UNET, sample_size=8)), NoiseSchedule.linear()),
        "1x8x8",
    ),
    "run.json is a list": (lambda f: (f / "run.json").write_text("[]"), "run.json"),
    "its data is a list": (lambda f: edit_json(f / "run.json", data=["digits-tshirt"]), "run.json"),
    "its data set": (
        lambda f: edit_json(f / "run.json", data={"dataset": "digit-tshirt"}),
        "run.json",
    ),
    "its data set is none": (
        lambda f: edit_json(f / "run.json", data={"dataset": [1]}),
        "run.json",
    ),
    "its forget set": (lambda f: edit_json(f / "run.json", data={"forget": [1]}), "run.json"),
    "its option": (lambda f: edit_json(f / "run.json", data={"download": True}), "run.json"),
    "its size": (lambda f: edit_json(f / "run.json", data={"size": -3}), "--size -3"),
    "its channels": (lambda f: edit_json(f / "run.json", data={"channels": 2}), "--channels 2"),
}


@pytest.mark.parametrize("damage", STRANGERS)
def test_a_strangers_checkpoint_is_one_line_and_nothing_is_written(
    damage: str, base: Path, script
) -> None:
    harm, named = STRANGERS[damage]
    harm(base)
    before = tree(base.parent)
    refused(script("unlearn", "--checkpoint", "base", "--out", "after", cwd=base.parent), named)
    refused(script("evaluate", "base", cwd=base.parent), named)
    assert tree(base.parent) == before


def test_a_damaged_feature_network_is_one_line(base: Path, script) -> None:
    features = base.parent / "runs/digits-tshirt/features"
    about = {"data": {**flags.DATA_DEFAULTS, "dataset": "digits-tshirt"}, "images": 1797}
    write_json(features / "classifier.json", {"about": about, "accuracy": 0.9})
    (features / "classifier.safetensors").write_bytes(bytes(100))
    refused(
        script("evaluate", "base", cwd=base.parent),
        "classifier.safetensors",
        "replace or remove it",
    )
    sound = Classifier(1, 10).state_dict()
    for tensors in (
        {"head.weight": torch.zeros(1)},
        {**sound, "head.weight": torch.zeros(3, 3)},
        {**sound, "head.weight": sound["head.weight"] * torch.nan},
    ):
        write_tensors(features / "classifier.safetensors", tensors, {})
        refused(
            script("evaluate", "base", cwd=base.parent),
            "classifier.safetensors",
            f"delete {Path('runs')}",
        )


PICTURES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda f: [path.unlink() for path in f.iterdir()], "0 images in"),
    "one": (lambda f: (f / "a.png").unlink(), "1 images in"),
    "no picture": (lambda f: (f / "a.png").write_bytes(b"text"), "a.png"),
    "cut": (lambda f: os.truncate(f / "a.png", 200), "a.png"),
    "small": (lambda f: Image.new("L", (15, 99)).save(f / "a.png"), "15x99"),
    "alpha": (lambda f: Image.new("LA", (16, 16)).save(f / "a.png"), "alpha"),
    "16 bits": (
        lambda f: Image.fromarray(np.zeros((16, 16), np.uint16)).save(f / "a.png"),
        "8-bit",
    ),
    "a name for a terminal": (lambda f: (f / "\x1b[31m\n.png").write_bytes(b""), r"\x1b[31m\n.png"),
    "a name in no encoding": (
        lambda f: (f / os.fsdecode(b"\xff.png")).write_bytes(b""),
        r"\udcff.png",
    ),
    "a link to nothing": (lambda f: (f / "c.png").symlink_to("/no/such"), "c.png is a link"),
}


@pytest.mark.parametrize("damage", PICTURES)
def test_a_strangers_pictures_are_one_line_and_nothing_is_written(
    damage: str, script, tmp_path: Path
) -> None:
    pictures = tmp_path / "two words é"
    pictures.mkdir()
    for name, seed in (("a.png", 0), ("b.png", 1)):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20), np.uint8)).save(
            pictures / name
        )
    flags = [
        *TRAIN,
        "--dataset",
        "folder",
        "--data-dir",
        pictures,
        "--size",
        "16",
        "--channels",
        "1",
    ]
    harm, named = PICTURES[damage]
    harm(pictures)
    before = tree(tmp_path)
    refused(script("train_ddpm", *flags, cwd=tmp_path), named)
    assert tree(tmp_path) == before


def test_a_batch_may_be_larger_than_the_set(script, tmp_path: Path) -> None:
    """Images are drawn with replacement."""
    (tmp_path / "two").mkdir()
    for i in range(2):
        Image.new("L", (16, 16), 90 * i).save(tmp_path / f"two/{i}.png")
    data = ["--dataset", "folder", "--data-dir", "two", "--size", "16", "--channels", "1"]
    assert script("train_ddpm", *TRAIN, *data, cwd=tmp_path).code == 0
    unlearn = [
        "--checkpoint",
        "base",
        "--forget",
        "1.png",
        "--k",
        "1",
        "--steps",
        "2",
        "--batch-size",
        "5",
    ]
    assert (
        script("unlearn", *unlearn, "--accumulate", "1", "--out", "after", cwd=tmp_path).code == 0
    )
    assert not same(weights(tmp_path / "after"), weights(tmp_path / "base"))


# --- How a run ends


def raises(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def asks_for_too_much() -> None:
    torch.empty(2**60)


@pytest.mark.parametrize(
    ("main", "code", "says"),
    [
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


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug"), OSError("a bug")])
def test_bugs_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error), match="a bug"):
        runs.run_command(raises(error))


# --- Numbers at the edges

SHAPE, NUM = (1, 4, 4), 4
EDGES = (
    torch.randint(0, 2, (NUM, *SHAPE), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
)
SETS = {
    "black": -torch.ones(NUM, *SHAPE),
    "white": torch.ones(NUM, *SHAPE),
    "grey": torch.zeros(NUM, *SHAPE),
    "-1 and 1": EDGES,
    "duplicates": EDGES[:1].expand(NUM, *SHAPE),
    "two that are opposites": torch.cat([EDGES[:1], -EDGES[:1]]),
    "one": EDGES[:1],
}
SCHEDULE = NoiseSchedule.linear()
ALL = torch.arange(1000)


class Scaled(torch.nn.Module):
    """eps = w x."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.7, dtype=dtype))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.w * x


def noise(dtype: torch.dtype, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(len(ALL), *shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("inside", [True, False], ids=["one of the set", "another"])
def test_targets_are_finite_at_all_t(name: str, inside: bool, dtype: torch.dtype) -> None:
    data = SETS[name].to(dtype)
    forget = data[:1] if inside else 1 - 2 * (data[:1] > 0).to(dtype)  # itself, or its opposite
    x_t = SCHEDULE.q_sample(forget.expand(len(ALL), *SHAPE), ALL, noise(dtype))
    for k in {1, len(data)}:
        index, distance = nearest_neighbors(forget, data, k)
        kept = index.expand(len(ALL), k)
        for values in (
            distance,
            knn_target(x_t, ALL, data[kept], SCHEDULE),
            topk_target(x_t, ALL, data, SCHEDULE, k),
            tail_mass(x_t, ALL, data, SCHEDULE, kept),
        ):
            assert values.isfinite().all()
    assert exact_target(x_t, ALL, data, SCHEDULE).isfinite().all()
    assert log_posterior(x_t, ALL, data, SCHEDULE).exp().sum(1).sub(1).abs().max() < 0.02


LOSSES: dict[str, Callable] = {
    "ddpm_loss": lambda m, r, f, e: losses.ddpm_loss(m, r, ALL, e, SCHEDULE),
    "neggrad_loss": lambda m, r, f, e: losses.neggrad_loss(m, f, ALL, e, SCHEDULE),
    "erasediff_losses": lambda m, r, f, e: losses.erasediff_losses(
        m, r, f, ALL, e, e.abs(), SCHEDULE
    ),
    "siss_losses": lambda m, r, f, e: [
        loss
        for lam in (0.0, 0.5, 1.0)
        for loss in losses.siss_losses(
            m, r, f, ALL, e, torch.arange(1000) % 2 < 2 * lam, lam, SCHEDULE
        )
    ],
    "retrack_loss": lambda m, r, f, e: [
        losses.retrack_loss(
            m,
            f,
            ALL,
            e,
            exact_target(SCHEDULE.q_sample(f, ALL, e), ALL, r[:NUM], SCHEDULE),
            SCHEDULE,
            cap,
        )
        for cap in (math.inf, 1.0)
    ],
    "retrack_weighted_loss": lambda m, r, f, e: losses.retrack_weighted_loss(
        m, f, ALL, e, torch.stack([r, -r], dim=1), SCHEDULE
    ),
    "vdu_loss": lambda m, r, f, e: losses.vdu_loss(
        m, f, ALL, e, [m.w], [m.w.detach() + 1], [torch.ones_like(m.w)], 0.1, SCHEDULE
    ),
    "dimum_loss": lambda m, r, f, e: losses.dimum_loss(m, f, r, ALL, e, SCHEDULE),
}


def test_every_loss_is_put_to_it() -> None:
    functions = inspect.getmembers(losses, inspect.isfunction)
    assert {name for name, _ in functions if name.endswith(("_loss", "_losses"))} == LOSSES.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_finite_at_all_t(loss: str, name: str, dtype: torch.dtype) -> None:
    data, model = SETS[name].to(dtype), Scaled(dtype)
    if loss == "siss_losses":  # whose densities are below the least float64 only in larger images
        data = data.repeat(1, 1, 10, 10)
    e = noise(dtype, tuple(data.shape[1:]))
    remain = data[ALL % len(data)]
    for forget in (data[:1], -data[:1]):  # one of the set, or its opposite
        found = LOSSES[loss](model, remain, forget.expand_as(remain), e)
        for value in [found] if isinstance(found, Tensor) else found:
            (gradient,) = torch.autograd.grad(value, model.w, retain_graph=True)
            assert value.isfinite()
            assert gradient.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SETS)
def test_samplers_are_finite_and_give_a_sets_only_image(name: str, dtype: torch.dtype) -> None:
    """With the ideal denoiser of the set, which rounds as a model of this precision does."""
    data = SETS[name]

    def eps_model(x_t: Tensor, t: Tensor) -> Tensor:
        return exact_target(x_t.to(dtype), t, data, SCHEDULE).to(x_t.dtype)

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    shape = (3, *SHAPE)
    found = [
        sampler(eps_model, shape, SCHEDULE, num_steps, generator(), clip)
        for sampler in (ddim_sample, ddpm_sample)
        for num_steps in (1, 30)
        for clip in (False, True)
    ]
    for t in (0, 500, 999):
        found.append(
            inject_and_denoise(eps_model, data[:1], t, noise(torch.float32)[:1], SCHEDULE, 20)
        )
    for images in found:
        assert images.isfinite().all()
        if dtype == torch.float32 and len(data.unique(dim=0)) == 1:
            assert_close(images, data[:1].expand_as(images), rtol=0, atol=1e-3)


# --- The table


def test_every_test_that_security_md_names_is_there() -> None:
    named = set(re.findall(r"`(?:test_\w+\.py::)?(test_\w+)`", (ROOT / "SECURITY.md").read_text()))
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    found = set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))
    assert len(named) > 50
    assert named <= found

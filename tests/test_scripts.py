"""The three scripts, as a user runs them, on a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
from conftest import Script
from PIL import Image

import train_ddpm
from tiny_retrack import UNetConfig, load_model
from tiny_retrack.lab import features, pretraining, unlearning
from tiny_retrack.lab.presets import PRESETS
from tiny_retrack.methods import SISS, ReTrack
from tiny_retrack.metrics import fit_classifier

ROOT = Path(__file__).parents[1]
_TINY = "--device cpu --bf16 off --steps 6 --batch-size 4 --warmup 2 --log-every 2 --save-every 3"
TINY = [*_TINY.split(), "--widths", "8", "8", "8"]
QUICK = ["--num-samples", "70", "--sampler-steps", "2", "--nll-tolerance", "1"]
RUNS = Path("runs/digits-tshirt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `python train_ddpm.py` has run for six steps, in a process of its own."""
    cwd = tmp_path_factory.mktemp("trained")
    command = [sys.executable, "-W", "error::UserWarning", ROOT / "train_ddpm.py", *TINY]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return cwd


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder)[0].state_dict()


def width(picture: Path) -> int:
    with Image.open(picture) as image:
        return image.width


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_train_unlearn_evaluate(
    trained: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "fit_classifier", partial(fit_classifier, steps=5))
    runs = trained / RUNS
    record = json.loads((runs / "base/run.json").read_text())
    assert record["train"]["steps"] == record["step"] == 6
    assert record["data"]["dataset"] == "digits-tshirt"
    log = [json.loads(line) for line in (runs / "base/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [2, 3, 4, 6]
    assert all(width(runs / "base" / name) > 100 for name in ("samples.png", "loss.png"))

    done = script("unlearn", "--steps", "2", "--batch-size", "4", cwd=trained)
    assert done.code == 0, done.err
    assert "retrack-knn" in done.out
    record = json.loads((runs / "retrack-knn/run.json").read_text())
    assert (record["method"], record["target"], record["unlearn"]["k"]) == ("retrack", "knn", 10)
    assert width(runs / "retrack-knn/before_after.png") > 100

    done = script("evaluate", *QUICK, cwd=trained)
    assert done.code == 0, done.err
    for name in ("base", "retrack-knn"):
        assert name in done.out
        metrics = json.loads((runs / name / "metrics.json").read_text())
        assert {
            "hit_frequency",
            "fid",
            "inception_score",
            "num_samples",
            "sampler_steps",
            "features",
        } <= set(metrics)
        assert (metrics["num_samples"], metrics["sampler_steps"]) == (70, 2)
        assert {"remain", "forget"} <= set(metrics["nll"])
        assert (runs / name / "samples.png").exists()
        assert width(runs / name / "injection.png") > 100


def test_unlearn_repeats_bitwise_and_leaves_the_base_alone(
    trained: Path, tmp_path: Path, script
) -> None:
    before = weights(trained / RUNS / "base")
    for out in ("a", "b"):
        flags = [
            "--steps",
            "2",
            "--batch-size",
            "4",
            "--accumulate",
            "2",
            "--method",
            "siss",
            "--rescale",
            "10%",
        ]
        assert script("unlearn", *flags, "--out", tmp_path / out, cwd=trained).code == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), before)
    assert same(weights(trained / RUNS / "base"), before)


def test_train_killed_at_any_step_resumes_bitwise(trained: Path, tmp_path: Path, script) -> None:
    process = forks.start(train_ddpm.main, [*TINY, "--save-every", "1"], cwd=tmp_path)
    while not (tmp_path / RUNS / "base/state.json").exists():
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert script("train_ddpm", *TINY, "--resume", cwd=tmp_path).code == 0
    assert same(weights(tmp_path / RUNS / "base"), weights(trained / RUNS / "base"))
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / RUNS / "base/log.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(set(steps))
    assert steps[-1] == 6


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_train_on_a_signal_saves_and_resumes_bitwise(
    number: int, code: int, trained: Path, tmp_path: Path, script, monkeypatch
) -> None:
    def interrupted(*args, **options):
        for done in fit(*args, **options):
            if done.step == 2:
                os.kill(os.getpid(), number)
            yield done

    fit = pretraining.fit
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "fit", interrupted)
        assert script("train_ddpm", *TINY, cwd=tmp_path).code == code
    assert json.loads((tmp_path / RUNS / "base/state.json").read_text())["step"] == 2
    (tmp_path / RUNS / "base/log.jsonl").unlink()  # only the curve needs it
    assert script("train_ddpm", *TINY, "--resume", cwd=tmp_path).code == 0
    assert same(weights(tmp_path / RUNS / "base"), weights(trained / RUNS / "base"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_unlearn_on_a_signal_writes_nothing(
    number: int, code: int, trained: Path, tmp_path: Path, script, monkeypatch
) -> None:
    def interrupted(*args, **options):
        for done in fit(*args, **options):
            os.kill(os.getpid(), number)
            yield done

    fit = unlearning.fit
    monkeypatch.setattr(unlearning, "fit", interrupted)
    flags = ["--method", "vanilla", "--steps", "3", "--batch-size", "2", "--out", tmp_path / "x"]
    assert script("unlearn", *flags, cwd=trained).code == code
    assert not (tmp_path / "x").exists()


def test_train_refuses_to_overwrite_a_run(trained: Path, script) -> None:
    done = script("train_ddpm", *TINY, cwd=trained)
    assert done.code == 2
    assert "holds an earlier run or other files: --overwrite a run" in done.err


def test_unlearn_that_diverges_writes_nothing(trained: Path, tmp_path: Path, script) -> None:
    flags = [
        "--method",
        "neggrad",
        "--lr",
        "1e30",
        "--steps",
        "4",
        "--batch-size",
        "2",
        "--out",
        tmp_path / "x",
    ]
    done = script("unlearn", *flags, cwd=trained)
    assert (done.code, (tmp_path / "x").exists()) == (1, False)
    assert "neggrad diverged at step" in done.err
    done = script("train_ddpm", *TINY, "--lr", "1e30", cwd=tmp_path)
    assert done.code == 1
    assert "the loss is not finite by step" in done.err


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("train_ddpm", ["--steps", "0"], "--steps 0: must be from 1 to 1000000000"),
        ("train_ddpm", ["--batch-size", "9" * 30], "must be from 1 to 1000000000"),
        ("train_ddpm", ["--batch-size", "0"], "--batch-size 0: must be from 1"),
        ("train_ddpm", ["--seed", "-1"], "--seed: '-1' is not a whole number from 0"),
        ("train_ddpm", ["--seed", "9" * 30], "is not a whole number from 0"),
        ("train_ddpm", ["--lr", "-1"], "--lr -1.0: must be from 0 to inf"),
        ("train_ddpm", ["--lr", "nan"], "--lr nan: must be from 0"),
        ("train_ddpm", ["--dataset", "mnist-tshrt"], "did you mean 'mnist-tshirt'"),
        ("train_ddpm", ["--save-every", "0"], "--save-every: '0' is not a whole number from 1 up"),
        ("train_ddpm", ["--widths", "8", "8"], "--widths: the UNet has 3 levels, got 2 numbers"),
        (
            "train_ddpm",
            ["--widths", "8", "8", "9"],
            "--widths 8 8 9: must be multiples of 8, the groups of the norms",
        ),
        ("unlearn", ["--k", "0"], "--k 0: must be from 1"),
        ("unlearn", ["--k", "1798", "--out", "x"], "k = 1798: must be from 1 to the number"),
        ("unlearn", ["--method", "vanilla", "--k", "3"], "vanilla has no --k"),
        (
            "unlearn",
            ["--method", "siss", "--lam", "0.1"],
            "siss has no --lam: it has --rescale, --siss-lam",
        ),
        ("unlearn", ["--target", "knm"], "did you mean 'knn'"),
        ("unlearn", ["--lam", "1.5"], "--lam 1.5: must be from 0 to 1"),
        ("unlearn", ["--method", "siss", "--rescale", "ten", "--out", "x"], "rescale ten"),
        ("unlearn", ["--method", "retrac"], "did you mean 'retrack'"),
        ("unlearn", ["--forget", "5000"], "--forget 5000: not an index"),
        ("unlearn", ["--checkpoint", "no/such"], "no/such"),
        (
            "unlearn",
            ["--out", "runs/digits-tshirt/base", "--overwrite"],
            "is the checkpoint itself",
        ),
        ("evaluate", ["--num-samples", "0"], "--num-samples 0: must be from 1"),
        ("evaluate", ["--sampler-steps", "0"], "--sampler-steps 0: must be from 1 to 1000"),
        ("evaluate", ["--sampler-steps", "1001"], "--sampler-steps 1001: must be from 1 to 1000"),
        ("evaluate", ["--nll-tolerance", "0"], "--nll-tolerance 0.0: must be from 1e-12 to 1"),
        ("evaluate", ["runs/digits-tshirt/base", "--attack", "remains"], "did you mean 'remain'"),
        ("evaluate", ["--attack-lr", "1e-4"], "need --attack"),
        ("evaluate", ["--attack", "--attack-lr", "0"], "--attack-lr 0.0: must be above 0"),
        ("evaluate", ["no/such"], "no/such"),
    ],
)
def test_bad_flags_are_one_line(
    trained: Path, script, name: str, flags: list[str], says: str
) -> None:
    done = script(name, *flags, cwd=trained)
    assert done.code == 2
    assert says in done.err.splitlines()[-1]
    assert done.err.splitlines()[-1].startswith(f"{name}.py: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_device_cuda_is_refused_where_there_is_none(trained: Path, script) -> None:
    done = script("evaluate", "--device", "cuda", cwd=trained)
    assert (done.code, "--device cpu" in done.err) == (2, True)


def test_presets_hold_the_published_models() -> None:
    def parameters(config: UNetConfig) -> int:
        from tiny_retrack import UNet

        with torch.device("meta"):
            return sum(p.numel() for p in UNet(config).parameters())

    assert parameters(PRESETS["mnist-tshirt"].unet) == pytest.approx(14.74e6, rel=1e-3)
    assert parameters(PRESETS["cifar10"].unet) == pytest.approx(35.7e6, rel=2e-3)
    assert 0.7e6 < parameters(PRESETS["digits-tshirt"].unet) < 1.3e6


# data set: steps, batch size, accumulate, lr, k, lambda, SISS's lambda and rescale; DDIM steps
PUBLISHED = {
    "mnist-tshirt": (50, 128, 1, 5e-5, 10, 0.005, 0.5, "5", 50),
    "cifar10": (60, 128, 1, 2e-5, 10, 0.02, 0.5, "5", 1000),
    "celebahq": (40, 4, 16, 5e-6, 10, 0.005, 0.5, "500", 50),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_settings(name: str) -> None:
    preset = PRESETS[name]
    loop, retrack, siss = preset.unlearn, preset.method("retrack"), preset.method("siss")
    assert isinstance(retrack, ReTrack)
    assert isinstance(siss, SISS)
    ours = (
        loop.steps,
        loop.batch_size,
        loop.accumulate,
        loop.lr,
        retrack.k,
        retrack.lam,
        siss.siss_lam,
        siss.rescale,
        preset.evaluate.sampler_steps,
    )
    assert ours == PUBLISHED[name]
    assert retrack.target == "knn"
    assert retrack.snr_cap == 10_000  # no weight


@pytest.mark.usefixtures("unchecked")  # the checks of shapes cannot be traced
def test_compile_trains_the_compiled_network(tmp_path: Path, script, monkeypatch) -> None:
    """With torch's eager backend, which traces and compiles nothing."""
    compiled, compile_ = [], torch.compile

    def traced(model: torch.nn.Module):
        compiled.append(model)
        return compile_(model, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    weights = []
    for flags in ([], ["--compile"]):
        out = tmp_path / f"run{len(flags)}"
        flags = [*TINY, *flags, "--steps", "1", "--warmup", "0", "--save-every", "1", "--out", out]
        assert script("train_ddpm", *flags, cwd=tmp_path).code == 0
        weights.append(load_model(out)[0].state_dict())
    assert len(compiled) == 1
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-6)


def test_unlearn_reads_a_checkpoint_that_diffusers_wrote(
    tmp_path: Path, script, monkeypatch
) -> None:
    """As the published ddpm-cifar10-32: no run.json, an older place of the scheduler's config,
    CIFAR-10's images.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import DDPMScheduler, UNet2DModel

    narrow = replace(PRESETS["cifar10"].unet, block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
    theirs = UNet2DModel(**{f.name: getattr(narrow, f.name) for f in fields(narrow)})
    theirs.save_pretrained(tmp_path / "google")
    DDPMScheduler(num_train_timesteps=1000).save_config(tmp_path / "google")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), np.uint8)
    monkeypatch.setattr("tiny_retrack.data._need", lambda *_: None)
    monkeypatch.setattr(
        "torchvision.datasets.CIFAR10",
        lambda *_, **__: SimpleNamespace(data=pixels, targets=[0, 1] * 15),
    )
    flags = [
        "--checkpoint",
        "google",
        "--dataset",
        "cifar10",
        "--forget",
        "7",
        "--steps",
        "1",
        "--batch-size",
        "2",
    ]
    assert script("unlearn", *flags, "--out", "after", cwd=tmp_path).code == 0
    run = json.loads((tmp_path / "after/run.json").read_text())
    assert (run["data"]["forget"], run["unlearn"]["lr"]) == (["7"], 2e-5)
    UNet2DModel.from_pretrained(tmp_path / "after")

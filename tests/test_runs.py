"""What a run says of itself: its record, its pictures, its warnings; and which models it takes."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_json, edit_weights, random_unet, same_model, same_tensors
from conftest import TINY_UNET, Result, Script, assert_refused
from torch import Tensor
from torch.testing import assert_close

import train_ddpm
import unlearn
from tiny_retrack import NoiseSchedule, UNet, load_model, save_model
from tiny_retrack.data import load_split, random_draws, to_float, to_uint8
from tiny_retrack.lab import pretraining, runs, unlearning
from tiny_retrack.lab.checkpoint import fingerprint, read_json
from tiny_retrack.lab.presets import TrainSettings
from tiny_retrack.losses import ddpm_loss
from tiny_retrack.sampling import inject_and_denoise
from tiny_retrack.training import Progress, batch_generator
from tiny_retrack.types import InputError

TRAIN = ["--steps", "4", "--batch-size", "2", "--warmup", "1", "--log-every", "1", "--bf16", "off"]
UNLEARN = ["--checkpoint", "base", "--steps", "1", "--batch-size", "2", "--bf16", "off"]
UNLEARN += ["--out", "after"]


pytestmark = pytest.mark.usefixtures("tiny_unets")


# --- The record


def test_run_json_records_the_arguments_of_main(base: Path, monkeypatch) -> None:
    """Not those of the process, which in a notebook are the notebook's."""
    monkeypatch.setattr("sys.argv", ["notebook", "-f", "kernel.json"])
    monkeypatch.chdir(base.parent)
    train_ddpm.main([*TRAIN, "--out", "new run"])
    command = read_json(base.parent / "new run/run.json")["command"]
    assert command == f"train_ddpm.py {' '.join(TRAIN)} --out 'new run'"
    unlearn.main(UNLEARN)
    command = read_json(base.parent / "after/run.json")["command"]
    assert command == f"unlearn.py {' '.join(UNLEARN)}"


def test_run_json_records_threads_and_processes(base: Path, script: Script, monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert script("unlearn", *UNLEARN, cwd=base.parent).code == 0
    run = read_json(base.parent / "after/run.json")
    assert (run["threads"], run["processes"]) == (7, 1)


def test_run_json_records_metrics(base: Path, script: Script) -> None:
    assert script("train_ddpm", *TRAIN, "--out", "new run", cwd=base.parent).code == 0
    log = (base.parent / "new run/log.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = read_json(base.parent / "new run/run.json")["metrics"]
    assert metrics == {"loss": json.loads(log[-1])["loss"]}
    assert script("unlearn", *UNLEARN, cwd=base.parent).code == 0
    metrics = read_json(base.parent / "after/run.json")["metrics"]
    assert metrics["before"].keys() == metrics["after"].keys()
    assert all(metrics["before"][name] != value for name, value in metrics["after"].items())


def test_log_counts_the_images_of_all_processes(tmp_path: Path, monkeypatch) -> None:
    settings = TrainSettings(steps=4, batch_size=2, lr=1e-3, warmup=1, accumulate=5)
    plan = pretraining.PretrainPlan(tmp_path, {}, settings, TINY_UNET)
    training = pretraining.Training(plan)
    one = torch.ones(1)
    done = Progress(3, one, torch.tensor(1.0), 1e-3)
    assert training.log(done, [one] * 3, 2.0)["images_per_s"] == 3 * 2 * 5 / 2
    monkeypatch.setattr(pretraining, "num_processes", lambda: 4)
    assert training.log(done, [one] * 3, 2.0)["images_per_s"] == 4 * 3 * 2 * 5 / 2


def test_loss_curve_ends_where_the_log_ends(tmp_path: Path, monkeypatch) -> None:
    """The running mean is over a tenth of the training's steps, not over lines of the log."""
    drawn: dict[str, Any] = {}
    save_curves = pretraining.save_curves

    def kept(path: Path, curves: Mapping[str, Any], *args: Any, **options: Any) -> None:
        drawn.update(curves)
        save_curves(path, curves, *args, **options)

    monkeypatch.setattr(pretraining, "save_curves", kept)
    settings = TrainSettings(steps=1000, batch_size=2, lr=1e-3, warmup=1)
    training = pretraining.Training(pretraining.PretrainPlan(tmp_path, {}, settings, TINY_UNET))
    for step in range(20, 1001, 20):
        training.history.append({"step": step, "loss": 1000.0 - step / 2})
    monkeypatch.setattr(pretraining, "sample_many", lambda *_, **__: torch.zeros(64, 1, 16, 16))
    training.draw()
    steps, mean = drawn["running mean"]
    assert steps[24] == 500
    assert mean[24] == pytest.approx(750.0)  # no lag behind the falling loss
    assert mean[-1] == pytest.approx(510.0)  # of steps 960, 980 and 1000


# --- Unlearning says what it did


def test_unlearning_that_moves_nothing_warns(base: Path, script: Script) -> None:
    done = script("unlearn", *UNLEARN, "--lr", "0", cwd=base.parent)
    assert done.code == 0, done.err
    said = next(line for line in done.out.splitlines() if line.startswith("warning: "))
    assert "the model hardly moved towards" in said
    assert "(+0.0%); take more --steps, a higher --lr" in said


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (0.4, 0.30, None),
        (0.4, 0.37, "hardly moved towards"),
        (0.4, 0.37, "0.4 before, 0.37 after (-7.5%)"),
        (0.4, 0.8, "moved away from"),
        (0.0, 0.0, None),
    ],
)
def test_unlearned_warns_below_a_tenth_of_the_distance(
    before: float, after: float, says: str | None
) -> None:
    name = unlearning.DISTANCE
    warning = unlearning.Unlearned({name: before}, {name: after}, 1.0).warning
    assert (warning is None) == (says is None)
    assert (says or "") in (warning or "")


def test_before_after_shows_the_forgotten_images_noised_and_denoised(
    base: Path, script: Script, monkeypatch
) -> None:
    """From the same noise before and after, so that equal models give equal pictures."""
    drawn: dict[str, Tensor] = {}
    save_rows = unlearning.save_rows

    def kept(path: Path, rows: Mapping[str, Tensor], title: str) -> None:
        drawn.update(rows)
        save_rows(path, rows, title)

    monkeypatch.setattr(unlearning, "save_rows", kept)
    still = [*UNLEARN, "--lr", "0", "--method", "vanilla", "--forget", "3", "9"]
    assert script("unlearn", *still, cwd=base.parent).code == 0
    kinds = ("samples", "from t=250")
    rows = [f"{kind}, {when}" for kind in kinds for when in ("before", "vanilla")]
    assert list(drawn) == ["forgotten", *rows]
    for kind in kinds:
        assert torch.equal(drawn[f"{kind}, before"], drawn[f"{kind}, vanilla"])
    forgotten = load_split("digits-tshirt", forget=["3", "9"]).forget
    assert torch.equal(drawn["forgotten"], forgotten.repeat_interleave(8, 0))

    model, schedule = load_model(base)
    noise = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        back = inject_and_denoise(model, to_float(drawn["forgotten"]), 250, noise, schedule, 10)
    assert_close(drawn["from t=250, before"], to_uint8(back), rtol=0, atol=1)


# --- Which models and networks it takes


def test_model_of_any_size_is_saved_with_the_size_of_the_data(base: Path, script: Script) -> None:
    edit_weights(base, lambda tensors: None)
    edit_json(base / "config.json", sample_size=None)
    assert script("unlearn", *UNLEARN, cwd=base.parent).code == 0
    assert load_model(base.parent / "after")[0].config == TINY_UNET


def test_model_of_any_size_that_the_data_are_too_small_for_is_refused() -> None:
    """Without padding, 16 pixels cannot be halved five times."""
    levels = {
        "block_out_channels": (4,) * 6,
        "down_block_types": ("DownBlock2D",) * 6,
        "up_block_types": ("UpBlock2D",) * 6,
        "attention_head_dim": None,
    }
    config = replace(TINY_UNET, sample_size=None, downsample_padding=0, **levels)
    with pytest.raises(InputError, match="sample_size = 16: must be at least 32"):
        runs.check_model_fits(config, 1000, load_split("digits-tshirt"), Path("base"))


def test_model_that_predicts_more_than_the_noise_is_refused(base: Path, script: Script) -> None:
    torch.manual_seed(0)
    save_model(base, UNet(replace(TINY_UNET, out_channels=2)), NoiseSchedule.linear())
    done = script("unlearn", *UNLEARN, cwd=base.parent)
    assert_refused(done, "base predicts 2 channels for images of 1: only models that predict")
    assert not (base.parent / "after").exists()


def test_widths_that_are_no_multiples_of_the_groups_name_the_flag(
    script: Script, tmp_path: Path
) -> None:
    done = script("train_ddpm", *TRAIN, "--widths", "4", "5", cwd=tmp_path)
    assert_refused(done, "--widths 4 5: must be multiples of 2, the groups of the norms")


# --- Training that starts from a checkpoint


def test_training_goes_on_from_a_checkpoint(base: Path, script: Script) -> None:
    """Its first loss is that of the checkpoint's weights under the checkpoint's schedule."""
    scaled = NoiseSchedule.scaled_linear()
    save_model(base, load_model(base)[0], scaled)
    flags = [*TRAIN, "--checkpoint", "base", "--out", "more", "--seed", "5"]
    done = script("train_ddpm", *flags, cwd=base.parent)
    assert done.code == 0, done.err
    more = base.parent / "more"

    images = load_split("digits-tshirt").everything
    index, t, noise = random_draws(images, 2, 1000, batch_generator(torch.device("cpu"), 5, 0))
    with torch.no_grad():
        loss = ddpm_loss(load_model(base)[0], to_float(images[index]), t, noise, scaled)
    first = json.loads((more / "log.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)

    model, schedule = load_model(more)
    assert torch.equal(schedule.beta, scaled.beta)
    assert not same_tensors(model.state_dict(), load_model(base)[0].state_dict())
    start = read_json(more / "run.json")["start"]
    assert start == {"checkpoint": "base", "weights": fingerprint(base), "initial_seed": None}


def test_training_from_a_checkpoint_resumes_bitwise(base: Path, script: Script) -> None:
    flags = [*TRAIN, "--checkpoint", "base", "--save-every", "2"]

    def stop_after_two(*args: Any, **options: Any) -> Iterator[Progress]:
        for done in fit(*args, **options):
            if done.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield done

    fit = pretraining.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "fit", stop_after_two)
        assert script("train_ddpm", *flags, "--out", "stopped", cwd=base.parent).code == 143
    assert script("train_ddpm", *flags, "--out", "stopped", "--resume", cwd=base.parent).code == 0
    assert script("train_ddpm", *flags, "--out", "whole", cwd=base.parent).code == 0
    stopped, whole = (load_model(base.parent / name)[0] for name in ("stopped", "whole"))
    assert same_model(stopped, whole)

    save_model(base, random_unet(1, TINY_UNET), NoiseSchedule.linear())
    done = script("train_ddpm", *flags, "--out", "stopped", "--resume", cwd=base.parent)
    assert_refused(done, "--resume: stopped was started with weights = ")


def test_training_from_a_checkpoint_takes_its_data(base: Path, script: Script) -> None:
    forgets = ["--forget", "3", "9", "--copies", "4"]
    assert script("train_ddpm", *TRAIN, *forgets, "--out", "a", cwd=base.parent).code == 0
    more = [*TRAIN, "--checkpoint", "a"]
    assert script("train_ddpm", *more, "--out", "b", cwd=base.parent).code == 0
    assert script("train_ddpm", *more, "--copies", "7", "--out", "c", cwd=base.parent).code == 0
    first, same, other = (read_json(base.parent / name / "run.json")["data"] for name in "abc")
    assert same == first
    assert other["copies"] == 7
    assert other["forget"] == ["3", "9"]


def test_training_refuses_a_checkpoint_that_saw_what_it_must_not(
    base: Path, script: Script
) -> None:
    def train(*flags: str) -> Result:
        return script("train_ddpm", *TRAIN, *flags, cwd=base.parent)

    assert train("--out", "seen").code == 0
    assert train("--remain-only", "--out", "unseen").code == 0
    assert train("--hold-out", "0.1", "--out", "held").code == 0
    for start in ("base", "seen"):
        done = train("--checkpoint", start, "--remain-only", "--out", "x")
        assert_refused(done, f"--remain-only: {start} may have seen these images")
    done = train("--checkpoint", "held", "--remain-only", "--out", "x")
    assert_refused(done, "--remain-only --hold-out: held may have seen these images")
    done = train("--checkpoint", "unseen", "--remain-only", "--forget", "3", "--out", "x")
    assert_refused(done, "--remain-only: unseen may have seen these images")
    for start in ("base", "seen"):  # the first records no share, the second that it is 0
        done = train("--checkpoint", start, "--hold-out", "0.1", "--out", "x")
        assert_refused(done, f"--hold-out: {start} may have seen these images")
    assert not (base.parent / "x").exists()
    assert train("--checkpoint", "unseen", "--remain-only", "--out", "y").code == 0
    assert train("--checkpoint", "held", "--out", "z").code == 0
    data = read_json(base.parent / "held/run.json")["data"]
    edit_json(base.parent / "held/run.json", data={**data, "digest": "of fewer images"})
    done = train("--checkpoint", "held", "--out", "x")
    assert_refused(done, "--hold-out: held may have seen these images")


def change(folder: Path) -> None:
    """Put another model into a checkpoint."""
    save_model(folder, random_unet(1, TINY_UNET), NoiseSchedule.linear())


@pytest.mark.parametrize("disturb", [change, shutil.rmtree])
def test_checkpoint_that_changes_meanwhile_is_recorded_as_it_was(
    disturb: Callable[[Path], None], base: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturbed(*args: Any, **options: Any) -> Iterator[Progress]:
        disturb(base)
        yield from fit(*args, **options)

    fit = pretraining.fit
    edit_json(base / "run.json", seed=7)
    was = fingerprint(base)
    monkeypatch.setattr(pretraining, "fit", disturbed)
    flags = [*TRAIN, "--checkpoint", "base", "--out", "more"]
    assert script("train_ddpm", *flags, cwd=base.parent).code == 0
    start = read_json(base.parent / "more/run.json")["start"]
    assert start == {"checkpoint": "base", "weights": was, "initial_seed": 7}


def test_unlearning_records_the_checkpoint_as_it_was(
    base: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturbed(*args: Any, **options: Any) -> Iterator[Progress]:
        change(base)
        yield from fit(*args, **options)

    fit = unlearning.fit
    was = fingerprint(base)
    monkeypatch.setattr(unlearning, "fit", disturbed)
    assert script("unlearn", *UNLEARN, cwd=base.parent).code == 0
    assert read_json(base.parent / "after/run.json")["base"] == was


def test_initial_seed_is_that_of_the_random_weights(base: Path, script: Script) -> None:
    """Through a training that started from a checkpoint, and through unlearning."""
    assert runs.initial_seed(base) is None
    edit_json(base / "run.json", seed=7)
    assert runs.initial_seed(base) == 7
    flags = [*TRAIN, "--checkpoint", "base", "--out", "more", "--seed", "5"]
    assert script("train_ddpm", *flags, cwd=base.parent).code == 0
    assert runs.initial_seed(base.parent / "more") == 7
    assert runs.is_from_scratch(base)
    assert not runs.is_from_scratch(base.parent / "more")
    flags = ["--checkpoint", "more", *UNLEARN[2:], "--seed", "3"]
    assert script("unlearn", *flags, cwd=base.parent).code == 0
    assert runs.initial_seed(base.parent / "after") == 7


def test_training_refuses_a_checkpoint_that_does_not_fit(base: Path, script: Script) -> None:
    def refused(*flags: str) -> Result:
        return script("train_ddpm", *TRAIN, *flags, cwd=base.parent)

    said = "--widths: the network is that of --checkpoint"
    assert_refused(refused("--checkpoint", "base", "--widths", "4", "8"), said)
    said = "--out base is the checkpoint itself, or holds it"
    assert_refused(refused("--checkpoint", "base", "--out", "base", "--overwrite"), said)
    assert_refused(refused("--checkpoint", "nowhere", "--out", "x"), "nowhere")
    said = "check --dataset, --size and --channels"
    save_model(base, UNet(replace(TINY_UNET, sample_size=32)), NoiseSchedule.linear())
    assert_refused(refused("--checkpoint", "base", "--out", "x"), said)
    assert not (base.parent / "x").exists()

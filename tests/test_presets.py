"""Which preset a data set has, and what the presets hold."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Script, assert_refused
from PIL import Image

import unlearn
from tiny_retrack import UNet
from tiny_retrack.lab import flags
from tiny_retrack.lab.presets import (
    PRESETS,
    SMALL_FOLDER,
    TrainSettings,
    default_preset,
    resolve,
    resolve_training,
)
from tiny_retrack.types import InputError

ROOT = Path(__file__).parents[1]


def settings(*argv: str, recorded: dict[str, Any] | None = None) -> dict[str, Any]:
    return flags.data_settings(flags.make_parser(None).parse_args(argv), recorded)


@pytest.fixture
def folder(tmp_path: Path) -> list[str]:
    """The flags of a folder of two pictures."""
    for name in ("a.png", "b.png"):
        Image.new("L", (16, 16)).save(tmp_path / name)
    return ["--dataset", "folder", "--data-dir", str(tmp_path)]


# --- Which preset ---


@pytest.mark.parametrize(
    ("dataset", "num_pictures", "preset"),
    [
        ("digits-tshirt", 0, "digits-tshirt"),
        ("mnist-tshirt", 0, "mnist-tshirt"),
        ("cifar10", 0, "cifar10"),
        ("folder", 2, "small-folder"),
        ("folder", SMALL_FOLDER, "small-folder"),
        ("folder", SMALL_FOLDER + 1, "folder"),
    ],
)
def test_default_preset_follows_the_data_set(dataset: str, num_pictures: int, preset: str) -> None:
    assert default_preset(dataset, num_pictures) == preset
    assert preset in PRESETS


def test_data_settings_choose_preset_and_size_of_a_folder(folder: list[str]) -> None:
    small = settings(*folder)
    assert (small["preset"], small["size"], small["channels"]) == ("small-folder", 32, 3)
    large = settings(*folder, "--preset", "celebahq")
    assert (large["preset"], large["size"]) == ("celebahq", 256)
    assert settings(*folder, "--preset", "celebahq", "--size", "64")["size"] == 64
    assert settings("--dataset", "cifar10")["preset"] == "cifar10"
    assert settings() == flags.DATA_DEFAULTS


def test_data_settings_keep_a_recorded_preset(folder: list[str]) -> None:
    """A folder that grows has the preset that its model was trained with."""
    recorded = {**settings(*folder, "--size", "16"), "preset": "folder"}
    assert settings(recorded=recorded)["preset"] == "folder"
    assert settings("--preset", "celebahq", recorded=recorded)["preset"] == "celebahq"
    assert settings("--preset", "celebahq", recorded=recorded)["size"] == 16
    older = {name: value for name, value in recorded.items() if name != "preset"}
    assert settings(recorded=older)["preset"] == "small-folder"


def test_data_settings_ignore_the_record_of_another_data_set() -> None:
    recorded = {**settings("--dataset", "cifar10", "--forget", "5"), "digest": "x"}
    assert settings(recorded=recorded)["forget"] == ["5"]
    assert settings("--dataset", "cifar10", recorded=recorded)["digest"] == "x"
    other = settings("--dataset", "mnist-tshirt", recorded=recorded)
    assert other == settings("--dataset", "mnist-tshirt")
    assert (other["forget"], other["preset"]) == ([], "mnist-tshirt")


def test_data_settings_of_a_folder_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 images in"):
        settings("--dataset", "folder", "--data-dir", str(tmp_path))


@pytest.mark.parametrize("preset", ["nothing", 3, None])
def test_recorded_preset_that_does_not_exist_is_refused(
    preset: object, base: Path, script: Script
) -> None:
    data = {"dataset": "digits-tshirt", "preset": preset}
    (base / "run.json").write_text(json.dumps({"data": data}))
    done = script("unlearn", "--checkpoint", "base", cwd=base.parent)
    assert_refused(done, f"{os.path.join('base', 'run.json')} records no possible data set")


# --- What it holds ---


def test_celebahq_is_the_published_network() -> None:
    unet = PRESETS["celebahq"].unet
    with torch.device("meta"):
        parameters = sum(p.numel() for p in UNet(unet).parameters())
    assert (parameters, unet.sample_size) == (113_673_219, 256)


@pytest.mark.parametrize("size", [8, 16, 20, 32, 50, 64])
def test_small_folder_has_a_small_network_for_any_size(size: int) -> None:
    unet = UNet(PRESETS["small-folder"].unet)
    assert sum(p.numel() for p in unet.parameters()) < 1.5e6
    with torch.no_grad():
        eps = unet(torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.long))
    assert eps.shape == (1, 3, size, size)


def test_presets_cost_as_much_as_their_data_are_large() -> None:
    small, large = PRESETS["small-folder"], PRESETS["folder"]
    assert (
        small.train.steps * small.train.batch_size < large.train.steps * large.train.batch_size / 50
    )
    assert small.evaluate.num_samples < large.evaluate.num_samples / 10


def test_data_md_lists_every_preset() -> None:
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    for name, preset in PRESETS.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` | ")][-1:]
        *_, training, unlearning, evaluation, _ = [cell.strip() for cell in row.split("|")]
        assert training.startswith(f"{preset.train.steps:,} ")
        assert training.endswith(f" {preset.train.batch_size}")
        assert unlearning.startswith(f"{preset.unlearn.steps} x ")
        assert float(unlearning.rpartition(" ")[2]) == preset.unlearn.lr
        assert evaluation.startswith(f"{preset.evaluate.num_samples:,}")


def test_data_md_commands_parse() -> None:
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    commands = [line for line in text.splitlines() if line.startswith("python unlearn.py ")]
    assert commands
    for command in commands:
        args = unlearn.make_parser().parse_args(shlex.split(command)[2:])
        assert args.preset == "celebahq"


# --- Warm-up ---

TRAIN = TrainSettings(steps=1000, batch_size=4, lr=0.1, warmup=100)


@pytest.mark.parametrize(
    ("given", "warmup", "says"),
    [
        ({}, 100, ""),
        ({"steps": 100}, 100, ""),
        ({"steps": "99"}, 9, "warm-up: 9 steps in place of 100, for --steps 99\n"),
        ({"steps": 1}, 0, "warm-up: 0 steps in place of 100, for --steps 1\n"),
        ({"steps": 50, "warmup": 50}, 50, ""),
        ({"warmup": 1000}, 1000, ""),
    ],
)
def test_resolve_training_shortens_a_presets_warmup(
    given: dict[str, Any], warmup: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved = resolve_training(TRAIN, given)
    assert resolved.warmup == warmup
    assert resolved.steps == int(given.get("steps", 1000))
    assert capsys.readouterr().out == says


@pytest.mark.parametrize("given", [{"warmup": 1001}, {"steps": 10, "warmup": 11}])
@pytest.mark.parametrize("resolver", [resolve, resolve_training])
def test_warmup_longer_than_the_training_is_refused(resolver: Any, given: dict[str, Any]) -> None:
    says = rf"--warmup {given['warmup']}: with --steps \d+ the learning rate would never reach --lr"
    with pytest.raises(InputError, match=says):
        resolver(TRAIN, given)

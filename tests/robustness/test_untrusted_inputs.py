"""Untrusted checkpoints and pictures, given to the scripts: one line, and nothing is written.

The functions that read are given every kind of damage in test_hostile_files.py and in
../test_data.py.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import PICKLED, WEIGHTS, Bomb, edit_json, replace_by_pickle
from conftest import TINY_UNET, Script, assert_refused, tree
from PIL import Image

from tiny_retrack import NoiseSchedule, UNet, load_model, save_model
from tiny_retrack.data import load_images
from tiny_retrack.lab.checkpoint import write_json, write_tensors
from tiny_retrack.metrics import Classifier

Damage = tuple[Callable[[Path], object], str]  # what is done to a folder, what the line must name


pytestmark = pytest.mark.usefixtures("tiny_unets")


CHECKPOINTS: dict[str, Damage] = {
    "none": (shutil.rmtree, "base is no checkpoint"),
    "cut": (lambda f: os.truncate(f / WEIGHTS, 2000), WEIGHTS),
    "code": (
        lambda f: replace_by_pickle(f, {"conv_in.weight": Bomb(f / "it ran")}),
        PICKLED,
    ),
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


@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_untrusted_checkpoint_is_one_line(damage: str, base: Path, script: Script) -> None:
    harm, named = CHECKPOINTS[damage]
    harm(base)
    before = tree(base.parent)
    assert_refused(
        script("unlearn", "--checkpoint", "base", "--out", "after", cwd=base.parent), named
    )
    assert_refused(script("evaluate", "base", cwd=base.parent), named)
    assert tree(base.parent) == before


def test_damaged_feature_network_is_one_line(base: Path, script: Script) -> None:
    features = base.parent / "runs/digits-tshirt/features"
    card = {"digest": load_images("digits-tshirt").digest(), "accuracy": 0.9, "has_classes": True}
    write_json(features / "classifier.json", card)
    (features / "classifier.safetensors").write_bytes(bytes(100))
    assert_refused(
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
        assert_refused(
            script("evaluate", "base", cwd=base.parent),
            "classifier.safetensors",
            f"delete {Path('runs')}",
        )


PICTURES: dict[str, Damage] = {
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
def test_untrusted_pictures_are_one_line(damage: str, script: Script, tmp_path: Path) -> None:
    pictures = tmp_path / "two words é"
    pictures.mkdir()
    for name, seed in (("a.png", 0), ("b.png", 1)):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20), np.uint8)).save(
            pictures / name
        )
    settings = ["--dataset", "folder", "--data-dir", pictures, "--size", "16", "--channels", "1"]
    harm, named = PICTURES[damage]
    harm(pictures)
    before = tree(tmp_path)
    assert_refused(script("train_ddpm", *settings, "--out", "base", cwd=tmp_path), named)
    assert tree(tmp_path) == before

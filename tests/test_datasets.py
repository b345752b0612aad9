"""The data set of a run: what is recorded, printed, warned of, and which preset it has."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Result, Script, assert_refused
from PIL import Image

from tiny_retrack.data import Split, load_images
from tiny_retrack.lab import datasets, flags
from tiny_retrack.lab.datasets import load_data
from tiny_retrack.types import InputError

FOLDER = ["--dataset", "folder", "--data-dir", "pets", "--size", "16", "--channels", "1"]


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16), np.uint8)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve pictures, p0.png to p11.png in two folders, in the current directory."""
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        write(tmp_path / f"pets/{'cat' if i % 2 else 'dog'}/p{i}.png", noise(i))
    return tmp_path / "pets"


def settings(*argv: str, recorded: dict[str, Any] | None = None) -> dict[str, Any]:
    return flags.data_settings(flags.make_parser(None).parse_args(argv), recorded)


def load(*argv: str, recorded: dict[str, Any] | None = None) -> tuple[dict[str, Any], Split]:
    return load_data(settings(*argv, recorded=recorded), download=False)


# --- What is recorded ---


@pytest.mark.usefixtures("pets")
def test_load_data_records_names_in_place_of_what_was_typed() -> None:
    data, split = load(*FOLDER, "--forget", "p8.png", "pets/cat/p1.png", "p11")
    assert data["forget"] == ["cat/p1.png", "cat/p11.png", "dog/p8.png"]
    assert [image[0].tolist() for image in split.forget] == [noise(i).tolist() for i in (1, 11, 8)]
    again, same = load(recorded=data)
    assert again == data
    assert same.forget.equal(split.forget)
    data, split = load(*FOLDER, "--forget", "cat")
    assert data["forget"] == [f"cat/p{i}.png" for i in (1, 11, 3, 5, 7, 9)]


def test_load_data_keeps_what_it_was_given_besides() -> None:
    given = settings("--forget", "9", "03", "--copies", "4")
    before = dict(given)
    data, split = load_data(given, download=False)
    assert given == before
    assert data == {**given, "forget": ["3", "9"], "digest": data["digest"]}
    assert data["digest"] == load_images("digits-tshirt").digest()
    assert len(split.forget) == 8
    assert json.loads(json.dumps(data)) == data


# --- What is printed ---


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "digits-tshirt: 1797 images remain; to forget: the T-shirt, 95 copies"),
        (["--copies", "2"], "digits-tshirt: 1797 images remain; to forget: the T-shirt, 2 copies"),
        (["--forget", "3"], "digits-tshirt: 1891 images remain; to forget: 3"),
        (FOLDER, "folder: 12 images remain, none is to be forgotten"),
        (
            [*FOLDER, "--forget", "cat/p1", "dog/p8", "--copies", "9"],
            "folder: 10 images remain; to forget: cat/p1.png, dog/p8.png, 9 copies of each",
        ),
        (
            [*FOLDER, "--forget", "cat", "dog/p10.png"],
            "folder: 5 images remain; to forget: 7 images, cat/p1.png to dog/p10.png",
        ),
    ],
)
@pytest.mark.usefixtures("pets")
def test_load_data_prints_what_is_forgotten(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    load(*flags)
    assert capsys.readouterr().out == f"{says}\n"


def test_load_data_prints_what_is_left_out(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pets / "a.gif").touch()
    (pets / "b.gif").touch()
    (pets / "c\x1b[31m.\n").touch()
    load(*FOLDER)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("left out of pets: 2 x .gif, 1 x ")
    assert line.isprintable()


@pytest.mark.usefixtures("pets")
def test_load_data_of_another_process_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets, "rank", lambda: 1)
    load(*FOLDER, "--forget", "cat")
    assert capsys.readouterr().out == ""


def warnings_of(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("warning: ")]


def test_load_data_warns_of_forgotten_images_that_training_may_have_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, held_out = load_images("digits-tshirt").remaining(0.1)
    seen = next(i for i in range(1797) if i not in held_out)
    data = {**flags.DATA_DEFAULTS, "hold_out": 0.1}
    for index, expected in ((int(held_out[3]), 1), (seen, 0)):
        load_data({**data, "forget": [str(index)]}, download=False)
        warning = f"leaves out 1 of the images to be forgotten, such as {index}: a model that was"
        assert capsys.readouterr().out.count(warning) == expected


def test_load_data_warns_of_a_near_copy_that_remains(
    pets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = noise(1).astype(float)
    farther = pixels.clip(20, 235) + np.where(noise(99) < 128, -20, 20)  # 20 of 255 grey levels off
    write(pets / "dog/farther.png", farther.astype(np.uint8))
    load(*FOLDER, "--forget", "cat/p1.png")
    assert warnings_of(capsys.readouterr().out) == []

    nearer = pixels.clip(8, 247) + np.where(noise(99) < 128, -8, 8)
    write(pets / "dog/nearer.png", nearer.astype(np.uint8))
    load(*FOLDER, "--forget", "cat/p1.png", "p8.png")
    distance = np.linalg.norm((nearer.astype(np.uint8) - pixels) / 255)
    (warning,) = warnings_of(capsys.readouterr().out)
    assert "image dog/nearer.png remains, and is nearly the same as image cat/p1.png" in warning
    assert f"L2 distance {distance:.2f}, pixels in [0, 1]" in warning


def test_load_data_warns_once_of_a_near_copy_of_all_tshirts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image_set = load_images("digits-tshirt")
    image_set.images[7] = image_set.images[-1] // 2 * 2  # a T-shirt without its lowest bit
    monkeypatch.setattr(datasets, "load_images", lambda *_, **__: image_set)
    load()
    (warning,) = warnings_of(capsys.readouterr().out)
    assert "image 7 remains" in warning


# --- A data set that changes ---


def test_load_data_warns_of_a_data_set_that_has_changed(
    pets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, _ = load(*FOLDER, "--forget", "3")
    assert data["forget"] == ["cat/p5.png"]
    load(recorded=data)
    assert warnings_of(capsys.readouterr().out) == []

    write(pets / "a_new.png", noise(99))
    again, split = load(recorded=data)
    assert again["forget"] == data["forget"]  # the same picture, at another index
    assert split.forget[0, 0].tolist() == noise(5).tolist()
    (warning,) = warnings_of(capsys.readouterr().out)
    assert warning == (
        "warning: the data set has changed since the model was made: "
        f"{data['digest']} then, {again['digest']} now"
    )
    (pets / "cat/p5.png").unlink()
    with pytest.raises(InputError, match=r"--forget cat/p5\.png: pets has no picture"):
        load(recorded=data)


TRAIN = ["--steps", "2", "--warmup", "1", "--batch-size", "2", "--save-every", "1", "--bf16", "off"]


def train(script: Script, cwd: Path, *more: str) -> Result:
    return script("train_ddpm", *FOLDER, *TRAIN, "--out", "base", *more, cwd=cwd)


@pytest.mark.usefixtures("tiny_unets")
def test_resume_refuses_a_data_set_that_has_changed(
    pets: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = torch.zeros(64, 1, 16, 16)
    monkeypatch.setattr("tiny_retrack.lab.pretraining.sample_many", lambda *_, **__: samples)
    assert train(script, pets.parent, "--forget", "3").code == 0
    write(pets / "a_new.png", noise(99))
    assert_refused(
        train(script, pets.parent, "--forget", "cat/p5.png", "--resume"),
        "--resume: base was started with digest = '12 images, sha256 ",
        "(now '13 images, sha256 ",
    )
    (pets / "a_new.png").unlink()
    done = train(script, pets.parent, "--forget", "cat/p5.png", "--resume")
    assert done.code == 0, done.err


@pytest.mark.usefixtures("tiny_unets")
def test_unlearn_and_evaluate_warn_of_a_data_set_that_has_changed(
    pets: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise InputError("stop")

    done = train(script, pets.parent, "--forget", "3")
    assert done.code == 0, done.err
    assert done.out.count("to forget: cat/p5.png") == 1
    write(pets / "a_new.png", noise(99))
    monkeypatch.setattr("tiny_retrack.lab.unlearning.unlearn", stop)
    monkeypatch.setattr("tiny_retrack.lab.evaluation.own_features", stop)
    for command in (["unlearn", "--checkpoint", "base"], ["evaluate", "base"]):
        done = script(*command, cwd=pets.parent)
        assert done.err.endswith(": stop\n")
        assert done.out.count("folder: 12 images remain; to forget: cat/p5.png") == 1
        (warning,) = warnings_of(done.out)
        assert "12 images, sha256" in warning
        assert "13 images, sha256" in warning

"""Any flags, any run.json, any damage to a data set: one line, or what was asked for.

`HYPOTHESIS_PROFILE=long pytest tests/robustness` tries many more examples. test_hostile_files.py
does the same with checkpoints and their configs.
"""

import argparse
import importlib
import io
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import JSON, TINY_UNET
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from tiny_retrack import NoiseSchedule, UNet, save_model
from tiny_retrack.data import Split, load_images, load_split
from tiny_retrack.lab import flags, runs
from tiny_retrack.lab.checkpoint import write_json
from tiny_retrack.pictures import Folder
from tiny_retrack.types import InputError

# The functions with which each script begins to work, after it has checked its input.
FEATURES = ("tiny_retrack.lab.evaluation.own_features",)
WORK = {
    "train_ddpm": ("tiny_retrack.lab.runs.prepare_folder",),
    "unlearn": ("tiny_retrack.lab.unlearning.probe", "tiny_retrack.lab.unlearning.sample_many"),
    "evaluate": FEATURES,
    "evaluate compare": FEATURES,
}


class Reached(Exception):
    """The work, or the parser, was reached."""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder, with checkpoints in it. No script does any work."""

    def reach(*_: object, **__: object) -> None:
        raise Reached

    folder = tmp_path_factory.mktemp("cwd")
    for name in ("model", "runs/digits-tshirt/base"):
        save_model(folder / name, UNet(TINY_UNET), NoiseSchedule.linear())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for places in WORK.values():
            for place in places:
                patch.setattr(place, reach)
        digits = load_images("digits-tshirt")  # read once
        loaders = importlib.import_module("tiny_retrack.data")._LOADERS
        patch.setitem(loaders, "digits-tshirt", lambda **_: digits)
        yield folder


def flags_of(command: str) -> list[argparse.Action]:
    """The flags of a script's parser."""

    def parse(parser: argparse.ArgumentParser, argv: object) -> None:
        raise Reached(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags.Parser, "parse_args", parse)
        with pytest.raises(Reached) as caught:
            run(command)
    left_out = ("-h", "--download")  # the first ends at once, the second needs the network
    return [
        a
        for a in caught.value.args[0]._actions
        if a.option_strings and a.option_strings[0] not in left_out
    ]


def run(command: str, *flags: str) -> None:
    name, *first = command.split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *first, *flags])
        runs.run_command(importlib.import_module(name).main)


def works_or_is_one_line(command: str, *flags: str) -> None:
    before = sorted(Path().rglob("*"))
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises((Reached, SystemExit)) as caught:
        run(command, *flags)
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2
        *above, line, rest = err.getvalue().replace("\r", "\n").split("\n")
        assert rest == ""
        assert not any(above)
        assert line.startswith(command.split()[0])
        assert line.isprintable()
    assert sorted(Path().rglob("*")) == before


VALUES = st.one_of(
    st.sampled_from(
        ["0", "1", "3", "-1", "1.5", "0.5", "1e400", "nan", "-inf", "1e3", "9" * 30, "9" * 5000, ""]
    ),
    st.sampled_from(
        ["cpu", "cuda", "on", "auto", "vanilla", "retrack", "siss", "knn", "exact", "random", "10%"]
    ),
    st.sampled_from(
        [
            "digits-tshirt",
            "mnist-tshirt",
            "cifar10",
            "folder",
            "model",
            "runs",
            ".",
            "..",
            "/",
            "a/b",
        ]
    ),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6),
    st.just("\udcff\x1b[31m\n"),
)


@pytest.mark.parametrize("command", WORK)
def test_flags_of_any_value_are_one_line_or_start_the_work(command: str) -> None:
    actions = flags_of(command)
    assert len(actions) > 10

    def words(action: argparse.Action) -> st.SearchStrategy[list[str]]:
        if action.nargs == 0:
            return st.just([action.option_strings[0]])
        values = VALUES | st.sampled_from([str(choice) for choice in action.choices or ["2"]])
        many = (
            st.lists(values, max_size=3)
            if action.nargs == "+"
            else st.lists(values, min_size=1, max_size=1)
        )
        return many.map(lambda words: [action.option_strings[0], *words])

    @given(
        st.lists(st.sampled_from(actions).flatmap(words), max_size=3), st.lists(VALUES, max_size=1)
    )
    def check(flags: list[list[str]], others: list[str]) -> None:
        works_or_is_one_line(command, *(word for words in flags for word in words), *others)

    check()


RUN_OPTIONS = [*flags.DATA_DEFAULTS, "digest", "download", "a"]


@given(data=JSON | st.dictionaries(st.sampled_from(RUN_OPTIONS), JSON, max_size=3))
def test_recorded_data_of_any_value_is_refused_or_used(data: object) -> None:
    write_json(Path("model/run.json"), {"data": data})
    try:
        works_or_is_one_line("unlearn", "--checkpoint", "model")
    finally:
        Path("model/run.json").unlink()


def damage(draw: Callable, raw: bytes) -> bytes:
    """Flip, cut or insert a few bytes; half of the damage is in the header."""
    changed = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        at = min(draw(st.integers(0, 60) | st.integers(0, len(raw))), len(changed))
        kind = draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "cut":
            del changed[at:]
        elif kind == "insert":
            changed[at:at] = draw(st.binary(min_size=1, max_size=20))
        elif at < len(changed):
            changed[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


def split_or_one_line(*args: object, **options: object) -> None:
    try:
        split = load_split(*args, **options)  # pyright: ignore[reportArgumentType]
    except InputError:
        return
    assert isinstance(split, Split)
    assert split.remain.dtype == split.forget.dtype == torch.uint8
    assert split.remain.shape[1:] == split.forget.shape[1:]
    assert split.labels.shape == split.remain.shape[:1]


@given(data=st.data(), kind=st.sampled_from(["png", "jpeg", "bmp", "webp"]))
def test_damaged_picture_is_refused_or_read(
    data: st.DataObject, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name in "ab":
        Image.fromarray(noise).save(folder / f"{name}.{kind}", exif=exif)
    path = folder / f"a.{kind}"
    path.write_bytes(damage(data.draw, path.read_bytes()))
    split_or_one_line("folder", folder, size=16)


@given(data=st.data(), part=st.sampled_from(["images-idx3", "labels-idx1"]))
def test_damaged_mnist_is_refused_or_read(
    data: st.DataObject, part: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("mnist")
    raw = folder / "MNIST/raw"
    raw.mkdir(parents=True)
    for name in ("train", "t10k"):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">4I", 0x803, 3, 28, 28) + bytes(3 * 28 * 28)
        )
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 3) + bytes(3))
    Image.new("L", (28, 28)).save(folder / "tshirt.png")
    path = raw / f"train-{part}-ubyte"
    path.write_bytes(damage(data.draw, path.read_bytes()))
    split_or_one_line("mnist-tshirt", folder)


WORDS = ["a", "b", ".", "..", "/", "//", "1", "0", "01", ".png", "cat", "\\", " ", "\0", "\udcff"]


@given(names=st.lists(st.lists(st.sampled_from(WORDS), max_size=5).map("".join), max_size=3))
def test_forget_of_any_text_is_refused_or_found(names: list[str]) -> None:
    pictures = ("cat/a.png", "cat/b.png", "1.png", "01.png", "cat.png")
    folder = Folder(Path("pictures"), pictures, "")
    try:
        found = folder.find(names)
    except InputError:
        return
    assert found == sorted(set(found))
    assert set(found) <= set(range(len(pictures)))
    assert bool(found) == bool(names)

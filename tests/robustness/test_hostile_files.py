"""Damaged and hostile checkpoints: one line that names the file, and never code that runs."""

import os
import pickle
import resource
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoints import (
    LINEAR,
    PICKLED,
    SCHEDULER,
    TINY,
    WEIGHTS,
    Bomb,
    edit_json,
    edit_weights,
    random_unet,
    replace_by_pickle,
    same_model,
)
from conftest import JSON
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_retrack import load_model, save_model
from tiny_retrack.lab.checkpoint import load_state, save_state
from tiny_retrack.lab.unet_config import unet_config_to_dict
from tiny_retrack.types import InputError

FUZZ = settings(max_examples=2 * settings().max_examples)


@pytest.fixture
def foreign(saved: Path) -> Path:
    """Without notes in the header, so that only the JSON files describe the model."""
    edit_weights(saved, lambda tensors: None)
    return saved


def refused(folder: Path, *parts: str) -> str:
    """The message of the refusal: one line, with each of the parts."""
    with pytest.raises(InputError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    for part in parts:
        assert part in message
    return message


# --- Damaged files


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "no checkpoint")
    (tmp_path / PICKLED).mkdir()
    refused(tmp_path, str(tmp_path), "no checkpoint")
    with pytest.raises(InputError, match=r"state\.safetensors"):
        load_state(tmp_path)


def test_model_is_refused_as_a_training_state(saved: Path) -> None:
    shutil.copy(saved / WEIGHTS, saved / "state.safetensors")
    with pytest.raises(InputError, match="no training state"):
        load_state(saved)


@pytest.mark.parametrize("name", ["config.json", SCHEDULER])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"a"',
        b"\xff\xfe{}",
        b"[" * 10**5,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_invalid_json_is_named(name: str, content: bytes, saved: Path) -> None:
    (saved / name).write_bytes(content)
    refused(saved, name)


def test_oversized_json_is_not_read(saved: Path) -> None:
    os.truncate(saved / "config.json", 2**40)  # a sparse terabyte, which takes no space
    refused(saved, "config.json", "too large")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("prediction_type", "v_prediction"),
        ("beta_schedule", "squaredcos_cap_v2"),
        ("beta_schedule", ["linear"]),
        ("variance_type", "learned_range"),
        ("rescale_betas_zero_snr", True),
        ("predict_epsilon", False),
        ("timestep_values", [999, 0]),
        ("solver_order", 2),
        ("use_karras_sigmas", False),
        ("_class_name", "ScoreSdeVeScheduler"),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", -5),
        ("num_train_timesteps", 1000.0),
        ("num_train_timesteps", True),
        ("num_train_timesteps", 10**9),
        ("num_train_timesteps", "1000"),
        ("beta_start", 0),
        ("beta_start", -0.1),
        ("beta_start", None),
        ("beta_end", 1),
        ("beta_end", 10**400),
        ("beta_end", float("nan")),
        ("beta_end", "0.02"),
        ("trained_betas", []),
        ("trained_betas", [0.1, 0.2]),
        ("trained_betas", [[0.1]] * 1000),
        ("trained_betas", {"0": 0.1}),
        ("trained_betas", 0.1),
    ],
)
def test_impossible_scheduler_is_refused_by_name(option: str, value: object, foreign: Path) -> None:
    load_model(foreign)
    edit_json(foreign / SCHEDULER, **{option: value})
    assert len(refused(foreign, "scheduler_config.json", option)) < 600


def test_schedule_that_leaves_no_image_is_refused(foreign: Path) -> None:
    edit_json(foreign / SCHEDULER, beta_end=0.9)
    refused(foreign, "scheduler_config.json", "too large")


@pytest.mark.parametrize("option", ["in_channels", "block_out_channels"])
def test_impossible_config_names_the_file(option: str, saved: Path) -> None:
    edit_json(saved / "config.json", **{option: 10**9})
    refused(saved, str(saved / "config.json"), option)


def test_oversized_config_is_refused_before_memory_is_allocated(
    foreign: Path,
) -> None:
    """The largest layout that a config may describe takes terabytes; none are allocated to find
    that these weights do not have it.
    """
    edit_json(
        foreign / "config.json",
        block_out_channels=[8192] * 12,
        down_block_types=["DownBlock2D"] * 12,
        up_block_types=["UpBlock2D"] * 12,
        layers_per_block=32,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(foreign, "does not fit")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize(
    ("name", "change"), [("config.json", {"norm_eps": 0.1}), (SCHEDULER, {"beta_end": 0.03})]
)
def test_json_that_contradicts_the_weights_is_refused(name: str, change: dict, saved: Path) -> None:
    edit_json(saved / name, **change)
    refused(saved, name, "not what")
    (saved / name).unlink()
    model, schedule = load_model(saved)
    assert same_model(model, random_unet(0))
    assert torch.equal(schedule.beta, LINEAR.beta)


def test_weights_without_config_are_refused(foreign: Path) -> None:
    (foreign / "config.json").unlink()
    refused(foreign, "config.json", "no such file")


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda w: w.pop("conv_in.weight"), "conv_in.weight"),
        (lambda w: w.update({"class_embedding.weight": torch.zeros(2)}), "class_embedding.weight"),
        (lambda w: w.update({"_orig_mod.conv_in.bias": torch.zeros(4)}), "twice"),
        (lambda w: w.update({"a\n\x1b[31m": torch.zeros(2)}), "not in the config"),
        (lambda w: w.update({"conv_in.bias": torch.zeros(5)}), "conv_in.bias"),
        (lambda w: w.update({"conv_in.bias": torch.zeros(4, 1)}), "conv_in.bias"),
        (lambda w: w.update({"conv_in.bias": torch.zeros(4, dtype=torch.int64)}), "torch.int64"),
        (lambda w: w.update({"conv_in.bias": torch.zeros(4, dtype=torch.bool)}), "torch.bool"),
        (
            lambda w: w.update({"conv_in.bias": torch.zeros(4, dtype=torch.float8_e4m3fn)}),
            "torch.float8_e4m3fn",
        ),
        (
            lambda w: w.update({"conv_in.bias": torch.zeros(4, dtype=torch.complex64)}),
            "torch.complex64",
        ),
        (lambda w: w["conv_in.bias"].fill_(float("nan")), "NaN"),
        (lambda w: w["conv_in.bias"].fill_(float("-inf")), "NaN or inf"),
        (lambda w: w.update({"conv_in.bias": torch.full((4,), 1e300, dtype=torch.float64)}), "inf"),
    ],
)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_weights_that_do_not_fit_are_named(
    edit: Callable, complaint: str, safe: bool, foreign: Path
) -> None:
    path = foreign / WEIGHTS
    if safe:
        edit_weights(foreign, edit)
    else:
        tensors = safetensors.torch.load_file(path)
        edit(tensors)
        path.unlink()
        path = path.with_suffix(".bin")
        torch.save(tensors, path)
    refused(foreign, str(path), complaint)


# --- Hostile files


def test_pickled_code_is_never_run(foreign: Path, tmp_path: Path) -> None:
    target = tmp_path / "it ran"
    value = {**random_unet(0).state_dict(), "conv_in.weight": Bomb(target)}
    path = replace_by_pickle(foreign, value)
    refused(foreign, str(path), "holds more than named tensors")
    assert not target.exists()
    path.write_bytes(pickle.dumps(value))  # as torch wrote it before 2020
    refused(foreign, str(path))
    assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists()  # it was armed


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    "value",
    [
        [torch.zeros(1)],
        {"state_dict": {"a": torch.zeros(1)}},
        {1: torch.zeros(1)},
        {"a": torch.zeros(1).to_sparse()},
        {"a": 3},
        torch.zeros(1),
        "text",
    ],
)
def test_pickle_of_other_values_is_refused(value: object, foreign: Path) -> None:
    path = replace_by_pickle(foreign, value)
    refused(foreign, str(path), "state_dict()")


def test_zip_bomb_is_refused(foreign: Path) -> None:
    weights = safetensors.torch.load_file(foreign / WEIGHTS)
    path = replace_by_pickle(foreign, weights)
    load_model(foreign)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    refused(foreign, str(path), "compressed")

    with zipfile.ZipFile(
        path, "w"
    ) as archive:  # every entry of the directory points at the same large one
        archive.writestr("bomb", bytes(10**6))
        for i in range(100):
            entry = zipfile.ZipInfo(f"{i}")
            entry.file_size = entry.compress_size = 10**6
            entry.header_offset, entry.CRC = 0, archive.infolist()[0].CRC
            archive.filelist.append(entry)
        archive._didModify = True
    refused(foreign, str(path), "unpack")


def test_tensors_that_claim_more_than_the_file_are_refused(foreign: Path) -> None:
    """Strides of 0 make a terabyte of one number; a storage that claims more than its record has
    would be read past its end.
    """
    weights = safetensors.torch.load_file(foreign / WEIGHTS)
    path = replace_by_pickle(foreign, {**weights, "conv_in.bias": torch.zeros(1).expand(2**40)})
    refused(foreign, str(path), "shape")

    torch.save({**weights, "conv_in.bias": torch.arange(77.0)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(
                name, content.replace(b"K\x4d", b"J\xff\xff\xff\x7f")
            )  # 77 -> 2^31 - 1
    refused(foreign, str(path))


# --- Any damage


@FUZZ
@given(data=st.data())
def test_damaged_checkpoint_is_refused_or_finite(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Flip, cut, insert or repeat bytes anywhere: a finite model or one line, and nothing else."""
    folder = tmp_path_factory.mktemp("damaged")
    save_model(folder, random_unet(0), LINEAR)
    path = folder / data.draw(st.sampled_from([WEIGHTS, PICKLED, "config.json", SCHEDULER]))
    if path.suffix == ".bin":
        path = replace_by_pickle(folder, random_unet(0).state_dict())
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        # The header decides, so half of the damage goes there.
        at = min(data.draw(st.one_of(st.integers(0, 2000), st.integers(0, 10**6))), len(raw) - 1)
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        if kind == "flip" and raw:
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del raw[at:]
        elif kind == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=20))
        else:
            raw[at:at] = raw[max(0, at - 100) : at]
    path.write_bytes(raw)
    finite_or_refused(folder)


def finite_or_refused(folder: Path) -> None:
    outcome = result_or_refusal(load_model, folder)
    if not isinstance(outcome, str):
        model, schedule = outcome
        assert all(
            bool(p.isfinite().all()) and p.dtype == torch.float32 for p in model.parameters()
        )
        assert schedule.gamma.float().min() > 0
        assert schedule.sigma.float().min() > 0


def result_or_refusal(load: Callable, folder: Path) -> tuple | str:
    try:
        return load(folder)
    except InputError as error:
        message = str(error)
    assert str(folder) in message
    assert message.isprintable()
    return message


UNET_OPTIONS = [*unet_config_to_dict(TINY), "act_fn", "dropout", "num_train_timesteps", "other"]
SCHEDULER_OPTIONS = [
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "clip_sample",
    "_class_name",
]


@FUZZ
@given(
    config=st.dictionaries(st.sampled_from(UNET_OPTIONS), JSON, max_size=3),
    scheduler=st.dictionaries(st.sampled_from(SCHEDULER_OPTIONS), JSON, max_size=2),
    notes=st.booleans(),
)
def test_option_of_any_value_is_refused_or_finite(
    config: dict, scheduler: dict, notes: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("odd")
    save_model(folder, random_unet(0), LINEAR)
    if not notes:
        edit_weights(folder, lambda tensors: None)
    edit_json(folder / "config.json", **config)
    edit_json(folder / SCHEDULER, **scheduler)
    finite_or_refused(folder)


@FUZZ
@given(data=st.data())
def test_damaged_training_state_is_refused_or_finite(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("state")
    save_state(
        folder, {"a": torch.ones(5), "b": torch.zeros(2, 3)}, {"step": 3, "run": {"lr": 0.1}}
    )
    raw = bytearray((folder / "state.safetensors").read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=3)):
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "state.safetensors").write_bytes(raw[: data.draw(st.integers(0, 2 * len(raw)))])
    outcome = result_or_refusal(load_state, folder)
    if not isinstance(outcome, str):
        assert all(bool(tensor.isfinite().all()) for tensor in outcome[0].values())
        assert isinstance(outcome[1], dict)

"""Checkpoints: read and written as diffusers does, old or new after any interruption, refused if
broken or hostile.
"""

import errno
import json
import os
import pickle
import resource
import shutil
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import JSON
from hypothesis import given, settings
from hypothesis import strategies as st
from test_unet import CELEBAHQ as FULL_CELEBAHQ
from torch import Tensor
from torch.testing import assert_close

from tiny_retrack import NoiseSchedule, UNet, UNetConfig, load_model, save_model
from tiny_retrack.lab.checkpoint import atomic, load_state, read_json, save_state, write_json
from tiny_retrack.lab.presets import PRESETS
from tiny_retrack.types import InputError, NonFiniteError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # the oracle
    from diffusers.training_utils import EMAModel

TINY = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(4, 8),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=4,
    norm_num_groups=2,
)
CIFAR10 = replace(PRESETS["cifar10"].unet, block_out_channels=(16, 32, 32, 32), norm_num_groups=4)
CELEBAHQ = replace(
    FULL_CELEBAHQ, sample_size=32, block_out_channels=(8, 8, 16, 16, 32, 32), norm_num_groups=4
)
MNIST = replace(PRESETS["mnist-tshirt"].unet, block_out_channels=(8, 16, 32), norm_num_groups=4)
LINEAR = NoiseSchedule.linear()
WEIGHTS, SCHEDULER = "diffusion_pytorch_model", "scheduler/scheduler_config.json"
OLD_NAMES = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}


def unet(seed: int, config: UNetConfig = TINY) -> UNet:
    model, generator = UNet(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def oracle(config: UNetConfig) -> UNet2DModel:
    return UNet2DModel(**{f.name: getattr(config, f.name) for f in fields(config)})


def batch(config: UNetConfig) -> tuple[Tensor, Tensor]:
    size = config.sample_size
    x_t = torch.randn(3, config.in_channels, size, size, generator=torch.Generator().manual_seed(1))
    return x_t, torch.tensor([0, 437, 999])


def same(a: UNet, b: UNet) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return (
        a.config == b.config
        and mine.keys() == theirs.keys()
        and all(torch.equal(mine[name], theirs[name]) for name in mine)
    )


def refused(folder: Path, *parts: str) -> str:
    """The refusal's message: one line, with each of the parts."""
    with pytest.raises(InputError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    for part in parts:
        assert part in message
    return message


def edit_json(path: Path, **options: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def edit_weights(
    folder: Path, edit: Callable[[dict[str, Tensor]], object], name: str = WEIGHTS
) -> None:
    """Rewrite the weights as diffusers would, without our notes in the header."""
    path = folder / f"{name}.safetensors"
    tensors = safetensors.torch.load_file(path)
    edit(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


@pytest.fixture(scope="module", autouse=True)
def _no_fsync() -> Iterator[None]:
    """Waiting for the disk is most of the time of these tests, and tells only after a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", unet(0), LINEAR)
    return tmp_path / "model"


@pytest.fixture
def foreign(saved: Path) -> Path:
    """Without notes in the header, so that the JSON files speak alone."""
    edit_weights(saved, lambda tensors: None)
    return saved


# --- There and back, with diffusers on the other side


@pytest.mark.parametrize(
    "config", [MNIST, CIFAR10, CELEBAHQ], ids=["mnist-tshirt", "ddpm-cifar10-32", "celebahq"]
)
def test_ours_are_read_by_diffusers(config: UNetConfig, tmp_path: Path) -> None:
    model, (x_t, t) = unet(0, config), batch(config)
    save_model(tmp_path, model, LINEAR)
    theirs = UNet2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(theirs(x_t, t).sample, model(x_t, t), rtol=1e-5, atol=1e-5)
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "scheduler")
    assert_close(scheduler.alphas_cumprod.sqrt(), LINEAR.gamma.float(), rtol=1e-5, atol=0)
    assert scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize(
    "config", [MNIST, CIFAR10, CELEBAHQ], ids=["mnist-tshirt", "ddpm-cifar10-32", "celebahq"]
)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_diffusers_are_read_by_us(config: UNetConfig, safe: bool, tmp_path: Path) -> None:
    theirs, (x_t, t) = oracle(config), batch(config)
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    model, schedule = load_model(tmp_path)
    with torch.no_grad():
        assert_close(model(x_t, t), theirs(x_t, t).sample, rtol=1e-5, atol=1e-5)
    assert torch.equal(schedule.beta, LINEAR.beta)  # told by nothing here: DDPM's is taken
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_attention_under_its_old_names(safe: bool, tmp_path: Path) -> None:
    theirs, (x_t, t) = oracle(CIFAR10), batch(CIFAR10)
    theirs.save_config(tmp_path)
    weights = {}
    for name, weight in theirs.state_dict().items():
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old)
        weights[name] = weight
    assert (
        sum("query" in name for name in weights) == 12
    )  # six attentions: else nothing was renamed
    if safe:
        safetensors.torch.save_file(weights, tmp_path / f"{WEIGHTS}.safetensors")
    else:
        torch.save(weights, tmp_path / f"{WEIGHTS}.bin")
    with torch.no_grad():
        assert_close(load_model(tmp_path)[0](x_t, t), theirs(x_t, t).sample, rtol=1e-5, atol=1e-5)


def test_a_pipelines_folder_and_its_subfolders(tmp_path: Path) -> None:
    """`unet` beside `scheduler`; then `unet_ema`, whose config holds the average's own options, is
    preferred.
    """
    raw, averaged = unet(0), unet(1)
    theirs = oracle(TINY)
    theirs.load_state_dict(raw.state_dict())
    scheduler = DDPMScheduler(
        num_train_timesteps=500, beta_start=0.001, beta_end=0.03, clip_sample=False
    )
    DDPMPipeline(unet=theirs, scheduler=scheduler).save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "unet"):
        model, schedule = load_model(folder)
        assert same(model, raw)
        assert torch.equal(schedule.beta, NoiseSchedule.linear(500, 0.001, 0.03).beta)
    theirs.load_state_dict(averaged.state_dict())
    ema = EMAModel(theirs.parameters(), model_cls=UNet2DModel, model_config=theirs.config)
    ema.save_pretrained(tmp_path / "unet_ema")
    assert same(load_model(tmp_path)[0], averaged)
    shutil.move(
        tmp_path / SCHEDULER, tmp_path / "scheduler_config.json"
    )  # as the oldest repositories have it
    assert load_model(tmp_path)[1].num_steps == 500


@pytest.mark.parametrize(
    "schedule", [NoiseSchedule.linear(300, 2e-4, 0.05), NoiseSchedule.linear(1, 0.1, 0.1)]
)
def test_a_linear_schedule_comes_back_bitwise(schedule: NoiseSchedule, tmp_path: Path) -> None:
    save_model(tmp_path, unet(0), schedule)
    assert read_json(tmp_path / SCHEDULER)["trained_betas"] is None
    assert torch.equal(load_model(tmp_path)[1].beta, schedule.beta)


def test_any_schedule_comes_back_bitwise(tmp_path: Path) -> None:
    beta = (
        torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1 + 1e-4
    )
    save_model(tmp_path, unet(0), NoiseSchedule(beta))
    assert torch.equal(load_model(tmp_path)[1].beta, beta)
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "scheduler")
    assert_close(scheduler.betas, beta.float())


def test_another_state_in_the_models_place(tmp_path: Path) -> None:
    model = unet(0).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    save_model(tmp_path, model, LINEAR)
    assert same(load_model(tmp_path)[0], model)
    save_model(tmp_path, model, LINEAR, state={**unet(1).state_dict(), "unused": torch.zeros(1)})
    assert same(load_model(tmp_path)[0], unet(1))
    assert same(model, unet(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype: torch.dtype, saved: Path) -> None:
    edit_weights(
        saved, lambda tensors: tensors.update({name: w.to(dtype) for name, w in tensors.items()})
    )
    before = unet(0).state_dict()
    for name, weight in load_model(saved)[0].state_dict().items():
        assert torch.equal(weight, before[name].to(dtype).float())


def test_a_loaded_model_lets_go_of_its_file(foreign: Path) -> None:
    torch.save(
        safetensors.torch.load_file(foreign / f"{WEIGHTS}.safetensors"), foreign / f"{WEIGHTS}.bin"
    )
    (foreign / f"{WEIGHTS}.safetensors").unlink()
    model, _ = load_model(foreign)
    os.truncate(foreign / f"{WEIGHTS}.bin", 0)  # a weight still mapped to it would kill the process
    assert same(model, unet(0))


# --- Whole files or none


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".tmp-")]


def test_atomic_replaces_when_done_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "grid.png"
    for text in ("one", "two"):
        with atomic(path) as temporary:
            temporary.write_text(text)
            assert (temporary.parent, temporary.suffix) == (path.parent, ".png")
            assert path.exists() == (text == "two")
        assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError])
def test_atomic_leaves_no_trace_of_a_failed_write(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "out.json"
    write_json(path, {"a": 1})

    def fail() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    assert read_json(path) == {"a": 1}


def test_the_data_are_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[object] = []
    replace_file = Path.replace

    def fsync(handle: int) -> None:
        status = os.fstat(handle)
        events.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)

    def recorded(path: Path, target: Path) -> Path:
        events.append("rename")
        return replace_file(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", recorded)
    with atomic(tmp_path / "a") as temporary:
        temporary.write_bytes(b"12345")
    assert events == [5, "rename", "folder"]


def test_atomic_names_the_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"out\.json") as caught:
        write_json(tmp_path / "file" / "out.json", {})
    assert caught.value.filename == str(tmp_path / "file" / "out.json")


def test_outputs_may_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_model(tmp_path, unet(0), LINEAR)
        save_state(tmp_path, {"a": torch.zeros(1)}, {})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
    assert len(files) == 5


class Killed(BaseException):
    pass


def test_killed_between_any_two_steps_a_folder_holds_the_old_model_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another layout and schedule over the old ones: the save is cut before each change that it
    makes to the disk.
    """
    old, new = (
        unet(0),
        unet(1, replace(TINY, flip_sin_to_cos=False, norm_eps=1e-2)),
    )  # weights of the same shapes
    longer = NoiseSchedule.linear(2000)
    seen, step = [], 0
    while True:
        folder = tmp_path / str(step)
        save_model(folder, old, LINEAR)
        left = [step]

        def counted(change: Callable, left: list[int] = left) -> Callable:
            def changed(path: Path, *args: object, **kwargs: object) -> object:
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return change(path, *args, **kwargs)

            return changed

        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "mkdir"):
                patch.setattr(Path, name, counted(getattr(Path, name)))
            try:
                save_model(folder, new, longer)
                killed = False
            except Killed:
                killed = True
        model, schedule = load_model(folder)
        assert schedule.num_steps == (1000 if same(model, old) else 2000)
        assert same(model, old) or same(model, new)
        seen.append(same(model, new))
        if not killed:
            break
        save_model(folder, new, longer)  # and the next save mends it
        assert same(load_model(folder)[0], new)
        assert read_json(folder / "config.json")["norm_eps"] == 1e-2
        step += 1
    assert seen == sorted(seen)
    assert seen.count(False) > 3
    assert seen.count(True) > 3


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_full_disk_leaves_the_old_checkpoint(share: float, saved: Path) -> None:
    """A limit on the size of any file stands in for the full disk: the write stops half-way with an
    OSError.
    """
    save_state(saved, {"a": torch.zeros(1000)}, {"step": 1})
    limit, before = (
        int(share * (saved / f"{WEIGHTS}.safetensors").stat().st_size),
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=WEIGHTS) as model_error:
            save_model(saved, unet(1), LINEAR)
        with pytest.raises(OSError, match=r"state\.safetensors") as state_error:
            save_state(saved, {"a": torch.ones(10**5)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert model_error.value.errno == state_error.value.errno == errno.EFBIG
    assert same(load_model(saved)[0], unet(0))
    tensors, meta = load_state(saved)
    assert meta == {"step": 1}
    assert torch.equal(tensors["a"], torch.zeros(1000))
    assert not leftovers(saved)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_never_replace_good_ones(bad: float, saved: Path) -> None:
    model = unet(1)
    with torch.no_grad():
        model.conv_out.bias.fill_(bad)
    with pytest.raises(NonFiniteError, match="not finite"):
        save_model(saved, model, LINEAR)
    assert same(load_model(saved)[0], unet(0))


def test_training_state_comes_back_bitwise(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.weight": torch.randn(3, 4, 5, 5, generator=generator).to(
            memory_format=torch.channels_last
        ),
        "optimizer.0.step": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
        "a.b c/é": torch.randn(2, generator=generator, dtype=torch.float64),
    }
    meta = {"step": 7, "run": {"lr": 1e-4, "forget": [1, 2], "name": "é \n"}}
    save_state(tmp_path, tensors, meta)
    back, told = load_state(tmp_path)
    assert told == meta == read_json(tmp_path / "state.json")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


# --- Broken files


def test_no_checkpoint_here(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "no checkpoint")
    (tmp_path / f"{WEIGHTS}.bin").mkdir()
    refused(tmp_path, str(tmp_path), "no checkpoint")
    with pytest.raises(InputError, match=r"state\.safetensors"):
        load_state(tmp_path)


def test_a_model_is_no_training_state(saved: Path) -> None:
    shutil.copy(saved / f"{WEIGHTS}.safetensors", saved / "state.safetensors")
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
def test_json_that_is_none_is_named(name: str, content: bytes, saved: Path) -> None:
    (saved / name).write_bytes(content)
    refused(saved, name)


def test_json_too_large_to_be_one_is_not_read(saved: Path) -> None:
    os.truncate(saved / "config.json", 2**40)  # a terabyte of nothing, which takes no room
    refused(saved, "config.json", "too large")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("prediction_type", "v_prediction"),
        ("beta_schedule", "squaredcos_cap_v2"),
        ("beta_schedule", ["linear"]),
        ("variance_type", "learned_range"),
        ("rescale_betas_zero_snr", True),
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
def test_a_scheduler_that_cannot_be_is_refused_by_name(
    option: str, value: object, foreign: Path
) -> None:
    load_model(foreign)
    edit_json(foreign / SCHEDULER, **{option: value})
    assert len(refused(foreign, "scheduler_config.json", option)) < 600


def test_a_schedule_that_leaves_no_image_is_refused(foreign: Path) -> None:
    edit_json(foreign / SCHEDULER, beta_end=0.9)
    refused(foreign, "scheduler_config.json", "too large")


@pytest.mark.parametrize("option", ["in_channels", "block_out_channels"])
def test_a_config_refused_by_the_unet_names_the_file(option: str, saved: Path) -> None:
    edit_json(saved / "config.json", **{option: 10**9})
    refused(saved, str(saved / "config.json"), option)


def test_a_config_that_the_weights_do_not_have_is_refused_before_memory_is_asked_for(
    foreign: Path,
) -> None:
    """The largest layout that a config may describe takes terabytes, and is told from these weights
    without them.
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
def test_json_that_the_weights_were_not_saved_with_is_told(
    name: str, change: dict, saved: Path
) -> None:
    edit_json(saved / name, **change)
    refused(saved, name, "not what")
    (saved / name).unlink()
    model, schedule = load_model(saved)
    assert same(model, unet(0))
    assert torch.equal(schedule.beta, LINEAR.beta)


def test_weights_without_any_config(foreign: Path) -> None:
    (foreign / "config.json").unlink()
    refused(foreign, "config.json", "no such file")


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda w: w.pop("conv_in.weight"), "conv_in.weight"),
        (lambda w: w.update({"class_embedding.weight": torch.zeros(2)}), "class_embedding.weight"),
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
    path = foreign / f"{WEIGHTS}.safetensors"
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


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def as_bin(folder: Path, value: object) -> Path:
    (folder / f"{WEIGHTS}.safetensors").unlink()
    torch.save(value, folder / f"{WEIGHTS}.bin")
    return folder / f"{WEIGHTS}.bin"


def test_code_in_a_pickle_is_never_run(foreign: Path, tmp_path: Path) -> None:
    target = tmp_path / "it ran"
    value = {**unet(0).state_dict(), "conv_in.weight": Bomb(target)}
    path = as_bin(foreign, value)
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
def test_a_bin_of_anything_but_named_tensors(value: object, foreign: Path) -> None:
    path = as_bin(foreign, value)
    refused(foreign, str(path), "state_dict()")


def test_a_bin_that_would_unpack_to_more_than_its_size(foreign: Path) -> None:
    weights = safetensors.torch.load_file(foreign / f"{WEIGHTS}.safetensors")
    path = as_bin(foreign, weights)
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


def test_a_bin_whose_tensors_claim_more_than_it_holds(foreign: Path) -> None:
    """Strides of 0 make a terabyte of one number; a storage said to be larger than its record reads
    past it.
    """
    weights = safetensors.torch.load_file(foreign / f"{WEIGHTS}.safetensors")
    path = as_bin(foreign, {**weights, "conv_in.bias": torch.zeros(1).expand(2**40)})
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


FUZZ = settings(max_examples=2 * settings().max_examples)


@FUZZ
@given(data=st.data())
def test_any_damage_to_any_file_is_refused_or_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Flip, cut, insert or repeat bytes anywhere: a finite model or one line, and nothing else."""
    folder = tmp_path_factory.mktemp("damaged")
    save_model(folder, unet(0), LINEAR)
    path = folder / data.draw(
        st.sampled_from([f"{WEIGHTS}.safetensors", f"{WEIGHTS}.bin", "config.json", SCHEDULER])
    )
    if path.suffix == ".bin":
        path = as_bin(folder, unet(0).state_dict())
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


UNET_OPTIONS = [*TINY.to_dict(), "act_fn", "dropout", "num_train_timesteps", "other"]
SCHEDULER_OPTIONS = [
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "_class_name",
]


@FUZZ
@given(
    config=st.dictionaries(st.sampled_from(UNET_OPTIONS), JSON, max_size=3),
    scheduler=st.dictionaries(st.sampled_from(SCHEDULER_OPTIONS), JSON, max_size=2),
    notes=st.booleans(),
)
def test_any_value_of_any_option_is_refused_or_harmless(
    config: dict, scheduler: dict, notes: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("odd")
    save_model(folder, unet(0), LINEAR)
    if not notes:
        edit_weights(folder, lambda tensors: None)
    edit_json(folder / "config.json", **config)
    edit_json(folder / SCHEDULER, **scheduler)
    finite_or_refused(folder)


@FUZZ
@given(data=st.data())
def test_any_damage_to_a_training_state(
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

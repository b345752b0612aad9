"""Checkpoints: read and written as diffusers does, and old or new after any interruption.

Damaged and hostile files: robustness/test_hostile_files.py.
"""

import errno
import os
import resource
import shutil
import stat
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
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
    edit_json,
    edit_weights,
    random_unet,
    replace_by_pickle,
    same_model,
    same_tensors,
)
from test_unet import CELEBAHQ as FULL_CELEBAHQ
from torch import Tensor
from torch.testing import assert_close

from tiny_retrack import NoiseSchedule, UNetConfig, load_model, save_model
from tiny_retrack.lab.checkpoint import (
    atomic,
    fingerprint,
    load_state,
    read_json,
    save_state,
    write_json,
)
from tiny_retrack.lab.presets import PRESETS
from tiny_retrack.types import InputError, NonFiniteError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import (  # the reference
        DDIMPipeline,
        DDIMScheduler,
        DDPMPipeline,
        DDPMScheduler,
        DiffusionPipeline,
        PNDMPipeline,
        PNDMScheduler,
        UNet2DModel,
    )
    from diffusers.training_utils import EMAModel

CIFAR10 = replace(PRESETS["cifar10"].unet, block_out_channels=(16, 32, 32, 32), norm_num_groups=4)
CELEBAHQ = replace(
    FULL_CELEBAHQ, sample_size=32, block_out_channels=(8, 8, 16, 16, 32, 32), norm_num_groups=4
)
MNIST = replace(PRESETS["mnist-tshirt"].unet, block_out_channels=(8, 16, 32), norm_num_groups=4)
LAYOUTS = pytest.mark.parametrize(
    "config", [MNIST, CIFAR10, CELEBAHQ], ids=["mnist-tshirt", "ddpm-cifar10-32", "celebahq"]
)
FORMATS = pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
OLD_NAMES = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}


def reference(config: UNetConfig) -> UNet2DModel:
    return UNet2DModel(**{f.name: getattr(config, f.name) for f in fields(config)})


def batch(config: UNetConfig) -> tuple[Tensor, Tensor]:
    size = config.sample_size or 32
    x_t = torch.randn(3, config.in_channels, size, size, generator=torch.Generator().manual_seed(1))
    return x_t, torch.tensor([0, 437, 999])


# --- Written and read, here and by diffusers


@LAYOUTS
def test_saved_model_is_read_by_diffusers(config: UNetConfig, tmp_path: Path) -> None:
    model, (x_t, t) = random_unet(0, config), batch(config)
    save_model(tmp_path, model, LINEAR)
    theirs = UNet2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(theirs(x_t, t).sample, model(x_t, t), rtol=1e-5, atol=1e-5)
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "scheduler")
    assert_close(scheduler.alphas_cumprod.sqrt(), LINEAR.gamma.float(), rtol=1e-5, atol=0)
    assert scheduler.config.prediction_type == "epsilon"


@LAYOUTS
@FORMATS
def test_loaded_model_equals_diffusers(config: UNetConfig, safe: bool, tmp_path: Path) -> None:
    theirs, (x_t, t) = reference(config), batch(config)
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    model, schedule = load_model(tmp_path)
    with torch.no_grad():
        assert_close(model(x_t, t), theirs(x_t, t).sample, rtol=1e-5, atol=1e-5)
    assert torch.equal(schedule.beta, LINEAR.beta)  # no file describes it: it is DDPM's
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


@FORMATS
def test_attention_loads_under_its_old_names(safe: bool, tmp_path: Path) -> None:
    theirs, (x_t, t) = reference(CIFAR10), batch(CIFAR10)
    theirs.save_config(tmp_path)
    weights = {}
    for name, weight in theirs.state_dict().items():
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old)
        weights[name] = weight
    assert sum("query" in name for name in weights) == 12  # of six attentions
    if safe:
        safetensors.torch.save_file(weights, tmp_path / WEIGHTS)
    else:
        torch.save(weights, tmp_path / PICKLED)
    with torch.no_grad():
        assert_close(load_model(tmp_path)[0](x_t, t), theirs(x_t, t).sample, rtol=1e-5, atol=1e-5)


def test_pipeline_folder_loads_the_average_first(tmp_path: Path) -> None:
    """`unet` beside `scheduler`; then also `unet_ema`, whose config holds the average's own
    options.
    """
    raw, averaged = random_unet(0), random_unet(1)
    theirs = reference(TINY)
    theirs.load_state_dict(raw.state_dict())
    scheduler = DDPMScheduler(
        num_train_timesteps=500, beta_start=0.001, beta_end=0.03, clip_sample=False
    )
    DDPMPipeline(unet=theirs, scheduler=scheduler).save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "unet"):
        model, schedule = load_model(folder)
        assert same_model(model, raw)
        assert torch.equal(schedule.beta, NoiseSchedule.linear(500, 0.001, 0.03).beta)
    theirs.load_state_dict(averaged.state_dict())
    ema = EMAModel(theirs.parameters(), model_cls=UNet2DModel, model_config=theirs.config)
    ema.save_pretrained(tmp_path / "unet_ema")
    assert same_model(load_model(tmp_path)[0], averaged)
    # The place of the oldest repositories.
    shutil.move(tmp_path / SCHEDULER, tmp_path / "scheduler_config.json")
    assert load_model(tmp_path)[1].num_steps == 500


OTHER_SAMPLING = {
    "clip_sample": False,
    "clip_sample_range": 2.0,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(variance_type="fixed_large", **OTHER_SAMPLING),
        DDIMScheduler(set_alpha_to_one=False, **OTHER_SAMPLING),
        PNDMScheduler(skip_prk_steps=True, timestep_spacing="linspace", beta_end=0.01),
        DDPMScheduler(trained_betas=[0.01] * 1000, beta_schedule="squaredcos_cap_v2"),
        PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    ],
    ids=["ddpm", "ddim", "pndm", "trained betas", "stable diffusion"],
)
def test_scheduler_is_saved_as_it_was_loaded(scheduler, tmp_path: Path) -> None:
    """Every option, also those that are not read."""
    theirs = tmp_path / "theirs"
    reference(TINY).save_pretrained(theirs)
    scheduler.save_pretrained(theirs / "scheduler")
    for before, after in (("theirs", "once"), ("once", "twice")):
        save_model(tmp_path / after, *load_model(tmp_path / before))
        assert read_json(tmp_path / after / SCHEDULER) == read_json(theirs / SCHEDULER)
    assert_close(load_model(tmp_path / "twice")[1].beta, scheduler.betas.double())
    assert fingerprint(tmp_path / "twice") == fingerprint(tmp_path / "once")


@pytest.mark.parametrize(
    ("pipeline", "scheduler"),
    [
        (DDPMPipeline, DDPMScheduler(variance_type="fixed_large", clip_sample=False)),
        (DDIMPipeline, DDIMScheduler(clip_sample=False)),
        (PNDMPipeline, PNDMScheduler(timestep_spacing="trailing")),
    ],
    ids=["ddpm", "ddim", "pndm"],
)
def test_pipeline_of_diffusers_draws_the_same_pictures_from_a_saved_model(
    pipeline, scheduler, tmp_path: Path
) -> None:
    pipeline(unet=reference(TINY), scheduler=scheduler).save_pretrained(tmp_path / "theirs")
    save_model(tmp_path / "ours", *load_model(tmp_path / "theirs"))
    pictures = []
    for name in ("theirs", "ours"):
        opened = DiffusionPipeline.from_pretrained(tmp_path / name)
        assert isinstance(opened, pipeline)
        opened.set_progress_bar_config(disable=True)
        drawn = opened(
            generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="np"
        )
        pictures.append(torch.from_numpy(drawn.images))
    assert pictures[0].std() > 0.05
    assert_close(pictures[1], pictures[0], rtol=0, atol=1e-5)


def test_pipeline_of_diffusers_opens_a_trained_model(saved: Path) -> None:
    opened = DDPMPipeline.from_pretrained(saved)
    assert isinstance(opened.scheduler, DDPMScheduler)
    assert same_tensors(opened.unet.state_dict(), random_unet(0).state_dict())


@pytest.mark.parametrize(
    "layout", ["checkpoint-500/unet", "checkpoint-500/unet_ema", "unet", "checkpoint-500", "."]
)
def test_scheduler_is_found_above_the_model(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """As diffusers' training scripts lay them out; also from inside the model's own folder."""
    model = tmp_path / "run" / layout
    reference(TINY).save_pretrained(model)
    DDPMScheduler(num_train_timesteps=500).save_pretrained(tmp_path / "run/scheduler")
    assert load_model(model)[1].num_steps == 500
    assert load_model(tmp_path / "run" / layout.removesuffix("/unet"))[1].num_steps == 500
    before = fingerprint(model)
    monkeypatch.chdir(model)
    assert load_model(".")[1].num_steps == 500
    assert capsys.readouterr().err == ""
    DDPMScheduler(num_train_timesteps=600).save_pretrained(tmp_path / "run/scheduler")
    assert fingerprint(model) != before


def test_scheduler_that_is_nowhere_is_assumed_aloud(tmp_path: Path, capsys) -> None:
    """No further up than the layouts go: another model's scheduler is not taken."""
    reference(TINY).save_pretrained(tmp_path / "models/mine")
    DDPMScheduler(num_train_timesteps=500).save_pretrained(tmp_path / "models/scheduler")
    assert torch.equal(load_model(tmp_path / "models/mine")[1].beta, LINEAR.beta)
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {tmp_path}/models/mine has no scheduler/scheduler_config")
    assert "assuming DDPM's linear schedule (1000 steps, beta 0.0001 to 0.02)" in said
    assert said.count("\n") == 1


def test_dropout_is_off_and_said_so(saved: Path, capsys) -> None:
    edit_weights(saved, lambda tensors: None)
    edit_json(saved / "config.json", dropout=0.1)
    assert same_model(load_model(saved)[0], random_unet(0))
    assert "was trained with dropout 0.1, which is off here" in capsys.readouterr().err
    edit_json(saved / "config.json", dropout=0.0)
    load_model(saved)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module."])
def test_weights_of_a_wrapped_model_load(prefix: str, saved: Path) -> None:
    """As torch.compile and DistributedDataParallel name them."""

    def wrap(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    edit_weights(saved, wrap)
    assert same_model(load_model(saved)[0], random_unet(0))


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_variant_of_half_precision_loads(variant: str, tmp_path: Path) -> None:
    theirs = reference(TINY)
    theirs.half() if variant == "fp16" else theirs.bfloat16()
    theirs.save_pretrained(tmp_path, variant=variant)
    found = load_model(tmp_path)[0].state_dict()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(found[name], weight.float())


def test_sharded_weights_are_named(tmp_path: Path) -> None:
    reference(TINY).save_pretrained(tmp_path / "unet", max_shard_size="5kB")
    with pytest.raises(
        InputError, match=r"what it has, unet/diffusion.* and \d+ more, is not read"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        (NoiseSchedule.linear(300, 2e-4, 0.05), "linear"),
        (NoiseSchedule.linear(1, 0.1, 0.1), "linear"),
        (NoiseSchedule.scaled_linear(), "scaled_linear"),
    ],
)
def test_named_schedule_survives_bitwise(
    schedule: NoiseSchedule, name: str, tmp_path: Path
) -> None:
    save_model(tmp_path, random_unet(0), schedule)
    written = read_json(tmp_path / SCHEDULER)
    assert (written["beta_schedule"], written["trained_betas"]) == (name, None)
    assert torch.equal(load_model(tmp_path)[1].beta, schedule.beta)


def test_schedule_survives_bitwise(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    beta = torch.rand(50, generator=generator, dtype=torch.float64) * 0.1 + 1e-4
    save_model(tmp_path, random_unet(0), NoiseSchedule(beta))
    assert torch.equal(load_model(tmp_path)[1].beta, beta)
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "scheduler")
    assert_close(scheduler.betas, beta.float())


def test_saved_state_takes_the_place_of_the_weights(tmp_path: Path) -> None:
    model = random_unet(0).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    save_model(tmp_path, model, LINEAR)
    assert same_model(load_model(tmp_path)[0], model)
    save_model(
        tmp_path, model, LINEAR, state={**random_unet(1).state_dict(), "unused": torch.zeros(1)}
    )
    assert same_model(load_model(tmp_path)[0], random_unet(1))
    assert same_model(model, random_unet(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_load_as_float32(dtype: torch.dtype, saved: Path) -> None:
    edit_weights(
        saved, lambda tensors: tensors.update({name: w.to(dtype) for name, w in tensors.items()})
    )
    before = random_unet(0).state_dict()
    for name, weight in load_model(saved)[0].state_dict().items():
        assert torch.equal(weight, before[name].to(dtype).float())


def test_loaded_model_is_independent_of_its_file(saved: Path) -> None:
    path = replace_by_pickle(saved, safetensors.torch.load_file(saved / WEIGHTS))
    model, _ = load_model(saved)
    os.truncate(path, 0)  # reading a weight that is still mapped to it would kill the process
    assert same_model(model, random_unet(0))


# --- Digests


def test_fingerprint_is_of_the_files_and_not_of_the_folder(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(saved)
    assert len(fingerprint(saved)) == 16
    (saved / "run.json").write_text("{}")
    assert fingerprint(tmp_path / "copy") == fingerprint(saved)


def test_fingerprint_changes_with_every_part(saved: Path) -> None:
    """One weight by its last bit, an option of the network, an option of the schedule."""
    before = fingerprint(saved)
    raw = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    weights = fingerprint(saved)
    edit_json(saved / "config.json", norm_eps=0.1)
    config = fingerprint(saved)
    edit_json(saved / SCHEDULER, beta_end=0.03)
    schedule = fingerprint(saved)
    assert len({before, weights, config, schedule}) == 4


def test_fingerprint_covers_weights_larger_than_a_chunk(saved: Path, monkeypatch) -> None:
    monkeypatch.setattr("tiny_retrack.lab.checkpoint._CHUNK", 1000)
    raw = (saved / WEIGHTS).read_bytes()
    assert len(raw) > 10_000
    found = set()
    for at in range(0, len(raw), 999):
        (saved / WEIGHTS).write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        found.add(fingerprint(saved))
    assert len(found) == len(range(0, len(raw), 999))


def test_fingerprint_opens_no_model(saved: Path, tmp_path: Path) -> None:
    """It is of the bytes, so it is cheap, and damaged weights have one too."""
    (saved / WEIGHTS).write_bytes(b"no tensors")
    fingerprint(saved)
    with pytest.raises(InputError, match="nowhere is no checkpoint"):
        fingerprint(tmp_path / "nowhere")


def test_equal_models_are_equal_files(saved: Path, tmp_path: Path) -> None:
    """safetensors alone writes the header's notes in another order each time."""
    for i in range(20):
        save_model(tmp_path / str(i), random_unet(0), LINEAR)
        assert (tmp_path / str(i) / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()
    assert fingerprint(tmp_path / "0") == fingerprint(saved)


def test_weights_begin_at_a_multiple_of_8_bytes(saved: Path) -> None:
    """As safetensors does it, so that they can be memory-mapped."""
    raw = (saved / WEIGHTS).read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0


# --- Whole files or none


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".tmp-")]


def test_atomic_replaces_the_file_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "grid.png"
    for text in ("one", "two"):
        with atomic(path) as temporary:
            temporary.write_text(text)
            assert (temporary.parent, temporary.suffix) == (path.parent, ".png")
            assert path.exists() == (text == "two")
        assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError])
def test_atomic_keeps_the_old_file_on_failure(error: type[BaseException], tmp_path: Path) -> None:
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


def test_atomic_flushes_the_data_before_the_rename(
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


def test_file_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_model(tmp_path, random_unet(0), LINEAR)
        save_state(tmp_path, {"a": torch.zeros(1)}, {})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
    assert len(files) == 6


class Killed(BaseException):
    pass


def test_save_killed_at_any_step_leaves_the_old_model_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another layout and schedule in place of the old ones; killed before each change that the save
    makes to the disk.
    """
    old = random_unet(0)
    # Its weights have the same shapes.
    new = random_unet(1, replace(TINY, flip_sin_to_cos=False, norm_eps=1e-2))
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
        assert schedule.num_steps == (1000 if same_model(model, old) else 2000)
        assert same_model(model, old) or same_model(model, new)
        seen.append(same_model(model, new))
        if not killed:
            break
        save_model(folder, new, longer)  # and the next save repairs it
        assert same_model(load_model(folder)[0], new)
        assert read_json(folder / "config.json")["norm_eps"] == 1e-2
        step += 1
    assert seen == sorted(seen)
    assert seen.count(False) > 3
    assert seen.count(True) > 3


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_full_disk_keeps_the_old_checkpoint(share: float, saved: Path) -> None:
    """A limit on the size of any file stands in for a full disk: a write stops half-way with an
    OSError.
    """
    save_state(saved, {"a": torch.zeros(1000)}, {"step": 1})
    limit = int(share * (saved / WEIGHTS).stat().st_size)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=WEIGHTS) as model_error:
            save_model(saved, random_unet(1), LINEAR)
        with pytest.raises(OSError, match=r"state\.safetensors") as state_error:
            save_state(saved, {"a": torch.ones(10**5)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert model_error.value.errno == state_error.value.errno == errno.EFBIG
    assert same_model(load_model(saved)[0], random_unet(0))
    tensors, meta = load_state(saved)
    assert meta == {"step": 1}
    assert torch.equal(tensors["a"], torch.zeros(1000))
    assert not leftovers(saved)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_save_refuses_weights_that_are_not_finite(bad: float, saved: Path) -> None:
    model = random_unet(1)
    with torch.no_grad():
        model.conv_out.bias.fill_(bad)
    with pytest.raises(NonFiniteError, match="not finite"):
        save_model(saved, model, LINEAR)
    assert same_model(load_model(saved)[0], random_unet(0))


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(20_000), NoiseSchedule.linear(10, 1e-9)])
def test_save_refuses_a_schedule_that_could_not_be_loaded(
    schedule: NoiseSchedule, saved: Path
) -> None:
    with pytest.raises(InputError, match="scheduler option"):
        save_model(saved, random_unet(1), schedule)
    assert same_model(load_model(saved)[0], random_unet(0))


def test_training_state_survives_bitwise(tmp_path: Path) -> None:
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

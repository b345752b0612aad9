"""Models and training states on disk.

Every file is replaced in one rename, and no pickle can run code.

A model's folder has the layout of the diffusers library, so each can read the other's:

    config.json  diffusion_pytorch_model.safetensors  scheduler/scheduler_config.json

and a model_index.json, which diffusers' pipelines read and this module does not.

The header of the weights holds a copy of config.json and scheduler_config.json. So the rename that
brings new weights also brings their config and schedule, and a reader gets either the old model or
the new one, whenever the writer was killed.
"""

import hashlib
import json
import os
import pickle
import re
import secrets
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from tiny_retrack.lab.unet_config import unet_config_from_dict, unet_config_to_dict
from tiny_retrack.pictures import printable
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.training import rank
from tiny_retrack.types import InputError, NonFiniteError
from tiny_retrack.unet import UNet, UNetConfig

T = TypeVar("T")

_WEIGHTS = "diffusion_pytorch_model"
_CONFIG = "config.json"
_SCHEDULER = "scheduler/scheduler_config.json"
_PIPELINE = "model_index.json"
_STATE = "state.safetensors"
# Of the weights' files, the one to be read first. The last two are variants of diffusers.
_ENDINGS = (".safetensors", ".bin", ".fp16.safetensors", ".bf16.safetensors")
_MAX_JSON = 2**24  # bytes
_CHUNK = 2**20  # bytes that are hashed at a time

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
# The attention's names until 2023, and those of today.
_OLD_NAMES = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}

# Wrappers that put their own name before those of all weights: torch.compile, data parallelism.
_WRAPPERS = ("_orig_mod.", "module.")

# diffusers' pipeline of a scheduler.
_PIPELINES = {
    "DDPMScheduler": "DDPMPipeline",
    "DDIMScheduler": "DDIMPipeline",
    "PNDMScheduler": "PNDMPipeline",
}
_BETA_SCHEDULES = {
    "linear": NoiseSchedule.linear,
    "scaled_linear": NoiseSchedule.scaled_linear,
}
# The supported values of a scheduler's options about the noise that the model was trained with.
_SCHEDULER_FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": tuple(_PIPELINES),
    "beta_schedule": tuple(_BETA_SCHEDULES),
    "prediction_type": ("epsilon",),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "rescale_betas_zero_snr": (False,),
    "predict_epsilon": (True,),  # prediction_type until 2022
    "timestep_values": (None,),  # until 2022
}
_SCHEDULER_BETAS = {"num_train_timesteps", "beta_start", "beta_end", "trained_betas"}
# Options about sampling: not read, and saved as they were.
_SCHEDULER_SAMPLING = {
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "skip_prk_steps",
    "tensor_format",
}


# --- Files


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write a file completely or not at all.

    Yields a temporary path in the same folder, which replaces `path` when the block ends. The data
    are flushed to the disk before the rename, so neither a kill nor a power cut leaves half a file.
    If the block fails, the temporary file is removed. One that a killed process left is named
    .tmp-* and is never read.

    Raises:
        OSError: if the file cannot be written, with `path` as its filename; the file that was there
            before is unchanged.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync(folder: Path) -> None:
    """Flush the folder's renames and removals to the disk (POSIX only)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: if there is none, by the file's name.
    """
    return _parse_json(_read(path, _MAX_JSON), path)


def _read(path: Path, limit: float = float("inf")) -> bytes:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        if path.stat().st_size > limit:
            raise InputError(f"{path}: too large for what it should be")
        return path.read_bytes()
    except (OSError, MemoryError) as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """A library's message about untrusted bytes, as one line that is safe for any terminal."""
    return f"{' '.join(str(error).split()) or type(error).__name__!r:.80}"


def _parse_json(text: bytes | str, source: object) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{source} is not JSON ({_reason(error)}); restore or rewrite it"
        ) from None
    if not isinstance(value, dict):
        raise InputError(f"{source} is not a JSON object; restore or rewrite it")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write a .safetensors file with `notes` in its header, atomically.

    Equal tensors and notes give equal bytes.
    """
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    raw = safetensors.torch.save(dense, {"format": "pt", **notes})
    header, size = _header(raw)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # saved in random order
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    # Not safetensors' save_file: its files are readable by their owner only.
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.write(memoryview(raw)[size:])


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header's notes, from one read of the file, so both are of one moment.

    Raises:
        InputError: if the file is missing or damaged.
    """
    raw = _read(path)
    try:
        tensors = safetensors.torch.load(raw)
        header, _ = _header(raw)
    except Exception as error:  # on untrusted bytes, a parser may raise anything
        raise InputError(
            f"{path} is damaged or cut short ({_reason(error)}); replace or remove it"
        ) from None
    return tensors, header.get("__metadata__") or {}


def _header(raw: bytes) -> tuple[dict[str, Any], int]:
    """The JSON header of a .safetensors file, and the position at which the data begin."""
    size = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:size]), size


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors in a `torch.save` file, by torch's reader that unpickles tensors only.

    The file is memory-mapped, so that no storage it claims is allocated.
    """
    try:
        _check_archive(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except InputError:
        raise
    except pickle.UnpicklingError:  # something other than tensors, such as code
        tensors = None
    except Exception as error:
        raise InputError(
            f"{path} is damaged or of an old format ({_reason(error)}); use .safetensors"
        ) from None
    if not _are_named_tensors(tensors):
        raise InputError(
            f"{path} holds more than named tensors; save the model's state_dict() alone"
        )
    return tensors


def _check_archive(path: Path) -> None:
    """Refuse a zip archive that would unpack to more than its own size."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise InputError(f"{path} is compressed, as torch.save never does; refused")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise InputError(f"{path} would unpack to more than its size; refused")


def _are_named_tensors(value: object) -> TypeGuard[dict[str, Tensor]]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return False
    return all(
        isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        for tensor in value.values()
    )


def _require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise InputError(
                f"{path}: {name!r:.80} is {tensor.dtype}, not float16, bfloat16, float32 or float64"
            )
        if not bool(torch.isfinite(tensor.float()).all()):
            raise InputError(
                f"{path}: {name!r:.80} holds NaN or infinity; use an earlier checkpoint"
            )


# --- Models


def save_model(
    folder: Path | str,
    model: UNet,
    schedule: NoiseSchedule,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the model, or `state` in its place (such as its EMA weights), for `load_model` and for
    diffusers.

    JSON files of another model are removed first and new ones written last. In between, the copies
    in the weights' header are read in their place.

    Raises:
        InputError: for a schedule that `load_model` would refuse; the folder is not changed.
        NonFiniteError: if a weight is NaN or infinite; the folder is not changed.
        OSError: if the disk is full or refuses; the model that was there can still be loaded.
    """
    folder = Path(folder)
    weights = model.state_dict()
    if state is not None:
        weights = {name: state[name] for name in weights}
    if not all(bool(torch.isfinite(weight).all()) for weight in weights.values()):
        raise NonFiniteError(
            f"the weights are not finite: {folder} was not written; lower the learning rate"
        )
    scheduler = _schedule_to_dict(schedule)
    _schedule_from_dict(scheduler)
    described = {_CONFIG: unet_config_to_dict(model.config), _SCHEDULER: scheduler}
    files = {**described, _PIPELINE: _pipeline_of(scheduler)}
    for name, value in files.items():
        _remove_if_different(folder / name, value)
    notes = {name: json.dumps(value) for name, value in described.items()}
    write_tensors(folder / f"{_WEIGHTS}.safetensors", weights, notes)
    for name, value in files.items():
        if not (folder / name).exists():
            write_json(folder / name, value)


def _remove_if_different(path: Path, value: Mapping[str, Any]) -> None:
    """Remove a JSON file unless it holds this value."""
    if not path.exists():
        return
    with suppress(InputError):
        if read_json(path) == value:
            return
    path.unlink()
    _sync(path.parent)


def load_model(folder: Path | str) -> tuple[UNet, NoiseSchedule]:
    """The model and its schedule, on the CPU in float32, from `save_model` or from diffusers'
    `save_pretrained`.

    The folder may be the model's own, or hold it in `unet_ema` or `unet` (the first one found).
    Weights may be `.safetensors` or `.bin`. `save_model` writes the schedule that is returned with
    all options of the scheduler's config that it came from.

    Prints a warning to stderr where there is no scheduler's config (the schedule is then DDPM's
    linear one), and where the config has dropout, which this UNet does not have.

    No file can run code, or make this function allocate more memory than the file's own size asks
    for.

    Raises:
        InputError: for a missing, damaged or hostile file, one that does not fit the others, or an
            option that this UNet or schedule does not have.
    """
    path = _find_weights(Path(folder))
    if path.suffix == ".safetensors":
        tensors, notes = read_tensors(path)
    else:
        tensors, notes = _read_pickled(path), {}
    config, dropout = _read_config(path, notes)
    schedule = _read_schedule(path, notes)

    # Shapes only: memory is allocated after the weights are found to fit.
    with torch.device("meta"):
        model = UNet(config)
    weights = {_modern_name(name): weight for name, weight in tensors.items()}
    if len(weights) < len(tensors):
        raise InputError(f"{path} holds some weights twice, under two names; save the model again")
    _check_weights_fit(path, weights, model)
    _require_finite(path, weights)
    copies = {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()}
    model.load_state_dict(copies, assign=True)
    if dropout:
        _warn(f"{path.parent} was trained with dropout {dropout}, which is off here")
    if schedule is None:
        schedule = NoiseSchedule.linear()
        _warn(
            f"{path.parent} has no {_SCHEDULER}, and there is none above it: assuming DDPM's "
            "linear schedule (1000 steps, beta 0.0001 to 0.02)"
        )
    return model, schedule


def _warn(text: str) -> None:
    if rank() == 0:
        print(f"warning: {printable(text)}", file=sys.stderr)


def fingerprint(folder: Path) -> str:
    """A short digest of a checkpoint's files (weights, config, schedule), which are not loaded.

    Equal digests mean the same model. A model that is saved again has the same digest.

    Raises:
        InputError: if the folder is no checkpoint, or a file cannot be read.
    """
    weights = _find_weights(Path(folder))
    digest = hashlib.blake2b(digest_size=8)
    for path in (weights, weights.with_name(_CONFIG), _scheduler_file(weights)):
        if path.exists():
            digest.update(hash_file(path))
    return digest.hexdigest()


def hash_file(path: Path) -> bytes:
    """A digest of a file's bytes.

    Raises:
        InputError: if it cannot be read.
    """
    digest = hashlib.blake2b()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}") from None
    return digest.digest()


def _find_weights(folder: Path) -> Path:
    homes = (folder, folder / "unet_ema", folder / "unet")
    for home in homes:
        for ending in _ENDINGS:
            path = home / (_WEIGHTS + ending)
            if path.is_file():
                return path
    there = [path for home in homes for path in sorted(home.glob("*")) if _may_be_weights(path)]
    if not there:
        raise InputError(f"{folder} is no checkpoint: it has no {_WEIGHTS}.safetensors or .bin")
    first = there[0].relative_to(folder)
    more = f" and {len(there) - 1} more" if len(there) > 1 else ""
    raise InputError(
        f"{folder} has no {_WEIGHTS}.safetensors or .bin; what it has, {first}{more}, is not read: "
        'save it with diffusers as one file, model.save_pretrained(DIR, max_shard_size="100GB")'
    )


def _may_be_weights(path: Path) -> bool:
    """Shards and their index, other formats, other names."""
    endings = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5"}
    return path.is_file() and (path.suffix in endings or path.name.endswith(".index.json"))


def _read_config(weights: Path, notes: Mapping[str, str]) -> tuple[UNetConfig, float]:
    """The network, and the dropout that it was trained with."""
    file = weights.with_name(_CONFIG)
    copy = notes.get(_CONFIG)
    found = _agreed(file, copy, weights, unet_config_from_dict, unet_config_to_dict)
    if found is None:
        raise InputError(f"{file}: no such file, and the weights alone do not tell their layout")
    config, options = found
    return config, options.get("dropout", 0)


def _read_schedule(weights: Path, notes: Mapping[str, str]) -> NoiseSchedule | None:
    file = _scheduler_file(weights)
    copy = notes.get(_SCHEDULER)
    found = _agreed(file, copy, weights, _schedule_from_dict, _betas)
    return found[0] if found else None


def _betas(schedule: NoiseSchedule) -> list[float]:
    return schedule.beta.tolist()


def _scheduler_file(weights: Path) -> Path:
    """Where the scheduler's config is, or would be if there were one.

    In a pipeline's folder it is beside `unet`. diffusers' training scripts write the model into
    `checkpoint-500/unet`, beside which lies the `scheduler` of all checkpoints. The oldest
    repositories have scheduler_config.json beside config.json.
    """
    homes = [weights.parent]
    home = weights.parent.absolute()
    if home.name in ("unet", "unet_ema"):
        home = home.parent
        homes.append(home)
    if re.fullmatch(r"checkpoint-\d+", home.name):
        homes.append(home.parent)
    places = [home / name for home in homes for name in (_SCHEDULER, Path(_SCHEDULER).name)]
    return next((place for place in places if place.exists()), places[0])


def _check_weights_fit(path: Path, weights: Mapping[str, Tensor], model: UNet) -> None:
    """The names and shapes of the weights must be those of the model."""
    wanted = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    missing = wanted.keys() - weights.keys()
    extra = weights.keys() - wanted.keys()
    for names, what in ((missing, "missing"), (extra, "not in the config's layout")):
        if names:
            raise InputError(
                f"{path} does not fit its config: "
                f"{len(names)} weights {what}, such as {min(names)!r:.80}"
            )
    for name, weight in weights.items():
        if list(weight.shape) != wanted[name]:
            raise InputError(
                f"{path}: {name} has shape {list(weight.shape)}, its config asks for {wanted[name]}"
            )


def _modern_name(name: str) -> str:
    """The weight's name in a bare model today; attention had other names until 2023."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return re.sub(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.", _with_new_name, name)


def _with_new_name(match: re.Match[str]) -> str:
    return f"{match[1]}{_OLD_NAMES[match[2]]}."


def _agreed(
    file: Path,
    copy: str | None,
    weights: Path,
    parse: Callable[[dict[str, Any]], T],
    describe: Callable[[T], object],
) -> tuple[T, dict[str, Any]] | None:
    """What a JSON file says, or its copy in the weights' header if the file is missing: the parsed
    value, and the options that it was parsed from.

    If there are both, they must say the same. None if there is neither.
    """
    sources: list[tuple[str, dict[str, Any]]] = []
    if file.exists():
        sources.append((str(file), read_json(file)))
    if copy is not None:
        name = f"{file.name} in the header of {weights}"
        sources.append((name, _parse_json(copy, name)))
    values = []
    for name, options in sources:
        try:
            values.append(parse(options))
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    if len(values) == 2 and describe(values[0]) != describe(values[1]):
        raise InputError(
            f"{file} is not what {weights} was saved with; "
            "restore it, or delete it to use their own copy"
        )
    return (values[0], sources[0][1]) if values else None


# --- Schedules


class LoadedSchedule(NoiseSchedule):
    """The schedule of a scheduler's config, with the options that it came from.

    Attributes:
        options: what `save_model` writes, so that diffusers samples from the model as it did
            before.
    """

    def __init__(self, beta: Tensor, options: Mapping[str, Any]) -> None:
        super().__init__(beta)
        self.options = dict(options)


def _pipeline_of(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """With this as model_index.json, diffusers' `DDPMPipeline.from_pretrained` opens the folder."""
    name = scheduler.get("_class_name", "DDPMScheduler")
    return {
        "_class_name": _PIPELINES[name],
        "scheduler": ["diffusers", name],
        "unet": ["diffusers", "UNet2DModel"],
    }


def _schedule_to_dict(schedule: NoiseSchedule) -> dict[str, Any]:
    """The options that the schedule was loaded with; of any other, the config of a diffusers
    `DDPMScheduler` that adds this noise and samples as `ddpm_sample` does.
    """
    if isinstance(schedule, LoadedSchedule):
        return schedule.options
    first = schedule.beta[0].item()
    last = schedule.beta[-1].item()
    steps = schedule.num_steps
    names = [
        name
        for name, make in _BETA_SCHEDULES.items()
        if torch.equal(schedule.beta, make(steps, first, last).beta)
    ]
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": steps,
        "beta_schedule": names[0] if names else "linear",
        "beta_start": first,
        "beta_end": last,
        "trained_betas": None if names else schedule.beta.tolist(),
        "prediction_type": "epsilon",
        "variance_type": "fixed_small",
        "clip_sample": True,
    }


def _schedule_from_dict(options: Mapping[str, Any]) -> LoadedSchedule:
    """The checked schedule of a scheduler's config; missing options take diffusers' defaults."""
    for name, value in options.items():
        _check_scheduler_option(name, value, options)
    steps = options.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= 10_000:
        raise InputError(
            f"scheduler option num_train_timesteps = {steps!r:.80}: must be an integer, 1 to 10000"
        )
    ends = [options.get("beta_start", 1e-4), options.get("beta_end", 0.02)]
    betas = options.get("trained_betas")
    ok = _are_betas(ends) if betas is None else _are_betas(betas) and len(betas) == steps
    if not ok:
        raise InputError(
            f"scheduler options beta_start, beta_end = {ends!r:.80}, "
            f"trained_betas = {betas!r:.80}: must be numbers from 1e-8 up to 1, and "
            f"trained_betas {steps} of them"
        )
    if betas is None:
        make = _BETA_SCHEDULES[options.get("beta_schedule", "linear")]
        beta = make(steps, *ends).beta
    else:
        beta = torch.tensor(betas, dtype=torch.float64)
    schedule = LoadedSchedule(beta, options)
    if schedule.gamma[-1] < 1e-6:
        raise InputError(
            "the scheduler's betas are too large: nothing is left of the image at the last step"
        )
    return schedule


def _check_scheduler_option(name: str, value: object, options: Mapping[str, Any]) -> None:
    if name in _SCHEDULER_FIXED:
        supported = _SCHEDULER_FIXED[name]
        is_overridden = name == "beta_schedule" and options.get("trained_betas") is not None
        if value not in supported and not is_overridden:
            wanted = " or ".join(repr(each) for each in supported)
            raise InputError(
                f"scheduler option {name} = {value!r:.80} is not supported, only {wanted}"
            )
        return
    known = _SCHEDULER_BETAS | _SCHEDULER_SAMPLING
    if name not in known and not name.startswith("_"):
        raise InputError(f"scheduler option {name!r:.80} is not supported")


def _are_betas(values: object) -> bool:
    if not isinstance(values, list):
        return False
    return all(type(beta) in (int, float) and 1e-8 <= beta < 1 for beta in values)


# --- Training states


def save_state(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a training state: floating-point tensors by name, and `meta`, a JSON object.

    `meta` is stored in the header of state.safetensors, so it is always of the same step as the
    tensors. state.json is a copy for people and is never read.

    Raises:
        OSError: if the disk is full or refuses; the folder keeps the state it had.
    """
    write_tensors(folder / _STATE, tensors, {"meta": json.dumps(meta)})
    write_json(folder / "state.json", meta)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_state` wrote: the tensors, on the CPU, and `meta`.

    Raises:
        InputError: if the file is missing, damaged, or holds anything but finite floating-point
            tensors.
    """
    path = Path(folder) / _STATE
    tensors, notes = read_tensors(path)
    if "meta" not in notes:
        raise InputError(f"{path} is no training state")
    _require_finite(path, tensors)
    return tensors, _parse_json(notes["meta"], f"the header of {path}")

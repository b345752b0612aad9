"""Models and training states on disk. Every file is replaced in one rename, and no pickle can run
code.

A model's folder has the layout of the diffusers library, so each can read the other's:

    config.json  diffusion_pytorch_model.safetensors  scheduler/scheduler_config.json

The header of the weights holds a copy of both JSON files. So the rename that brings new weights
also brings their config and schedule, and a reader gets either the old model or the new one,
whenever the writer was killed.
"""

import hashlib
import json
import os
import pickle
import re
import secrets
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from tiny_retrack.lab.unet_config import unet_config_from_dict, unet_config_to_dict
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.types import InputError, NonFiniteError
from tiny_retrack.unet import UNet, UNetConfig

T = TypeVar("T")

_WEIGHTS = "diffusion_pytorch_model"
_CONFIG = "config.json"
_SCHEDULER = "scheduler/scheduler_config.json"
_STATE = "state.safetensors"
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

# The supported values of a scheduler's options about the noise that the model was trained with.
# Options about sampling are not read.
_SCHEDULER_FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler"),
    "beta_schedule": ("linear",),
    "prediction_type": ("epsilon",),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "rescale_betas_zero_snr": (False,),
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
    notes = {
        _CONFIG: json.dumps(unet_config_to_dict(model.config)),
        _SCHEDULER: json.dumps(_schedule_to_dict(schedule)),
    }
    for name, note in notes.items():
        _remove_if_different(folder / name, json.loads(note))
    write_tensors(folder / f"{_WEIGHTS}.safetensors", weights, notes)
    for name, note in notes.items():
        if not (folder / name).exists():
            write_json(folder / name, json.loads(note))


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
    Weights may be `.safetensors` or `.bin`. Without a scheduler's config, the schedule is DDPM's
    linear one.

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
    config = _read_config(path, notes)
    schedule = _read_schedule(path, notes)

    with torch.device(
        "meta"
    ):  # shapes only: memory is allocated after the weights are found to fit
        model = UNet(config)
    weights = {_modern_name(name): weight for name, weight in tensors.items()}
    _check_weights_fit(path, weights, model)
    _require_finite(path, weights)
    copies = {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()}
    model.load_state_dict(copies, assign=True)
    return model, schedule


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
            digest.update(_hash_file(path))
    return digest.hexdigest()


def _hash_file(path: Path) -> bytes:
    digest = hashlib.blake2b()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}") from None
    return digest.digest()


def _find_weights(folder: Path) -> Path:
    for home in (folder, folder / "unet_ema", folder / "unet"):
        for ending in (".safetensors", ".bin"):
            path = home / (_WEIGHTS + ending)
            if path.is_file():
                return path
    raise InputError(f"{folder} is no checkpoint: it has no {_WEIGHTS}.safetensors or .bin")


def _read_config(weights: Path, notes: Mapping[str, str]) -> UNetConfig:
    file = weights.with_name(_CONFIG)
    copy = notes.get(_CONFIG)
    config = _agreed(file, copy, weights, unet_config_from_dict, unet_config_to_dict)
    if config is None:
        raise InputError(f"{file}: no such file, and the weights alone do not tell their layout")
    return config


def _read_schedule(weights: Path, notes: Mapping[str, str]) -> NoiseSchedule:
    file = _scheduler_file(weights)
    copy = notes.get(_SCHEDULER)
    schedule = _agreed(file, copy, weights, _schedule_from_dict, _schedule_to_dict)
    return schedule or NoiseSchedule.linear()


def _scheduler_file(weights: Path) -> Path:
    """Where the scheduler's config is, or would be if there were one.

    In a pipeline's folder it is beside `unet`; the oldest repositories have it beside config.json.
    """
    homes = [weights.parent]
    if weights.parent.name in ("unet", "unet_ema"):
        homes.append(weights.parent.parent)
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
    """The weight's name today; attention had other names until 2023."""

    def renamed(match: re.Match[str]) -> str:
        return f"{match[1]}{_OLD_NAMES[match[2]]}."

    return re.sub(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.", renamed, name)


def _agreed(
    file: Path,
    copy: str | None,
    weights: Path,
    parse: Callable[[dict[str, Any]], T],
    describe: Callable[[T], object],
) -> T | None:
    """What a JSON file says, or its copy in the weights' header if the file is missing.

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
    return values[0] if values else None


# --- Schedules


def _schedule_to_dict(schedule: NoiseSchedule) -> dict[str, Any]:
    """The config of a diffusers `DDPMScheduler` that adds this noise and samples as `ddpm_sample`
    does.
    """
    first = schedule.beta[0].item()
    last = schedule.beta[-1].item()
    steps = schedule.num_steps
    is_linear = torch.equal(schedule.beta, NoiseSchedule.linear(steps, first, last).beta)
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": steps,
        "beta_schedule": "linear",
        "beta_start": first,
        "beta_end": last,
        "trained_betas": None if is_linear else schedule.beta.tolist(),
        "prediction_type": "epsilon",
        "variance_type": "fixed_small",
        "clip_sample": True,
    }


def _schedule_from_dict(options: Mapping[str, Any]) -> NoiseSchedule:
    """The checked schedule of a scheduler's config; missing options take diffusers' defaults."""
    for name, supported in _SCHEDULER_FIXED.items():
        if name in options and options[name] not in supported:
            wanted = " or ".join(repr(value) for value in supported)
            raise InputError(
                f"scheduler option {name} = {options[name]!r:.80} is not supported, only {wanted}"
            )
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
        schedule = NoiseSchedule.linear(steps, *ends)
    else:
        schedule = NoiseSchedule(torch.tensor(betas, dtype=torch.float64))
    if schedule.gamma[-1] < 1e-6:
        raise InputError(
            "the scheduler's betas are too large: nothing is left of the image at the last step"
        )
    return schedule


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

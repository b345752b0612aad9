"""Models and training states on disk: every file is replaced in one rename, and no pickle can run
code.

A model's folder is laid out as the diffusers library lays it out, so it can be read there and the
other way round:

    config.json  diffusion_pytorch_model.safetensors  scheduler/scheduler_config.json

The header of the weights holds a copy of both JSON files: the one rename that brings new weights
also brings what they mean, and a reader gets either the old model or the new one, whenever the
writer was killed.
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
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.types import InputError, NonFiniteError
from tiny_retrack.unet import UNet, UNetConfig

T = TypeVar("T")

_WEIGHTS = "diffusion_pytorch_model"
_CONFIG, _SCHEDULER, _STATE = "config.json", "scheduler/scheduler_config.json", "state.safetensors"
_MAX_JSON = 2**24  # bytes

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_OLD_NAMES = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}  # of attention, until 2023

# What a scheduler's config may say about the noise that the model was trained with; how to sample
# is not read.
_SCHEDULER_FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler"),
    "beta_schedule": ("linear",),
    "prediction_type": ("epsilon",),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "rescale_betas_zero_snr": (False,),
}


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write a file all or not at all: yields a temporary path beside it, which replaces `path` when
    the block ends.

    The data are on the disk before the rename, so neither a kill nor a power cut leaves half a
    file. If the block
    fails, the temporary is removed; one that a killed process left is named .tmp-* and is never
    read.

    Raises:
        OSError: if it cannot be written, with `path` as its filename; what was there before is
        untouched.
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
    """Make the folder's renames and removals last (POSIX only)."""
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
    """What a library says about a stranger's bytes, fit for one line of any terminal."""
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
    """Write a .safetensors file with `notes` in its header, atomically."""
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(
        path
    ) as temporary:  # by our own hand: save_file would make it unreadable to other users
        temporary.write_bytes(safetensors.torch.save(dense, {"format": "pt", **notes}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and the header's notes, from one read of the file, so that both are of the same
    moment.

    Raises:
        InputError: if the file is missing or damaged.
    """
    raw = _read(path)
    try:
        tensors = safetensors.torch.load(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    except Exception as error:  # on a stranger's bytes, a parser may raise anything
        raise InputError(
            f"{path} is damaged or cut short ({_reason(error)}); replace or remove it"
        ) from None
    return tensors, header.get("__metadata__") or {}


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """A `torch.save` file, unpickled by torch's reader of tensors only; mapped, so it asks for no
    memory of its own.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise InputError(f"{path} is compressed, as torch.save never does; refused")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise InputError(f"{path} would unpack to more than its size; refused")
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except InputError:
        raise
    except pickle.UnpicklingError:  # something else than tensors, such as code
        tensors = None
    except Exception as error:
        raise InputError(
            f"{path} is damaged or of an old format ({_reason(error)}); use .safetensors"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_quantized
        for name, value in tensors.items()
    ):
        raise InputError(
            f"{path} holds more than named tensors; save the model's state_dict() alone"
        )
    return tensors


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


def save_model(
    folder: Path | str,
    model: UNet,
    schedule: NoiseSchedule,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the model, or `state` in its place (such as its EMA weights), for `load_model` and
    diffusers alike.

    JSON files of another model are removed first, new ones written last; in between, the weights'
    header speaks.

    Raises:
        NonFiniteError: if a weight is NaN or infinite; the folder keeps what it had.
        OSError: if the disk is full or refuses; likewise.
    """
    folder, weights = Path(folder), model.state_dict()
    if state is not None:
        weights = {name: state[name] for name in weights}
    if not all(bool(torch.isfinite(weight).all()) for weight in weights.values()):
        raise NonFiniteError(
            f"the weights are not finite: {folder} was not written; lower the learning rate"
        )
    cards = {
        _CONFIG: json.dumps(model.config.to_dict()),
        _SCHEDULER: json.dumps(_schedule_to_dict(schedule)),
    }
    for name, card in cards.items():
        path = folder / name
        if path.exists():
            with suppress(InputError):
                if read_json(path) == json.loads(card):
                    continue
            path.unlink()
            _sync(path.parent)
    write_tensors(folder / f"{_WEIGHTS}.safetensors", weights, cards)
    for name, card in cards.items():
        if not (folder / name).exists():
            write_json(folder / name, json.loads(card))


def load_model(folder: Path | str) -> tuple[UNet, NoiseSchedule]:
    """The model and its schedule, on the CPU in float32, from `save_model` or from diffusers'
    `save_pretrained`.

    The folder may be the model's own, or hold it in `unet_ema` or `unet` (the first one found);
    weights may be
    `.safetensors` or `.bin`. Without a scheduler's config, the schedule is DDPM's linear one.

    Raises:
        InputError: for a missing, damaged or hostile file, one that the others do not fit, or an
        option that this
            UNet or schedule does not have; never executes what a file brings along, nor asks for
            more memory than it.
    """
    folder = Path(folder)
    homes = (folder, folder / "unet_ema", folder / "unet")
    found = [home / (_WEIGHTS + ending) for home in homes for ending in (".safetensors", ".bin")]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise InputError(f"{folder} is no checkpoint: it has no {_WEIGHTS}.safetensors or .bin")
    tensors, notes = (
        read_tensors(path) if path.suffix == ".safetensors" else (_read_pickled(path), {})
    )

    config = _agreed(
        path.with_name(_CONFIG), notes.get(_CONFIG), path, UNetConfig.from_dict, UNetConfig.to_dict
    )
    if config is None:
        raise InputError(
            f"{path.with_name(_CONFIG)}: no such file, and the weights alone do not tell their layout"
        )
    around = [path.parent] + [path.parent.parent] * (path.parent.name in ("unet", "unet_ema"))
    places = [home / name for home in around for name in (_SCHEDULER, Path(_SCHEDULER).name)]
    place = next((place for place in places if place.exists()), places[0])
    schedule = _agreed(place, notes.get(_SCHEDULER), path, _schedule_from_dict, _schedule_to_dict)

    with torch.device(
        "meta"
    ):  # shapes only: nothing is allocated for a layout that the weights do not have
        model = UNet(config)
    wanted = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    weights = {_modern(name): weight for name, weight in tensors.items()}
    for names, what in (
        (wanted.keys() - weights, "missing"),
        (weights.keys() - wanted, "not in the config's layout"),
    ):
        if names:
            raise InputError(
                f"{path} does not fit its config: {len(names)} weights {what}, such as {min(names)!r:.80}"
            )
    for name, weight in weights.items():
        if list(weight.shape) != wanted[name]:
            raise InputError(
                f"{path}: {name} has shape {list(weight.shape)}, its config asks for {wanted[name]}"
            )
    _require_finite(path, weights)
    copies = {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()}
    model.load_state_dict(copies, assign=True)
    return model, schedule or NoiseSchedule.linear()


def fingerprint(folder: Path) -> str:
    """A short digest of a checkpoint's weights: two with the same are the same model.

    Raises:
        InputError: as `load_model`.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in load_model(folder)[0].state_dict().items():
        digest.update(name.encode() + weight.numpy().tobytes())
    return digest.hexdigest()


def _modern(name: str) -> str:
    return re.sub(
        r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.",
        lambda m: f"{m[1]}{_OLD_NAMES[m[2]]}.",
        name,
    )


def _agreed(
    file: Path,
    copy: str | None,
    weights: Path,
    parse: Callable[[dict[str, Any]], T],
    describe: Callable[[T], object],
) -> T | None:
    """What the JSON file says, or its copy in the weights' header where there is no file; both must
    say the same.
    """
    read = [(str(file), read_json(file))] if file.exists() else []
    if copy is not None:
        source = f"{file.name} in the header of {weights}"
        read.append((source, _parse_json(copy, source)))
    values = []
    for source, options in read:
        try:
            values.append(parse(options))
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
    if len(values) == 2 and describe(values[0]) != describe(values[1]):
        raise InputError(
            f"{file} is not what {weights} was saved with; restore it, or delete it to use their own copy"
        )
    return values[0] if values else None


def _schedule_to_dict(schedule: NoiseSchedule) -> dict[str, Any]:
    """The config of a diffusers `DDPMScheduler` that adds this noise and samples as `ddpm_sample`
    does.
    """
    first, last, steps = schedule.beta[0].item(), schedule.beta[-1].item(), schedule.num_steps
    linear = torch.equal(schedule.beta, NoiseSchedule.linear(steps, first, last).beta)
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": steps,
        "beta_schedule": "linear",
        "beta_start": first,
        "beta_end": last,
        "trained_betas": None if linear else schedule.beta.tolist(),
        "prediction_type": "epsilon",
        "variance_type": "fixed_small",
        "clip_sample": True,
    }


def _schedule_from_dict(options: Mapping[str, Any]) -> NoiseSchedule:
    for name, known in _SCHEDULER_FIXED.items():
        if name in options and options[name] not in known:
            wanted = " or ".join(repr(value) for value in known)
            raise InputError(
                f"scheduler option {name} = {options[name]!r:.80} is not supported, only {wanted}"
            )
    steps, betas = options.get("num_train_timesteps", 1000), options.get("trained_betas")
    if type(steps) is not int or not 1 <= steps <= 10_000:
        raise InputError(
            f"scheduler option num_train_timesteps = {steps!r:.80}: must be an integer, 1 to 10000"
        )
    ends = [options.get("beta_start", 1e-4), options.get("beta_end", 0.02)]
    values = ends if betas is None else betas
    sound = isinstance(values, list) and all(
        type(beta) in (int, float) and 1e-8 <= beta < 1 for beta in values
    )
    if not sound or (values is betas and len(values) != steps):
        raise InputError(
            f"scheduler options beta_start, beta_end = {ends!r:.80}, trained_betas = {betas!r:.80}: "
            f"must be numbers from 1e-8 up to 1, and trained_betas {steps} of them"
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


def save_state(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a training state (floating-point tensors by name, and what JSON can hold) in one
    rename.

    `meta` travels in the header of state.safetensors, so it is always of the same step as the
    tensors; state.json is
    a copy for people, which is never read.

    Raises:
        OSError: if the disk is full or refuses; the folder keeps the state it had.
    """
    write_tensors(folder / _STATE, tensors, {"meta": json.dumps(meta)})
    write_json(folder / "state.json", meta)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_state` wrote, on the CPU.

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

"""What the scripts share: their data and device, run folders, provenance, and how a run ends."""

import io
import os
import platform
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from tiny_retrack.data import DATASETS, Split
from tiny_retrack.lab.checkpoint import load_model, read_json
from tiny_retrack.lab.presets import PRESETS, flag_of
from tiny_retrack.lab.unet_config import check_unet_config
from tiny_retrack.pictures import printable
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.training import num_processes, rank
from tiny_retrack.types import InputError, NonFiniteError
from tiny_retrack.unet import UNet, UNetConfig

_DATA_TYPES = {
    "dataset": str,
    "data_dir": str,
    "forget": list,
    "copies": int | None,
    "hold_out": int | float,
    "tshirt": str | None,
    "size": int,
    "channels": int,
    "preset": str,
    "digest": str,
}
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun
_MARK = ".run"  # an empty file in every folder that `prepare_folder` or `claim_folder` made
_LOG = "log.jsonl"
OUT_OF_MEMORY = (
    "out of memory: lower --batch-size (--accumulate keeps the product), or the number of samples"
)


# --- Data and device


def read_run(checkpoint: Path) -> dict[str, Any]:
    """run.json of a checkpoint; empty for one that this project did not make."""
    path = checkpoint / "run.json"
    return read_json(path) if path.exists() else {}


def recorded_data(checkpoint: Path) -> dict[str, Any] | None:
    """The data settings that a checkpoint of this project was trained with; None for one from
    elsewhere.

    Raises:
        InputError: if run.json is damaged, or holds values that the flags do not allow.
    """
    data = read_run(checkpoint).get("data")
    if data is None:
        return None
    if not _are_data_settings(data):
        raise InputError(
            f"{checkpoint / 'run.json'} records no possible data set ({data!r:.80}); restore it or "
            "delete it"
        )
    return data


def recorded_seed(checkpoint: Path) -> int | None:
    """The seed that a checkpoint's run.json records; None where there is none."""
    seed = read_run(checkpoint).get("seed")
    return seed if isinstance(seed, int) else None


def initial_seed(checkpoint: Path) -> int | None:
    """The seed of the random weights with which the training of a model began, before any
    unlearning or `train_ddpm.py --checkpoint`; None where it is not recorded.
    """
    run = read_run(checkpoint)
    seed = run.get("seed")
    if "method" in run:
        seed = run.get("base_seed")
    elif isinstance(run.get("start"), dict):
        seed = run["start"].get("initial_seed")
    return seed if isinstance(seed, int) else None


def is_from_scratch(checkpoint: Path) -> bool:
    """Whether run.json does not say that the training began with another model's weights."""
    return not read_run(checkpoint).get("start")


def _are_data_settings(data: object) -> bool:
    if not isinstance(data, dict):
        return False
    for name, value in data.items():
        if name not in _DATA_TYPES or not isinstance(value, _DATA_TYPES[name]):
            return False
    if not all(isinstance(name, str) for name in data.get("forget", [])):
        return False
    return data.get("dataset", "folder") in DATASETS and data.get("preset", "folder") in PRESETS


def differing_data(checkpoint: Path, data: Mapping[str, Any]) -> str:
    """Which of --dataset, --forget and --hold-out a checkpoint records otherwise than `data`.

    Empty where it records the same, or nothing.
    """
    recorded = recorded_data(checkpoint)
    if recorded is None:
        return ""
    names = ("dataset", "forget", "hold_out")
    differing = [name for name in names if name in recorded and recorded[name] != data.get(name)]
    return ", ".join(flag_of(name) for name in differing)


def load_fitting(checkpoint: Path, split: Split) -> tuple[UNet, NoiseSchedule]:
    """The model and the schedule of a checkpoint.

    Raises:
        InputError: as `load_model` and `check_model_fits`.
    """
    model, schedule = load_model(checkpoint)
    check_model_fits(model.config, schedule.num_steps, split, checkpoint)
    return model, schedule


def check_model_fits(config: UNetConfig, num_steps: int, split: Split, checkpoint: Path) -> None:
    """Accept a model whose images have the data set's shape, and whose t is 0 .. 999 as in every
    published model, and that has prompts if the data set has. One without a `sample_size` takes
    images of any size.

    Raises:
        InputError: for any other.
    """
    if num_steps != 1000:
        raise InputError(
            f"{checkpoint} was trained with {num_steps} diffusion steps: only 1000 are supported"
        )
    channels, height, width = split.remain.shape[1:]
    if config.out_channels != config.in_channels:
        raise InputError(
            f"{checkpoint} predicts {config.out_channels} channels for images of "
            f"{config.in_channels}: only models that predict the noise alone are supported"
        )
    size = config.sample_size or height
    if (config.in_channels, size, size) != (channels, height, width):
        raise InputError(
            f"{checkpoint} makes {config.in_channels}x{size}x{size} "
            f"images, the data set has {channels}x{height}x{width}: "
            "check --dataset, --size and --channels"
        )
    if config.num_class_embeds != split.num_class_embeds:
        raise InputError(
            f"{checkpoint} has {_count_prompts(config.num_class_embeds)}, the data set has "
            f"{_count_prompts(split.num_class_embeds)}: check --dataset, or train a model on it"
        )
    check_unet_config(replace(config, sample_size=size))


def _count_prompts(num_class_embeds: int | None) -> str:
    return f"{num_class_embeds - 1} prompts" if num_class_embeds else "no prompts"


def pick_device(name: str) -> torch.device:
    """The device to run on. Under torchrun, also joins the process group, with one GPU per process.

    Raises:
        InputError: if CUDA is asked for and there is none, or if torchrun's environment is
            incomplete.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: this machine has no CUDA device that torch can use; use --device cpu"
        )
    kind = "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        missing = [name for name in _RENDEZVOUS if name not in os.environ]
        if missing:
            raise InputError(
                f"LOCAL_RANK is set, as by torchrun, but not {', '.join(missing)}: start with "
                "torchrun, or unset LOCAL_RANK"
            )
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in what autocast leaves in float32
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def command_line(script: str, argv: Sequence[str] | None) -> str:
    """The command that run.json records: of the arguments that `main` was given, or else of the
    process.
    """
    return shlex.join([Path(script).name, *(sys.argv[1:] if argv is None else argv)])


def provenance(device: torch.device, command: str | None = None) -> dict[str, Any]:
    """What run.json records so that someone else can repeat the run.

    Args:
        command: of `command_line`; without it, that of the process.
    """
    versions = {"python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "torchvision", "numpy")}
    name = "cpu"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "command": command or command_line(sys.argv[0], None),
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "versions": versions,
        "device": name,
        "threads": torch.get_num_threads(),
        "processes": num_processes(),
    }


def _git_commit() -> str | None:
    """The commit of this code, with "-dirty" if it was changed since; None without git."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    root = Path(__file__).parents[2]
    with suppress(FileNotFoundError):  # git is not installed
        done = subprocess.run(describe, cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    return None


# --- Run folders


def check_folder(path: Path, overwrite: bool, resume: bool = False) -> None:
    """Check that a run may write to a folder. To be called before any work starts.

    A folder that holds a run is touched only with --overwrite or --resume; a folder that holds
    other files never is. A run that ended before its first checkpoint leaves nothing to protect.

    Raises:
        InputError: if the folder holds something and neither flag is given, or if both flags are;
            if no run of this project made it; if it cannot be made or written to; or if it is to be
            replaced while the current folder is inside it.
    """
    if overwrite and resume:
        raise InputError("--overwrite and --resume exclude each other: give one")
    if rank() > 0:
        return  # the first process may already be at work in it
    path = path.resolve()
    check_writable(path, "choose another --out")
    if not path.exists() or resume or _holds_nothing(path):
        return
    if not overwrite:
        raise InputError(
            f"{path} holds an earlier run or other files: "
            "--overwrite a run, or choose another --out"
        )
    if not any((path / name).exists() for name in (_MARK, "run.json")):
        raise InputError(
            f"{path} holds files that no run made, which --overwrite leaves alone: "
            "choose another --out"
        )
    if Path.cwd().is_relative_to(path):
        raise InputError(f"{path} is the current folder, or holds it: --overwrite it from outside")


def check_apart(checkpoint: Path, out: Path) -> None:
    """Accept a run folder that is neither the checkpoint that the run starts from nor around it.

    Raises:
        InputError: for any other.
    """
    if checkpoint.resolve().is_relative_to(out.resolve()):
        raise InputError(
            f"--out {out} is the checkpoint itself, or holds it: choose another folder"
        )


def check_writable(path: Path, advice: str) -> None:
    """Check that files can be made in a folder, or the folder itself where it is not there yet.

    Args:
        advice: what the user can do otherwise.

    Raises:
        InputError: if they cannot.
    """
    path = path.resolve()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file, not a folder: {advice}")
    if not os.access(there, os.W_OK):
        raise InputError(f"{there} may not be written to: {advice}")


def _holds_nothing(path: Path) -> bool:
    """Whether a folder is empty, or was left by a training that saved no checkpoint."""
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".tmp-")}
    return names <= {_MARK, _LOG} if _MARK in names else not names


def check_claim(path: Path) -> None:
    """Check that a folder can be a comparison's. It may already hold runs, as METHOD/seed-N.

    Raises:
        InputError: if it is itself a run's folder, or holds other files; or as `check_writable`.
    """
    check_writable(path, "choose another --out")
    there = list(path.iterdir()) if path.exists() else []
    ours = (path / _MARK).exists() or all(any(entry.glob("seed-*")) for entry in there)
    if not ours or (path / "run.json").exists():
        raise InputError(
            f"{path} holds a run or other files, not a comparison: choose another --out"
        )


def claim_folder(path: Path) -> None:
    """Make the folder of a comparison, to which runs are added, or continue with one.

    Raises:
        InputError: as `check_claim`.
    """
    check_claim(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / _MARK).touch()


def prepare_folder(path: Path, overwrite: bool) -> None:
    """Make the run's folder, empty with --overwrite. To be called after all input is checked.

    What was there before is moved beside it, to .old-NAME, until the new run is saved and calls
    `discard_old`.
    """
    path = path.resolve()
    if overwrite and path.exists():
        old = path.with_name(f".old-{path.name}")
        old.mkdir(exist_ok=True)
        path.rename(old / secrets.token_hex(4))
    path.mkdir(parents=True, exist_ok=True)
    (path / _LOG).unlink(missing_ok=True)  # of a training that saved no checkpoint
    (path / _MARK).touch()


def discard_old(path: Path) -> None:
    """Remove what `prepare_folder` moved aside. To be called after the new run is saved."""
    old = path.resolve().with_name(f".old-{path.resolve().name}")
    if old.exists():
        shutil.rmtree(old)


def check_resumed(
    folder: Path, meta: Mapping[str, Any], run: Mapping[str, Any]
) -> tuple[int, dict[str, Any]]:
    """The step after which training continues from the state in `folder`, whose notes are `meta`,
    and the settings that it was started with, by name.

    It may go on to more steps, with another warm-up. The learning rate then follows the new
    schedule; a warning says so.

    Raises:
        InputError: if it is not the state of a training run; or, naming each, if other settings
            differ from those in `run`; or if a run that keeps its last checkpoints is to go on to
            more steps.
    """
    step, before = meta.get("step"), meta.get("run")
    is_extended = isinstance(meta.get("extended", []), list)
    if type(step) is not int or step < 0 or not isinstance(before, dict) or not is_extended:
        raise InputError(
            f"{folder}/state.safetensors is not of a training run; --overwrite starts again"
        )
    was, now = _flat(before), _flat(run)
    changed = [name for name in sorted(was | now) if was.get(name) != now.get(name)]
    told = ", ".join(
        f"{name} = {was.get(name)!r:.80} (now {now.get(name)!r:.80})" for name in changed
    )
    if "steps" in changed and {*changed} <= {"steps", "warmup"} and _is_more(now, was):
        if now.get("keep"):
            raise InputError(
                f"--resume: {folder} was started with {told}, and has kept the last checkpoints of "
                "the shorter training; train to more steps without --keep, or with --overwrite"
            )
        if rank() == 0:
            print(
                f"warning: {folder} was started with {told}: from step {step} on, the learning "
                "rate is that of the longer schedule",
                file=sys.stderr,
            )
    elif changed:
        raise InputError(f"--resume: {folder} was started with {told}")
    return step, was


def _is_more(now: Mapping[str, Any], was: Mapping[str, Any]) -> bool:
    steps = was.get("steps")
    return type(steps) is int and now["steps"] > steps


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings by name, without the groups (data, train) that they are in."""
    flat: dict[str, Any] = {}
    for name, value in run.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


# --- How a run ends


@dataclass
class Stop:
    """Which signal asked the run to stop; 0 if none did."""

    signal: int = 0


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Let SIGINT and SIGTERM ask a loop to stop, in place of ending the process.

    The loop reads `.signal` after each step, saves and leaves. A second signal ends the process.
    Outside the main thread, where Python allows no handlers, signals do what they did before.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _: FrameType | None) -> None:
        if stop.signal:
            sys.exit(128 + number)
        stop.signal = number

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_command(main: Callable[[], None]) -> None:
    """Run a script's main function. Errors that its user can correct become one line on stderr.

    Exit codes: 0; 1 if training diverged; 2 for wrong input, a full disk or too little memory; 130
    after Ctrl-C. Any other error is a bug and keeps its traceback. What the console's encoding does
    not have, such as "±", is printed as "?".
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        main()
        if dist.is_initialized():
            dist.barrier()  # gloo may abort a process whose peer is gone
        return
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        message = _message_for_user(error)
        if message is None:
            raise
        code = 1 if isinstance(error, NonFiniteError) else 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    # Printed only here, where the exception is gone: it kept progress bars open.
    # A file's name may hold characters that would control the terminal.
    print(f"{Path(sys.argv[0]).name}: {printable(message)}", file=sys.stderr)
    sys.exit(code)


def _message_for_user(error: Exception) -> str | None:
    """What to tell about an error that the user can correct; None for a bug."""
    if isinstance(error, InputError | NonFiniteError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        name = error.filename or "the output"
        return f"{name}: {os.strerror(error.errno)}; what was saved before is intact"
    if isinstance(error, MemoryError):
        return OUT_OF_MEMORY
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return (
            f"--compile: torch.compile failed ({type(error).__name__}); it needs a C++ compiler, "
            "on CUDA also Triton: install what is missing, or leave out --compile"
        )
    # On CUDA, torch raises a subclass of RuntimeError; on the CPU a bare RuntimeError.
    if isinstance(error, RuntimeError):
        text = str(error)
        if "out of memory" in text or "can't allocate memory" in text:
            return OUT_OF_MEMORY
    return None

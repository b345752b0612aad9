"""What the three scripts share: flags for data and device, run folders, and how a run ends."""

import os
import platform
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from tiny_retrack.data import DATASETS, Split, load_split
from tiny_retrack.lab.checkpoint import read_json
from tiny_retrack.types import InputError, NonFiniteError
from tiny_retrack.unet import UNetConfig

_DATA_TYPES = {
    "dataset": str,
    "data_dir": str,
    "forget": list,
    "tshirt": str | None,
    "size": int,
    "channels": int,
}
_MARK = ".run"  # lies in every folder that `prepare_folder` made


def recorded_data(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint of this project was trained on; None for one from elsewhere.

    Raises:
        InputError: if run.json is damaged, or records what no flag could have said.
    """
    path = checkpoint / "run.json"
    data = read_json(path).get("data") if path.exists() else None
    if data is None:
        return None
    sound = isinstance(data, dict) and all(
        name in _DATA_TYPES and isinstance(value, _DATA_TYPES[name]) for name, value in data.items()
    )
    named = sound and all(isinstance(name, str) for name in data.get("forget", []))
    if not named or data.get("dataset", "folder") not in DATASETS:
        raise InputError(
            f"{path} records no data set that there could be ({data!r:.80}); restore it or delete it"
        )
    return data


def check_model_fits(config: UNetConfig, num_steps: int, split: Split, checkpoint: Path) -> None:
    """A model and a data set must be of one image shape, and the model's t of 0 .. 999, as in every
    published one.
    """
    if num_steps != 1000:
        raise InputError(
            f"{checkpoint} was trained with {num_steps} diffusion steps: only 1000 are supported"
        )
    channels, height, width = split.remain.shape[1:]
    if (config.in_channels, config.sample_size, config.sample_size) != (channels, height, width):
        raise InputError(
            f"{checkpoint} makes {config.in_channels}x{config.sample_size}x{config.sample_size} images, the data set "
            f"has {channels}x{height}x{width}: check --dataset, --size and --channels"
        )


def load_data(data: dict[str, Any], download: bool) -> Split:
    """The split that `data_settings` describes.

    Raises:
        InputError: as `load_split`, and for a size below 8 or channels that are neither 1 nor 3.
    """
    if data["size"] < 8 or data["channels"] not in (1, 3):
        raise InputError(
            f"--size {data['size']}, --channels {data['channels']}: must be at least 8, and 1 or 3"
        )
    options = {**data, "tshirt": Path(data["tshirt"]) if data["tshirt"] else None}
    return load_split(options.pop("dataset"), options.pop("data_dir"), download=download, **options)


def pick_device(name: str) -> torch.device:
    """The device to run on; under torchrun also joins the process group, one GPU a process.

    Raises:
        InputError: if CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: this machine has no CUDA device that torch can use; take --device cpu"
        )
    kind = "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in what autocast leaves in float32
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def provenance(device: torch.device) -> dict[str, Any]:
    """What a run.json needs so that someone else can repeat the run."""
    root, commit = Path(__file__).parents[2], ""
    with suppress(FileNotFoundError):  # no git on this machine
        describe = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        commit = subprocess.run(
            describe, cwd=root, capture_output=True, text=True, check=False
        ).stdout.strip()
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
        "git_commit": commit or None,
        "versions": {
            "python": platform.python_version(),
            **{n: version(n) for n in ("torch", "torchvision", "numpy")},
        },
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu x{torch.get_num_threads()}",
    }


def check_folder(path: Path, overwrite: bool, resume: bool = False) -> None:
    """A folder that already holds a run is only touched if the user says how, and any other folder
    never.

    Raises:
        InputError: if it holds something and neither flag is given, or if both are; if no run of
        this project made it;
            if it cannot be made or written to; or if it is to be replaced with the current folder
            in it.
    """
    if overwrite and resume:
        raise InputError("--overwrite and --resume exclude each other: give one")
    if dist.is_initialized() and dist.get_rank():
        return  # the first process may already be at work in it
    path = path.resolve()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file, not a folder: choose another --out")
    if not os.access(there, os.W_OK):
        raise InputError(f"{there} may not be written to: choose another --out")
    if there != path or resume or not any(path.iterdir()):
        return
    if not overwrite:
        raise InputError(
            f"{path} holds an earlier run or other files: --overwrite a run, or choose another --out"
        )
    if not any((path / name).exists() for name in (_MARK, "run.json")):
        raise InputError(
            f"{path} holds files that no run made, which --overwrite leaves alone: choose another --out"
        )
    if Path.cwd().is_relative_to(path):
        raise InputError(f"{path} is the current folder, or holds it: --overwrite it from outside")


def claim_folder(path: Path) -> None:
    """Make a folder to which runs are added, or go on in one; one that holds a run itself, or other
    files, never.

    Runs that were put into it beforehand, as METHOD/seed-N, are welcome.

    Raises:
        InputError: if it holds anything else.
    """
    there = list(path.iterdir()) if path.exists() else []
    ours = (path / _MARK).exists() or all(any(entry.glob("seed-*")) for entry in there)
    if not ours or (path / "run.json").exists():
        raise InputError(
            f"{path} holds a run or other files, not a comparison: choose another --out"
        )
    path.mkdir(parents=True, exist_ok=True)
    (path / _MARK).touch()


def prepare_folder(path: Path, overwrite: bool) -> None:
    """Make the folder, empty if it is to be overwritten. To be called once all input has been found
    good.

    What was there before waits beside it, in .old-NAME, until the new run has something to show:
    `discard_old`.
    """
    path = path.resolve()
    if overwrite and path.exists():
        old = path.with_name(f".old-{path.name}")
        old.mkdir(exist_ok=True)
        path.rename(old / secrets.token_hex(4))
    path.mkdir(parents=True, exist_ok=True)
    (path / _MARK).touch()


def discard_old(path: Path) -> None:
    """Remove what `prepare_folder` put aside. To be called once the new run is saved."""
    old = path.resolve().with_name(f".old-{path.resolve().name}")
    if old.exists():
        shutil.rmtree(old)


def check_resumed(folder: Path, meta: Mapping[str, Any], run: Mapping[str, Any]) -> int:
    """The step at which the training state in `folder`, whose notes are `meta`, goes on.

    Raises:
        InputError: if it is not of a training run, or by name for each setting that is not as in
        `run`.
    """
    step, before = meta.get("step"), meta.get("run")
    if type(step) is not int or step < 0 or not isinstance(before, dict):
        raise InputError(
            f"{folder}/state.safetensors is not of a training run; --overwrite starts anew"
        )
    was, now = _flat(before), _flat(run)
    changed = [name for name in sorted(was | now) if was.get(name) != now.get(name)]
    if changed:
        told = ", ".join(
            f"{name} = {was.get(name)!r:.80} (now {now.get(name)!r:.80})" for name in changed
        )
        raise InputError(f"--resume: {folder} was started with {told}")
    return step


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings, those of its groups (data, train) by their own names."""
    groups = [value if isinstance(value, dict) else {name: value} for name, value in run.items()]
    return {name: value for group in groups for name, value in group.items()}


@dataclass
class Stop:
    """Which signal asked the run to stop; 0 if none did."""

    signal: int = 0


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """SIGINT and SIGTERM only ask: the loop looks at `.signal` after each step, saves, leaves. A
    second one kills.
    """
    stop = Stop()

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


OUT_OF_MEMORY = (
    "out of memory: lower --batch-size (--accumulate keeps the product), or the number of samples"
)


def run_command(main: Callable[[], None]) -> None:
    """Run a script's main; what its user can mend becomes one line on stderr and exit code 2 (1:
    training diverged).
    """
    code = 2
    try:
        main()
        if dist.is_initialized():
            dist.barrier()  # gloo may abort a process whose peer is gone
        return
    except InputError as error:
        message = str(error)
    except NonFiniteError as error:
        message, code = str(error), 1
    except OSError as error:
        if error.errno is None:
            raise
        message = f"{error.filename or 'the output'}: {os.strerror(error.errno)}; what was saved before is intact"
    except MemoryError:
        message = OUT_OF_MEMORY
    except (
        RuntimeError
    ) as error:  # torch raises a subclass on CUDA and a bare RuntimeError on the CPU
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        message = OUT_OF_MEMORY
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    line = "".join(
        c if c.isprintable() else ascii(c)[1:-1] for c in message
    )  # a file's name may hold anything
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(code)

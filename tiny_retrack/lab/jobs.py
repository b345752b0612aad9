"""Processes: several runs at a time on one machine, each with its share of the cores; or one
process where several were started.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from joblib import Parallel, delayed

from tiny_retrack.lab import runs
from tiny_retrack.types import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")

_run: Callable[[Any], Any]  # of a worker process, which is given it once


def run_jobs(
    run: Callable[[Task], Result],
    tasks: Sequence[Task],
    jobs: int,
    device: torch.device,
    log: Path,
) -> Iterator[Result]:
    """`run` of each task, in order; in `jobs` processes if that is more than 1.

    Args:
        run: sent to each process once, so it may hold what is large.
        tasks: sent one by one; the next starts when a process is free.
        device: of the runs.
        log: the file for the processes' progress bars, which would overwrite each other on one
            terminal.

    Raises:
        InputError: if a process is killed.
    """
    if jobs == 1:
        yield from map(run, tasks)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    parallel = Parallel(
        jobs,
        backend="loky",
        batch_size=1,  # pyright: ignore[reportArgumentType]
        pre_dispatch=str(jobs),  # no queue: it would go on if this process were killed
        return_as="generator",
        initializer=_start_worker,
        initargs=(run, device.type, threads, log),
    )
    try:
        with _exit_on_sigterm():
            results: Any = parallel(delayed(_run_task)(task) for task in tasks)
            yield from results
    except BrokenProcessPool:
        raise InputError(
            f"a job was killed, perhaps because memory ran out: lower --jobs {jobs}"
        ) from None


def works_alone() -> bool:
    """Whether this process does the work of a script that runs in one process.

    Under torchrun that is rank 0. Removes torchrun's variables from the environment, so that this
    process and those that it starts do not wait for the other ranks.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    return is_first


def _start_worker(run: Callable[[Any], Any], device_type: str, threads: int, log: Path) -> None:
    global _run
    _run = run
    runs.pick_device(device_type)
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = log.open("a", encoding="utf-8")


def _run_task(task: Any) -> Any:
    return _run(task)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit, at which joblib ends its processes; else they would go on."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

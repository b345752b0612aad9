"""Processes of the tests. They are forked, as importing PyTorch and preparing its first optimiser
takes a new process ten seconds.
"""

import multiprocessing
import os
import socket
import threading
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch
from tqdm import tqdm


def start(
    work: Callable[..., None], *args: object, cwd: Path, env: Mapping[str, str] | None = None
) -> ForkProcess:
    """A process that does `work(*args)` in a folder; its exit code is 1 if that raises."""
    process = multiprocessing.get_context("fork").Process(
        target=_work_in, args=(cwd, env or {}, work, args)
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of threads, which a fork loses: those of tqdm and of pytest-xdist.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    return process


def run_ranks(work: Callable[..., None], *args: object, folders: list[Path]) -> None:
    """`work(*args)` in one process for each folder, with the environment that torchrun gives.

    `work` ends with `leave_group`.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(len(folders))}
    processes = []
    for rank, folder in enumerate(folders):
        env = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(start(work, *args, cwd=folder, env=env))
    try:
        for process in processes:
            process.join(timeout=120)
        assert [process.exitcode for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()


def leave_group() -> None:
    """End a process of `run_ranks`: gloo may abort one whose peer is gone."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _work_in(
    cwd: Path, env: Mapping[str, str], work: Callable[..., None], args: tuple[object, ...]
) -> None:
    # tqdm's own lock is shared with forks, and stays locked if its holder is killed.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0  # no thread, which a fork would lose
    os.chdir(cwd)
    os.environ.update(env)
    work(*args)

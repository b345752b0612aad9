"""Runs in several processes. Each imports this file, so it imports little."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_retrack.lab import jobs
from tiny_retrack.types import InputError

CPU = torch.device("cpu")


def die(task: int) -> None:
    """A run that the system kills."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_job_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a job was killed, .* lower --jobs 2"):
        list(jobs.run_jobs(die, [0, 1], 2, CPU, tmp_path / "jobs.log"))


def wait_for(what: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


class Counted:
    """A run of no work, which leaves a file when it is sent to a process.

    It refuses task 8, when there is the file "received".
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        (self.folder / f"sent-{os.getpid()}-{time.monotonic_ns()}").touch()

    def __call__(self, task: int) -> tuple[int, int]:
        if task == 8:
            wait_for((self.folder / "received").exists)
            raise InputError("one line")
        print("at work", flush=True)
        return task, torch.get_num_threads()


@pytest.mark.parametrize("num", [1, 2])
def test_jobs_keep_the_order_and_hand_on_what_a_run_refuses(num: int, tmp_path: Path) -> None:
    """One process, or two that are sent the run once each."""
    results = jobs.run_jobs(Counted(tmp_path), range(9), num, CPU, tmp_path / "jobs.log")
    for task in range(8):
        assert next(results) == (task, 1)  # on the one core that the tests have
    (tmp_path / "received").touch()
    with pytest.raises(InputError, match="one line"):
        next(results)
    processes = [path.name.split("-")[1] for path in tmp_path.glob("sent-*")]
    if num == 1:
        assert processes == []
        return
    assert 1 <= len(processes) == len(set(processes)) <= 2
    assert str(os.getpid()) not in processes
    assert (tmp_path / "jobs.log").read_text() == 8 * "at work\n"


PARENT = """
import os, sys, time
from pathlib import Path
import torch
from tiny_retrack.lab import jobs

def sleep(task):
    (Path(sys.argv[1]) / str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    list(jobs.run_jobs(sleep, range(2), 2, torch.device("cpu"), Path(sys.argv[1]) / "jobs.log"))
"""


def is_running(pid: str) -> bool:
    stat = Path("/proc", pid, "stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_jobs_end_with_their_parent_on_sigterm(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "out").mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(jobs.__file__).parents[2])}
    command = [sys.executable, tmp_path / "parent.py", tmp_path / "out"]
    parent = subprocess.Popen(command, env=environment)

    def started() -> list[str]:
        return [path.name for path in (tmp_path / "out").iterdir() if path.name.isdigit()]

    wait_for(lambda: len(started()) == 2)
    parent.terminate()
    assert parent.wait() == 128 + signal.SIGTERM
    wait_for(lambda: not any(map(is_running, started())))

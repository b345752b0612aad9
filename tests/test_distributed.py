"""The scripts on two processes, as torchrun starts them.

What the processes compute together is tested in test_training.py.
"""

import itertools
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from conftest import Script, assert_refused

from tiny_retrack import load_model
from tiny_retrack.training import Progress, rank

RUNS = Path("runs/digits-tshirt")
QUICK = ["--device", "cpu", "--bf16", "off", "--batch-size", "4"]
TRAIN = [*QUICK, "--steps", "4", "--warmup", "1", "--log-every", "1", "--save-every", "2"]
TRAIN += ["--widths", "8", "8", "8"]


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def work(first: Path) -> None:
    """One process: train, unlearn, train but stop half-way, resume.

    Args:
        first: the folder of rank 0.
    """
    import train_ddpm
    import unlearn
    from tiny_retrack.lab import pretraining, unlearning

    def no_samples(model: Any, num: int, shape: Any, *args: Any, **options: Any) -> torch.Tensor:
        return torch.zeros(num, *shape)

    pretraining.sample_many = no_samples  # slow, and drawn by rank 0 alone
    unlearning.sample_many = no_samples
    train_ddpm.main(TRAIN)
    torch.distributed.barrier()
    base = str(first / RUNS / "base")
    unlearn.main([*QUICK, "--steps", "2", "--method", "siss", "--checkpoint", base])

    fit = pretraining.fit
    pretraining.fit = lambda *args, **options: itertools.islice(fit(*args, **options), 2)
    train_ddpm.main([*TRAIN, "--out", "resumed"])
    pretraining.fit = fit
    torch.distributed.barrier()
    if Path.cwd() != first:
        assert files(Path.cwd()) == {}, "rank 1 has written"
        shutil.copytree(first / "resumed", "resumed")
    before = files(Path.cwd())
    train_ddpm.main([*TRAIN, "--out", "resumed", "--resume"])
    assert Path.cwd() == first or files(Path.cwd()) == before, "rank 1 has written"
    forks.leave_group()


@pytest.fixture(scope="module")
def rank0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of rank 0; each rank works in one of its own."""
    folders = [tmp_path_factory.mktemp(f"rank-{i}") for i in (0, 1)]
    forks.run_ranks(work, folders[0], folders=folders)
    return folders[0]


def test_only_rank_0_writes(rank0: Path) -> None:
    """`work` asserts that rank 1 writes nothing."""
    log = [json.loads(line) for line in (rank0 / RUNS / "base/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert json.loads((rank0 / RUNS / "siss/run.json").read_text())["unlearn"]["steps"] == 2
    base = load_model(rank0 / RUNS / "base")[0].state_dict()
    unlearned = load_model(rank0 / RUNS / "siss")[0].state_dict()
    assert not all(torch.equal(unlearned[name], weight) for name, weight in base.items())


def test_resumed_training_on_two_processes_equals_uninterrupted(rank0: Path) -> None:
    whole = load_model(rank0 / RUNS / "base")[0].state_dict()
    resumed = load_model(rank0 / "resumed")[0].state_dict()
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name


def test_number_of_processes_is_recorded_and_compared(rank0: Path, script: Script) -> None:
    for run in (rank0 / RUNS / "base", rank0 / RUNS / "siss"):
        assert json.loads((run / "run.json").read_text())["processes"] == 2
    before = files(rank0)
    done = script("train_ddpm", *TRAIN, "--out", "resumed", "--resume", cwd=rank0)
    assert_refused(done, "processes = 2 (now 1)")
    assert files(rank0) == before


def stop_one(signalled: int) -> None:
    """One process of a training of which one process gets a SIGTERM in its first step."""
    import train_ddpm
    from tiny_retrack.lab import pretraining

    def interrupted(*args: Any, **options: Any) -> Iterator[Progress]:
        for done in fit(*args, **options):
            if done.step == 1 and rank() == signalled:
                os.kill(os.getpid(), signal.SIGTERM)
            yield done

    fit = pretraining.fit
    pretraining.fit = interrupted
    with pytest.raises(SystemExit) as stopped:
        train_ddpm.main([*TRAIN, "--log-every", "2", "--save-every", "4"])
    assert stopped.value.code == 128 + signal.SIGTERM
    forks.leave_group()


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_process_stops_both_at_the_same_step(
    signalled: int, tmp_path: Path
) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    forks.run_ranks(stop_one, signalled, folders=folders)
    assert json.loads((folders[0] / RUNS / "base/state.json").read_text())["step"] == 2

"""Shared by all tests: hypothesis's profiles, torch's threads, the scripts as a user runs them.

Shapes in signatures are checked at run time (pyproject.toml); the fixture `unchecked` switches that
off.
"""

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import hypothesis
import jaxtyping
import pytest
import torch
from checkpoints import LINEAR, random_unet
from hypothesis import strategies as st

from tiny_retrack import NoiseSchedule, UNet, UNetConfig, save_model
from tiny_retrack.lab import runs
from tiny_retrack.lab.checkpoint import write_json
from tiny_retrack.lab.presets import PRESETS

hypothesis.settings.register_profile("default", derandomize=True, deadline=None, max_examples=25)
# HYPOTHESIS_PROFILE=long pytest
hypothesis.settings.register_profile("long", deadline=None, max_examples=1000)
# Of docs/course/grading.py: other examples with another --hypothesis-seed, and no time for making
# them smaller.
hypothesis.settings.register_profile(
    "graded",
    deadline=None,
    max_examples=25,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# pytest runs two processes (pyproject.toml). With more threads than cores, threads would wait for
# each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@dataclass(frozen=True)
class Result:
    """How a script ended."""

    code: int
    out: str
    err: str


Script = Callable[..., Result]


@pytest.fixture(scope="session", autouse=True)
def _no_fsync() -> Iterator[None]:
    """Flushing to the disk takes most of the time of some tests, and matters after a power cut
    only.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Shapes are not checked at run time, so that the product's own error is seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Run a script in this process, as starting Python takes seconds.

    For example: script("unlearn", "--k", "3", cwd=folder).
    """

    def run(name: str, *flags: object, cwd: Path) -> Result:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        code = 0
        try:
            runs.run_command(importlib.import_module(name).main)
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return Result(code, *capsys.readouterr())

    return run


def assert_refused(done: Result, *parts: str) -> None:
    """The script ended with exit code 2 and one line, in which each of the parts occurs."""
    assert done.code == 2
    *above, line, rest = re.split(r"[\r\n]", done.err)
    assert rest == ""
    assert line.isprintable()
    assert re.match(r"\w+\.py: ", line)
    assert all(text.strip() == "" or "reading images" in text for text in above)
    for part in parts:
        assert part in line


def tree(folder: Path) -> dict[Path, int]:
    """Everything in a folder, and when it last changed."""
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


# What an untrusted JSON file may hold in place of an expected value.
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**12), 10**12),
        st.integers(0, 40),
        st.floats(),
        st.text(max_size=10),
        st.sampled_from(["DownBlock2D", "AttnUpBlock2D", "linear", "DDPMScheduler", "epsilon"]),
    ),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=2)
    ),
    max_leaves=6,
)

TINY_UNET = UNetConfig(
    sample_size=16,
    in_channels=1,
    out_channels=1,
    block_out_channels=(4, 8),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=2,
)


@pytest.fixture(scope="module")
def tiny_unets() -> Iterator[None]:
    """The UNet of every preset is replaced by a tiny one."""
    with pytest.MonkeyPatch.context() as patch:
        for name, preset in PRESETS.items():
            patch.setitem(PRESETS, name, replace(preset, unet=TINY_UNET))
        yield


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint of digits-tshirt, with what unlearning needs of its run.json."""
    torch.manual_seed(0)
    save_model(tmp_path / "base", UNet(TINY_UNET), NoiseSchedule.linear())
    write_json(tmp_path / "base/run.json", {"data": {"dataset": "digits-tshirt"}})
    return tmp_path / "base"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small checkpoint that `save_model` wrote."""
    save_model(tmp_path / "model", random_unet(0), LINEAR)
    return tmp_path / "model"

"""A comparison in several processes. Each of them imports what a run needs, which takes seconds."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Script

from tiny_retrack.lab import features
from tiny_retrack.metrics import fit_classifier

QUICK = ["--num-samples", "70", "--sampler-steps", "2", "--nll-tolerance", "1", "--bf16", "off"]
QUICK_RUN = "steps=2,batch-size=4"
VANILLA = f"vanilla:{QUICK_RUN}"
DIVERGES = f"neggrad:{QUICK_RUN},lr=1e30"


def test_compare_in_parallel_gives_the_same_figures(
    base: Path, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, each with the thread that the tests have: the same to the last bit."""
    monkeypatch.setattr(features, "fit_classifier", partial(fit_classifier, steps=5))
    summaries: list[dict[str, Any]] = []
    for jobs in ("1", "2"):
        flags = ["compare", "--base", base, "--methods", VANILLA, DIVERGES, "--seeds", "0", "1"]
        done = script("evaluate", *flags, *QUICK, "--jobs", jobs, "--out", jobs, cwd=tmp_path)
        assert done.code == 0, done.err
        summary = json.loads((tmp_path / jobs / "summary.json").read_text())
        for results in summary["results"].values():
            for result in results:
                del result["images_per_s"]
        summaries.append({key: summary[key] for key in ("results", "failures")})
    assert summaries[0] == summaries[1]
    assert {label: len(of) for label, of in summaries[0]["results"].items()} == {
        "base": 1,
        VANILLA: 2,
    }
    assert len(summaries[0]["failures"]) == 2
    assert "vanilla" in (tmp_path / "2/jobs.log").read_text()  # the progress bars

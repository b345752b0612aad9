"""The kit of the course: what is handed out, how it is graded, which mistakes the tests catch.

    python docs/course/kit.py handout OUT [--runs DIR] [--part N ...]
    python docs/course/kit.py grade SUBMISSION [--part N] [--out results.json] [--seed N]
    python docs/course/kit.py mistakes [--tests FILE]

There is one source. parts.py names the functions that students write; functions.py finds them in
the package. The handout has them without their bodies; grading.py puts the reference's around a
student's own when it grades a part. Standard library only; pytest and hypothesis run the tests.
"""

import argparse
import json
import os
import secrets
import shutil
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from functions import (
    COURSE,
    PACKED,
    ROOT,
    Functions,
    KitError,
    cut,
    imported_modules,
    reference_functions,
    source,
)
from grading import PYTEST_INI, grade, grade_own_test, shown
from parts import NOT_HANDED_OUT, OWN_TEST, OWN_TEST_FUNCTION, PARTS

# What a handout holds beside the package, as it stands in the repository.
FILES = [
    "LICENSE",
    "pyproject.toml",
    "train_ddpm.py",
    "unlearn.py",
    "evaluate.py",
    "docs/course/kit.py",
    "docs/course/functions.py",
    "docs/course/grading.py",
    "docs/course/parts.py",
    "docs/course/tour.py",
]
IMAGES = "docs/images/trajectory_*.png"
MODELS = ("base", "retrain")
WEIGHTS = "diffusion_pytorch_model.safetensors"
MODEL_FILES = [  # of a run folder
    "config.json",
    WEIGHTS,
    "scheduler/scheduler_config.json",
    "model_index.json",
    "run.json",
    "metrics.json",
    "figures.json",
]
MEASURED = "## 9 "  # where theory.md begins to tell what was measured
README = """# tiny_retrack: the assignment

Read [assignment.md](assignment.md). [docs/theory.md](docs/theory.md) has the equations, and
[tour.ipynb](tour.ipynb) shows what the parts are about.
"""


# --- Handing out ----------------------------------------------------------------------------------


def handout(out: Path, runs: Path, numbers: Sequence[int]) -> None:
    """Write the folder that students are given.

    Args:
        runs: a folder with the models "base" and "retrain".
        numbers: the parts whose functions are cut out; the others stay solved.

    Raises:
        KitError: if `out` exists, or something to hand out is missing.
    """
    if not (ROOT / COURSE / "mistakes.py").exists():
        raise KitError("this is a handout: make another one in the repository")
    if out.exists():
        raise KitError(f"{out} exists: give a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".tmp-{secrets.token_hex(4)}")
    try:
        write_handout(temporary, runs, numbers)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out}: parts {', '.join(map(str, numbers))} to be written; zip it and hand it out")


def write_handout(out: Path, runs: Path, numbers: Sequence[int]) -> None:
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    shutil.copytree(ROOT / "tiny_retrack", out / "tiny_retrack", ignore=ignore)
    pictures = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(IMAGES))]
    for path in [*FILES, *shared_by_tests(), *pictures]:
        copy(ROOT / path, out / path)
    for path, text in {**cut_files(numbers), **documents()}.items():
        write(out / path, text)
    packed = json.dumps(reference_functions()).encode()
    (out / PACKED).write_bytes(zlib.compress(packed, 9))
    for model in MODELS:
        if not (runs / model).is_dir():
            raise KitError(f"no model {runs / model}: give a folder with base and retrain")
        for name in MODEL_FILES:
            if (runs / model / name).exists():
                copy(runs / model / name, out / "runs/digits-tshirt" / model / name)
            elif name == WEIGHTS:
                raise KitError(f"no weights in {runs / model}: train it to the end")


def shared_by_tests() -> list[str]:
    """The files of tests/ that conftest.py and the graded tests import, and conftest.py."""
    graded = {test.file for part in PARTS for test in part.tests} | {OWN_TEST}
    found: set[str] = set()
    new = {"tests/conftest.py", *graded}
    while new:
        found |= new
        names = [name for path in new for name in imported_modules(ROOT / path)]
        paths = {f"tests/{name}.py" for name in names if (ROOT / f"tests/{name}.py").exists()}
        new = paths - found
    return sorted(found - graded)


def cut_files(numbers: Sequence[int]) -> dict[str, str]:
    """The files with something cut out, by path: the package's, and the tests."""
    paths = {path for part in PARTS for path in part.functions}
    paths |= {test.file for part in PARTS for test in part.tests} | {OWN_TEST}
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in sorted(paths)}
    for part in PARTS:
        if part.number in numbers:
            for path, names in part.functions.items():
                for name in names:
                    texts[path] = cut(texts[path], name, path, part.number)
    if 2 in numbers:
        texts[OWN_TEST] = cut(texts[OWN_TEST], OWN_TEST_FUNCTION, OWN_TEST, 2)
    for path, names in NOT_HANDED_OUT.items():
        for name in names:
            texts[path] = texts[path].replace(source(texts[path], name, path), "")
    return texts


def documents() -> dict[str, str]:
    """What students read, by path."""
    theory, measured, _ = (ROOT / "docs/theory.md").read_text(encoding="utf-8").partition(MEASURED)
    if not measured:
        raise KitError(f"docs/theory.md has no section that begins with {MEASURED!r}: mend kit.py")
    tour = (ROOT / COURSE / "tour.py").read_text(encoding="utf-8")
    return {
        "README.md": README,
        "assignment.md": (ROOT / COURSE / "assignment.md").read_text(encoding="utf-8"),
        "docs/theory.md": theory + "(The measurements follow in the project's repository.)\n",
        "pytest.ini": PYTEST_INI,
        "tour.ipynb": notebook(tour),
    }


def notebook(script: str) -> str:
    """A script in percent format as a notebook without outputs."""
    cells = []
    for number, block in enumerate(("\n" + script).split("\n# %%")[1:]):
        kind, _, text = block.partition("\n")
        is_text = "[markdown]" in kind
        lines = text.strip("\n").splitlines(keepends=True)
        if is_text:
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        cell = {"id": f"cell-{number}", "metadata": {}, "source": lines}
        if is_text:
            cells.append({"cell_type": "markdown", **cell})
        else:
            code = {"cell_type": "code", "execution_count": None, "outputs": []}
            cells.append({**code, **cell})
    book = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


def copy(here: Path, there: Path) -> None:
    there.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(here, there)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# --- Mistakes -------------------------------------------------------------------------------------


def report_mistakes() -> bool:
    """Plant each mistake and say which test of its part caught it.

    Returns:
        Whether all were caught, and all correct alternatives passed.
    """
    import mistakes

    missed = wrong = 0
    for mistake in mistakes.MISTAKES:
        test = catching_test(mistake.part, mistakes.planted(mistake))
        missed += test is None
        print(f"part {mistake.part}  {mistake.about}: {test or 'NOT CAUGHT'}", flush=True)
    for other in mistakes.CORRECT:
        test = catching_test(other.part, other.functions)
        wrong += test is not None
        print(f"part {other.part}  correct, {other.about}: {test or 'passes'}", flush=True)
    caught = len(mistakes.MISTAKES) - missed
    print(f"{caught} of {len(mistakes.MISTAKES)} mistakes are caught by a test of their part")
    return not missed and not wrong


class FirstFailure:
    """A plugin of pytest that notes which test failed first."""

    test: str | None = None

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.test is None:
            self.test = report.nodeid


def catching_test(number: int, functions: Functions) -> str | None:
    """Of the tests of a part, the first that fails with other functions; None if none does.

    Bonus tests are left out. In this process: to start pytest for each would take minutes.

    Raises:
        KitError: if pytest could not run the tests.
    """
    import mistakes
    import pytest

    os.environ["HYPOTHESIS_PROFILE"] = "graded"
    tests = [str(ROOT / test.node) for test in PARTS[number - 1].tests if test.points]
    options = ["--maxfail=1", "--hypothesis-seed=0", "-p", "no:terminal", "-p", "no:cacheprovider"]
    options += ["-o", "addopts=", "-o", "filterwarnings=", "-o", "pythonpath=. tests"]
    plugin = FirstFailure()
    with mistakes.in_memory(functions):
        code = pytest.main([f"--rootdir={ROOT}", *options, *tests], plugins=[plugin])
    if code not in (0, 1):
        raise KitError(f"pytest could not run the tests of part {number}: exit code {code}")
    return plugin.test


def report_own_test(path: Path) -> bool:
    """Grade a test that part 2 asks for; whether it gets all points."""
    if not path.is_file():
        raise KitError(f"no file {path}: give a test file")
    rows = grade_own_test(path.read_text(encoding="utf-8"), seed=0)
    print("\n".join(map(shown, rows)))
    return all(row["status"] == "passed" for row in rows)


# --- The command line -----------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kit.py", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    numbers = [part.number for part in PARTS]
    add = commands.add_parser(
        "handout", help="write the folder that students are given"
    ).add_argument
    add("out", type=Path, help="a folder that does not exist yet")
    add(
        "--runs",
        type=Path,
        default=ROOT / COURSE / "weights",
        help="a folder with the models base and retrain (default: docs/course/weights)",
    )
    add(
        "--part",
        type=int,
        nargs="+",
        choices=numbers,
        default=numbers,
        help="cut only these parts out, the others stay solved (default: all)",
    )
    add = commands.add_parser("grade", help="grade a submission").add_argument
    add("submission", type=Path, help="the student's folder, or one with the uploaded files")
    add("--part", type=int, choices=numbers, help="grade only this one")
    add("--out", type=Path, default=Path("results.json"), help="default: results.json")
    add("--seed", type=int, default=0, help="other examples of the same properties (default: 0)")
    add = commands.add_parser("mistakes", help="which tests catch which mistakes").add_argument
    add("--tests", type=Path, help="grade this test file as the one that part 2 asks for")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    try:
        if args.command == "handout":
            handout(args.out, args.runs, sorted(set(args.part)))
        elif args.command == "grade":
            grade(args.submission, args.part, args.out, args.seed)
        elif not (ROOT / COURSE / "mistakes.py").exists():
            raise KitError("mistakes.py is not handed out: run this in the repository")
        elif args.tests is not None:
            sys.exit(0 if report_own_test(args.tests) else 1)
        else:
            sys.path.insert(0, str(ROOT))
            sys.exit(0 if report_mistakes() else 1)
    except KitError as error:
        print(f"kit.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

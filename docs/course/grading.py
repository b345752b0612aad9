"""Runs the graded tests on a submission: points for a person to read, and for Gradescope."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from functions import COURSE, PACKED, ROOT, Functions, KitError, reference_functions, splice
from parts import OWN_TEST, OWN_TEST_POINTS, PARTS, Graded, Part

TIME_LIMIT = 300  # seconds for the tests of one part
MAX_OUTPUT = 4000  # characters of an error that results.json keeps
# How a handout and the grader run pytest: without the extensions of pyproject.toml.
PYTEST_INI = "[pytest]\npythonpath = . tests\ntestpaths = tests\n"

In = TypeVar("In")
Out = TypeVar("Out")


def in_parallel(function: Callable[[In], Out], items: Sequence[In]) -> list[Out]:
    """The function of each item, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, items))


# --- Running tests --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What pytest said of one test."""

    passed: bool
    output: str  # of the error; empty if it passed


def make_workspace(
    folder: Path, changes: Functions, files: Mapping[str, str] | None = None
) -> None:
    """A copy of the package and the tests to run pytest in.

    Args:
        changes: functions that replace the reference's.
        files: whole files that replace the reference's, before `changes` are made.
    """
    for name in ("tiny_retrack", "tests"):
        ignore = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    (folder / "pytest.ini").write_text(PYTEST_INI, encoding="utf-8")
    if (ROOT / PACKED).exists():
        write_functions(folder, reference_functions())
    for path, text in (files or {}).items():
        (folder / path).write_text(text, encoding="utf-8")
    write_functions(folder, changes)


def write_functions(folder: Path, functions: Functions) -> None:
    """Splice the functions into the files; a file that does not parse is left as it is."""
    for path, named in functions.items():
        text = (folder / path).read_text(encoding="utf-8")
        try:
            text = splice(text, named)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        (folder / path).write_text(text, encoding="utf-8")


def run_pytest(
    folder: Path, tests: Sequence[str], seed: int, *flags: str
) -> tuple[int, dict[str, Outcome], str]:
    """Run tests by node id: pytest's exit code, outcomes by node id, and the end of its output.

    The exit code is -1 if the time limit ended it.
    """
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", *tests, "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", f"--hypothesis-seed={seed}"]
    command += ["--continue-on-collection-errors", *flags]
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "graded", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIME_LIMIT,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return -1, {}, f"stopped after {TIME_LIMIT} seconds: does it end?"
    outcomes = read_report(report) if report.exists() else {}
    return done.returncode, outcomes, last_error(done.stdout + done.stderr)


def read_report(report: Path) -> dict[str, Outcome]:
    """The outcomes of a junit report by node id."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        path = case.get("classname", "").replace(".", "/") + ".py"
        errors = [child for child in case if child.tag in ("failure", "error", "skipped")]
        output = errors[0].get("message") or errors[0].text or "failed" if errors else ""
        outcomes[f"{path}::{case.get('name')}"] = Outcome(not errors, output)
    return outcomes


def last_error(output: str) -> str:
    """The last line that names an error, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E ") or "Error" in line.split(":")[0]]
    return (errors or lines or ["nothing was printed"])[-1].removeprefix("E ").strip()


# --- Grading --------------------------------------------------------------------------------------

Row = dict[str, Any]  # a test of Gradescope's results.json


def row(number: str, name: str, score: float, of: float, output: str, passed: bool) -> Row:
    return {
        "number": number,
        "name": name,
        "score": score,
        "max_score": of,
        "status": "passed" if passed else "failed",
        "output": output[:MAX_OUTPUT],
    }


def read_submission(submission: Path, path: str) -> str | None:
    """A file of a submission: in its place, or among files that were uploaded without folders."""
    for place in (submission / path, submission / Path(path).name):
        if place.is_file():
            return place.read_text(encoding="utf-8", errors="replace")
    return None


def grade_part(submission: Path, part: Part, seed: int) -> list[Row]:
    """The rows of one part: the student's functions of it among the reference's of all others."""
    reference = reference_functions()
    files, others, missing = {}, {}, ""
    for path, names in part.functions.items():
        text = read_submission(submission, path)
        if text is None:
            missing = f"{path} is missing in the submission"
            continue
        files[path] = text
        others[path] = {name: own for name, own in reference[path].items() if name not in names}
    if missing:
        return part_rows(part, {}, missing)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_workspace(folder, others, files)
        _, outcomes, error = run_pytest(folder, [test.node for test in part.tests], seed)
    return part_rows(part, outcomes, error)


def part_rows(part: Part, outcomes: Mapping[str, Outcome], error: str) -> list[Row]:
    """The rows of a part; `error` says why tests without an outcome have none."""
    rows = []
    for i, test in enumerate(part.tests, start=1):
        passed, output = judge(test, outcomes, error)
        points = test.points if passed else 0
        output = "" if passed else f"{test.test}: {output}"
        rows.append(row(f"{part.number}.{i}", test.about, points, test.points, output, passed))
    return rows


def judge(test: Graded, outcomes: Mapping[str, Outcome], error: str) -> tuple[bool, str]:
    """Whether all parameters of a test passed, and the first error."""
    names = [name for name in outcomes if name == test.node or name.startswith(f"{test.node}[")]
    mine = [outcomes[name] for name in names]
    for outcome in mine:
        if not outcome.passed:
            return False, outcome.output
    return bool(mine), "" if mine else error


def grade_own_test(own_test: str | None, seed: int) -> list[Row]:
    """The rows of part 2's own test: it passes on correct implementations, fails on biased ones.

    Without mistakes.py, in a handout, only the first row is there.
    """
    number = len(PARTS[1].tests) + 1
    name = "your own test passes on correct implementations"
    text = own_test or ""
    error = "" if own_test else f"{OWN_TEST} is missing in the submission"
    correct: list[Functions] = [{}]
    biased: list[Functions] = []
    if (ROOT / COURSE / "mistakes.py").exists():
        import mistakes

        correct += [other.functions for other in mistakes.CORRECT if other.part == 2]
        biased = [mistakes.planted(mistake) for mistake in mistakes.MISTAKES if mistake.biased]
    if not error:
        results = in_parallel(lambda functions: run_own_test(text, functions, seed), correct)
        error = next((error or "it fails" for code, error in results if code != 0), "")
    rows = [row(f"2.{number}", name, 0, 0, error, not error)]
    caught = [False] * len(biased)
    if not error:
        results = in_parallel(lambda functions: run_own_test(text, functions, seed), biased)
        caught = [code == 1 for code, _ in results]
    points = OWN_TEST_POINTS / max(len(biased), 1)
    for i, this in enumerate(caught, start=1):
        name = f"your own test fails on biased implementation {i}"
        output = "" if this else "counts once the row above passes" if error else "not caught"
        rows.append(row(f"2.{number + i}", name, points if this else 0, points, output, this))
    return rows


def run_own_test(text: str, functions: Functions, seed: int) -> tuple[int, str]:
    """pytest's exit code and last error of a student's test on an implementation."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_workspace(folder, functions, {OWN_TEST: text})
        code, _, error = run_pytest(folder, [OWN_TEST], seed)
    return code, error


def grade(submission: Path, number: int | None, out: Path, seed: int) -> None:
    """Grade a submission, print a line for each test and write Gradescope's results.json.

    Args:
        number: of the part; None for all.

    Raises:
        KitError: if `submission` is no folder, or `out` cannot be written.
    """
    started = time.monotonic()
    parts = [part for part in PARTS if number in (None, part.number)]
    nothing = [one for part in parts for one in part_rows(part, {}, "not graded")]
    write_results(out, nothing, "Grading did not end: tell your instructor.", 0)
    if not submission.is_dir():
        write_results(out, nothing, f"{submission} is no folder", 0)
        raise KitError(f"{submission} is no folder: give the folder of the submission")
    graded = in_parallel(lambda part: grade_part(submission, part, seed), parts)
    rows = []
    for part, its_rows in zip(parts, graded, strict=True):
        if part.number == 2:
            its_rows += grade_own_test(read_submission(submission, OWN_TEST), seed)
        print(f"Part {part.number}: {part.title}", *map(shown, its_rows), sep="\n")
        print(f"  {total(its_rows)} for code; {part.written} more for the written answers\n")
        rows += its_rows
    write_results(out, rows, "", time.monotonic() - started)
    print(f"{total(rows)} for code, written to {out}")


def shown(one: Row) -> str:
    """A row for a person: points, pass or fail, what it is about, the first line of the error."""
    points = f"{one['score']:g}/{one['max_score']:g}"
    line = f"  {one['number']:5} {points:>5} {one['status']}  {one['name']}"
    error = one["output"].strip().partition("\n")[0]
    return f"{line}\n{'':21}{error:.200}" if error else line


def total(rows: Sequence[Row]) -> str:
    score = sum(one["score"] for one in rows)
    return f"{score:g} of {sum(one['max_score'] for one in rows):g} points"


def write_results(out: Path, rows: Sequence[Row], output: str, seconds: float) -> None:
    """Gradescope's results.json, in one rename."""
    results = {
        "score": sum(one["score"] for one in rows),
        "max_score": sum(one["max_score"] for one in rows),
        "execution_time": round(seconds),
        "output": output,
        "tests": list(rows),
    }
    temporary = out.with_name(f".tmp-{secrets.token_hex(4)}.json")
    try:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise KitError(f"{out} cannot be written: {error.strerror}") from None

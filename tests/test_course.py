"""The course: handout, grader and planted mistakes; the tour; the networks that are handed out."""

import ast
import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from tiny_retrack.data import load_split
from tiny_retrack.lab.checkpoint import load_model

ROOT = Path(__file__).parents[1]
COURSE = ROOT / "docs/course"
sys.path.append(str(COURSE))

import functions  # noqa: E402
import grading  # noqa: E402
import kit  # noqa: E402
import make_weights  # noqa: E402
import mistakes  # noqa: E402
from functions import KitError, cut, source, splice  # noqa: E402
from parts import OWN_TEST, OWN_TEST_FUNCTION, OWN_TEST_POINTS, PARTS, Graded  # noqa: E402

# --- Running a graded test in this process


@pytest.fixture
def graded_profile() -> Iterator[None]:
    """Hypothesis as in the grader, which does not make examples smaller."""
    hypothesis.settings.load_profile("graded")
    yield
    hypothesis.settings.load_profile("default")


def calls_of(name: str, file: str) -> list[Callable[[], Any]]:
    """The calls that pytest would make of a test function, one for each set of parameters.

    A name with [parameter] is the one call with that string.
    """
    function, _, parameter = name.partition("[")
    test = getattr(__import__(Path(file).stem), function)
    if parameter:
        return [lambda: test(parameter.removesuffix("]"))]
    choices = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = mark.args
            names = names if isinstance(names, tuple | list) else [names]
            rows = [value if len(names) > 1 else (value,) for value in values]
            choices.append([dict(zip(names, row, strict=True)) for row in rows])
    calls = []
    for combination in product(*choices):
        arguments = {key: value for row in combination for key, value in row.items()}
        calls.append(lambda arguments=arguments: test(**arguments))
    return calls


def fails(name: str, file: str) -> bool:
    """Whether a test fails with any of its parameters."""
    for call in calls_of(name, file):
        try:
            call()
        except Exception:
            return True
    return False


GRADED = [(part.number, test) for part in PARTS for test in part.tests]


def test_points_are_100() -> None:
    code = sum(test.points for _, test in GRADED) + OWN_TEST_POINTS
    assert code + sum(part.written for part in PARTS) == 100


# --- Functions by name

EXAMPLE = '''
import math


@decorated
def f(x: int,
      k: int) -> int:
    """Docstring
    of two lines.
    """
    check_k(k)
    if x < 0:
        raise ValueError("x")
    # a comment
    y = x + k
    return y  # the end


class C:
    def g(self) -> int:
        return 1

    def h(self) -> int:
        return 2
'''


def test_cut_keeps_signature_docstring_and_checks() -> None:
    text = cut(cut(EXAMPLE, "f", "a.py", 3), "C.g", "a.py", 4)
    assert text == EXAMPLE.replace(
        "    # a comment\n    y = x + k\n    return y  # the end\n",
        '    raise NotImplementedError("Part 3: f")\n',
    ).replace("return 1", 'raise NotImplementedError("Part 4: C.g")')
    ast.parse(text)


def test_splice_puts_functions_back() -> None:
    bodies = {name: source(EXAMPLE, name, "a.py") for name in ("f", "C.g")}
    text = cut(cut(EXAMPLE, "f", "a.py", 3), "C.g", "a.py", 4)
    assert splice(text, bodies) == EXAMPLE
    without_f = text.replace(source(text, "f", "a.py"), "")
    assert bodies["f"] in splice(without_f, bodies)


def test_a_renamed_function_is_an_error() -> None:
    with pytest.raises(KitError, match=r"a\.py has no function gone: mend its name in .*parts\.py"):
        cut(EXAMPLE, "gone", "a.py", 1)


# --- The handout


def test_handout_without_weights_is_refused(tmp_path: Path) -> None:
    for name in ("base", "retrain"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    with pytest.raises(KitError, match=r"no weights in .*base: train it to the end"):
        kit.write_handout(tmp_path / "out", tmp_path / "runs", [1])


@pytest.fixture(scope="module")
def handout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("course") / "handout"
    kit.main(["handout", str(out)])
    return out


def all_text(folder: Path) -> dict[Path, str]:
    text = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".png"):
            text[path.relative_to(folder)] = path.read_text(encoding="utf-8")
    return text


def test_handout_holds_no_line_of_a_solution(handout: Path) -> None:
    """None of 40 characters or more, in any file. What is given is no solution."""
    solutions = {}
    for path, named in functions.reference_functions().items():
        for name, text in named.items():
            kept = cut((ROOT / path).read_text(encoding="utf-8"), name, path, 0)
            told = set(map(str.strip, source(kept, name, path).splitlines()))
            for line in set(map(str.strip, text.splitlines())) - told:
                solutions[line] = name
    own_test = (ROOT / OWN_TEST).read_text(encoding="utf-8")
    body = source(own_test, OWN_TEST_FUNCTION, OWN_TEST).partition('"""\n')[2]
    solutions |= dict.fromkeys(map(str.strip, body.splitlines()), OWN_TEST_FUNCTION)
    found = []
    for path, text in all_text(handout).items():
        lines = set(map(str.strip, text.splitlines()))
        found += [(path, line) for line in lines & set(solutions) if len(line) >= 40]
    assert found == []


def test_handout_has_no_mistakes_measurements_or_history(handout: Path) -> None:
    names = {path.relative_to(handout).as_posix() for path in handout.rglob("*")}
    for name in ("docs/course/mistakes.py", "docs/LOG.md", "docs/results", "benchmarks", ".git"):
        assert name not in names
    theory = (handout / "docs/theory.md").read_text(encoding="utf-8")
    assert "## 8 " in theory
    assert "## 9 " not in theory
    assert {"assignment.md", "tour.ipynb", "pytest.ini", "train_ddpm.py", OWN_TEST} <= names
    for model in ("base", "retrain"):
        load_model(handout / "runs/digits-tshirt" / model)


def test_handout_has_every_module_that_its_tests_import(handout: Path) -> None:
    ours = {path.stem for path in ROOT.glob("tests/*.py")}
    for path in handout.glob("tests/*.py"):
        for name in functions.imported_modules(path) & ours:
            assert (handout / f"tests/{name}.py").exists(), f"{path.name} imports {name}"
    extras = {"beartype", "xdist", "diffusers", "ruff"}  # of the extra dev, not of course
    assert not extras & functions.imported_modules(handout / "tests/conftest.py")


def test_handout_of_one_part_leaves_the_others_solved(tmp_path: Path) -> None:
    kit.main(["handout", str(tmp_path / "out"), "--part", "3"])
    text = "".join(all_text(tmp_path / "out/tiny_retrack").values())
    assert 'raise NotImplementedError("Part 3: knn_target")' in text
    assert 'raise NotImplementedError("Part 1' not in text


def test_handout_notebook_is_the_tour(handout: Path) -> None:
    book = json.loads((handout / "tour.ipynb").read_text(encoding="utf-8"))
    assert book["nbformat"] == 4
    tour = (COURSE / "tour.py").read_text(encoding="utf-8")
    assert len(book["cells"]) == tour.count("\n# %%") + tour.startswith("# %%")
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            assert cell["outputs"] == []
            ast.parse(code)
            assert code in tour


def test_handout_refuses_a_folder_that_exists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        kit.main(["handout", str(tmp_path)])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"kit.py: {tmp_path} exists: give a new folder\n"


@pytest.mark.usefixtures("unchecked", "graded_profile")
def test_every_graded_test_fails_on_the_handout(handout: Path) -> None:
    """That they pass on the reference, the suite itself shows."""
    removed: functions.Functions = {}
    for part in PARTS:
        for path, names in part.functions.items():
            text = (handout / path).read_text(encoding="utf-8")
            for name in names:
                removed.setdefault(path, {})[name] = source(text, name, path)
    with mistakes.in_memory(removed):
        passed = [test.test for _, test in GRADED if not fails(test.test, test.file)]
    assert passed == []


# --- The mistakes


@pytest.mark.usefixtures("unchecked", "graded_profile")
def test_every_mistake_is_caught_by_a_test_of_its_part() -> None:
    tests: dict[tuple[int, str], Graded] = {(n, g.test.partition("[")[0]): g for n, g in GRADED}
    missed = []
    for mistake in mistakes.MISTAKES:
        test = tests[mistake.part, mistake.caught_by.partition("[")[0]]
        with mistakes.in_memory(mistakes.planted(mistake)):
            if not fails(mistake.caught_by, test.file):
                missed.append(mistake.about)
    assert missed == []
    assert len(mistakes.MISTAKES) >= 26


@pytest.mark.usefixtures("unchecked", "graded_profile")
@pytest.mark.parametrize("other", mistakes.CORRECT, ids=lambda other: other.about)
def test_correct_alternatives_get_all_points(other: mistakes.Correct) -> None:
    tests = [test for n, test in GRADED if n == other.part and test.points]
    with mistakes.in_memory(other.functions):
        assert [test.test for test in tests if fails(test.test, test.file)] == []


@pytest.mark.usefixtures("unchecked")
def test_the_projects_own_test_of_part_2_catches_every_biased_implementation() -> None:
    biased = [mistake for mistake in mistakes.MISTAKES if mistake.biased]
    assert len(biased) == 5
    for mistake in biased:
        with mistakes.in_memory(mistakes.planted(mistake)):
            assert fails(OWN_TEST_FUNCTION, OWN_TEST), mistake.about
    for other in mistakes.CORRECT:
        with mistakes.in_memory(other.functions):
            assert not fails(OWN_TEST_FUNCTION, OWN_TEST)


# --- Grading: in a folder of its own, as a subprocess, so each costs seconds


def graded_rows(out: Path) -> dict[str, Any]:
    """results.json, of which every row has Gradescope's form."""
    results = json.loads(out.read_text(encoding="utf-8"))
    assert {"score", "max_score", "tests"} <= set(results)
    for row in results["tests"]:
        assert {"name", "number", "score", "max_score", "status", "output"} == set(row)
        assert row["status"] in ("passed", "failed")
    assert results["score"] == sum(row["score"] for row in results["tests"])
    return results


def test_a_mistake_in_part_1_does_not_cost_part_4(
    handout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A submission of single files, as an upload leaves them; its posterior.py does not parse."""
    (tmp_path / "posterior.py").write_text("def log_posterior(:\n", encoding="utf-8")
    for path in PARTS[3].functions:
        (tmp_path / Path(path).name).write_text(
            splice(
                (handout / path).read_text(encoding="utf-8"),
                {name: source_of(path, name) for name in PARTS[3].functions[path]},
            ),
            encoding="utf-8",
        )
    out = tmp_path / "results.json"
    kit.main(["grade", str(tmp_path), "--part", "4", "--out", str(out), "--seed", "3"])
    results = graded_rows(out)
    assert results["score"] == results["max_score"] == 4
    assert "4.1     1/1 passed  grad of lam L_forget" in capsys.readouterr().out


def source_of(path: str, name: str) -> str:
    return source((ROOT / path).read_text(encoding="utf-8"), name, path)


def test_a_submission_that_does_not_import_has_results(
    handout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (handout / "tiny_retrack/attacks.py").read_text(encoding="utf-8")
    (tmp_path / "attacks.py").write_text(f"import nowhere\n{text}", encoding="utf-8")
    out = tmp_path / "results.json"
    kit.main(["grade", str(tmp_path), "--part", "5", "--out", str(out)])
    results = graded_rows(out)
    assert (results["score"], results["max_score"]) == (0, 6)
    assert len(results["tests"]) == len(PARTS[4].tests)
    assert all("No module named 'nowhere'" in row["output"] for row in results["tests"])
    assert "No module named 'nowhere'" in capsys.readouterr().out


def test_a_missing_file_and_a_missing_submission_have_results(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    kit.main(["grade", str(tmp_path), "--part", "3", "--out", str(out)])
    results = graded_rows(out)
    assert (results["score"], results["max_score"]) == (0, 13)
    assert "losses.py is missing in the submission" in results["tests"][0]["output"]
    with pytest.raises(SystemExit) as exit_:
        kit.main(["grade", str(tmp_path / "gone"), "--out", str(out)])
    assert exit_.value.code == 2
    assert "is no folder" in graded_rows(out)["output"]
    assert graded_rows(out)["max_score"] == 41


def test_tests_that_run_out_of_time_fail_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_long(*_: object, **options: Any) -> None:
        raise subprocess.TimeoutExpired("pytest", options["timeout"])

    monkeypatch.setattr(subprocess, "run", too_long)
    rows = grading.grade_part(ROOT, PARTS[4], seed=0)
    assert all("stopped after 300 seconds" in row["output"] for row in rows)


@pytest.mark.parametrize(
    ("codes", "score"),
    [([0, 0, 1, 1, 1, 1, 1], 10), ([0, 0, 1, 0, 1, 0, 2], 4), ([0, 1, 1, 1, 1, 1, 1], 0)],
    ids=["catches all", "catches two", "fails on a correct one"],
)
def test_own_test_gets_points_for_what_it_catches(
    codes: list[int], score: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the exit code of pytest on two correct implementations, then on five biased ones."""
    runs = iter(codes)
    monkeypatch.setattr(grading, "run_own_test", lambda *_: (next(runs), ""))
    monkeypatch.setattr(grading, "in_parallel", lambda function, items: [*map(function, items)])
    rows = grading.grade_own_test("a test", seed=0)
    assert sum(row["score"] for row in rows) == score
    assert sum(row["max_score"] for row in rows) == OWN_TEST_POINTS


# --- The tour and the networks


@pytest.mark.usefixtures("unchecked")
def test_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setenv("TOUR_QUICK", "1")
    monkeypatch.setenv("TOUR_OUT", str(tmp_path))
    monkeypatch.chdir(ROOT)
    with matplotlib.rc_context({"backend": "agg", "figure.dpi": 20, "figure.max_open_warning": 0}):
        runpy.run_path(str(COURSE / "tour.py"))
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert {"trajectory_2d.png", "trajectory_images.png", "no_network.png"} <= figures


NLL_TOLERANCE = 0.05  # bits per dimension, of another machine's rounding and ODE steps


@pytest.mark.parametrize("name", ["base", "retrain"])
def test_handed_out_networks_have_the_recorded_figures(name: str) -> None:
    """The hits are counted at distances that are far from the threshold."""
    model, schedule = load_model(make_weights.WEIGHTS / name)
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    found = make_weights.figures(model.eval(), schedule, load_split("digits-tshirt"))
    recorded = json.loads((make_weights.WEIGHTS / name / "figures.json").read_text())
    assert found.keys() == recorded.keys()
    for key, value in recorded.items():
        tolerance = NLL_TOLERANCE if key.startswith("nll") else 1e-6
        assert found[key] == pytest.approx(value, abs=tolerance), key


def test_no_other_large_file_is_tracked() -> None:
    """Above 1 MB: the networks alone. Without git, all files but those that are ignored."""
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.skip("no git repository")
    paths = [ROOT / name for name in done.stdout.split("\0") if name]
    large = [path for path in paths if path.is_file() and path.stat().st_size > 2**20]
    allowed = set()
    for folder in ("docs/course/weights", "docs/weights/mnist-tshirt"):
        allowed |= {f"{folder}/{name}" for name in ("base", "retrain")}
    assert {path.parent.relative_to(ROOT).as_posix() for path in large} <= allowed

"""The structure of the code: a lesson that stands alone, a lab on top of it, short functions."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tiny_retrack"

# In reading order. A file may import the files before it, and no others of the package.
LESSON = [
    "types",
    "schedule",
    "pictures",
    "data",
    "unet",
    "prompts",
    "posterior",
    "losses",
    "methods",
    "training",
    "sampling",
    "likelihood",
    "metrics",
    "attacks",
]
# A file may import all of the lesson, and the files before it.
LAB = [
    "lab.unet_config",
    "lab.checkpoint",
    "lab.plots",
    "lab.presets",
    "lab.flags",
    "lab.datasets",
    "lab.spec",
    "lab.runs",
    "lab.hits",
    "lab.features",
    "lab.jobs",
    "lab.yardstick",
    "lab.intervals",
    "lab.pretraining",
    "lab.unlearning",
    "lab.evaluation",
    "lab.prompts",
    "lab.compare",
    "lab.theory",
]
# The package's face, tiny_retrack/__init__.py, names what most users need of both.
FACE_OF_THE_LAB = {"lab.checkpoint"}

MAX_FUNCTION = 50  # lines of code
MAX_SCRIPT = 120  # lines
MAX_COLUMNS = 100
DIFFUSION_LIBRARIES = {"diffusers", "transformers", "k_diffusion", "denoising_diffusion_pytorch"}

SCRIPTS = sorted(ROOT.glob("*.py"))
PRODUCT = [*sorted(PACKAGE.rglob("*.py")), *SCRIPTS]
EVERY_FILE = [*PRODUCT, *sorted(ROOT.glob("tests/**/*.py")), *sorted(ROOT.glob("benchmarks/*.py"))]


def module_of(path: Path) -> str:
    """ "lab.runs" for tiny_retrack/lab/runs.py; "" and "lab" for the two __init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}
FILES = [name for name in MODULES if name not in ("", "lab")]


def imported_names(code: str) -> set[str]:
    """All that is imported anywhere in the code, as dotted names: "a.b" and "a.b.c" for
    `from a.b import c`.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names.add(base)
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def imported_modules(code: str) -> set[str]:
    """The modules of the package that the code imports; "" for the package's face."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "tiny_retrack":
                    modules.add(alias.name.removeprefix("tiny_retrack").removeprefix("."))
        if isinstance(node, ast.ImportFrom):
            first, _, module = (node.module or "").partition(".")
            if node.level == 0 and first == "tiny_retrack":
                for alias in node.names:
                    below = f"{module}.{alias.name}".removeprefix(".")
                    modules.add(below if below in MODULES else module)
    return modules


def text_files_without_encoding(code: str) -> list[int]:
    """The lines that read or write a text file in the encoding of the machine."""
    lines = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        is_text = node.func.attr in ("read_text", "write_text")
        if node.func.attr == "open" and (modes or not node.args):
            is_text = not any("b" in str(mode) for mode in modes)
        if is_text and not any(keyword.arg == "encoding" for keyword in node.keywords):
            lines.append(node.lineno)
    return lines


def function_lengths(code: str) -> dict[str, int]:
    """Lines of code by function: without docstrings, comments and blank lines."""
    lines = code.splitlines()
    tree = ast.parse(code)
    docstrings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lengths: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = 0
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                text = lines[number - 1].strip()
                if number not in docstrings and text and not text.startswith("#"):
                    count += 1
            lengths[f"{node.name}, line {node.lineno}"] = count
    return lengths


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- Who may import whom


def test_every_file_has_a_place_in_the_order() -> None:
    assert sorted(LESSON + LAB) == sorted(FILES)


@pytest.mark.parametrize("name", LESSON)
def test_lesson_imports_nothing_of_the_lab(name: str) -> None:
    lab = {module for module in imported_modules(MODULES[name].read_text()) if "lab" in module}
    assert lab == set()


@pytest.mark.parametrize("name", LESSON + LAB)
def test_imports_flow_one_way(name: str) -> None:
    order = LESSON + LAB
    before = set(order[: order.index(name)])
    assert imported_modules(MODULES[name].read_text()) <= before


def test_face_imports_the_lesson_and_checkpoints() -> None:
    assert imported_modules(MODULES[""].read_text()) <= set(LESSON) | FACE_OF_THE_LAB
    assert imported_modules(MODULES["lab"].read_text()) == set()


@pytest.mark.parametrize("path", PRODUCT, ids=relative)
def test_product_imports_no_diffusion_library(path: Path) -> None:
    names = imported_names(path.read_text())
    assert {name.split(".")[0] for name in names}.isdisjoint(DIFFUSION_LIBRARIES)


@pytest.mark.parametrize("path", PRODUCT, ids=relative)
def test_product_imports_are_absolute(path: Path) -> None:
    """The tests above read absolute imports only."""
    assert not [name for name in imported_names(path.read_text()) if name.startswith(".")]


# --- How long things may be


@pytest.mark.parametrize("path", PRODUCT, ids=relative)
def test_functions_are_short(path: Path) -> None:
    lengths = function_lengths(path.read_text())
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION} == {}


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_scripts_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_SCRIPT


@pytest.mark.parametrize("path", PRODUCT, ids=relative)
def test_text_files_are_utf_8(path: Path) -> None:
    """Whatever the machine's encoding is: they may hold "±" and names of any script."""
    assert text_files_without_encoding(path.read_text()) == []


@pytest.mark.parametrize("path", EVERY_FILE, ids=relative)
def test_lines_are_short(path: Path) -> None:
    lines = enumerate(path.read_text().splitlines(), start=1)
    assert [number for number, line in lines if len(line) > MAX_COLUMNS] == []


# --- The tools of this file


def test_function_lengths_count_code_only() -> None:
    code = '''
def outer(
    a: int,
) -> int:
    """Docstring

    of three lines."""

    # A comment.
    def inner() -> int:
        """One line."""
        return a  # code

    text = """not a
docstring"""
    return inner() + len(text)
'''
    assert function_lengths(code) == {"outer, line 2": 8, "inner, line 10": 2}


def test_imported_modules_reads_every_form_of_import() -> None:
    code = """
import tiny_retrack.losses
import torch.nn
from tiny_retrack import NoiseSchedule
from tiny_retrack.lab import flags, runs

def later():
    from tiny_retrack.lab.checkpoint import load_model
"""
    modules = {"losses", "", "lab.flags", "lab.runs", "lab.checkpoint"}
    assert imported_modules(code) == modules
    assert "torch.nn" in imported_names(code)
    assert "tiny_retrack.lab.runs" in imported_names(code)

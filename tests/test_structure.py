"""The house's plan: which file may import which, and how large the house may grow."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tiny_retrack"
# file: what it may import from inside the package; errors.py is open to all
MAY_IMPORT = {
    "__init__": {"checkpoint", "schedule", "unet"},
    "errors": set(),
    "data": set(),
    "schedule": set(),
    "unet": set(),
    "checkpoint": {"unet", "schedule"},
    "posterior": {"schedule"},
    "losses": {"schedule", "posterior"},
    "training": {"checkpoint"},
    "sampling": {"schedule"},
    "likelihood": {"schedule"},
    "metrics": set(),
    "attacks": {"data", "schedule", "losses", "training"},
    "report": set(),
    "presets": {"unet"},
    "cli": {"checkpoint", "data", "unet"},
    "theory": {
        "data",
        "schedule",
        "posterior",
        "losses",
        "training",
        "report",
        "checkpoint",
        "cli",
        "presets",
    },
}


def imports_of(path: Path) -> set[str]:
    found = set()
    exported = {
        "NoiseSchedule": "schedule",
        "UNet": "unet",
        "load_model": "checkpoint",
        "save_model": "checkpoint",
    }
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.startswith("tiny_retrack")
        ):
            parts = node.module.split(".")
            found |= (
                {parts[1]}
                if len(parts) > 1
                else {exported.get(alias.name, alias.name) for alias in node.names}
            )
        if isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("tiny_retrack.")
            }
    return found


def test_every_file_has_its_place() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} <= set(MAY_IMPORT)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_flow_one_way(path: Path) -> None:
    assert imports_of(path) <= MAY_IMPORT[path.stem] | {"errors"}


def code_lines(path: Path) -> int:
    """Lines that hold code: not blank, not comment, not docstring."""
    text = path.read_text()
    skip = set()
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            skip |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(
        1
        for i, line in lines
        if i not in skip and line.strip() and not line.strip().startswith("#")
    )


def test_the_core_fits_in_one_head() -> None:
    assert sum(code_lines(path) for path in PACKAGE.glob("*.py")) < 2000


def test_no_diffusion_library_in_the_product() -> None:
    for path in [*PACKAGE.glob("*.py"), *PACKAGE.parent.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[0] in ("diffusers", "transformers") for name in names), (
                path
            )

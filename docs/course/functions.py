"""Functions by name: find them in a file, cut their bodies out, put others in their place."""

import ast
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

from parts import PARTS

ROOT = Path(__file__).resolve().parents[2]  # of the repository, or of a handout
COURSE = Path("docs/course")
# In a handout: the reference functions, packed, so that each part can be graded before the others
# are written. The repository has them in the open.
PACKED = COURSE / "other_parts.bin"

Functions = dict[str, dict[str, str]]  # by file and name: the text of a function


class KitError(Exception):
    """A command cannot be carried out: one line that says why and what to do."""


def find_functions(text: str) -> dict[str, ast.FunctionDef]:
    """The functions of a file by name, "Class.name" for methods."""
    found: dict[str, ast.FunctionDef] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}": method for method in methods}
    return found


def find(text: str, name: str, path: str) -> ast.FunctionDef:
    """One function by name.

    Raises:
        KitError: if the file has no such function.
    """
    functions = find_functions(text)
    if name not in functions:
        raise KitError(f"{path} has no function {name}: mend its name in {COURSE}/parts.py")
    return functions[name]


def span(node: ast.FunctionDef) -> tuple[int, int]:
    """The lines [first, last) of a function with its decorators, counted from 0."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return first - 1, node.end_lineno or node.lineno


def source(text: str, name: str, path: str) -> str:
    """The text of one function."""
    first, last = span(find(text, name, path))
    return "".join(text.splitlines(keepends=True)[first:last])


def is_given(node: ast.stmt) -> bool:
    """Whether a statement is left to students: it refuses wrong arguments, by `if ...: raise ...`
    or check_k(...), or it is the x_t with which several losses begin.
    """
    if isinstance(node, ast.If):
        return not node.orelse and all(isinstance(item, ast.Raise) for item in node.body)
    return bool(re.match(r"_?check_\w+\(|x_t = schedule\.q_sample\(", ast.unparse(node)))


def cut(text: str, name: str, path: str, part: int) -> str:
    """The file with one function's body replaced by `raise NotImplementedError`.

    Signature, docstring and what is given at the beginning stay.
    """
    node = find(text, name, path)
    kept = node.body[0].lineno - 1
    for i, statement in enumerate(node.body):
        is_docstring = i == 0 and ast.get_docstring(node) is not None
        if not (is_docstring or is_given(statement)):
            break
        kept = statement.end_lineno or statement.lineno
    lines = text.splitlines(keepends=True)
    missing = f'raise NotImplementedError("Part {part}: {name}")\n'
    lines[kept : node.end_lineno] = [" " * node.body[0].col_offset + missing]
    return "".join(lines)


def splice(text: str, functions: Mapping[str, str]) -> str:
    """The file with the given functions in place of its own of those names.

    One that the file does not have is added at the end, unless it is a method.
    """
    lines = text.splitlines(keepends=True)
    here = find_functions(text)
    for name in sorted(set(functions) & set(here), key=lambda name: -here[name].lineno):
        first, last = span(here[name])
        lines[first:last] = [functions[name]]
    missing = [functions[name] for name in functions if name not in here and "." not in name]
    return "\n\n".join(["".join(lines), *missing])


def imported_modules(path: Path) -> set[str]:
    """The names of the modules that a file imports, without what stands behind the first dot."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def reference_functions() -> Functions:
    """The reference solution: the functions of all parts, as they stand in the repository."""
    packed = ROOT / PACKED
    if packed.exists():
        return json.loads(zlib.decompress(packed.read_bytes()))
    functions: Functions = {}
    for part in PARTS:
        for path, names in part.functions.items():
            text = (ROOT / path).read_text(encoding="utf-8")
            for name in names:
                functions.setdefault(path, {})[name] = source(text, name, path)
    return functions

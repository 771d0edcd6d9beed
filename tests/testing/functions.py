"""Functions in which lines of Python source lie."""

from __future__ import annotations

import ast
import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = Path(sysconfig.get_path("purelib"))


def short(path: str) -> str:
    """A path without the folder that the project or an installed package lies in."""
    return path.split("site-packages/")[-1].removeprefix(f"{ROOT}/")


def function_of(source: str) -> str:
    """The function in which a ``file.py:12`` lies, of the project or of an installed package: ``file.py:Class.method``,
    the innermost with the names of what it lies in; a decorator's line is its function's. Empty where the file is not
    there, or the line in no function."""
    path, _, line = source.rpartition(":")
    for folder in (ROOT, PACKAGES):
        if (folder / short(path)).is_file():
            names = [name for first, last, name in functions(folder / short(path)) if first <= int(line) <= last]
            return f"{short(path)}:{names[-1]}" if names else ""
    return ""


@functools.cache
def functions(path: Path) -> list[tuple[int, int, str]]:
    """(first line, last line, name) of every function of a file, those within others behind these."""
    return list(_within(ast.parse(path.read_text()), ()))


def _within(node: ast.AST, outer: tuple[str, ...]) -> Iterator[tuple[int, int, str]]:
    for child in ast.iter_child_nodes(node):
        names = outer
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = (*outer, child.name)
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
            yield first, child.end_lineno, ".".join(names)
        yield from _within(child, names)

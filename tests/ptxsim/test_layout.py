"""The folders of the simulator: what may import what, and what needs the DSL."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.testing.bundled import Processes

ROOT = Path(__file__).parents[2]
# Each folder may import those before it, and the modules beside them. ``report.cli`` stands above all.
FOLDERS = ("", "ops", "frontend", "machine", "analysis", "report", "host", "timing")
ABOVE = {"ptxsim/report/cli.py", "ptxsim/__init__.py", "ptxsim/__main__.py"}
FILES = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("ptxsim/**/*.py"))


def folder_of(parts):
    return parts[1] if len(parts) > 1 and (ROOT / "ptxsim" / parts[1]).is_dir() else ""


def imported(file):
    """(first parts of) the modules of ptxsim that a file imports anywhere."""
    package = file.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            whole = [*start, *(node.module.split(".") if node.module else [])]
            names = [[*whole, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        yield from (name for name in names if name[0] == "ptxsim")


@pytest.mark.parametrize("file", [file for file in FILES if file not in ABOVE])
def test_arrows_go_one_way(file):
    mine = FOLDERS.index(folder_of(file.removesuffix(".py").split("/")))
    for name in imported(file):
        assert FOLDERS.index(folder_of(name)) <= mine, f"{file} imports {'.'.join(name)}"


WITHOUT = """
import importlib, importlib.util, json, pathlib, sys
assert importlib.util.find_spec("cutlass") is None
files = sorted(pathlib.Path("ptxsim").rglob("*.py"))
for name in [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]:
    if not name.endswith("__main__"):
        importlib.import_module(name)
import numpy as np
from ptxsim.report.history import History
from tests.testing.ptx import run
out = run("mov.u32 %r1, 7; mad.wide.u32 %rd1, %t, 4, %out0; st.global.u32 [%rd1], %r1;", [], [np.zeros(32, np.uint32)],
          observers=[History()], race=True, late=True, seed=1)
print(json.dumps([int(out.sum()), sorted(name for name in sys.modules if name.startswith("cutlass"))]))
"""


def test_everything_but_compiling_works_without_the_dsl(tmp_path):
    """All modules load, and a kernel runs from its PTX, with the race detector and a history."""
    assert Processes(tmp_path).run(WITHOUT) == [7 * 32, []]

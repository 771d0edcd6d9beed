"""Every module of the project can be the first one that a program imports."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("cute_fa", "fa2_sm80", "fa3_sm90", "fa4_sm100", "perf", "ptxsim")


@pytest.mark.sampled
@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_imports_first(package):
    found = pkgutil.walk_packages(import_module(package).__path__, f"{package}.")
    modules = [package, *(module.name for module in found if not module.name.endswith("__main__"))]
    command = [sys.executable, "-W", "ignore", "-m", "tests.testing.import_alone", *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, len(modules) > 10) == ("", True)


def test_a_circle_is_noticed(tmp_path):
    (tmp_path / "circle").mkdir()
    (tmp_path / "circle" / "__init__.py").touch()
    (tmp_path / "circle" / "first.py").write_text("from circle.second import b\na = 1\n")
    (tmp_path / "circle" / "second.py").write_text("from circle.first import a\nb = 2\n")
    command = [sys.executable, "-W", "ignore", "-m", "tests.testing.import_alone", "circle.first", "circle.second"]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["circle.first", "circle.second"]


# What each part may import of the project, imports inside functions and for type checkers included.
MAY_IMPORT = {
    "cute_fa/semantics": ("cute_fa.semantics",),
    "cute_fa/engine": ("cute_fa.engine", "cute_fa.semantics"),
    "cute_fa/device": ("cute_fa.device", "cute_fa.semantics", "cute_fa.engine.contract"),
    "cute_fa/api": ("cute_fa.api", "cute_fa.engine", "cute_fa.semantics"),
    "cute_fa/compat": ("cute_fa.compat", "cute_fa.api", "cute_fa.engine", "cute_fa.semantics"),
    "cute_fa/fp8.py": ("cute_fa.semantics",),
    "cute_fa/service.py": ("cute_fa.api", "cute_fa.engine.worlds", "cute_fa.semantics"),
    "cute_fa/integrations": ("cute_fa.integrations", "cute_fa.api", "cute_fa.engine", "cute_fa.semantics"),
    **{
        f"{family}/{folder}": (
            *(f"{family}.{folder}", f"{family}.common", "cute_fa.device", "cute_fa.semantics"),
            "cute_fa.engine.contract",
        )
        for family, folders in {
            "fa2_sm80": ("common", "forward", "split", "backward", "append"),
            "fa3_sm90": ("common", "forward", "decode", "backward"),
            "fa4_sm100": ("forward",),
        }.items()
        for folder in folders
    },
    "fa3_sm90/backward_split": (
        *("fa3_sm90.backward_split", "fa3_sm90.backward", "fa3_sm90.common", "cute_fa.device", "cute_fa.semantics"),
        "cute_fa.engine.contract",
    ),
    "ptxsim": ("ptxsim",),
}
# The one adapter, and the type of what it gives.
SIMULATOR = {"cute_fa/engine/worlds/simulated.py", "cute_fa/engine/worlds/__init__.py"}


def imported(file: Path) -> Iterator[str]:
    """Modules of the project that a file imports anywhere."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.split(".")[0] in (*PACKAGES, "tests"))


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_arrows_go_one_way(part):
    files = [ROOT / part] if part.endswith(".py") else list(ROOT.joinpath(part).rglob("*.py"))
    assert files
    for file in files:
        where = str(file.relative_to(ROOT))
        allowed = MAY_IMPORT[part] + (("ptxsim",) if where in SIMULATOR else ())
        for name in imported(file):
            assert any(name == prefix or name.startswith(f"{prefix}.") for prefix in allowed), (where, name)

"""Every module of the project can be the first one that a program imports."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from importlib import import_module

PACKAGES = ("cute_fa", "fa2_sm80", "fa3_sm90", "perf", "ptxsim")


def test_every_module_imports_first():
    modules = []
    for package in PACKAGES:
        found = pkgutil.walk_packages(import_module(package).__path__, f"{package}.")
        modules += [package, *(module.name for module in found if not module.name.endswith("__main__"))]
    command = [sys.executable, "-W", "ignore", "-m", "tests.testing.import_alone", *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, len(modules) > 150) == ("", True)


def test_a_circle_is_noticed(tmp_path):
    (tmp_path / "circle").mkdir()
    (tmp_path / "circle" / "__init__.py").touch()
    (tmp_path / "circle" / "first.py").write_text("from circle.second import b\na = 1\n")
    (tmp_path / "circle" / "second.py").write_text("from circle.first import a\nb = 2\n")
    command = [sys.executable, "-W", "ignore", "-m", "tests.testing.import_alone", "circle.first", "circle.second"]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["circle.first", "circle.second"]

"""The flavour of the DSL that a process would load, found without importing the DSL."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cutlass
import pytest

from cute_fa.engine import cache, flavour
from cute_fa.semantics.types import SmArch
from fa2_sm80.forward.entry import Fa2Forward
from tests.testing.cases import small_problem

LOADED = "cutlass._mlir._mlir_libs._cutlass_ir"


@pytest.fixture
def dsl(tmp_path, monkeypatch):
    """Makes a DSL with these flavours' libraries what ``import cutlass`` would find, and CUDA of this major version
    what the driver supports (None: no driver)."""
    for name in [name for name in sys.modules if name.split(".")[0] == "cutlass"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def make(*flavours: str, driver: int | None = None):
        libraries = tmp_path / flavour.LIBRARIES
        libraries.mkdir(parents=True)
        (tmp_path / "cutlass" / "__init__.py").touch()
        (libraries / "_cutlass_ir.pyi").touch()
        for name in flavours:
            (libraries / f"_cutlass_ir.{name}.cpython-311-x86_64-linux-gnu.so").touch()
        monkeypatch.setattr(flavour, "_driver_cuda", lambda: driver)

    return make


@pytest.mark.parametrize(
    ("flavours", "driver", "expected"),
    [
        (["cu12"], None, "cu12"),
        (["cu12", "cu13"], None, "cu13"),
        (["cu12", "cu13"], 12, "cu12"),
        (["cu12", "cu13"], 13, "cu13"),
        (["cu12", "cu13"], 14, "cu13"),
        (["cu9", "cu13"], 12, "cu9"),
        (["cu13"], 12, None),
        ([], None, None),
    ],
)
def test_the_newest_that_the_driver_supports(dsl, flavours, driver, expected):
    dsl(*flavours, driver=driver)
    assert flavour.active() == expected


def test_without_the_dsl_there_is_none(monkeypatch):
    monkeypatch.setattr(flavour.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, LOADED, raising=False)
    assert flavour.active() is None


def test_what_is_loaded_wins(dsl, monkeypatch):
    dsl("cu13")
    monkeypatch.setitem(sys.modules, LOADED, SimpleNamespace(__file__="/a/_cutlass_ir.cu12.cpython-311.so"))
    assert flavour.active() == "cu12"


def test_this_process():
    assert flavour.active() == f"cu{cutlass.CUDA_VERSION.major}"


@pytest.mark.sampled
@pytest.mark.parametrize(("version", "major"), [(12080, 12), (13010, 13)])
def test_the_driver_is_asked(tmp_path, version, major):
    source = tmp_path / "driver.c"
    source.write_text(f"int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    code = "from cute_fa.engine import flavour; print([flavour.driver_supports(f'cu{n}') for n in (11, 12, 13, 14)])"
    environment = {"LD_LIBRARY_PATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert done.stdout == f"{[n <= major for n in (11, 12, 13, 14)]}\n", done.stderr


def test_the_cache_tells_flavours_apart(monkeypatch):
    problem = small_problem(SmArch.SM_80)
    config = Fa2Forward.configure(problem)
    digests = set()
    for name in ("cu12", "cu13", None):
        cache.versions.cache_clear()
        monkeypatch.setattr(cache.flavour, "active", lambda name=name: name)
        digests.add(cache.key_of(config).digest)
    cache.versions.cache_clear()
    assert len(digests) == 3

"""The flavour of the DSL: its libraries are built for CUDA 12 ("cu12") and for CUDA 13 ("cu13"), whose ptxas make
different code. Both may be installed, and one process loads one of them.

Nothing here imports the DSL. The choice is the one that its loader makes, ``cutlass/_mlir/_mlir_libs/__init__.py``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from pathlib import Path

# The compiler of one flavour, in LIBRARIES below the DSL's ``dsl_packages``.
_COMPILER = re.compile(r"_cutlass_ir\.(cu\d+)\..*\.so")
LIBRARIES = Path("cutlass", "_mlir", "_mlir_libs")


def active() -> str | None:
    """The flavour that this process has loaded, or else would load: the newest that the driver supports, or without a
    driver the newest. None without the DSL, or if the driver supports none."""
    loaded = sys.modules.get("cutlass._mlir._mlir_libs._cutlass_ir")
    if loaded is not None:
        return _COMPILER.fullmatch(Path(loaded.__file__).name)[1]
    usable = [flavour for flavour in beside() if driver_supports(flavour)]
    return max(usable, key=cuda_major, default=None)


def beside() -> list[str]:
    """The flavours that ``import cutlass`` finds beside each other."""
    spec = importlib.util.find_spec("cutlass")
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parents[1] / LIBRARIES
    return sorted(match[1] for path in folder.glob("_cutlass_ir.*") if (match := _COMPILER.fullmatch(path.name)))


def cuda_major(flavour: str) -> int:
    return int(flavour.removeprefix("cu"))


def driver_supports(flavour: str) -> bool:
    """Whether this machine's driver runs what the flavour is built for; without a driver nothing is run."""
    cuda = _driver_cuda()
    return cuda is None or cuda >= cuda_major(flavour)


def _driver_cuda() -> int | None:
    """Major version of the newest CUDA that the driver supports, None without a driver."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value // 1000

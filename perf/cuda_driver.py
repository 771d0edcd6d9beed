"""What the CUDA driver says of the machine, without nvidia-smi, which containers often lack.

Run as a script it prints the major version of CUDA that the driver supports, and nothing where there is no GPU. It
needs the standard library alone, since make asks it before anything is installed.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple


class Driver(NamedTuple):
    """``gpus`` that it sees; ``cuda``: (major, minor) of the newest CUDA that it supports."""

    gpus: int
    cuda: tuple[int, int]


def driver(library: str = "libcuda.so.1") -> Driver | None:
    """None without a driver or without a GPU."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return None
    gpus, version = ctypes.c_int(), ctypes.c_int()
    failed = (
        cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(gpus)) or cuda.cuDriverGetVersion(ctypes.byref(version))
    )
    if failed or not gpus.value:
        return None
    # 1000 · major + 10 · minor
    return Driver(gpus.value, (version.value // 1000, version.value % 1000 // 10))


if __name__ == "__main__":
    found = driver()
    if found:
        print(found.cuda[0])

"""The made-up driver of fake_libcuda.c: built, put in libcuda's place, and looked at from inside such a process."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("fake_libcuda.c")
STATIC, OPT_IN = 1024, 232448  # bytes of shared memory that it tells
_CONTEXT = 0x1000


def build(folder: Path, without: str | None = None) -> dict[str, str]:
    """What makes a process find the driver that is built in the folder; ``without`` a function of it."""
    missing = [f"-D{without}=fake_{without}"] if without else []
    options = ["-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", *missing]
    subprocess.run(["cc", *options, "-o", folder / "libcuda.so.1", SOURCE], check=True)
    return {"LD_LIBRARY_PATH": str(folder)}


class Driver:
    """Of this process."""

    def __init__(self):
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.cuda.fake_calls.restype = ctypes.c_char_p
        self.cuda.fake_last_code.restype = ctypes.c_void_p

    def calls(self) -> list[list[Any]]:
        """Name and numbers of every call since the last question."""
        lines = self.cuda.fake_calls().decode().splitlines()
        self.cuda.fake_clear()
        return [[int(word) if word.lstrip("-").isdigit() else word for word in line.split()] for line in lines]

    def fail(self, name: str, code: int, times: int = 1) -> None:
        self.cuda.fake_fail(name.encode(), code, times)

    def make_current(self, device: int) -> None:
        """In this thread."""
        assert not self.cuda.cuCtxSetCurrent(ctypes.c_void_p(_CONTEXT + device))

    def last_code(self) -> bytes:
        """The image that was loaded last: a fat binary, which tells its size behind a header of its own."""
        address = self.cuda.fake_last_code()
        magic, header, size = (
            kind.from_address(address + at).value
            for kind, at in ((ctypes.c_uint32, 0), (ctypes.c_uint16, 6), (ctypes.c_uint64, 8))
        )
        assert magic == 0xBA55ED50
        return ctypes.string_at(address, header + size)

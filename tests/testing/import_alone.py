"""Imports modules, each first in a process of its own, and prints those that fail:
``python -m tests.testing.import_alone MODULE…``.

The processes are forked from one that has imported what the modules need of others, which takes nearly all of the time.
A module that its package imports needs none: wherever it is imported first, the package is imported before it.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys

THIRD_PARTY = ("numpy", "torch", "torch._dynamo", "cutlass.cute", "filelock", "platformdirs", "rich.table", "pandas")


def import_alone(name: str) -> list[str]:
    """The modules that are there after it; prints what it raises."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        with open(writing, "w") as stream:
            stream.write(" ".join(sys.modules))
        os._exit(0)
    os.close(writing)
    with open(reading) as stream:
        modules = stream.read().split()
    os.wait()
    return modules


def main(names: list[str]) -> None:
    for name in THIRD_PARTY:
        importlib.import_module(name)
    gc.disable()  # a collection would copy the parent's memory into each child
    loaded = {package: import_alone(package) for package in sorted({name.partition(".")[0] for name in names})}
    for name in names:
        if name not in loaded[name.partition(".")[0]]:
            import_alone(name)


if __name__ == "__main__":
    main(sys.argv[1:])

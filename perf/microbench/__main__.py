"""``python -m perf.microbench GROUP ARCH GPU FILE``: one group of kernels, its rows added to the file as they come."""

from __future__ import annotations

import sys
from pathlib import Path

from cute_fa.semantics.types import SmArch
from perf.microbench.session import group, line


def main(name: str, arch: str, gpu: str, file: str) -> None:
    with Path(file).open("a", buffering=1) as rows:
        for row in group(name).measure(SmArch(arch)):
            rows.write(line({"group": name, "gpu": gpu, **row}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What is measured once a process: ``python -m perf.host_process WHAT ARCH HEAD_DIM CAUSAL`` prints seconds as JSON.

``compile``: our kernel from its config to an object file, nothing cached; ``compile-fa4``: FlashAttention-4's kernel
for the same key, likewise; ``load``: our kernel from the disk cache to a function. The DSL and TVM-FFI are imported
beforehand; the environment (``perf.host``) says where caches are and what FA4 compiles for.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial

import torch
import tvm_ffi  # noqa: F401  imported here, as the DSL is, outside what is timed
from cutlass import cute  # noqa: F401


def main(what: str, arch: str, head_dim: str, causal: str) -> None:
    if what == "compile-fa4":
        from perf.compile_fa4 import answer_for_the_device, compile_kernels

        answer_for_the_device()
        step = partial(compile_kernels, "fwd", int(head_dim), int(head_dim), causal == "1", torch.bfloat16)
    else:
        from cute_fa.engine.compiler import compile_artifacts, compiled
        from cute_fa.engine.table import TABLE
        from cute_fa.semantics.types import SmArch
        from perf.static import StaticKey

        problem = StaticKey(SmArch(arch), int(head_dim), causal == "1").problem()
        config = TABLE.lookup(problem).configure(problem)
        step = partial(compiled if what == "load" else compile_artifacts, config)
    started = time.perf_counter()
    step()
    print(json.dumps({"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main(*sys.argv[1:])

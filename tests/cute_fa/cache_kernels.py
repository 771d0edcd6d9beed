"""Small kernels for the tests of the compile cache; also run as a script, one process of a test with several.

Loaded by its path under a name of its own, so that the cache takes this file alone for its sources.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cute_fa.kernel import KernelConfig


@dataclass(frozen=True)
class ScaleConfig(KernelConfig):
    """b[i] = factor · scale · a[i] for i < n, fp32. ``factor`` is a constant of the code: the mangled names of two
    factors are the same."""

    factor: float = 2.0

    @property
    def compile_name(self) -> str:
        return f"scale_{self.arch.short}"

    def build(self):
        import cutlass
        from cutlass import cute

        class Arguments(NamedTuple):
            a: cute.Tensor
            b: cute.Tensor
            scale: cutlass.Float32
            n: cutlass.Int32

        class Scale:
            def __init__(self, factor: float):
                self.factor = factor

            @cute.jit
            def __call__(self, args: Arguments, stream):
                grid = (cute.ceil_div(args.n, 128), 1, 1)
                self.kernel(args).launch(grid=grid, block=(128, 1, 1), stream=stream)

            @cute.kernel
            def kernel(self, args: Arguments):
                thread, _, _ = cute.arch.thread_idx()
                block, _, _ = cute.arch.block_idx()
                i = block * 128 + thread
                if i < args.n:
                    args.b[i] = args.a[i] * args.scale * self.factor

        def vector():
            return cute.runtime.make_fake_tensor(cutlass.Float32, (cute.sym_int(),), stride=(1,), assumed_align=4)

        stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
        return Scale(self.factor), (Arguments(vector(), vector(), cutlass.Float32(0), cutlass.Int32(0)), stream)

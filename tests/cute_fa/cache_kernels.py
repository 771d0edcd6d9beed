"""Small kernels for the tests of the compile cache. ``main`` is one process of a test with several:

    ARCH FACTOR [--ready FILE] [--wait-for FILE] [--stall FILE] [--no-compiler] [--simulate N]

compiles or loads the kernel for real launches, or runs it simulated on 0 … N − 1, and prints the cache's counts and the
values as JSON. ``--ready``: make FILE before; ``--wait-for``: not before FILE exists; ``--stall``: make FILE when the
compile begins, then stay in it until killed; ``--no-compiler``: the DSL's compiler raises.

Imported by path under a name of its own, so that the cache takes this file alone for the kernels' sources.
"""

import argparse
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import ptxsim
from cute_fa.engine import cache, compiler
from cute_fa.engine.contract import KernelConfig
from cute_fa.semantics.types import SmArch


@dataclass(frozen=True)
class ScaleConfig(KernelConfig):
    """b[i] = factor · scale · a[i] for i < n, fp32. ``factor`` is a constant in the code, and the mangled names of the
    kernels of two factors are the same."""

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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", type=SmArch)
    parser.add_argument("factor", type=float)
    parser.add_argument("--ready", type=Path)
    parser.add_argument("--wait-for", type=Path)
    parser.add_argument("--stall", type=Path)
    parser.add_argument("--no-compiler", action="store_true")
    parser.add_argument("--simulate", type=int)
    options = parser.parse_args()
    config = ScaleConfig(options.arch, options.factor)
    if options.stall is not None:
        ScaleConfig.build = lambda self: options.stall.touch() or time.sleep(600)
    if options.no_compiler:
        forbid_compiling()
    if options.ready is not None:
        options.ready.touch()
    while options.wait_for is not None and not options.wait_for.exists():
        time.sleep(0.01)
    values = []
    if options.simulate is None:
        compiler.compiled(config)
    else:
        with ptxsim.simulate(options.arch.value):
            b = torch.zeros(options.simulate)
            compiler.compiled(config).launch((torch.arange(float(len(b))), b, 1.0, len(b)))
            values = b.tolist()
    print(json.dumps({**dataclasses.asdict(cache.stats), "values": values}))


def forbid_compiling():
    from cutlass import cute

    def refuse(*_args, **_keywords):
        raise AssertionError("compiled again")

    type(cute.compile).__call__ = refuse

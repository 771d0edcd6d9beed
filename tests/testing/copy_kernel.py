"""A small kernel for tests of the host side: b = a·scale (+ c) on the first n elements; one NamedTuple argument."""

from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute


class Args(NamedTuple):
    a: cute.Tensor
    b: cute.Tensor
    c: Optional[cute.Tensor]
    scale: cutlass.Float32
    n: cutlass.Int32


class Scale:
    """``b[i] = a[i] * scale + extra (+ c[i])``; ``extra`` is a constant of the machine code, not of the name."""

    def __init__(self, extra: float = 0.0, threads: int = 128, cluster: int = 1):
        self.extra, self.threads, self.cluster = extra, threads, cluster

    @cute.jit
    def __call__(self, args: Args, stream):
        blocks = cute.round_up(cute.ceil_div(args.a.shape[0], self.threads), self.cluster)
        self.kernel(args).launch(
            grid=(blocks, 1, 1), block=(self.threads, 1, 1), cluster=(self.cluster, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(self, args: Args):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        i = block * self.threads + thread
        if i < args.n:
            value = args.a[i].to(cutlass.Float32) * args.scale + self.extra
            if cutlass.const_expr(args.c is not None):
                value = value + args.c[i]
            args.b[i] = value.to(args.b.element_type)


class Copy:
    """``b[i, j] = a[i, j]`` for any element type and strides."""

    @cute.jit
    def __call__(self, args: tuple[cute.Tensor, cute.Tensor], stream):
        a, b = args
        self.kernel(a, b).launch(grid=(cute.ceil_div(a.shape[0], 32), 1, 1), block=(32, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, a: cute.Tensor, b: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        i = block * 32 + thread
        if i < a.shape[0]:
            for j in range(a.shape[1]):
                b[i, j] = a[i, j]


def _stream():
    return cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)


def compile_scale(with_c: bool = False, **options):
    """A ``Scale`` for vectors of any length, called as ``function((a, b, c, scale, n))``."""

    def vector():
        return cute.runtime.make_fake_tensor(cutlass.Float32, (cute.sym_int(),), stride=(1,), assumed_align=4)

    arguments = Args(vector(), vector(), vector() if with_c else None, cutlass.Float32(0), cutlass.Int32(0))
    return cute.compile(Scale(**options), arguments, _stream(), options="--enable-tvm-ffi")


def compile_copy(element):
    """A ``Copy`` for matrices of any shape and strides, called as ``function((a, b))``."""

    def matrix():
        strides = cute.sym_int64(), cute.sym_int64()
        return cute.runtime.make_fake_tensor(element, (cute.sym_int(), cute.sym_int()), stride=strides)

    return cute.compile(Copy(), (matrix(), matrix()), _stream(), options="--enable-tvm-ffi")

"""A kernel that only asks ``query_range`` for its answer, a thread a question."""

from functools import cache
from typing import NamedTuple

import cutlass.cute as cute
import torch
from cutlass import Int32

import ptxsim
from cute_fa.device.block_range import Window
from cute_fa.device.fake_arguments import fake_tensor, optional
from cute_fa.device.query_range import query_range

THREADS = 32


class Args(NamedTuple):
    window: Window
    questions: cute.Tensor  # (n, 3): seqlen_q, seqlen_k, n_start
    answers: cute.Tensor  # (n, 4): last_block, left_end, full_end, total


class RangeKernel:
    """``answers[i]`` = the query_range of ``questions[i]``."""

    def __init__(self, tile_m: int, tile_n: int):
        self.tile_m, self.tile_n = tile_m, tile_n

    @cute.jit
    def __call__(self, args: Args, stream):
        grid = (cute.ceil_div(args.questions.shape[0], THREADS), 1, 1)
        self.kernel(args).launch(grid=grid, block=(THREADS, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, args: Args):
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        questions, answers = args.questions, args.answers
        i = cta * THREADS + thread
        if i < questions.shape[0]:
            blocks = query_range(
                args.window, questions[i, 0], questions[i, 1], questions[i, 2], self.tile_m, self.tile_n
            )
            answers[i, 0] = blocks.last_block
            answers[i, 1] = blocks.left_end
            answers[i, 2] = blocks.full_end
            answers[i, 3] = blocks.total


@cache
def _compiled(left: bool, right: bool, sink: bool, tile_m: int, tile_n: int):
    window = Window(*(optional(given, lambda: Int32(0)) for given in (left, right, sink)))
    tensors = (fake_tensor(Int32, cute.sym_int(), columns) for columns in (3, 4))
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(RangeKernel(tile_m, tile_n), Args(window, *tensors), stream, options="--enable-tvm-ffi")


def query_ranges(window: tuple, questions: list[tuple[int, int, int]], tile_m: int, tile_n: int) -> list[list[int]]:
    """[last_block, left_end, full_end, total] for each (seqlen_q, seqlen_k, n_start); ``window``: (left, right,
    sink_tokens), None where absent."""
    answers = torch.full((len(questions), 4), -1, dtype=torch.int32)
    with ptxsim.simulate("sm_80") as simulation:
        function = _compiled(*(bound is not None for bound in window), tile_m, tile_n)
        simulation.call(function, (window, torch.tensor(questions, dtype=torch.int32), answers))
    return answers.tolist()

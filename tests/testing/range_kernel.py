"""Kernels that only ask ``block_range`` or ``query_range`` for its answer, a thread a question."""

from functools import cache
from typing import NamedTuple

import cutlass.cute as cute
import torch
from cutlass import Int32

import ptxsim
from cute_fa.device.block_range import BlockRange, block_range
from cute_fa.device.fake_arguments import fake_tensor, optional
from cute_fa.device.query_range import QueryRange, earlier_tiles, query_range
from cute_fa.device.visibility import Window
from fa3_sm90.backward.turns import later_tiles

THREADS = 32
MAX_BLOCKS = 1024  # of queries, in a question of earlier_tiles and later_tiles


class Args(NamedTuple):
    window: Window
    questions: cute.Tensor  # (n, 3): seqlen_q, seqlen_k, first query or key of the tile
    answers: cute.Tensor  # (n, fields of the range)


class RangeKernel:
    """``answers[i]`` = what ``function`` gives for ``questions[i]``."""

    def __init__(self, function, tile_m: int, tile_n: int):
        self.function, self.tile_m, self.tile_n = function, tile_m, tile_n

    @cute.jit
    def __call__(self, args: Args, stream):
        grid = (cute.ceil_div(args.questions.shape[0], THREADS), 1, 1)
        self.kernel(args).launch(grid=grid, block=(THREADS, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, args: Args):
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        questions, answers = args.questions, args.answers
        function = self.function
        i = cta * THREADS + thread
        if i < questions.shape[0]:
            blocks = function(args.window, questions[i, 0], questions[i, 1], questions[i, 2], self.tile_m, self.tile_n)
            for field, number in enumerate(blocks):
                answers[i, field] = number


@cache
def _compiled(function, fields: int, left: bool, right: bool, sink: bool, tile_m: int, tile_n: int):
    window = Window(*(optional(given, lambda: Int32(0)) for given in (left, right, sink)))
    tensors = (fake_tensor(Int32, cute.sym_int(), columns) for columns in (3, fields))
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    kernel = RangeKernel(function, tile_m, tile_n)
    return cute.compile(kernel, Args(window, *tensors), stream, options="--enable-tvm-ffi")


def _answers(function, fields: int, window: tuple, questions: list, tile_m: int, tile_n: int) -> list[list[int]]:
    answers = torch.full((len(questions), fields), -1, dtype=torch.int32)
    with ptxsim.simulate("sm_80") as simulation:
        compiled = _compiled(function, fields, *(bound is not None for bound in window), tile_m, tile_n)
        simulation.call(compiled, (window, torch.tensor(questions, dtype=torch.int32), answers))
    return answers.tolist()


def block_ranges(window: tuple, questions: list[tuple[int, int, int]], tile_m: int, tile_n: int) -> list[BlockRange]:
    """The block_range of each (seqlen_q, seqlen_k, m_start); ``window``: (left, right, sink_tokens), None where
    absent."""
    fields = len(BlockRange._fields)
    return [BlockRange(*answer) for answer in _answers(block_range, fields, window, questions, tile_m, tile_n)]


def query_ranges(window: tuple, questions: list[tuple[int, int, int]], tile_m: int, tile_n: int) -> list[QueryRange]:
    """The query_range of each (seqlen_q, seqlen_k, n_start); ``window`` as for :func:`block_ranges`."""
    fields = len(QueryRange._fields)
    return [QueryRange(*answer) for answer in _answers(query_range, fields, window, questions, tile_m, tile_n)]


def other_tile_counts(
    window: tuple, questions: list[tuple[int, int, int, int]], tile_m: int, tile_n: int
) -> list[tuple[int, int]]:
    """The earlier_tiles and the later_tiles of each (seqlen_q, seqlen_k, n_block, block); ``window`` as for
    :func:`block_ranges`."""
    packed = [(seqlen_q, seqlen_k, n_block * MAX_BLOCKS + block) for seqlen_q, seqlen_k, n_block, block in questions]
    return [tuple(answer) for answer in _answers(_others, 2, window, packed, tile_m, tile_n)]


def _others(window: Window, seqlen_q: Int32, seqlen_k: Int32, place: Int32, tile_m: int, tile_n: int):
    n_block, block = place // MAX_BLOCKS, place % MAX_BLOCKS
    asked = window, seqlen_q, seqlen_k, n_block, block, tile_m, tile_n
    return earlier_tiles(*asked), later_tiles(*asked)

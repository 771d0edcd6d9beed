"""The heuristic of the FA2 forward: every head_dim fits every arch; names tell configs apart."""

import pytest

from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import DType, SmArch
from fa2_sm80.forward.entry import Fa2Forward
from tests.testing.cases import refusals, small_problem

FP8 = {"dtype": DType.E4M3} | dict.fromkeys(("dtype_k", "dtype_v", "out_dtype"))


def problem(**changes) -> AttentionProblem:
    return small_problem(**{"arch": SmArch.SM_80, **changes})


@pytest.mark.parametrize("arch", SmArch)
def test_every_head_dim_fits_shared_memory_and_registers(arch):
    for head_dim in range(8, 257, 8):
        for head_dim_v in (8, head_dim, 256):
            config = Fa2Forward.configure(problem(arch=arch, head_dim=head_dim, head_dim_v=head_dim_v))
            assert config.smem_bytes <= arch.smem_bytes
            for columns in (config.head_dim_padded, config.head_dim_v_padded):
                for rows in (config.tile_m, config.tile_n):
                    assert rows * columns * 2 % 128 == 0  # tiles follow each other without padding
            rows_per_warp = config.tile_m // config.num_warps
            assert rows_per_warp in (16, 32)
            # accumulators of O and S, in registers a thread: the rest must hold fragments and addresses
            assert rows_per_warp * (config.head_dim_v_padded + config.tile_n) // 32 <= 192


def test_compile_name_holds_flags_and_no_values():
    names = {
        Fa2Forward.configure(problem(window_left=left, window_right=0, sink_tokens=sink, softcap=cap)).compile_name
        for left, sink, cap in ((128, 4, 30.0), (4096, 1, 50.0))
    }
    assert names == {"fa2_fwd_sm80_bf16_hd64_left_right_sink_softcap"}


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"window_right": 0}, "right"),
        ({"window_left": 5}, "left"),
        ({"softcap": 1.0}, "softcap"),
        ({"alibi": True}, "alibi"),
        ({"learnable_sink": True}, "lsink"),
        ({"varlen_q": True}, "cuq"),
        ({"varlen_k": True}, "cuk"),
        ({"seqused_q": True}, "usedq"),
        ({"seqused_k": True}, "usedk"),
        ({"head_dim_v": 32}, "hd64v32"),
    ],
)
def test_each_feature_has_its_own_code(change, flag):
    plain, changed = (Fa2Forward.configure(problem(**c)) for c in ({}, change))
    assert plain != changed
    assert flag in changed.compile_name.split("_") and flag not in plain.compile_name.split("_")


def test_sink_tokens_without_a_left_bound_change_nothing():
    assert Fa2Forward.configure(problem(sink_tokens=4)) == Fa2Forward.configure(problem())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"head_dim": 260, "head_dim_v": 260}, "head_dim 260"),
        ({"head_dim": 12}, "head_dim 12"),
        ({"head_dim_v": 20}, "head_dim_v 20"),
        (FP8, "e4m3"),
        ({"page_size": 16}, "page_size 16"),
        ({"num_splits": 2}, "num_splits 2"),
        ({"seqlen_k": 2**30}, "1073741823"),
        ({"softcap": 8193.0}, "softcap 8193"),
        ({"batch": 2**14, "num_heads": 128, "num_heads_kv": 128, "seqlen_q": 2**17}, "2147483648 tiles"),
    ],
)
def test_reasons_name_the_value(change, word):
    assert Fa2Forward.supports(problem()) == []
    reasons = Fa2Forward.supports(problem(**change))
    assert len(reasons) >= 1 and any(word in reason for reason in reasons)


SPILL_AT_64 = "registers spill: 3 accesses and 8.5 instructions per score at 64 keys, none and 6.3 at 48 (head_dim 128)"


def o_registers(count: int) -> str:
    what = f"O of 32 queries a warp, {count} wide"
    return f"registers: {count} a thread for {what}, at most 128 of 255 beside scores and operands"


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({"head_dim": 96}, []),
        ({"head_dim": 128}, [SPILL_AT_64]),
        (
            {"head_dim": 128, "window_left": 5, "softcap": 1.0},
            [
                SPILL_AT_64,
                "registers spill with window_left and softcap: up to 15 accesses at 48 keys, none at 32",
            ],
        ),
        (
            {"head_dim": 64, "head_dim_v": 144, "arch": SmArch.SM_86},
            3 * [o_registers(144)],
        ),
        (
            {"head_dim": 200, "head_dim_v": 200, "arch": SmArch.SM_86},
            [
                *3 * [o_registers(208)],
                "shared memory: 106,496 bytes of Q, K and V 208 wide, 101,376 available",
            ],
        ),
    ],
)
def test_refused_tiles_say_why(change, reasons):
    assert refusals(Fa2Forward, problem(**change)) == reasons

"""Warp-level instructions and divergence (PTX ISA 9.7.9 shfl, 9.7.13 vote, match, redux, elect; 9.7.12)."""

from __future__ import annotations

import numpy as np
import pytest

from ptxsim.errors import SyncError, Trap
from tests.testing.ptx import run

LANES = np.arange(32)
LOAD = "mul.wide.u32 %rd1, %g, 4; add.s64 %rd2, %in0, %rd1; add.s64 %rd3, %out0, %rd1; ld.global.u32 %r1, [%rd2];"
STORE = "st.global.u32 [%rd3], %r2;"


def data(seed=0, high=2**32, count=32):
    return np.random.default_rng(seed).integers(0, high, count, dtype=np.uint32)


def lanes(body, x, threads=32):
    return run(LOAD + body + STORE, [x], [np.zeros(len(x), np.uint32)], threads=threads)


def shuffled(mode, x, b, clamp, segment):
    """The manual's pseudo-code, lane by lane: (values, predicates)."""
    values, inside = [], []
    for lane in range(32):
        highest = lane & segment | clamp & ~segment & 31
        lowest = lane & segment
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | b & ~segment & 31}[mode]
        good = source >= highest if mode == "up" else source <= highest
        values.append(x[source if good else lane])
        inside.append(good)
    return np.array(values), np.array(inside)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8, 4])
def test_shuffles(mode, width):
    x = data()
    segment = 32 - width
    clamp = 0 if mode == "up" else 31
    for b in (0, 1, 2, 5, 16, 31):
        c = segment << 8 | clamp
        body = f"shfl.sync.{mode}.b32 %r3|%p1, %r1, {b}, {c}, 0xffffffff; selp.u32 %r4, 1, 0, %p1;"
        values, inside = shuffled(mode, x, b, clamp, segment)
        np.testing.assert_array_equal(lanes(body + "mov.u32 %r2, %r3;", x), values)
        np.testing.assert_array_equal(lanes(body + "mov.u32 %r2, %r4;", x), inside)


def test_shuffle_with_an_index_for_each_lane():
    x = data()
    body = "mul.lo.u32 %r3, %t, 7; and.b32 %r3, %r3, 31; shfl.sync.idx.b32 %r2, %r1, %r3, 31, 0xffffffff;"
    np.testing.assert_array_equal(lanes(body, x), x[LANES * 7 % 32])


def test_votes():
    x = data(1, 3)
    body = "setp.eq.u32 %p1, %r1, {value}; {vote}"
    for value in (0, 5):
        truth = x == value
        ballot = int((truth * (1 << LANES)).sum())
        np.testing.assert_array_equal(lanes(body.format(value=value, vote="vote.sync.ballot.b32 %r2, %p1, -1;"), x),
                                      ballot)  # fmt: skip
        results = {"any": truth.any(), "all": truth.all(), "uni": truth.all() or not truth.any()}
        for mode, expected in results.items():
            vote = f"vote.sync.{mode}.pred %p2, %p1, -1; selp.u32 %r2, 1, 0, %p2;"
            np.testing.assert_array_equal(lanes(body.format(value=value, vote=vote), x), int(expected))
            vote = f"vote.sync.{mode}.pred %p2, !%p1, -1; selp.u32 %r2, 1, 0, %p2;"
            negated = {"any": (~truth).any(), "all": (~truth).all(), "uni": results["uni"]}[mode]
            np.testing.assert_array_equal(lanes(body.format(value=value, vote=vote), x), int(negated))


def test_matches():
    x = data(2, 4)
    any_ = np.array([(((x == v) * (1 << LANES)).sum()) for v in x])
    np.testing.assert_array_equal(lanes("match.any.sync.b32 %r2, %r1, 0xffffffff;", x), any_)
    all_ = "match.all.sync.b32 %r2|%p1, %r1, 0xffffffff; @%p1 add.u32 %r2, %r2, 1;"
    np.testing.assert_array_equal(lanes(all_, x), 0)
    np.testing.assert_array_equal(lanes(all_, np.full(32, 9, np.uint32)), 0)  # 0xffffffff + 1


def test_reductions():
    x = data(3)
    for kind, dtype in (("u32", np.uint32), ("s32", np.int32)):
        for operation, function in (("add", np.add), ("min", np.minimum), ("max", np.maximum)):
            got = lanes(f"redux.sync.{operation}.{kind} %r2, %r1, 0xffffffff;", x)
            assert (got == function.reduce(x.view(dtype), dtype=dtype).view(np.uint32)).all()
    for operation, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        assert (lanes(f"redux.sync.{operation}.b32 %r2, %r1, 0xffffffff;", x) == function.reduce(x)).all()
    f = np.random.default_rng(1).standard_normal(32).astype(np.float32)
    f[5] = np.nan
    for modifier, expected in (("", np.nanmax(f)), (".abs", np.nanmax(np.abs(f))), (".NaN", np.nan)):
        got = run(LOAD + f"redux.sync.max{modifier}.f32 %r2, %r1, 0xffffffff;" + STORE, [f], [np.zeros(32, np.float32)],
                  target="sm_100a")  # fmt: skip
        np.testing.assert_array_equal(got, np.full(32, expected, np.float32))


def test_special_registers():
    names = ["laneid", "warpid", "tid.x", "ntid.x", "ctaid.x", "nctaid.x", "lanemask_lt", "lanemask_ge", "nwarpid"]
    body = "mul.wide.u32 %rd1, %g, 4;" + "".join(
        f"mov.u32 %r{i}, %{n}; add.s64 %rd{i + 2}, %out{i}, %rd1; st.global.u32 [%rd{i + 2}], %r{i};"
        for i, n in enumerate(names)
    )
    out = run(body, [], [np.zeros(192, np.uint32) for _ in names], threads=96, grid=2)
    i = np.arange(192)
    t = i % 96
    expected = [t % 32, t // 32, t, 96, i // 96, 2, (1 << t % 32) - 1, 0x100000000 - (1 << t % 32), 3]
    for got, want in zip(out, expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_divergent_loop_and_reconvergence():
    """Each lane loops its own number of times; afterwards all lanes shuffle together."""
    x = data(4, 20)
    body = """mov.u32 %r2, 0; mov.u32 %r3, 0;
  LOOP: setp.ge.u32 %p1, %r3, %r1; @%p1 bra DONE; add.u32 %r2, %r2, %r3; add.u32 %r3, %r3, 1; bra LOOP;
  DONE: shfl.sync.bfly.b32 %r2, %r2, 1, 31, 0xffffffff;"""
    sums = x * (x - np.uint32(1)) // 2
    sums[x == 0] = 0
    np.testing.assert_array_equal(lanes(body, x), sums[LANES ^ 1])


def test_guarded_definition_in_a_loop():
    """A register that only a guard changes keeps its value from one round to the next."""
    x = data(6, 6)
    body = """mov.u32 %r2, 0; mov.u32 %r4, 0;
  LOOP: setp.eq.u32 %p1, %r4, %r1; @%p1 add.u32 %r5, %r1, 50; setp.lt.u32 %p2, %r4, %r1; @%p2 mov.u32 %r5, 0;
    add.u32 %r2, %r2, %r5; add.u32 %r4, %r4, 1; setp.lt.u32 %p3, %r4, 8; @%p3 bra LOOP;"""
    np.testing.assert_array_equal(lanes(body, x), (8 - x) * (x + 50))


def test_branches_of_whole_and_partial_warps():
    """Three kinds of warps at once: all lanes jump, none does, some do."""
    x = data(5, 2, count=96)
    x[:32], x[32:64] = 0, 1
    body = """setp.eq.u32 %p1, %r1, 0; @%p1 bra ZERO; mov.u32 %r2, 11; bra JOIN;
  ZERO: mov.u32 %r2, 22;
  JOIN: activemask.b32 %r5; add.u32 %r2, %r2, %r5;"""
    out = lanes(body + "bar.sync 0;", x, threads=96)
    expected = np.where(x == 0, 22, 11)
    whole = (out[:64] - expected[:64]).astype(np.uint32)
    np.testing.assert_array_equal(whole, np.uint32(0xFFFFFFFF))


def test_elect_in_divergent_code():
    """elect.sync with the full mask waits for all lanes; the leader is lane 0."""
    body = """and.b32 %r3, %t, 1; setp.eq.u32 %p1, %r3, 0; @%p1 bra EVEN; add.u32 %r1, %r1, 1; EVEN:
    elect.sync %r4|%p2, 0xffffffff; selp.u32 %r2, 1, 0, %p2; mad.lo.u32 %r2, %r4, 100, %r2;"""
    np.testing.assert_array_equal(lanes(body, data()), LANES == 0)


def test_members_that_do_not_come():
    """Half of a warp shuffles with the full mask while the other half has gone elsewhere for good."""
    body = """setp.lt.u32 %p1, %t, 16; @%p1 bra HALF; bra END;
  HALF: shfl.sync.bfly.b32 %r2, %r1, 1, 31, 0xffffffff; st.global.u32 [%rd3], %r2; exit;
  END: bar.sync 1, 64;"""
    with pytest.raises(SyncError, match="membermask 0xffffffff names other lanes") as caught:
        run(LOAD + body, [data()], [np.zeros(32, np.uint32)])
    assert "lanes 0x0000ffff" in caught.value.where


def test_half_a_warp_with_its_own_mask():
    body = """setp.lt.u32 %p1, %t, 16; @%p1 bra LOW; mov.u32 %r2, 7; bra END;
  LOW: shfl.sync.bfly.b32 %r2, %r1, 1, 31, 0x0000ffff; END:"""
    x = data()
    np.testing.assert_array_equal(lanes(body, x), np.where(LANES < 16, x[LANES ^ 1], 7))


def test_aligned_instruction_by_a_part_of_a_warp():
    body = """setp.lt.u32 %p1, %t, 16; @%p1 bra HALF; bra END;
  HALF: movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1; exit;
  END: bar.sync 1, 64;"""
    with pytest.raises(SyncError, match="aligned instruction is executed by a part of a warp"):
        run(LOAD + body, [data()], [np.zeros(32, np.uint32)])


def test_early_exit_of_lanes():
    x = data()
    body = "setp.ge.u32 %p1, %t, 20; @%p1 exit; vote.sync.ballot.b32 %r2, 1, 0xfffff;"
    body = body.replace("vote.sync.ballot.b32 %r2, 1,", "setp.eq.u32 %p2, 0, 0; vote.sync.ballot.b32 %r2, %p2,")
    np.testing.assert_array_equal(lanes(body, x), np.where(LANES < 20, 0xFFFFF, 0))


def test_trap():
    with pytest.raises(Trap, match="executed trap") as caught:
        run("setp.eq.u32 %p1, %t, 40; @%p1 trap;", [], [np.zeros(1, np.uint32)], threads=64)
    assert "trap" in caught.value.text and "w1" in caught.value.where

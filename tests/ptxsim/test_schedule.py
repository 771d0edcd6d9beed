"""The order of warps: deterministic by default, adversarial with a seed."""

from __future__ import annotations

import numpy as np
import pytest

from ptxsim.errors import UninitializedRead
from tests.testing.ptx import aligned, kernel_text, launch

# every warp adds its mark to a float in global memory: the sum depends on the order of the additions
ORDERED = """shr.u32 %r1, %t, 5; mad.lo.u32 %r1, %c, 8, %r1; cvt.rn.f32.u32 %f1, %r1; mul.f32 %f1, %f1, 0f3DCCCCCD;
  mov.u32 %r2, 0;
  LOOP: add.u32 %r4, %r1, %r2; rem.u32 %r4, %r4, 3; setp.eq.u32 %p2, %r4, 0; @%p2 bra NEXT;
  atom.global.add.f32 %f2, [%out0], %f1; setp.eq.u32 %p2, %r4, 1; @%p2 bra NEXT; atom.global.add.f32 %f2, [%out0], %f1;
  NEXT:
  add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 5; @%p1 bra LOOP;
  mad.wide.u32 %rd1, %g, 4, %out1; st.global.f32 [%rd1], %f2;"""


def ordered(seed):
    arrays = [aligned(np.zeros(1, np.float32)), aligned(np.zeros(4 * 256, np.float32))]
    machine = launch(kernel_text(ORDERED, 0, 2), arrays, threads=256, grid=4, seed=seed)
    return arrays[1].tobytes(), machine.wave.step, machine.scheduler.instr_count


def test_default_is_deterministic():
    """Two runs: the same bits, the same number of steps."""
    assert ordered(None) == ordered(None)


def test_seed_decides():
    assert ordered(1) == ordered(1)
    assert len({ordered(seed)[0] for seed in (None, 1, 2, 3, 4)}) > 2


# warp 0 fills a buffer, warp 1 reads it, with and without the barrier between them
RACE = """.shared .align 16 .b8 buffer[128];
    mov.u32 %r1, buffer; and.b32 %r2, %t, 31; mad.lo.u32 %r1, %r2, 4, %r1; setp.ge.u32 %p1, %t, 32; mov.u32 %r3, 7;
    @!%p1 st.shared.u32 [%r1], %r3; BARRIER @%p1 ld.shared.u32 %r3, [%r1]; st.global.u32 [%out0], %r3;"""


def test_missing_barrier_is_found_by_seeds():
    """In the default order warps keep step and hide the race; some seed lets the reader run first."""

    def race(barrier, seed):
        out = aligned(np.zeros(1, np.uint32))
        launch(kernel_text(RACE.replace("BARRIER", barrier), 0, 1), [out], threads=64, seed=seed)
        return out[0]

    seeds = range(12)
    assert all(race("bar.sync 0;", seed) == 7 for seed in (None, *seeds))
    found = 0
    for seed in seeds:
        try:
            race("", seed)
        except UninitializedRead as error:
            found += 1
            assert "ld.shared" in error.text and "w1" in error.where
    assert found >= 2


def test_try_wait_may_fail_with_a_seed():
    """A wait that does not look at its result is caught by the seeds: there try_wait gives up at random."""
    body = """.shared .align 8 .b64 bar; .shared .align 4 .b32 value;
    mov.u32 %r1, bar; mov.u32 %r2, value; setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared.b64 [%r1], 1; bar.sync 0;
    setp.ge.u32 %p2, %t, 32; @%p2 bra READ; @%p1 st.shared.u32 [%r2], 5; @%p1 mbarrier.arrive.shared.b64 _, [%r1]; exit;
  READ: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], 0; LOOP ld.shared.u32 %r3, [%r2]; st.global.u32 [%out0], %r3;"""

    def outcome(loop, seed):
        out = aligned(np.zeros(1, np.uint32))
        try:
            launch(kernel_text(body.replace("LOOP", loop), 0, 1), [out], threads=64, seed=seed)
        except UninitializedRead:
            return "raised"
        return int(out[0])

    seeds = (None, *range(20))
    assert all(outcome("@!%p3 bra READ;", seed) == 5 for seed in seeds)
    assert "raised" in {outcome("", seed) for seed in seeds} and outcome("", None) == 5


@pytest.mark.parametrize("seed", [None, 3])
def test_many_ctas_and_dimensions(seed):
    """Every thread of a grid runs once, with its own coordinates."""
    body = """mad.wide.u32 %rd1, %g, 4, %out0; ld.global.u32 %r1, [%rd1]; add.u32 %r2, %c, 1; add.u32 %r2, %r2, %r1;
    st.global.u32 [%rd1], %r2;"""
    out = aligned(np.zeros(20 * 96, np.uint32))
    launch(kernel_text(body, 0, 1), [out], threads=96, grid=20, seed=seed)
    np.testing.assert_array_equal(out, np.repeat(np.arange(1, 21), 96))

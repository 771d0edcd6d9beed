"""Cluster launch control (PTX ISA 9.7.13.17): CTAs that run take over clusters that wait to be launched."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from ptxsim.errors import UninitializedRead
from ptxsim.host.launches import LaunchRequest, LoadedKernel
from ptxsim.host.simulation import Simulation
from tests.testing.ptx import aligned, kernel_text, run

DECLARATIONS = ".shared .align 16 .b8 answer[16]; .shared .align 8 .b64 bar;"
# Each CTA counts itself at its place, and goes on with the clusters that it takes over; row 1 counts launches.
WORK = """.reg .b128 %q1; mov.u32 %r50, answer; mov.u32 %r52, bar; setp.eq.u32 %p10, %t, 0; mov.u32 %r53, 0;
    @%p10 mbarrier.init.shared.b64 [%r52], 1; fence.mbarrier_init.release.cluster; bar.sync 0;
    barrier.cluster.arrive; barrier.cluster.wait;
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r20, %cluster_ctarank; mov.u32 %r21, %nctaid.x;
    mul.wide.u32 %rd1, %r1, 4; add.s64 %rd1, %out0, %rd1; @%p10 red.global.add.u32 [%rd1+256], 1;
  TILE: mad.lo.u32 %r3, %r2, %r21, %r1; mul.wide.u32 %rd1, %r3, 4; add.s64 %rd1, %out0, %rd1;
    @%p10 red.global.add.u32 [%rd1], 1;
    @%p10 mbarrier.arrive.expect_tx.shared.b64 _, [%r52], 16; barrier.cluster.arrive; barrier.cluster.wait;
    setp.eq.and.u32 %p9, %r20, 0, %p10;
    @%p9 clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes{multicast}.b128 [%r50], [%r52];
  W: mbarrier.try_wait.parity.shared.b64 %p11, [%r52], %r53; @!%p11 bra W; xor.b32 %r53, %r53, 1;
    ld.shared.b128 %q1, [%r50]; fence.proxy.async.shared::cta; bar.sync 0;
    clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p1, %q1; @!%p1 bra END;
    {query} add.u32 %r1, %r1, %r20; bra TILE;
  END: barrier.cluster.arrive; barrier.cluster.wait;"""
VECTOR = "@%p1 clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {%r1, %r2, _, _}, %q1;"
SCALARS = """clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %r1, %q1;
    clusterlaunchcontrol.query_cancel.get_first_ctaid::y.b32.b128 %r2, %q1;"""


def work(grid, cluster=1, query=VECTOR, *, late=False, seed=None, race=False, sms=4):
    """(how often each CTA's place was worked on, number of launched CTAs)."""
    multicast = ".multicast::cluster::all" if cluster > 1 else ""
    body = WORK.replace("{multicast}", multicast).replace("{query}", query)
    text = kernel_text(body, 0, 1, declarations=DECLARATIONS, target="sm_100a")
    out = aligned(np.zeros(128, np.uint32))
    pointer = ctypes.c_uint64(out.ctypes.data)
    arguments = (ctypes.c_uint64 * 1)(ctypes.addressof(pointer))
    simulation = Simulation("sm_100a", seed, late, race, sms, None)
    simulation._arguments = [(out.ctypes.data, out.nbytes)]
    kernel = LoadedKernel(text, "kernel", registers=32)
    simulation.launch(
        LaunchRequest(kernel, (*grid, 1), (64, 1, 1), (cluster, 1, 1), arguments=ctypes.addressof(arguments))
    )
    return out[: grid[0] * grid[1]], out[64:].sum()


POLL = """mov.u32 %r1, %ctaid.x; mov.u32 %r5, 0; add.s64 %rd2, %out0, 64;
  AGAIN: add.u32 %r5, %r5, 1; ld.acquire.gpu.global.u32 %r2, [%rd2]; setp.ne.u32 %p1, %r2, %r1; @%p1 bra AGAIN;
    mul.wide.u32 %rd1, %r1, 4; add.s64 %rd1, %out0, %rd1; st.global.u32 [%rd1], %r5;
    setp.eq.u32 %p2, %t, 0; @%p2 red.release.gpu.global.add.u32 [%rd2], 1;"""


@pytest.mark.parametrize("together", [8, 1])
def test_ctas_one_at_a_time_find_done_what_those_before_them_do(together):
    """A CTA polls a counter until all before it have counted: alone once, together the more often the later it is."""
    out = aligned(np.zeros(32, np.uint32))
    pointer = ctypes.c_uint64(out.ctypes.data)
    arguments = (ctypes.c_uint64 * 1)(ctypes.addressof(pointer))
    simulation = Simulation("sm_90a", None, False, False, 4, None)
    simulation.together = together
    simulation._arguments = [(out.ctypes.data, out.nbytes)]
    kernel = LoadedKernel(kernel_text(POLL, 0, 1), "kernel", registers=32)
    simulation.launch(LaunchRequest(kernel, (8, 1, 1), (32, 1, 1), (1, 1, 1), arguments=ctypes.addressof(arguments)))
    assert out[16] == 8
    assert (np.diff(out[:8].astype(int)) > 0).all() if together > 1 else (out[:8] == 1).all()


@pytest.mark.parametrize(("late", "seed"), [(False, None), (True, None), (False, 1), (True, 2)])
@pytest.mark.parametrize(("grid", "cluster"), [((11, 1), 1), ((5, 3), 1), ((6, 3), 2)])
def test_every_tile_is_worked_on_once(grid, cluster, late, seed):
    """Four SMs launch four CTAs, which do the work of all."""
    tiles, launched = work(grid, cluster, late=late, seed=seed)
    np.testing.assert_array_equal(tiles, 1)
    assert launched == 4


def test_scalars_races_and_enough_sms():
    tiles, launched = work((11, 1), query=SCALARS, race=True)
    assert (tiles == 1).all() and launched == 4
    tiles, launched = work((11, 1), sms=16)  # nobody waits: every request is turned down
    assert (tiles == 1).all() and launched == 11


def test_tiles_that_nobody_took_are_launched():
    tiles, launched = work((11, 1), query=VECTOR + "bra END;")  # four granted requests are dropped
    assert launched == 7 and tiles.tolist() == [1] * 4 + [0] * 4 + [1] * 3


def test_mistakes():
    with pytest.raises(UninitializedRead):
        run(".reg .b128 %q1; mov.u32 %r50, answer; ld.shared.b128 %q1, [%r50];", [], [np.zeros(1)],
            declarations=DECLARATIONS, target="sm_100a")  # fmt: skip


def test_place_of_a_request_that_was_turned_down():
    """It may be asked for, as the DSL does, and is no CTA of any grid."""
    body = """.reg .b128 %q1; mov.u64 %rd1, 0; mov.b128 %q1, {%rd1, %rd1};
        clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %r1, %q1; st.global.u32 [%out0], %r1;"""
    assert run(body, [], [np.zeros(1, np.uint32)], target="sm_100a")[0] == 0xFFFFFFFF


def test_registers_of_128_bits():
    body = """.reg .b128 %q1; .reg .b128 %q2; mov.u64 %rd1, 0x7ff4000000000001; cvt.u64.u32 %rd2, %t;
    mov.b128 %q1, {%rd2, %rd1}; setp.lt.u32 %p1, %t, 16; mov.b128 {%rd3, %rd4}, %q1; add.s64 %rd4, %rd4, %rd3;
    mul.wide.u32 %rd5, %t, 8; add.s64 %rd5, %out0, %rd5; st.global.u64 [%rd5], %rd4;"""
    out = run(body, [], [np.zeros(32, np.uint64)], target="sm_100a")
    np.testing.assert_array_equal(out, np.uint64(0x7FF4000000000001) + np.arange(32, dtype=np.uint64))

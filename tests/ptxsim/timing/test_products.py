"""wgmma: streams against the published cycles of H100, drained products, two warpgroups that share the tensor cores.

Published: revollllt/flash-vla, hardware-unit-test, H100 SXM5, clocks not pinned, about 6 % noise.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.testing.timed import H100, issued, timed

BUFFER = ".shared .align 1024 .b8 buffer[49152];"
OUT = [np.zeros(256 * 128, np.float32)]


def descriptor(start):
    return start >> 4 | 1 << 16 | 64 << 32 | 1 << 62


def products(n, per_group, groups, wait, *, threads=128, shape="k16.f32.bf16.bf16", transposes=", 0, 0", warpgroups=""):
    """``groups`` groups of m64n``n`` products, after each of which ``wait`` may be pending."""
    registers = ", ".join(f"%f{j}" for j in range(n // 2))
    product = f"wgmma.mma_async.sync.aligned.m64n{n}{shape} {{{registers}}}, %rd3, %rd4, %p1, 1, 1{transposes};"
    group = product * per_group + f"wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned {wait};"
    body = f"""mov.u64 %rd3, {descriptor(1024)}; mov.u64 %rd4, {descriptor(1024 + 8192)}; mov.u32 %r50, buffer;
    {"".join(f"mov.f32 %f{j}, 0f00000000;" for j in range(n // 2))} mad.lo.u32 %r50, %t, 4, %r50;
    setp.ge.u32 %p2, %t, 128;
    @%p2 bra WRITTEN; {"".join(f"st.shared.u32 [%r50+{512 * j}], 0;" for j in range(96))}
    WRITTEN: fence.proxy.async.shared::cta; bar.sync 0; setp.eq.u32 %p1, %t, %t; wgmma.fence.sync.aligned;
    {group * groups} wgmma.wait_group.sync.aligned 0; mad.wide.u32 %rd9, %t, 4, %out0;
    {"".join(f"st.global.f32 [%rd9+{1024 * j}], %f{j};" for j in range(n // 2))}"""
    return timed(body, [], OUT, threads=threads, declarations=BUFFER)


def interval(replay, per_group, groups):
    """Cycles a product: from the end of the first group to that of the last."""
    group, _, end, last = replay.marks.T
    ends = end[(group == group[0]) & (last == 1)]
    return (ends[-1] - ends[0]) / per_group / (groups - 1)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("n", "published"),
    [(8, 18.9), (16, 20.7), (32, 24.7), (64, 32.8), (96, 48.7), (128, 65.0), (192, 97.1), (256, 129.3)],
)
def test_a_stream_of_products(n, published):
    """max(19, N / 2), and what their operands take of shared memory: 64 and N rows of 32 bytes at 128 B a cycle."""
    replay = products(n, 4, 4, 1).replay(H100)
    expected = max(19, n / 2, (64 + n) * 32 // 128)
    assert interval(replay, 4, 4) == pytest.approx(expected, abs=0.5) == pytest.approx(published, rel=0.06)
    assert replay.sms[0].tensor == pytest.approx(16 * expected, abs=8)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("per_group", "wait", "published", "tolerance"),
    [(1, 0, 79, 0.15), (1, 1, 42, 0.05), (1, 3, 33.7, 0.06), (2, 0, 55.6, 0.12), (2, 1, 33.1, 0.05), (4, 0, 44.6, 0.06),
     (4, 1, 32.3, 0.05), (8, 0, 38.2, 0.05)],
)  # fmt: skip
def test_how_many_products_have_to_be_in_flight(per_group, wait, published, tolerance):
    """m64n64k16: with nothing in flight the next product waits for the tail of the one before, too."""
    replay = products(64, per_group, 8, wait).replay(H100)
    assert interval(replay, per_group, 8) == pytest.approx(published, rel=tolerance)


def test_a_drained_product_waits_for_the_tail():
    launch = products(64, 1, 8, 0)
    a, b = (launch.replay(H100.with_values(wgmma_tail=tail)) for tail in (46, 146))
    assert interval(b, 1, 8) - interval(a, 1, 8) == 100


def test_two_warpgroups_share_the_tensor_cores():
    one, two = (products(128, 4, 4, 1, threads=threads).replay(H100) for threads in (128, 256))
    assert interval(two, 4, 4) == 2 * interval(one, 4, 4) == 128
    assert two.sms[0].tensor == 2 * one.sms[0].tensor == 2 * 16 * 64
    group, start, end, last = two.marks.T
    assert sorted(group.tolist()) == [0] * 16 + [1] * 16 and last.sum() == 8 and (start[1:] >= end[:-1]).all()


def test_fp8_has_twice_the_rate():
    """m64n128k32 of e4m3 takes the cycles of m64n128k16 of bf16, m64n128k8 of tf32 too."""
    eight = products(128, 4, 4, 1, shape="k32.f32.e4m3.e4m3", transposes="").replay(H100)
    assert interval(eight, 4, 4) == 64
    tf32 = products(128, 4, 4, 1, shape="k8.f32.tf32.tf32", transposes="").replay(H100)
    assert interval(tf32, 4, 4) == 64


def test_a_warp_runs_ahead_by_the_queue():
    """With a queue of 2, the third product is issued when the first has begun."""
    launch = products(256, 8, 1, 0)
    for queue in (1, 2, 4):
        replay = launch.replay(H100.with_values(wgmma_queue=queue), times=True)
        times = issued(launch, replay, 0, "HGMMA")
        steps = np.diff(times)
        # the tensor cores need 128 cycles a product, the warp far less until the queue is full
        assert (steps[: queue - 1] < 40).all() and (np.abs(steps[queue + 1 :] - 128) <= 2).all(), (queue, steps)


def test_busy_tensor_cores_take_register_ports():
    """FFMA beside products; without the rule the tensor cores' reads cost nothing."""
    beside = products(64, 4, 4, 1)
    free, ports = (beside.replay(H100.with_values(register_ports=p)) for p in (0, 2))
    assert ports.cycles >= free.cycles

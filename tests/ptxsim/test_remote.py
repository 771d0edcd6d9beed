"""Asynchronous stores and reductions to the shared memory of a cluster, and what is refused because it needs more than
one GPU (PTX ISA 9.7.9.13, 9.7.13.8, 9.7.9.16); launches that depend on each other (9.7.13.13)."""

from __future__ import annotations

import numpy as np
import pytest

from ptxsim.errors import Deadlock, MemoryFault, PtxError, RaceError, SyncError, UninitializedRead
from tests.testing.ptx import run, same_bits

SHARED = ".shared .align 128 .b8 buffer[1024]; .shared .align 8 .b64 bar;"
# CTA 1 waits at its own barrier for what CTA 0 sends; %r22 and %r23 are its buffer and barrier as CTA 0 sees them
PAIR = """mov.u32 %r50, buffer; mov.u32 %r52, bar; setp.eq.u32 %p10, %t, 0; @%p10 mbarrier.init.shared.b64 [%r52], 1;
    shl.b32 %r53, %t, 4; add.u32 %r51, %r50, %r53; fence.mbarrier_init.release.cluster; {init}
    @%p10 mbarrier.arrive.expect_tx.shared.b64 _, [%r52], {size};
    barrier.cluster.arrive; barrier.cluster.wait; mov.u32 %r20, %cluster_ctarank; mov.u32 %r21, 1;
    mapa.shared::cluster.u32 %r22, %r51, %r21; mapa.shared::cluster.u32 %r23, %r52, %r21;
    mad.lo.u32 %r1, %t, 4, 100; add.u32 %r2, %r1, 1; add.u32 %r3, %r1, 2; add.u32 %r4, %r1, 3;
    setp.eq.u32 %p1, %r20, 1; @%p1 bra SECOND; {send} bra END;
  SECOND: {wait} {read}
  END: barrier.cluster.arrive; barrier.cluster.wait;"""
WAIT = "W: mbarrier.try_wait.parity.shared::cta.b64 %p11, [%r52], 0; @!%p11 bra W;"
READ = """ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r51]; mad.wide.u32 %rd1, %t, 16, %out0;
    st.global.v4.u32 [%rd1], {%r5, %r6, %r7, %r8};"""
ZERO = "mov.u32 %r9, {}; st.shared.v4.u32 [%r51], {{%r9, %r9, %r9, %r9}};"
ASYNC = "shared::cluster.mbarrier::complete_tx::bytes"
ROWS = (np.arange(32, dtype=np.uint32)[:, None] * 4 + 100 + np.arange(4, dtype=np.uint32)).astype(np.uint32)


def pair(send, size, *, wait=WAIT, init="", **options):
    body = PAIR.format(send=send, size=size, wait=wait, read=READ, init=init)
    return run(body, [], [np.zeros((32, 4), np.uint32)], grid=2, cluster=2, declarations=SHARED, **options)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("seed", [None, 1])
def test_vectors(late, seed):
    """Each lane sends 16 bytes to its place in the other CTA; the barrier opens after 512 bytes."""
    send = f"st.async.weak.{ASYNC}.v4.b32 [%r22], {{%r1, %r2, %r3, %r4}}, [%r23];"
    same_bits(pair(send, 512, late=late, seed=seed), ROWS)
    same_bits(pair(send, 512, late=late, seed=seed, race=True), ROWS)


@pytest.mark.parametrize("late", [False, True])
def test_narrow_stores(late):
    send = f"""st.async.{ASYNC}.u32 [%r22], %r1, [%r23]; st.async.{ASYNC}.f32 [%r22+4], %r2, [%r23];
    mov.b64 %rd5, {{%r3, %r4}}; st.async.{ASYNC}.b64 [%r22+8], %rd5, [%r23];"""
    same_bits(pair(send, 512, late=late, race=True), ROWS)
    send = f"""mov.b64 %rd5, {{%r1, %r2}}; mov.b64 %rd6, {{%r3, %r4}};
    st.async.{ASYNC}.v2.b64 [%r22], {{%rd5, %rd6}}, [%r23];"""
    same_bits(pair(send, 512, late=late), ROWS)


def test_vector_registers():
    """A declared vector is written by component and stored as a whole; the inner scope's own comes first."""
    send = f"""{{ .reg .v4 .s32 row; .reg .v2 .b32 %r9; mov.s32 row.w, %r4; mov.s32 row.x, %r1; mov.s32 row.y, %r2;
    {{ .reg .b32 row; mov.u32 row, 0; }} mov.b32 %r9.y, %r3; mov.s32 row.z, %r9.y;
    st.async.{ASYNC}.v4.s32 [%r22], row, [%r23]; }}"""
    same_bits(pair(send, 512), ROWS)


OPERATIONS = {
    "add.u32": lambda x: 7 + x, "add.s32": lambda x: 7 + x, "max.u32": lambda x: np.maximum(x, 7),
    "min.s32": lambda x: np.minimum(x, 7), "and.b32": lambda x: x & 7, "or.b32": lambda x: x | 7,
    "xor.b32": lambda x: x ^ 7, "inc.u32": lambda x: np.where(x <= 7, 0, 8), "dec.u32": lambda x: np.full_like(x, 6),
}  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("late", [False, True])
def test_reductions(operation, late):
    """Memory holds sevens; each lane reduces its number into the first word of its row."""
    send = f"red.async.relaxed.cluster.{ASYNC}.{operation} [%r22], %r1, [%r23];"
    expected = np.full((32, 4), 7, np.uint32)
    expected[:, 0] = OPERATIONS[operation](ROWS[:, 0])
    same_bits(pair(send, 128, late=late, init=ZERO.format(7), race=True), expected)


def test_all_lanes_reduce_into_one_place():
    send = f"""mapa.shared::cluster.u32 %r24, %r50, %r21; mov.u64 %rd5, 4294967296;
    red.async.relaxed.cluster.{ASYNC}.add.u64 [%r24], %rd5, [%r23];"""
    out = pair(send, 256, init=ZERO.format(5), race=True)
    assert out[0].tolist() == [5, 37, 5, 5]


def reported(match, send, size, **options):
    with pytest.raises(RaceError, match=match) as caught:
        pair(send, size, race=True, **options)
    return caught.value


def test_races():
    """What arrives is read after a wait; stores to one place race, reductions do not, but do with other accesses."""
    narrow = f"st.async.{ASYNC}.u32 [%r22], %r1, [%r23];"
    error = reported("read of shared memory 0x400 to 0x5f3 .* not ordered after the write", narrow, 128, wait="",
                     init=ZERO.format(7))  # fmt: skip
    assert error.other[2] == "st.async of cta(0,0,0).w0" and "ld.shared" in error.text
    reduction = f"red.async.relaxed.cluster.{ASYNC}.add.u32 [%r22], %r1, [%r23];"
    error = reported("not ordered after the write", reduction, 128, wait="", init=ZERO.format(7))
    assert error.other[2] == "red.async of cta(0,0,0).w0"
    reported("write of .* not ordered after the write", narrow.replace("%r22", "%r24"), 128,
             init="mapa.shared::cluster.u32 %r24, %r50, 1;")  # fmt: skip
    reported("write of .* not ordered after the write", narrow + reduction, 256)
    early = f"ld.shared.v4.u32 {{%r5, %r6, %r7, %r8}}, [%r51]; {WAIT}"
    delay = "mov.u32 %r9, 0; L: add.u32 %r9, %r9, 1; setp.lt.u32 %p3, %r9, 9; @%p3 bra L;"
    error = reported("write of .* not ordered after the read", delay + narrow, 128, wait=early, init=ZERO.format(7))
    assert "ld.shared" in error.other[1] and "st.async" in error.text


def test_mistakes():
    send = f"st.async.{ASYNC}.v4.b32 [%r22], {{%r1, %r2, %r3, %r4}}, [%r23];"
    with pytest.raises(Deadlock, match="tx-count 16"):
        pair(send, 528)
    with pytest.raises(SyncError, match="before the asynchronous copy"):
        pair(send, 512, wait="", late=True)
    with pytest.raises(MemoryFault, match="misaligned"):
        pair(send.replace("[%r22]", "[%r22+8]"), 512)
    with pytest.raises(MemoryFault, match="outside shared memory"):
        pair(send.replace("[%r22]", "[%r22+4096]"), 512)
    with pytest.raises(UninitializedRead):
        pair(f"red.async.relaxed.cluster.{ASYNC}.add.u32 [%r22], %r1, [%r23];", 128)
    with pytest.raises(PtxError, match="at most 16 bytes"):
        pair(f"st.async.{ASYNC}.v4.b64 [%r22], {{%rd1, %rd1, %rd1, %rd1}}, [%r23];", 512)


@pytest.mark.parametrize(
    "instruction",
    [
        "multimem.ld_reduce.relaxed.sys.global.add.f32 %f1, [%out0]",
        "multimem.ld_reduce.relaxed.gpu.global.add.acc::f32.v4.f16x2 {%r1, %r2, %r3, %r4}, [%out0]",
        "multimem.st.weak.global.f32 [%out0], %f1",
        "multimem.red.release.sys.global.add.u32 [%out0], %r1",
    ],
)
def test_multimem_is_refused(instruction):
    with pytest.raises(PtxError, match=r"multimem\..* addresses the memories of several GPUs; one GPU is") as caught:
        run(instruction + ";", [], [np.zeros(1, np.uint32)])
    assert caught.value.text.startswith(instruction.split()[0])


def test_dependent_launches():
    """Launches run one after the other: what a launch waits for is there."""
    body = "griddepcontrol.wait; st.global.u32 [%out0], %n; griddepcontrol.launch_dependents;"
    assert run(body, [], [np.zeros(1, np.uint32)])[0] == 32


# CTA 1 lets CTA 0 go on and ends; CTA 0 takes its time.
ENDING = """mov.u32 %r50, buffer; mov.u32 %r52, bar; setp.eq.u32 %p10, %t, 0; @%p10 mbarrier.init.shared.b64 [%r52], 1;
    st.shared.u32 [%r50], %t; fence.mbarrier_init.release.cluster; barrier.cluster.arrive; barrier.cluster.wait;
    mov.u32 %r20, %cluster_ctarank; mov.u32 %r21, 1; mapa.shared::cluster.u32 %r22, %r50, %r21;
    mapa.shared::cluster.u32 %r23, %r52, %r21; setp.eq.u32 %p1, %r20, 1; @%p1 bra END; mov.u32 %r5, 0;
  AGAIN: add.u32 %r5, %r5, 1; setp.lt.u32 %p2, %r5, 50; @%p2 bra AGAIN;
    {access}
  END: {end}"""


@pytest.mark.parametrize(
    "access",
    [
        "st.shared::cluster.u32 [%r22], %r5;",
        "ld.shared::cluster.u32 %r6, [%r22];",
        "@%p10 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r23];",
        f"@%p10 st.async.{ASYNC}.u32 [%r22], %r5, [%r23];",
    ],
)
def test_shared_memory_of_a_cta_that_has_ended(access):
    def launched(end):
        body = ENDING.format(access=access, end=end)
        run(body, [], [np.zeros(1, np.uint32)], grid=2, cluster=2, declarations=SHARED)

    launched("barrier.cluster.arrive; barrier.cluster.wait;")
    with pytest.raises(MemoryFault, match=r"shared memory of cta\(1,0,0\), which has ended"):
        launched("")

"""The race detector and tensor memory: PTX ISA 9.7.16.6, memory consistency model of tcgen05.

One kernel is used throughout: four warps store A (columns 64 to 71) and D (0 to 31) to tensor memory, thread 0
multiplies, all load D. It is clean as it stands; a damaged one is reported by name, in the default schedule.
"""

from __future__ import annotations

import re

import pytest

from ptxsim.errors import RaceError, TensorFenceError
from tests.ptxsim import test_tcgen05 as tcgen05_tests

BEFORE, AFTER = "tcgen05.fence::before_thread_sync;", "tcgen05.fence::after_thread_sync;"
HAND_OVER = f"{BEFORE}\n  bar.sync 0;\n  {AFTER}"
WAIT_LD, WAIT_ST = "tcgen05.wait::ld.sync.aligned;", "tcgen05.wait::st.sync.aligned;"
ARRIVED = "WAIT: mbarrier.try_wait.parity.shared.b64 %p11, [%r52], 0;\n  @!%p11 bra WAIT;"
COMMIT = "@%p10 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r52];"
STORE_A = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r56+64], {%r100};"
LOAD_D = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r99}, [%r56+31];"
MMA = "tcgen05.mma.cta_group::1.kind::f16 [%r55], [%r60], %rd4, %r61, %p1;"


@pytest.fixture
def run(monkeypatch):
    """Run the kernel with the detector, after pairs of replacements in its text; each must be possible once."""

    def go(*changes):
        def changed(text, *args, **options):
            text = re.sub(r";\s*", ";\n  ", text)
            for old, new in changes:
                assert text.count(old) == 1, old
                text = text.replace(old, new)
            return plain(text, *args, race=True, **options)

        with monkeypatch.context() as patch:
            patch.setattr(tcgen05_tests, "run", changed)
            tcgen05_tests.multiply("f16", "f16", "f16", from_tmem=True, mutate="fence.proxy.async;")

    plain = tcgen05_tests.run
    return go


def reported(run, error, match, *changes):
    with pytest.raises(error, match=match) as found:
        run(*changes)
    assert type(found.value) is error
    return found.value


def test_stores_and_mma(run):
    """Stores are waited for, then handed over between fences."""
    last = f"{WAIT_ST}\n  {HAND_OVER}"
    run()
    error = reported(run, RaceError, "race: this read of tensor memory lanes 0 to 31, columns 64 to 71 of cta",
                     (WAIT_ST + "\n  add", "add"), (last, HAND_OVER))  # fmt: skip
    assert error.other[2] == "tcgen05.st of cta(0,0,0).w0" and "tcgen05.mma" in error.text
    error = reported(run, RaceError, "write of tensor memory lanes 0 to 31, columns 0 to 31 .* after the write",
                     (last, HAND_OVER))  # fmt: skip
    reported(run, RaceError, "not ordered after the write", ("bar.sync 0;\n  " + AFTER, AFTER))
    reported(
        run, TensorFenceError, "no tcgen05.fence::before_thread_sync", (HAND_OVER, f"bar.sync 0; {BEFORE} {AFTER}")
    )
    reported(run, TensorFenceError, "no tcgen05.fence::after_thread_sync", (HAND_OVER, f"{BEFORE} {AFTER} bar.sync 0;"))


def test_mma_and_loads(run):
    """The commit's arrival is waited for, then a fence; no fence before the commit."""
    fence = f"{ARRIVED}\n  {AFTER}"
    error = reported(run, RaceError, "read of tensor memory lanes 0 to 31, columns 0 to 31 .* after the write",
                     (fence, AFTER))  # fmt: skip
    assert error.other[2] == "tcgen05 of cta(0,0,0).w0" and "tcgen05.ld" in error.text
    error = reported(run, TensorFenceError, "no tcgen05.fence::after_thread_sync", (fence, f"{AFTER} {ARRIVED}"))
    assert error.where == "cta(0,0,0).w0"  # also the warp that issued the mma


def test_operands_in_tensor_memory(run):
    """They are read until the commit's arrival."""
    run((ARRIVED, f"{ARRIVED} {AFTER} {STORE_A} {WAIT_ST}"))
    error = reported(run, RaceError, "write of tensor memory lanes 0 to 31, columns 64 to 64 .* after the read",
                     (ARRIVED, f"{STORE_A} {ARRIVED} {WAIT_ST}"))  # fmt: skip
    assert "tcgen05.mma" in error.other[1]


def test_loads_and_stores_of_one_warp(run):
    """They are asynchronous: any two of which one is a store need a wait."""
    run((WAIT_LD, f"{WAIT_LD} {STORE_A} {WAIT_ST} {STORE_A}  {WAIT_ST}"))
    load_a = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r98}, [%r56+64];"
    store_d = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r56+31], {%r98};"
    for first, second, wait, match in [
        (STORE_A, load_a, WAIT_ST, "read of .* after the write"),
        (STORE_A, STORE_A, WAIT_ST, "write of .* after the write"),
        (LOAD_D, store_d, WAIT_LD, "write of .* after the read"),
    ]:
        run((WAIT_LD, f"{WAIT_LD} {first} {wait} {second} {WAIT_LD} {WAIT_ST}"))
        reported(run, RaceError, match, (WAIT_LD, f"{WAIT_LD} {first} {second} {WAIT_LD} {WAIT_ST}"))


COUNT_TWO = ("mbarrier.init.shared.b64 [%r52], 1;", "mbarrier.init.shared.b64 [%r52], 2;")


def second_mma(sync):
    """Thread 32 multiplies, too, and both commit."""
    both = COMMIT + COMMIT.replace("%p10", "%p12")
    return COMMIT, f"setp.eq.u32 %p12, %t, 32; {sync} @%p12 {MMA} {both}"


def test_mma_after_mma(run):
    """In order in one thread; between threads fences and a barrier are enough, without completion."""
    run((COMMIT, f"@%p10 {MMA} {COMMIT}"))
    run(second_mma(f"{BEFORE} bar.sync 1; {AFTER}"), COUNT_TWO)
    reported(run, RaceError, "write of .* not ordered after the write", second_mma(""), COUNT_TWO)
    reported(run, TensorFenceError, "no tcgen05.fence::before", second_mma(f"bar.sync 1; {AFTER}"), COUNT_TWO)
    reported(run, TensorFenceError, "no tcgen05.fence::after", second_mma(f"{BEFORE} bar.sync 1;"), COUNT_TWO)


def test_deallocation(run):
    """Nobody may still use the columns."""
    run((WAIT_LD, f"{LOAD_D} {WAIT_LD}"))
    error = reported(run, RaceError, "deallocation of tensor memory .* columns 31 to 31 .* after the read",
                     (WAIT_LD, f"{WAIT_LD} {LOAD_D}"))  # fmt: skip
    assert "tcgen05.dealloc" in error.text and "tcgen05.ld" in error.other[1]
    assert error.other[2] == "tcgen05.ld of cta(0,0,0).w0"


WITHOUT_FENCES = [(HAND_OVER, "bar.sync 0;"), (f"{ARRIVED}\n  {AFTER}", ARRIVED)]


def test_registers_of_loads(run):
    """Without fences reading one waits for its load and for those before, not for those after; with them that takes the
    wait."""
    use, store = "add.u32 %r98, %r99, 1;", "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r56+31], {%r98};"
    other = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r97}, [%r56+31];"
    for good in (f"{LOAD_D} {use}", f"{other} {LOAD_D} {use}", f"{LOAD_D} bra NEXT; NEXT: {use}"):
        change = WAIT_LD, f"{WAIT_LD} {good} {store} {WAIT_ST}"
        run(change, *WITHOUT_FENCES)
        reported(run, RaceError, "write of .* after the read", change)
        run((WAIT_LD, f"{WAIT_LD} {good} {WAIT_LD} {store} {WAIT_ST}"))
    for bad in (LOAD_D, f"{LOAD_D} {other} {use}", f"{LOAD_D} {use} {LOAD_D}"):
        change = WAIT_LD, f"{WAIT_LD} {bad} {store} {WAIT_ST}"
        reported(run, RaceError, "write of .* after the read", change, *WITHOUT_FENCES)


def test_one_lane_arrives_for_what_all_have_stored(run):
    """The lanes meet before, in programs that have the fences."""
    meet = "bar.warp.sync -1;"
    count = "mbarrier.init.shared.b64 [%r52], 1;", "mbarrier.init.shared.b64 [%r52], 4;"
    copied = "mad.wide.u32 %rd5", f"{meet} mad.wide.u32 %rd5"  # what lies in shared memory
    last = copied, (COMMIT, 4 * COMMIT), (ARRIVED, ARRIVED.replace(", 0;", ", 1;"))
    arrival = "and.b32 %r97, %t, 31; setp.eq.u32 %p12, %r97, 0; @%p12 mbarrier.arrive.shared.b64 _, [%r52];"
    waited = ARRIVED.replace("WAIT", "FIRST")

    def handed_over(before: str, after: str, meet: str) -> tuple[str, str]:
        return HAND_OVER, f"{before} {meet} {arrival} {waited} {after}"

    run(count, handed_over(BEFORE, AFTER, meet), *last)
    run(count, handed_over(f"{meet} {BEFORE}", AFTER, ""), *last)
    reported(run, RaceError, "read of .* not ordered after the write", count, handed_over(BEFORE, AFTER, ""), *last)
    without_fence = f"{ARRIVED}\n  {AFTER}", last[-1][1]
    run(count, handed_over("", "", ""), *last[:-1], without_fence)


def test_programs_without_fences(run):
    """CUTLASS and FlashAttention-4 have none: completion and synchronisation are still asked for."""
    arrived = f"{ARRIVED}\n  {AFTER}"
    bare = [(HAND_OVER, "bar.sync 0;"), (arrived, ARRIVED)]
    run(*bare)
    reported(run, RaceError, "not ordered after the write", (HAND_OVER, ""), (arrived, ARRIVED))
    reported(run, RaceError, "not ordered after the write", (HAND_OVER, "bar.sync 0;"), (arrived, ""))
    reported(
        run, RaceError, "not ordered after the write", (f"{WAIT_ST}\n  {HAND_OVER}", "bar.sync 0;"), (arrived, ARRIVED)
    )
    run(*bare, second_mma("bar.sync 1;"), COUNT_TWO)
    reported(run, RaceError, "write of .* not ordered", *bare, second_mma(""), COUNT_TWO)

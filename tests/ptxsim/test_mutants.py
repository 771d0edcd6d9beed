"""Damaged synchronisation: what the mutants of a kernel are, and which of them nobody could notice."""

import re

import numpy as np
import pytest

from ptxsim.analysis.equivalence import FIRST_ACQUIRE, LAST_RELEASE, PEEK, Recorder
from ptxsim.analysis.mutants import damaged, kind_of, plan
from ptxsim.frontend.parser import parse_module
from ptxsim.ops.instruction import Instr
from tests.testing import ptx
from tests.testing.ptx import aligned, kernel_text

SHARED = ".shared .align 8 .b64 full[2]; .shared .align 8 .b64 empty[2];"
# One thread fills, one drains: a ring of one stage, three times. The first acquire and the last release are peeled off.
RING = """setp.ne.u32 %p1, %t, 0; @%p1 bra DRAIN;
  mbarrier.init.shared.b64 [full], 1; mbarrier.init.shared.b64 [empty], 1;
DRAIN: bar.sync 0; setp.eq.u32 %p2, %t, 32; @%p2 bra CONSUME; @%p1 bra END;
  FIRST: mbarrier.try_wait.parity.shared.b64 %p3, [empty], 1; @!%p3 bra FIRST;
  mbarrier.arrive.shared.b64 _, [full]; mov.u32 %r1, 0;
FILL: mbarrier.try_wait.parity.shared.b64 %p3, [empty], %r1; @!%p3 bra FILL;
  mbarrier.arrive.shared.b64 _, [full]; xor.b32 %r1, %r1, 1; setp.ne.u32 %p4, %r1, 0; @%p4 bra FILL; bra END;
CONSUME: mov.u32 %r1, 0; mov.u32 %r2, 0;
NEXT: mbarrier.test_wait.parity.shared.b64 %p5, [full], %r1; @%p5 bra GO;
  SPIN: mbarrier.try_wait.parity.shared.b64 %p5, [full], %r1; @!%p5 bra SPIN;
GO: add.u32 %r2, %r2, 1; xor.b32 %r1, %r1, 1; setp.eq.u32 %p6, %r2, 3; @%p6 bra LAST;
  mbarrier.arrive.shared.b64 _, [empty]; bra NEXT;
LAST: mbarrier.arrive.shared.b64 _, [empty];
END:"""


def kernel(body):
    return parse_module(kernel_text(body, 1, 0, declarations=SHARED)).kernels["kernel"]


def changes(body):
    """{change: text of what stands in the place of the one synchronisation in the body}"""
    whole = kernel(body)
    found = {}
    for mutant in plan(whole):
        end = mutant.index - len(whole.body) + 1  # nothing else is changed
        found[mutant.change] = [i.text for i in damaged(whole, mutant).body[mutant.index : end or None]]
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bar.sync 0", {"deleted": []}),
        ("bar.arrive 3, 64", {"deleted": []}),
        ("fence.proxy.async", {"deleted": []}),
        ("wgmma.fence.sync.aligned", {"deleted": []}),
        ("cp.async.commit_group", {"deleted": []}),
        ("cp.async.wait_group 1", {"deleted": [], "one group more": ["cp.async.wait_group 2"]}),
        (
            "cp.async.bulk.wait_group.read 0",
            {"deleted": [], "one group more": ["cp.async.bulk.wait_group.read 1"]},
        ),
        ("cp.async.wait_all", {"deleted": []}),
        (
            "@%p1 mbarrier.arrive.shared.b64 _, [full]",
            {"deleted": [], "one arrival more": ["@%p1 mbarrier.arrive.shared.b64 _, [full], 2"]},
        ),
        (
            "mbarrier.arrive.shared.b64 %rd1, [full], 4",
            {
                "deleted": ["mov.b64 %rd1, 0"],
                "one arrival more": ["add.s32 %ptxsim_wrong, 4, 1",
                                     "mbarrier.arrive.shared.b64 %rd1, [full], %ptxsim_wrong"],
            },
        ),
        (
            "mbarrier.arrive.expect_tx.shared.b64 _, [full], %r3",
            {
                "deleted": [],
                "16 bytes less": ["add.s32 %ptxsim_wrong, %r3, -16",
                                  "mbarrier.arrive.expect_tx.shared.b64 _, [full], %ptxsim_wrong"],
                "16 bytes more": ["add.s32 %ptxsim_wrong, %r3, 16",
                                  "mbarrier.arrive.expect_tx.shared.b64 _, [full], %ptxsim_wrong"],
            },
        ),
        (
            "mbarrier.try_wait.parity.shared.b64 %p1, [full], %r3",
            {
                "yes at once": ["setp.eq.u32 %p1, 0, 0"],
                "other phase": ["xor.b32 %ptxsim_wrong, %r3, 1",
                                "mbarrier.try_wait.parity.shared.b64 %p1, [full], %ptxsim_wrong"],
                "no at once": ["setp.ne.u32 %p1, 0, 0"],
            },
        ),
    ],
)  # fmt: skip
def test_changes(text, expected):
    assert changes(text + ";") == expected


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        ("barrier.cluster.arrive.release.aligned", "barrier"),
        ("bar.warp.sync", "barrier"),
        ("fence.mbarrier_init.release.cluster", "fence"),
        ("membar.gl", "fence"),
        ("wgmma.wait_group.sync.aligned", "wait"),
        ("tcgen05.wait::ld.sync.aligned", "wait"),
        ("cp.async.mbarrier.arrive.noinc.shared.b64", "arrive"),
        ("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64", "commit"),
        ("mbarrier.init.shared.b64", None),
        ("shfl.sync.idx.b32", None),
        ("elect.sync", None),
        ("cp.async.cg.shared.global", None),
    ],
)
def test_kinds(op, kind):
    assert kind_of(Instr(op, [], 1)) == kind


def test_labels_move_with_the_code():
    """A branch back to a damaged wait comes to what was put before it."""
    whole = kernel(RING)
    for mutant in plan(whole):
        changed, edits = damaged(whole, mutant), dict(mutant.edits)
        for label, at in whole.labels.items():
            if edits.get(at):
                assert changed.body[changed.labels[label]] is edits[at][0]
            elif at < len(whole.body):
                assert changed.body[changed.labels[label]] is whole.body[at + (at in edits)]


def test_peek_says_no_where_its_wait_is_damaged():
    """And only there."""
    whole = kernel(RING)
    spun = next(i.line for i in whole.body if i.op.startswith("mbarrier.try_wait") and i.args[0] == "%p5")
    for mutant in plan(whole):
        peeks = [i.text for i in damaged(whole, mutant).body if i.args[:1] == ["%p5"] and "wait" not in i.op]
        assert ("setp.ne.u32 %p5, 0, 0" in peeks) == (mutant.line == spun or mutant.change == "no at once")


def recorded(body, **options):
    """(facts, mutants, lines of the text) of a run of two warps."""
    recorder = Recorder()
    text = kernel_text(body, 1, 0, declarations=SHARED)
    ptx.launch(text, [aligned(np.zeros(4, np.uint8))], threads=64, observers=[recorder], **options)
    return recorder.found, plan(parse_module(text).kernels["kernel"]), [line.strip() for line in text.split("\n")]


def test_equivalent_by_what_one_instruction_does():
    facts, mutants, lines = recorded(RING)
    reasons = {}
    for mutant in mutants:
        label = next((m[1] for n in range(mutant.line - 1, -1, -1) if (m := re.match(r"(\w+):", lines[n]))), "")
        if reason := facts.reason(mutant):
            reasons[label, mutant.change] = reason
    assert reasons == {
        ("FIRST", "yes at once"): FIRST_ACQUIRE,
        ("NEXT", "no at once"): PEEK,
        ("LAST", "deleted"): LAST_RELEASE,
        ("LAST", "one arrival more"): LAST_RELEASE,
    }
    spin = "SPIN: mbarrier.try_wait.parity.shared.b64 %p5, [full], %r1;"
    assert {m.line for m in mutants} - facts.executed == {1 + lines.index(spin)}  # the peek always said yes
    assert all(map(facts.ran, mutants))  # but its wait runs in the mutants


# One thread fills, one drains; the first waits for the last release, announces bytes for nobody, and ends.
TAIL = """setp.ne.u32 %p1, %t, 0; @%p1 bra DRAIN;
  mbarrier.init.shared.b64 [full], 1; mbarrier.init.shared.b64 [empty], 1;
DRAIN: bar.sync 0; setp.eq.u32 %p2, %t, 32; @%p2 bra CONSUME; @%p1 bra END;
  mbarrier.arrive.shared.b64 _, [full];
  TAIL: mbarrier.try_wait.parity.shared.b64 %p3, [empty], 0; @!%p3 bra TAIL;
  mbarrier.arrive.expect_tx.shared.b64 _, [full], 64; bra END;
CONSUME: mbarrier.try_wait.parity.shared.b64 %p5, [full], 0; @!%p5 bra CONSUME;
  mbarrier.arrive.shared.b64 _, [empty];
END:"""
ANNOUNCED = dict.fromkeys(["deleted", "16 bytes less", "16 bytes more"], LAST_RELEASE)
SECOND = "SECOND: mbarrier.try_wait.parity.shared.b64 %p5, [full], 1; @!%p5 bra SECOND; END:"


@pytest.mark.parametrize(("awaited", "expected"), [(False, ANNOUNCED), (True, {})])
def test_tail(awaited, expected):
    """An arrival before the end of a warp, for nobody or for somebody; the wait before it is not on the list."""
    body = TAIL.replace("], 64;", "], 0;").replace("END:", SECOND) if awaited else TAIL
    facts, mutants, lines = recorded(body)
    reasons = {}
    for mutant in mutants:
        if lines[mutant.line - 1].startswith("TAIL") or mutant.kind == "expect_tx":
            reasons[mutant.change] = facts.reason(mutant)
    assert {change: reason for change, reason in reasons.items() if reason} == expected


# Two warps take turns by bar.arrive at 1 and 2; warp 0 begins. Barrier 3 holds both up.
TURNS = """setp.ge.u32 %p1, %t, 32; @%p1 bra SECOND;
  bar.sync 1, 64; bar.arrive 2, 64; bar.sync 3, 64; bra END;
SECOND: bar.arrive 1, 64; bar.sync 2, 64; bar.sync 3, 64;
END:"""


def test_order_is_all_barriers_that_belong_together():
    facts, mutants, lines = recorded(TURNS)
    texts = {mutant: lines[mutant.line - 1].rstrip(";").split(": ")[-1] for mutant in mutants}
    orders = {texts[m]: sorted(texts[other] for other in facts.order(m, mutants)) for m in mutants}
    one, two = ["bar.arrive 1, 64", "bar.sync 1, 64"], ["bar.arrive 2, 64", "bar.sync 2, 64"]
    assert orders == dict.fromkeys(one, one) | dict.fromkeys(two, two) | {"bar.sync 3, 64": []}

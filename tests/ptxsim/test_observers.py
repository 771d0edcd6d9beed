"""Observers: the example of docs/ptxsim.md as it stands there, on copies of every kind; who hears what, and when."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cute_fa
import ptxsim
from ptxsim.errors import Deadlock
from ptxsim.machine.events import Observer
from tests.testing.ptx import aligned, kernel_text, launch

PAGE = Path(__file__).parents[2] / "docs" / "ptxsim.md"


def block(contains):
    """The one Python block of the page in which a text occurs."""
    (found,) = [x for x in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S) if contains in x]
    return found


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """What the page's script leaves behind; the DSL reads the source of kernels, so it lies in a file."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "reverse.py").write_text(block("def reverse("), "utf-8")
    (folder / "counts.py").write_text(block("class BytesOfWarpgroups(ptxsim.Observer)"), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        found = runpy.run_path(str(folder / "counts.py"), run_name="__main__")
    del sys.modules["reverse"]
    return found


def test_the_page(example):
    """512 elements of 4 bytes by cp.async, in CTAs of one warpgroup."""
    text = block("class BytesOfWarpgroups(ptxsim.Observer)")
    assert text.startswith("import ptxsim\n") and len(text.splitlines()) <= 45
    assert 'with ptxsim.simulate("sm_90a", observers=[counter]) as sim:' in text
    start = text.index("class BytesOfWarpgroups")
    assert len(text[start : text.index("\n\n\n", start)].splitlines()) <= 30
    assert example["counter"].bytes == {0: 4 * 512}
    assert torch.equal(example["b"], example["a"].view(4, 128).flip(1).flatten())


# Three warpgroups. Warp 0 loads 4 × 64 bytes and stores them, which is no load; warp 5 loads 128 bytes.
BULK = """mov.u32 %r50, buffer; mov.u32 %r52, bar; setp.eq.u32 %p10, %t, 0; setp.eq.u32 %p12, %t, 160;
  @%p10 mbarrier.init.shared.b64 [%r52], 1; fence.mbarrier_init.release.cluster; bar.sync 0;
  @%p10 mbarrier.arrive.expect_tx.shared.b64 _, [%r52], 384;
  mul.lo.u32 %r1, %t, 64; cvt.u64.u32 %rd1, %r1; add.s64 %rd2, %in0, %rd1; add.u32 %r2, %r50, %r1;
  setp.lt.u32 %p1, %t, 4;
  @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd2], 64, [%r52];
  @%p12 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r50+1024], [%in0], 128, [%r52];
  W: mbarrier.try_wait.parity.shared.b64 %p11, [%r52], 0; @!%p11 bra W;
  @%p10 cp.async.bulk.global.shared::cta.bulk_group [%out0], [%r50], 256; @%p10 cp.async.bulk.commit_group;
  @%p10 cp.async.bulk.wait_group 0;"""
# Of the last warpgroup (threads 256 to 383), threads 256 to 258 copy 16 bytes each, and thread 300 eight of 16.
CP_ASYNC = """setp.ge.u32 %p2, %t, 256; setp.lt.u32 %p3, %t, 259; and.pred %p2, %p2, %p3; setp.eq.u32 %p4, %t, 300;
  mul.lo.u32 %r3, %t, 16; add.u32 %r4, %r50, %r3; mov.u32 %r5, 8;
  @%p2 cp.async.cg.shared.global [%r4], [%in0], 16; @%p4 cp.async.cg.shared.global [%r4], [%in0], 16, %r5;
  cp.async.wait_all;"""
SHARED = ".shared .align 1024 .b8 buffer[8192]; .shared .align 8 .b64 bar;"


def launched(body, *observers, **options):
    arrays = [aligned(np.zeros(1024, np.uint8)) for _ in range(2)]
    return launch(kernel_text(body, 1, 1, declarations=SHARED), arrays, threads=384, observers=observers, **options)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("waves", [1, 2])
def test_bytes_of_bulk_copies_and_cp_async(example, late, waves):
    """Of two CTAs, whether they run together or one after the other."""
    counter = example["BytesOfWarpgroups"]()
    launched(BULK + CP_ASYNC, counter, grid=2, waves=waves, late=late)
    assert counter.bytes == {0: 2 * 4 * 64, 1: 2 * 128, 2: 2 * (3 * 16 + 8)}


def test_bytes_of_tensor_copies(example):
    """The FA3 forward, 200 tokens and head_dim 128 in bf16: two m_blocks, each with a tile of Q and two tiles of K and
    of V. A tile is 128 × 128 elements, of which what lies beyond the tensor counts too. Warp 0 alone loads."""
    counter = example["BytesOfWarpgroups"]()
    q, k, v = (torch.randn(1, 200, 1, 128, dtype=torch.bfloat16) for _ in range(3))
    with cute_fa.simulate("sm_90a", num_sms=1) as simulation:
        simulation.observers.append(counter)
        cute_fa.flash_attn_func(q, k, v)
    tile = 128 * 128 * 2
    assert counter.bytes == {0: 2 * (1 + 2 + 2) * tile}


# ---- the interface ---------------------------------------------------------------------------------------------------


class Recorder(Observer):
    """Notes what it hears in a list that it shares with others."""

    def __init__(self, name, heard):
        self.name, self.heard = name, heard

    def begin(self, machine):
        self.machine = machine
        self.heard.append((self.name, "begin"))

    def end(self, machine, error):
        assert machine is self.machine
        self.heard.append((self.name, type(error).__name__))

    def copy_issued(self, copy):
        events = self.machine.events
        assert events.copy_issued is not None and events.wgmma is None and events.read_shared is None
        self.heard.append((self.name, copy.name))


class Initialisations(Recorder):
    """Hears one kind of event more than the others."""

    def mbarrier_initialised(self, w, index, mask):
        assert self.machine.events.mbarrier_initialised == self.mbarrier_initialised  # nobody else: the method itself
        self.heard.append((self.name, f"{mask.sum()} mbarrier"))


def test_several_observers_hear_in_order():
    heard = []
    machine = launched(BULK, Recorder("a", heard), Initialisations("b", heard), Recorder("c", heard))
    copies = ["bulk load"] * 5 + ["bulk store"]
    assert [x for x in heard if x[1].startswith("bulk")] == [(name, copy) for copy in copies for name in "abc"]
    assert heard[:4] == [("a", "begin"), ("b", "begin"), ("c", "begin"), ("b", "1 mbarrier")]
    assert heard[4:] == [(n, c) for c in [*copies, "NoneType"] for n in "abc"]
    assert machine.events.observers == [] and machine.events.copy_issued is None  # the wave is over


def test_what_nobody_overrides_costs_nothing():
    """The machine's parts find None in its place."""
    events = [name for name, value in vars(Observer).items() if callable(value)]
    assert "read_shared" in events and "wgmma" in events
    found = {}

    class Looks(Observer):
        def issue(self, block, w, M):
            found.update({name: getattr(self.machine.events, name) for name in events})

        def begin(self, machine):
            self.machine = machine

    launched(BULK, Looks())
    assert {name for name, heard in found.items() if heard is not None} == {"issue", "begin"}


def test_the_end_tells_of_the_error():
    heard = []
    short = BULK.replace("_, [%r52], 384", "_, [%r52], 400")
    with pytest.raises(Deadlock):
        launched(short, Recorder("a", heard), Recorder("b", heard))
    assert heard[-2:] == [("a", "Deadlock"), ("b", "Deadlock")]


def test_simulate_takes_observers():
    """Every wave of every launch is heard, by observers in the order of the argument."""
    heard = []
    with ptxsim.simulate("sm_90a", observers=(Recorder("a", heard), Recorder("b", heard))) as sim:
        assert [observer.name for observer in sim.observers] == ["a", "b"]
        assert [observer.name for observer in sim.observers_of_wave() if isinstance(observer, Recorder)] == ["a", "b"]

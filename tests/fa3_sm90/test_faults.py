"""Planted faults: one damaged synchronisation in the FA3 forward must be noticed, by an error, a deadlock or a wrong
result. Which sites are needed by the kernel, and so count, is ruled in ``tests.testing.faults``."""

import random
from dataclasses import dataclass

import pytest

import ptxsim
from cute_fa.semantics.reference import Expected, expected
from cute_fa.tools.inputs import Inputs, InputSpec, make_inputs
from tests.testing.faults import Fault, changed_programs, plan
from tests.testing.simulated import call

pytestmark = pytest.mark.without_races  # what is noticed without the detector; with it: docs/mutations.md

# Late copies show missing waits for copies; seeds without late show what late MMAs would hide: operands that are read
# before their copy has even been issued. Some faults need the right order of the warps.
MODES = [
    {"late": True},
    {"late": True, "schedule_seed": 1},
    {"schedule_seed": 1},
    *({"late": True, "schedule_seed": seed} for seed in range(2, 7)),
]
KINDS = [
    "no wait",
    "wrong phase",
    "no producer wait",
    "no arrive",
    "early release",
    "short expect_tx",
    "long expect_tx",
    "no wgmma wait",
    "no barrier before the output",
    "no barrier before writing",
    "no bulk wait",
    "no turn",
]
SITES_PER_KIND = 2


@dataclass(frozen=True)
class Victim:
    """A problem of several tiles for one CTA, the PTX that computes it, and the answer."""

    given: Inputs
    reference: Expected
    ptx: str

    def sites(self, kind: str) -> list[Fault]:
        faults = [fault for fault in plan(self.ptx) if fault.kind == kind]
        return random.Random(1).sample(faults, min(SITES_PER_KIND, len(faults)))

    def ending(self, ptx: str, mode: dict) -> str | None:
        """What is wrong with a run of that PTX in the kernel's place; None if nothing is."""
        with changed_programs(lambda text: ptx if text == self.ptx else text):
            try:
                out, lse, _ = _launch(self.given, mode)
            except ptxsim.SimError as error:
                return type(error).__name__
        result = self.reference.check(out, lse)
        return None if result.ok else str(result)


def _launch(given: Inputs, mode: dict):
    return call(given, "sm_90a", {"num_sms": 1, **mode}, family="fa3", persistent="on")


# O has memory of its own at head_dim 64 and takes that of Q at 256; turns are taken at 64 alone. Tiles have 1 to 7
# blocks: the wait for the first stage of K matters after tiles of 2, the waits in the diagonal's loop where it has 3.
@pytest.fixture(scope="module", params=[64, 256])
def victim(request) -> Victim:
    spec = InputSpec(2, 392, 492, 1, 1, request.param, causal=True, seqused_k=True, lengths_k=(492, 250))
    given = make_inputs(spec, "peaked")
    texts = []
    with changed_programs(lambda text: texts.append(text) or text):
        _launch(given, {})
    return Victim(given, expected(given.q, given.k, given.v, **given.options()), texts[-1])


@pytest.mark.sampled
def test_undamaged_kernel_passes_every_mode(victim):
    assert [victim.ending(victim.ptx, mode) for mode in MODES] == [None] * len(MODES)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_fault_is_noticed(victim, kind):
    sites = victim.sites(kind)
    assert sites or (kind == "no turn" and victim.given.spec.head_dim > 128)
    missed = [str(fault) for fault in sites if not any(victim.ending(fault.plant(victim.ptx), mode) for mode in MODES)]
    assert not missed

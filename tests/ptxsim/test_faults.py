"""Planted faults: one damaged synchronisation in FlashAttention-4's forward must be noticed, by an error, a deadlock or
a wrong result; with the race detector by an error that names it, in the default schedule. Which sites are needed by the
kernel, and so count, is ruled in ``tests.testing.faults`` and ``fence_faults``."""

import pytest

from tests.testing.peers import run_once

# (late, schedule seed, race). Late copies show missing waits for copies; seeds without late show what late MMAs would
# hide: operands that are read before their copy has even been issued. Some faults need the right order of the warps.
MODES = [(True, None, False), (True, 1, False), (False, 1, False), *((True, seed, False) for seed in range(2, 9))]
KINDS = {
    "sm_80": ["no cp.async wait", "no bar.sync", "no barrier before the output"],
    "sm_90a": [
        "no wait",
        "wrong phase",
        "no producer wait",
        "no arrive",
        "short expect_tx",
        "long expect_tx",
        "no wgmma wait",
        "no barrier before the output",
    ],
}
# What the race detector calls a fault. A damaged phase may end in a deadlock before anything is read.
RACES = {
    "sm_80": {
        "no cp.async wait": {"RaceError"},
        "no bar.sync": {"RaceError"},
        "no barrier before the output": {"RaceError"},
    },
    "sm_90a": {
        "no wait": {"RaceError", "Deadlock"},
        "wrong phase": {"RaceError", "Deadlock"},
        "no producer wait": {"RaceError"},
        "no wgmma wait": {"WgmmaError"},
        "no barrier before the output": {"RaceError", "Deadlock"},  # without the bar.arrive the bar.sync never ends
        "no proxy fence": {"ProxyError"},
        "no wgmma fence": {"WgmmaError"},
        "no init fence": {"BarrierInitError"},
        "no barrier after the initialisation": {"BarrierInitError"},
    },
}
# One tile of queries and enough blocks of keys that the stages are used again: short runs, every loop entered.
PROBLEM = {
    "sm_80": {"seqlen_q": 128, "seqlen_k": 512},
    "sm_90a": {"seqlen_q": 192, "seqlen_k": 768},
}
SITES_PER_KIND = 3
COMMON = {"batch": 1, "heads": 1, "heads_kv": 1, "head_dim": 64, "causal": True, "dtype": "bfloat16"}


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    def of(arch):
        options = {"modes": MODES, "kinds": KINDS[arch], "per_kind": SITES_PER_KIND, "seed": 1}
        jobs = [{"job": "faults", **options, **COMMON, **PROBLEM[arch]}]
        (result,) = run_once(tmp_path_factory, "faults", arch, jobs)
        assert "raised" not in result, result["raised"]
        return result

    return of


@pytest.mark.thorough
@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=pytest.mark.xdist_group(f"faults-{arch}")) for arch in KINDS]
)
def test_undamaged_kernel_passes_every_mode(results, arch):
    baseline = results(arch)["baseline"]
    assert len(baseline) == len(MODES)
    assert max(baseline) < 0.02


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        pytest.param(arch, kind, marks=pytest.mark.xdist_group(f"faults-{arch}"))
        for arch, kinds in KINDS.items()
        for kind in kinds
    ],
)
def test_fault_is_noticed(results, arch, kind):
    faults = {name: seen for name, seen in results(arch)["faults"].items() if name.startswith(kind + " at")}
    assert faults
    missed = [name for name, seen in faults.items() if not isinstance(seen[-1], str) and seen[-1] < 0.02]
    assert not missed


@pytest.fixture(scope="session")
def races(tmp_path_factory):
    def of(arch):
        options = {"modes": [(False, None, True)], "kinds": list(RACES[arch]), "per_kind": SITES_PER_KIND, "seed": 2}
        jobs = [{"job": "faults", **options, **COMMON, **PROBLEM[arch]}]
        (result,) = run_once(tmp_path_factory, "races", arch, jobs)
        assert "raised" not in result, result["raised"]
        return result

    return of


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        pytest.param(arch, kind, marks=pytest.mark.xdist_group(f"races-{arch}"))
        for arch, kinds in RACES.items()
        for kind in kinds
    ],
)
def test_fault_is_named(races, arch, kind):
    """In the default schedule, which hides most of them."""
    result = races(arch)
    assert max(result["baseline"]) < 0.02
    found = {name: seen[-1] for name, seen in result["faults"].items() if name.startswith(kind + " at")}
    assert found
    assert set(found.values()) <= RACES[arch][kind], found

"""K and V multicast over clusters of two CTAs in the FA3 forward: the reference, the bits of one CTA, each block loaded
once for both, and damage to what the two agree on."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import torch

import ptxsim
from cute_fa.engine.overrides import forced
from cute_fa.engine.table import TABLE
from cute_fa.semantics.errors import ArgumentError
from cute_fa.semantics.types import DType, SmArch
from cute_fa.tools.inputs import InputSpec, make_inputs
from fa3_sm90.forward.config import cluster_objection, forward_config, preferred_cluster
from fa3_sm90.forward.entry import Fa3Forward
from tests.testing.cases import small_problem
from tests.testing.faults import changed_programs
from tests.testing.loads import recorded_loads
from tests.testing.tiled_forward import Forward, compare

if TYPE_CHECKING:
    from collections.abc import Iterator

FORWARD = Forward(Fa3Forward, SmArch.SM_90A)


@pytest.fixture(autouse=True)
def _pairs() -> Iterator[None]:
    with forced(Fa3Forward, cluster=2):
        yield


def packed(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], **changes) -> InputSpec:
    sizes = len(lengths_q), max(lengths_q), max(lengths_k)
    return InputSpec(
        *sizes, 2, 1, 128, **{"varlen_q": True, "varlen_k": True, **changes}, lengths_q=lengths_q, lengths_k=lengths_k
    )


# A CTA has 192 queries at head_dim 64 and 128 beyond. Odd numbers of such tiles leave the last pair's second CTA idle.
CASES = {
    "full, 3 tiles": (InputSpec(1, 300, 500, 1, 1, 128), {"num_sms": 3}),
    "full, 5 tiles, late": (InputSpec(1, 900, 390, 1, 1, 64), {"num_sms": 2, "late": True, "schedule_seed": 1}),
    "causal": (InputSpec(1, 500, 500, 1, 1, 128, causal=True), {"num_sms": 1, "late": True, "schedule_seed": 2}),
    "causal, more keys": (InputSpec(1, 400, 701, 2, 1, 64, causal=True), {"num_sms": 4, "persistent": "on"}),
    "causal, fewer keys": (InputSpec(1, 700, 130, 1, 1, 64, causal=True), {"num_sms": 2, "schedule_seed": 3}),
    "causal, one CTA a tile": (InputSpec(1, 384, 450, 1, 1, 128, causal=True), {"persistent": "off", "late": True}),
    "left and right": (InputSpec(1, 350, 500, 1, 1, 128, window=(200, 70)), {"num_sms": 3, "schedule_seed": 4}),
    "right, sink": (InputSpec(1, 400, 700, 1, 1, 64, window=(150, 40), sink_tokens=5, learnable_sink=True), {}),
    "alibi, softcap": (InputSpec(1, 300, 300, 1, 1, 64, causal=True, alibi=True, softcap=20.0), {"num_sms": 2}),
    "packed heads": (InputSpec(1, 75, 300, 10, 2, 64, causal=True), {"pack_gqa": True, "num_sms": 2}),
    "O in Q's place": (
        InputSpec(2, 200, 260, 1, 1, 256, causal=True),
        {"num_sms": 2, "late": True, "schedule_seed": 5},
    ),
    "192 and 128, fp16": (InputSpec(1, 270, 300, 1, 1, 192, 128, dtype=DType.FP16), {"num_sms": 2}),
    "packed": (packed((300, 0, 1, 129), (257, 40, 130, 0)), {"persistent": "off", "schedule_seed": 6}),
    "packed, causal": (packed((2, 513, 0, 127), (300, 500, 9, 128), causal=True), {"num_sms": 4, "late": True}),
    "shorter": (
        packed((300, 0, 130), (1, 200, 300), varlen_q=False, varlen_k=False, seqused_q=True, seqused_k=True),
        {"num_sms": 2, "late": True, "schedule_seed": 7},
    ),
    "padded cache": (
        InputSpec(2, 200, 300, 1, 1, 64, causal=True, seqused_k=True, cache_leftpad=True, lengths_k=(300, 131)),
        {"num_sms": 2},
    ),
}

ON_A_GPU = {
    "full": InputSpec(2, 3000, 3000, 16, 16, 128),
    "causal": InputSpec(2, 3000, 3000, 16, 2, 64, causal=True),
    "wide, causal": InputSpec(2, 2000, 2100, 16, 2, 256, causal=True),
    "few": InputSpec(1, 300, 3000, 3, 1, 128),
    "packed, causal": packed((2000, 0, 1, 129, 513, 3000), (2500, 40, 130, 0, 513, 3000), causal=True),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name):
    spec, options = CASES[name]
    if spec.is_cache:
        options = {option: value for option, value in options.items() if option != "persistent"}
    given = make_inputs(spec, "peaked")
    out, lse, simulation = FORWARD.launch(given, **options)
    compare(given, out, lse)
    launch = simulation.launches[-1]
    assert launch.cluster == (2, 1, 1) and launch.grid[0] % 2 == 0
    if "num_sms" in options:
        assert launch.grid[0] <= max(2, options["num_sms"])


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ON_A_GPU, ids=ON_A_GPU)
def test_against_the_reference_on_the_gpu(spec):
    """More clusters than run at once, of tiles with up to 24 blocks, and fewer."""
    given = make_inputs(ON_A_GPU[spec], "peaked", device="cuda")
    for persistent in ("on", "off"):
        compare(given, *given.run(return_lse=True, family="fa3", persistent=persistent))


@pytest.mark.sampled
@pytest.mark.without_races
@pytest.mark.parametrize("change", [{"cluster": 2}, {"stages": 3}, {"max_chains": 2}, {"turns": False}], ids=str)
def test_the_bits_of_one_cta(change):
    """Blocks that only the other CTA of a cluster sees change nothing, nor do more stages, chains of maxima, turns."""
    given = make_inputs(InputSpec(1, 500, 600, 1, 1, 64, causal=True), "random")
    with forced(Fa3Forward, cluster=1):
        out, lse, _ = FORWARD.launch(given)
        with forced(Fa3Forward, **change):
            other, other_lse, _ = FORWARD.launch(given, num_sms=3, late=True)
    assert torch.equal(other, out) and torch.equal(other_lse, lse)


@pytest.mark.sampled
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (90, 0), "sink_tokens": 7}], ids=str)
def test_each_block_is_loaded_once_for_both(mask):
    """By halves, a copy from each CTA. The blocks are those that a query of either sees."""
    spec = InputSpec(batch=1, seqlen_q=800, seqlen_k=700, heads=1, heads_kv=1, head_dim=64, head_dim_v=32, **mask)
    config = FORWARD.config_of(spec)
    visible = FORWARD.visible_blocks(spec)
    assert config.tile_tokens == 384 and len(visible) == 3
    with recorded_loads() as loads:
        FORWARD.run(spec, persistent="off")
    for head_dim in (64, 32):
        starts = Counter(load.start[1] for load in loads if load.extents[:2] == (head_dim, 700))
        halves = [2 * block + half for blocks in visible for block in blocks for half in range(2)]
        assert starts == Counter(half * config.tile_n // 2 for half in halves)


# ---- damage ----------------------------------------------------------------------------------------------------------

ARRIVAL = re.compile(r"^\s*@(%p\d+) (mbarrier\.arrive\.shared::cluster\.b64 _, \[%r\d+\];)", re.MULTILINE)
OWN = r"""{ .reg .b32 lane, rank; .reg .pred own; mov.u32 lane, %laneid; mov.u32 rank, %cluster_ctarank;
setp.eq.and.u32 own, lane, rank, \1; @own \2 }"""
MEETING = re.compile(r"^\s*barrier\.cluster\.(arrive|wait);\n", re.MULTILINE)


def without_meeting(ptx: str, which: int) -> str:
    """The first or the last of the cluster's barriers taken out."""
    first, last = (list(MEETING.finditer(ptx))[2 * which :][:2]) if which == 0 else list(MEETING.finditer(ptx))[-2:]
    return ptx[: first.start()] + ptx[last.end() :]


def halved(pattern: str, ptx: str) -> str:
    """An integer that ``pattern`` ends before, halved wherever it stands."""
    return re.sub(rf"({pattern})(\d+);", lambda match: f"{match[1]}{int(match[2]) // 2};", ptx)


DAMAGE = {
    "no arrival at the other CTA": lambda ptx: ARRIVAL.sub(OWN, ptx),
    "no first meeting": lambda ptx: without_meeting(ptx, 0),
    "no last meeting": lambda ptx: without_meeting(ptx, -1),
    "stages are free when one CTA has read them": lambda ptx: halved(r"mov\.b32 \t%r\d+, (?=16;)", ptx),
    "half of a block is awaited": lambda ptx: halved(r"mov\.b32 \t%r\d+, (?=32768;)", ptx),
}
MODES = [{"late": True}, {"schedule_seed": 1}, {"late": True, "schedule_seed": 2}, {"race": True}]


@pytest.mark.sampled
@pytest.mark.without_races
@pytest.mark.parametrize("name", [None, *DAMAGE])
def test_damage_is_noticed(name):
    """By an error, a deadlock or a wrong result, in one of the modes."""
    given, texts = make_inputs(InputSpec(1, 300, 500, 1, 1, 128, causal=True), "peaked"), []

    def damaged(ptx: str) -> str:
        texts.append((ptx, DAMAGE[name](ptx) if name else ptx))
        return texts[-1][1]

    def noticed(mode: dict) -> bool:
        try:
            out, lse, _ = FORWARD.launch(given, num_sms=2, **mode)
            compare(given, out, lse)
        except (ptxsim.SimError, AssertionError):
            return True
        return False

    with changed_programs(damaged):
        assert any(map(noticed, MODES)) == (name is not None)
    before, after = texts[-1]
    assert (before == after) == (name is None)


# ---- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"page_size": 16}, "cluster 2 with page_size 16: pages are looked up for whole blocks"),
        ({"ranges": True}, "cluster 2 with a range plan: its masks are of one CTA's queries"),
        ({"dtype": DType.E4M3}, "cluster 2 with dtype e4m3: its kernels are of 16 bits"),
        ({}, None),
    ],
    ids=str,
)
def test_what_is_not_served_says_why(change, reason):
    problem = small_problem(arch=SmArch.SM_90A, seqlen_q=4096, seqlen_k=4096, **change)
    assert cluster_objection(problem) == reason
    if reason is None:
        assert TABLE.lookup(problem).configure(problem).cluster == 2
        return
    with pytest.raises(ArgumentError, match=re.escape(f"{reason} (forced: cluster=2)")):
        TABLE.lookup(problem)


def test_where_clusters_would_be_preferred(monkeypatch):
    """They are weighed before the same tiles of one CTA."""
    problem = small_problem(arch=SmArch.SM_90A, seqlen_q=4096, seqlen_k=4096)
    with forced(Fa3Forward, cluster=1):
        alone = Fa3Forward.configure(problem)
    assert preferred_cluster(problem) == 1
    monkeypatch.setattr("fa3_sm90.forward.config.preferred_cluster", lambda problem: 2)
    found = [candidate.reason for candidate in Fa3Forward.candidates(problem)]
    assert found == [None] and Fa3Forward.candidates(problem)[0].config == dataclasses.replace(alone, cluster=2)
    for change, reason in (
        ({"seqlen_q": 100}, "cluster 2: 100 queries are no more than the 192 of one CTA"),
        ({"alibi": True}, "cluster 2: registers spill with alibi, 2 accesses at head_dim 64"),
        ({"page_size": 16}, "cluster 2 with page_size 16: pages are looked up for whole blocks"),
    ):
        weighed = Fa3Forward.candidates(dataclasses.replace(problem, **change))
        assert [(c.config.cluster, c.reason) for c in weighed] == [(2, reason), (1, None)]


@pytest.mark.parametrize(
    ("causal", "tiles"),
    [(False, {8: 2, 9: 1, 10: 2, 11: 2, 129: 2}), (True, {16: 2, 17: 1, 31: 1, 32: 2, 33: 2})],
)
@pytest.mark.without_races
def test_a_pair_without_a_second_cta_has_to_be_one_of_many(causal, tiles):
    """At head_dim 256, where a CTA has 128 queries; one query in the last tile."""
    pairs = {}
    for number in tiles:
        shape = {"arch": SmArch.SM_90A, "head_dim": 256, "head_dim_v": 256, "window_right": 0 if causal else None}
        problem = small_problem(**shape, seqlen_q=128 * number - 127 * (number % 2), seqlen_k=4096)
        pairs[number] = forward_config(problem).cluster
    assert pairs == tiles
    reason = "cluster 2: of 9 tiles of queries the last would have a cluster of its own"
    problem = small_problem(arch=SmArch.SM_90A, head_dim=256, head_dim_v=256, seqlen_q=1025, seqlen_k=4096)
    assert reason in [candidate.reason for candidate in Fa3Forward.candidates(problem)]

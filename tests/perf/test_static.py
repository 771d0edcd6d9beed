"""Static figures of kernels compiled here: ours within their limits, FlashAttention-4's as recorded."""

from __future__ import annotations

import pytest

from cute_fa.types import SmArch
from fa2_sm80.forward import Fa2Forward
from perf.static import COLUMNS, StaticKey, fa4_reports, our_report, static_table

# Non-tensor instructions per thread and score element: FlashAttention-4's at d64, CUTLASS's example's at d128.
LIMITS = {64: 7.75, 128: 10.9}


@pytest.mark.parametrize("head_dim", LIMITS)
def test_our_main_loops(head_dim):
    full, causal = (our_report(StaticKey(SmArch.SM_80, head_dim, causal)) for causal in (False, True))
    tile_n = Fa2Forward.configure(StaticKey(SmArch.SM_80, head_dim, False).problem()).tile_n
    for report in (full, causal):
        loop = report.main_loop
        # with the copies of the next block, which all but the last iterations run; an ideal mix is about 4.5
        assert 4.5 < loop.per_score + loop.copy_per_score <= LIMITS[head_dim]
        assert 0 < loop.copy_per_score < loop.cond_per_score
        assert loop.counts["local"] == 0, "spills in the main loop"
        # Q·Kᵀ and P·V of 32 queries a warp and one block of keys, in m16n8k16 of 16 × 8 × 16
        products = 2 * 2 * (tile_n // 8) * (head_dim // 16)
        assert loop.counts["tensor"] == loop.shapes["HMMA.16816.F32.BF16"] == products
        assert report.arch == 80
    assert causal.main_loop.instructions == pytest.approx(full.main_loop.instructions, rel=0.02)


def test_flash_attention_4_compiles_to_its_recorded_figures():
    key = StaticKey(SmArch.SM_80, 64, False)
    report = fa4_reports([key])[key]
    assert report.main_loop.per_score == 7.75
    assert (report.main_loop.instructions, report.spill_loads) == (624, 0)
    assert report.resources["regs"] == 255


def test_table_puts_peers_beside_ours(monkeypatch):
    keys = [StaticKey(SmArch.SM_80, 64, causal) for causal in (False, True)]
    table = static_table(keys, fa4=False)
    assert list(table.columns) == COLUMNS
    sources = table[~table.causal].source.tolist()
    assert sources == ["cute-fa", "CUTLASS example", "FA4 0251105a"]
    recorded = table[(table.source == "FA4 0251105a") & table.causal].iloc[0]
    assert (recorded.per_score, recorded.instr, recorded.stall) == (9.69, 748, 1065)
    ours = table[(table.source == "cute-fa") & table.causal].iloc[0]
    assert ours.per_score == our_report(keys[1]).main_loop.per_score

"""Static figures of kernels compiled here: ours within their limits, FlashAttention-4's as recorded."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
from click.testing import CliRunner

from cute_fa.engine.compiler import compile_artifacts
from cute_fa.engine.flavour import active
from cute_fa.semantics.types import Direction, DType, SmArch
from fa2_sm80.forward.entry import Fa2Forward
from fa3_sm90.forward.entry import Fa3Forward
from fa4_sm100.forward.entry import Fa4Forward
from perf.__main__ import main
from perf.sass import report_cubin
from perf.static import COLUMNS, StaticKey, fa4_reports, range_row, static_table, table_row
from perf.static import our_report as compile_report
from perf.static_page import role_sections
from perf.step import step_of

# Non-tensor instructions per thread and score element. sm_80: FlashAttention-4's at d64, CUTLASS's example's at d128;
# sm_90a: 0.9 of FlashAttention-4's without a mask (6.30, 6.81, 10.07).
LIMITS = {64: 7.75, 128: 10.9}
LIMITS_SM90 = {64: 5.67, 128: 6.13, 256: 9.06}
# With forwards of their own under range plans.
WITH_RANGES = [SmArch.SM_80, SmArch.SM_90A, SmArch.SM_100A]
# An exponential's fma and MUFU, a maximum, an addition and half a conversion.
IDEAL = 4.5
# What ptxas makes of a mask: comparisons and selections, once a score.
MASKING = ("ISETP", "FSETP", "FSEL", "SEL", "LOP3", "R2P", "VIADDMNMX", "VIMNMX")

KEYS_SM100 = [
    StaticKey(SmArch.SM_100A, d, causal, head_dim_v=dv)
    for d, dv in [(64, 64), (128, 128), (192, 128)]
    for causal in (False, True)
]

as_recorded = pytest.mark.skipif(active() != "cu12", reason="FlashAttention-4's figures were recorded with cu12")


@cache
def our_report(key: StaticKey):
    return compile_report(key)


def sm90(head_dim: int):
    """Reports of our sm_90a kernel: full and causal."""
    return [our_report(StaticKey(SmArch.SM_90A, head_dim, causal)) for causal in (False, True)]


def config_sm90(head_dim: int):
    return Fa3Forward.configure(StaticKey(SmArch.SM_90A, head_dim, False).problem())


@pytest.mark.parametrize("head_dim", LIMITS)
def test_our_main_loops(head_dim):
    full, causal = (our_report(StaticKey(SmArch.SM_80, head_dim, causal)) for causal in (False, True))
    tile_n = Fa2Forward.configure(StaticKey(SmArch.SM_80, head_dim, False).problem()).tile_n
    for report in (full, causal):
        loop = report.main_loop
        # with the copies of the next block, which all but the last iterations run
        assert IDEAL < loop.per_score + loop.copy_per_score <= LIMITS[head_dim]
        assert 0 < loop.copy_per_score < loop.cond_per_score
        assert loop.counts["local"] == 0, "spills in the main loop"
        # Q·Kᵀ and P·V of 32 queries a warp and one block of keys, in m16n8k16 of 16 × 8 × 16
        products = 2 * 2 * (tile_n // 8) * (head_dim // 16)
        assert loop.counts["tensor"] == loop.shapes["HMMA.16816.F32.BF16"] == products
        assert report.arch == 80
    assert causal.main_loop.instructions == pytest.approx(full.main_loop.instructions, rel=0.02)


@pytest.mark.sampled
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("arch", WITH_RANGES)
def test_main_loops_under_a_range_plan_are_the_dense_ones(arch, head_dim):
    """Within 3 % where nothing is masked, with the copies of the next block, whose place is read from a list."""
    row = range_row(StaticKey(arch, head_dim, False))
    assert row["ranges"] <= 1.03 * row["dense"] and row["spills"] == 0, row


@pytest.mark.sampled
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_backwards_main_loop_under_a_range_plan_is_the_dense_one(head_dim):
    """Where the block is read costs it a few registers."""
    row = range_row(StaticKey(SmArch.SM_80, head_dim, False, Direction.BACKWARD))
    assert row["ranges"] <= 1.03 * row["dense"] and row["spills"] <= 3, row


@pytest.mark.parametrize("head_dim", LIMITS_SM90)
def test_sm90_main_loop_is_lean(head_dim):
    for report in sm90(head_dim):
        assert IDEAL < report.main_loop.per_score <= LIMITS_SM90[head_dim]


@pytest.mark.parametrize("head_dim", LIMITS_SM90)
def test_sm90_main_loop_holds_both_products_and_nothing_spilled(head_dim):
    tile_n = config_sm90(head_dim).tile_n
    for report in sm90(head_dim):
        loop = report.main_loop
        # one block of keys for 64 queries: Q·Kᵀ in steps of 16 of head_dim, P·V in steps of 16 keys
        scores = f"HGMMA.64x{tile_n}x16.F32.BF16.SS"
        output = f"HGMMA.64x{head_dim}x16.F32.BF16.RS"
        assert loop.shapes == {scores: head_dim // 16, output: tile_n // 16}
        assert loop.counts["local"] == 0
        assert not report.wgmma_serialised


@pytest.mark.parametrize("head_dim", [128, 256])
def test_sm90_softmax_fits_beside_the_products(head_dim):
    """A warp's fixed stalls in an iteration, conditional blocks apart, against the cycles that the tensor cores need
    for its warpgroup's two products alone (4096 flops a clock): with two warpgroups taking turns the tensor cores
    never wait for fixed stalls."""
    for report in sm90(head_dim):
        loop = report.main_loop
        assert loop.stall_sum - loop.conditional_stall < loop.cycles["tc"]


@pytest.mark.parametrize("head_dim", LIMITS_SM90)
def test_sm90_causal_rows_run_the_full_loop(head_dim):
    """The steady state of a causal row masks nothing; the loop over its right edge does, each score."""
    full, causal = sm90(head_dim)
    assert causal.main_loop.instructions <= 1.02 * full.main_loop.instructions

    def masking(loop) -> int:
        return sum(loop.opcodes[opcode] for opcode in MASKING)

    assert masking(causal.main_loop) <= masking(full.main_loop) + 1
    (edge,) = (loop for loop in causal.loops if loop.counts["tensor"] and loop is not causal.main_loop)
    scores = config_sm90(head_dim).tile_n // 2
    assert masking(edge) >= masking(full.main_loop) + 2 * scores
    assert edge.shapes == full.main_loop.shapes


def test_wgmma_that_do_not_fit_the_registers_are_reported_as_serialised():
    """O, scores and probabilities of 128 keys take 224 of a thread's 240 registers at head_dim 256."""
    config = dataclasses.replace(config_sm90(256), tile_n=128, stages=1)
    _, cubin = compile_artifacts(config)
    (report,) = report_cubin(cubin)
    assert report.wgmma_serialised
    assert report.row()["wgmma_serialised"]


def test_flash_attention_4_compiles_to_its_recorded_figures():
    key = StaticKey(SmArch.SM_80, 64, False)
    report = fa4_reports([key])[key]
    assert report.main_loop.per_score == 7.75
    assert (report.main_loop.instructions, report.spill_loads) == (624, 0)
    assert report.resources["regs"] == 255


@as_recorded
def test_flash_attention_4_on_sm90():
    keys = [StaticKey(SmArch.SM_90A, 128, causal) for causal in (False, True)]
    full, causal = fa4_reports(keys).values()
    assert (full.main_loop.instructions, full.main_loop.per_score) == (461, 6.81)
    assert (causal.main_loop.instructions, causal.main_loop.per_score) == (484, 7.11)
    for report in (full, causal):
        assert (report.wgmma_serialised, report.setmaxnreg) == (False, "-24 +240")
        assert report.main_loop.shapes == {"HGMMA.64x128x16.F32.BF16.SS": 8, "HGMMA.64x128x16.F32.BF16.RS": 8}


@cache
def fa4_sm100():
    """FlashAttention-4's reports of ``KEYS_SM100``, one of a pair of CTAs at head_dim 256, and one of fp8."""
    others = [StaticKey(SmArch.SM_100A, 256, False), StaticKey(SmArch.SM_100A, 64, False, dtype=DType.E4M3)]
    return fa4_reports([*KEYS_SM100, *others])


@pytest.mark.thorough
@as_recorded
def test_flash_attention_4_on_sm100():
    seen = {
        key.shape: (loop.instructions, loop.conditional, loop.scores, loop.emulated, loop.emulation, report.setmaxnreg)
        for key, report in fa4_sm100().items()
        for loop in [report.score_loop]
    }
    others = " ".join(["-48"] * 4)
    assert seen == {
        "d64 full": (523, 9, 128, 16, 80, f"{others} +200 -64"),
        "d64 causal": (525, 10, 128, 16, 80, f"{others} +200 -64"),
        "d128 full": (553, 10, 128, 24, 120, "-64 -64 -64 -64 +184 -80"),
        "d128 causal": (525, 10, 128, 16, 80, "-56 -56 -56 -56 +192 -72"),
        "d192,128 full": (554, 10, 128, 24, 120, "-64 -64 -64 -64 +184 -80"),
        "d192,128 causal": (495, 10, 128, 8, 40, "-56 -56 -56 -56 +192 -72"),
        "d256 full": (568, 8, 128, 24, 120, f"{others} {others} +256 +160"),
        "d64 full e4m3": (503, 6, 128, 16, 80, "-80 -80 -80 -80 +168 -96"),
    }


@as_recorded
def test_roles_of_flash_attention_4():
    key = StaticKey(SmArch.SM_100A, 192, False, head_dim_v=128)
    report = fa4_sm100()[key]
    loops = report.role_loops
    # Q·Kᵀ of 12 steps and P·V of 8, for two tiles
    assert loops["mma"].shapes == {"UTCHMMA.2CTA.256x128x16": 2 * (12 + 8)}
    assert loops["correction"].opcodes["FMUL2"] == 128
    assert loops["load"].opcodes["UTMALDG"] == 4
    row = table_row(key, "FA4", report)
    assert (row["per_score"], row["cond_per_score"], row["net_per_score"]) == (4.25, 0.08, 3.31)
    assert (row["spills"], row["role_spills"], row["per_mma"]) == ("10/5", "softmax 2", 6.2)
    assert row["role_regs"] == "softmax 182/184, correction 56/80, mma 42/64, load 12/64"
    # 2 · 256 · 128 · 320 flops; Q for each tile, half of K and V for each of two CTAs; 105 MUFU.EX2
    assert (row["step_tensor"], row["step_smem"], row["step_exp2"]) == (2560, 1408, 2048)
    assert row["step_mufu"] == row["step_busiest"] == 2 * 8 * 105


@pytest.mark.parametrize("key", KEYS_SM100, ids=lambda key: key.shape)
def test_sm100_softmax_is_leaner_than_flash_attention_4s(key):
    ours, theirs = our_report(key), fa4_sm100()[key]
    loop = ours.score_loop
    # half an instruction for a score's fma, for its addition and its conversion, and the MUFU's exponentials
    ideal = 1.5 + 1 - loop.emulated / loop.scores
    assert ideal < loop.net_per_score <= 0.9 * theirs.score_loop.net_per_score
    busiest = [step_of(report, key.head_dim, key.head_dim_v, 2).busiest for report in (ours, theirs)]
    assert busiest[0] <= 0.95 * busiest[1]
    assert [role for role, loop in ours.role_loops.items() if loop.counts["local"]] == []


@pytest.mark.parametrize("head_dim", [64, 128])
def test_sm100_causal_rows_run_the_full_loop(head_dim):
    full, causal = (our_report(StaticKey(SmArch.SM_100A, head_dim, causal)).score_loop for causal in (False, True))
    assert causal.scores == full.scores
    assert causal.instructions - causal.conditional <= 1.02 * (full.instructions - full.conditional)


def test_sm100_emulates_as_many_exponentials_as_the_config_says():
    for key in KEYS_SM100[::2]:
        config = Fa4Forward.configure(key.problem())
        loop = our_report(key).score_loop
        assert (loop.scores, loop.emulated) == (config.tile_n, config.tile_n // 32 * config.emulated)


def test_tables_by_role():
    key = KEYS_SM100[2]
    table = static_table([key], fa4=True)
    assert table.source.tolist()[0] == "cute-fa"
    roles, cycles, ratios = role_sections(table)
    assert [title for title, _ in (roles, cycles, ratios)] == [
        "Forward, sm_100a, by role",
        "Forward, sm_100a, cycles of 128 keys",
        "Forward, sm_100a, ours / FlashAttention-4's",
    ]
    (ours, theirs), ratio = (row for _, row in table.iterrows()), ratios[1].iloc[0]
    assert roles[1].net.tolist() == [ours.net_per_score, theirs.net_per_score]
    assert ratio.net == pytest.approx(ours.net_per_score / theirs.net_per_score, abs=1e-3)
    assert ratio.busiest == pytest.approx(ours.step_busiest / theirs.step_busiest, abs=1e-3)
    assert cycles[1].tensor.tolist() == [2048, 2048]


@as_recorded
def test_backward_is_reported_by_the_kernel_that_does_the_products():
    key = StaticKey(SmArch.SM_90A, 64, False, Direction.BACKWARD)
    table = static_table([key], fa4=True)
    assert table.direction.tolist() == ["bwd"] * 3
    ours, theirs, recorded = table.itertuples()
    assert (ours.source, recorded.source) == ("cute-fa", "FA4 0251105a")
    assert (theirs.per_score, theirs.instr, theirs.tc) == (recorded.per_score, recorded.instr, recorded.tc)
    report = our_report(key)
    assert "KeyGradientKernel" in report.kernel
    assert ours.per_score == report.main_loop.per_score
    # five products of 64: as many non-tensor instructions an element of S as that name says
    elements = report.main_loop.flops / (5 * 2 * 64) / 128
    plain = report.main_loop.instructions - report.main_loop.counts["tensor"] - report.main_loop.conditional
    assert ours.per_score == pytest.approx(plain / elements, abs=0.01)


def test_a_backward_in_two_kernels_is_reported_by_all_that_meet_a_score():
    """The loops without masks of dQ, of dV and of dK, each of which has 32 scores a thread."""
    report = our_report(StaticKey(SmArch.SM_90A, 192, False, Direction.BACKWARD, head_dim_v=128))
    assert "QueryGradientKernel" in report.kernel and report.spill_loads == report.spill_stores == 0
    per_score = 0.0
    # steps of 16 columns in products of scores, and of 16 scores in those of gradients
    for scores, (width, steps) in ((12 + 8, (192, 4)), (12, (128, 4)), (8, (192, 4))):
        shapes = {"HGMMA.64x64x16.F32.BF16.SS": scores, f"HGMMA.64x{width}x16.F32.BF16.RS": steps}
        loops = [loop for loop in report.loops if loop.shapes == shapes]
        loop = min(loops, key=lambda loop: loop.opcodes["ISETP"])
        per_score += (loop.instructions - loop.counts["tensor"] - loop.conditional) / 32
    assert report.main_loop.per_score == pytest.approx(per_score, abs=0.02)


def test_flash_attention_4_has_no_backward_before_sm90():
    assert fa4_reports([StaticKey(SmArch.SM_80, 64, False, Direction.BACKWARD)]) == {}


@pytest.mark.parametrize(
    ("arch", "per_score", "instructions", "stall"), [(SmArch.SM_80, 9.69, 748, 1065), (SmArch.SM_90A, 8.05, 536, 1024)]
)
def test_table_puts_peers_beside_ours(arch, per_score, instructions, stall):
    keys = [StaticKey(arch, 64, causal) for causal in (False, True)]
    table = static_table(keys, fa4=False)
    assert list(table.columns) == COLUMNS
    sources = table[~table.causal].source.tolist()
    assert sources == ["cute-fa", "CUTLASS example", "FA4 0251105a"]
    recorded = table[(table.source == "FA4 0251105a") & table.causal].iloc[0]
    assert (recorded.per_score, recorded.instr, recorded.stall) == (per_score, instructions, stall)
    ours = table[(table.source == "cute-fa") & table.causal].iloc[0]
    report = our_report(keys[1])
    assert ours.per_score == report.main_loop.per_score
    assert ours.setmaxnreg == report.setmaxnreg
    assert (ours.stall, ours.cond_stall) == (report.main_loop.stall_sum, report.main_loop.conditional_stall)
    assert ours.serialised is False


def test_the_command_compares_range_plans():
    done = CliRunner().invoke(main, ["static", "--ranges", "--arch", "sm_80", "--head-dim", "64", "--markdown"])
    assert done.exit_code == 0, done.output
    header, _, *rows = (line.strip("| ").split(" | ") for line in done.output.splitlines() if line.startswith("|"))
    assert [row[:3] for row in rows] == [["sm_80", direction, "d64 full"] for direction in ("fwd", "bwd")]
    row = range_row(StaticKey(SmArch.SM_80, 64, False))
    assert list(row) == header and rows[0][3:] == [f"{row[name]:g}" for name in header[3:]]
    dense, ranges = (our_report(StaticKey(SmArch.SM_80, 64, False, ranges=given)).main_loop for given in (False, True))
    assert row["dense"] == pytest.approx(dense.per_score + dense.copy_per_score)
    assert row["ranges"] == pytest.approx(ranges.per_score + ranges.copy_per_score) != row["dense"]
    assert row["percent"] == round(100 * (row["ranges"] / row["dense"] - 1), 1)

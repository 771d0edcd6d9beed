"""The gate over main loops: our kernels within their budgets, and what breaks one."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from cute_fa.engine.flavour import active
from cute_fa.semantics.types import Direction, DType, SmArch
from perf import static as static_module
from perf.__main__ import main
from perf.budgets import Budget, load
from perf.features import FeatureKey, feature_rows
from perf.static import StaticKey, our_report
from perf.static_page import to_page

BUDGETS = load()
PAGE = Path(__file__).parents[2] / "docs" / "static.md"
KEY = StaticKey(SmArch.SM_80, 64, False)
report_of = cache(our_report)


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: str(budget.key))
def test_our_main_loops_are_within_their_budgets(budget):
    assert budget.breaches(report_of(budget.key)) == []


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: str(budget.key))
def test_the_documentation_has_the_present_figures(budget):
    row = static_module.table_row(budget.key, "cute-fa", report_of(budget.key))
    paragraphs = PAGE.read_text().split("\n\n")
    sections = to_page(pd.DataFrame([row], columns=static_module.COLUMNS)).split("\n\n")
    assert len(sections) == (4 if budget.key.arch is SmArch.SM_100A else 2)
    for title, table in zip(sections[::2], sections[1::2], strict=True):
        assert table.splitlines()[-1] in paragraphs[paragraphs.index(title) + 1].splitlines()


@pytest.mark.parametrize("features", [("causal", "alibi"), ("varlen", "causal", "alibi")])
def test_alibi_and_a_right_bound_have_enough_registers(features):
    """Of FA3's forward at head_dim 64, which has the fewest."""
    (row,) = feature_rows([FeatureKey(SmArch.SM_90A, 64, 64, features)])
    assert (row["spills"], row["serialised"]) == ("0/0", False)


@pytest.mark.parametrize("features", [("softcap",), ("slopes",), ("softcap", "slopes"), ("causal", "deterministic")])
def test_features_of_the_hopper_backward_have_enough_registers(features):
    """At head_dim 128, which has the most."""
    (row,) = feature_rows([FeatureKey(SmArch.SM_90A, 128, 128, features, direction=Direction.BACKWARD)])
    assert (row["kernel"], row["spills"], row["serialised"]) == ("fa3", "0/0", False)


def test_every_kernel_has_a_budget():
    kernels = [
        (SmArch.SM_80, Direction.FORWARD, DType.BF16),
        (SmArch.SM_90A, Direction.FORWARD, DType.BF16),
        (SmArch.SM_90A, Direction.FORWARD, DType.E4M3),
        (SmArch.SM_100A, Direction.FORWARD, DType.BF16),
        (SmArch.SM_100A, Direction.FORWARD, DType.E4M3),
        (SmArch.SM_80, Direction.BACKWARD, DType.BF16),
        (SmArch.SM_90A, Direction.BACKWARD, DType.BF16),
    ]
    wanted = {
        StaticKey(arch, d, causal, direction, dtype, dv)
        for arch, direction, dtype in kernels
        for d, dv in [(64, 64), (128, 128), (256, 256), *([(192, 128)] if arch is SmArch.SM_100A else [])]
        for causal in (False, True)
    }
    forwards = {key for key in wanted if key.arch is SmArch.SM_90A and key.direction is Direction.FORWARD}
    short = {key for key in forwards if key.shape in ("d256 full", "d256 causal")}
    assert {budget.key for budget in BUDGETS} == wanted | {dataclasses.replace(key, seqlen=512) for key in short}
    assert {kernel for key in wanted for kernel in key.with_short()} == {budget.key for budget in BUDGETS}


def test_what_breaks_a_budget():
    report = report_of(KEY)
    loop = report.main_loop
    names = ("per_score", "cond_per_score", "net_per_score", "pipe_per_score")
    figures = [getattr(loop, name) for name in names]
    exact = Budget(KEY, *figures)
    assert exact.breaches(report) == []
    less = Budget(KEY, *(figure - 0.01 for figure in figures))
    assert less.breaches(report) == [
        f"{name} {figure:g}, budget {figure - 0.01:g}" for name, figure in zip(names, figures, strict=True)
    ]
    spilling = dataclasses.replace(loop, counts=loop.counts + type(loop.counts)(local=2))
    others = [other for other in report.loops if other is not loop]
    assert exact.breaches(dataclasses.replace(report, loops=[*others, spilling])) == [
        "2 spilled accesses in the main loop"
    ]
    assert exact.breaches(dataclasses.replace(report, wgmma_serialised=True)) == [
        "every wgmma is waited for before the next"
    ]


def test_the_command_fails_where_a_budget_is_broken(monkeypatch):
    arguments = "static --gate --arch sm_80 --head-dim 64 --direction fwd".split()
    monkeypatch.setattr(static_module, "our_report", report_of)
    done = CliRunner().invoke(main, arguments)
    assert (done.exit_code, done.stdout) == (0, f"2 of 2 main loops within their budgets ({active()})\n")
    tight = [dataclasses.replace(budget, per_score=budget.per_score - 0.1 * budget.key.causal) for budget in BUDGETS]
    monkeypatch.setattr("perf.budgets.load", lambda: tight)
    done = CliRunner().invoke(main, arguments)
    assert (done.exit_code, done.stdout) == (1, f"1 of 2 main loops within their budgets ({active()})\n")
    assert "sm_80 fwd d64 causal: per_score 5." in done.stderr
    assert "sm_80 fwd d64 full: within its budget" in done.stderr
    assert CliRunner().invoke(main, "static --gate --head-dim 32".split()).exit_code == 2


def test_the_command_takes_two_head_dims(monkeypatch):
    monkeypatch.setattr(static_module, "our_report", report_of)
    arguments = "static --gate --arch sm_80 --arch sm_100a --head-dim 192,128 --dtype bf16".split()
    done = CliRunner().invoke(main, arguments)
    assert (done.exit_code, done.stdout) == (0, f"2 of 2 main loops within their budgets ({active()})\n")
    assert "sm_100a fwd d192,128 causal: within its budget" in done.stderr


def test_spills_of_a_role_break_a_budget():
    budget = next(b for b in BUDGETS if b.key == StaticKey(SmArch.SM_100A, 64, False))
    report = report_of(budget.key)
    assert list(report.role_loops) == ["softmax", "mma", "load"]
    mma = report.role_loops["mma"]
    spilling = dataclasses.replace(mma, counts=mma.counts + type(mma.counts)(local=3))
    loops = [spilling if loop is mma else loop for loop in report.loops]
    assert budget.breaches(report) == []
    assert budget.breaches(dataclasses.replace(report, loops=loops)) == ["3 spilled accesses in the mma loop"]


def test_head_dims_of_a_budget(tmp_path):
    file = tmp_path / "budgets.toml"
    file.write_text('[sm_100a.fwd]\n"d192,128 full e4m3" = { per_score = 4.4, cond_per_score = 1.2 }\n')
    (budget,) = load(file)
    assert budget.key == StaticKey(SmArch.SM_100A, 192, False, dtype=DType.E4M3, head_dim_v=128)
    assert (budget.net_per_score, budget.pipe_per_score) == (math.inf, math.inf)
    file.write_text('[sm_100a.fwd]\n"d128,128 full" = { per_score = 4.4, cond_per_score = 1.2 }\n')
    with pytest.raises(ValueError, match="'d128,128 full': a head dim and a mask as in 'd128 full'"):
        load(file)


def test_a_misspelt_kernel_is_no_budget(tmp_path):
    file = tmp_path / "budgets.toml"
    file.write_text('[sm_80.fwd]\n"d64 casual" = { per_score = 5.6, cond_per_score = 2.5 }\n')
    with pytest.raises(ValueError, match="'d64 casual': a head dim and a mask as in 'd64 full'"):
        load(file)


def test_a_flavour_has_figures_of_its_own_where_they_are_given(tmp_path):
    file = tmp_path / "budgets.toml"
    other = "cu13 = { per_score = 5.5, cond_per_score = 2.0 }"
    file.write_text(f"""[sm_80.fwd]
"d64 full" = {{ per_score = 5.6, cond_per_score = 2.5 }}
"d64 causal" = {{ per_score = 5.6, cond_per_score = 2.5, {other} }}
""")
    figures = {of: [(b.per_score, b.cond_per_score) for b in load(file, of)] for of in ("cu12", "cu13")}
    assert figures == {"cu12": [(5.6, 2.5), (5.6, 2.5)], "cu13": [(5.6, 2.5), (5.5, 2.0)]}


@pytest.mark.parametrize(("head_dim", "per_score"), [(64, 6.5), (128, 7.2), (256, 12.5)])
def test_fp8_is_within_its_limits_with_causal_within_three_percent(head_dim, per_score):
    """As many instructions as CUTLASS's example has without promotion, or fewer."""
    key = SmArch.SM_90A, head_dim, DType.E4M3
    allowed = {b.key.causal: b.per_score for b in BUDGETS if (b.key.arch, b.key.head_dim, b.key.dtype) == key}
    assert max(allowed.values()) <= per_score
    assert allowed[True] <= 1.03 * allowed[False]

"""The sweep over pairs of features: which kernels it compiles, and what it says of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from click.testing import CliRunner

from cute_fa.semantics.types import Direction, DType, PersistentMode, SmArch
from perf import features
from perf.__main__ import main
from perf.features import BACKWARD_FEATURES, FEATURES, FeatureKey, feature_keys, feature_rows, offends
from perf.static import StaticKey, our_report


def test_every_two_features_meet_once():
    keys = feature_keys(SmArch.SM_90A, [(64, 64), (192, 128)])
    count = len(FEATURES)
    assert len(keys) == len(set(keys)) == 2 * (1 + count + count * (count - 1) // 2 + 1)
    pairs = {key.features for key in keys if len(key.features) == 2 and key.head_dim == 192}
    assert ("varlen", "paged") in pairs
    assert ("causal", "single") in pairs
    assert str(FeatureKey(SmArch.SM_90A, 192, 128, ("varlen", "paged"))) in map(str, keys)


def test_features_that_set_one_field():
    def problem(*names):
        return FeatureKey(SmArch.SM_90A, 64, 64, names).problem()

    paged = problem("varlen", "paged")
    assert (paged.varlen_q, paged.varlen_k, paged.seqused_k, paged.page_size) == (True, False, True, 64)
    window = problem("window", "causal")
    assert (window.window_left, window.window_right) == (512, 0)
    packed = problem("pack_gqa", "single")
    assert (packed.gqa_ratio, packed.pack_gqa, packed.persistent) == (4, True, PersistentMode.OFF)


def test_what_no_kernel_serves_is_left_out():
    keys = feature_keys(SmArch.SM_80, [(64, 64), (512, 512)])
    assert {key.head_dim for key in keys} == {64}
    assert {name for key in keys for name in key.features} == set(FEATURES)


def test_fp8_keys_have_descales_and_their_name():
    key = FeatureKey(SmArch.SM_90A, 192, 128, ("causal",), DType.E4M3)
    assert str(key) == "sm_90a d192v128 e4m3 causal"
    problem = key.problem()
    assert (problem.dtype, problem.q_descale, problem.k_descale, problem.v_descale) == (DType.E4M3, True, True, True)
    # by the kernel that widens codes; gradients nowhere
    assert {key.direction for key in feature_keys(SmArch.SM_80, [(64, 64)], DType.E4M3)} == {Direction.FORWARD}
    names = [(key.features, key.dtype) for key in feature_keys(SmArch.SM_90A, [(64, 64)], DType.E4M3)]
    assert names == [(key.features, DType.E4M3) for key in feature_keys(SmArch.SM_90A, [(64, 64)])]


def test_a_backward_has_features_of_its_own():
    keys = feature_keys(SmArch.SM_90A, [(256, 256)], direction=Direction.BACKWARD)
    count = len(BACKWARD_FEATURES)
    assert len(keys) == len(set(keys)) == 1 + count + count * (count - 1) // 2 + 1
    problem = FeatureKey(SmArch.SM_90A, 256, 256, ("slopes", "lse"), direction=Direction.BACKWARD).problem()
    assert (problem.direction, problem.alibi, problem.slopes_gradient, problem.lse_gradient, problem.deterministic) == (
        Direction.BACKWARD, True, True, True, False,
    )  # fmt: skip
    assert "sm_90a bwd d256 causal deterministic" in map(str, keys)


@pytest.mark.sampled
@pytest.mark.parametrize("head_dim", [128, 256])
def test_rows_of_a_backward(head_dim):
    (row,) = feature_rows([FeatureKey(SmArch.SM_90A, head_dim, head_dim, direction=Direction.BACKWARD)])
    report = our_report(StaticKey(SmArch.SM_90A, head_dim, True, Direction.BACKWARD))
    assert row["instr"] > 0 and row["per_score"] == pytest.approx(report.main_loop.per_score, rel=0.05)
    assert (row["kernel"], row["offends"]) == ("fa3", False)


def test_rows_are_the_figures_of_the_kernel():
    (row,) = feature_rows([FeatureKey(SmArch.SM_90A, 128, 128)])
    report = our_report(StaticKey(SmArch.SM_90A, 128, False))
    assert (row["per_score"], row["instr"]) == (report.main_loop.per_score, report.main_loop.instructions)
    assert (row["kernel"], row["setmaxnreg"], row["offends"]) == ("fa3", report.setmaxnreg, False)
    assert offends(replace(report, wgmma_serialised=True))
    report.main_loop.counts["local"] = 1
    assert offends(report)


def test_command_lists_offenders_alone(monkeypatch):
    rows = [{"features": "plain", "offends": False}, {"features": "alibi", "offends": True}]
    monkeypatch.setattr(features, "FEATURES", {"alibi": FEATURES["alibi"]})
    monkeypatch.setattr(features, "feature_rows", lambda keys: iter(rows[: len(keys)]))
    result = CliRunner().invoke(main, ["features", "--head-dim", "192,128", "--offenders", "--markdown"])
    assert result.exit_code == 0
    assert "sm_90a d192v128 alibi: offends" in result.stderr
    assert result.stdout.splitlines()[2:] == ["| alibi | True |"]


@pytest.mark.parametrize(
    "arguments",
    [["--direction", "bwd", "--dtype", "e4m3", "--head-dim", "64"], ["--arch", "sm_80", "--head-dim", "264"]],
    ids=str,
)
def test_command_says_that_nothing_is_served(arguments):
    result = CliRunner().invoke(main, ["features", *arguments])
    assert result.exit_code == 2 and result.stdout == ""
    direction, dtype = ("bwd", "e4m3") if "bwd" in arguments else ("fwd", "bf16")
    assert f"serves {direction} in {dtype} with these head_dims" in result.stderr


@pytest.mark.parametrize("head_dim", ["12x", "64,", ",64"])
def test_command_refuses_bad_head_dims(head_dim):
    result = CliRunner().invoke(main, ["features", "--head-dim", head_dim])
    assert result.exit_code == 2
    assert f"'{head_dim}': head_dim, or head_dim and head_dim_v" in result.stderr

"""Costs around a kernel: nothing runs while they are timed, and figures are held to their targets."""

from __future__ import annotations

import time

import pytest
import torch
from click.testing import CliRunner

import cute_fa
from cute_fa.engine import attention as engine
from cute_fa.semantics.types import SmArch
from perf import host
from perf.__main__ import main
from perf.host import Figure, backward_figures, call_figures, compile_figures, import_figures, microseconds
from perf.static import fa4_target


def test_idle_launches_run_nothing():
    q = torch.randn(1, 8, 1, 16, dtype=torch.bfloat16)
    with cute_fa.simulate("sm_80") as simulation:
        with simulation.idle():
            out = torch.full_like(q, 7)
            cute_fa.flash_attn_func(q, q, q, out=out)
            assert (out == 7).all()
            assert simulation.launches == []
        cute_fa.flash_attn_func(q, q, q, out=out)
        assert len(simulation.launches) == 1
        assert (
            out - torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3).transpose(1, 2)
        ).abs().max() < 0.02


def test_a_figure_is_told_as_met_or_missed():
    assert Figure("load", 19.96, "ms", 20.0).row()["verdict"] == "met"
    assert Figure("load", 20.4, "ms", 20.0).row() == {
        "what": "load", "value": "20.4", "unit": "ms", "target": 20.0, "verdict": "MISSED"
    }  # fmt: skip
    assert Figure("replay", None, "µs").row()["value"] == "needs a GPU"


def test_microseconds_of_a_call(monkeypatch):
    monkeypatch.setattr(host, "CALLS", 5)
    monkeypatch.setattr(host, "REPETITIONS", 3)
    assert microseconds(lambda: time.sleep(0.002)) == pytest.approx(2000, rel=0.5)


def test_calls(monkeypatch):
    monkeypatch.setattr(host, "CALLS", 2)
    monkeypatch.setattr(host, "REPETITIONS", 2)
    module = dict(vars(engine))
    figures = list(call_figures(SmArch.SM_80))
    own, operator, before, converting, launch, beyond_own, total, traced, replay = figures
    assert all(figure.what.startswith("sm_80: ") for figure in figures)
    whole = before.value + converting.value + launch.value
    assert beyond_own.value == pytest.approx(whole - own.value)
    assert total.value == pytest.approx(whole - operator.value)
    assert (total.target, replay.value) == (5.0, None)
    assert min(own.value, operator.value, before.value, launch.value, traced.value) > 0.1
    assert not hasattr(torch.ops.cute_fa_host, "outputs")
    assert vars(engine) == module
    # The plan that was timed is left as it was: a call runs its kernel again.
    q = torch.randn(1, 128, 4, 64, dtype=torch.bfloat16)
    with cute_fa.simulate("sm_80") as simulation:
        cute_fa.flash_attn_func(q, q, q, causal=True)
        assert len(simulation.launches) == 1


def test_backward_calls(monkeypatch):
    monkeypatch.setattr(host, "CALLS", 2)
    monkeypatch.setattr(host, "REPETITIONS", 2)
    own, before, converting, launch, whole = backward_figures(SmArch.SM_90A)
    assert all(figure.what.startswith("sm_90a, backward: ") for figure in (own, before, converting, launch, whole))
    assert whole.value == pytest.approx(before.value + converting.value + launch.value)
    assert (whole.target, before.target) == (15.0, None)
    assert 0.1 < own.value < before.value and launch.value > 0.1


def test_compiles_are_of_fresh_processes(monkeypatch):
    calls = []
    seconds = {"compile": [4.0, 3.0, 6.0], "compile-fa4": [2.0, 2.5], "load": [0.03, 0.01]}

    def process(what, *key, environment):
        calls.append((what, *key, environment.get("CUTE_FA_CACHE")))
        return seconds[what].pop(0)

    monkeypatch.setattr(host, "_process", process)
    ours, theirs, ratio, load = compile_figures(SmArch.SM_90A, 64, True, 2)
    assert (ours.value, theirs.value, ratio.value, load.value) == (3.0, 2.0, 1.5, 10.0)
    assert [figure.row()["verdict"] for figure in (ours, ratio, load)] == ["met", "MISSED", "met"]
    key = ("sm_90a", "64", "1")
    turn = [("compile", *key, "0"), ("compile-fa4", *key, None), ("load", *key, "1")]
    assert calls == [("compile", *key, "1"), *turn, *turn]


def test_a_compile_of_flash_attention_4_is_timed():
    """For the architecture whose persistent scheduler asks for the device."""
    off = {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0"}
    key = ("sm_100a", "64", "0")
    assert 0.5 < host._process("compile-fa4", *key, environment=fa4_target(SmArch.SM_100A) | off) < 60


def test_imports_are_of_fresh_processes():
    torch_alone, ours, ratio = import_figures(1)
    assert 0.05 < torch_alone.value < ours.value * 1.5
    assert ratio.value == pytest.approx(ours.value / torch_alone.value)


def test_the_command_prints_targets_beside_what_was_measured(monkeypatch):
    monkeypatch.setattr(host, "call_figures", lambda arch: [Figure(f"{arch.value} call", 9.0, "µs", 5.0)])
    monkeypatch.setattr(host, "backward_figures", lambda arch: [Figure(f"{arch.value} backward", 12.0, "µs", 15.0)])
    monkeypatch.setattr(host, "compile_figures", lambda *key: [Figure("-".join(map(str, key[1:])), 1.0, "s", 5.0)])
    monkeypatch.setattr(host, "import_figures", lambda repetitions: [])
    done = CliRunner().invoke(main, "host --arch sm_90a --head-dim 64 --full --repetitions 2 --markdown".split())
    assert done.exit_code == 0, done.output
    assert "| sm_90a call | 9 | µs | 5 | MISSED |" in done.stdout
    assert "| sm_90a backward | 12 | µs | 15 | met |" in done.stdout
    assert "| 64-False-2 | 1 | s | 5 | met |" in done.stdout

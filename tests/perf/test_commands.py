"""The measuring commands from the command line, with a made-up clock in the place of the GPU."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from perf import command_line
from perf import results as results_module
from perf import sweep as sweeping
from perf.__main__ import main
from perf.results import read_results
from perf.timing import Ceilings
from tests.testing.clock import FakeDevice
from tests.testing.providers import Absent, Reference

GRID = "--head-dim 16 --heads 2,1 --seqlen 8 --seqlen 24 --tokens 48".split()


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A machine with two right providers, one that lies and one that is not installed."""
    device = FakeDevice()
    providers = [Reference("cute-fa", device, 2.0), Reference("FA2", device, 3.0), Absent()]
    monkeypatch.setattr(command_line, "CudaDevice", lambda: device)
    monkeypatch.setattr(command_line, "PROVIDERS", {provider.name: provider for provider in providers})
    monkeypatch.setattr(results_module, "_FOLDER", tmp_path)
    ceilings = Ceilings(dict.fromkeys((torch.bfloat16, torch.float16), 1.0), gbps=1.0)
    monkeypatch.setattr(sweeping, "measure_ceilings", lambda device, dtypes, effort: ceilings)
    return device


def invoke(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def test_sweep_writes_and_resumes(device, tmp_path):
    device.notes.append("clocks are not recorded: no NVML")
    done = invoke("sweep", *GRID)
    assert done.exit_code == 0, done.output
    (csv,) = tmp_path.glob("fake-h100/*-sweep.csv")
    table = read_results(csv)
    assert len(table) == 3 * 2 * 2
    assert csv.with_suffix(".parquet").exists()
    assert "clocks are not recorded" in done.stderr
    assert "fwd bf16 2×24 d16 h2/1 causal: cute-fa 2 ms, FA2 3 ms, absent skipped" in done.stderr.replace("\n", " ")
    gbps = table[(table.provider == "cute-fa") & (table.seqlen_k == 24)].gbps.iloc[0]
    assert f"{gbps:.0f} GB/s" in done.stdout
    again = invoke("sweep", *GRID, "--mask", "full")
    assert again.exit_code == 0, again.output
    assert again.stderr.count("already there") == 2
    assert len(read_results(csv)) == len(table)


def test_sweep_of_chosen_providers_into_a_chosen_file(device, tmp_path):
    file = tmp_path / "mine.csv"
    done = invoke("sweep", *GRID, "--provider", "FA2", "--mask", "causal", "--direction", "bwd", "--out", str(file))
    assert done.exit_code == 0, done.output
    table = read_results(file)
    assert set(table.provider) == {"FA2"}
    assert set(table.direction) == {"bwd"}
    assert set(table.window_right) == {0}


def test_retry_measures_again_what_was_not_measured(device, tmp_path, monkeypatch):
    file = tmp_path / "mine.csv"
    small = [*GRID, "--mask", "full", "--out", str(file)]
    invoke("sweep", *small)
    now = {"absent": Reference("absent", device)} | {
        name: provider for name, provider in command_line.PROVIDERS.items() if name != "absent"
    }
    monkeypatch.setattr(command_line, "PROVIDERS", now)
    assert "already there" in invoke("sweep", *small).stderr
    assert "absent 1 ms" in invoke("sweep", *small, "--retry").stderr
    assert read_results(file).status.eq("ok").sum() == 6


def test_an_interrupted_sweep_keeps_what_it_has(device, tmp_path, monkeypatch):
    file = tmp_path / "mine.csv"

    class Interrupted(Reference):
        def prepare(self, inputs):
            if inputs.spec.seqlen_k == 24:
                raise KeyboardInterrupt
            return super().prepare(inputs)

    monkeypatch.setattr(command_line, "PROVIDERS", {"cute-fa": Interrupted("cute-fa", device)})
    done = invoke("sweep", *GRID, "--mask", "full", "--out", str(file))
    assert done.exit_code == 1
    for kept in (file, file.with_suffix(".parquet")):
        assert read_results(kept).seqlen_k.tolist() == [8]
    assert f"{file}andmine.parquet" in "".join(done.stderr.split())  # whatever the terminal's width


def test_a_wrong_kernel_of_ours_fails_and_of_a_peer_does_not(device, tmp_path, monkeypatch):
    for wrong, exit_code in (("FA2", 0), ("cute-fa", 1)):
        providers = {name: Reference(name, device, wrong=float(name == wrong)) for name in ("cute-fa", "FA2")}
        monkeypatch.setattr(command_line, "PROVIDERS", providers)
        done = invoke("sweep", *GRID, "--out", str(tmp_path / f"{wrong}.csv"))
        assert done.exit_code == exit_code, done.output
        assert "wrong" in done.stdout


def test_dry_run_needs_no_gpu():
    done = invoke("sweep", *GRID, "--dry-run", "--lengths", "skewed", "--page-size", "16", "--phase", "decode")
    assert done.exit_code == 0, done.output
    assert "decode" in done.stdout and "skewed pages of 16" in done.stdout
    choices = ("--query-tokens", "4", "--kv-dtype", "same", "--kv-dtype", "e5m2")
    done = invoke("sweep", *GRID, "--dry-run", "--phase", "decode", *choices)
    assert done.stdout.count("decode of 4") == 2 * done.stdout.count("cache in e5m2") > 0


def test_static_figures_of_what_no_kernel_serves():
    done = invoke("static", "--head-dim", "264", "--direction", "bwd")
    assert done.exit_code == 2 and "no kernel of these architectures serves" in done.stderr


def test_without_a_gpu_the_sweep_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = invoke("sweep", *GRID)
    assert done.exit_code == 2
    assert "no GPU" in done.stderr and "--dry-run" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--provider FA5", "'FA5': one of cute-fa, FA2, absent"),
        ("--heads 8,", "'8,': heads, or heads and heads_kv"),
        ("--window wide", "'wide': a number or none"),
        ("--seqlen 4096 --tokens 1024", "no problem of this grid"),
        ("--dtype e4m3", "sm_80 has no fp8"),
    ],
)
def test_refusals(device, monkeypatch, options, message):
    from cute_fa.semantics.types import SmArch

    monkeypatch.setattr(device, "arch", SmArch.SM_80)
    done = invoke("sweep", *options.split())
    assert done.exit_code == 2
    assert message in done.stderr

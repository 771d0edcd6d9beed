"""gpu-check's plan on a machine without a GPU: all of it is walked, with the simulator in the place of the GPU."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import cute_fa
from cute_fa.engine import recording
from cute_fa.tools.inputs import make_inputs
from perf.__main__ import main
from perf.gpu_check import dry_run, steps
from perf.gpu_check.steps import Plan
from perf.gpu_check.sweep import WORKLOADS
from perf.workload import Workload
from tests.perf.test_gpu_check import results_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def walk(tmp_path, monkeypatch):
    """Walks the plan for an architecture, of the first problems only those named, which are simulated: each costs
    seconds. Gives the log of the tests and the configs of all that was launched."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: gpu-check itself runs")

    def walked(arch: str, *simulated: str) -> tuple[str, list]:
        monkeypatch.setattr(steps, "served", lambda arch: simulated)
        out, keys = tmp_path / "out", tmp_path / "kernels.keys"
        monkeypatch.setenv("CUTE_FA_RECORD_KEYS", str(keys))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        done = CliRunner().invoke(main, ["gpu-check", "--dry-run", arch, "--minutes", "20", "--out", str(out)])
        assert done.exit_code == 0, done.output[-5000:]
        results = results_of(out / "summary.md")
        sanitized = {name for name in results if "check " in name}
        assert {results[name] for name in sanitized} == {"not run"}
        assert {result for name, result in results.items() if name not in sanitized} == {"ok"}
        assert results.keys() >= set(simulated)
        # Every test got as far as a launch, but for those that are named; none failed.
        log = (out / "tests.log").read_text()
        assert "SKIPPED" in log and "PASSED" not in log and "FAILED" not in log
        configs = [recording.config_of(line) for line in keys.read_text().splitlines()]
        assert {config.arch.value for config in configs} == {arch}
        return log, configs

    return walked


def families_of(configs: list) -> set[str]:
    return {type(config).__module__.rpartition(".")[0] for config in configs}


@pytest.mark.thorough
def test_the_whole_plan_is_walked(walk):
    problems = ("d128 causal", "backward d128", "backward d64, deterministic", "append", "walk of a range plan")
    log, configs = walk("sm_90a", *problems)
    kernels = {f"fa2_sm80.{part}" for part in ("forward", "split", "backward", "append", "ranges")}
    kernels |= {"fa3_sm90.forward", "fa3_sm90.decode", "fa3_sm90.backward"}
    assert families_of(configs) >= kernels and len(configs) > 250
    assert "tests/fa3_sm90/test_forward.py::" in log and "tests/fa4_sm100/test_forward.py::" not in log


@pytest.mark.thorough
def test_tests_of_kernels_run_where_the_kernels_do(walk, monkeypatch):
    """Blackwell's alone on Blackwell."""
    monkeypatch.setitem(steps.TESTS, "kernels", "fa3_sm90/test_forward fa4_sm100/test_forward")
    monkeypatch.delitem(steps.TESTS, "around them")
    monkeypatch.setattr(Plan, "_sweep", lambda plan: iter(()))
    log, configs = walk("sm_100a", "fp8 d256, pages", "split")
    assert families_of(configs) == {"fa4_sm100.forward", "fa2_sm80.split"}
    assert "tests/fa4_sm100/test_forward.py::" in log and "tests/fa3_sm90/test_forward.py::" not in log


GPU_TESTS = """
import pytest, torch
import cute_fa
from cute_fa.semantics.reference import expected

def launched():
    q = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16, device="cuda")
    return q, cute_fa.flash_attn_func(q, q, q)

def test_compares():
    q, out = launched()
    expected(q, q, q)

def test_compares_itself(): assert launched()[1].shape == "another"
def test_captures(): launched(); raise RuntimeError("Tried to instantiate dummy base class CUDAGraph")
def test_passes(): launched()
def test_compares_too_early(): expected(*torch.zeros(3, 1, 8, 2, 64))
def test_is_wrong(): cute_fa.flash_attn_func(1, 2, 3)
def test_is_wrong_later(): launched(); raise ValueError("a mistake")
def test_launches_nothing(): pass
"""


def test_a_dry_test_that_launches_nothing_or_is_wrong_fails(tmp_path):
    """What it would have launched is missing in a pack: that must not look like a test that was walked."""
    (tmp_path / "test_gpu.py").write_text(GPU_TESTS)
    options = ["-q", "-rsfp", "-p", "perf.gpu_check.dry_run", "--dry-gpu", "sm_90a", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *options, "-c", "/dev/null", str(tmp_path / "test_gpu.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    told = set(re.findall(r"^(PASSED|FAILED) .*::(\w+)", done.stdout, re.MULTILINE))
    wrong = "compares_too_early", "is_wrong", "is_wrong_later", "launches_nothing"
    assert told == {("FAILED", f"test_{name}") for name in wrong} | {("PASSED", "test_passes")}, done.stdout
    assert "3 skipped" in done.stdout


def test_tests_that_are_not_walked_exist(tmp_path):
    files = {file for step in Plan(tmp_path).steps() for file in step.command if file.startswith("tests/")}
    sources = "".join((ROOT / file).read_text() for file in files)
    assert all(f"def {name}(" in sources for name in dry_run.NOT_WALKED)


def test_a_dry_launch_makes_the_plan_of_a_gpu(tmp_path):
    """The kernel is that of 132 SMs and full size, and nothing is compiled; afterwards no GPU is believed in."""
    workload = Workload(seqlen=8192, tokens=16384, decode=True, heads=32, heads_kv=8)
    with cute_fa.record_keys(tmp_path / "keys"):
        dry_run.launch_once(workload, "sm_90a")
    (line,) = (tmp_path / "keys").read_text().splitlines()
    assert json.loads(line)["config"] == "fa3_sm90.decode.config:Fa3DecodeConfig"
    given = make_inputs(workload.spec(), "random", poison=False)  # the plan of the same call is forgotten
    with pytest.raises(cute_fa.errors.NoDeviceError):
        given.run(num_splits=0)


def test_a_dry_launch_under_a_plan_makes_its_walk(tmp_path):
    with cute_fa.record_keys(tmp_path / "keys"):
        dry_run.launch_once(Workload(seqlen=512, tokens=512, plan="random-10"), "sm_80")
    configs = [recording.config_of(line) for line in (tmp_path / "keys").read_text().splitlines()]
    assert families_of(configs) == {"fa2_sm80.ranges", "fa2_sm80.forward"} and configs[1].ranges
    assert (configs[0].tile_rows, configs[0].tile_columns) == configs[1].walk_shape


def test_the_sweep_begins_with_what_tells_most():
    assert len(set(WORKLOADS)) == len(WORKLOADS)
    assert [str(workload) for workload in WORKLOADS[:3]] == [
        "fwd bf16 2×8192 d128 h16/16 causal",
        "fwd bf16 2×8192 d128 h16/16 full",
        "bwd bf16 2×8192 d128 h16/16 causal",
    ]

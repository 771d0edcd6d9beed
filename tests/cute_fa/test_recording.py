"""Kernels that a program launches, written down, compiled ahead of time, and found again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import cute_fa
from cute_fa.engine import plan as plans
from cute_fa.engine.recording import Recorder, config_of, line_of
from cute_fa.semantics.errors import ArgumentError
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction, DType, SmArch
from cute_fa.tools.cli import _configs_of, main
from cute_fa.tools.warm import read_keys
from fa2_sm80.append.config import AppendConfig
from fa2_sm80.backward.entry import Fa2Backward
from fa3_sm90.backward.entry import Fa3Backward
from fa3_sm90.forward.entry import Fa3Forward

# A prompt with its gradients, then a step of decoding that appends; prints how many kernels were compiled.
PROGRAM = """
import torch, cute_fa
from cute_fa.engine import cache
q = torch.randn(1, 24, 2, 16, dtype=torch.bfloat16, requires_grad=True)
with cute_fa.simulate("sm_80"):
    cute_fa.flash_attn_func(q, q, q, causal=True).sum().backward()
    with torch.no_grad():
        step, pages = torch.randn(2, 1, 2, 16).bfloat16(), torch.zeros(8, 8, 2, 16).bfloat16()
        table = torch.arange(8, dtype=torch.int32).view(2, 4)
        for _ in range(2):
            cute_fa.flash_attn_with_kvcache(
                step, pages, pages.clone(), step, step, cache_seqlens=5, page_table=table, num_splits=2
            )
print(cache.stats.compiled)
"""


@pytest.fixture
def nothing_compiles(monkeypatch):
    monkeypatch.setattr(plans, "compiled", lambda config: types.SimpleNamespace(launch=lambda arguments: None))
    monkeypatch.setattr(plans, "PLANS", {})


def problem(**changes) -> AttentionProblem:
    sizes = dict(batch=1, seqlen_q=8, seqlen_k=8, num_heads=4, num_heads_kv=2, head_dim=64, head_dim_v=32)
    fields = dict(arch=SmArch.SM_90A, dtype=DType.BF16, softmax_scale=0.125)
    return AttentionProblem(**fields | sizes | changes)


CONFIGS = [
    Fa3Forward.configure(problem(page_size=16, window_left=3)),
    Fa2Backward.configure(problem(direction=Direction.BACKWARD, deterministic=True, softcap=2.0)),
    AppendConfig(
        SmArch.SM_80,
        dtype=DType.FP16,
        dtype_k=DType.E4M3,
        dtype_v=DType.E5M2,
        head_dim=64,
        head_dim_v=64,
        rotary_dim=32,
        page_size=8,
    ),
    Fa3Backward.configure(problem(direction=Direction.BACKWARD, alibi=True, slopes_gradient=True)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_line_is_the_config(config):
    """Nested dataclasses, enums and None come back as they were."""
    assert config_of(line_of(config)) == config


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"head_dim": 64}',
        '{"config": "fa2_sm80.append.config:Gone"}',
        '{"config": "os:getcwd"}',
        '{"config": "builtins:dict"}',
        line_of(CONFIGS[2]).replace("head_dim_v", "head_dimension"),
        line_of(CONFIGS[2]).replace("sm_80", "sm_1"),
    ],
)
def test_lines_of_other_versions(line, tmp_path):
    with pytest.raises(ArgumentError, match="no config of this version"):
        config_of(line)
    file = tmp_path / "keys"
    file.write_text(f"# another version's\n{line}\n")
    done = CliRunner().invoke(main, ["compile", "--keys", str(file)])
    assert done.exit_code == 2 and "line 2" in done.stderr


def test_each_kernel_is_written_once(tmp_path, nothing_compiles):
    file = tmp_path / "keys"
    q = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16)
    with cute_fa.simulate("sm_80"):
        cute_fa.flash_attn_func(q, q, q)  # has a plan before the recording begins
        with cute_fa.record_keys(file):
            for scale in (0.1, 0.2):
                cute_fa.flash_attn_func(q, q, q, softmax_scale=scale)
            cute_fa.flash_attn_func(q, q, q)
            cute_fa.flash_attn_func(q, q, q, causal=True)
        cute_fa.flash_attn_func(q, q, q, softcap=1.0)
        with cute_fa.record_keys(file):
            cute_fa.flash_attn_func(q, q, q)
    configs = [config_of(line) for line in file.read_text().splitlines()]
    assert [config.compile_name for config in configs] == ["fa2_fwd_sm80_bf16_hd64", "fa2_fwd_sm80_bf16_hd64_right"]


@pytest.mark.without_races
def test_what_makes_walks_is_recorded_and_compiled_ahead_of_time(tmp_path, nothing_compiles):
    """range_attention launches the kernels that make walks before its own; a problem's options stand for both."""
    file = tmp_path / "keys"
    q = torch.zeros(70, 2, 64, dtype=torch.bfloat16, requires_grad=True)
    ranges = torch.tensor([[0, 70]], dtype=torch.int32)
    with cute_fa.simulate("sm_80"), cute_fa.record_keys(file):
        cute_fa.range_attention(q, q, q, ranges, ranges, deterministic=True).sum().backward()
    recorded = [config_of(line) for line in file.read_text().splitlines()]
    assert [config.compile_name for config in recorded] == [
        "ranges_sm80_rows128_columns64",
        "ranges_sm80_rows128_columns32",
        "fa2_fwd_sm80_bf16_hd64_ranges",
        "fa2_bwd_sm80_bf16_hd64_ranges_det",
    ]
    file.write_text(
        "--arch sm_80 --head-dim 64 --ranges 3 --backward --deterministic\n--arch sm_80 --head-dim 64 --ranges 1"
    )
    assert set(read_keys(file, _configs_of)) == set(recorded)


def test_a_file_whose_last_line_has_no_end(tmp_path, nothing_compiles):
    file = tmp_path / "keys"
    file.write_text("--head-dim 64")
    q = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16)
    with cute_fa.simulate("sm_80"), cute_fa.record_keys(file):
        cute_fa.flash_attn_func(q, q, q)
        cute_fa.flash_attn_func(q, q, q, causal=True)
    first, *recorded = file.read_text().splitlines()
    assert first == "--head-dim 64"
    assert [config_of(line).compile_name for line in recorded] == [
        "fa2_fwd_sm80_bf16_hd64",
        "fa2_fwd_sm80_bf16_hd64_right",
    ]


def test_threads_write_each_kernel_once(tmp_path):
    recorder, start = Recorder(tmp_path / "keys"), threading.Barrier(8)

    def record(_) -> None:
        start.wait()
        for config in CONFIGS:
            recorder(config)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(record, range(8)))
    assert sorted((tmp_path / "keys").read_text().splitlines()) == sorted(map(line_of, CONFIGS))


def test_where_a_recording_cannot_begin(tmp_path):
    known = dict(plans.PLANS)
    (tmp_path / "bytes").write_bytes(b"\xff\n")
    for file in (tmp_path, tmp_path / "bytes"):
        with pytest.raises(ArgumentError, match=r"record_keys\('"):
            cute_fa.record_keys(file).__enter__()
    assert known == plans.PLANS
    with pytest.raises(ArgumentError, match=r"record_keys\('.*keys'\): .*/gone is no folder"):
        cute_fa.record_keys(tmp_path / "gone" / "keys").__enter__()
    with cute_fa.record_keys(tmp_path / "keys"), pytest.raises(ArgumentError, match="another recording is on"):
        cute_fa.record_keys(tmp_path / "others").__enter__()
    environment = os.environ | {"CUTE_FA_RECORD_KEYS": str(tmp_path / "gone" / "keys")}
    done = subprocess.run([sys.executable, "-c", "import cute_fa"], env=environment, capture_output=True, text=True)
    assert "ArgumentError: CUTE_FA_RECORD_KEYS=" in done.stderr


def test_what_was_recorded_is_compiled_and_nothing_else_is_needed(tmp_path, monkeypatch):
    """Forward, backward, append and a split decoding step: compiled from the file, then found by the same program."""
    file, root = tmp_path / "keys", Path(__file__).parents[2]
    for name, value in {"CUTE_FA_CACHE_DIR": str(tmp_path / "cache"), "CUTE_FA_RECORD_KEYS": str(file)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUTE_FA_CACHE", raising=False)
    command = [sys.executable, "-c", PROGRAM]
    first = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    recorded = file.read_text().splitlines()
    names = sorted(config_of(line).compile_name for line in recorded)
    assert names == [
        "append_sm80_bf16_hd16_page8",
        "fa2_bwd_sm80_bf16_hd16_right",
        "fa2_fwd_sm80_bf16_hd16_right",
        "fa2_split_sm80_bf16_hd16_usedk_paged_parts",
    ]
    assert int(first.stdout) == len(recorded)
    monkeypatch.setenv("CUTE_FA_CACHE_DIR", str(tmp_path / "another"))
    done = CliRunner().invoke(main, ["compile", "--keys", str(file), "--jobs", "2", "--json"])
    assert done.exit_code == 0, done.output
    assert all(kernel["compiled"] for kernel in json.loads(done.stdout)["kernels"])
    again = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (again.returncode, again.stdout.strip()) == (0, "0"), again.stderr
    assert file.read_text().splitlines() == recorded

"""Kernels compiled ahead of time: the list of problems, and its kernels used where nothing can be compiled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from cute_fa.engine import cache
from cute_fa.tools.cli import main

# Runs attention where the DSL's compiler raises, and prints its greatest error and the cache's counts.
SHIPPED = """
import dataclasses, json, sys, torch
import cute_fa
from cute_fa.engine import cache
from tests.cute_fa.cache_kernels import forbid_compiling

forbid_compiling()
torch.manual_seed(0)
q, k, v = (torch.randn(1, 40, 2, 16, dtype=torch.bfloat16) for _ in range(3))
with cute_fa.simulate("sm_80"):
    out = cute_fa.flash_attn_func(q, k, v, causal=sys.argv[1] == "causal")
scores = (q.float().transpose(1, 2) @ k.float().permute(0, 2, 3, 1)) / 4
if sys.argv[1] == "causal":
    scores = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
error = (out.float() - (scores.softmax(-1) @ v.float().transpose(1, 2)).transpose(1, 2)).abs().max()
print(json.dumps({"error": error.item(), **dataclasses.asdict(cache.stats)}))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("CUTE_FA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CUTE_FA_CACHE", raising=False)
    return tmp_path / "cache"


def compile_keys(tmp_path, text: str, *options: str):
    file = tmp_path / "keys.txt"
    file.write_text(text)
    return CliRunner().invoke(main, ["compile", "--keys", str(file), *options])


def run_shipped(folder, mask: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"CUTE_FA_CACHE_DIR": str(folder)}
    return subprocess.run([sys.executable, "-c", SHIPPED, mask], env=environment, capture_output=True, text=True)


def test_a_folder_of_compiled_kernels_is_used_without_the_compiler(tmp_path, folder):
    keys = "# a layer, twice: lengths are no part of a kernel\n--head-dim 16\n\n--head-dim 16 --seqlen-q 64 --batch 2\n"
    done = compile_keys(tmp_path, keys, "--jobs", "2", "--json")
    assert done.exit_code == 0, done.output
    (kernel,) = json.loads(done.stdout)["kernels"]
    assert (kernel["name"], kernel["compiled"]) == ("fa2_fwd_sm80_bf16_hd16", True)
    assert "compiled in" in done.stderr
    again = compile_keys(tmp_path, keys)
    assert again.stdout == f"0 compiled, 1 there already, in {folder / 'kernels'}\n"

    shipped = tmp_path / "elsewhere"
    shutil.copytree(folder, shipped)
    shutil.rmtree(folder)
    ran = run_shipped(shipped, "full")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert result.pop("error") < 0.02
    assert result == {"compiled": 0, "loaded": 1, "stored": 0, "rejected": 0}
    missing = run_shipped(shipped, "causal")
    assert missing.returncode != 0
    assert "AssertionError: compiled again" in missing.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--head-dim 7", "line 2: no kernel serves fwd_sm80_bf16_hd7"),
        ("--head-dim many", "line 2: Invalid value for '--head-dim': 'many' is not a valid integer"),
        ("--causall", "line 2: No such option"),
        ("--head-dim '16", "line 2: No closing quotation"),
        ("--backward --pack-gqa", "line 2: --pack-gqa of a backward"),
        ("# 16", None),
    ],
)
def test_a_line_that_names_no_kernel_stops_before_any_compile(tmp_path, folder, line, message):
    text = "--head-dim 24\n" if message else ""
    done = compile_keys(tmp_path, f"{text}{line}\n")
    assert done.exit_code == 2
    assert (message or "no line names a problem") in done.stderr
    assert not folder.exists()


def test_a_cache_that_is_off_or_cannot_be_written(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("CUTE_FA_CACHE", "0")
    off = compile_keys(tmp_path, "--head-dim 16")
    assert (off.exit_code, off.stdout) == (2, "")
    assert "CUTE_FA_CACHE=0: there is no cache to compile into" in off.stderr
    monkeypatch.delenv("CUTE_FA_CACHE")
    folder.write_text("a file in the folder's place")
    unwritable = compile_keys(tmp_path, "--head-dim 16")
    assert (unwritable.exit_code, unwritable.stdout) == (2, "")
    assert f"fa2_fwd_sm80_bf16_hd16 was compiled but could not be stored in {cache.directory()}" in unwritable.stderr


def test_one_problem_or_a_list(tmp_path):
    for options in (["--keys", __file__, "--causal"], [], ["--keys", __file__, "--out", str(tmp_path)]):
        done = CliRunner().invoke(main, ["compile", *options])
        assert done.exit_code == 2
        assert "--out DIR with the options of one problem, or --keys FILE alone" in done.stderr

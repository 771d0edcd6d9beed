"""Planted faults: one wrong line, or one damaged synchronisation, in the FA4 forward must be noticed, by an error, a
deadlock or a wrong result. Of the latter a sample; docs/mutations.md has all."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch

import ptxsim
from cute_fa.semantics.tensors import problem_of
from cute_fa.semantics.types import DType, SmArch
from cute_fa.tools.inputs import Inputs, InputSpec, make_inputs
from fa4_sm100.forward.entry import Fa4Forward
from ptxsim.analysis.mutants import KINDS
from ptxsim.analysis.mutate import ESCAPED, read
from tests.testing.damaged_fa4 import FAULTS, DamagedConfig
from tests.testing.faults import changed_programs
from tests.testing.functions import ROOT, function_of
from tests.testing.mutations import note
from tests.testing.scores import scored, spikes, visits
from tests.testing.tiled_forward import Forward

FORWARD = Forward(Fa4Forward, SmArch.SM_100A)
PLAIN = InputSpec(1, 200, 450, 1, 1, 64)


def peaked(**changes) -> Inputs:
    return make_inputs(dataclasses.replace(PLAIN, **changes), "peaked")


def steps(level: float, first: float = 0.0, **spec) -> Inputs:
    """Scores of the blocks behind the first that is visited, and of the first query, differ from the others'."""
    behind = level * (visits(FORWARD.config_of(PLAIN), 511) > 0)
    of_first = torch.zeros(256)
    of_first[0] = first
    return scored([(torch.ones(256), behind), (of_first, torch.ones(511))], **spec)


def spiked(dtype: DType) -> Inputs:
    spec = InputSpec(1, 256, 1024, 1, 1, 64, dtype=dtype)
    return spikes(FORWARD.config_of(spec), spec)


# What shows each fault. Tests elsewhere hold the kernel to these problems.
SHOWN_BY = {
    "O keeps its scale": lambda: steps(40.0),
    "no row is outside": lambda: steps(40.0, dtype=DType.FP16),
    "sums alone are asked": lambda: spiked(DType.FP16),
    "sums are not asked": lambda: spiked(DType.FP16),
    "emulated scores are not looked at": lambda: spiked(DType.BF16),
    "a limit beyond fp16": lambda: spiked(DType.FP16),
    "a reference of 0 before the first key": lambda: steps(0.0, first=-1000.0, causal=True),
    "emulated beyond its range": lambda: steps(-150.0),
    "a key more at the right edge": lambda: peaked(causal=True),
    "a key less at the left edge": lambda: peaked(window=(100, 0)),
    "a key less at the end": lambda: peaked(),
    "O of the tile before": lambda: peaked(),
    "sums without the last columns": lambda: peaked(),
}


@pytest.mark.sampled
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_line_is_noticed(fault):
    given = SHOWN_BY[fault]()
    config = FORWARD.kernel.configure(problem_of(FORWARD.arch, given.call()))
    with pytest.raises((AssertionError, ptxsim.SimError)):
        FORWARD.check_with(DamagedConfig.like(config, fault), given)


@pytest.mark.sampled
@pytest.mark.parametrize("head_dim", [64, 256])
def test_tensor_memory_that_is_not_given_back_is_noticed(head_dim):
    """Of one CTA, and of a pair: so every other test holds the kernel to that."""
    given = peaked(head_dim=head_dim, head_dim_v=head_dim, seqlen_q=256)
    assert FORWARD.config_of(given.spec).ctas == (2 if head_dim == 256 else 1)
    without = changed_programs(lambda ptx: re.sub(r"^.*tcgen05\.dealloc.*$", "", ptx, flags=re.MULTILINE))
    with without, pytest.raises(ptxsim.SimError, match=r"ends without tcgen05\.dealloc of the 512 columns from 0"):
        FORWARD.check(given)


def test_damaged_synchronisation_is_noticed(tmp_path):
    """Waits that do not wait or wait for the other phase, missing barriers, fences, arrivals and commits: but for what
    is explained in ``tests.testing.mutations``."""
    out = tmp_path / "mutants.jsonl"
    script = ["tests/testing/attention.py", "--arch", "sm_100a", "--sms", "1", "--out", str(out)]
    script += ["--sample", "2", "--seeds", "0"]
    command = [sys.executable, "-W", "ignore", "-m", "ptxsim", "mutate", *script, "--", "cute-fa", "64", "causal"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=600)
    records = read(out)
    assert {record.kind for record in records} == set(KINDS) and len(records) > 10
    escaped = [record for record in records if record.outcome == ESCAPED]
    assert not [str(r) for r in escaped if not note("fa4_sm100", function_of(r.source), r.text)]

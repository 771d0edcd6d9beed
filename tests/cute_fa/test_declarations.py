"""What follows from the declarations of features, and what is written out beside them."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, get_type_hints

import pytest
import torch

import cute_fa
from cute_fa.api import attention, kvcache
from cute_fa.api.peers import PeerArguments
from cute_fa.device import backward_arguments as backward_device
from cute_fa.device import split_forward as split_host
from cute_fa.device import split_parts, split_walk
from cute_fa.device import tiled_backward as backward_host
from cute_fa.device import tiled_forward as tiled_host
from cute_fa.device.forward_arguments import ForwardArguments
from cute_fa.device.split_arguments import SplitArguments
from cute_fa.device.tile_scheduler import TileGrid
from cute_fa.engine import contract
from cute_fa.engine.operators import schema
from cute_fa.semantics import names, reference
from cute_fa.semantics.append_problem import AppendProblem
from cute_fa.semantics.call import FIELDS, AppendCall, Call, Extras, Options
from cute_fa.semantics.options import flags_of, is_used, options_of, rows_of
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import DType, SmArch
from cute_fa.tools.trial import problem_of_spec
from fa2_sm80.append import arguments as append_device
from fa2_sm80.append import entry as append_host
from fa2_sm80.forward import arguments as forward_device
from fa2_sm80.forward import entry as forward_host
from tests.fa2_sm80 import test_forward as test_fa2_forward
from tests.fa2_sm80 import test_split as test_fa2_split
from tests.fa3_sm90 import test_decode as test_fa3_decode
from tests.testing import forward_grid
from tests.testing.cases import fa2_cases, spec_of

ROOT = Path(__file__).parents[2]
PROBLEM = AttentionProblem(
    arch=SmArch.SM_80,
    dtype=DType.BF16,
    batch=1,
    seqlen_q=1,
    seqlen_k=1,
    num_heads=1,
    num_heads_kv=1,
    head_dim=64,
    head_dim_v=64,
    softmax_scale=1.0,
)


def keywords(function) -> dict:
    """Keyword-only parameters with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def test_the_schema_follows_from_the_call():
    assert schema(Options) == (
        "SymInt? max_seqlen_q, SymInt? max_seqlen_k, float? softmax_scale, SymInt? window_left, SymInt? window_right, "
        "SymInt sink_tokens, float softcap, SymInt num_splits, str? family, bool? pack_gqa, str persistent, "
        "bool deterministic, str? out_dtype, SymInt? promote_every, str v_layout, "
        "SymInt seqlen_k_per_split, str names"
    )

    class Mixed(NamedTuple):
        a: torch.Tensor
        b: torch.Tensor | None
        c: int

    assert schema("Tensor q", Mixed, written=("a",)) == "Tensor q, Tensor(a!) a, Tensor? b, SymInt c"
    arguments = torch.ops.cute_fa.append_kv.default._schema.arguments
    assert [argument.name for argument in arguments] == list(AppendCall._fields)
    written = [argument.name for argument in arguments if argument.alias_info is not None]
    assert written == ["k_cache", "v_cache", "k_row_descale", "v_row_descale"]


def test_flat_and_back():
    q = torch.zeros(1)
    call = Call.made(q, q, q, softcap=2.0, learnable_sink=q)
    assert call.extras == Extras(learnable_sink=q) and call.options == Options(softcap=2.0)
    assert Call.of(call.flat()) == call and len(call.flat()) == len(FIELDS)
    assert call.changed(num_splits=3, seqused_q=q).options.num_splits == 3
    with pytest.raises(ValueError, match="softcapp"):
        call.changed(softcapp=1.0)


@pytest.mark.parametrize("function", [cute_fa.flash_attn_func, cute_fa.flash_attn_varlen_func])
def test_public_defaults_are_the_options(function):
    given = keywords(function)
    for name, default in Options._field_defaults.items():
        if name in given and name != "seqlen_k_per_split":
            assert given[name] == default, name
    assert given["seqlen_k_per_split"] is given["batch_invariant"] is None  # the environment's
    assert given["window_size"] == (None, None) and given["causal"] is False
    tensors = [name for name in Extras._fields if name in given]
    assert tensors and all(given[name] is None for name in tensors)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (cute_fa.flash_attn_func, attention.AttentionOptions),
        (cute_fa.flash_attn_varlen_func, attention.VarlenOptions),
        (cute_fa.flash_attn_with_kvcache, kvcache.CacheOptions),
    ],
)
def test_a_type_checker_sees_the_arguments_that_there_are(function, options):
    declared = get_type_hints(options).keys() - get_type_hints(PeerArguments).keys()
    returns = {"return_lse", "return_attn_probs", "return_softmax_lse"}
    assert declared == keywords(function).keys() - returns


def test_a_type_checker_sees_the_options_of_the_reference():
    options = get_type_hints(reference.ReferenceOptions)
    hints = get_type_hints(reference.attention)
    assert options == {name: hints[name] for name in keywords(reference.attention) if name != "dtype"}


TUPLES = [
    (forward_host.Launch, forward_device.ForwardArguments),
    (split_host.Launch, SplitArguments),
    (split_host.Parts, split_parts.Parts),
    (split_host.Grid, split_walk.SplitGrid),
    (backward_host.Launch, backward_device.BackwardArguments),
    (backward_host.Scratch, backward_device.Scratch),
    (append_host.Launch, append_device.AppendArguments),
    (append_host.NewRows, append_device.NewRows),
    (append_host.Cache, append_device.Cache),
    (append_host.Rotary, append_device.Rotary),
    (tiled_host.Launch, ForwardArguments),
    (tiled_host.Grid, TileGrid),
    (contract.CommonArguments, forward_device.CommonArguments),
    (contract.LengthArguments, get_type_hints(forward_device.CommonArguments)["lengths"]),
    (contract.WindowArguments, get_type_hints(forward_device.CommonArguments)["window"]),
    (contract.Descales, get_type_hints(forward_device.CommonArguments)["descales"]),
]


@pytest.mark.parametrize(("host", "device"), TUPLES, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_the_device_takes_what_the_host_gives(host, device):
    assert host._fields == device._fields


def test_flags_follow_from_the_problem():
    assert not any(flags_of(PROBLEM).values())
    used = dataclasses.replace(PROBLEM, window_right=-3, softcap=2.0, alibi=True, page_size=16, seqused_k=True)
    expected = {"window_right": True, "softcap": True, "alibi": True, "seqused_k": True, "page_size": 16}
    assert {name: value for name, value in flags_of(used).items() if value} == expected
    # Sink tokens lift a left bound alone.
    assert not is_used(dataclasses.replace(PROBLEM, sink_tokens=4), "sink_tokens")
    assert is_used(dataclasses.replace(PROBLEM, sink_tokens=4, window_left=0), "sink_tokens")
    flags = {of.flag for of in options_of(AttentionProblem).values() if of.flag}
    fields = {field.name for field in dataclasses.fields(contract.FeatureConfig)}
    assert fields - flags == {"arch", "dtype", "dtype_k", "dtype_v", "out_dtype", "head_dim", "head_dim_v"}


def test_every_token_has_a_place_in_the_names():
    tokens = {of.token for of in options_of(AttentionProblem).values() if of.token}
    assert tokens < set(names._ORDER)
    assert set(names._ORDER) - tokens == {"out", "causal", "varlen", "gqa"}


@pytest.mark.parametrize("kind", [AttentionProblem, AppendProblem])
def test_rows_change_fields_that_there_are(kind):
    fields = {field.name for field in dataclasses.fields(kind)}
    for row, changes in rows_of(kind).items():
        assert changes.keys() <= fields, row
    # What a kernel could refuse has a row: every feature is changed by one, but for the two halves of a pair.
    changed = {name for changes in rows_of(kind).values() for name in changes}
    if kind is AttentionProblem:
        assert {name for name, of in options_of(kind).items() if of.flag or of.token} <= changed


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_serving_loads_neither_the_compiler_nor_the_simulator():
    code = """
import sys, torch, cute_fa
q = torch.zeros(1, 8, 2, 64, dtype=torch.float16)
try:
    cute_fa.flash_attn_func(q, q, q)
except cute_fa.errors.NoDeviceError:
    pass
cute_fa.TABLE.lookup(cute_fa.DispatchKey(cute_fa.SmArch.SM_90A, cute_fa.DType.BF16, 128, causal=True))
print([name for name in ("ptxsim", "cutlass") if name in sys.modules])
"""
    assert run_python(code).strip() == "[]"


def test_torchs_private_names_stand_in_one_module():
    private = []
    for file in ROOT.joinpath("cute_fa").rglob("*.py"):
        for line in file.read_text().splitlines():
            if "torch._" in line and "torch._neg" not in line and not line.lstrip().startswith(("#", '"""')):
                private.append((file.name, line.strip()))
    assert {name for name, _ in private} <= {"torch_internals.py", "transformers.py"}, private
    assert all("``torch._assert_async``" in line for name, line in private if name == "transformers.py")


def test_a_torch_without_the_private_names_takes_the_slow_path():
    """The same numbers, forward and backward, through the dispatcher alone."""
    code = """
import torch
del torch._C._len_torch_dispatch_stack
import cute_fa
from cute_fa.engine import torch_internals
from cute_fa import reference
assert not torch_internals.HAS_FAST_PATH
torch.manual_seed(0)
q, k, v = (torch.randn(1, 24, 2, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
with cute_fa.simulate("sm_80") as simulation:
    for _ in range(2):
        out, lse = cute_fa.flash_attn_func(q, k, v, causal=True, return_lse=True)
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
dout = torch.ones_like(out)
given = [t.detach() for t in (q, k, v)]
assert reference.check(out.detach(), lse.detach(), *given, causal=True).ok
errors = reference.check_gradients(reference.Gradients(*grads, None, None), *given, dout, None, causal=True)
assert all(error.ok for error in errors.values()), errors
print("right")
"""
    assert run_python(code).strip() == "right"


@pytest.mark.parametrize(
    ("cases", "left_out"),
    [
        (fa2_cases(test_fa2_forward.FEATURES), {"page_size", "cache_batch_idx", "cache_leftpad", "tree_mask"}),
        (fa2_cases(test_fa2_split.FEATURES), {"cache_batch_idx", "cache_leftpad"}),
        (fa2_cases(test_fa3_decode.FEATURES), {"cache_batch_idx", "cache_leftpad"}),
        (forward_grid.cases(), {"tree_mask"}),
    ],
    ids=["fa2", "split", "decode", "fa3 and fa4"],
)
def test_the_kernels_grids_have_every_feature_that_shapes_code(cases, left_out):
    """Where the rows of a cache lie has tests of its own, too, test_cache_index.py, and batch-invariant mode,
    test_batch_invariance.py; fp8 has a grid, range plans have tests in each kernel's folder; the random problems have
    everything."""
    flags = {name for name, of in options_of(AttentionProblem).items() if of.flag}
    problems = [problem_of_spec(spec_of(case), SmArch.SM_90A) for case in cases]
    used = {name for name in flags for problem in problems if is_used(problem, name)}
    of_fp8 = {"q_descale", "k_descale", "v_descale", "k_block_descale", "v_block_descale", "v_layout"}
    of_fp8 |= {"k_row_descale", "v_row_descale"}
    of_range_plans = {"ranges", "q_positions", "k_positions"}
    assert flags - used == left_out | of_fp8 | of_range_plans | {"seqlen_k_per_split"}


def test_without_the_private_names_no_tangent_is_dropped():
    """Forward-mode differentiation, which torch would let through with a tangent of zero."""
    code = """
import torch
del torch._C._functorch.get_interpreter_stack
import cute_fa
from torch.autograd import forward_ad
q, out = torch.ones(1, 8, 2, 64, dtype=torch.bfloat16), torch.empty(1, 8, 2, 64, dtype=torch.bfloat16)
with cute_fa.simulate("sm_80"), forward_ad.dual_level():
    dual = forward_ad.make_dual(q, q)
    for given in ({"q": dual, "k": q, "v": q}, {"q": q, "k": q, "v": dual}, {"q": q, "k": dual, "v": q, "out": out}):
        try:
            cute_fa.flash_attn_func(**given)
        except cute_fa.errors.NoBackwardError:
            print("refused")
"""
    assert run_python(code).split() == ["refused"] * 3

"""The torch operators: tracing, fakes, autograd, and what the launch path may not do."""

import os
import subprocess
import sys
import types

import pytest
import torch
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

import cute_fa
from cute_fa import flash_attn_func, flash_attn_varlen_func
from cute_fa.engine import plan as plans
from cute_fa.engine import worlds
from cute_fa.engine import worlds as simulation
from cute_fa.engine.compiler import CompiledKernel
from cute_fa.engine.worlds import num_sms
from cute_fa.semantics import reference
from cute_fa.semantics.call import FIELDS, TENSORS, Call
from cute_fa.semantics.errors import ArgumentError, DeviceError, LengthError, NoBackwardError, NoDeviceError
from cute_fa.semantics.types import PersistentMode
from cute_fa.tools.inputs import InputSpec, make_inputs
from fa2_sm80.forward.entry import Fa2Forward

DENSE = InputSpec(batch=2, seqlen_q=40, seqlen_k=72, heads=4, causal=True)
PACKED = InputSpec(batch=3, seqlen_q=40, seqlen_k=72, heads=4, varlen_q=True, varlen_k=True, causal=True)


@pytest.fixture
def simulated():
    with cute_fa.simulate("sm_80") as simulation:
        yield simulation


def arguments(inputs, **changes):
    """Arguments of the operator for dense or packed causal inputs."""
    packed = {}
    if inputs.cu_seqlens_q is not None:
        packed = {"cu_seqlens_q": inputs.cu_seqlens_q, "cu_seqlens_k": inputs.cu_seqlens_k}
        packed |= {"max_seqlen_q": 40, "max_seqlen_k": 72}
    choices = {"window_right": 0, "pack_gqa": False, "persistent": "off"}
    return Call.made(inputs.q, inputs.k, inputs.v, **packed, **choices).changed(**changes).flat()


def test_schema_and_call_agree():
    for name in ("attention", "attention_out"):
        schema = getattr(torch.ops.cute_fa, name).default._schema
        names = [argument.name for argument in schema.arguments]
        assert names == [*FIELDS, *(["out"] if name == "attention_out" else [])]
    optional = [argument.name for argument in schema.arguments[: len(TENSORS)] if "Tensor" in str(argument.type)]
    assert optional == list(TENSORS)


@pytest.mark.parametrize("spec", [DENSE, PACKED], ids=["dense", "packed"])
def test_opcheck(simulated, spec):
    inputs = make_inputs(spec)
    call = arguments(inputs)
    library.opcheck(torch.ops.cute_fa.attention.default, tuple(call))
    out = torch.empty_like(inputs.q)
    library.opcheck(torch.ops.cute_fa.attention_out.default, (*call, out))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_dense(simulated, backend, dynamic):
    def model(q, k, v):
        out, lse = flash_attn_func(q * 1.0, k, v, causal=True, window_size=(-1, -1), return_lse=True)
        return out + 1.0, lse

    torch._dynamo.reset()
    traced = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    for seqlen_k in (72, 56):
        inputs = make_inputs(InputSpec(**{**vars(DENSE), "seqlen_k": seqlen_k}), seed=seqlen_k)
        tensors = (inputs.q, inputs.k, inputs.v)
        torch.testing.assert_close(traced(*tensors), model(*tensors), atol=0, rtol=0)


def test_compile_packed(simulated):
    def model(q, k, v, cu_q, cu_k, longest):
        choices = {"pack_gqa": False, "persistent": PersistentMode.OFF}
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, longest, 72, causal=True, **choices)

    torch._dynamo.reset()
    traced = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for seed, longest in ((0, 40), (1, 48)):
        inputs = make_inputs(InputSpec(**{**vars(PACKED), "seqlen_q": longest}), seed=seed)
        call = (inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_q, inputs.cu_seqlens_k, longest)
        torch.testing.assert_close(traced(*call), model(*call), atol=0, rtol=0)


def attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k):
    """The longest lengths are read from the device: while tracing, ints without a value."""
    longest = [cu_seqlens.diff().max().item() for cu_seqlens in (cu_seqlens_q, cu_seqlens_k)]
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, causal=True, return_lse=True)


def packed_tensors(seqlen_q: int, seed: int) -> list[torch.Tensor]:
    inputs = make_inputs(InputSpec(**{**vars(PACKED), "seqlen_q": seqlen_q}), seed=seed)
    return [inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_q, inputs.cu_seqlens_k]


@pytest.mark.sampled
@torch._dynamo.config.patch(capture_scalar_outputs=True, error_on_recompile=True)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_with_lengths_known_at_run_time(simulated, backend):
    torch._dynamo.reset()
    traced = torch.compile(attend_packed, fullgraph=True, backend=backend, dynamic=True)
    for seed, longest in ((0, 40), (1, 48)):
        results = []
        for function in (attend_packed, traced):
            tensors = packed_tensors(longest, seed)
            qkv = [t.requires_grad_() for t in tensors[:3]]
            out, lse = function(*tensors)
            results.append((out, lse, *torch.autograd.grad([out, lse], qkv, [torch.ones_like(out), lse.sin()])))
        torch.testing.assert_close(*results, atol=0, rtol=0)
        assert all(gradient.any() for gradient in results[0])


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_lengths_known_at_run_time_are_checked_then(simulated):
    def too_short(q, k, v, cu_seqlens_q, cu_seqlens_k):
        longest = cu_seqlens_q.diff().max().item() - 1
        return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, 72)

    torch._dynamo.reset()
    traced = torch.compile(too_short, fullgraph=True, backend="aot_eager")
    with pytest.raises(LengthError, match="max_seqlen_q=39: a sequence has 40 tokens"):
        traced(*packed_tensors(40, 0))


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_lengths_known_at_run_time_in_fakes_and_graphs(simulated, mode):
    tensors = packed_tensors(40, 0)
    graph = make_fx(attend_packed, tracing_mode=mode)(*tensors)
    torch.testing.assert_close(graph(*tensors), attend_packed(*tensors), atol=0, rtol=0)
    with FakeTensorMode(shape_env=ShapeEnv()) as fakes:
        tensors = [fakes.from_tensor(t, static_shapes=True) for t in tensors]
        tensors[0].requires_grad_()
        out, lse = attend_packed(*tensors)
        out.sum().backward()
    q = tensors[0]
    assert (out.shape, lse.shape, q.grad.shape) == (q.shape, (q.shape[1], q.shape[0]), q.shape)


def test_compile_out(simulated):
    def model(q, k, v):
        out = torch.empty_like(q)
        flash_attn_func(q, k, v, causal=True, out=out)
        return out

    torch._dynamo.reset()
    inputs = make_inputs(DENSE)
    traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    tensors = (inputs.q, inputs.k, inputs.v)
    torch.testing.assert_close(traced(*tensors), model(*tensors), atol=0, rtol=0)


def test_compiled_code_keeps_the_rules(simulated):
    torch._dynamo.reset()
    traced = torch.compile(lambda q: flash_attn_func(q, q, q), fullgraph=True, backend="eager")
    with pytest.raises(cute_fa.errors.UnsupportedKeyError, match="head_dim 300"):
        traced(torch.zeros(1, 8, 1, 304, dtype=torch.bfloat16)[..., :300])
    for mode in ("on", PersistentMode.ON):
        traced = torch.compile(lambda q, mode=mode: flash_attn_func(q, q, q, persistent=mode), backend="eager")
        with pytest.raises(cute_fa.errors.UnsupportedKeyError, match="persistent: this kernel launches"):
            traced(torch.zeros(1, 8, 1, 64, dtype=torch.bfloat16))


def test_the_operator_itself_checks_names(simulated):
    with pytest.raises(ArgumentError, match="persistent='always': one of auto, off, on"):
        torch.ops.cute_fa.attention(*arguments(make_inputs(DENSE), persistent="always"))


def test_fake_shapes_without_a_device():
    with FakeTensorMode():
        q = torch.empty(2, 40, 4, 64, dtype=torch.float16)
        kv = torch.empty(2, 72, 2, 64, dtype=torch.float16)
        out, lse = flash_attn_func(q, kv, kv[..., :32], return_lse=True)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((2, 40, 4, 32), q.dtype, (2, 4, 40), torch.float32)
        cu = torch.empty(3, dtype=torch.int32)
        out, lse = flash_attn_varlen_func(q.flatten(0, 1), kv, kv, cu, None, 40, None, return_lse=True)
        assert (out.shape, lse.shape) == ((80, 4, 64), (4, 80))
    q = torch.empty(2, 40, 4, 64, dtype=torch.float16, device="meta")
    assert flash_attn_func(q, q, q).shape == q.shape


def test_modes_see_the_operator(simulated):
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen = []
    inputs = make_inputs(DENSE)
    with Watch():
        watched = flash_attn_func(inputs.q, inputs.k, inputs.v, causal=True)
    assert torch.ops.cute_fa.attention.default in seen
    assert watched.equal(flash_attn_func(inputs.q, inputs.k, inputs.v, causal=True))


def test_what_is_written_in_place_has_no_gradient(simulated):
    inputs = make_inputs(DENSE)
    q = inputs.q.clone().requires_grad_()
    with torch.no_grad():
        assert not flash_attn_func(q, inputs.k, inputs.v, causal=True).requires_grad
    with pytest.raises(ArgumentError, match="out= with a tensor that requires a gradient"):
        flash_attn_func(q, inputs.k, inputs.v, causal=True, out=torch.empty_like(q))


def jvp(f, q):
    return torch.func.jvp(f, (q,), (q,))


def dual(f, q):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(q, q))


DERIVATIVES = {
    "grad": lambda f, q: torch.func.grad(lambda q: f(q).float().sum())(q),
    "vjp": torch.func.vjp,
    "grad of vmap": lambda f, q: torch.func.grad(lambda q: torch.vmap(f)(q[None]).float().sum())(q),
    "vmap of grad": lambda f, q: torch.vmap(torch.func.grad(lambda q: f(q).float().sum()))(q[None]),
    "jvp": jvp,
    "jvp of vmap": lambda f, q: jvp(torch.vmap(f), q[None]),
    "jvp of grad": lambda f, q: jvp(torch.func.grad(lambda q: f(q).float().sum()), q),
    "dual numbers": dual,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, for forward mode
@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("derivative", list(DERIVATIVES))
def test_no_transform_differentiates(simulated, derivative, out):
    """torch by itself would give an error about autograd.Function, or an answer without its tangent."""
    inputs = make_inputs(DENSE)

    def attention(q, k=inputs.k):
        into = {"out": torch.empty_like(q).detach()} if out else {}
        return flash_attn_func(q, k, inputs.v, causal=True, **into)

    refused = NoBackwardError
    if out and derivative in ("grad", "vjp", "vmap of grad", "jvp of grad"):
        refused = ArgumentError  # as without transforms: what is written in place has no gradient
    with pytest.raises(refused):
        DERIVATIVES[derivative](attention, inputs.q)
    assert not simulated.launches
    DERIVATIVES[derivative](lambda q: attention(inputs.q) + q, inputs.q)  # does not depend on the variable
    assert simulated.launches


def test_vmap(simulated):
    inputs = make_inputs(DENSE)
    q = torch.stack([inputs.q, 2 * inputs.q]).requires_grad_()
    out = torch.vmap(lambda q: flash_attn_func(q, inputs.k, inputs.v, causal=True))(q)
    for mapped, single in zip(out, q, strict=True):
        assert mapped.equal(flash_attn_func(single.detach(), inputs.k, inputs.v, causal=True))


def test_a_sink_that_needs_a_gradient(simulated):
    inputs = make_inputs(DENSE)
    sink = torch.zeros(4, requires_grad=True)
    with torch.no_grad():
        expected = flash_attn_func(inputs.q, inputs.k[:, :0], inputs.v[:, :0], learnable_sink=sink)
    assert flash_attn_func(inputs.q, inputs.k[:, :0], inputs.v[:, :0], learnable_sink=sink).equal(expected)


def test_one_launch_and_one_plan_for_equal_calls(simulated):
    inputs = make_inputs(DENSE)
    plans.PLANS.clear()
    for _ in range(3):
        flash_attn_func(inputs.q, inputs.k, inputs.v, causal=True)
    assert len(simulated.launches) == 3
    assert len(plans.PLANS) == 1
    flash_attn_func(inputs.q, inputs.k, inputs.v, causal=True, softmax_scale=0.5)
    assert len(plans.PLANS) == 2


def test_plans_do_not_grow_without_bound(simulated, monkeypatch):
    monkeypatch.setattr(plans, "_MAX_PLANS", 2)
    inputs = make_inputs(DENSE)
    for scale in (0.1, 0.2, 0.3):
        flash_attn_func(inputs.q, inputs.k[:, :0], inputs.v[:, :0], softmax_scale=scale)
    assert len(plans.PLANS) <= 2


def test_another_arch_makes_another_plan():
    inputs = make_inputs(DENSE)
    options = {"causal": True, "return_lse": True}
    for arch in ("sm_80", "sm_90a", "sm_80"):
        with cute_fa.simulate(arch) as simulation:
            out, lse = flash_attn_func(inputs.q, inputs.k, inputs.v, **options)
            assert len(simulation.launches) == 1
        assert reference.check(out, lse, inputs.q, inputs.k, inputs.v, causal=True).ok
    with pytest.raises(NoDeviceError):
        flash_attn_func(inputs.q, inputs.k, inputs.v, causal=True)


def test_kernels_are_told_how_many_sms_there_are(monkeypatch):
    """Those of the simulated GPU, once for each number: a plan of the same call for another one is not taken."""
    told = []

    def remember(cls, problem, config, tensors, num_sms, arguments=Fa2Forward.arguments):
        told.append(num_sms)
        return arguments(problem, config, tensors, num_sms)

    monkeypatch.setattr(Fa2Forward, "arguments", classmethod(remember))
    monkeypatch.setattr(plans, "PLANS", {})
    inputs = make_inputs(DENSE)
    for options in ({}, {"num_sms": 3}, {"num_sms": 7}, {}):
        with cute_fa.simulate("sm_80", **options) as simulation:
            assert simulation.sm_count == num_sms(inputs.q.device)
            inputs.run(family="fa2")
    assert told == [108, 3, 7]
    assert [(target.num_sms, plan.target.num_sms) for (target, *_), plan in plans.PLANS.items()] == [
        (n, n) for n in told
    ]
    defaults = {"sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90a": 132, "sm_100a": 148, "sm_103a": 148, "sm_120a": 188}
    for arch, published in defaults.items():
        with cute_fa.simulate(arch):
            assert num_sms(torch.device("cpu")) == published
    with pytest.raises(NoDeviceError):
        num_sms(torch.device("cpu"))


def test_sms_of_a_gpu_are_asked_for_once(monkeypatch):
    asked = []

    def properties(index):
        asked.append(index)
        return types.SimpleNamespace(major=9, minor=0, multi_processor_count=114 + index)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    simulation._gpu.cache_clear()
    try:
        for _ in range(2):
            assert [num_sms(torch.device("cuda", index)) for index in (0, 1)] == [114, 115]
            assert num_sms(torch.device("cuda")) == 115
            assert simulation.arch_of(torch.device("cuda", 0)).value == "sm_90a"
        assert asked == [0, 1]
    finally:
        simulation._gpu.cache_clear()
    with cute_fa.simulate("sm_80"), pytest.raises(DeviceError, match="cuda:0 while sm_80 is simulated"):
        num_sms(torch.device("cuda", 0))


def test_no_value_is_read_by_default(simulated, monkeypatch):
    def refuse(*_):
        raise AssertionError("a value of a tensor was read")

    inputs = make_inputs(PACKED)
    expected, _ = reference.attention(inputs.q, inputs.k, inputs.v, **inputs.options())
    monkeypatch.setattr(worlds, "checks_values", lambda: False)
    with monkeypatch.context() as patch:
        for method in ("item", "tolist", "cpu", "numpy", "__int__", "__bool__", "__index__", "__float__"):
            patch.setattr(torch.Tensor, method, refuse)
        out = inputs.run()
        patch.setattr(worlds, "checks_values", lambda: True)
        with pytest.raises(AssertionError, match="was read"):
            inputs.run()
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0)


@pytest.mark.sampled
@pytest.mark.parametrize(("value", "on"), [(None, "False"), ("0", "False"), ("1", "True")])
def test_checks_are_turned_on_by_the_environment(value, on):
    environment = {name: text for name, text in os.environ.items() if name != "CUTE_FA_CHECK"}
    if value is not None:
        environment["CUTE_FA_CHECK"] = value
    command = [sys.executable, "-c", "from cute_fa.engine import worlds; print(worlds.CHECK_VALUES)"]
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip() == on


def test_a_switch_is_0_or_1():
    environment = os.environ | {"CUTE_FA_CHECK": "off"}
    done = subprocess.run([sys.executable, "-c", "import cute_fa"], env=environment, capture_output=True, text=True)
    assert "ArgumentError: CUTE_FA_CHECK='off': must be 0 (off) or 1 (on)" in done.stderr


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_sizes_of_one_may_have_any_stride(arch, monkeypatch):
    """A dimension of size 1 keeps whatever stride a slice left it with; kernels get multiples of 16 bytes."""
    passed = []

    def remember(self, args, launch=CompiledKernel.launch):
        passed.append(args[0][:4])
        launch(self, args)

    monkeypatch.setattr(CompiledKernel, "launch", remember)
    inputs = make_inputs(InputSpec(batch=1, seqlen_q=40, seqlen_k=72, heads=1, heads_kv=1, causal=True))
    tensors = (inputs.q, inputs.k, inputs.v)
    odd = [t.as_strided(t.shape, (3, t.stride(1), 7, 1)) for t in tensors]
    with cute_fa.simulate(arch):
        torch.testing.assert_close(
            flash_attn_func(*odd, causal=True), flash_attn_func(*tensors, causal=True), atol=0, rtol=0
        )
        one_key = [tensors[0], *(t[:, :1].as_strided((1, 1, 1, 64), (5, 5, 5, 1)) for t in tensors[1:])]
        wide = torch.empty(40, 64, dtype=torch.bfloat16).as_strided((1, 40, 1, 64), (1, 64, 3, 1))
        out = flash_attn_func(*one_key, out=wide)
        torch.testing.assert_close(out, one_key[2].expand_as(out), atol=0, rtol=0)
    assert len(passed) == 3
    for arguments in passed:
        for tensor in arguments:
            assert tensor.stride(-1) == 1
            assert all(stride % 8 == 0 for stride in tensor.stride()[:-1])

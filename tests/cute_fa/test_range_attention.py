"""range_attention and RangePlan: paths, errors, figures, torch.compile. The kernels' folders have tests of numbers."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import library

import cute_fa
from cute_fa import RangePlan, range_attention
from cute_fa.api import ready_plans
from cute_fa.engine.range_plans import SortedRanges
from cute_fa.engine.table import TABLE
from cute_fa.semantics import reference
from cute_fa.semantics.errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    RangeError,
    ShapeError,
    StrideError,
    UnsupportedArgumentError,
)
from cute_fa.semantics.ranges import HostRanges
from cute_fa.semantics.tensors import is_spread
from cute_fa.semantics.types import Direction, DType, SmArch
from cute_fa.semantics.walk_layout import Header
from cute_fa.tools.inputs import InputSpec
from cute_fa.tools.trial import problem_of_spec
from tests.testing.simulated import unwritten_is_nan

HEADS, HEADS_KV, HEAD_DIM = 4, 2, 64


def tensors(host: HostRanges, seed: int = 0) -> list[torch.Tensor]:
    """q, k and v of a plan."""
    rng = torch.Generator().manual_seed(seed)
    shapes = ((host.total_q, HEADS), (host.total_k, HEADS_KV), (host.total_k, HEADS_KV))
    return [torch.randn(*shape, HEAD_DIM, generator=rng).bfloat16() for shape in shapes]


def on_device(host: HostRanges) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in (host.q_ranges, host.k_ranges, host.types))


def check(host: HostRanges, out, lse, q, k, v, **options):
    """Assert that a result is right."""
    q_ranges, k_ranges, types = on_device(host)
    given = {"q_ranges": q_ranges, "k_ranges": k_ranges, "attn_type_map": types, **options}
    assert reference.check(out[None], lse[None], q[None], k[None], v[None], **given).ok


PLANS = {
    "documents": ready_plans.causal_documents([50, 120, 30]),
    "blocks": ready_plans.block_diagonal([64, 40], [128, 64]),
    "window and globals": ready_plans.window_and_global(160, 30, 4),
    "streaming": ready_plans.streaming_llm(150, 150, 4, 32),
    "drafts": ready_plans.speculative_tree(6, 100, [-1, 0, 0, 1, 1]),
}
FITTING = {
    "documents": {"simple", "native", "merge"},
    "blocks": {"simple", "packed", "native", "merge"},
    "window and globals": {"native", "merge"},
    "streaming": {"native", "merge"},
    "drafts": {"native", "merge"},
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", PLANS)
def test_paths_agree(name):
    """Each path that a plan fits gives the reference's numbers, the learnable sink counted once; the others are
    refused."""
    host = PLANS[name]
    q, k, v = tensors(host)
    sink = torch.linspace(-1.0, 1.0, HEADS)
    with cute_fa.simulate("sm_80", race=True):
        for path in ("simple", "packed", "native", "merge"):
            if path not in FITTING[name]:
                with pytest.raises(RangeError, match=f"path='{path}': "):
                    RangePlan.build(host, path=path)
                continue
            plan = RangePlan.build(host, path=path)
            assert plan.path == path
            out, lse = range_attention(q, k, v, plan=plan, learnable_sink=sink, return_lse=True)
            check(host, out, lse, q, k, v, learnable_sink=sink)


def test_the_path_that_is_chosen():
    """The first that fits what the host knows; native of ranges on the device."""
    with cute_fa.simulate("sm_80"):
        assert RangePlan.build(PLANS["documents"]).path == "simple"
        shared = HostRanges([[0, 8], [0, 8], [8, 16]], [[0, 64], [64, 128], [0, 64]], None, 16, 128)
        plan = RangePlan.build(shared)
        assert plan.path == "packed" and "begins before" in plan.reasons["simple"]
        plan = RangePlan.build(PLANS["streaming"])
        assert plan.path == "native" and set(plan.reasons) == {"simple", "packed"}
        ranges = on_device(PLANS["documents"])
        plan = RangePlan.build(*ranges, total_q=200, total_k=200)
        assert plan.path == "native" and plan.host is None
        lists = [array.tolist() for array in (PLANS["documents"].q_ranges, PLANS["documents"].k_ranges)]
        assert RangePlan.build(*lists, [1, 1, 1], total_q=200, total_k=200).path == "simple"


def test_what_a_chosen_path_cannot_do_is_native():
    """ALiBi counts from row to row of the whole, and pages have no gradient: forced paths say so."""
    host = PLANS["blocks"]
    q, k, v = tensors(host)
    slopes = torch.full((HEADS,), 0.1)
    with cute_fa.simulate("sm_80"):
        out, lse = range_attention(q, k, v, plan=RangePlan.build(host), alibi_slopes=slopes, return_lse=True)
        check(host, out, lse, q, k, v, alibi_slopes=slopes)
        with pytest.raises(ArgumentError, match="path='simple' with alibi_slopes"):
            range_attention(q, k, v, plan=RangePlan.build(host, path="simple"), alibi_slopes=slopes)
        with pytest.raises(ArgumentError, match="path='packed' with a gradient: pages have none"):
            range_attention(q.requires_grad_(), k, v, plan=RangePlan.build(host, path="packed"))


def test_merged_parts_name_no_pair_twice():
    twice = HostRanges([[0, 8], [0, 8]], [[0, 40], [30, 64]], None, 8, 64)
    q, k, v = tensors(twice)
    with cute_fa.simulate("sm_80"):
        with pytest.raises(RangeError, match="path='merge': a pair that two ranges name would count twice"):
            range_attention(q, k, v, plan=RangePlan.build(twice, path="merge"))
        out, lse = range_attention(q, k, v, plan=RangePlan.build(twice, path="native"), return_lse=True)
        check(twice, out, lse, q, k, v)


def test_gradients_of_all_paths():
    host = PLANS["documents"]
    q, k, v = tensors(host)
    rng = torch.Generator().manual_seed(1)
    dout = torch.randn(host.total_q, HEADS, HEAD_DIM, generator=rng).bfloat16()
    dlse = torch.randn(HEADS, host.total_q, generator=rng)
    names = dict(zip(("q_ranges", "k_ranges", "attn_type_map"), on_device(host), strict=True))
    given = (q[None], k[None], v[None], dout[None], dlse[None])
    expected = reference.expected_gradients(*given, **names)
    with cute_fa.simulate("sm_80", race=True):
        for path in ("simple", "native", "merge"):
            variables = [t.detach().requires_grad_() for t in (q, k, v)]
            result = range_attention(*variables, plan=RangePlan.build(host, path=path), return_lse=True)
            grads = torch.autograd.grad(result, variables, (dout, dlse))
            errors = expected.check(reference.Gradients(*(grad[None] for grad in grads), None, None))
            assert all(error.ok for error in errors.values()), (path, errors)


def test_segment_offsets():
    """LA Flash's form, on the host and on the device, where what lies outside the offsets counts for nothing."""
    q_ranges, k_ranges = [[0, 8], [8, 20]], [[0, 30], [40, 50], [10, 22]]
    host = HostRanges.from_segment_offsets(q_ranges, k_ranges, [0, 1], [0, 2, 3], total_q=20, total_k=64)
    q, k, v = tensors(host)
    types, offsets = torch.tensor([0, 1]).int(), torch.tensor([1, 3, 4]).int()
    more = torch.tensor([[60, 64], *k_ranges, [50, 60]]).int()
    with cute_fa.simulate("sm_80"):
        out, lse = range_attention(
            q, k, v, torch.tensor(q_ranges).int(), more, types, segment_offsets=offsets, return_lse=True
        )
        check(host, out, lse, q, k, v)
        plan = RangePlan.build(q_ranges, k_ranges, [0, 1], segment_offsets=[0, 2, 3], total_q=20, total_k=64)
        assert plan.host is not None and torch.equal(plan.mask(), torch.from_numpy(host.mask()))


def test_no_ranges_no_rows():
    """Queries in no range, and plans without queries, keys or ranges at all."""
    with cute_fa.simulate("sm_80", race=True):
        for total_q, total_k, count in ((5, 7, 0), (0, 7, 0), (5, 0, 0), (0, 0, 0), (200, 7, 1)):
            ranges = torch.zeros(count, 2, dtype=torch.int32)
            q, k, v = (torch.randn(n, 2, 64).half() for n in (total_q, total_k, total_k))
            for sink in (None, torch.tensor([0.5, -2.0])):
                out, lse = range_attention(q, k, v, ranges, ranges, learnable_sink=sink, return_lse=True)
                assert out.shape == (total_q, 2, 64) and not out.any()
                expected = torch.full((2, 1), -math.inf) if sink is None else sink[:, None]
                assert torch.equal(lse, expected.expand(2, total_q))


BAD = {
    "reversed": ({"q_ranges": [[5, 3]]}, RangeError, r"q_ranges\[0\]=\(5, 3\): a range ends where it begins or behind"),
    "beyond": ({"k_ranges": [[0, 65]]}, RangeError, r"k_ranges\[0\]=\(0, 65\): between 0 and the 64 keys"),
    "negative": ({"q_ranges": [[-1, 3]]}, RangeError, r"q_ranges\[0\]=\(-1, 3\): between 0 and the 8 queries"),
    "type": ({"attn_type_map": [4]}, RangeError, r"attn_type_map\[0\]=4: one of 0 \(full\)"),
    "counts": ({"k_ranges": [[0, 1], [1, 2]]}, ShapeError, r"k_ranges \(2, 2\): \(1, 2\) is needed"),
    "types": ({"attn_type_map": [0, 0]}, ShapeError, r"attn_type_map \(2,\): \(1,\) is needed"),
    "columns": ({"q_ranges": [[0, 1, 2]]}, ShapeError, r"q_ranges \(1, 3\): \(1, 2\) is needed"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_plans(name):
    """One clear error each, on the device and on the host."""
    changes, error, message = BAD[name]
    ranges = {"q_ranges": [[0, 8]], "k_ranges": [[0, 64]], "attn_type_map": [0]} | changes
    q, k, v = (torch.zeros(n, 1, 64).bfloat16() for n in (8, 64, 64))
    with cute_fa.simulate("sm_80"):
        given = {name: torch.tensor(value).int() for name, value in ranges.items()}
        with pytest.raises(error, match=message):
            range_attention(q, k, v, **given)
        with pytest.raises(error):
            RangePlan.build(**ranges, total_q=8, total_k=64)


def test_ranges_that_are_no_int32_tensors_on_the_device():
    q, k, v = (torch.zeros(n, 1, 64).bfloat16() for n in (8, 64, 64))
    ranges = torch.tensor([[0, 8]]).int()
    with cute_fa.simulate("sm_80"):
        with pytest.raises(DTypeError, match="q_ranges is int64: int32 is needed"):
            range_attention(q, k, v, ranges.long(), ranges)
        with pytest.raises(ArgumentError, match="q_ranges is list"):
            range_attention(q, k, v, [[0, 8]], ranges)
        with pytest.raises(ArgumentError, match="k_ranges is NoneType"):
            range_attention(q, k, v, ranges)
        with pytest.raises(DeviceError, match="k_ranges is on meta and q_ranges on cpu"):
            range_attention(q, k, v, ranges, ranges.to("meta"))
        with pytest.raises(ArgumentError, match="path='simple' with ranges on cpu: only the host can tell"):
            RangePlan.build(ranges, ranges, total_q=8, total_k=64, path="simple")
        with pytest.raises(ArgumentError, match="path='fast': one of simple, packed, native, merge"):
            RangePlan.build(ranges, ranges, total_q=8, total_k=64, path="fast")
        with pytest.raises(ArgumentError, match="q_ranges Tensor, k_ranges list: all tensors, or none"):
            RangePlan.build(ranges, [[0, 8]], total_q=8, total_k=64)
        with pytest.raises(ArgumentError, match="total_q=None: an int is needed"):
            RangePlan.build(ranges, ranges, total_k=64)


def test_arguments_that_do_not_fit_together():
    host = PLANS["streaming"]
    q, k, v = tensors(host)
    ranges, positions = on_device(host), torch.zeros(150, dtype=torch.int32)
    slopes = torch.full((HEADS,), 0.1)
    with cute_fa.simulate("sm_80"):
        plan = RangePlan.build(host)
        for given, error, message in (
            ({"plan": plan, "q_ranges": ranges[0]}, ArgumentError, "q_ranges with plan: the plan has its ranges"),
            ({"plan": host}, ArgumentError, "plan is HostRanges: a RangePlan is needed"),
            ({"plan": plan, "q_positions": positions}, ArgumentError, "q_positions without k_positions"),
            (
                {"plan": plan, "q_positions": positions, "k_positions": positions},
                ArgumentError,
                "q_positions without alibi_slopes",
            ),
            (
                {"plan": plan, "q_positions": positions[1:], "k_positions": positions, "alibi_slopes": slopes},
                ShapeError,
                r"q_positions \(149,\): \(150,\) is needed",
            ),
            ({"plan": plan, "score_mod": None}, ArgumentError, "score_mod: no such argument"),
            ({"plan": plan, "return_max_logits": True}, UnsupportedArgumentError, "return_max_logits=True"),
        ):
            with pytest.raises(error, match=message):
                range_attention(q, k, v, **given)
        with pytest.raises(ShapeError, match=r"q \(149, 4, 64\): the plan is of 150 rows"):
            range_attention(q[1:], k, v, plan=plan)
        with pytest.raises(ShapeError, match=r"q has shape \(1, 150, 4, 64\): \(total_q, heads, head_dim\) is needed"):
            range_attention(q[None], k, v, plan=plan)


def test_rows_that_lie_too_far_apart():
    """Kernels count the bytes from tile to tile in 32 bits: a clear error, and gradients of such outputs are copied."""
    host = PLANS["streaming"]
    q, k, v = tensors(host)
    # memory that nothing touches
    spread = torch.empty(150, 2**22, dtype=torch.bfloat16)[:, : HEADS_KV * HEAD_DIM].unflatten(1, (HEADS_KV, HEAD_DIM))
    rule = r"k has strides .*: under a range plan 256 rows must lie within 2 GiB"
    with cute_fa.simulate("sm_80"), pytest.raises(StrideError, match=rule):
        range_attention(q, spread, v, plan=RangePlan.build(host))
    assert is_spread(spread) and not is_spread(spread[:1]) and not is_spread(k)


def test_magi_names():
    """Its hints change nothing, and several sink logits of a head are one."""
    host = PLANS["streaming"]
    q, k, v = tensors(host)
    sink = torch.randn(3, HEADS)
    with cute_fa.simulate("sm_80"):
        plan = RangePlan.build(host)
        out, lse = range_attention(q, k, v, plan=plan, sink=sink, sm_margin=8, auto_range_merge=True, return_lse=True)
        check(host, out, lse, q, k, v, learnable_sink=sink.exp().sum(0).log())
        with pytest.raises(ArgumentError, match="sink and learnable_sink: two names of one argument"):
            range_attention(q, k, v, plan=plan, sink=sink, learnable_sink=sink[0])


def test_values_are_checked_where_asked_for_alone(monkeypatch):
    """Without checks nothing is read by the host, and what leaves the tensors is cut off."""
    inside = HostRanges([[0, 8], [2, 8]], [[0, 64], [10, 64]], [0, 1], 8, 64)
    q, k, v = tensors(inside)
    q_ranges = torch.tensor([[-5, 300], [2, 8]]).int()
    k_ranges = torch.tensor([[-7, 2**31 - 1], [10, 64]]).int()
    with cute_fa.simulate("sm_80", race=True):
        monkeypatch.setattr("cute_fa.engine.worlds.checks_values", lambda: False)
        out, lse = range_attention(q, k, v, q_ranges, k_ranges, torch.tensor([0, 1]).int(), return_lse=True)
    check(inside, out, lse, q, k, v)


@pytest.mark.parametrize("mask_capacity", [3, 5])
def test_masks_that_find_no_room(mask_capacity, monkeypatch):
    """Tiles of queries without room are NaN, the others right, and the checks say how much room there should be."""
    host = ready_plans.causal_documents([500])
    q, k, v = tensors(host)
    ranges = on_device(host)
    build = {"total_q": 500, "total_k": 500, "mask_capacity": mask_capacity}
    with cute_fa.simulate("sm_80", race=True):
        message = f"mask_capacity={mask_capacity}: [1-3] tiles of 128 queries found no room"
        with pytest.raises(RangeError, match=message):
            range_attention(q, k, v, plan=RangePlan.build(*ranges, **build))
        monkeypatch.setattr("cute_fa.engine.worlds.checks_values", lambda: False)
        plan = RangePlan.build(*ranges, **build)
        out = range_attention(q, k, v, plan=plan)
        rooms = plan.stats((128, 64))
    lost = out.isnan().any(-1).any(-1)
    assert rooms["no_room"] == len(lost[::128][lost[::128]]) == 4 - mask_capacity // 2
    assert torch.equal(lost, out.isnan().all(-1).all(-1))
    assert rooms["mask_tiles"] == 8
    kept = HostRanges([[0, 500]], [[0, 500]], [1], 500, 500)
    given = dict(zip(("q_ranges", "k_ranges", "attn_type_map"), on_device(kept), strict=True))
    right, _ = reference.attention(q[None], k[None], v[None], **given)
    assert (out[~lost].float() - right[0][~lost]).abs().amax() < 0.03


def test_stats_and_pictures():
    host = HostRanges([[0, 256], [256, 384]], [[0, 384], [0, 100]], None, 400, 384)
    with cute_fa.simulate("sm_80"):
        plan = RangePlan.build(host, path="native")
        assert plan.stats() == {
            "ranges": 2,
            "area": 256 * 384 + 128 * 100,
            "density": (256 * 384 + 128 * 100) / (400 * 384),
            "tiles": 7,
            "masked": 1,
            "imbalance": 3 / (7 / 3),
            "path": "native",
            "no_room": 0,
            "mask_tiles": 1,
        }
        assert plan.stats((256, 64))["tiles"] == 6 + 2
        assert torch.equal(plan.mask(), torch.from_numpy(host.mask()))
        ax = plan.plot(tile=(128, 64))
        assert np.array_equal(ax.images[0].get_array(), host.mask())
        assert len(ax.get_xticks(minor=True)) == 7 and len(ax.get_yticks(minor=True)) == 4
        plt.close(ax.figure)


def test_a_walk_is_made_once():
    """For all layers, heads and dtypes of one kernel's tiles."""
    host = PLANS["streaming"]
    with cute_fa.simulate("sm_80") as simulation:
        plan = RangePlan.build(host)
        q, k, v = tensors(host)
        for _ in range(2):
            range_attention(q, k, v, plan=plan)
        range_attention(q[:, :2].half(), k.half(), v.half(), plan=plan)
        walks = [launch for launch in simulation.launches if "RangeWalk" in launch.name]
    assert len(walks) == 1 and len(simulation.launches) == 4


def test_shapes_of_walks_follow_from_no_length_and_no_number_of_heads():
    """A plan asks for the tiles of a problem of one query, one key and one head."""
    for arch in SmArch:
        for head_dim, head_dim_v in ((64, 64), (128, 128), (192, 128), (256, 256), (96, 40)):
            for dtype in (DType.BF16, DType.FP16):
                shapes = set()
                for rows, heads in ((1, 1), (40, 16), (300, 8), (5000, 2), (100_000, 1)):
                    sizes = {"seqlen_q": rows, "seqlen_k": 2 * rows, "heads": heads, "heads_kv": 1, "batch": 1}
                    spec = InputSpec(head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype, ranges=3, **sizes)
                    problem = problem_of_spec(spec, arch)
                    own = [TABLE.lookup(problem).configure(problem).walk_shape]
                    for deterministic in (False, True):
                        backward = {"direction": Direction.BACKWARD, "deterministic": deterministic}
                        problem = problem_of_spec(spec, arch, **backward)
                        config = TABLE.lookup(problem).configure(problem)
                        own += [config.key_walk_shape, config.dq_walk_shape]
                    shapes.add(tuple(own))
                assert len(shapes) == 1, (arch, head_dim, shapes)


def test_work_grows_with_the_visible_area():
    """Blocks that the forward visits, from the instructions that it executes: those that the mask touches, at most 1.15
    times as many."""
    with cute_fa.simulate("sm_80") as simulation:

        def executed(host: HostRanges) -> int:
            q, k, v = (torch.zeros(n, 1, 64).bfloat16() for n in (host.total_q, host.total_k, host.total_k))
            range_attention(q, k, v, plan=RangePlan.build(host, path="native"))
            return simulation.launches[-1].warp_instrs

        full = [executed(HostRanges([[0, 2048]], [[0, keys]], None, 2048, 2048)) for keys in (64, 128)]
        masked = [executed(HostRanges([[0, 2048]], [[0, keys]], None, 2048, 2048)) for keys in (60, 124)]
        a_block = (full[1] - full[0]) / 16
        a_masked_block = (masked[0] - full[0]) / 16 + a_block
        nothing = full[0] - 16 * a_block
        assert masked[1] - masked[0] == pytest.approx(full[1] - full[0], rel=0.02)
        for count in (10, 100, 1000):
            rng = np.random.default_rng(count)
            length = np.minimum(2048, (4096 / count**0.5 * rng.random((2, count))).astype(int) + 1)
            start = (rng.random((2, count)) * (2049 - length)).astype(int)
            q_ranges, k_ranges = np.stack([start, start + length], -1)
            host = HostRanges(q_ranges, k_ranges, rng.integers(0, 4, count), 2048, 2048)
            touched = host.mask().reshape(16, 128, 32, 64).any((1, 3)).sum()
            least = nothing + touched * a_block
            assert least * 0.98 <= executed(host) <= nothing + 1.15 * touched * a_masked_block, count


def test_torch_compile():
    """fullgraph, with a plan outside and inside, forward and backward, and with sizes that vary."""
    host = PLANS["streaming"]
    ranges = on_device(host)

    def outside(q, k, v):
        return range_attention(q, k, v, plan=plan)

    def inside(q, k, v, q_ranges, k_ranges, types):
        own = RangePlan.build(q_ranges, k_ranges, types, total_q=q.shape[0], total_k=k.shape[0])
        return range_attention(range_attention(q, k, v, plan=own), k, v, plan=own)

    def without(q, k, v, q_ranges, k_ranges, types):
        return range_attention(q, k, v, q_ranges, k_ranges, types)

    q, k, v = (tensor.requires_grad_() for tensor in tensors(host))
    dout = torch.randn(host.total_q, HEADS, HEAD_DIM).bfloat16()
    with cute_fa.simulate("sm_80"):
        plan = RangePlan.build(host)
        for function, more in ((outside, ()), (inside, ranges)):
            torch.compiler.reset()
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            results = []
            for run in (function, compiled):
                out = run(q, k, v, *more)
                results.append((out, *torch.autograd.grad(out, (q, k, v), dout)))
            assert all(map(torch.equal, *results))
        torch.compiler.reset()
        compiled = torch.compile(without, fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (150, 121):
            given = (q[:rows].detach(), k.detach(), v.detach(), ranges[0].clamp(max=rows), *ranges[1:])
            assert torch.equal(compiled(*given), without(*given))
    torch.compiler.reset()


def test_opcheck():
    ranges = on_device(PLANS["streaming"])
    with cute_fa.simulate("sm_80"), unwritten_is_nan():
        given = SortedRanges.of_queries(*ranges, 150, 150)
        library.opcheck(torch.ops.cute_fa.range_walk.default, (*given, 150, 150, 128, 64, False, 8, 5))


def test_walks_of_another_kind_are_refused():
    """By the operator itself."""
    q, k, v = (torch.zeros(1, n, 1, 64).bfloat16() for n in (8, 64, 64))
    call = cute_fa.api.attention.prepare(q, k, v)
    walk = torch.zeros(Header.WORDS, dtype=torch.int32)
    with cute_fa.simulate("sm_80"):
        for changes, error, message in (
            ({"query_walk": walk.long()}, DTypeError, "query_walk is int64"),
            ({"query_walk": walk[None]}, ShapeError, r"query_walk has shape \(1, 8\)"),
            ({"query_walk": walk, "window_left": 4}, ArgumentError, "window_left with a range plan"),
            ({"q_positions": torch.zeros(512).int()}, ArgumentError, "q_positions without k_positions"),
        ):
            with pytest.raises(error, match=message):
                cute_fa.engine.attention.attention(call.changed(**changes))

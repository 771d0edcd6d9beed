"""The heuristic of the FA3 backward for wide head_dims: stages, shared memory, refusals, and what the table gives."""

import pytest

from cute_fa.engine.table import TABLE
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction, DType, PersistentMode, SmArch
from fa3_sm90.backward.config import BARRIER_BYTES, PipelineSpec
from fa3_sm90.backward.entry import Fa3Backward
from fa3_sm90.backward_split.entry import Fa3SplitBackward
from tests.testing.cases import refusals, small_problem

FP8 = {"dtype": DType.E4M3} | dict.fromkeys(("dtype_k", "dtype_v", "out_dtype"))


def problem(**changes) -> AttentionProblem:
    sizes = {"head_dim": 256, "head_dim_v": 256}
    return small_problem(**{"arch": SmArch.SM_90A, "direction": Direction.BACKWARD, **sizes, **changes})


def configure(**changes):
    return Fa3SplitBackward.configure(problem(**changes))


def sizes(head_dim: int, head_dim_v: int) -> dict[str, int]:
    return {"head_dim": head_dim, "head_dim_v": head_dim_v}


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_pair_of_head_dims_fits(head_dim):
    for head_dim_v in range(8, 257, 8):
        assert Fa3SplitBackward.supports(problem(**sizes(head_dim, head_dim_v))) == []
        c = configure(**sizes(head_dim, head_dim_v))
        d, dv = (-(-width // 16) * 16 for width in (head_dim, head_dim_v))
        assert (c.head_dim_padded, c.head_dim_v_padded) == (d, dv)
        # rows of 64 elements of 2 bytes; of every stage P, and two fp32 statistics of a query
        keys = 128 * ((1 + c.stages) * (d + dv) + 64 * c.stages) + 512 * c.stages + BARRIER_BYTES
        queries = 128 * ((2 + c.k_stages) * d + (2 + c.v_stages) * dv) + BARRIER_BYTES
        assert c.smem_bytes == keys <= SmArch.SM_90A.smem_bytes
        assert c.query_kernel_smem_bytes == queries <= SmArch.SM_90A.smem_bytes
        for pipelines in (c.key_pipelines, c.query_pipelines):
            assert 8 * 2 * sum(spec.stages for spec in pipelines) <= BARRIER_BYTES


@pytest.mark.parametrize(
    ("head_dims", "stages"),
    [
        ((256, 256), (2, 2, 1)),
        ((256, 192), (2, 2, 2)),
        ((224, 192), (2, 2, 2)),
        ((192, 192), (3, 2, 2)),
        ((192, 128), (3, 2, 2)),
    ],
)
def test_as_many_stages_as_fit(head_dims, stages):
    c = configure(**sizes(*head_dims))
    assert (c.stages, c.k_stages, c.v_stages) == stages


@pytest.mark.parametrize(
    ("change", "cluster"),
    [
        ({"seqlen_k": 128}, 2),
        ({"seqlen_k": 129}, 1),  # the third tile would have a cluster of its own
        ({"seqlen_k": 17 * 64}, 2),  # which is one of many
        ({"seqlen_k": 4096, "seqused_q": True}, 2),
        ({"seqlen_k": 4096, "seqused_k": True}, 1),
        ({"seqlen_k": 4096, "varlen_k": True}, 1),
        ({"seqlen_k": 4096, "window_right": 0}, 1),
        ({"seqlen_k": 4096, "window_left": 50}, 1),
    ],
    ids=str,
)
def test_clusters_of_full_attention(change, cluster):
    c = configure(**change)
    assert c.cluster == cluster
    by_name = {spec.name: spec for spec in c.key_pipelines}
    # the warps of both release a stage in both; K, V and P are a CTA's own
    assert {(spec.ctas, spec.consumer_warps) for spec in (by_name["q"], by_name["dout"])} == {(cluster, 8 * cluster)}
    assert {by_name[name].ctas for name in ("k", "v", "p")} == {1}


def test_pipelines_are_data():
    c = configure(**sizes(256, 192), window_right=0)
    assert c.key_pipelines == (
        PipelineSpec("k", 1, 64 * 512, 8),
        PipelineSpec("v", 1, 64 * 384, 8),
        PipelineSpec("q", 2, 64 * 512 + 256, 8),
        PipelineSpec("dout", 2, 64 * 384 + 256, 8),
        PipelineSpec("p", 2, 0, 4, producer_warps=4),
    )
    assert c.query_pipelines == (
        PipelineSpec("q", 2, 64 * 512, 4),
        PipelineSpec("dout", 2, 64 * 384, 4),
        PipelineSpec("k", 2, 64 * 512, 8),
        PipelineSpec("v", 2, 64 * 384, 8),
    )


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"window_right": 0}, "right"),
        ({"softcap": 1.0}, "softcap"),
        ({"varlen_k": True}, "cuk"),
        ({"lse_gradient": True}, "dlse"),
        ({"alibi": True, "slopes_gradient": True}, "dslopes"),
    ],
)
def test_each_feature_has_its_own_code(change, flag):
    plain, changed = configure(), configure(**change)
    assert plain != changed
    assert flag in changed.compile_name.split("_") and flag not in plain.compile_name.split("_")


def test_deterministic_gradients_are_the_only_ones():
    assert configure(deterministic=True) == configure() and not configure().dq_sums


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (FP8, "codes have no backward"),
        ({"head_dim": 264}, "head_dim 264"),
        ({"page_size": 16, "seqused_k": True}, "page_size 16: this kernel reads contiguous K and V only"),
        ({"num_heads": 4, "pack_gqa": True}, "pack_gqa: this kernel's tiles hold the queries of one head"),
        ({"persistent": PersistentMode.ON}, "persistent: this kernel launches one CTA for each tile"),
        ({"cache_leftpad": True}, "cache_leftpad: a cache has no gradient"),
        ({"batch": 2**14, "num_heads": 128, "num_heads_kv": 128, "seqlen_k": 2**16}, "2147483648 tiles of keys"),
    ],
)
def test_reasons_name_the_value(change, word):
    assert any(word in reason for reason in Fa3SplitBackward.supports(problem(**change)))


def test_refused_stages_say_why():
    first, second = refusals(Fa3SplitBackward, problem())
    assert first == "shared memory: 289,280 bytes of K, V, Q, dO and P 256 and 256 wide, 232,448 available"
    assert second == "shared memory: 263,168 bytes of Q, dO, K and V 256 and 256 wide, for dQ, 232,448 available"


@pytest.mark.parametrize("head_dims", [(128, 136), (136, 8), (256, 256), (64, 200)], ids=str)
def test_the_table_takes_it_where_sums_do_not_fit(head_dims):
    assert "registers" in Fa3Backward.supports(problem(**sizes(*head_dims)))[0]
    for deterministic in (False, True):
        assert TABLE.lookup(problem(**sizes(*head_dims), deterministic=deterministic)) is Fa3SplitBackward
    assert TABLE.lookup(problem(**sizes(128, 128))) is Fa3Backward
    assert TABLE.lookup(problem(arch=SmArch.SM_100A)).family == "fa2"

"""Which configs of the FA3 forward are kernels at all, whether or not the heuristic would choose them."""

from __future__ import annotations

from collections.abc import Iterator

from cute_fa.engine.contract import smem_objection
from cute_fa.semantics.problem import DESCALE_BLOCK, AttentionProblem
from fa3_sm90.common.wgmma import WGMMA_M
from fa3_sm90.forward.config import BARRIER_BYTES, FP8_K, REGISTERS, Fa3ForwardConfig, cluster_objection, forward_config

_MOST_KEYS = 256  # columns of a wgmma
_MOST_CHAINS = 4


def config_objection(problem: AttentionProblem, config: Fa3ForwardConfig) -> str | None:
    """Why a config with the problem's features does not serve it: field, value and rule. Spilled registers are none."""
    return next(_objections(problem, config), None)


def _objections(problem: AttentionProblem, config: Fa3ForwardConfig) -> Iterator[str]:
    c = config
    if c.warpgroups not in REGISTERS:
        yield f"warpgroups {c.warpgroups}: {' or '.join(map(str, REGISTERS))}"
    if c.pack_gqa not in (1, problem.gqa_ratio) or c.pack_gqa > WGMMA_M:
        yield f"pack_gqa {c.pack_gqa}: 1, or the gqa_ratio {problem.gqa_ratio} up to {WGMMA_M}"
    step = FP8_K if problem.dtype.is_fp8 else 16
    if c.tile_n % step or not step <= c.tile_n <= _MOST_KEYS:
        yield f"tile_n {c.tile_n}: a multiple of {step} up to {_MOST_KEYS}"
    if problem.page_size is not None and c.tile_n > 32 * c.key_rows:
        yield f"tile_n {c.tile_n}: at most 32 pieces of {c.key_rows} rows of pages"
    if problem.promote_every is not None and c.tile_n != problem.promote_every * FP8_K:
        yield f"tile_n {c.tile_n}: promote_every {problem.promote_every} asks for {problem.promote_every * FP8_K}"
    if c.block_descales and DESCALE_BLOCK % c.tile_n:
        yield f"tile_n {c.tile_n}: descales are of blocks of {DESCALE_BLOCK} keys"
    if c.cluster not in (1, 2):
        yield f"cluster {c.cluster}: 1 or 2"
    if c.cluster > 1 and (refused := cluster_objection(problem)):
        yield refused
    if problem.ranges and c.walk_shape != (own := forward_config(problem).walk_shape):
        yield f"tiles {c.walk_shape}: walks of a range plan are made for {own}"
    most = (BARRIER_BYTES // 16 - c.warpgroups) // (len(c.pipelines) - c.warpgroups)
    if not 2 <= c.stages <= most:  # the last block's V is awaited before the one before it is released
        yield f"stages {c.stages}: 2 to {most}"
    columns = c.promoted_columns
    if columns is not None and not problem.dtype.is_fp8:
        yield f"promoted_columns {columns}: of fp8 alone"
    if columns is not None and (columns < 8 or columns % 8 or c.head_dim_v_padded % columns):
        yield f"promoted_columns {columns}: a multiple of 8 that divides {c.head_dim_v_padded}"
    if not 1 <= c.max_chains <= _MOST_CHAINS:
        yield f"max_chains {c.max_chains}: 1 to {_MOST_CHAINS}"
    if refused := smem_objection(c.smem_bytes, f"tiles of {c.tile_n} keys in {c.stages} stages", c.arch):
        yield refused

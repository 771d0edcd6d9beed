"""The FA4 forward as the dispatch table sees it: what it serves, how it is configured, what it is launched with."""

from __future__ import annotations

from cute_fa.device.tiled_forward import TiledForward
from cute_fa.device.tiling import num_ctas
from cute_fa.engine.contract import Candidate
from cute_fa.semantics.problem import AttentionProblem
from fa4_sm100.forward.config import TILE_M, Fa4ForwardConfig, forward_candidates, forward_config


class Fa4Forward(TiledForward):
    """Forward with TMA and tcgen05, for sm_100a and sm_103a: fp16 and bf16 with head_dim 8 … 256, fp8 with 16 … 256.

    Sums of fp8 products are kept in fp32, whatever ``promote_every`` asks for."""

    family = "fa4"
    rows = TILE_M
    l2_bytes = 126 * 2**20  # of a B200 (cudaDevAttrL2CacheSize)

    @classmethod
    def configure(cls, problem: AttentionProblem) -> Fa4ForwardConfig:
        return forward_config(problem)

    @classmethod
    def candidates(cls, problem: AttentionProblem) -> list[Candidate]:
        return forward_candidates(problem)

    @classmethod
    def ctas(cls, config: Fa4ForwardConfig) -> int:
        return config.ctas

    @classmethod
    def num_ctas(cls, config: Fa4ForwardConfig, tiles: int, num_sms: int) -> int:
        """As many as tiles need: those that run take over the tiles of those that do not yet. Under a range plan they
        walk over fixed ones."""
        return tiles * config.ctas if config.handed else num_ctas(tiles, num_sms, config.persistent)

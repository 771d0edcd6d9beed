"""The FA3 forward as the dispatch table sees it: what it serves, how it is configured, what it is launched with."""

from __future__ import annotations

from cute_fa.device.tiled_forward import TiledForward
from cute_fa.device.tiling import num_ctas
from cute_fa.engine.contract import Candidate
from cute_fa.semantics.problem import AttentionProblem
from fa3_sm90.common.wgmma import WGMMA_M
from fa3_sm90.forward.config import Fa3ForwardConfig, forward_candidates, forward_config, promotion_objection
from fa3_sm90.forward.rules import config_objection


class Fa3Forward(TiledForward):
    """Forward with TMA and wgmma, for sm_90a: fp16 and bf16 with head_dim 8 … 256, fp8 with 16 … 256."""

    family = "fa3"
    rows = WGMMA_M
    l2_bytes = 50 * 2**20  # of an H100 and an H200 (NVIDIA H100 whitepaper)
    tuned = Fa3ForwardConfig

    @classmethod
    def configure(cls, problem: AttentionProblem) -> Fa3ForwardConfig:
        config = forward_config(problem)
        return config if cls.override is None else cls.override(problem, config)

    @classmethod
    def config_objection(cls, problem: AttentionProblem, config: Fa3ForwardConfig) -> str | None:
        return config_objection(problem, config)

    @classmethod
    def candidates(cls, problem: AttentionProblem) -> list[Candidate]:
        return forward_candidates(problem)

    @classmethod
    def ctas(cls, config: Fa3ForwardConfig) -> int:
        return config.cluster

    @classmethod
    def num_ctas(cls, config: Fa3ForwardConfig, tiles: int, num_sms: int) -> int:
        """Whole clusters, one at least."""
        return config.cluster * num_ctas(tiles, max(num_sms // config.cluster, 1), config.persistent)

    @classmethod
    def promotion_objection(cls, problem: AttentionProblem) -> str | None:
        return promotion_objection(problem)

"""How the FA2 forward is built: a frozen config, and the one heuristic that chooses it."""

from __future__ import annotations

from dataclasses import dataclass

from cute_fa.kernel import KernelConfig
from cute_fa.problem import AttentionProblem
from cute_fa.types import DType


def padded(head_dim: int) -> int:
    """head_dim as the tiles hold it: m16n8k16 consumes it in steps of 16, the rest is zero."""
    return (head_dim + 15) // 16 * 16


@dataclass(frozen=True)
class Fa2ForwardConfig(KernelConfig):
    """Everything that shapes the machine code. ``tile_m`` queries and ``tile_n`` keys a step, each warp owning 16 or 32
    of the queries; ``stages`` key blocks in flight. The flags say which features exist, never their values."""

    dtype: DType
    head_dim: int
    head_dim_v: int
    tile_m: int
    tile_n: int
    num_warps: int
    stages: int
    window_left: bool = False
    window_right: bool = False
    sink_tokens: bool = False
    softcap: bool = False
    alibi: bool = False
    learnable_sink: bool = False
    cu_seqlens_q: bool = False
    cu_seqlens_k: bool = False
    seqused_q: bool = False
    seqused_k: bool = False

    @property
    def num_threads(self) -> int:
        return 32 * self.num_warps

    @property
    def rows_per_thread(self) -> int:
        """Queries of which a thread holds scores: two for each m16n8k16 of its warp."""
        return 2 * (self.tile_m // (16 * self.num_warps))

    @property
    def head_dim_padded(self) -> int:
        return padded(self.head_dim)

    @property
    def head_dim_v_padded(self) -> int:
        return padded(self.head_dim_v)

    @property
    def smem_bytes(self) -> int:
        """Q (reused by O), and K and V of every stage."""
        q_or_o = self.tile_m * max(self.head_dim_padded, self.head_dim_v_padded)
        k_and_v = self.stages * self.tile_n * (self.head_dim_padded + self.head_dim_v_padded)
        return self.dtype.bytes * (q_or_o + k_and_v)

    @property
    def compile_name(self) -> str:
        head_dim = f"hd{self.head_dim}" + (f"v{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        flags = {
            "left": self.window_left,
            "right": self.window_right,
            "sink": self.sink_tokens,
            "softcap": self.softcap,
            "alibi": self.alibi,
            "lsink": self.learnable_sink,
            "cuq": self.cu_seqlens_q,
            "cuk": self.cu_seqlens_k,
            "usedq": self.seqused_q,
            "usedk": self.seqused_k,
        }
        return "_".join(
            ["fa2_fwd", self.arch.short, self.dtype.value, head_dim, *(name for name, on in flags.items() if on)]
        )

    def build(self):
        from fa2_sm80.forward_kernel import build

        return build(self)


def forward_config(problem: AttentionProblem) -> Fa2ForwardConfig:
    """Tiles by head_dim and shared memory.

    Up to head_dim 128 four warps own 32 queries each: every K and V fragment that ldmatrix brings then feeds two
    m16n8k16, and shared memory stays below the tensor cores (with 16 queries a warp it would need 1.3 times their
    time on an A100). Beyond that O alone would fill the registers, so eight warps own 16 each. Where a CTA has 99 KB,
    head_dim 256 takes 64 queries instead of 128.
    """
    tile_m, tile_n, num_warps, stages = _tiles(problem)
    return Fa2ForwardConfig(
        arch=problem.arch,
        dtype=problem.dtype,
        head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v,
        tile_m=tile_m,
        tile_n=tile_n,
        num_warps=num_warps,
        stages=stages,
        window_left=problem.window_left is not None,
        window_right=problem.window_right is not None,
        sink_tokens=problem.sink_tokens > 0 and problem.window_left is not None,
        softcap=problem.softcap > 0.0,
        alibi=problem.alibi,
        learnable_sink=problem.learnable_sink,
        cu_seqlens_q=problem.varlen_q,
        cu_seqlens_k=problem.varlen_k,
        seqused_q=problem.seqused_q,
        seqused_k=problem.seqused_k,
    )


def _tiles(problem: AttentionProblem) -> tuple[int, int, int, int]:
    """(tile_m, tile_n, num_warps, stages)."""
    widest = max(padded(problem.head_dim), padded(problem.head_dim_v))
    if widest <= 96:
        return 128, 64, 4, 2
    if widest <= 128:
        # The main loop takes 6.7 instructions per score with 48 keys and 8.7 with 32; with 64, or with 48 and two of
        # these features, registers spill.
        crowded = (problem.window_left is not None) + problem.alibi + (problem.softcap > 0.0) >= 2
        return (128, 32, 4, 2) if crowded else (128, 48, 4, 1)
    if widest <= 192 or problem.arch.smem_bytes >= 160 * 1024:
        return 128, 64, 8, 1
    return 64, 64, 4, 1

"""Attention kernels in NVIDIA's CuTe DSL behind one dispatch table and one API that drops in for ``flash_attn``."""

from cute_fa import compat, errors, reference
from cute_fa.api import flash_attn_func, flash_attn_varlen_func
from cute_fa.append import append_kv
from cute_fa.append_by_position import append_rows
from cute_fa.cache_requests import ChunkedPrefillRequest, ChunkLayout, PagedAttentionRequest, PagedKvCache
from cute_fa.dispatch import TABLE, DispatchKey, DispatchTable
from cute_fa.errors import CuteFaError
from cute_fa.kvcache import flash_attn_with_kvcache
from cute_fa.merge import merge_states
from cute_fa.problem import AttentionProblem
from cute_fa.requests import CumulativeSeqlens, Fa2BwdRequest, Fa2FwdRequest, Fa3FwdRequest, VarlenFwdRequest
from cute_fa.rotary import apply_rotary_emb
from cute_fa.simulation import simulate
from cute_fa.types import Direction, DType, KvLayout, MaskKind, PersistentMode, PositionBias, SmArch

__version__ = "0.1.0"

__all__ = [
    "TABLE",
    "AttentionProblem",
    "ChunkLayout",
    "ChunkedPrefillRequest",
    "CumulativeSeqlens",
    "CuteFaError",
    "DType",
    "Direction",
    "DispatchKey",
    "DispatchTable",
    "Fa2BwdRequest",
    "Fa2FwdRequest",
    "Fa3FwdRequest",
    "KvLayout",
    "MaskKind",
    "PagedAttentionRequest",
    "PagedKvCache",
    "PersistentMode",
    "PositionBias",
    "SmArch",
    "VarlenFwdRequest",
    "append_kv",
    "append_rows",
    "apply_rotary_emb",
    "compat",
    "errors",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "merge_states",
    "reference",
    "simulate",
]

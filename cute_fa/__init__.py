"""Attention kernels in NVIDIA's CuTe DSL behind one dispatch table and one API that drops in for ``flash_attn``."""

from cute_fa import compat, fp8, service
from cute_fa.api import ready_plans
from cute_fa.api.append import append_kv
from cute_fa.api.append_by_position import append_rows
from cute_fa.api.attention import flash_attn_func, flash_attn_varlen_func
from cute_fa.api.cache_requests import ChunkedPrefillRequest, ChunkLayout, PagedAttentionRequest, PagedKvCache
from cute_fa.api.kvcache import flash_attn_with_kvcache
from cute_fa.api.merge import merge_states
from cute_fa.api.range_plan import RangePlan
from cute_fa.api.ranges import range_attention
from cute_fa.api.requests import (
    CumulativeSeqlens,
    Fa2BwdRequest,
    Fa2FwdRequest,
    Fa3FwdFp8Request,
    Fa3FwdRequest,
    VarlenFwdRequest,
)
from cute_fa.api.rotary import apply_rotary_emb
from cute_fa.engine.bundles import use_bundles
from cute_fa.engine.recording import record_keys
from cute_fa.engine.table import TABLE, DispatchKey, DispatchTable
from cute_fa.engine.version import __version__
from cute_fa.engine.worlds import simulate
from cute_fa.semantics import errors, reference
from cute_fa.semantics.errors import CuteFaError
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction, DType, KvLayout, MaskKind, PersistentMode, PositionBias, SmArch
from cute_fa.service import AttentionService

__all__ = [
    "TABLE",
    "AttentionProblem",
    "AttentionService",
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
    "Fa3FwdFp8Request",
    "Fa3FwdRequest",
    "KvLayout",
    "MaskKind",
    "PagedAttentionRequest",
    "PagedKvCache",
    "PersistentMode",
    "PositionBias",
    "RangePlan",
    "SmArch",
    "VarlenFwdRequest",
    "__version__",
    "append_kv",
    "append_rows",
    "apply_rotary_emb",
    "compat",
    "errors",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "fp8",
    "merge_states",
    "range_attention",
    "ready_plans",
    "record_keys",
    "reference",
    "service",
    "simulate",
    "use_bundles",
]

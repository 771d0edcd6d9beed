"""``AttentionProblem``: one attention problem, validated once, holding every semantic choice."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from cute_fa.semantics.errors import (
    ArgumentError,
    EmptyBatchError,
    Fp8Error,
    LengthError,
    PageSizeError,
    ShapeError,
    WindowError,
)
from cute_fa.semantics.options import TensorOption, declares, option
from cute_fa.semantics.types import Direction, DType, MaskKind, PersistentMode, PositionBias, SmArch

INT32_MAX = 2**31 - 1
V_LAYOUTS = ("head_dim", "key_major")
PAGE_SIZES = tuple(2**exponent for exponent in range(11))  # 1 … 1024
_SIZES = ("num_heads", "num_heads_kv", "head_dim", "head_dim_v")
_KINDS = {"arch": SmArch, "dtype": DType, "direction": Direction, "persistent": PersistentMode} | dict.fromkeys(
    ("batch", "seqlen_q", "seqlen_k", *_SIZES, "sink_tokens", "num_splits", "seqlen_k_per_split"), int
)
# Keys of a sequence, counted from its first, that share the descales of a block.
DESCALE_BLOCK = 128
# Keys of a chunk in batch-invariant mode: whole key blocks in every kernel, and the default. Shorter ones find work for
# more SMs; each costs rows of O and LSE in fp32, written and read: for 64 rows of 128 1/8 of the bytes of K and V.
CHUNK_STEP, USUAL_CHUNK = 64, 1024
# Products of scale, cap and log2(e) must stay far inside fp32.
_LARGEST_FACTOR = 2.0**32

# The support table's rows about what every kind of problem has.
DTYPE_ROWS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp16": {"dtype": DType.FP16},
    "fp8 e4m3": {"dtype": DType.E4M3},
    "fp8 e5m2": {"dtype": DType.E5M2},
}
DTYPE_K_ROWS: dict[str, dict[str, Any]] = {
    "fp8 e4m3, k and v e5m2": {"dtype": DType.E4M3, "dtype_k": DType.E5M2, "dtype_v": DType.E5M2},
    "bf16, k and v e4m3": {"dtype_k": DType.E4M3, "dtype_v": DType.E4M3},
    "bf16, k and v int8": {"dtype_k": DType.INT8, "dtype_v": DType.INT8},
}
DESCALE_ROWS: dict[str, dict[str, Any]] = {
    "fp8 with descales": {"dtype": DType.E4M3, "q_descale": True, "k_descale": True, "v_descale": True},
}
BLOCK_DESCALE_ROWS: dict[str, dict[str, Any]] = {
    "fp8 with descales of blocks": {
        "dtype": DType.E4M3,
        "k_descale": True,
        "v_descale": True,
        "k_block_descale": True,
        "v_block_descale": True,
    },
}
ROW_DESCALE_ROWS: dict[str, dict[str, Any]] = {
    "bf16, k and v e4m3 with descales of rows": {
        "dtype_k": DType.E4M3,
        "dtype_v": DType.E4M3,
        "k_descale": True,
        "v_descale": True,
        "k_row_descale": True,
        "v_row_descale": True,
    },
}
POSITIONED = ("ranges", "alibi", "q_positions", "k_positions")
HEAD_DIM_ROWS: dict[str, dict[str, Any]] = {
    f"head_dim {size}": {"head_dim": size, "head_dim_v": size} for size in (8, 64, 128, 192, 256, 512)
}
HEAD_DIM_V_ROWS: dict[str, dict[str, Any]] = {"head_dim 192, head_dim_v 128": {"head_dim": 192}}


def descale(name: str, blocks: str = "", rows: str = "") -> TensorOption:
    """A tensor that fp8 codes are multiplied by: fp32 (batch, heads_kv), with the flag ``blocks`` (batch, heads_kv,
    blocks), with the flag ``rows`` (sequences or pages, rows, heads_kv, 1)."""
    return TensorOption(name, "float32", dimensions=2, strided=True, wider=blocks, cache_like=rows)


class LiteralWindow(NamedTuple):
    """A window whose bounds mean what they say, negative ones too: a left bound of −1 hides the diagonal and what lies
    left of it, a right bound of −1 the diagonal and what lies right of it, and where left + right < 0 nothing is
    visible. None alone is infinite. What FlashAttention 4 means by a window; taken as ``window_size`` everywhere.
    """

    left: int | None
    right: int | None

    @classmethod
    def of(cls, window_size: Any, name: str = "window_size") -> LiteralWindow:
        """The bounds that a caller gave, as they are: a pair of ints or None, or a tensor or array of two on the CPU; a
        bound that no int32 length can reach becomes None. ``name``: what the caller calls the window. Raises
        WindowError for anything else."""
        pair = (None, None) if window_size is None else window_size
        if not isinstance(pair, (tuple, list)):
            pair = _on_host(name, pair)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise WindowError(f"{name}={window_size!r}: a pair (left, right) is needed")
        return cls(_bound(f"{name} left", pair[0]), _bound(f"{name} right", pair[1]))


def normalize_window(window_size: Any, causal: bool, name: str = "window_size") -> tuple[int | None, int | None]:
    """(left, right) with None for infinite, causal folded in as right = min(right, 0); ``name``: what the caller calls
    the window.

    −1 (FA2, FA3) and None (FA4) are infinite, as is a bound that no int32 length can reach; other negative bounds
    raise, but for those of a :class:`LiteralWindow`. (−1, 0) is causal attention.
    """
    left, right = LiteralWindow.of(window_size, name)
    if not isinstance(window_size, LiteralWindow):
        left, right = _infinite(f"{name} left", left), _infinite(f"{name} right", right)
    if causal:
        right = 0 if right is None else min(right, 0)
    return left, right


def _on_host(name: str, value: Any) -> Any:
    """A tensor's or array's numbers; other values as they are. Raises WindowError if they are not on the host."""
    if not hasattr(value, "tolist"):
        return value
    device = str(getattr(value, "device", "cpu"))
    if device != "cpu":
        raise WindowError(f"{name} is a tensor on {device}: the host would wait for its values, give ints")
    return value.tolist()


def _bound(name: str, bound: Any) -> int | None:
    if bound is None or (type(bound) is int and abs(bound) < INT32_MAX):
        return bound
    bound = _on_host(name, bound)
    if isinstance(bound, bool) or not isinstance(bound, numbers.Integral):
        raise WindowError(f"{name}={bound!r}: a bound is an int, or None for infinite")
    bound = int(bound)
    return None if bound >= INT32_MAX else max(bound, -INT32_MAX)


def _infinite(name: str, bound: int | None) -> int | None:
    """The bound, with −1 as infinite."""
    if bound is not None and bound < -1:
        raise WindowError(f"{name}={bound}: a bound is ≥ 0, or None or −1 for infinite")
    return None if bound == -1 else bound


@dataclass(frozen=True)
class AttentionProblem:
    """What is asked of a kernel: shapes, dtypes and every semantic choice. ``cute_fa.semantics.tensors.problem_of``
    makes one from tensors and options; making it by hand validates the same rules.

    ``window_left`` and ``window_right`` are None where infinite, and causal is folded in (``window_right == 0``);
    negative ones are meant as they are, see :class:`LiteralWindow`. ``seqlen_q`` and ``seqlen_k`` are the longest
    lengths: ``max_seqlen_*`` for varlen. ``varlen_*``: the tensor is packed, with cu_seqlens; ``seqused_*``: lengths
    shorter than what the tensor holds are given. ``page_size``: k and v are pages; ``cache_batch_idx``: an index says
    which sequences of k and v, or rows of the page table, are the batch's; ``cache_leftpad``: they begin behind rows
    that do not count; ``tree_mask``: queries are drafts, the last keys, and a mask says which of them they see.
    ``seqlen_k_per_split``: in batch-invariant mode the keys of a chunk, counted from a sequence's first key, else 0.
    ``dtype`` is q's; ``dtype_k`` and ``dtype_v`` are alike by default, and others only if both are fp8; ``out_dtype``
    is q's by default, bf16 for fp8. ``q_descale``, ``k_descale``, ``v_descale``: fp8 codes are multiplied by given
    numbers; ``k_block_descale``, ``v_block_descale``: with one for each ``DESCALE_BLOCK`` keys of a
    sequence; ``k_row_descale``, ``v_row_descale``: with one for each row and head of the cache, or of a
    page. ``v_layout``: which dimension of v is contiguous, "head_dim" or "key_major" for the keys. ``ranges``: a range
    plan says which keys a query sees; ``q_positions``, ``k_positions``: between which ALiBi's distances are.

    Features are declared here, each in its field's metadata (``cute_fa.semantics.options``).

    ``persistent``, ``pack_gqa`` (query heads of one kv head share a tile; None: the kernel chooses) and
    ``promote_every`` (of fp8, wgmma whose sums stay in the tensor cores' accumulator; tcgen05 keeps them in fp32)
    change how a kernel computes, never what. They are here because a kernel must be able to refuse them.

    Of the backward alone: ``deterministic`` asks for gradients that are bit-identical between runs; ``lse_gradient``
    says that the gradient of LSE is given; ``slopes_gradient`` that the one of the ALiBi slopes is wanted. Those of q,
    k, v and the learnable sink always are.

    Raises EmptyBatchError, ShapeError, LengthError, WindowError, PageSizeError, Fp8Error or ArgumentError.
    """

    arch: SmArch = field(metadata=declares(key="arch"))
    dtype: DType = field(metadata=declares(key="dtype", rows=DTYPE_ROWS))
    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int = field(metadata=declares(rows={"GQA": {"num_heads": 8}}))
    num_heads_kv: int
    head_dim: int = field(metadata=declares(key="head_dim", rows=HEAD_DIM_ROWS))
    head_dim_v: int = field(metadata=declares(key="head_dim_v", rows=HEAD_DIM_V_ROWS))
    softmax_scale: float
    window_left: int | None = option(
        None,
        flag="window_left",
        flag_token="left",
        token="sw",
        key="sliding_window",
        rows={
            "causal": {"window_right": 0},
            "window left and right": {"window_left": 512, "window_right": 128},
            "window with a negative bound": {"window_left": 512, "window_right": -1},
        },
    )
    window_right: int | None = option(None, flag="window_right", flag_token="right", token="wr", key="window_right")
    sink_tokens: int = option(
        0,
        flag="sink_tokens",
        needs="window_left",
        flag_token="sink",
        token="sink",
        key="sink",
        help="First keys that a left bound never hides.",
        cli="sink",
        rows={"sink tokens + window": {"window_left": 512, "window_right": 0, "sink_tokens": 4}},
    )
    softcap: float = option(
        0.0,
        flag="softcap",
        flag_token="softcap",
        token="softcap",
        key="softcap",
        help="Cap c of c·tanh(score/c); 0: none.",
        rows={"softcap": {"softcap": 50.0}},
    )
    alibi: bool = option(
        False,
        tensor=TensorOption("alibi_slopes", "float32", dimensions=2),
        flag="alibi",
        flag_token="alibi",
        token="alibi",
        key="alibi",
        help="Bias -slope[head]·distance, slopes from the seed.",
        rows={"ALiBi": {"alibi": True}},
    )
    learnable_sink: bool = option(
        False,
        tensor=TensorOption("learnable_sink", "float32"),
        flag="learnable_sink",
        flag_token="lsink",
        token="lsink",
        key="learnable_sink",
        help="An extra logit per head, from the seed.",
        rows={"learnable sink": {"learnable_sink": True}},
    )
    varlen_q: bool = option(
        False,
        tensor=TensorOption("cu_seqlens_q"),
        flag="cu_seqlens_q",
        flag_token="cuq",
        help="Packed sequences of different lengths, up to seqlen-q and seqlen-k.",
        cli="varlen",
        rows={"varlen": {"varlen_q": True, "varlen_k": True}},
    )
    varlen_k: bool = option(False, tensor=TensorOption("cu_seqlens_k"), flag="cu_seqlens_k", flag_token="cuk")
    seqused_q: bool = option(
        False,
        tensor=TensorOption("seqused_q"),
        flag="seqused_q",
        flag_token="usedq",
        help="Only some of the queries that the tensor holds count.",
        rows={"seqused": {"seqused_q": True, "seqused_k": True}},
    )
    seqused_k: bool = option(
        False,
        tensor=TensorOption("seqused_k"),
        flag="seqused_k",
        flag_token="usedk",
        help="Only some of the keys that the tensor holds count.",
    )
    page_size: int | None = option(
        None,
        tensor=TensorOption("page_table", dimensions=2),
        flag="page_size",
        flag_value=True,
        token="page",
        key="page_size",
        help="Keys and values in shuffled pages of this many tokens.",
        rows={
            "paged KV": {"page_size": 64, "seqused_k": True},
            "paged KV, a page a token": {"page_size": 1, "seqused_k": True},
        },
    )
    cache_batch_idx: bool = option(
        False,
        tensor=TensorOption("cache_batch_idx"),
        flag="cache_batch_idx",
        flag_token="index",
        help="Keys and values in sequences of a larger cache, by index.",
        rows={
            "KV cache by index": {"cache_batch_idx": True},
            "paged KV by index": {"page_size": 64, "seqused_k": True, "cache_batch_idx": True},
        },
    )
    cache_leftpad: bool = option(
        False,
        tensor=TensorOption("cache_leftpad"),
        flag="cache_leftpad",
        flag_token="leftpad",
        help="Rows of the cache that do not count before each sequence.",
        rows={
            "KV cache, left padding": {"cache_leftpad": True},
            "paged KV, left padding": {"page_size": 64, "seqused_k": True, "cache_leftpad": True},
        },
    )
    tree_mask: bool = option(
        False,
        tensor=TensorOption("tree_mask", dimensions=3, packed="cu_seqlens_q"),
        flag="tree_mask",
        flag_token="tree",
        token="tree",
        key="tree_mask",
        help="Queries are draft tokens of random trees, which say which of each other they see.",
        cli="tree",
        rows={"tree of draft tokens": {"tree_mask": True}},
    )
    num_splits: int = option(
        1,
        token="split",
        key="splits",
        direction=Direction.FORWARD,
        help="Parts that the keys are split into; 0: as the table chooses.",
        rows={"split-KV": {"num_splits": 4}},
    )
    seqlen_k_per_split: int = option(
        0,
        flag="batch_invariant",
        flag_token="inv",
        token="chunk",
        key="seqlen_k_per_split",
        direction=Direction.FORWARD,
        help="Batch-invariant mode: keys of a chunk, a multiple of 64; 0: off.",
        rows={"batch-invariant": {"seqlen_k_per_split": 1024}},
    )
    direction: Direction = option(Direction.FORWARD, key="direction")
    dtype_k: DType | None = option(
        None, key="dtype_k", help="k's, where it is another than q's. [default: dtype]", rows=DTYPE_K_ROWS
    )
    dtype_v: DType | None = option(None, key="dtype_v", help="v's, where it is another than q's. [default: dtype]")
    out_dtype: DType | None = option(None, key="out_dtype", help="The output's. [default: dtype, bf16 for fp8]")
    q_descale: bool = option(
        False, tensor=descale("q_descale"), flag="q_descale", flag_token="qscale", rows=DESCALE_ROWS
    )
    k_descale: bool = option(
        False, tensor=descale("k_descale", "k_block_descale", "k_row_descale"), flag="k_descale", flag_token="kscale"
    )
    v_descale: bool = option(
        False, tensor=descale("v_descale", "v_block_descale", "v_row_descale"), flag="v_descale", flag_token="vscale"
    )
    k_block_descale: bool = option(
        False, flag="k_block_descale", needs="k_descale", flag_token="kblocks", rows=BLOCK_DESCALE_ROWS
    )
    v_block_descale: bool = option(False, flag="v_block_descale", needs="v_descale", flag_token="vblocks")
    k_row_descale: bool = option(
        False, flag="k_row_descale", needs="k_descale", flag_token="krows", rows=ROW_DESCALE_ROWS
    )
    v_row_descale: bool = option(False, flag="v_row_descale", needs="v_descale", flag_token="vrows")
    ranges: bool = option(
        False,
        tensor=TensorOption("query_walk"),
        flag="ranges",
        flag_token="ranges",
        token="ranges",
        key="ranges",
        rows={"range plan": {"ranges": True}},
    )
    q_positions: bool = option(
        False,
        tensor=TensorOption("q_positions"),
        flag="q_positions",
        flag_token="qpos",
        rows={"range plan, ALiBi between positions": dict.fromkeys(POSITIONED, True)},
    )
    k_positions: bool = option(False, tensor=TensorOption("k_positions"), flag="k_positions", flag_token="kpos")
    v_layout: str = option(
        "head_dim",
        flag="key_major_v",
        flag_token="kmajor",
        rows={"fp8, key-major V": {"dtype": DType.E4M3, "v_layout": "key_major"}},
    )
    persistent: PersistentMode = option(
        PersistentMode.AUTO,
        direction=Direction.FORWARD,
        help="Whether a CTA computes one tile after the other.",
        rows={"persistent": {"persistent": PersistentMode.ON}},
    )
    pack_gqa: bool | None = option(
        None,
        direction=Direction.FORWARD,
        help="Query heads of one kv head share a tile. [default: as it pays]",
        rows={"GQA, query heads packed": {"num_heads": 8, "pack_gqa": True}},
    )
    promote_every: int | None = option(
        None,
        direction=Direction.FORWARD,
        help="wgmma of fp8 whose sums stay in the tensor cores' accumulator. [default: as registers allow]",
        rows={"fp8, promotion after each wgmma": {"dtype": DType.E4M3, "promote_every": 1}},
    )
    deterministic: bool = option(
        False,
        token="det",
        direction=Direction.BACKWARD,
        help="Gradients that are bit-identical between runs.",
        rows={"deterministic gradients": {"deterministic": True}},
    )
    lse_gradient: bool = option(
        False,
        token="dlse",
        direction=Direction.BACKWARD,
        help="Give a random gradient of the LSE, too.",
        rows={"gradient of the LSE": {"lse_gradient": True}},
    )
    slopes_gradient: bool = option(
        False,
        token="dalibi",
        direction=Direction.BACKWARD,
        rows={"gradient of the ALiBi slopes": {"alibi": True, "slopes_gradient": True}},
    )

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise ArgumentError(f"{name}={value!r}: {kind.__name__} is needed")
        if self.pack_gqa is not None and not isinstance(self.pack_gqa, bool):
            raise ArgumentError(f"pack_gqa={self.pack_gqa!r}: True, False, or None for the kernel's own choice")
        self._check_sizes()
        self._check_options()
        self._check_gradients()
        self._check_dtypes()
        self._check_v_layout()
        self._check_ranges()

    def _check_sizes(self) -> None:
        if self.direction not in (Direction.FORWARD, Direction.BACKWARD):
            raise ArgumentError(f"direction={self.direction.value}: of attention it is fwd or bwd")
        check_sizes(self, _SIZES, lengths=("seqlen_q", "seqlen_k"))
        if self.num_heads % self.num_heads_kv:
            raise ShapeError(
                f"{self.num_heads} query heads and {self.num_heads_kv} kv heads: "
                "the number of query heads must be a multiple of the number of kv heads"
            )
        if self.page_size is not None and self.varlen_k:
            raise ArgumentError("cu_seqlens_k with a paged cache: its lengths are seqused_k")

    def _check_options(self) -> None:
        check_factor("softmax_scale", self.softmax_scale)
        if self.softcap != 0.0:
            check_factor("softcap", self.softcap)
        for side, bound in (("left", self.window_left), ("right", self.window_right)):
            if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int)):
                raise WindowError(f"window_{side}={bound!r}: a bound is an int, or None for infinite")
        if not 0 <= self.sink_tokens <= INT32_MAX:
            raise ArgumentError(f"sink_tokens={self.sink_tokens}: between 0 and {INT32_MAX}")
        if self.promote_every is not None and not 1 <= self.promote_every <= INT32_MAX:
            raise ArgumentError(f"promote_every={self.promote_every}: at least 1, or None for the kernel's own choice")
        if not 0 <= self.num_splits <= INT32_MAX:
            raise ArgumentError(f"num_splits={self.num_splits}: between 0 and {INT32_MAX}")
        if not 0 <= self.seqlen_k_per_split <= INT32_MAX or self.seqlen_k_per_split % CHUNK_STEP:
            rule = f"a multiple of {CHUNK_STEP} up to {INT32_MAX}, or 0"
            raise ArgumentError(f"seqlen_k_per_split={self.seqlen_k_per_split}: {rule}")
        if self.seqlen_k_per_split and self.num_splits > 1:
            rule = f"the chunks of {self.seqlen_k_per_split} keys are the parts"
            raise ArgumentError(f"num_splits={self.num_splits} in batch-invariant mode: {rule}")

    def _check_gradients(self) -> None:
        for name in ("deterministic", "lse_gradient", "slopes_gradient"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ArgumentError(f"{name}={value!r}: True or False")
            if value and self.direction is Direction.FORWARD:
                raise ArgumentError(f"{name} of a forward: only a backward has gradients")
        if self.slopes_gradient and not self.alibi:
            raise ArgumentError("slopes_gradient without alibi: there are no slopes")

    def _check_dtypes(self) -> None:
        """Set those that are left open, too."""
        own = DType.BF16 if self.dtype.is_fp8 else self.dtype
        for name, default in (("dtype_k", self.dtype), ("dtype_v", self.dtype), ("out_dtype", own)):
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, default)
            elif not isinstance(value, DType):
                raise ArgumentError(f"{name}={value!r}: a DType is needed")
        q, k, v, out = self.dtypes + (cast("DType", self.out_dtype),)
        given = f"dtypes {q.value}, {k.value}, {v.value} of q, k, v"
        if q is DType.INT8:
            raise Fp8Error(f"{given}: q is of 16 bits or fp8, k and v alone may be int8")
        if q.is_fp8 and not (k.is_fp8 and v.is_fp8):
            raise Fp8Error(f"{given}: k and v are fp8 where q is")
        if not (k.is_codes and v.is_codes) and not q is k is v:
            raise Fp8Error(f"{given}: k and v are of q's, or both fp8 or int8")
        if out.is_codes:
            raise Fp8Error(f"out_dtype={out.value}: the output is fp16 or bf16")
        for name, dtype in zip("qkv", self.dtypes, strict=True):
            if getattr(self, f"{name}_descale") and not dtype.is_codes:
                raise Fp8Error(f"{name}_descale with {name} in {dtype.value}: only fp8 and int8 codes have descales")
        for name in "kv":
            of_blocks, of_rows = getattr(self, f"{name}_block_descale"), getattr(self, f"{name}_row_descale")
            for kind, given in (("block", of_blocks), ("row", of_rows)):
                if given and not getattr(self, f"{name}_descale"):
                    raise ArgumentError(f"{name}_{kind}_descale without {name}_descale: there are no descales")
            if of_blocks and of_rows:
                raise ArgumentError(f"{name}_block_descale and {name}_row_descale: of blocks or of rows, not both")
            if of_rows and self.varlen_k:
                raise ArgumentError(f"{name}_row_descale with cu_seqlens_k: rows of a cache have descales of their own")

    def _check_v_layout(self) -> None:
        if self.v_layout not in V_LAYOUTS:
            raise ArgumentError(f"v_layout={self.v_layout!r}: one of {', '.join(V_LAYOUTS)}")
        if self.v_layout == "head_dim":
            return
        if not self.dtype.is_fp8:
            raise Fp8Error(f"v_layout={self.v_layout!r} with q in {self.dtype.value}: only fp8 takes it")
        others = {"cu_seqlens_k": self.varlen_k, "page_table": self.page_size is not None}
        others |= {name: getattr(self, name) for name in ("seqused_k", "cache_batch_idx", "cache_leftpad")}
        for name, given in others.items():
            if given:
                raise ArgumentError(f"v_layout={self.v_layout!r} with {name}: it is one of dense tensors")

    def _check_ranges(self) -> None:
        if self.q_positions != self.k_positions:
            given, missing = ("q", "k") if self.q_positions else ("k", "q")
            raise ArgumentError(f"{given}_positions without {missing}_positions: distances are between the two")
        if self.q_positions and not (self.ranges and self.alibi):
            needed = "alibi_slopes" if self.ranges else "a range plan"
            raise ArgumentError(f"q_positions without {needed}: nothing depends on positions")
        if not self.ranges:
            return
        others = {name: getattr(self, name) for name in ("varlen_q", "varlen_k", "seqused_q", "seqused_k")}
        others |= {name: getattr(self, name) for name in ("cache_batch_idx", "cache_leftpad", "tree_mask")}
        others |= {"page_size": self.page_size is not None, "window_left": self.window_left is not None}
        others |= {"window_right": self.window_right is not None, "num_splits": self.num_splits != 1}
        others |= {"batch_invariant": self.seqlen_k_per_split > 0}
        for name, given in others.items():
            if given:
                raise ArgumentError(f"{name} with a range plan: which keys a query sees, the plan alone says")
        if self.batch != 1:
            raise ArgumentError(f"batch={self.batch} with a range plan: it is of one packed sequence")

    @property
    def dtypes(self) -> tuple[DType, DType, DType]:
        """Of q, k and v."""
        return self.dtype, cast("DType", self.dtype_k), cast("DType", self.dtype_v)

    @property
    def has_codes(self) -> bool:
        """Whether any of q, k and v is fp8 or int8."""
        return any(dtype.is_codes for dtype in self.dtypes)

    @property
    def causal(self) -> bool:
        return self.window_right == 0

    @property
    def varlen(self) -> bool:
        """Whether sequences of the batch may differ in length."""
        return self.varlen_q or self.varlen_k or self.seqused_q or self.seqused_k or self.cache_leftpad

    @property
    def gqa_ratio(self) -> int:
        return self.num_heads // self.num_heads_kv

    @property
    def mask_kind(self) -> MaskKind:
        sliding = self.window_left is not None or self.window_right not in (None, 0)
        if sliding:
            return MaskKind.SLIDING_CAUSAL if self.causal else MaskKind.SLIDING
        return MaskKind.CAUSAL if self.causal else MaskKind.NONE

    @property
    def position_bias(self) -> PositionBias:
        return PositionBias.ALIBI if self.alibi else PositionBias.NONE


def check_sizes(problem: Any, sizes: tuple[str, ...], lengths: tuple[str, ...]) -> None:
    """The rules of every kind of problem about its batch, its lengths, its sizes, which are at least 1, and its
    pages; ``sizes``, ``lengths``: fields."""
    if problem.batch < 1:
        raise EmptyBatchError(f"batch={problem.batch}: at least one sequence is needed")
    for name in lengths:
        if not 0 <= getattr(problem, name) <= INT32_MAX:
            raise LengthError(f"{name}={getattr(problem, name)}: a length is between 0 and {INT32_MAX}")
    for name in sizes:
        if getattr(problem, name) < 1:
            raise ShapeError(f"{name}={getattr(problem, name)}: at least 1 is needed")
    if problem.page_size is not None:
        check_page_size(problem.page_size)


def check_page_size(page_size: int, of: str = "") -> None:
    """Raise PageSizeError for a page of another size than a power of two from 1 to 1024; ``of``: the tensor that has
    it, with its shape."""
    if page_size not in PAGE_SIZES:
        where = f"{of}: " if of else ""
        rule = f"a power of two from {PAGE_SIZES[0]} to {PAGE_SIZES[-1]} is needed"
        raise PageSizeError(f"{where}page_size={page_size}: {rule}")


def default_scale(head_dim: int) -> float:
    """1/√head_dim; 1 for a head_dim of 0, which AttentionProblem refuses."""
    return 1.0 / math.sqrt(max(head_dim, 1))


def check_factor(name: str, value: float) -> None:
    """A factor of the scores: above 0 (the running maximum is taken before it) and harmless in fp32."""
    if not 1.0 / _LARGEST_FACTOR <= value <= _LARGEST_FACTOR:
        raise ArgumentError(f"{name}={value}: a number between 2^-32 and 2^32")

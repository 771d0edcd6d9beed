"""Rules for the tensors of a call, and the problem that they describe.

Everything here reads shapes, strides and dtypes only; ``check_values`` alone reads what lies on the device.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch

from cute_fa.errors import (
    AlignmentError,
    ArgumentError,
    CacheIndexError,
    CumulativeSeqlensError,
    DeviceError,
    DTypeError,
    EmptyBatchError,
    EmptyCacheError,
    LengthError,
    PagedHeadDimError,
    PageTableError,
    ShapeError,
    StrideError,
    ZeroLengthError,
)
from cute_fa.problem import INT32_MAX, AttentionProblem, default_scale, normalize_window
from cute_fa.types import Direction, DType, PersistentMode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cute_fa.types import SmArch

TORCH_DTYPES = {
    DType.FP16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.E4M3: torch.float8_e4m3fn,
    DType.E5M2: torch.float8_e5m2,
}
DTYPES = {theirs: ours for ours, theirs in TORCH_DTYPES.items()}
ALIGNMENT = 16
_LARGEST_LOGIT = 2.0**126  # what log2(e) and a few sums keep finite in float32


def problem_of(
    arch: SmArch,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    sink_tokens: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    persistent: PersistentMode = PersistentMode.AUTO,
    direction: Direction = Direction.FORWARD,
    deterministic: bool = False,
    lse_gradient: bool = False,
    slopes_gradient: bool = False,
) -> AttentionProblem:
    """The problem that tensors and options describe; shapes as in :class:`cute_fa.kernel.AttentionTensors`.

    Raises the error of whichever rule is broken; makes no host synchronisation.
    """
    dtype = _dtype(q, k, v)
    batch, rows_q = _queries(q, cu_seqlens_q)
    rows_k, page_size = keys_of(q, k, v, batch, cu_seqlens_k, page_table, cache_batch_idx)
    tensors = {"q": q, "k": k, "v": v}
    if out is not None:
        _output(out, tensors)
        tensors["out"] = out
    for name, tensor in tensors.items():
        check_loadable(name, tensor)
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    lengths |= {"seqused_q": seqused_q, "seqused_k": seqused_k}
    for name, tensor in lengths.items():
        if tensor is not None:
            check_vector(name, tensor, torch.int32, batch + name.startswith("cu"))
    if cache_leftpad is not None:
        if cu_seqlens_k is not None:
            raise ArgumentError("cache_leftpad with cu_seqlens_k: a packed sequence starts where its offset says")
        check_vector("cache_leftpad", cache_leftpad, torch.int32, batch)
    heads = q.shape[-2]
    if alibi_slopes is not None:
        check_vector("alibi_slopes", alibi_slopes, torch.float32, heads, batch)
    if learnable_sink is not None:
        check_vector("learnable_sink", learnable_sink, torch.float32, heads)
    extras = {**lengths, "page_table": page_table, "cache_batch_idx": cache_batch_idx}
    extras["cache_leftpad"] = cache_leftpad
    extras |= {"alibi_slopes": alibi_slopes, "learnable_sink": learnable_sink}
    check_devices(tensors | extras)
    for name, cu_seqlens, rows in (("cu_seqlens_q", cu_seqlens_q, rows_q), ("cu_seqlens_k", cu_seqlens_k, rows_k)):
        if cu_seqlens is not None and rows > INT32_MAX:
            raise CumulativeSeqlensError(f"{name} for {rows} rows: its int32 offsets overflow at {INT32_MAX}")
    left, right = normalize_window(window_size, causal)
    return AttentionProblem(
        arch=arch,
        dtype=dtype,
        batch=batch,
        seqlen_q=_longest_q(rows_q, max_seqlen_q, cu_seqlens_q is not None, seqused_q is not None),
        seqlen_k=_longest_k(rows_k, max_seqlen_k, cu_seqlens_k is not None or seqused_k is not None, page_size),
        num_heads=heads,
        num_heads_kv=k.shape[-2],
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        softmax_scale=default_scale(q.shape[-1]) if softmax_scale is None else float(softmax_scale),
        window_left=left,
        window_right=right,
        sink_tokens=sink_tokens,
        softcap=float(softcap),
        alibi=alibi_slopes is not None,
        learnable_sink=learnable_sink is not None,
        varlen_q=cu_seqlens_q is not None,
        varlen_k=cu_seqlens_k is not None,
        seqused_q=seqused_q is not None,
        seqused_k=seqused_k is not None,
        page_size=page_size,
        cache_batch_idx=cache_batch_idx is not None,
        cache_leftpad=cache_leftpad is not None,
        num_splits=num_splits,
        direction=direction,
        pack_gqa=pack_gqa,
        persistent=persistent,
        deterministic=deterministic,
        lse_gradient=lse_gradient,
        slopes_gradient=slopes_gradient,
    )


def check_devices(tensors: dict[str, torch.Tensor | None], first: str = "q") -> None:
    """Raise DeviceError unless all tensors are where ``first`` is."""
    device = tensors[first].device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise DeviceError(
                f"{name} is on {tensor.device} and {first} on {device}: all tensors must be on one device"
            )


def check_like(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ShapeError or DTypeError unless the tensor has this shape and dtype."""
    if tuple(tensor.shape) != tuple(shape):
        raise ShapeError(f"{name} {tuple(tensor.shape)}: {tuple(shape)} is needed")
    if tensor.dtype != dtype:
        raise DTypeError(name, tensor.dtype, f"{str(dtype).removeprefix('torch.')} is needed")


def load_rule(tensor: torch.Tensor) -> str | None:
    """The rule that the strides break if 16-byte loads cannot follow them; those of dimensions of size 1 do not matter,
    0 is fine."""
    strides = tensor.stride()
    if tensor.numel() == 0:
        return None
    if strides[-1] != 1 and tensor.shape[-1] > 1:
        return "the last dimension must be contiguous"
    for size, stride in zip(tensor.shape[:-1], strides[:-1], strict=True):
        if size > 1 and stride * tensor.element_size() % ALIGNMENT:
            return f"every stride but the last must be a multiple of {ALIGNMENT} bytes"
    return None


def check_writable(name: str, tensor: torch.Tensor) -> None:
    """Raise StrideError for a tensor of which elements share memory."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < extent:
            raise StrideError(name, tensor.stride(), "elements that share memory cannot be written")
        extent += stride * (size - 1)


def check_pointers(**tensors: torch.Tensor) -> None:
    """Raise AlignmentError for a tensor whose first element is not 16-byte aligned."""
    for name, tensor in tensors.items():
        if tensor.data_ptr() % ALIGNMENT:
            raise AlignmentError(name, tensor.data_ptr(), ALIGNMENT)


def check_separate(out: torch.Tensor, written: str = "out", **inputs: torch.Tensor) -> None:
    """Raise ArgumentError if the range of addresses that ``out`` spans meets an input's; ``written``: its name."""
    start, end = _extent(out)
    for name, tensor in inputs.items():
        first, last = _extent(tensor)
        if first < end and start < last:
            raise ArgumentError(
                f"{written} shares its memory with {name}: a kernel uses {name} while it writes {written}"
            )


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one after the last; nothing for an empty tensor."""
    if tensor.numel() == 0:
        return 0, 0
    reach = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


def check_values(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    seqused_q: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    page_table: torch.Tensor | None,
    cache_batch_idx: torch.Tensor | None,
    cache_leftpad: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
) -> None:
    """Check the numbers in the length tensors, the page table, the cache's index, the slopes and the sinks: one host
    synchronisation each.

    Raises CumulativeSeqlensError, LengthError, PageTableError, CacheIndexError or ArgumentError.
    """
    if cu_seqlens_q is not None:
        held_q = held_lengths("cu_seqlens_q", cu_seqlens_q, q)
    else:
        held_q = [q.shape[1]] * problem.batch
    if cu_seqlens_k is not None:
        held_k = held_lengths("cu_seqlens_k", cu_seqlens_k, k)
    else:
        held_k = [k.shape[1] * (1 if page_table is None else page_table.shape[1])] * problem.batch
    used_q = used_within("seqused_q", seqused_q, held_q)
    used_k = used_within("seqused_k", seqused_k, held_k)
    if cache_leftpad is not None:
        used_within("cache_leftpad", cache_leftpad, used_k)
    for name, used, longest in (("q", used_q, problem.seqlen_q), ("k", used_k, problem.seqlen_k)):
        if max(used) > longest:
            raise LengthError(f"max_seqlen_{name}={longest}: a sequence has {max(used)} tokens")
    check_cache_places(k, used_k, page_table, cache_batch_idx)
    if alibi_slopes is not None:
        # Kernels hold scores, before the exponential's factor, in units of softmax_scale or of twice the cap.
        unit = min(2.0 * problem.softcap or problem.softmax_scale, 1.0)
        bound = _LARGEST_LOGIT * unit / max(problem.seqlen_q, problem.seqlen_k, 1)
        rule = f"between -{bound:.3g} and {bound:.3g}, so that no bias overflows float32"
        _check_numbers("alibi_slopes", alibi_slopes, lambda slope: abs(slope) <= bound, rule)
    if learnable_sink is not None:
        rule = "between -2^126 and 2^126, or -inf for none"
        _check_numbers(
            "learnable_sink", learnable_sink, lambda sink: abs(sink) <= _LARGEST_LOGIT or sink == -math.inf, rule
        )


def _check_numbers(name: str, tensor: torch.Tensor, allowed: Callable[[float], bool], rule: str) -> None:
    """Raise ArgumentError unless every element is allowed; NaN is not."""
    for index, number in enumerate(tensor.flatten().tolist()):
        if not allowed(number):
            place = [index] if tensor.dim() == 1 else list(divmod(index, tensor.shape[1]))
            raise ArgumentError(f"{name}{place}={number:.4g}: {rule}")


def check_cache_places(
    k: torch.Tensor, lengths: list[int], page_table: torch.Tensor | None, cache_batch_idx: torch.Tensor | None
) -> None:
    """Check that the cache ``k`` has the pages, or the sequences, in which these lengths are said to lie: a host
    synchronisation for each tensor. Raises PageTableError or CacheIndexError."""
    sequences = list(range(len(lengths)))
    if cache_batch_idx is not None:
        sequences = cache_batch_idx.tolist()
        held = k.shape[0] if page_table is None else page_table.shape[0]
        has = f"the cache has {held} sequences" if page_table is None else f"page_table has {held} rows"
        for b, sequence in enumerate(sequences):
            if not 0 <= sequence < held:
                raise CacheIndexError(f"cache_batch_idx[{b}]={sequence}: {has}")
    if page_table is not None:
        table = page_table.tolist()
        for length, row in zip(lengths, sequences, strict=True):
            for page in table[row][: -(-length // k.shape[1])]:
                if not 0 <= page < k.shape[0]:
                    raise PageTableError(f"page_table[{row}] lists page {page}: the cache has {k.shape[0]} pages")


def used_lengths(cu_seqlens_k: torch.Tensor) -> torch.Tensor:
    """int32 (batch), the lengths between int32 offsets (batch + 1): how FA2's callers pass those of a paged cache."""
    check_integers("cu_seqlens_k", cu_seqlens_k)
    check_dims("cu_seqlens_k", cu_seqlens_k, 1, "(batch + 1)")
    return cu_seqlens_k.diff()


def lengths_of(name: str, offsets: Sequence[int]) -> list[int]:
    """Lengths of the sequences between at least two offsets; raises CumulativeSeqlensError unless these start at 0 and
    never decrease."""
    if offsets[0] != 0:
        raise CumulativeSeqlensError(f"{name}[0]={offsets[0]}: offsets start at 0")
    lengths = []
    for b, (start, end) in enumerate(itertools.pairwise(offsets)):
        if end < start:
            raise CumulativeSeqlensError(f"{name} goes from {start} to {end} at {b + 1}: offsets never decrease")
        lengths.append(end - start)
    return lengths


def held_lengths(name: str, cu_seqlens: torch.Tensor, packed: torch.Tensor) -> list[int]:
    """Lengths that the packed tensor must hold."""
    offsets = cu_seqlens.tolist()
    lengths = lengths_of(name, offsets)
    if offsets[-1] > packed.shape[0]:
        raise CumulativeSeqlensError(f"{name} ends at {offsets[-1]}: the packed tensor has {packed.shape[0]} rows")
    return lengths


def used_within(name: str, seqused: torch.Tensor | None, held: list[int]) -> list[int]:
    if seqused is None:
        return held
    used = seqused.tolist()
    for b, (length, most) in enumerate(zip(used, held, strict=True)):
        if not 0 <= length <= most:
            raise LengthError(f"{name}[{b}]={length}: between 0 and the {most} tokens that the tensor holds")
    return used


def _dtype(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> DType:
    if q.dtype not in DTYPES:
        raise DTypeError("q", q.dtype, f"one of {', '.join(str(d).removeprefix('torch.') for d in DTYPES)} is needed")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise DTypeError(name, tensor.dtype, f"q is {str(q.dtype).removeprefix('torch.')}, k and v must be too")
    return DTYPES[q.dtype]


def _queries(q: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> tuple[int, int]:
    """(batch, rows of the tensor)."""
    if cu_seqlens_q is None:
        check_dims("q", q, 4, "(batch, seqlen_q, heads, head_dim)")
        batch, rows = q.shape[:2]
    else:
        check_dims("q", q, 3, "(total_q, heads, head_dim) with cu_seqlens_q")
        check_dims("cu_seqlens_q", cu_seqlens_q, 1, "(batch + 1)")
        batch, rows = cu_seqlens_q.shape[0] - 1, q.shape[0]
    if batch < 1:
        raise EmptyBatchError(f"q {tuple(q.shape)} describes {max(batch, 0)} sequences: at least one is needed")
    return batch, rows


def keys_of(q, k, v, batch: int, cu_seqlens_k, page_table, cache_batch_idx, query: str = "q") -> tuple[int, int | None]:
    """(rows that one sequence, or the packed tensor, can hold; page size or None). ``query``: q's name in messages."""
    page_size = None
    if cache_batch_idx is not None:
        if cu_seqlens_k is not None:
            raise ArgumentError("cache_batch_idx with cu_seqlens_k: only caches take an index")
        check_vector("cache_batch_idx", cache_batch_idx, torch.int32, batch)
    if page_table is not None:
        if cu_seqlens_k is not None:
            raise ArgumentError("cu_seqlens_k with page_table: a paged cache takes its lengths from seqused_k")
        check_dims("k", k, 4, "(num_pages, page_size, heads_kv, head_dim) with page_table")
        check_integers("page_table", page_table)
        check_dims("page_table", page_table, 2, "(batch, max_pages)")
        if page_table.shape[0] != batch and cache_batch_idx is None:
            raise ShapeError(f"page_table {tuple(page_table.shape)}: one row for each of {batch} sequences is needed")
        if k.shape[0] == 0 or 0 in page_table.shape:
            raise EmptyCacheError(f"k {tuple(k.shape)}, page_table {tuple(page_table.shape)}: the cache has no pages")
        check_contiguous_rows("page_table", page_table)
        page_size, rows = k.shape[1], page_table.shape[1] * k.shape[1]
    elif cu_seqlens_k is not None:
        check_dims("k", k, 3, "(total_k, heads_kv, head_dim) with cu_seqlens_k")
        rows = k.shape[0]
    else:
        check_dims("k", k, 4, "(batch, seqlen_k, heads_kv, head_dim)")
        rows = k.shape[1]
        if cache_batch_idx is not None and k.shape[0] == 0:
            raise EmptyCacheError(f"k {tuple(k.shape)}: the cache has no sequences")
        if cache_batch_idx is None and k.shape[0] != batch:
            raise ShapeError(f"k {tuple(k.shape)}: its first size is the batch, {batch}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ShapeError(f"v {tuple(v.shape)} and k {tuple(k.shape)}: all sizes but the last must be equal")
    if k.shape[-1] != q.shape[-1]:
        rule = f"k has head_dim {k.shape[-1]} and {query} {q.shape[-1]}: they must be equal"
        raise PagedHeadDimError(f"paged {rule}") if page_table is not None else ShapeError(rule)
    return rows, page_size


def _output(out: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
    q, v = inputs["q"], inputs["v"]
    expected = (*q.shape[:-1], v.shape[-1])
    if tuple(out.shape) != expected:
        raise ShapeError(f"out {tuple(out.shape)}: {expected} is needed")
    expected_dtype = torch.bfloat16 if DTYPES[q.dtype].is_fp8 else q.dtype
    if out.dtype != expected_dtype:
        raise DTypeError("out", out.dtype, f"{str(expected_dtype).removeprefix('torch.')} is needed")
    check_writable("out", out)


def check_loadable(name: str, tensor: torch.Tensor) -> None:
    rule = load_rule(tensor)
    if rule is not None:
        raise StrideError(name, tensor.stride(), rule)


def check_vector(name: str, tensor: torch.Tensor, dtype: torch.dtype, size: int, batch: int | None = None) -> None:
    """A contiguous (size) tensor; also (batch, size) with contiguous rows where ``batch`` is given."""
    if tensor.dtype != dtype:
        raise DTypeError(name, tensor.dtype, f"{str(dtype).removeprefix('torch.')} is needed")
    shapes = [(size,)] if batch is None else [(size,), (batch, size)]
    if tuple(tensor.shape) not in shapes:
        raise ShapeError(f"{name} {tuple(tensor.shape)}: {' or '.join(map(str, shapes))} is needed")
    check_contiguous_rows(name, tensor)


def check_integers(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype != torch.int32:
        raise DTypeError(name, tensor.dtype, "int32 is needed")


def check_contiguous_rows(name: str, tensor: torch.Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise StrideError(name, tensor.stride(), "the last dimension must be contiguous")


def check_dims(name: str, tensor: torch.Tensor, dims: int, layout: str) -> None:
    if tensor.dim() != dims:
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}: {layout} is needed")


def _longest_q(rows: int, given: int | None, packed: bool, seqused: bool) -> int:
    """The most queries of a sequence: ``max_seqlen_q`` where packed. All rows of a dense tensor belong to a sequence:
    those beyond seqused_q are part of the result."""
    _check_longest("max_seqlen_q", given)
    if given is None:
        return rows
    if packed:
        return min(given, rows)
    if given < rows and not seqused:
        raise LengthError(f"max_seqlen_q={given}: each sequence has {rows} tokens")
    return rows


def _longest_k(rows: int, given: int | None, varlen: bool, page_size: int | None) -> int:
    """The most keys of a sequence: ``max_seqlen_k`` where lengths are given, else what the tensor or the pages hold."""
    _check_longest("max_seqlen_k", given)
    if given is None:
        return rows
    if given < rows and not varlen:
        held = f"each sequence has {rows} tokens"
        if page_size is not None:
            held = f"without seqused_k each sequence has the {rows} tokens that its row of page_table holds"
        raise LengthError(f"max_seqlen_k={given}: {held}")
    return min(given, rows)


def _check_longest(name: str, given: int | None) -> None:
    if given is not None and given < 1:
        rule = ZeroLengthError if given == 0 else LengthError
        raise rule(f"{name}={given}: the longest sequence has at least 1 token")
    if given is not None and given > INT32_MAX:
        raise LengthError(f"{name}={given}: at most {INT32_MAX}")

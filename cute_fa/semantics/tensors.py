"""Rules for the tensors of a call, and the problem that they describe.

Everything here reads shapes, strides and dtypes only; ``check_values`` alone reads what lies on the device.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch

from cute_fa.semantics.argument_names import ArgumentNames, names_of
from cute_fa.semantics.call import Options
from cute_fa.semantics.errors import (
    AlignmentError,
    ArgumentError,
    CacheIndexError,
    CumulativeSeqlensError,
    DeviceError,
    DTypeError,
    EmptyBatchError,
    EmptyCacheError,
    Fp8Error,
    LengthError,
    PagedHeadDimError,
    PageTableError,
    ShapeError,
    StrideError,
    ZeroLengthError,
)
from cute_fa.semantics.options import options_of
from cute_fa.semantics.problem import (
    DESCALE_BLOCK,
    INT32_MAX,
    AttentionProblem,
    check_factor,
    check_page_size,
    default_scale,
)
from cute_fa.semantics.types import DType, PersistentMode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cute_fa.semantics.call import Call, Extras
    from cute_fa.semantics.types import SmArch

TORCH_DTYPES = {
    DType.FP16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.E4M3: torch.float8_e4m3fn,
    DType.E5M2: torch.float8_e5m2,
    DType.INT8: torch.int8,
}
DTYPES = {theirs: ours for ours, theirs in TORCH_DTYPES.items()}
ALIGNMENT = 16
LARGEST_TILE = 256  # rows of queries or keys that a kernel reads positions of at a time
_LARGEST_LOGIT = 2.0**126  # what log2(e) and a few sums keep finite in float32


def problem_of(arch: SmArch, call: Call, out: torch.Tensor | None = None, **backward: Any) -> AttentionProblem:
    """The problem that a call describes; shapes as in :class:`cute_fa.engine.contract.AttentionTensors`. ``backward``:
    fields of one that is of a backward, and its direction.

    No sequences at all are described as one: what an empty result must obey are the same rules. Raises the error of
    whichever rule is broken; makes no host synchronisation.
    """
    q, k, v, extras, options = call
    names = names_of(options.names)
    cu_seqlens_q, cu_seqlens_k = extras.cu_seqlens_q, extras.cu_seqlens_k
    dtype, dtype_k, dtype_v = _dtypes(names, q, k, v)
    batch, rows_q = _queries(names, q, cu_seqlens_q)
    sequences = f"{batch} sequences of {names['q' if cu_seqlens_q is None else 'cu_seqlens_q']}"
    places = cu_seqlens_k, extras.page_table, extras.cache_batch_idx
    rows_k, page_size = keys_of(names, q, k, v, batch, sequences, *places)
    _check_heads(names, q, k, v)
    tensors = {"q": q, "k": k, "v": v}
    out_dtype = _out_dtype(dtype, options.out_dtype, out)
    if out is not None:
        _output(names["out"], out, q, v, out_dtype)
        tensors["out"] = out
    key_major = options.v_layout != "head_dim"
    for name, tensor in tensors.items():
        if name != "v" or not key_major:
            check_loadable(names[name], tensor)
    _check_extras(names, extras, batch, sequences, q.shape[-2])
    _check_walks(names, extras, rows_q, rows_k)
    if extras.query_walk is not None:
        for name, tensor in tensors.items():
            if is_spread(tensor):
                rule = f"under a range plan {LARGEST_TILE} rows must lie within 2 GiB"
                raise StrideError(names[name], tensor.stride(), rule)
    ragged_k = cu_seqlens_k is not None or extras.seqused_k is not None
    longest_k = _longest_k(names, rows_k, options.max_seqlen_k, ragged_k, page_size)
    _check_descales(names, call, batch, sequences, longest_k)
    check_devices(names.of(tensors | extras._asdict()), names["q"])
    for name, cu_seqlens, rows in (("cu_seqlens_q", cu_seqlens_q, rows_q), ("cu_seqlens_k", cu_seqlens_k, rows_k)):
        if cu_seqlens is not None and rows > INT32_MAX:
            raise CumulativeSeqlensError(f"{names[name]} for {rows} rows: its int32 offsets overflow at {INT32_MAX}")
    scale = default_scale(q.shape[-1]) if options.softmax_scale is None else float(options.softmax_scale)
    check_factor(names["softmax_scale"], scale)
    declared = options_of(AttentionProblem)
    given = {
        name: of.tensor is not None and getattr(extras, of.tensor.name) is not None for name, of in declared.items()
    }
    fields = {name: getattr(options, name) for name in declared if name in Options._fields}
    fields |= {name: given[name] for name, of in declared.items() if of.tensor is not None}
    longest_q = _longest_q(names, rows_q, options.max_seqlen_q, given["varlen_q"], given["seqused_q"])
    _check_tree_mask(names, extras.tree_mask, q, longest_q)
    fields |= {
        "k_block_descale": _has_blocks(extras.k_descale),
        "v_block_descale": _has_blocks(extras.v_descale),
        "k_row_descale": has_rows(extras.k_descale),
        "v_row_descale": has_rows(extras.v_descale),
        "page_size": page_size,
        "softcap": float(options.softcap),
        "num_splits": options.num_splits or 1,  # 0 is for the table to choose
        "persistent": PersistentMode.named(options.persistent),
        "deterministic": False,  # of a backward alone
        "dtype_k": dtype_k,
        "dtype_v": dtype_v,
        "out_dtype": out_dtype,
    }
    problem = AttentionProblem(
        arch=arch,
        dtype=dtype,
        batch=max(batch, 1),
        seqlen_q=longest_q,
        seqlen_k=longest_k,
        num_heads=q.shape[-2],
        num_heads_kv=k.shape[-2],
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        **fields | {"softmax_scale": scale} | backward,
    )
    if key_major:
        _check_key_major(names["v"], v)
    return problem


def _check_extras(names: ArgumentNames, extras: Extras, batch: int, sequences: str, heads: int) -> None:
    """Raise the error of lengths, slopes or sinks of another dtype or shape than the batch and the heads ask for."""
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"):
        tensor = getattr(extras, name)
        if tensor is not None:
            check_vector(names[name], tensor, torch.int32, (batch + name.startswith("cu"),), of=sequences)
    if extras.cache_leftpad is not None:
        if extras.cu_seqlens_k is not None:
            raise ArgumentError(
                f"{names['cache_leftpad']} with {names['cu_seqlens_k']}: a packed sequence starts where its offset says"
            )
        check_vector(names["cache_leftpad"], extras.cache_leftpad, torch.int32, (batch,), of=sequences)
    of_heads = f"{heads} heads of {names['q']}"
    if extras.alibi_slopes is not None:
        shapes = (heads,), (batch, heads)
        check_vector(names["alibi_slopes"], extras.alibi_slopes, torch.float32, *shapes, of=of_heads)
    if extras.learnable_sink is not None:
        check_vector(names["learnable_sink"], extras.learnable_sink, torch.float32, (heads,), of=of_heads)


def _check_walks(names: ArgumentNames, extras: Extras, rows_q: int, rows_k: int) -> None:
    """Raise the error of walks of a range plan, or positions, of another dtype or shape."""
    for name in ("query_walk", "key_walk", "dq_walk"):
        walk = getattr(extras, name)
        if walk is not None:
            check_integers(names[name], walk)
            check_dims(names[name], walk, 1, "(words)")
            check_contiguous_rows(names[name], walk)
    for name, rows in (("q_positions", rows_q), ("k_positions", rows_k)):
        positions = getattr(extras, name)
        if positions is not None:
            check_vector(names[name], positions, torch.int32, (positions_held(rows),), of=f"{rows} rows")


def _check_tree_mask(names: ArgumentNames, tree_mask: torch.Tensor | None, q: torch.Tensor, longest_q: int) -> None:
    """Raise DTypeError, ShapeError or StrideError unless this is int32 (…, words), … the rows of q, with a bit for each
    query of the longest sequence."""
    if tree_mask is None:
        return
    name = names["tree_mask"]
    check_integers(name, tree_mask)
    rows, words = tuple(q.shape[:-2]), -(-longest_q // 32)
    if tuple(tree_mask.shape[:-1]) != rows or tree_mask.shape[-1] < max(words, 1):
        needed = (*rows, max(words, 1))
        rule = f"{needed} is needed, or more words: a bit for each of up to {longest_q} queries of {names['q']}"
        raise ShapeError(f"{name} {tuple(tree_mask.shape)}: {rule}")
    check_contiguous_rows(name, tree_mask)


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether rows lie so far apart that the bytes from one tile to the next are no int32, in which kernels count where
    tiles come in any order."""
    return tensor.shape[-3] > 1 and tensor.stride(-3) * tensor.element_size() * LARGEST_TILE > INT32_MAX


def positions_held(rows: int) -> int:
    """How many positions kernels may read, of so many rows: those of whole tiles."""
    return (-(-rows // LARGEST_TILE) + 1) * LARGEST_TILE


def _has_blocks(descale: torch.Tensor | None) -> bool:
    """Whether blocks of keys have descales of their own."""
    return descale is not None and descale.dim() == 3


def _check_descales(names: ArgumentNames, call: Call, batch: int, sequences: str, longest_k: int) -> None:
    """Raise the error of descales for 16-bit tensors, or of another dtype, shape or stride than the batch, the kv heads
    and the longest sequence's keys ask for."""
    shape = batch, call.k.shape[-2]
    blocks = -(-longest_k // DESCALE_BLOCK)
    for name in "qkv":
        descale, of = getattr(call.extras, f"{name}_descale"), getattr(call, name)
        if descale is not None:
            called = names[f"{name}_descale"]
            if not is_codes(of):
                rule = "only fp8 and int8 codes have descales"
                raise Fp8Error(f"{called} with {names[name]} in {_short(of.dtype)}: {rule}")
            asked = f"{sequences} and {shape[1]} heads of {names['k']}"
            if name in "kv" and _has_blocks(descale):
                _check_block_descale(called, descale, (*shape, blocks), asked)
            elif name in "kv" and has_rows(descale):
                check_row_descale(called, descale, names[name], of)
            else:
                check_descale(called, descale, shape, asked)


def _check_block_descale(name: str, descale: torch.Tensor, shape: tuple[int, int, int], of: str) -> None:
    """Raise DTypeError, ShapeError or StrideError unless this is fp32 (batch, heads_kv, blocks), at least ``shape``."""
    if descale.dtype != torch.float32:
        raise DTypeError(name, descale.dtype, "float32 is needed")
    if tuple(descale.shape[:2]) != shape[:2] or descale.shape[2] < shape[2]:
        rule = f"{shape} is needed, one for each {DESCALE_BLOCK} keys, for the {of}"
        raise ShapeError(f"{name} {tuple(descale.shape)}: {rule}")
    check_contiguous_rows(name, descale)


def has_rows(descale: torch.Tensor | None) -> bool:
    """Whether rows of a cache, or of its pages, have descales of their own."""
    return descale is not None and descale.dim() == 4


def check_row_descale(name: str, descale: torch.Tensor, like: str, cache: torch.Tensor) -> None:
    """Raise DTypeError or ShapeError unless this is fp32 and broadcasts against the cache, an argument ``like``, with
    one number for all elements of a head."""
    if descale.dtype != torch.float32:
        raise DTypeError(name, descale.dtype, "float32 is needed")
    whole = (*cache.shape[:-1], 1)
    if cache.dim() != 4 or any(size not in (1, full) for size, full in zip(descale.shape, whole, strict=True)):
        rule = f"{whole} is needed, or 1 in the place of any of these, for {like} {tuple(cache.shape)}"
        if cache.dim() != 4:
            rule = f"descales of rows are of a cache or of its pages, {like} {tuple(cache.shape)} is packed"
        raise ShapeError(f"{name} {tuple(descale.shape)}: {rule}")


def check_descale(name: str, descale: torch.Tensor, shape: tuple[int, int], of: str) -> None:
    """Raise DTypeError or ShapeError unless this is fp32 (batch, heads_kv), which are ``shape``, or one number."""
    if descale.dtype != torch.float32:
        raise DTypeError(name, descale.dtype, "float32 is needed")
    if tuple(descale.shape) != shape and (descale.numel() != 1 or descale.dim() > 2):
        raise ShapeError(f"{name} {tuple(descale.shape)}: {shape} is needed, or one number, for the {of}")


def check_devices(tensors: Mapping[str, torch.Tensor | None], first: str) -> None:
    """Raise DeviceError unless all tensors are where ``first`` is."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    for name, device in devices.items():
        if device != devices[first]:
            raise DeviceError(
                f"{name} is on {device} and {first} on {devices[first]}: all tensors must be on one device"
            )


def check_like(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, like: str = "") -> None:
    """Raise ShapeError or DTypeError unless the tensor has this shape and dtype; ``like``: the argument that asks for
    them."""
    asked = f", as {like} has it" if like else ""
    if tuple(tensor.shape) != tuple(shape):
        raise ShapeError(f"{name} {tuple(tensor.shape)}: {tuple(shape)} is needed{asked}")
    if tensor.dtype != dtype:
        raise DTypeError(name, tensor.dtype, f"{str(dtype).removeprefix('torch.')} is needed{asked}")


def load_rule(tensor: torch.Tensor) -> str | None:
    """The rule that the strides break if 16-byte loads cannot follow them; those of dimensions of size 1 do not matter,
    0 is fine. Where rows of this head_dim cannot be followed whatever the strides, it is the table that says so."""
    strides = tensor.stride()
    if tensor.numel() == 0 or tensor.shape[-1] * tensor.element_size() % ALIGNMENT:  # see check_head_dim
        return None
    if strides[-1] != 1 and tensor.shape[-1] > 1:
        return "the last dimension must be contiguous"
    for size, stride in zip(tensor.shape[:-1], strides[:-1], strict=True):
        if size > 1 and stride * tensor.element_size() % ALIGNMENT:
            return f"every stride but the last must be a multiple of {ALIGNMENT} bytes"
    return None


def _check_key_major(name: str, v: torch.Tensor) -> None:
    """Raise StrideError unless loads can follow v (batch, seqlen_k, heads_kv, head_dim_v) along its keys."""
    for dim, (size, stride) in enumerate(zip(v.shape, v.stride(), strict=True)):
        if dim == 1 and size > 1 and stride != 1:
            raise StrideError(name, v.stride(), "the keys must be contiguous for v_layout='key_major'")
        if dim != 1 and size > 1 and v.numel() and stride * v.element_size() % ALIGNMENT:
            raise StrideError(name, v.stride(), f"every stride but the keys' must be a multiple of {ALIGNMENT} bytes")


def check_writable(name: str, tensor: torch.Tensor) -> None:
    """Raise StrideError for a tensor of which elements share memory."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < extent:
            raise StrideError(name, tensor.stride(), "elements that share memory cannot be written")
        extent += stride * (size - 1)


def check_pointers(tensors: dict[str, torch.Tensor]) -> None:
    """Raise AlignmentError for a tensor whose first element is not 16-byte aligned."""
    for name, tensor in tensors.items():
        if tensor.data_ptr() % ALIGNMENT:
            raise AlignmentError(name, tensor.data_ptr(), ALIGNMENT)


def check_separate(written: str, tensor: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
    """Raise ArgumentError if a written tensor meets an input in memory: the ranges of addresses that they span do, and
    they do not lie beside each other in periods of one stride, as keys and values of one allocation may."""
    start, end = _extent(tensor)
    for name, other in inputs.items():
        first, last = _extent(other)
        if first < end and start < last and not _side_by_side(tensor, other):
            raise ArgumentError(
                f"{written} shares its memory with {name}: a kernel uses {name} while it writes {written}"
            )


def _side_by_side(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the addresses of two tensors differ in their remainders by a stride that both have."""
    strides = [
        [stride * t.element_size() for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
        for t in (a, b)
    ]
    for period in sorted({*strides[0]} & {*strides[1]}):
        places = []
        for t in (a, b):
            inner = t.element_size()
            for size, stride in zip(t.shape, t.stride(), strict=True):
                if size > 1 and (stride * t.element_size()) % period:
                    inner += (size - 1) * stride * t.element_size()
            places.append((t.data_ptr() % period, inner))
        (start, inner), (other, extent) = sorted(places)
        if start + inner <= other and other + extent <= start + period:
            return True
    return False


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one after the last; nothing for an empty tensor."""
    if tensor.numel() == 0:
        return 0, 0
    reach = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


def check_values(problem: AttentionProblem, call: Call) -> None:
    """Check the numbers in the length tensors, the page table, the cache's index, the slopes and the sinks: one host
    synchronisation each.

    Raises CumulativeSeqlensError, LengthError, PageTableError, CacheIndexError or ArgumentError.
    """
    q, k, extras, names = call.q, call.k, call.extras, names_of(call.options.names)
    if extras.cu_seqlens_q is not None:
        held_q = held_lengths(names["cu_seqlens_q"], extras.cu_seqlens_q, q)
    else:
        held_q = [q.shape[1]] * q.shape[0]
    table = extras.page_table
    if extras.cu_seqlens_k is not None:
        held_k = held_lengths(names["cu_seqlens_k"], extras.cu_seqlens_k, k)
    else:
        held_k = [k.shape[1] * (1 if table is None else table.shape[1])] * len(held_q)
    used_q = used_within(names["seqused_q"], extras.seqused_q, held_q)
    holder = "the tensor" if table is None else f"a row of {names['page_table']}"
    used_k = used_within(names["seqused_k"], extras.seqused_k, held_k, holder)
    if extras.cache_leftpad is not None:
        used_within(names["cache_leftpad"], extras.cache_leftpad, used_k)
    for name, used, longest in (
        ("max_seqlen_q", used_q, problem.seqlen_q),
        ("max_seqlen_k", used_k, problem.seqlen_k),
    ):
        if max(used, default=0) > longest:
            raise LengthError(f"{names[name]}={longest}: a sequence has {max(used)} tokens")
    check_cache_places(names, k, used_k, table, extras.cache_batch_idx)
    scale = problem.softmax_scale
    for name in ("q_descale", "k_descale", "v_descale"):
        descale = getattr(extras, name)
        if descale is not None:
            if _has_blocks(descale):
                descale = _reached_blocks(descale, used_k)
            if has_rows(descale):
                of = k if name == "k_descale" else call.v
                descale = reached_rows(descale, of, used_k, table, extras.cache_batch_idx, extras.cache_leftpad)
            check_descale_values(names[name], descale)
            scale *= 1.0 if name == "v_descale" else min(descale.flatten().tolist(), default=1.0)
    if extras.alibi_slopes is not None:
        # Kernels hold scores, before the exponential's factor, in units of the scale or of twice the cap.
        unit = min(2.0 * problem.softcap or scale, 1.0)
        bound = _LARGEST_LOGIT * unit / max(problem.seqlen_q, problem.seqlen_k, 1)
        rule = f"between -{bound:.3g} and {bound:.3g}, so that no bias overflows float32"
        _check_numbers(names["alibi_slopes"], extras.alibi_slopes, lambda slope: abs(slope) <= bound, rule)
    if extras.learnable_sink is not None:
        rule = "between -2^126 and 2^126, or -inf for none"
        _check_numbers(
            names["learnable_sink"],
            extras.learnable_sink,
            lambda sink: abs(sink) <= _LARGEST_LOGIT or sink == -math.inf,
            rule,
        )


def _reached_blocks(descale: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Descales of blocks, 1 for those that lie beyond a sequence's length."""
    first = torch.arange(descale.shape[2], device=descale.device) * DESCALE_BLOCK
    reached = first < torch.tensor(lengths, device=descale.device)[:, None]
    return torch.where(reached[:, None], descale, 1.0)


def reached_rows(
    descale: torch.Tensor,
    cache: torch.Tensor,
    lengths: list[int],
    page_table: torch.Tensor | None,
    cache_batch_idx: torch.Tensor | None,
    cache_leftpad: torch.Tensor | None = None,
) -> torch.Tensor:
    """Descales of rows, 1 for rows of the cache that no sequence has; ``lengths``: with the padding."""
    held = torch.zeros(cache.shape[:2], dtype=torch.bool)
    sequences = range(len(lengths)) if cache_batch_idx is None else cache_batch_idx.tolist()
    starts = [0] * len(lengths) if cache_leftpad is None else cache_leftpad.tolist()
    for sequence, start, length in zip(sequences, starts, lengths, strict=True):
        rows = torch.arange(start, length)
        if page_table is None:
            held[sequence, rows] = True
        else:
            held[page_table[sequence].cpu().long()[rows // cache.shape[1]], rows % cache.shape[1]] = True
    return torch.where(held[..., None, None], descale.cpu(), 1.0)


def check_descale_values(name: str, descale: torch.Tensor) -> None:
    """Raise ArgumentError unless all numbers can be multiplied and divided by: a host synchronisation."""
    _check_numbers(name, descale, lambda number: 2.0**-32 <= number <= 2.0**32, "between 2^-32 and 2^32")


def _check_numbers(name: str, tensor: torch.Tensor, allowed: Callable[[float], bool], rule: str) -> None:
    """Raise ArgumentError unless every element is allowed; NaN is not."""
    for index, number in enumerate(tensor.flatten().tolist()):
        if not allowed(number):
            place = list(map(int, torch.unravel_index(torch.tensor(index), tensor.shape)))
            raise ArgumentError(f"{name}{place or ''}={number:.4g}: {rule}")


def check_cache_places(
    names: ArgumentNames,
    k: torch.Tensor,
    lengths: list[int],
    page_table: torch.Tensor | None,
    cache_batch_idx: torch.Tensor | None,
) -> None:
    """Check that the cache ``k`` has the pages, or the sequences, in which these lengths are said to lie: a host
    synchronisation for each tensor. Raises PageTableError or CacheIndexError."""
    sequences = list(range(len(lengths)))
    if cache_batch_idx is not None:
        sequences = cache_batch_idx.tolist()
        held = k.shape[0] if page_table is None else page_table.shape[0]
        has = f"the cache has {held} sequences" if page_table is None else f"{names['page_table']} has {held} rows"
        for b, sequence in enumerate(sequences):
            if not 0 <= sequence < held:
                raise CacheIndexError(f"{names['cache_batch_idx']}[{b}]={sequence}: {has}")
    if page_table is not None:
        table = page_table.tolist()
        for length, row in zip(lengths, sequences, strict=True):
            for page in table[row][: -(-length // k.shape[1])]:
                if not 0 <= page < k.shape[0]:
                    listed = f"{names['page_table']}[{row}] lists page {page}"
                    raise PageTableError(f"{listed}: the cache has {k.shape[0]} pages")


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


def used_within(name: str, seqused: torch.Tensor | None, held: list[int], holder: str = "the tensor") -> list[int]:
    if seqused is None:
        return held
    used = seqused.tolist()
    for b, (length, most) in enumerate(zip(used, held, strict=True)):
        if not 0 <= length <= most:
            raise LengthError(f"{name}[{b}]={length}: between 0 and the {most} tokens that {holder} holds")
    return used


def _dtypes(names: ArgumentNames, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[DType, DType, DType]:
    """Of q, k and v: k's and v's are q's, both fp8, or both codes beside q of 16 bits."""
    of_q = [theirs for theirs, ours in DTYPES.items() if ours is not DType.INT8]
    if q.dtype not in of_q:
        raise DTypeError(names["q"], q.dtype, f"one of {', '.join(map(_short, of_q))} is needed{_viewed(q)}")
    fp8, both_codes = DTYPES[q.dtype].is_fp8, is_codes(k) and is_codes(v)
    for name, tensor in (("k", k), ("v", v)):
        fits = is_codes(tensor) and DTYPES[tensor.dtype].is_fp8 if fp8 else both_codes or tensor.dtype == q.dtype
        if not fits:
            must = "must be fp8, too" if fp8 else "must be too, or both fp8 or int8"
            rule = f"{names['q']} is {_short(q.dtype)}, {names['k']} and {names['v']} {must}{_viewed(tensor)}"
            raise DTypeError(names[name], tensor.dtype, rule)
    return DTYPES[q.dtype], DTYPES[k.dtype], DTYPES[v.dtype]


def is_codes(tensor: torch.Tensor) -> bool:
    """Whether a value is code × descale: fp8, int8."""
    return tensor.dtype in DTYPES and DTYPES[tensor.dtype].is_codes


def _viewed(tensor: torch.Tensor) -> str:
    """What to do about fp8 codes that are bytes."""
    return "; fp8 codes in bytes are given as tensor.view(torch.float8_e4m3fn)" if tensor.dtype == torch.uint8 else ""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _out_dtype(dtype: DType, asked: str | None, out: torch.Tensor | None) -> DType:
    """The output's: what is asked for, of fp8 else that of ``out``, else bf16."""
    usual = DType.BF16 if dtype.is_fp8 else dtype
    if asked is not None:
        return DType(asked)
    if dtype.is_fp8 and out is not None and out.dtype == torch.float16:
        return DType.FP16
    return usual


def _queries(names: ArgumentNames, q: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> tuple[int, int]:
    """(batch, rows of the tensor)."""
    if cu_seqlens_q is None:
        check_dims(names["q"], q, 4, "(batch, seqlen_q, heads, head_dim)")
        return q.shape[0], q.shape[1]
    offsets = names["cu_seqlens_q"]
    check_dims(names["q"], q, 3, f"(total_q, heads, head_dim) with {offsets}")
    return batch_of(offsets, cu_seqlens_q), q.shape[0]


def batch_of(name: str, cu_seqlens: torch.Tensor) -> int:
    """How many sequences offsets (batch + 1) are of."""
    check_dims(name, cu_seqlens, 1, "(batch + 1)")
    if cu_seqlens.shape[0] == 0:
        raise EmptyBatchError(f"{name} (0,): (batch + 1), and so at least the offset 0, is needed")
    return cu_seqlens.shape[0] - 1


def keys_of(
    names: ArgumentNames,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: int,
    sequences: str,
    cu_seqlens_k: torch.Tensor | None,
    page_table: torch.Tensor | None,
    cache_batch_idx: torch.Tensor | None,
) -> tuple[int, int | None]:
    """(rows that one sequence, or the packed tensor, can hold; page size or None). ``sequences``: how many there are,
    and what says so."""
    page_size = None
    name, table, index, offsets = (names[n] for n in ("k", "page_table", "cache_batch_idx", "cu_seqlens_k"))
    if cache_batch_idx is not None:
        if cu_seqlens_k is not None:
            raise ArgumentError(f"{index} with {offsets}: only caches take an index")
        check_vector(index, cache_batch_idx, torch.int32, (batch,), of=sequences)
    if page_table is not None:
        if cu_seqlens_k is not None:
            raise ArgumentError(f"{offsets} with {table}: a paged cache takes its lengths from {names['seqused_k']}")
        check_dims(name, k, 4, f"(num_pages, page_size, heads_kv, head_dim) with {table}")
        check_integers(table, page_table)
        check_dims(table, page_table, 2, "(batch, max_pages)")
        if page_table.shape[0] != batch and cache_batch_idx is None:
            raise ShapeError(f"{table} {tuple(page_table.shape)}: one row for each of {sequences} is needed")
        if batch == 0:
            raise EmptyBatchError(
                f"{table} {tuple(page_table.shape)}: a paged cache of at least one sequence is needed"
            )
        for empty, tensor, pages in ((name, k, k.shape[0]), (table, page_table, page_table.numel())):
            if pages == 0:
                raise EmptyCacheError(f"{empty} {tuple(tensor.shape)}: the cache has no pages")
        check_page_size(k.shape[1], f"{name} {tuple(k.shape)}")
        check_contiguous_rows(table, page_table)
        page_size, rows = k.shape[1], page_table.shape[1] * k.shape[1]
    elif cu_seqlens_k is not None:
        check_dims(name, k, 3, f"(total_k, heads_kv, head_dim) with {offsets}")
        rows = k.shape[0]
    else:
        check_dims(name, k, 4, "(batch, seqlen_k, heads_kv, head_dim)")
        rows = k.shape[1]
        if cache_batch_idx is not None and k.shape[0] == 0:
            raise EmptyCacheError(f"{name} {tuple(k.shape)}: the cache has no sequences")
        if cache_batch_idx is None and k.shape[0] != batch:
            raise ShapeError(f"{name} {tuple(k.shape)}: its first size is the batch, the {sequences}")
    if v.shape[:-1] != k.shape[:-1]:
        both = f"{names['v']} {tuple(v.shape)} and {name} {tuple(k.shape)}"
        raise ShapeError(f"{both}: all sizes but the last must be equal")
    if k.shape[-1] != q.shape[-1]:
        rule = f"{name} has head_dim {k.shape[-1]} and {names['q']} {q.shape[-1]}: they must be equal"
        raise PagedHeadDimError(f"paged {rule}") if page_table is not None else ShapeError(rule)
    return rows, page_size


def _check_heads(names: ArgumentNames, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """No number of heads nor head_dim is 0, and query heads share kv heads evenly."""
    sizes = {
        "num_heads": ("q", q, -2),
        "num_heads_kv": ("k", k, -2),
        "head_dim": ("q", q, -1),
        "head_dim_v": ("v", v, -1),
    }
    for size, (name, tensor, dim) in sizes.items():
        if tensor.shape[dim] == 0:
            raise ShapeError(f"{names[name]} {tuple(tensor.shape)}: {size}=0: at least 1 is needed")
    if q.shape[-2] % k.shape[-2]:
        raise ShapeError(
            f"{names['q']} and {names['k']} have {q.shape[-2]} query heads and {k.shape[-2]} kv heads: "
            "the number of query heads must be a multiple of the number of kv heads"
        )


def _output(name: str, out: torch.Tensor, q: torch.Tensor, v: torch.Tensor, dtype: DType) -> None:
    expected = (*q.shape[:-1], v.shape[-1])
    if tuple(out.shape) != expected:
        raise ShapeError(f"{name} {tuple(out.shape)}: {expected} is needed")
    if out.dtype != TORCH_DTYPES[dtype]:
        raise DTypeError(name, out.dtype, f"{_short(TORCH_DTYPES[dtype])} is needed")
    check_writable(name, out)


def check_loadable(name: str, tensor: torch.Tensor) -> None:
    rule = load_rule(tensor)
    if rule is not None:
        raise StrideError(name, tensor.stride(), rule)


def check_head_dim(name: str, tensor: torch.Tensor, size: str = "head_dim") -> None:
    """Raise ShapeError for rows that 16-byte loads cannot follow whatever the strides; ``size``: head_dim's name."""
    step = ALIGNMENT // tensor.element_size()
    if tensor.shape[-1] % step or tensor.shape[-1] == 0:
        rule = f"a multiple of {step} is needed, {ALIGNMENT} bytes"
        raise ShapeError(f"{name} {tuple(tensor.shape)}: {size}={tensor.shape[-1]}: {rule}")


def check_vector(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, *shapes: tuple[int | torch.SymInt, ...], of: str = ""
) -> None:
    """A tensor of one of these shapes with contiguous rows; ``of``: what its elements are one each for."""
    if tensor.dtype != dtype:
        raise DTypeError(name, tensor.dtype, f"{str(dtype).removeprefix('torch.')} is needed")
    if tuple(tensor.shape) not in shapes:
        asked = f" for the {of}" if of else ""
        raise ShapeError(f"{name} {tuple(tensor.shape)}: {' or '.join(map(str, shapes))} is needed{asked}")
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


def _longest_q(names: ArgumentNames, rows: int, given: int | None, packed: bool, seqused: bool) -> int:
    """The most queries of a sequence: ``max_seqlen_q`` where packed. All rows of a dense tensor belong to a sequence:
    those beyond seqused_q are part of the result."""
    name = names["max_seqlen_q"]
    _check_longest(name, given, rows)
    if given is None:
        return rows
    if packed:
        return min(given, rows)
    if given < rows and not seqused:
        raise LengthError(f"{name}={given}: each sequence has {rows} tokens")
    return rows


def _longest_k(names: ArgumentNames, rows: int, given: int | None, varlen: bool, page_size: int | None) -> int:
    """The most keys of a sequence: ``max_seqlen_k`` where lengths are given, else what the tensor or the pages hold."""
    name = names["max_seqlen_k"]
    _check_longest(name, given, rows)
    if given is None:
        return rows
    if given < rows and not varlen:
        held = f"each sequence has {rows} tokens"
        if page_size is not None:
            held = (
                f"without {names['seqused_k']} each sequence has the {rows} tokens that its row of "
                f"{names['page_table']} holds"
            )
        raise LengthError(f"{name}={given}: {held}")
    return min(given, rows)


def _check_longest(name: str, given: int | None, rows: int) -> None:
    if given == 0 and rows > 0:
        raise ZeroLengthError(f"{name}=0 for {rows} tokens: the longest sequence has at least 1 token")
    if given is not None and given < 0:
        raise LengthError(f"{name}={given}: a length is at least 0")
    if given is not None and given > INT32_MAX:
        raise LengthError(f"{name}={given}: at most {INT32_MAX}")

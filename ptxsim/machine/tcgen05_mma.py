"""tcgen05.mma at run time: PTX ISA 9.7.16.10, instruction descriptors 9.7.16.4.2.

Layouts in tensor memory that the ISA shows only in figures follow CUTLASS (include/cute/atom/mma_traits_sm100_frag.hpp:
tmem_frg, tmem_frg_ws, tmem_sf_frg, tmem_e_frg), whose element offsets are those of the figures.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ..arrays import active_threads, full_width
from ..errors import PtxError
from ..ops.numerics import DECODE, ELEMENT_BYTES, f16_to_f32, ue4m3_to_f64, ue8m0_to_f64
from ..ops.sparsity import expand, metadata_codes
from ..ops.tensor5 import MmaForm
from .events import nobody
from .operands import tcgen05_descriptor
from .products import products, sum_of_blocks

_u4, _f4, _f8 = np.uint32, np.float32, np.float64
_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_SMALL = {0: "e4m3", 1: "e5m2", 3: "e2m3", 4: "e3m2", 5: "e2m1"}
_TYPES = {"f16": {0: "f16", 1: "bf16"}, "tf32": {2: "tf32"}, "f8f6f4": _SMALL, "i8": {0: "u8", 1: "s8"},
          "mxf8f6f4": _SMALL, "mxf4": {1: "e2m1x2"}, "mxf4nvf4": {1: "e2m1x2"}}  # fmt: skip
_RESULTS = {"f16": {0: "f16", 1: "f32"}, "f8f6f4": {0: "f16", 1: "f32"}, "tf32": {1: "f32"}, "i8": {2: "s32"}}
_SCALED = ("mxf8f6f4", "mxf4", "mxf4nvf4")
# how formats of less than 8 bits are stored in shared and in tensor memory
_SHARED = {"e2m1": "e2m1_p64", "e2m3": "e2m3_p32", "e3m2": "e3m2_p32"}
_TENSOR = {"e2m1": "e2m1_mid", "e2m3": "e2m3_mid", "e3m2": "e3m2_mid"}
_ROW_BYTES = 32  # of A: K is what fits


@dataclass(frozen=True)
class Description:
    """A decoded instruction descriptor: D (m x n) = A (m x k) B (k x n) + D."""

    m: int
    n: int
    k: int
    a_type: str
    b_type: str
    result: str
    negate: bool  # the product's sign
    a_transposed: bool
    b_transposed: bool
    saturate: bool = False
    selector: int = 0  # of sparsity metadata
    vector: int = 0  # scale factors of a row, 0 without scaling
    scale_type: str = ""
    a_scale_id: int = 0
    b_scale_id: int = 0


def _refuse(bits, what):
    raise PtxError(f"tcgen05.mma instruction descriptor 0x{bits:x}: {what}")


@functools.lru_cache(maxsize=1024)
def describe(form: MmaForm, bits: int) -> Description:
    """Decode an instruction descriptor for a form; PtxError for reserved values and shapes that do not exist."""
    kind, scaled = form.kind, form.kind in _SCALED
    types = _TYPES[kind]
    a_code, b_code = bits >> 7 & 7, bits >> 10 & (3 if kind.startswith("mxf4") else 7)
    if a_code not in types or b_code not in types:
        _refuse(bits, f"types {a_code} and {b_code}; kind::{kind} has only {', '.join(types.values())}")
    a_type, b_type = types[a_code], types[b_code]
    if bool(bits >> 2 & 1) != form.sparse:
        _refuse(bits, f"its bit for sparsity is {bits >> 2 & 1}")
    reserved = 0x07000049 if scaled else 0x20800040  # mxf4: bit 12, which the ISA reserves, is set by the DSL
    if bits & reserved or (scaled and bits & 0b11) or (kind == "mxf8f6f4" and bits >> 31):
        _refuse(bits, f"bits set that mean nothing for kind::{kind}")
    if scaled:
        scale_type = "ue8m0" if bits >> 23 & 1 else "ue4m3"
        if scale_type == "ue4m3" and (kind != "mxf4nvf4" or form.vector != 4):
            _refuse(bits, f"scale factors of type ue4m3 for kind::{kind} and {form.vector} a row")
        m = (bits >> 27 & 3) << 7
        rest = dict(scale_type=scale_type, a_scale_id=bits >> 29 & 3, b_scale_id=bits >> 4 & 3,
                    vector=form.vector * 3 // 2 if bits >> 31 else form.vector)  # fmt: skip
        result = "f32"
        step = {1: 1, 2: 2, 4: 4, 3: 1, 6: 2}[rest["vector"]]
        if rest["a_scale_id"] % step or rest["b_scale_id"] % step:
            _refuse(bits, f"scale factor IDs {rest['a_scale_id']} and {rest['b_scale_id']}, not multiples of {step}")
    else:
        result = _RESULTS[kind].get(bits >> 4 & 3)
        if result is None or (result == "f16" and "bf16" in (a_type, b_type)):
            _refuse(bits, f"a result of type {bits >> 4 & 3} for {a_type}; kind::{kind} has "
                          f"{', '.join(_RESULTS[kind].values())} (f16 not for bf16)")  # fmt: skip
        if bits >> 3 & 1 and kind != "i8":
            _refuse(bits, "saturation exists for kind::i8 only")
        if bits >> 30 and not form.stationary:
            _refuse(bits, "a maximum shift exists for .ws only")
        m, rest = (bits >> 24 & 31) << 4, dict(saturate=bool(bits >> 3 & 1))
        if form.sparse:
            rest["selector"] = bits & 3
        elif bits & 3:
            _refuse(bits, "a sparsity selector without sparsity")
    if bits >> 13 & 3 and kind == "i8":
        _refuse(bits, "kind::i8 negates nothing")
    n, transposed = (bits >> 17 & 63) << 3, bits >> 15 & 3
    _check_shape(form, bits, m, n, (a_type, b_type), transposed)
    k = _ROW_BYTES // ELEMENT_BYTES.get(a_type, 1) * (2 if a_type == "e2m1x2" else 1) * (2 if form.sparse else 1)
    if scaled and bits >> 31:
        k = 96
        if form.sparse or form.a_in_tmem or n % 16 or (form.pair and m != 256):
            _refuse(bits, "K = 96 exists for dense operands in shared memory, 128 rows by 1 and 256 by 2 CTAs, and "
                          "columns in sixteens")  # fmt: skip
    return Description(m, n, k, a_type, b_type, result, (bits >> 13 & 1) != (bits >> 14 & 1), bool(transposed & 1),
                       bool(transposed & 2), **rest)  # fmt: skip


def _check_shape(form, bits, m, n, types, transposed):
    """Tables 39 (shapes), 52 and 54 (transposition) of PTX ISA 9.7.16."""
    integer, scaled = form.kind == "i8", form.kind in _SCALED
    if form.stationary:
        good = m in (32, 64, 128) and n in ((64, 128) if form.sparse else (64, 128, 256))
    elif form.pair:
        good = m in (128, 256) and n % (32 if integer else 16) == 0
    else:
        good = (m == 128 or (m == 64 and not scaled)) and not (integer and n > 32 and n % 16)
    if not good or not 0 < n <= 256:
        _refuse(bits, f"there is no mma of {m} x {n} by {2 if form.pair else 1} CTAs for kind::{form.kind}")
    for which, element in enumerate(types):
        if transposed >> which & 1 and (element in _SHARED or element == "e2m1x2"):
            _refuse(bits, f"{'AB'[which]} of {element} cannot be transposed")
    if transposed & 2 and ELEMENT_BYTES.get(types[1]) == 1 and n % (32 if form.pair else 16):
        _refuse(bits, f"a transposed B of {types[1]} with n = {n}")
    if form.shift and m < 128:
        _refuse(bits, "ashift exists for m = 128 and 256 only")


@functools.lru_cache(maxsize=4096)
def _operand_layout(descriptor, transposed, element, depth):
    """``OperandLayout`` of A or B in shared memory; PtxError for what table 54 of PTX ISA 9.7.16.10.3 does not have.
    K-major operands with atoms of 32 bytes, which it has, are invalid for CUTLASS's make_umma_desc."""
    layout, size = tcgen05_descriptor(descriptor), ELEMENT_BYTES[element]
    if (layout.atom == 32) != bool(transposed and size == 4):
        major = "MN" if transposed else "K"
        raise PtxError(f"tcgen05 descriptor 0x{descriptor:x} of {major}-major {element}: 128-byte swizzles of 32-byte "
                       "atoms are for MN-major tf32, which has no others")  # fmt: skip
    row = depth * size
    if layout.absolute and row != 48:
        raise PtxError(f"tcgen05 descriptor 0x{descriptor:x}: an absolute leading address exists for K = 96 only")
    if row == 48 and not layout.absolute and layout.span and layout.start % layout.span + row > layout.span:
        raise PtxError(f"tcgen05 descriptor 0x{descriptor:x}: K = 96 goes beyond the {layout.span} bytes of a line; "
                       "that takes an absolute leading address")  # fmt: skip
    return layout


def _scale_columns(count, number, vector):
    """Scale factors of ``count`` rows, ``vector`` each from byte ``number`` on: (columns that hold four of each row,
    columns from those to the next four, how many such fours there are, columns in all)."""
    columns, step, fours = -(-count // 32), -(-count // 128) * 4, -(-(number + vector) // 4)
    return columns, step, fours, step * (fours - 1) + columns


def accumulator_parts(form, description, lane):
    """Where D of one CTA is: a list of (lanes, rows of the product, columns of D). Layouts A to G of PTX ISA
    9.7.16.10.5. With A in tensor memory each part of D's columns multiplies the A of its own lanes, which are other
    rows of the product: FlashMLA's "dual gemm" has two halves of K there."""
    m, n = description.m // (2 if form.pair else 1), description.n
    if m == 64 and not form.stationary and (not form.pair or form.sparse):  # layouts F and C: 16 lanes of each quarter
        if lane not in (0, 16):
            raise PtxError(f"tcgen05.mma with 64 rows at lane {lane}, not 0 or 16")
        return [(lane + np.arange(64) % 16 + np.arange(64) // 16 * 32, slice(0, 64), slice(0, n))]
    if lane:
        raise PtxError(f"tcgen05.mma with {description.m} rows at lane {lane}, not 0")
    count = 128 // m  # layouts A and D: 1; B and E: 2; G: 4 parts of the columns, on m lanes each
    return [
        (np.arange(m * i, m * i + m), slice(m * i, m * i + m) if form.a_in_tmem else slice(0, m),
         slice(n // count * i, n // count * (i + 1))) for i in range(count)
    ]  # fmt: skip


def _scaled(left, right, a_scale, b_scale):
    """(A * scale_A) (B * scale_B) as float32 [rows, n]; a block is summed in float32, the scaled blocks in float64."""
    a_blocks, b_blocks = (
        x.reshape(len(x), scale.shape[1], -1).swapaxes(0, 1) for x, scale in ((left, a_scale), (right, b_scale))
    )
    return sum_of_blocks(products(a_blocks, b_blocks), a_scale.T, b_scale.T)


class Tcgen05Mma:
    """tcgen05.mma in all its forms."""

    def __init__(self, wave, operands, tensor_memory, tcgen05_copy):
        self.wave, self.events, self.operands, self.tensor_memory = wave, wave.events, operands, tensor_memory
        self.tcgen05_copy = tcgen05_copy
        self.sums = wave.launch.tensor_sums

    def multiply(self, w, form, d, a, b, instruction, enable, others, M):
        """tcgen05.mma (PTX ISA 9.7.16.10.9) for each active thread; operands are [n, 32] or scalars.

        ``form`` is an ``MmaForm``; ``d`` a tensor memory address; ``a`` a descriptor, or an address if
        ``form.a_in_tmem``; ``enable``: add to D. ``others`` are those that only some forms have: meta, scale_a,
        scale_b (addresses), disabled (words of lanes that keep D), zero_mask (descriptor).
        Raises PtxError for what is not simulated, MemoryFault for columns that are not allocated.
        """
        if self.events.tcgen05_mma:
            self.events.tcgen05_mma(w, form, M)
        n = len(w)
        d, a, b, instruction, enable = (full_width(x, n) for x in (d, a, b, instruction, enable))
        disabled = [full_width(x, n) for x in others.get("disabled", ())]
        others = {name: full_width(x, n) for name, x in others.items() if name != "disabled"}
        for j, lane in active_threads(w, M):
            cta = int(self.wave.cta_of[w[j]])
            description = describe(form, int(instruction[j, lane]))
            args = [int(x[j, lane]) for x in (d, a, b)]
            mine = {name: int(x[j, lane]) for name, x in others.items()}
            if disabled:
                mine["disabled"] = [int(x[j, lane]) for x in disabled]
            if mine.get("zero_mask", 0) & (0x3F << 56 | 1 << 39):
                raise PtxError(f"tcgen05.mma.ws with the zero-column mask 0x{mine['zero_mask']:x} is not simulated")
            if self.events.tensor_core_reads or self.events.tensor_matrix:
                self._tell_operands(w[j], form, description, cta, *args, mine)
            self.tensor_memory.defer(
                w[j], lambda x=(form, description, cta, *args, bool(enable[j, lane]), mine): self._perform(*x)
            )

    def _ctas(self, cta, pair):
        return [cta & ~1, cta | 1] if pair else [cta]

    def _tell_operands(self, warp, form, description, cta, d, a, b, others):
        """Tell observers which shared and tensor memory a tcgen05.mma reads and writes."""
        reads, tensor = (
            functools.partial(hears, int(warp)) if hears else nobody
            for hears in (self.events.tensor_core_reads, self.events.tensor_matrix)
        )
        for c in self._ctas(cta, form.pair):
            reads(c, self.operands.chunks(*self._b_place(form, description, b)))
            if form.a_in_tmem:
                tensor(c, self._a_lanes(form, description, a >> 16, d >> 16), a & 0xFFFF, 8, False)
            else:
                reads(c, self.operands.chunks(*self._a_place(form, description, a)))
            # metadata and scale factors: as many columns as any form has
            columns = {"meta": 2}
            if form.vector:
                columns["scale_a"] = _scale_columns(128, description.a_scale_id, description.vector)[-1]
                columns["scale_b"] = _scale_columns(description.n, description.b_scale_id, description.vector)[-1]
            for name, count in columns.items():
                if name in others:
                    tensor(c, np.arange(128), others[name] & 0xFFFF, count, False)
            for lanes, _, columns in accumulator_parts(form, description, d >> 16):
                tensor(c, lanes, d & 0xFFFF, columns.stop - columns.start, True)

    def _a_place(self, form, description, descriptor):
        """Arguments of ``Operands.tile`` after the CTA for A of one CTA."""
        element = _SHARED.get(description.a_type, description.a_type)
        depth = 48 if description.k == 96 else _ROW_BYTES // ELEMENT_BYTES[element]
        return (_operand_layout(descriptor, description.a_transposed, element, depth), description.a_transposed,
                description.m // (2 if form.pair else 1), depth, element)  # fmt: skip

    def _b_place(self, form, description, descriptor):
        element = _SHARED.get(description.b_type, description.b_type)
        depth = description.k // (2 if element == "e2m1x2" else 1)
        return (_operand_layout(descriptor, description.b_transposed, element, depth), description.b_transposed,
                description.n // (2 if form.pair else 1), depth, element)  # fmt: skip

    def _perform(self, form, description, cta, d, a, b, enable, others):
        ctas = self._ctas(cta, form.pair)
        right = np.concatenate([self.operands.tile(c, *self._b_place(form, description, b)) for c in ctas])
        for c in ctas:
            left = self._left(c, form, description, a, d >> 16, others)
            scales = self._operand_scales(c, form, description, len(left), others) if form.vector else None
            if self.sums and description.result != "s32":
                total = functools.partial(self._rounded_sum, form, description, left, right, scales)
            else:
                product = _scaled(left, right, *scales) if scales else products(left[None], right[None])[0]
                total = functools.partial(self._sum, form, description, -product if description.negate else product)
            self._accumulate(c, form, description, d, total, enable, self._disabled(form, c, cta, others))
            if form.shift:
                self.tcgen05_copy.shift_lanes(c, a & 0xFFFF)
        self.wave.active()

    def _disabled(self, form, c, cta, others):
        """Which of the 128 lanes of a CTA keep their D."""
        words = others.get("disabled")
        if words is None or not any(words):
            return np.zeros(128, bool)
        if form.pair and cta & 1:
            raise PtxError("tcgen05.mma with disabled output lanes from the odd CTA of a pair is not simulated")
        mine = words[4 * (c & 1) : 4 * (c & 1) + 4] if form.pair else words
        return np.unpackbits(np.array(mine, "<u4").view(np.uint8), bitorder="little").astype(bool)

    # ---- operands in tensor memory ----------------------------------------------------------------
    def _left(self, cta, form, description, a, d_lane, others):
        """A of one CTA as float32 [rows, k]; a sparse one with its zeros. From tensor memory it has all 128 lanes where
        D is in parts (``accumulator_parts``)."""
        if form.a_in_tmem:
            element = _TENSOR.get(description.a_type, description.a_type)
            words = self.tensor_memory.read(cta, self._a_lanes(form, description, a >> 16, d_lane), a & 0xFFFF, 8)
            left = DECODE[element](np.ascontiguousarray(words).view(_RAW[ELEMENT_BYTES[element]]))
        else:
            left = self.operands.tile(cta, *self._a_place(form, description, a))
        if not form.sparse:
            return left
        codes = self._metadata(cta, form, description, others["meta"])
        return expand(left, np.tile(codes, (len(left) // len(codes), 1)), description.a_type)

    def _a_lanes(self, form, description, lane, d_lane):
        m = description.m // (2 if form.pair else 1)
        if m < 128 and form.sparse and not form.stationary:
            raise PtxError(f"tcgen05.mma.sp with {m} rows of A in tensor memory is not simulated")
        if m == 64 and not form.pair and not form.stationary:
            if lane != d_lane:
                raise PtxError(f"tcgen05.mma with 64 rows: A at lane {lane}, D at lane {d_lane}")
            return lane + np.arange(64) % 16 + np.arange(64) // 16 * 32
        if lane:
            raise PtxError(f"tcgen05.mma with {description.m} rows of A at lane {lane}, not 0")
        return np.arange(128)

    def _metadata(self, cta, form, description, address):
        """Sparsity metadata, 4 bits a chunk [rows, chunks] (tmem_e_frg; tmem_e_frg_ws has copies in other lanes)."""
        m, column = description.m // (2 if form.pair else 1), address & 0xFFFF
        if (m != 128 and not form.stationary) or address >> 16:
            raise PtxError(f"sparse tcgen05.mma with {description.m} rows by {2 if form.pair else 1} CTAs and metadata "
                           f"at lane {address >> 16} is not simulated")  # fmt: skip
        if form.kind not in ("f16", "tf32"):
            if description.selector:
                raise PtxError(f"sparsity selector {description.selector} for kind::{form.kind}, not 0")
            return self._same_metadata(m, self.tensor_memory.read(cta, np.arange(128), column, 2))
        if column % 2 or description.selector > 1:
            raise PtxError(f"sparsity metadata of kind::{form.kind} at column {column} with selector "
                           f"{description.selector} is not simulated")  # fmt: skip
        words = self.tensor_memory.read(cta, np.arange(128), column + description.selector, 1)[:, 0]
        # lane = 16 * (row // 16) + 8 * (half of k) + row % 8, the upper half of the word is row + 8
        halves = np.ascontiguousarray(words).view(np.uint16).reshape(8, 2, 8, 2)  # sixteen rows, k half, row, row half
        return self._same_metadata(m, halves.transpose(0, 3, 2, 1).reshape(128, 2).copy())

    @staticmethod
    def _same_metadata(m, rows):
        """The codes of m rows, of which the others of the 128 must be copies."""
        copies = rows.reshape(128 // m, m, -1)
        if (copies != copies[0]).any():
            other = int((copies != copies[0]).any((1, 2)).argmax()) * m
            raise PtxError(f"sparsity metadata of {m} rows: lanes 0 to {m - 1} and {other} to {other + m - 1} differ, "
                           "where each must hold the same")  # fmt: skip
        return metadata_codes(copies[0])

    def _scales(self, cta, description, address, number, count, vector, lanes):
        """Scale factors as float64 [count, vector]: row r is in lane r % 32 and column r // 32, and in the same place
        of each quarter of ``lanes``, which must agree; what does not fit into the word's bytes from ``number`` on is in
        the next columns (K = 96; tmem_sf_frg, where CUTLASS's SM103 atoms pad N to 128)."""
        first = address & 0xFFFF
        columns, step, words_of_row, needed = _scale_columns(count, number, vector)
        words = self.tensor_memory.read(cta, lanes, first, needed)
        words = np.stack([words[:, step * i : step * i + columns] for i in range(words_of_row)], axis=-1)
        codes = words.view(np.uint8).reshape(-1, 32, columns, 4 * words_of_row)[..., number : number + vector]
        rows = codes.transpose(0, 2, 1, 3).reshape(len(codes), -1, vector)[:, :count]
        if (rows != rows[0]).any():
            quarter = int((rows != rows[0]).any((1, 2)).argmax())
            raise PtxError(
                f"scale factors at tensor memory column {first}: lanes {lanes[0]} to {lanes[0] + 31} and "
                f"{lanes[32 * quarter]} to {lanes[32 * quarter] + 31} differ, where each must hold the same"
            )
        return (ue8m0_to_f64 if description.scale_type == "ue8m0" else ue4m3_to_f64)(rows[0])

    def _operand_scales(self, cta, form, description, rows, others):
        """Scale factors of so many rows of A, and of the columns of B: float64 [rows, blocks] and [n, blocks]."""
        vector, m, n = description.vector, description.m // (2 if form.pair else 1), description.n
        scale_a = self._scales(cta, description, others["scale_a"], description.a_scale_id, m, vector, np.arange(128))
        # layout B: the halves of N on lanes 0 to 63 and 64 to 127
        parts = 2 if form.pair and description.m == 128 else 1
        lanes = np.split(np.arange(128), parts)
        at, number = others["scale_b"], description.b_scale_id
        scale_b = np.concatenate([self._scales(cta, description, at, number, n // parts, vector, x) for x in lanes])
        return np.tile(scale_a, (rows // m, 1)), scale_b

    # ---- D ----------------------------------------------------------------------------------------
    def _accumulate(self, cta, form, description, d, total, enable, disabled):
        """Write D of one CTA. ``total(rows, columns, old words, enable)`` gives the new words of a part of it."""
        column = d & 0xFFFF
        for lanes, rows, columns in accumulator_parts(form, description, d >> 16):
            width = columns.stop - columns.start
            self.tensor_memory.require_allocated(cta, column, column + width)
            # consecutive lanes as a slice: a view takes a third of the time of a gather
            whole = lanes[-1] - lanes[0] == len(lanes) - 1
            at = slice(lanes[0], lanes[-1] + 1) if whole else lanes, slice(column, column + width)
            words = self.tensor_memory.words[cta]
            old = words[at]
            new = total(rows, columns, old, enable)
            words[at] = np.where(disabled[lanes][:, None], old, new) if disabled.any() else new

    def _sum(self, form, description, product, rows, columns, old, enable):
        """The new words of a part of D: the product and, with ``enable``, the old ones."""
        part = product[rows, columns]
        if description.result == "s32":
            total = part.astype(np.int64) + (old.view(np.int32) if enable else 0)
            if description.saturate:
                total = np.clip(total, -0x80000000, 0x7FFFFFFF)
            return total.astype(np.int32).view(_u4)
        if enable:
            part = part + self._addend(form, description, old)
        return self._words(description, part)

    def _rounded_sum(self, form, description, left, right, scales, rows, columns, old, enable):
        """As ``_sum``, with the roundings of ``TensorSums``. Sixteen rows at a time."""
        start = self._addend(form, description, old) if enable else np.zeros(old.shape, _f4)
        left = -left[rows] if description.negate else left[rows]
        if scales:
            by_rows, by_columns = scales[0][rows].reshape(-1, 16, description.vector), scales[1][None, columns]
            scales = by_rows, by_columns, description.scale_type
        total = self.sums.add(
            "tcgen05", (description.a_type, description.b_type), description.result,
            left.reshape(-1, 16, left.shape[-1]), right[None, columns], start.reshape(-1, 16, start.shape[-1]),
            scales, form.sparse,
        )  # fmt: skip
        return self._words(description, total.reshape(old.shape))

    @staticmethod
    def _addend(form, description, old):
        values = f16_to_f32(old & _u4(0xFFFF)) if description.result == "f16" else old.view(_f4)
        return values * _f4(2.0**-form.input_scale)

    @staticmethod
    def _words(description, values):
        half = description.result == "f16"
        return values.astype(np.float16).view(np.uint16).astype(_u4) if half else values.view(_u4)

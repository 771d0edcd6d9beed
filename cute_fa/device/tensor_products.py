"""Matrix products of sm_100's tensor cores, ``tcgen05.mma`` (PTX ISA, "TensorCore 5th Generation Instructions").

D (128 rows) lies in tensor memory, B in shared memory, A in either. A product is as many instructions as its inner
dimension has steps of 32 bytes. One thread issues them: all lanes of a warp call, and the elected one, always the same,
does it.
"""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.arch import inline_ptx

from cute_fa.device.tma_boxes import panel_bytes
from cute_fa.semantics.types import DType

STEP_BYTES = 32  # of the inner dimension that one instruction takes
TENSOR_STEP = 8  # columns of tensor memory that hold as many bytes of a row of A
_ROWS = 8  # of a swizzle atom
_SWIZZLE = {128: 2, 64: 4, 32: 6}
_FORMATS = {DType.FP16: 0, DType.BF16: 1, DType.E4M3: 0, DType.E5M2: 1}


class SharedOperand(NamedTuple):
    """A tile of ``cute_fa.device.tma_boxes.tile_layout`` as an operand. ``first``: lower half of the first step's
    descriptor; ``upper``: the upper half of all; ``steps``: how far each step is from the first, in 16 bytes."""

    first: Int32
    upper: int
    steps: tuple[int, ...]

    def at(self, offset: Int32) -> "SharedOperand":
        """The same tile, ``offset`` bytes on."""
        return self._replace(first=self.first + (offset >> 4))


def row_operand(address: Int32, rows: int, row_bytes: int) -> SharedOperand:
    """A tile whose rows run along the inner dimension ("K-major"), at an ``address`` in bytes."""
    width = panel_bytes(row_bytes)
    places = [divmod(STEP_BYTES * step, width) for step in range(row_bytes // STEP_BYTES)]
    steps = tuple((panel * rows * width + byte) >> 4 for panel, byte in places)
    return _operand(address, width, leading=16, steps=steps)


def column_operand(address: Int32, rows: int, row_bytes: int, dtype_bytes: int) -> SharedOperand:
    """A tile whose rows run across the inner dimension ("MN-major"): V, whose rows are keys."""
    width = panel_bytes(row_bytes)
    step_rows = STEP_BYTES // dtype_bytes
    steps = tuple(step * step_rows * width >> 4 for step in range(rows // step_rows))
    return _operand(address, width, leading=rows * width, steps=steps)


def _operand(address: Int32, width: int, leading: int, steps: tuple[int, ...]) -> SharedOperand:
    """``leading``: bytes from one panel to the next, which only MN-major tiles need."""
    lower = ((address & 0x3FFFF) >> 4) | (leading >> 4 << 16)
    upper = (_ROWS * width >> 4) | (1 << 14) | (_SWIZZLE[width] << 29)
    return SharedOperand(lower, upper, steps)


class Product(NamedTuple):
    """What all instructions of a product share: ``kind``, the instruction descriptor ``shape`` and the CTAs that a
    product spans."""

    kind: str
    shape: int
    ctas: int

    @classmethod
    def of(cls, dtype_a: DType, dtype_b: DType, columns: int, b_by_columns: bool, ctas: int = 1) -> "Product":
        """fp32 D of 128 rows a CTA and ``columns``; ``b_by_columns``: B is a :func:`column_operand`."""
        kind = "f8f6f4" if dtype_a.is_fp8 else "f16"
        shape = 1 << 4 | _FORMATS[dtype_a] << 7 | _FORMATS[dtype_b] << 10 | int(b_by_columns) << 16
        return cls(kind, shape | columns >> 3 << 17 | 128 * ctas >> 4 << 24, ctas)

    def multiply(self, d: Int32, a: SharedOperand, b: SharedOperand, accumulate: Int32):
        """D = A·B from shared memory, added to D if ``accumulate`` is not 0. ``d``: an address in tensor memory."""
        sources = [f"add.u32 word, {{$r3}}, {step}; mov.b64 a, {{word, {{$r6}}}};" for step in a.steps]
        self._issue(sources, "a", (d, b, accumulate, a.first), b.steps, a.upper)

    def multiply_tensor(self, d: Int32, a: Int32, b: SharedOperand, accumulate: Int32, steps: range):
        """D = A·B with A in tensor memory, these steps of it alone."""
        sources = [f"add.u32 word, {{$r3}}, {TENSOR_STEP * step};" for step in steps]
        self._issue(sources, "[word]", (d, b, accumulate, a), [b.steps[step] for step in steps])

    def _issue(self, sources: list[str], a: str, arguments: tuple, steps, *more: int):
        """An instruction for each of ``sources``, which make its operand ``a``; ``steps``: of operand B; ``more``:
        operands that ``sources`` name. The DSL numbers operands by the text: all have to be used."""
        mma = f"@leader tcgen05.mma.cta_group::{self.ctas}.kind::{self.kind} [{{$r0}}], {a}, b, {{$r5}}, more;"
        text = "elect.sync _|leader, 0xffffffff; setp.ne.b32 more, {$r2}, 0; "
        for source, step in zip(sources, steps, strict=True):
            text += f"{source} add.u32 other, {{$r1}}, {step}; mov.b64 b, {{other, {{$r4}}}}; {mma} "
            text += "setp.eq.b32 more, 0, 0; "
        text = "{ .reg .pred leader, more; .reg .b32 word, other; .reg .b64 a, b; " + text + "}"
        d, b, accumulate, first = arguments
        constants = (Int32(_signed(word)) for word in (b.upper, self.shape, *more))
        inline_ptx(text, read_only_args=[d, b.first, accumulate, first, *constants])


def commit(barrier: cute.Pointer, ctas: int = 1):
    """Arrive at a barrier, in a pair at that of both CTAs, once everything that the elected lane has issued is done."""
    arrival, target = ".mbarrier::arrive::one.shared::cluster", "[{$r0}]"
    if ctas == 2:
        arrival, target = f"{arrival}.multicast::cluster", f"{target}, both"
    inline_ptx(
        "{ .reg .pred leader; .reg .b16 both; mov.b16 both, 3; elect.sync _|leader, 0xffffffff; "
        f"@leader tcgen05.commit.cta_group::{ctas}{arrival}.b64 {target}; }}",
        read_only_args=[barrier.toint()],
    )


def _signed(word: int) -> int:
    """32 bits as the DSL's Int32 takes them."""
    return word - (1 << 32) if word >= 1 << 31 else word

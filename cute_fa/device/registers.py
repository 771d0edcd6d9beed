"""Registers: what to keep in one, and how to convert them two at a time."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Uint32
from cutlass.cute.arch import inline_ptx

# Selectors of the lower and of the upper halves of two registers, each the second register's first and the other way
# round.
_HALVES = ((0x1054, 0x5410), (0x3276, 0x7632))
# Selectors of bytes 0 and 1, and 2 and 3, as the upper halves of 16 bits, behind 0; and of 0 and 2, and 1 and 3.
_UPPER_HALVES = ((0x1404, 0x3424), (0x2404, 0x3414))
# The same as lower halves, below the upper half of 1024 in fp16.
_LOWER_HALVES = ((0x4140, 0x4342), (0x4240, 0x4341))
_UPPER_HALF_OF_1024 = 0x64
_APART = 0x3120  # bytes 0 and 2, then 1 and 3
# Of numbers to what they are in the registers where e4m3 is widened by shifts.
SHIFTED_FACTOR = 256.0


def opaque(value):
    """The same value, of unknown origin: the compiler then keeps it in a register instead of computing it again."""
    return inline_ptx(
        f"mov.b{type(value).width} {{$w0}}, {{$r0}};", write_only_types=[type(value)], read_only_args=[value]
    )


def narrow_pair(low: Float32, high: Float32, dtype) -> Uint32:
    """Two numbers in fp16 or bf16, rounded to nearest, in a register."""
    name = "bf16x2" if dtype is cutlass.BFloat16 else "f16x2"
    return inline_ptx(
        f"cvt.rn.{name}.f32 {{$w0}}, {{$r1}}, {{$r0}};", write_only_types=[Uint32], read_only_args=[low, high]
    )


def narrow(source: cute.Tensor, target: cute.Tensor):
    """fp32 fragment to an fp16 or bf16 one of the same layout, rounded to nearest, a pair an instruction: the DSL's own
    conversion of a vector falls back to single elements unless their number is a power of 2."""
    pairs = cute.recast_tensor(target, Uint32)
    for i in range(cute.size(pairs)):
        pairs[i] = narrow_pair(source[2 * i], source[2 * i + 1], target.element_type)


def narrow_to_e4m3(source: cute.Tensor, target: cute.Tensor):
    """fp32 accumulator of a wgmma to e4m3 in the registers of operand A, saturating: see
    :func:`cute_fa.device.fragments.e4m3_operand_a`."""
    words = cute.recast_tensor(target, Uint32)
    for word in range(cute.size(words)):
        row, first = word % 2, word // 2 * 2  # two blocks of 8 columns
        words[word] = _e4m3_word(source, row, (first, first + 1))


def e4m3_word(values: list[Float32]) -> Uint32:
    """Four numbers in e4m3, saturating, in a register."""
    return inline_ptx(
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, {$r1}, {$r0}; "
        "cvt.rn.satfinite.e4m3x2.f32 high, {$r3}, {$r2}; mov.b32 {$w0}, {low, high}; }",
        write_only_types=[Uint32],
        read_only_args=values,
    )


def _e4m3_word(source: cute.Tensor, row: int, blocks: tuple[int, int]) -> Uint32:
    """What a thread has in two blocks of 8 columns of an accumulator, 4 registers each, in one of its two rows."""
    return e4m3_word([source[4 * block + 2 * row + c] for block in blocks for c in range(2)])


def narrow_to_e4m3_in_order(source: cute.Tensor, target: cute.Tensor, anew: bool):
    """As :func:`narrow_to_e4m3`, for an operand B whose rows have their own order.

    Of 16 columns thread t of a row's four has 2t, 2t + 1, 8 + 2t, 9 + 2t, and is to have 4t … 4t + 3: the first two go
    to thread t / 2, the others to 2 + t / 2. They are sent together with those of the next 16 columns. Threads of odd t
    send the others first, so that nobody is asked for both at once. Six instructions for 8 scores are more.
    ``anew``: a thread's place is computed each time instead of being kept in registers over the loop.
    """
    words = cute.recast_tensor(target, Uint32)
    lane = opaque(cute.arch.lane_idx()) if anew else cute.arch.lane_idx()
    odd, late = (lane & 1) != 0, (lane & 2) != 0
    sender = cutlass.select_(odd != late, lane ^ 3, lane)
    selectors = [cutlass.select_(late, Uint32(swapped), Uint32(own)) for swapped, own in _HALVES]
    for row in range(2):
        for step in range(cute.size(words) // 4):
            first, second = (_e4m3_word(source, row, (4 * step + u, 4 * step + 2 + u)) for u in range(2))
            sent = cutlass.select_(odd, second, first), cutlass.select_(odd, first, second)
            pair = cute.arch.shuffle_sync(sent[0], sender), cute.arch.shuffle_sync(sent[1], sender ^ 1)
            for group, selector in enumerate(selectors):
                words[4 * step + 2 * group + row] = permute(*pair, selector)


def widen_codes(word: Uint32, dtype, apart: bool = False, shifted: bool = False) -> tuple[Uint32, Uint32]:
    """Four codes of a register as fp16, two to a register: the first two and the last two, or those of even and of
    odd place if ``apart``. Exactly, also NaN.

    A code of e5m2 is the upper half of its number; one of int8, with its sign bit flipped, the lower half of 1024 + 128
    more than its number. e4m3 is converted from sm_89 on; ``shifted``, without that
    instruction, its bits go to their places in fp16, whose exponent is biased by 8 more: numbers are 1 /
    ``SHIFTED_FACTOR`` of what they should be, of subnormal codes too, and the codes of NaN, which have no place there,
    are ±480.
    """
    if dtype is cutlass.Float8E4M3FN and not shifted:
        if apart:
            word = permute(word, word, Uint32(_APART))
        return inline_ptx(
            "{ .reg .b16 low, high; mov.b32 {low, high}, {$r0}; cvt.rn.f16x2.e4m3x2 {$w0}, low; "
            "cvt.rn.f16x2.e4m3x2 {$w1}, high; }",
            write_only_types=[Uint32, Uint32],
            read_only_args=[word],
        )
    if dtype is cutlass.Int8:
        biased = word ^ Uint32(0x80808080)
        pairs = (permute(biased, Uint32(_UPPER_HALF_OF_1024), Uint32(selector)) for selector in _LOWER_HALVES[apart])
        return tuple(_without_1152(pair) for pair in pairs)
    first, second = (permute(word, Uint32(0), Uint32(selector)) for selector in _UPPER_HALVES[apart])
    if not shifted:
        return first, second
    if apart:
        first, second = word << 8, word  # what is below the upper halves goes with the masks
    fields, signs = Uint32(0x3F803F80), Uint32(0x80008000)
    return tuple(((pair >> 1) & fields) | (pair & signs) for pair in (first, second))


def _without_1152(pair: Uint32) -> Uint32:
    """Two numbers of fp16, less 1152 each: not by an immediate, which these instructions do not take."""
    return inline_ptx(
        "{ .reg .b32 offset; mov.b32 offset, 0x64806480; sub.rn.f16x2 {$w0}, {$r0}, offset; }",
        write_only_types=[Uint32],
        read_only_args=[pair],
    )


def placed_fma(a: Float32, b: Float32, c: Float32) -> Float32:
    """a · b + c where it stands: NVVM moves what it understands to the use of the result, over what writes c."""
    return inline_ptx("fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Float32], read_only_args=[a, b, c])


def permute(low: Uint32, high: Uint32, selector: Uint32) -> Uint32:
    """Four bytes of two registers."""
    return inline_ptx(
        "prmt.b32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Uint32], read_only_args=[low, high, selector]
    )


def rounded_product(a: Float32, b: Float32) -> Float32:
    """a · b, rounded before anything is added: never part of an fma."""
    return inline_ptx("mul.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def sum_rounded_up(a: Float32, b: Float32) -> Float32:
    """a + b, rounded towards +inf."""
    return inline_ptx("add.rp.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def product_rounded_up(a: Float32, b: Float32) -> Float32:
    """a · b, rounded towards +inf."""
    return inline_ptx("mul.rp.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])

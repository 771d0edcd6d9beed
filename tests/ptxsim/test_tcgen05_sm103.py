"""tcgen05.mma with K = 96 (sm_103a): operands of 48 bytes a row and their scale factors (PTX ISA 9.7.16.3.1.2,
9.7.16.10.7.2 and 3). Layouts are written here chunk by chunk."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptxsim.errors import PtxError
from tests.ptxsim.test_tcgen05 import A_AT
from tests.ptxsim.test_tcgen05_mma import in_shared, operand, random_words, tensor_program

WIDE = 256  # columns of tensor memory: D, then scale factors
SCALE_A, SCALE_B = 160, 176
OPCODE = {
    ("mxf4nvf4", 6): "mxf4nvf4.block_scale.block16",
    ("mxf4nvf4", 3): "mxf4nvf4.block_scale.block32",
    ("mxf4", 3): "mxf4.block_scale",
}
ABSOLUTE = 1 << 52 | 2 << 61 | 1 << 46 | 1024 >> 4 << 32  # with 128-byte swizzle, eight rows 1024 bytes apart


def scales(tmem, rng, column, rows, vector, first_byte, kind):
    """Random scale factors: four of a row in a word, of row r in lane r % 32 of each quarter and column r // 32; the
    next four of the first 128 rows 4 columns on, of 256 rows 8. Their values [rows, vector]."""
    codes = rng.integers(120, 135, (rows, vector)) if kind == "ue8m0" else rng.integers(0, 0x7F, (rows, vector))
    raw = tmem.view(np.uint8).reshape(128, -1, 4)
    for row in range(rows):
        for j in range(vector):
            word, byte = divmod(first_byte + j, 4)
            raw[row % 32 + 32 * np.arange(4), column + row // 32 + word * (4 if rows <= 128 else 8), byte] = codes[
                row, j
            ]
    dtype = torch.float8_e8m0fnu if kind == "ue8m0" else torch.float8_e4m3fn
    return torch.from_numpy(codes.astype(np.uint8)).view(dtype).double().numpy()


def problem(n, vector, a_id, b_id, scale_kind):
    """(bytes of A and of B, tensor memory, instruction descriptor, exact product)."""
    rng = np.random.default_rng(n + vector)
    (a, a_values), (b, b_values) = (operand(rng, rows, 96, "e2m1", "packed") for rows in (128, n))
    tmem = random_words(columns=WIDE)
    a_scale = scales(tmem, rng, SCALE_A, 128, vector, a_id, scale_kind)
    b_scale = scales(tmem, rng, SCALE_B, n, vector, b_id, scale_kind)
    idesc = 0x480 | n >> 3 << 17 | (scale_kind == "ue8m0") << 23 | 1 << 27 | a_id << 29 | b_id << 4 | 1 << 31
    exact = (a_values * np.repeat(a_scale, 96 // vector, 1)) @ (b_values * np.repeat(b_scale, 96 // vector, 1)).T
    return a, b, tmem, idesc, exact


def check(kind, vector, n, tmem, image, descriptors, idesc, exact):
    out = tensor_program(
        f"tcgen05.mma.cta_group::1.kind::{OPCODE[kind, vector]} [0], %rd3, %rd4, %r61, [{SCALE_A}], [{SCALE_B}], %p3;",
        tmem, image, descriptors, idesc, race=True)  # fmt: skip
    np.testing.assert_allclose(out[:, :n].view(np.float32), exact, rtol=1e-6)
    np.testing.assert_array_equal(out[:, n:], tmem[:, n:])


# what the ISA has: six a row from byte 0 or 2 on, three from any
SCALED = [("mxf4nvf4", 6, a, b, scale) for a, b in ((0, 0), (2, 0), (0, 2)) for scale in ("ue4m3", "ue8m0")]
SCALED += [(kind, 3, a, b, "ue8m0") for kind in ("mxf4", "mxf4nvf4") for a, b in ((0, 1), (1, 2), (2, 3), (3, 0))]


@pytest.mark.parametrize(("kind", "vector", "a_id", "b_id", "scale_kind"), SCALED)
@pytest.mark.parametrize("n", [16, 144])
def test_scale_factors(kind, vector, a_id, b_id, scale_kind, n):
    a, b, tmem, idesc, exact = problem(n, vector, a_id, b_id, scale_kind)
    check(kind, vector, n, tmem, *in_shared(a, b), idesc, exact)


def in_lines(image, raw, chunk, buffers):
    """Put rows of three chunks of 16 bytes into lines of eight, from ``chunk`` of the first buffer on and then in the
    second; a line is swizzled with its number."""
    for row, line in enumerate(raw.reshape(len(raw), 3, 16)):
        for i, piece in enumerate(line):
            buffer, place = divmod(chunk + i, 8)
            at = buffers[buffer] + row // 8 * 1024 + row % 8 * 128 + (place ^ row % 8) * 16
            image[at : at + 16] = piece


@pytest.mark.parametrize("chunk", [0, 3, 5, 6, 7])
def test_lines_that_go_on_elsewhere(chunk):
    """From chunk 6 on a row does not fit into its line of 128 bytes; the descriptor says where the next ones lie."""
    a, b, tmem, idesc, exact = problem(16, 6, 2, 0, "ue4m3")
    image = np.full(40 * 1024, 0x77, np.uint8)  # 6.0 where nothing is
    a_at, b_at = (2048, 20 * 1024), (38 * 1024, 0)
    in_lines(image, a, chunk, a_at)
    in_lines(image, b, chunk, b_at)
    descriptors = [
        (A_AT + first + 16 * chunk) >> 4 | (A_AT + second) >> 4 << 16 | ABSOLUTE for first, second in (a_at, b_at)
    ]
    check("mxf4nvf4", 6, 16, tmem, image, descriptors, idesc, exact)


def test_lines_that_are_too_short():
    _, _, tmem, idesc, exact = problem(16, 6, 0, 0, "ue4m3")
    image = np.zeros(16384, np.uint8)
    relative = ABSOLUTE & ~(1 << 52)
    with pytest.raises(PtxError, match="K = 96 goes beyond the 128 bytes of a line"):
        check("mxf4nvf4", 6, 16, tmem, image, [A_AT + 96 >> 4 | relative] * 2, idesc, exact)


@pytest.mark.parametrize(("descriptor", "message"), [
    (ABSOLUTE | A_AT >> 4 | (A_AT + 16) >> 4 << 16, r"absolute leading address \(0x410\) exists for 128-byte swizzles"),
    (ABSOLUTE & ~(7 << 61) | A_AT >> 4 | 6 << 61, "exists for 128-byte swizzles of 16-byte atoms"),
])  # fmt: skip
def test_addresses_that_mean_nothing(descriptor, message):
    _, _, tmem, idesc, exact = problem(16, 6, 0, 0, "ue4m3")
    with pytest.raises(PtxError, match=message):
        check("mxf4nvf4", 6, 16, tmem, np.zeros(16384, np.uint8), [descriptor] * 2, idesc, exact)


def test_absolute_addresses_are_for_96_columns():
    _, _, tmem, idesc, _ = problem(16, 6, 0, 0, "ue4m3")
    with pytest.raises(PtxError, match="an absolute leading address exists for K = 96 only"):
        tensor_program(f"tcgen05.mma.cta_group::1.kind::{OPCODE['mxf4nvf4', 6]} [0], %rd3, %rd4, %r61, [{SCALE_A}], "
                       f"[{SCALE_B}], %p3;", tmem, np.zeros(16384, np.uint8), [ABSOLUTE | A_AT >> 4] * 2,
                       idesc & 0x7FFFFFFF)  # fmt: skip


@pytest.mark.parametrize(("idesc", "message"), [
    (3 << 29, "scale factor IDs 3 and 0, not multiples of 2"),
    (1 << 4, "scale factor IDs 0 and 1, not multiples of 2"),
])  # fmt: skip
def test_scale_factors_that_do_not_exist(idesc, message):
    a, b, tmem, plain, exact = problem(16, 6, 0, 0, "ue4m3")
    with pytest.raises(PtxError, match=message):
        check("mxf4nvf4", 6, 16, tmem, *in_shared(a, b), plain | idesc, exact)

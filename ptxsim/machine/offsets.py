"""Offsets into global memory that are computed in 32 bits: do they overflow?"""

from __future__ import annotations

import numpy as np

from ..arrays import full_width
from ..errors import MemoryFault


class Offsets:
    """Products that generated code has checked, see ``frontend.offsets``."""

    def __init__(self, wave):
        self.wave = wave

    def check(self, w, M, a, b, c, signed, shift):
        """MemoryFault if a * b + c (with ``shift`` a << b) overflows in an active lane: beyond int32 if ``signed``,
        else beyond both int32 and uint32. Operands are uint32, [n, 32] or scalars."""
        a, b, c = (np.asarray(x, np.uint32).view(np.int32).astype(np.int64) for x in (a, b, c))
        exact = (a << b if shift else a * b) + c
        wrong = exact != exact.astype(np.int32)
        if not wrong.any():
            return
        if not signed:
            mask = np.int64(0xFFFFFFFF)
            wrong &= ((a & mask) << b if shift else (a & mask) * (b & mask)) + (c & mask) > mask
        wrong = full_width(wrong, len(w)) & (True if M is None else M)
        if wrong.any():
            j, lane = np.argwhere(wrong)[0]
            a, b, c, exact = (int(full_width(x, len(w))[j, lane]) for x in (a, b, c, exact))
            text = f"{a} << {b}" if shift else f"{a} * {b}" + (f" + {c}" if c else "")
            raise MemoryFault(f"a 32-bit offset into global memory overflows: {text} = {exact}",
                              where=self.wave.thread_text(w[j], lane))  # fmt: skip

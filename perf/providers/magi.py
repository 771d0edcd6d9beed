"""MagiAttention's kernels for ranges."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType

from cute_fa.tools.inputs import Inputs
from perf.providers.base import Attention, Provider, Unavailable


class MagiAttention(Provider):
    """``flex_flash_attn_func``, which takes ranges as they are: whatever it makes of them belongs to its calls."""

    name = "MagiAttention"
    takes_ranges = True

    def _module(self) -> ModuleType:
        try:
            return importlib.import_module("magi_attention.functional")
        except (ImportError, OSError) as error:
            raise Unavailable(f"magi_attention.functional: {error}") from None

    def version(self) -> str:
        self._module()
        return importlib.metadata.version("magi-attention")

    def prepare(self, inputs: Inputs) -> Attention:
        attention = self._module().flex_flash_attn_func
        if inputs.q_ranges is None:
            raise Unavailable("MagiAttention is compared where there are ranges")
        ranges, types = (inputs.q_ranges, inputs.k_ranges), inputs.attn_type_map
        return Attention(lambda q, k, v: attention(q[0], k[0], v[0], *ranges, attn_type_map=types)[0][None])

"""Attention kernels in NVIDIA's CuTe DSL behind one dispatch table and one API that drops in for ``flash_attn``."""

from cute_fa.api import flash_attn_func, flash_attn_varlen_func
from cute_fa.simulation import simulate

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "simulate"]

"""Implementations of attention that a sweep compares, each behind the same few operations."""

from perf.providers.base import Attention, Layout, Provider, Unavailable
from perf.providers.flash import FlashAttention3, FlashAttention4
from perf.providers.magi import MagiAttention
from perf.providers.ours import CuteFa
from perf.providers.sdpa import CuDnn, FlashAttention2
from perf.providers.triton import FlexAttention, TritonTutorial

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        CuteFa(),
        FlashAttention4(),
        FlashAttention3(),
        FlashAttention2(),
        CuDnn(),
        FlexAttention(),
        MagiAttention(),
        TritonTutorial(),
    )
}

__all__ = ["PROVIDERS", "Attention", "CuteFa", "Layout", "Provider", "Unavailable"]

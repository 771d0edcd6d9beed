"""FlashAttention 3 and 4."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType
from typing import Any

import torch

from cute_fa.semantics.problem import normalize_window
from cute_fa.tools.inputs import Inputs
from perf.providers.base import Attention, Provider, Unavailable


class _Flash(Provider):
    """``modules`` and ``distributions``: names that it has been installed under. Scales of fp8 inputs are left at 1."""

    modules: tuple[str, ...]
    distributions: tuple[str, ...]

    def module(self) -> ModuleType:
        reasons = []
        for name in self.modules:
            try:
                return importlib.import_module(name)
            except (ImportError, OSError) as error:
                reasons.append(f"{name}: {error}")
        raise Unavailable("; ".join(reasons))

    def version(self) -> str:
        module = self.module()
        for name in self.distributions:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return getattr(module, "__version__", "unknown")


def _masks(inputs: Inputs) -> dict[str, Any]:
    """Causal, or a window with causal as its right bound of 0: what these kernels ask for. How one infinite bound
    beside a finite one is written differs between them; no workload has one."""
    left, right = normalize_window(inputs.spec.window, inputs.spec.causal)
    return {"causal": right == 0} if left is None else {"causal": False, "window_size": (left, right)}


def _out(result: Any) -> torch.Tensor:
    """Of versions that return (out, lse …) and of those that do not."""
    return result[0] if isinstance(result, tuple) else result


class FlashAttention4(_Flash):
    """flash_attn.cute, the CuTe DSL kernels for sm_80 to sm_120."""

    name = "FA4"
    modules = ("flash_attn.cute.interface",)
    distributions = ("flash-attn-4",)

    def prepare(self, inputs: Inputs) -> Attention:
        module, masks, spec = self.module(), _masks(inputs), inputs.spec
        # it splits keys on Blackwell alone, as it chooses for 0; elsewhere it refuses what it has chosen
        if spec.seqlen_q < spec.seqlen_k and _is_blackwell(inputs.q):
            masks["num_splits"] = 0
        names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table")
        lengths = {name: getattr(inputs, name) for name in names}
        if all(tensor is None for tensor in lengths.values()):
            return Attention(lambda q, k, v: _out(module.flash_attn_func(q, k, v, **masks)))
        lengths |= {"max_seqlen_q": spec.seqlen_q, "max_seqlen_k": spec.seqlen_k}
        return Attention(lambda q, k, v: _out(module.flash_attn_varlen_func(q, k, v, **lengths, **masks)))


def _is_blackwell(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] in (10, 11)


class FlashAttention3(_Flash):
    """The C++ kernels for sm_90: decoding, and keys with lengths or pages, through the function for caches, which takes
    pages and splits the keys as it chooses."""

    name = "FA3"
    modules = ("flash_attn_interface", "flash_attn_3.flash_attn_interface")
    distributions = ("flash-attn-3", "flash_attn_3")

    def prepare(self, inputs: Inputs) -> Attention:
        module, masks, spec = self.module(), _masks(inputs), inputs.spec
        if inputs.seqused_k is not None or spec.seqlen_q < spec.seqlen_k:
            cache = {"cache_seqlens": inputs.seqused_k, "page_table": inputs.page_table, **masks}
            if inputs.cu_seqlens_q is not None:
                cache |= {"cu_seqlens_q": inputs.cu_seqlens_q, "max_seqlen_q": spec.seqlen_q}
            return Attention(lambda q, k, v: _out(module.flash_attn_with_kvcache(q, k, v, **cache)))
        if inputs.cu_seqlens_q is None:
            return Attention(lambda q, k, v: _out(module.flash_attn_func(q, k, v, **masks)))
        lengths = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, spec.seqlen_q, spec.seqlen_k)
        return Attention(lambda q, k, v: _out(module.flash_attn_varlen_func(q, k, v, *lengths, **masks)))

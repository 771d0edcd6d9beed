"""Modules under the names of other attention libraries, whose functions are ``cute_fa``'s.

What a peer's test imports from its library it finds here: served functions, and for every other name an object that
raises Unserved when it is called. Modules that hold the peer's own references and helpers, no kernels, are loaded from
the checkout that the suite lies in.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch

import cute_fa
import cute_fa.integrations.auto_deploy
from cute_fa.compat import fa2, fa3, fa4, flashinfer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Unserved(Exception):
    """A function of the peer's that ``cute_fa`` has no counterpart of was called."""


class _Missing:
    """A name that nothing serves: whatever lies below it is missing too."""

    def __init__(self, name: str):
        self._name = name

    def __call__(self, *args: Any, **options: Any) -> Any:
        raise Unserved(self._name)

    def __getattr__(self, name: str) -> _Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self._name}.{name}")


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if importlib.util.find_spec(f"{self.__name__}.{name}") is not None:
            return importlib.import_module(f"{self.__name__}.{name}")
        return _Missing(f"{self.__name__}.{name}")


def on_host(function: Callable) -> Callable:
    """The function, to which tensors that pose as CUDA tensors are what they are: in host memory."""

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **options)

    return call


def _qkv_packed(function: Callable) -> Callable:
    """Keys and values, and queries too, as slices of one tensor (…, 3, heads, head_dim)."""
    return lambda qkv, *rest, **options: function(*qkv.unbind(-3), *rest, **options)


def _kv_packed(function: Callable) -> Callable:
    return lambda q, kv, *rest, **options: function(q, *kv.unbind(-3), *rest, **options)


def _one_length(qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, *rest: Any, **options: Any) -> Any:
    lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    return fa2.flash_attn_varlen_func(*qkv.unbind(-3), *lengths, *rest, **options)


def _vllm_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: torch.Tensor | None = None,
    *,
    window_size: Any = None,
    s_aux: torch.Tensor | None = None,
    q_v: torch.Tensor | None = None,
    fa_version: int = 2,
    num_splits: int = 0,
    **options: Any,
) -> Any:
    """vLLM's flash_attn_varlen_func, whose version says which peer computes; here the table decides."""
    options |= {"window_size": window_size or (-1, -1), "learnable_sink": s_aux, "qv": q_v, "num_splits": num_splits}
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return cute_fa.flash_attn_varlen_func(q, k, v, *lengths, **options)


def _vllm_kvcache(*args: Any, fa_version: int = 2, **options: Any) -> Any:
    return cute_fa.flash_attn_with_kvcache(*args, **options)


def _aiter_batch_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_page_indices: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    kv_last_page_lens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    seqlen_k: torch.Tensor | None = None,
    logits_soft_cap: float = 0.0,
    kv_block_descale: torch.Tensor | None = None,
    **options: Any,
) -> Any:
    """aiter's mha_batch_prefill_func: pages listed by indptr and indices, or by a table."""
    if k.dim() != 4 or kv_block_descale is not None:
        raise Unserved("aiter.mha_batch_prefill_func: caches in vectors, without pages, or with descales of blocks")
    pages = kv_indptr.diff()
    if block_table is None:
        columns = torch.arange(int(pages.max()), device=q.device)
        block_table = kv_page_indices[(kv_indptr[:-1, None] + columns).clamp(max=len(kv_page_indices) - 1)]
    if seqlen_k is None:
        seqlen_k = (pages - 1) * k.shape[1] + kv_last_page_lens
    paged = {"page_table": block_table, "seqused_k": seqlen_k.int()}
    lengths = cu_seqlens_q, None, max_seqlen_q, max_seqlen_k
    return cute_fa.flash_attn_varlen_func(q, k, v, *lengths, **paged, softcap=logits_soft_cap, **options)


def _supported(fa_version: int, device: Any = None) -> bool:
    return fa_version == 2 or (fa_version == 3 and torch.cuda.get_device_capability()[0] == 9)


def _functions() -> dict[str, dict[str, Any]]:
    """Name of a module to what it serves, functions and constants."""
    fa2_functions = {
        "flash_attn_func": fa2.flash_attn_func,
        "flash_attn_varlen_func": fa2.flash_attn_varlen_func,
        "flash_attn_with_kvcache": fa2.flash_attn_with_kvcache,
        "flash_attn_qkvpacked_func": _qkv_packed(fa2.flash_attn_func),
        "flash_attn_kvpacked_func": _kv_packed(fa2.flash_attn_func),
        "flash_attn_varlen_qkvpacked_func": _one_length,
        "flash_attn_varlen_kvpacked_func": _kv_packed(fa2.flash_attn_varlen_func),
    }
    fa3_functions = {
        name: getattr(fa3, name)
        for name in "flash_attn_func flash_attn_varlen_func flash_attn_with_kvcache flash_attn_combine "
        "get_scheduler_metadata".split()
    }
    fa4_functions = {
        name: getattr(fa4, name)
        for name in "flash_attn_func flash_attn_varlen_func flash_attn_combine get_scheduler_metadata".split()
    }
    vllm_functions = {
        "flash_attn_varlen_func": _vllm_varlen,
        "flash_attn_with_kvcache": _vllm_kvcache,
        "get_scheduler_metadata": fa3.get_scheduler_metadata,
        "is_fa_version_supported": _supported,
        "fa_version_unsupported_reason": lambda fa_version, device=None: "the simulated GPU",
    }
    return {
        "flash_attn": fa2_functions,
        "flash_attn.flash_attn_interface": fa2_functions | {"USE_TRITON_ROCM": False},
        "flash_attn.layers": {},
        "flash_attn.layers.rotary": {"apply_rotary_emb": fa2.apply_rotary_emb},
        "flash_attn_interface": fa3_functions,
        "flash_attn.cute": fa4_functions,
        "flash_attn.cute.interface": fa4_functions,
        "vllm_flash_attn": vllm_functions,
        "vllm_flash_attn.flash_attn_interface": vllm_functions,
        "vllm": {},
        "vllm.vllm_flash_attn": vllm_functions,
        "vllm.platforms": {"current_platform": types.SimpleNamespace(seed_everything=torch.manual_seed)},
        "flashinfer": {name: getattr(flashinfer, name) for name in _FLASHINFER},
        "flashinfer.utils": {"get_compute_capability": torch.cuda.get_device_capability},
        "aiter": {"mha_batch_prefill_func": _aiter_batch_prefill},
        "aiter.dtypes": {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp16": torch.float16},
        "aiter.test_common": {"perftest": lambda: lambda function: function},
        "tensorrt_llm": {},
        "tensorrt_llm._torch": {},
        "tensorrt_llm._torch.auto_deploy": {},
    }


_FLASHINFER = (
    "append_paged_kv_cache get_batch_indices_positions get_seq_lens merge_state merge_state_in_place merge_states"
).split()
# References of a peer's tests that lie in modules which are served here: taken from its own module.
_REFERENCES = {"flash_attn.layers.rotary": ("apply_rotary_emb_torch",)}


def install(root: Path) -> None:
    """Put the modules in place; helpers come from the peer's checkout in ``root``. For a process of its own."""
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]
    for name, served in _functions().items():
        module = _Module(name)
        module.__path__ = [str(root / name.replace(".", "/"))]
        for attribute, value in served.items():
            function = isinstance(value, types.FunctionType)
            setattr(module, attribute, on_host(value) if function else value)
        sys.modules[name] = module
        package, _, last = name.rpartition(".")
        if package:
            setattr(sys.modules[package], last, module)
    for name, references in _REFERENCES.items():
        file = root / f"{name.replace('.', '/')}.py"
        if file.exists():
            spec = importlib.util.spec_from_file_location(f"_references_of_{name.replace('.', '_')}", file)
            theirs = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(theirs)
            for reference in references:
                setattr(sys.modules[name], reference, getattr(theirs, reference))
    torch.ops.auto_deploy = torch.ops.cute_fa

"""One append run and compared with plain torch: what ``python -m cute_fa run --append`` does."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cute_fa.api.append import append_kv
from cute_fa.api.rotary import apply_rotary_emb
from cute_fa.engine.compiler import compiled
from cute_fa.engine.table import TABLE
from cute_fa.semantics.names import canonical_name
from cute_fa.semantics.reference import Error
from cute_fa.semantics.tensors import TORCH_DTYPES
from cute_fa.tools.trial import Machine, config_fields

if TYPE_CHECKING:
    from cute_fa.engine.contract import KernelConfig
    from cute_fa.semantics.append_problem import AppendProblem

_TABLE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class AppendInputs:
    """Arguments of ``append_kv``, and ``lengths``: new rows of each sequence that count."""

    tensors: dict[str, Any]
    lengths: list[int]


@dataclass(frozen=True)
class AppendResult:
    """What one append gave; ``errors``: of the caches, of the lengths afterwards and, where they rotate, of the
    queries, by name. Seconds as in ``cute_fa.tools.trial.TrialResult``."""

    canonical_name: str
    config: KernelConfig
    machine: Machine
    errors: dict[str, Error]
    compile_seconds: float
    seconds: float

    @property
    def compile_name(self) -> str:
        return self.config.compile_name

    @property
    def ok(self) -> bool:
        return all(error.ok for error in self.errors.values())

    def summary(self) -> dict[str, Any]:
        """For JSON: errors are None where they are not finite."""
        errors = {
            name: {"error": error.error if math.isfinite(error.error) else None, "allowed": error.allowed}
            for name, error in self.errors.items()
        }
        return {
            "ok": self.ok,
            "canonical_name": self.canonical_name,
            "compile_name": self.compile_name,
            "config": config_fields(self.config),
            **config_fields(self.machine),
            "errors": errors,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
        }


def make_append_inputs(problem: AppendProblem, capacity: int, seed: int, device: str) -> AppendInputs:
    """Random new rows and caches with room for ``capacity`` tokens a sequence; the first sequence gets as many rows as
    there may be, the others fewer where they are packed or not all count."""
    p, rng = problem, torch.Generator().manual_seed(seed)
    caches = dict(zip("kv", p.cache_dtypes, strict=True))
    dtypes = {name: caches.get(name, p.dtype) if p.dtype.is_codes else p.dtype for name in "kvq"}
    dtypes |= {f"{name}_cache": dtype for name, dtype in caches.items()}

    def rows(name: str, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng).to(TORCH_DTYPES[dtypes[name]])

    lengths = [p.tokens_k] * p.batch
    if p.packed_k or p.used_k:
        lengths[1:] = torch.randint(0, p.tokens_k + 1, (p.batch - 1,), generator=rng).tolist()
    room = max(capacity, p.tokens_k)
    before = [int(torch.randint(0, room - length + 1, (), generator=rng)) for length in lengths]
    heads = {"k": (p.num_heads_kv, p.head_dim), "v": (p.num_heads_kv, p.head_dim_v)}
    if p.query:
        heads["q"] = (p.num_heads, p.head_dim)
    shape = (sum(lengths),) if p.packed_k else (p.batch, p.tokens_k)
    tensors: dict[str, Any] = {name: rows(name, *shape, *sizes) for name, sizes in heads.items()}
    tensors["cache_seqlens"] = torch.tensor(before, dtype=torch.int32)
    if p.packed_k:
        offsets = torch.tensor([0, *lengths]).cumsum(0).int()
        tensors |= {"cu_seqlens_k_new": offsets} | ({"cu_seqlens_q": offsets.clone()} if p.query else {})
    if p.used_k:
        tensors["seqused_k_new"] = torch.tensor(lengths, dtype=torch.int32)
    if p.used_q:
        tensors["seqused_q"] = torch.tensor(lengths, dtype=torch.int32)
    places, sequences = p.batch + p.cache_batch_idx, p.batch
    if p.page_size is not None:
        width = -(-room // p.page_size)
        pages = torch.randperm(places * width + 1, generator=rng)[: places * width]
        tensors["page_table"] = pages.view(places, width).int()
        sequences = places * width + 1
    if p.cache_batch_idx:
        tensors["cache_batch_idx"] = torch.randperm(places, generator=rng)[: p.batch].int()
        sequences = places if p.page_size is None else sequences
    for name in "kv":
        cache = f"{name}_cache"
        tensors[cache] = rows(cache, sequences, room if p.page_size is None else p.page_size, *heads[name])
        if p.quantises:
            tensors[f"{name}_descale"] = torch.rand(p.batch, p.num_heads_kv, generator=rng) + 0.01
    if p.rotary_dim:
        angles = 6.3 * torch.rand(2 * room, p.rotary_dim // 2, generator=rng)
        table = _TABLE_DTYPES[p.rotary_dtype]
        tensors |= {"rotary_cos": angles.cos().to(table), "rotary_sin": angles.sin().to(table)}
        tensors["rotary_interleaved"] = p.rotary_interleaved
        if p.rotary_seqlens:
            tensors["rotary_seqlens"] = torch.randint(0, room, (p.batch,), generator=rng).int()
    moved = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in tensors.items()}
    return AppendInputs(moved, lengths)


def expected_append(inputs: AppendInputs) -> dict[str, torch.Tensor]:
    """The caches and lengths afterwards and, where they rotate, the queries: row by row, in plain torch."""
    given = inputs.tensors
    after = {name: given[name].clone() for name in ("k_cache", "v_cache")}
    lengths = torch.tensor(inputs.lengths, dtype=torch.int32, device=given["k"].device)
    after["seqused_k"] = given["cache_seqlens"] + lengths
    if "q" in given:
        after["q"] = given["q"].clone()
    starts = given.get("rotary_seqlens", given["cache_seqlens"]).tolist()
    offsets = given["cu_seqlens_k_new"].tolist() if "cu_seqlens_k_new" in given else None
    for b, (length, before) in enumerate(zip(inputs.lengths, given["cache_seqlens"].tolist(), strict=True)):
        rows = (b, slice(0, length)) if offsets is None else (slice(offsets[b], offsets[b] + length),)
        at = _places(given, b, before, length)
        for name in "kv":
            new = given[name][rows]
            if "k_descale" in given:
                new = new.float()
            if name == "k":
                new = _rotated(new, given, starts[b])
            after[f"{name}_cache"][at] = _stored(new, given, name, b)
        if "q" in given:
            after["q"][rows] = _rotated(given["q"][rows], given, starts[b])
    return after


def _stored(rows: torch.Tensor, given: dict[str, Any], name: str, b: int) -> torch.Tensor:
    """New rows, rotated, as the cache has them."""
    if "k_descale" not in given:
        return rows
    dtype = given[f"{name}_cache"].dtype
    largest = torch.finfo(dtype).max
    return (rows / given[f"{name}_descale"][b, :, None]).clamp(-largest, largest).to(dtype)


def _places(given: dict[str, Any], b: int, before: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(pages or sequences, rows) of the cache where a sequence's new rows go."""
    tokens = before + torch.arange(length, device=given["k"].device)
    row = int(given["cache_batch_idx"][b]) if "cache_batch_idx" in given else b
    if "page_table" not in given:
        return torch.full_like(tokens, row), tokens
    page_size = given["k_cache"].shape[1]
    return given["page_table"][row].long()[tokens // page_size], tokens % page_size


def _rotated(rows: torch.Tensor, given: dict[str, Any], start: int) -> torch.Tensor:
    if "rotary_cos" not in given or not len(rows):
        return rows
    tables = given["rotary_cos"].float(), given["rotary_sin"].float()
    return apply_rotary_emb(rows[None], *tables, given["rotary_interleaved"], seqlen_offsets=start)[0]


def run_append_trial(problem: AppendProblem, machine: Machine, capacity: int, seed: int = 0) -> AppendResult:
    """Append random rows through the public API and compare all that is written, and all that is not. Caches are equal
    bit for bit but for what rotates, which may differ by one rounding."""
    kernel = TABLE.lookup(problem)
    config = kernel.configure(problem)
    inputs = make_append_inputs(problem, capacity, seed, machine.device)
    given = dict(inputs.tensors)
    arguments = [given.pop(name) for name in ("k", "v", "k_cache", "v_cache", "cache_seqlens")]
    if "q" in given:
        longest = {"max_seqlen_q": problem.tokens_q} if problem.packed_q else {}
        given |= longest
    expected = expected_append(inputs)

    def run() -> tuple[float, float, torch.Tensor | None, torch.Tensor]:
        started = time.perf_counter()
        compiled(config)
        ready = time.perf_counter()
        q, seqused_k = append_kv(*arguments, **given)
        if not machine.simulated:
            torch.cuda.synchronize()
        return ready - started, time.perf_counter() - ready, q, seqused_k

    if machine.simulated:
        with machine.simulate():
            compile_seconds, seconds, q, seqused_k = run()
    else:
        compile_seconds, seconds, q, seqused_k = run()
    written = {"k_cache": arguments[2], "v_cache": arguments[3], "seqused_k": seqused_k}
    errors = {}
    for name, tensor in (written | ({"q": q} if "q" in expected else {})).items():
        wanted, found = expected[name].float(), tensor.float()
        if name == "q" and problem.used_q:  # rows that do not count are not written
            inside = torch.arange(problem.tokens_q)[None] < torch.tensor(inputs.lengths)[:, None]
            if not problem.packed_q:
                wanted, found = wanted[inside], found[inside]
        rotates = problem.rotary_dim > 0 and name in ("k_cache", "q")
        step = (
            2 * torch.finfo(expected[name].dtype).eps * float(wanted.abs().max()) if rotates and wanted.numel() else 0.0
        )
        errors[name] = Error(float((found - wanted).abs().max()) if wanted.numel() else 0.0, step)
    name = canonical_name(kernel, problem)
    return AppendResult(name, config, machine, errors, compile_seconds, seconds)

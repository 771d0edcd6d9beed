"""The tour: attention layers of published models, each at its own head counts, head_dim and mask, on a real text.

Without a GPU the layers are simulated at a short length, on several architectures; windows longer than that are scaled
by the ratio of the lengths, so that they still hide keys, and the table says so. With a GPU they run at full length.

q, k and v come from the text by a small seeded stand-in for the layers before: byte embeddings, running means over the
preceding bytes, a projection per head, rotary embedding where the model has it. A query therefore resembles keys with
a like context, as in a trained model, and the scores are not white noise. Trained weights are not used: slopes are the
published formula, learnable sinks are drawn. In fp8 q and k are rotated, and each kv head has its descales
(``cute_fa.fp8``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from importlib import resources

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cute_fa import fp8
from cute_fa.engine.table import TABLE
from cute_fa.semantics.tensors import TORCH_DTYPES
from cute_fa.semantics.types import DType, SmArch
from cute_fa.tools.inputs import Inputs, InputSpec
from cute_fa.tools.trial import Machine, TrialResult, gpu_arch, problem_of_spec, run_trial

SIMULATED_LENGTH = 320  # tokens: no multiple of a tile, and the tour stays under a minute and a half on two cores
_WIDTH = 512  # of the stand-in's hidden state
_QUERY_SHARE = 0.6  # cosine between a query's and its kv head's projection


@dataclass(frozen=True)
class Layer:
    """One attention layer. ``length``: the context it runs at on a GPU. ``window``: keys that a query sees, itself
    included, so the left bound is one less; None is all. Figures: each model's published configuration."""

    name: str
    heads: int
    heads_kv: int
    head_dim: int
    length: int
    window: int | None = None
    sink_tokens: int = 0
    softcap: float = 0.0
    softmax_scale: float | None = None
    alibi: bool = False
    learnable_sink: bool = False
    dtype: DType = DType.BF16
    rope_theta: float | None = 10000.0

    def window_at(self, length: int) -> int | None:
        """The window at another length: its own if it hides keys there, else scaled."""
        if self.window is None or self.window < length:
            return self.window
        return max(16, self.window * length // self.length)

    def mask(self, length: int) -> str:
        """The mask in words, and how the window was scaled."""
        window = self.window_at(length)
        parts = ["causal"]
        if self.sink_tokens:
            parts.append(f"sink {self.sink_tokens}")
        if window is not None:
            scaled = "" if window == self.window else f" → {window} at this length"
            parts.append(f"window {self.window}{scaled}")
        parts += [f"softcap {self.softcap:g}"] if self.softcap else []
        parts += ["ALiBi"] if self.alibi else []
        parts += ["learnable sink"] if self.learnable_sink else []
        return ", ".join(parts)

    def spec(self, length: int) -> InputSpec:
        window = self.window_at(length)
        return InputSpec(
            batch=1,
            seqlen_q=length,
            seqlen_k=length,
            causal=True,
            window=(None if window is None else window - 1, None),
            **{name: getattr(self, name) for name in _OF_A_SPEC},
        )


# Fields that a layer and a spec have alike.
_OF_A_SPEC = {field.name for field in fields(Layer)} & {field.name for field in fields(InputSpec)} - {"window"}

LLAMA3 = Layer("Llama-3-8B", 32, 8, 128, 8192, rope_theta=500000.0)
MISTRAL = Layer("Mistral-7B", 32, 8, 128, 16384, window=4096)
BLOOM = Layer("BLOOM-7b1", 32, 32, 128, 2048, alibi=True, rope_theta=None)
GEMMA2_LOCAL = Layer("Gemma-2-9B local", 16, 8, 256, 8192, window=4096, softcap=50.0, softmax_scale=1 / 16)
GEMMA2_GLOBAL = Layer("Gemma-2-9B global", 16, 8, 256, 8192, softcap=50.0, softmax_scale=1 / 16)
# Its rotary embedding is YaRN's; plain rotation with the same base stands in for it.
GPT_OSS = Layer("gpt-oss-20b", 64, 8, 64, 8192, window=128, learnable_sink=True, rope_theta=150000.0)
STREAMING = Layer("StreamingLLM, Llama-2-7B", 32, 32, 128, 8192, window=2044, sink_tokens=4)
LAYERS = (LLAMA3, MISTRAL, BLOOM, GEMMA2_LOCAL, GEMMA2_GLOBAL, GPT_OSS, STREAMING)
LLAMA3_FP8 = replace(LLAMA3, name="Llama-3-8B in fp8", dtype=DType.E4M3)


@dataclass(frozen=True)
class Stop:
    """One stop of the tour: a layer at a length on a machine."""

    layer: Layer
    machine: Machine
    length: int

    @property
    def mask(self) -> str:
        return self.layer.mask(self.length)

    def run(self) -> TrialResult:
        return run_trial(layer_inputs(self.layer, self.length, self.machine.device), self.machine)


def itinerary() -> list[Stop]:
    """Every layer at full length on the GPU; without one every layer simulated as sm_80, those that differ most as
    sm_90a and as sm_100a, which have kernels of their own, also for products in fp8."""
    present = gpu_arch()
    if present is not None:
        machine = Machine(present, simulated=False)
        return [Stop(layer, machine, layer.length) for layer in layers_of(present)]
    stops = [(layer, SmArch.SM_80) for layer in LAYERS]
    most_different = (LLAMA3, LLAMA3_FP8, GEMMA2_LOCAL, GPT_OSS, STREAMING)
    stops += [(layer, arch) for arch in (SmArch.SM_90A, SmArch.SM_100A) for layer in most_different]
    return [Stop(layer, Machine(arch, simulated=True), SIMULATED_LENGTH) for layer, arch in stops]


def layers_of(arch: SmArch) -> tuple[Layer, ...]:
    """Those that kernels for the architecture serve."""
    layers = (*LAYERS, LLAMA3_FP8)
    return tuple(layer for layer in layers if TABLE.serves(problem_of_spec(layer.spec(layer.length), arch)))


def run_tour(console: Console) -> list[tuple[Stop, TrialResult]]:
    """Run every stop, with a progress bar on the console."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    with Progress(*columns, console=console) as progress:
        stops = itinerary()
        task = progress.add_task("", total=len(stops))
        for stop in stops:
            progress.update(task, description=f"{stop.layer.name} on {stop.machine}")
            results.append((stop, stop.run()))
            progress.advance(task)
        progress.update(task, description="tour")
    return results


def tour_table(results: list[tuple[Stop, TrialResult]]) -> Table:
    """A row a stop: layer, mask and canonical kernel name; errors above what is allowed; time of the call."""
    lengths = {stop.length for stop, _ in results}
    title = f"batch 1, {min(lengths)} tokens" if len(lengths) == 1 else "batch 1"
    table = Table(title=title, header_style="bold", show_lines=True)
    table.add_column("layer and kernel", overflow="fold")
    for name in ("ran on", "O error", "LSE error", "time", ""):
        table.add_column(name, justify="left" if name in ("ran on", "") else "right", no_wrap=True)
    for stop, result in results:
        length = "" if len(lengths) == 1 else f", {stop.length} tokens"
        comparison = result.comparison
        table.add_row(
            f"[bold]{stop.layer.name}[/], {stop.layer.heads}/{stop.layer.heads_kv} heads{length}\n"
            f"{stop.mask}\n{result.canonical_name}",
            str(result.machine).replace(" ", "\n"),
            f"{comparison.out_error:.1e}\n≤ {comparison.out_allowed:.1e}",
            f"{comparison.lse_error:.1e}\n≤ {comparison.lse_allowed:.1e}",
            f"{result.seconds:.2f} s" if result.machine.simulated else f"{result.seconds * 1e3:.3f} ms",
            "[green]ok[/]" if result.ok else "[bold red]WRONG[/]",
        )
    return table


def layer_inputs(layer: Layer, length: int, device: str = "cpu", seed: int = 0) -> Inputs:
    """q, k and v of one layer for the first ``length`` bytes of the text."""
    rng = torch.Generator().manual_seed(seed)
    hidden = _hidden_states(length, rng)
    query_of, key_of, value_of = _projections(layer, rng)
    q = _unit_rms(torch.einsum("ld,dhe->lhe", hidden, query_of))
    k = _unit_rms(torch.einsum("ld,dhe->lhe", hidden, key_of))
    v = torch.einsum("ld,dhe->lhe", hidden, value_of)
    if layer.rope_theta is not None:
        q, k = (_rotate(x, layer.rope_theta) for x in (q, k))
    slopes = alibi_slopes(layer.heads) if layer.alibi else None
    sink = torch.randn(layer.heads, generator=rng) if layer.learnable_sink else None
    q, k, v = (x.to(torch.bfloat16)[None].contiguous().to(device) for x in (q, k, v))
    slopes, sink = (None if x is None else x.to(device) for x in (slopes, sink))
    descales = {}
    if layer.dtype.is_fp8:
        q, k = (fp8.hadamard(x, fp8.random_signs(layer.head_dim, device=device)) for x in (q, k))
        dtype, heads_kv = TORCH_DTYPES[layer.dtype], layer.heads_kv
        q, descales["q_descale"] = fp8.quantize_per_head(q, dtype, heads_kv=heads_kv)
        k, descales["k_descale"] = fp8.quantize_per_head(k, dtype)
        v, descales["v_descale"] = fp8.quantize_per_head(v, dtype)
    return Inputs(layer.spec(length), q, k, v, alibi_slopes=slopes, learnable_sink=sink, **descales)


def alibi_slopes(heads: int) -> torch.Tensor:
    """2^(−8(h+1)/heads), the ALiBi paper's slopes for a power of two: fp32 (heads)."""
    if heads & (heads - 1):
        raise ValueError(f"{heads} heads: this formula is for powers of two")
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)


def _hidden_states(length: int, rng: torch.Generator) -> torch.Tensor:
    """(length, width): what the stand-in knows at each byte of the text, of unit RMS."""
    text = resources.files("cute_fa.tools").joinpath("tour_text.txt").read_bytes()
    if length > len(text):
        raise ValueError(f"length={length}: the text has {len(text)} bytes")
    table = torch.randn(256, _WIDTH, generator=rng)
    embedded = table[torch.frombuffer(bytearray(text[:length]), dtype=torch.uint8).long()]
    # Channels remember the preceding bytes for different times: from the byte alone to about a hundred bytes.
    decay = torch.linspace(0.0, 0.99, _WIDTH)
    gain = (1.0 - decay**2).sqrt()
    state, states = torch.zeros(_WIDTH), []
    for row in embedded:
        state = decay * state + gain * row
        states.append(state)
    return _unit_rms(torch.stack(states))


def _projections(layer: Layer, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(width, heads, head_dim) of q, k and v; a query head's has a part in common with its kv head's."""

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(_WIDTH, heads, layer.head_dim, generator=rng) / math.sqrt(_WIDTH)

    key = draw(layer.heads_kv)
    shared = key.repeat_interleave(layer.heads // layer.heads_kv, dim=1)
    query = _QUERY_SHARE * shared + math.sqrt(1.0 - _QUERY_SHARE**2) * draw(layer.heads)
    return query, key, draw(layer.heads_kv)


def _unit_rms(x: torch.Tensor) -> torch.Tensor:
    return x * x.pow(2).mean(-1, keepdim=True).rsqrt()


def _rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding of (length, heads, head_dim), rotating halves (Su et al., RoFormer)."""
    length, _, head_dim = x.shape
    frequency = theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = (torch.arange(length)[:, None] * frequency)[:, None, :]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), dim=-1)

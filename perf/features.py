"""Static figures of a kernel under every feature, and every two features together: where registers run out first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cute_fa.engine import flavour
from cute_fa.engine.compiler import compile_artifacts
from cute_fa.engine.table import TABLE
from cute_fa.semantics.errors import CuteFaError
from cute_fa.semantics.options import rows_of
from cute_fa.semantics.problem import AttentionProblem, default_scale
from cute_fa.semantics.types import Direction, DType, PersistentMode, SmArch
from perf.sass import KernelReport, attention_report

_ROWS = rows_of(AttentionProblem)
# What each feature sets in the problem. Where two set one field the later wins: paged keys are not packed, and causal
# is a right bound of 0.
FEATURES: dict[str, dict[str, Any]] = {
    **{name: _ROWS[name] for name in ("varlen", "seqused")},
    "window": _ROWS["window left and right"],
    "sink": {"window_left": 256, "sink_tokens": 4},
    "causal": {"window_right": 0},
    "alibi": _ROWS["ALiBi"],
    **{name: _ROWS[name] for name in ("softcap", "learnable sink")},
    "pack_gqa": {"num_heads_kv": 2, "pack_gqa": True},
    "paged": _ROWS["paged KV"] | {"varlen_k": False},
    "single": {"persistent": PersistentMode.OFF},
}
# Of a backward, which serves neither packed queries nor pages, and is never persistent.
BACKWARD_FEATURES: dict[str, dict[str, Any]] = {
    **{name: values for name, values in FEATURES.items() if name not in ("pack_gqa", "paged", "single")},
    "slopes": {"alibi": True, "slopes_gradient": True},
    "lse": {"lse_gradient": True},
    "deterministic": {"deterministic": True},
}
HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))


@dataclass(frozen=True)
class FeatureKey:
    """A problem of 8 heads with these names of :meth:`features_of` its direction; in fp8 with descales."""

    arch: SmArch
    head_dim: int
    head_dim_v: int
    features: tuple[str, ...] = ()
    dtype: DType = DType.BF16
    direction: Direction = Direction.FORWARD

    @staticmethod
    def features_of(direction: Direction) -> dict[str, dict[str, Any]]:
        """What each feature sets."""
        return FEATURES if direction is Direction.FORWARD else BACKWARD_FEATURES

    def __str__(self) -> str:
        value = f"v{self.head_dim_v}" if self.head_dim_v != self.head_dim else ""
        dtype = "" if self.dtype is DType.BF16 else f" {self.dtype.value}"
        direction = "" if self.direction is Direction.FORWARD else f" {self.direction.value}"
        return f"{self.arch.value}{direction} d{self.head_dim}{value}{dtype} {' '.join(self.features) or 'plain'}"

    def problem(self) -> AttentionProblem:
        descales = dict.fromkeys(("q_descale", "k_descale", "v_descale"), self.dtype.is_fp8)
        fields: dict[str, Any] = {"num_heads_kv": 8} | descales
        for name in self.features:
            fields |= self.features_of(self.direction)[name]
        return AttentionProblem(
            arch=self.arch,
            direction=self.direction,
            dtype=self.dtype,
            batch=1,
            seqlen_q=1024,
            seqlen_k=1024,
            num_heads=8,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v,
            softmax_scale=default_scale(self.head_dim),
            **fields,
        )


def feature_keys(
    arch: SmArch, head_dims=HEAD_DIMS, dtype: DType = DType.BF16, direction: Direction = Direction.FORWARD
) -> list[FeatureKey]:
    """The plain kernel, each feature, every two of them, and all together, for each (head_dim, head_dim_v); without
    what no kernel of the arch serves."""
    names = tuple(FeatureKey.features_of(direction))
    chosen = [c for size in (0, 1, 2) for c in itertools.combinations(names, size)]
    keys = [
        FeatureKey(arch, *sizes, f, dtype, direction) for sizes in head_dims for f in dict.fromkeys([*chosen, names])
    ]
    return [key for key in keys if _served(key)]


def _served(key: FeatureKey) -> bool:
    try:
        TABLE.lookup(key.problem())
    except CuteFaError:
        return False
    return True


def feature_rows(keys: list[FeatureKey]) -> Iterator[dict[str, Any]]:
    """One row of figures for each key, in their order, as soon as it is compiled (a few seconds each).

    ``spills``: LDL/STL of the whole kernel; ``in_loops`` and ``in_main``: those in hot loops, and in the main one;
    ``offends``: see :func:`offends`.
    """
    for key in keys:
        problem = key.problem()
        kernel = TABLE.lookup(problem)
        config = kernel.configure(problem)
        _, cubin = compile_artifacts(config)
        backward = key.direction is Direction.BACKWARD
        report = attention_report([cubin], config.head_dim_padded, config.head_dim_v_padded, backward)
        yield {
            "head_dim": key.head_dim,
            "head_dim_v": key.head_dim_v,
            "features": " ".join(key.features) or "plain",
            "flavour": flavour.active(),
            "kernel": kernel.family,
            "tile_n": config.tile_n,
            "regs": report.resources["regs"],
            **_figures(report),
        }


def offends(report: KernelReport) -> bool:
    """Whether registers ran out where it costs: spills in a hot loop, or wgmma that ptxas serialised."""
    return bool(report.row()["spill_in_hot"] or report.wgmma_serialised)


def _figures(report: KernelReport) -> dict[str, Any]:
    main = report.score_loop
    return {
        "setmaxnreg": report.setmaxnreg,
        "per_score": main.per_score,
        "cond_per_score": main.cond_per_score,
        "instr": main.instructions,
        "spills": f"{report.spill_loads}/{report.spill_stores}",
        "in_loops": report.row()["spill_in_hot"],
        "in_main": main.counts["local"],
        "serialised": report.wgmma_serialised,
        "offends": offends(report),
    }

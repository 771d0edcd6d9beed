"""Constants of GPUs, each with its source: the TOML files in ``gpus``, or one that ``python -m perf microbench`` wrote.

A file has ``name`` (of the GPU), ``arch`` (sm_90a …), a table for each constant, and tables ``rivals.NAME`` of values
that another explanation of the measured speeds puts in the place of the file's: numbers, or pairs [width, value] where
they depend on how wide a kernel's products are (a clock that power limits falls with the exponentials for each FLOP).
"""

from __future__ import annotations

import math
import random
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SimError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).with_name("gpus")
KINDS = ("documented", "measured", "reported", "fitted", "assumed")

# Every constant that a file has to give, with its unit.
UNITS = {
    "sms": "SMs",
    "clock": "GHz",
    "hbm": "TB/s",
    "l2": "TB/s",
    "l2_reductions": "TB/s",
    "l2_size": "MiB",
    "kernel_start": "µs",
    "tensor_flops": "FLOP/clk/SM",
    "mma_sync_flops": "FLOP/clk/SM",
    "mma_sync_latency": "cycles",
    "wgmma_least": "cycles",
    "wgmma_issue": "cycles",
    "wgmma_tail": "cycles",
    "wgmma_queue": "instructions",
    "fp32_lanes": "lanes/clk/quarter",
    "alu_lanes": "lanes/clk/quarter",
    "imad_lanes": "lanes/clk/quarter",
    "mufu_lanes": "lanes/clk/quarter",
    "convert_lanes": "lanes/clk/quarter",
    "shared_bytes": "B/clk/SM",
    "shared_latency": "cycles",
    "mufu_latency": "cycles",
    "shuffle_latency": "cycles",
    "global_latency": "cycles",
    "constant_latency": "cycles",
    "register_ports": "reads/clk/quarter",
    "register_tensor": "reads/clk/quarter",
    "slots_lost": "share",
    "shared_slack": "cycles",
    "try_wait": "cycles",
    "wake": "cycles",
    "arrive": "cycles",
    "remote_arrive": "cycles",
    "bar": "cycles",
    "cluster_barrier": "cycles",
    "branch": "cycles",
    "tma_setup": "cycles",
    "tma_latency": "cycles",
    "tma_interval": "cycles",
    "tma_bytes": "B/clk/SM",
    "l2_saved": "KiB",
    "store_latency": "cycles",
    "cta_start": "cycles",
}
# Those that something is divided by.
_POSITIVE = {"sms", "clock", "hbm", "l2", "l2_reductions", "tensor_flops", "mma_sync_flops", "fp32_lanes", "alu_lanes",
             "imad_lanes", "mufu_lanes", "convert_lanes", "shared_bytes", "tma_bytes"}  # fmt: skip


@dataclass(frozen=True)
class Constant:
    """A value in the unit that ``UNITS`` names; ``kind`` is how it is known, one of ``KINDS``: ``measured`` by our
    microbenchmarks, ``reported`` by others. ``spread``: relative, one standard deviation of what is believed."""

    value: float
    kind: str
    source: str
    date: str
    spread: float = 0.0


@dataclass(frozen=True)
class Gpu:
    """What the model knows of a GPU; ``gpu.clock`` is the value of the constant of that name."""

    name: str
    arch: str
    constants: dict[str, Constant]
    rivals: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> float:
        if name.startswith("_") or name not in UNITS:
            raise AttributeError(name)
        return self.constants[name].value

    def with_values(self, **values: float) -> Gpu:
        """The GPU with other values; KeyError for a constant that there is not."""
        constants = {name: replace(self.constants[name], value=value) for name, value in values.items()}
        return replace(self, constants={**self.constants, **constants})

    def rival(self, name: str, width: int) -> Gpu:
        """The GPU as another explanation has it, for a kernel whose products are ``width`` wide (head_dim)."""
        if name not in self.rivals:
            raise SimError(f"{self.name} has no rival {name!r}: one of {', '.join(self.rivals) or 'none'}")
        return self.with_values(**{key: _at_width(value, width) for key, value in self.rivals[name].items()})

    def sample(self, seed: int) -> Gpu:
        """The GPU with every constant that has a spread drawn anew, seeded."""
        draw = random.Random(f"{self.name}:{seed}")
        drawn = {
            name: constant.value * max(0.1, draw.gauss(1.0, constant.spread))
            for name, constant in self.constants.items()
            if constant.spread
        }
        return self.with_values(**drawn)

    def cycles(self, seconds: float) -> float:
        """Cycles of the SMs' clock."""
        return seconds * self.clock * 1e9

    def bytes_per_cycle(self, terabytes: float) -> float:
        """A rate in TB/s as bytes a cycle."""
        return terabytes * 1e3 / self.clock


def _at_width(value, width):
    """A number, or what pairs [width, value] give between the logarithms of their widths."""
    if not isinstance(value, list):
        return value
    widths, values = zip(*sorted(value), strict=True)
    return float(np.interp(math.log(width), [math.log(w) for w in widths], values))


def known() -> list[str]:
    """Names of the GPUs that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def load(name: str) -> Gpu:
    """A GPU by its name, as :func:`known` lists them, or the path of a TOML file. SimError if there is none, or if the
    file lacks a constant, has an unknown one, or does not say where a value comes from."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        raise SimError(f"no constants of the GPU {name!r}: one of {', '.join(known())}, or the path of a TOML file")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SimError(f"{path} is not TOML: {error}") from None
    return parse(table, str(path))


def parse(table: dict[str, Any], where: str) -> Gpu:
    """A GPU from the tables of a TOML file; ``where`` names it in errors."""
    table = dict(table)
    missing = [name for name in ("name", "arch") if not isinstance(table.get(name), str)]
    name, arch = table.pop("name", ""), table.pop("arch", "")
    rivals = table.pop("rivals", {})
    if not isinstance(rivals, dict) or not all(isinstance(values, dict) for values in rivals.values()):
        raise SimError(f"{where}: rivals are tables of values")
    missing += [constant for constant in UNITS if constant not in table]
    if missing:
        raise SimError(f"{where} lacks {', '.join(missing)}")
    if unknown := [*(table.keys() - UNITS.keys()), *(k for r in rivals.values() for k in r.keys() - UNITS.keys())]:
        raise SimError(f"{where}: unknown constants {', '.join(sorted(unknown))}")
    if not re.fullmatch(r"sm_\d+[af]?", arch):
        raise SimError(f"{where}: arch = {arch!r}: sm_80, sm_90a …")
    constants = {key: _constant(key, value, where) for key, value in table.items()}
    for rival, values in rivals.items():
        for key, value in values.items():
            _check_rival(key, value, f"{where}: rivals.{rival}.{key}")
    return Gpu(name, arch, constants, rivals)


def _constant(name: str, entry: Any, where: str) -> Constant:
    at = f"{where}: {name}"
    if not isinstance(entry, dict):
        raise SimError(f"{at} = {entry!r}: a table with value, unit, kind, source and date")
    if entry.get("unit") != UNITS[name]:
        raise SimError(f"{at} has the unit {entry.get('unit')!r}: {UNITS[name]!r}")
    if entry.get("kind") not in KINDS:
        raise SimError(f"{at} has the kind {entry.get('kind')!r}: one of {', '.join(KINDS)}")
    value, spread = _checked(name, entry.get("value"), at), entry.get("spread", 0.0)
    if isinstance(spread, bool) or not isinstance(spread, (int, float)) or not 0 <= spread <= 1:
        raise SimError(f"{at} has the spread {spread!r}: 0 to 1")
    if unknown := entry.keys() - {"value", "unit", "kind", "source", "date", "spread"}:
        raise SimError(f"{at} has unknown {', '.join(sorted(unknown))}")
    for key in ("source", "date"):
        if not str(entry.get(key, "")):
            raise SimError(f"{at} has no {key}")
    return Constant(value, entry["kind"], entry["source"], str(entry["date"]), float(spread))


def _check_rival(name: str, value: Any, at: str) -> None:
    """A number, or pairs [width, value]."""
    if not isinstance(value, list):
        _checked(name, value, at)
    elif not value or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise SimError(f"{at} has the value {value!r}: a number, or pairs [width, value]")
    else:
        for width, number in value:
            _checked("sms", width, at)
            _checked(name, number, at)


def _checked(name: str, value: Any, at: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < float("inf") or (value == 0 and name in _POSITIVE):
        raise SimError(
            f"{at} has the value {value!r}: a number {'above 0' if name in _POSITIVE else 'that is not negative'}"
        )
    return float(value)

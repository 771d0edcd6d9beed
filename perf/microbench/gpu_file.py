"""The TOML file of a measured GPU, in the format of :mod:`ptxsim.timing.gpus`."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterable, Mapping

from cute_fa.semantics.errors import DeviceError
from perf.microbench.benchmark import Measured
from ptxsim.timing.gpus import UNITS, Constant, Gpu, known, load

SOURCE = "perf microbench"
MEASURED = ("sm_80", "sm_90a")  # architectures that the kernels are for


def nearest(name: str, arch: str) -> Gpu:
    """The packaged GPU of the architecture whose file's name has most in common with the driver's name of a GPU."""
    files = [file for file in known() if load(file).arch == arch and arch in MEASURED]
    if not files:
        raise DeviceError(f"{name} is {arch}: constants are measured of {', '.join(MEASURED)}")
    words = name.lower().replace("-", " ").split()

    def likeness(file: str) -> int:
        return sum(1 if word in words else -1 for word in file.split("-"))

    return load(max(files, key=likeness))


def merged(name: str, base: Gpu, measured: Mapping[str, Measured], date: str) -> Gpu:
    """The base with what was measured of another of its kind. Of its rivals those remain that are about what was
    not."""
    own = {key: Constant(found.value, "measured", SOURCE, date, found.spread) for key, found in measured.items()}
    left = {rival: {k: v for k, v in values.items() if k not in own} for rival, values in base.rivals.items()}
    rivals = {rival: values for rival, values in left.items() if values}
    return dataclasses.replace(base, name=name, constants={**base.constants, **own}, rivals=rivals)


def text(gpu: Gpu, notes: Iterable[str]) -> str:
    """The file; ``notes`` are comments at its head."""
    lines = [*(f"# {note}" for note in notes), f"name = {json.dumps(gpu.name)}", f'arch = "{gpu.arch}"']
    for key, unit in UNITS.items():
        constant = gpu.constants[key]
        lines += ["", f"[{key}]", f"value = {constant.value:.6g}", f'unit = "{unit}"', f'kind = "{constant.kind}"']
        lines += [f"source = {json.dumps(constant.source, ensure_ascii=False)}", f"date = {constant.date}"]
        lines += [f"spread = {constant.spread:.3g}"] if constant.spread else []
    for rival, values in gpu.rivals.items():
        lines += ["", f"[rivals.{rival}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def today() -> str:
    return datetime.date.today().isoformat()

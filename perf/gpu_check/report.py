"""What ``gpu-check`` writes, as it comes: ``machine.json``, ``summary.md`` and a log for each phase."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import cute_fa
from perf.gpu_check.steps import Outcome, Step

_PACKAGES = ("nvidia-cutlass-dsl", "apache-tvm-ffi", "numpy", "pandas", "pytest", "transformers", "triton")
_TAIL = 15  # lines of the output of a step that went wrong
_BUNDLES = "CUTE_FA_BUNDLES"


def machine_facts(columns: dict[str, Any], clocks: Any) -> dict[str, Any]:
    """GPU, driver, versions and clocks: what figures mean nothing without."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cute_fa": cute_fa.__version__,
        "bundles": os.environ.get(_BUNDLES),
        **columns,
        "cudnn": torch.backends.cudnn.version(),
        "clocks": clocks._asdict(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "versions": versions,
    }


class Report:
    """A folder of results that is right at any moment; a run cut short keeps what it has."""

    def __init__(self, folder: Path, facts: dict[str, Any], steps: Sequence[Step]):
        self.folder, self.facts, self.steps = folder, facts, list(steps)
        self.outcomes: dict[tuple[str, str], Outcome] = {}
        folder.mkdir(parents=True, exist_ok=True)
        folder.joinpath("machine.json").write_text(json.dumps(facts, indent=1) + "\n")
        self._write()

    def add(self, outcome: Outcome) -> None:
        self.outcomes[outcome.step.phase, outcome.step.name] = outcome
        self._write()

    def _write(self) -> None:
        partial = self.folder / "summary.md.partial"
        partial.write_text(self.summary(), encoding="utf-8")
        os.replace(partial, self.folder / "summary.md")

    def summary(self) -> str:
        """Markdown: a line a step in the plan's order, and the end of the output of those that went wrong."""
        gpu = {name: self.facts.get(name) for name in ("gpu", "driver", "cuda", "torch", "date")}
        lines = [", ".join(f"{name} {value}" for name, value in gpu.items()), ""]
        lines += ["| phase | step | result | seconds | |", "|---|---|---|---|---|"]
        bad = []
        for step in self.steps:
            outcome = self.outcomes.get((step.phase, step.name))
            if outcome is None:
                lines.append(f"| {step.phase} | {step.name} | not reached | | |")
                continue
            told = step.missing or _last_line(outcome.output)
            result = outcome.result if outcome.result != "not run" or step.missing else "nothing to run"
            lines.append(f"| {step.phase} | {step.name} | {result} | {outcome.seconds:.0f} | {told} |")
            bad += [outcome] if outcome.bad else []
        for outcome in bad:
            tail = outcome.output.splitlines()[-_TAIL:]
            lines += ["", f"{outcome.step.phase}, {outcome.step.name}:", "", "```", *tail, "```"]
        return "\n".join(lines) + "\n"


def _last_line(output: str) -> str:
    lines = [line.strip("= ") for line in output.splitlines() if line.strip() and not line.startswith("$")]
    return re.sub(r"[|\s]+", " ", lines[-1])[:160] if lines else ""

"""Runs another library's own test suite on this project, simulated; docs/peers.md says how and what it gave.

    python -m tests.testing.peers_suite PATH --arch sm_90a --sample 50 --seed 1

PATH is a test file in a checkout of the peer's, which stays as it is. Its imports find ``tests.testing.peers_shim``,
tensors on "cuda" lie in host memory (``ptxsim.host.posing``), and of all its parametrised cases a few that simulate in
seconds are drawn. Each comes out as one of

    agreed      the peer's own assertions hold
    refused     an error of cute_fa's that names the argument, or a function that has no counterpart here
    differs     an assertion of the peer's fails
    error       anything else went wrong
    too costly  it takes more than --seconds of the CPU, or more memory than there is
    skipped     the peer's test skips it

and for each of the last two kinds another case is drawn.

The exit status is 1 if a case differs or goes wrong, 2 if the suite could not be collected.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import signal
import sys
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "0")

import pytest
import torch

import cute_fa
from cute_fa.semantics.errors import CuteFaError, UnsupportedArgumentError, UnsupportedKeyError
from ptxsim.host.posing import posing
from tests.testing import peers_shim

OUTCOMES = ("agreed", "refused", "differs", "error", "too costly", "skipped")
_SPARES = 10  # cases drawn for each that is asked for, since tests skip many


class TooLong(BaseException):
    """A case has used up its time; no ``except Exception`` of a test hides it."""


class Suite:
    """A pytest plugin: draws cases, gives each its time, and counts how they end."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.counts = {"cases": 0, "too large": 0}
        self.outcomes: dict[str, Counter] = defaultdict(Counter)
        self.reasons: dict[str, Counter] = {"refused": Counter(), "differs": Counter(), "error": Counter()}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_generate_tests(self, metafunc):
        """Draw among a function's cases before they become items: there may be hundreds of thousands."""
        yield
        cases, name = metafunc._calls, metafunc.function.__name__
        asked = [case for case in cases if self._asked(f"{name}[{case.id}]")]
        small = [case for case in asked if self._small(case.params)]
        self.counts["cases"] += len(asked)
        self.counts["too large"] += len(asked) - len(small)
        chance = random.Random(f"{self.options.seed} {name}")
        drawn = chance.sample(small, min(_SPARES * self.options.sample, len(small)))
        if cases:
            metafunc._calls = drawn or cases[:1]  # none would make one case without parameters: dropped below

    def pytest_collection_modifyitems(self, items):
        """Draw cases of all functions in turn."""
        functions = defaultdict(list)
        for item in items:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            if self._asked(item.name) and self._small(params):
                functions[item.originalname].append(item)
                self.counts["cases"] += not params
        in_turn = itertools.zip_longest(*functions.values())
        items[:] = [item for turn in in_turn for item in turn if item is not None]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        """Nothing more once as many have run as were asked for."""
        ran = sum(counts.total() - counts["skipped"] - counts["too costly"] for counts in self.outcomes.values())
        return True if ran >= self.options.sample else None

    def _asked(self, name: str) -> bool:
        return self.options.only in name

    def _small(self, params: dict[str, Any]) -> bool:
        """Whether there are at most ``--max-scores`` pairs of a query and a key, as far as parameters tell."""
        lengths = sorted(number for name, value in params.items() if "len" in name for number in _numbers(value))
        return not lengths or lengths[-1] * lengths[-2 if len(lengths) > 1 else -1] <= self.options.max_scores

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item):
        def stop(number, frame):
            raise TooLong

        signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, self.options.seconds)  # of the CPU's time: others may use the machine
        yield
        signal.setitimer(signal.ITIMER_PROF, 0)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        if call.when == "call" or call.excinfo is not None:
            outcome, reason = outcome_of(None if call.excinfo is None else call.excinfo.value)
            self.outcomes[item.originalname][outcome] += 1
            if outcome in self.reasons:
                self.reasons[outcome][reason if outcome == "refused" else f"{item.name}: {reason}"] += 1
            print(f"{outcome:10} {call.duration:6.1f} s {item.name} {reason}", file=sys.stderr, flush=True)
        yield

    def summary(self) -> dict[str, Any]:
        total = sum(self.outcomes.values(), Counter())
        return {
            "suite": self.options.path.name,
            "arch": self.options.arch,
            **self.counts,
            "run": sum(total.values()),
            **{outcome: total[outcome] for outcome in OUTCOMES},
            "functions": {name: dict(counts) for name, counts in self.outcomes.items()},
            "reasons": {outcome: dict(counts.most_common()) for outcome, counts in self.reasons.items()},
        }


def outcome_of(error: BaseException | None) -> tuple[str, str]:
    """(one of OUTCOMES, why)."""
    if error is None:
        return "agreed", ""
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, pytest.skip.Exception):
        return "skipped", text
    if isinstance(error, (TooLong, MemoryError)) or "can't allocate memory" in text:
        return "too costly", ""
    if isinstance(error, peers_shim.Unserved):
        return "refused", f"no function {text}"
    if isinstance(error, UnsupportedArgumentError):
        return "refused", f"{error.name} is not implemented"
    if isinstance(error, UnsupportedKeyError):
        reasons = {reason for why in error.reasons.values() for reason in why}
        return "refused", f"no kernel: {'; '.join(sorted(reasons))}"
    if isinstance(error, CuteFaError):
        return "refused", f"{type(error).__name__}: {re.sub(r'[0-9]+', '#', text.split(' (')[0])}"
    if isinstance(error, (AssertionError, pytest.fail.Exception)):
        return "differs", text
    return "error", f"{type(error).__name__}: {text}"


def _numbers(value: Any) -> list[int]:
    """Integers of a parameter, which may be a list of tuples."""
    if isinstance(value, (list, tuple)):
        return [number for part in value for number in _numbers(part)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


def root_of(path: Path) -> Path:
    """The checkout that the file lies in: the nearest folder with a .git, else the file's own."""
    return next((folder for folder in path.parents if (folder / ".git").exists()), path.parent)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.testing.peers_suite", description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a test file in a checkout of the peer's")
    parser.add_argument("--arch", default="sm_80", help="simulated architecture (default: %(default)s)")
    parser.add_argument("--sample", type=int, default=50, help="cases to draw (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("-k", dest="only", default="", help="draw among cases whose name[parameters] holds this text")
    parser.add_argument("--max-scores", type=int, default=150_000, help="leave out longer cases (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=120, help="of the CPU for each case (default: %(default)s)")
    parser.add_argument("--root", type=Path, help="the checkout (default: the nearest folder with a .git)")
    parser.add_argument("--json", type=Path, help="also write the summary to this file")
    options = parser.parse_args(arguments)
    options.path = options.path.resolve()
    options.root = (options.root or root_of(options.path)).resolve()
    return options


def main(options: argparse.Namespace) -> int:
    suite = Suite(options)
    peers_shim.install(options.root)
    # helpers beside the test file, and those that it imports from its own package "tests"
    sys.path[1:1] = [str(options.path.parent), str(options.root)]
    sys.modules["tests"].__path__.append(str(options.root / "tests"))
    pytest_options = ["--noconftest", "--import-mode=importlib", "--rootdir", str(options.root), "-c", os.devnull]
    pytest_options += [word for plugin in ("cacheprovider", "xdist", "terminal") for word in ("-p", f"no:{plugin}")]
    with ExitStack() as stack:
        simulation = stack.enter_context(cute_fa.simulate(options.arch))
        stack.enter_context(posing(simulation))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        status = pytest.main([*pytest_options, str(options.path)], plugins=[suite])
    summary = suite.summary()
    print(json.dumps(summary, indent=1))
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1))
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return 2
    return 1 if summary["differs"] or summary["error"] else 0


if __name__ == "__main__":
    sys.exit(main(parsed()))

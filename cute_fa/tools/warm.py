"""Kernels compiled ahead of time: a list of problems, compiled into the disk cache by several processes.

The list is text, a problem a line: the options of ``python -m cute_fa compile`` that describe it, quoted as in a shell;
``#`` begins a comment.

    --arch sm_90a --head-dim 128 --causal
    --arch sm_90a --head-dim 128 --causal --backward    # the same layer's backward
    --arch sm_90a --head-dim 128 --append --page-size 16

or what ``cute_fa.record_keys`` wrote down of a program's launches, a line of JSON a kernel.

The cache's folder then holds all that a machine of the same kind needs to run them: no kernel in it is compiled again.
"""

from __future__ import annotations

import multiprocessing
import shlex
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING, NamedTuple

from cute_fa.engine import cache, recording
from cute_fa.engine.compiler import compile_artifacts
from cute_fa.semantics.errors import ArgumentError, CuteFaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cute_fa.engine.contract import KernelConfig


class Warmed(NamedTuple):
    """One kernel of the list: ``compiled`` or found in the cache, and the seconds that took."""

    name: str
    compiled: bool
    seconds: float


def read_keys(path: Path, configs_of: Callable[[list[str]], list[KernelConfig]]) -> list[KernelConfig]:
    """The kernels that a file asks for, each once, in its order. ``configs_of`` gives those of a line's options.

    Raises ArgumentError, with the line's number, for a line that names no kernel.
    """
    configs: dict[KernelConfig, None] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            if line.lstrip().startswith("{"):
                configs[recording.config_of(line)] = None
            elif options := shlex.split(line, comments=True):
                configs |= dict.fromkeys(configs_of(options))
        except (CuteFaError, ValueError) as error:
            raise ArgumentError(f"{path}, line {number}: {error}") from error
    if not configs:
        raise ArgumentError(f"{path}: no line names a problem")
    return list(configs)


def warm(configs: list[KernelConfig], jobs: int) -> Iterator[Warmed]:
    """Compile what the disk cache lacks in ``jobs`` processes, and tell each kernel as it is ready, in no order.

    Raises ArgumentError if the cache is off or an entry could not be written, and whatever a compile raises; the other
    kernels already begun are then finished.
    """
    if not cache.enabled():
        raise ArgumentError("CUTE_FA_CACHE=0: there is no cache to compile into")
    # New processes, since the DSL keeps the state of a compile in process-wide objects; forked ones would share locks.
    with ProcessPoolExecutor(min(jobs, len(configs)), multiprocessing.get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(_compile, config) for config in configs]):
                yield done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _compile(config: KernelConfig) -> Warmed:
    started, before = time.perf_counter(), cache.stats.compiled
    compile_artifacts(config)
    compiled = cache.stats.compiled > before
    # The cache only warns of a folder that cannot be written: what was asked for here is an entry.
    if compiled and not (cache.directory() / cache.key_of(config).digest).is_dir():
        raise ArgumentError(f"{config.compile_name} was compiled but could not be stored in {cache.directory()}")
    return Warmed(config.compile_name, compiled, time.perf_counter() - started)

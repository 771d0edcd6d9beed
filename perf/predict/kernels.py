"""The kernels that are predicted: how they cut a problem, and how they are run on a few tiles of it.

A *probe* is such a run: ``tiles`` tiles of ``steps`` steps each, simulated and recorded.
"""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import cutlass.cute.runtime
import torch

import cute_fa
import ptxsim
from cute_fa.engine.overrides import forced, settings, tunable
from cute_fa.engine.table import TABLE
from cute_fa.semantics.errors import ArgumentError
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction, DType, SmArch
from cute_fa.tools.trial import problem_of_spec
from fa3_sm90.backward_split.config import Fa3SplitBackwardConfig
from perf.predict.chains import ChainedTile, fa4_chain, our_chain
from perf.predict.tiles import TileShape, steps_of
from perf.workload import Workload
from ptxsim.host.posing import posing
from ptxsim.timing.recorder import Recorder
from ptxsim.timing.replay import TimedLaunch

_DTYPES = {DType.BF16: torch.bfloat16, DType.FP16: torch.float16}


@dataclass(frozen=True)
class Probe:
    """What a probe computes, bottom-right aligned: ``heads_kv`` kv heads, each with ``ratio`` query heads, with so many
    queries and keys."""

    heads_kv: int
    ratio: int
    seqlen_q: int
    seqlen_k: int
    window: tuple[int | None, int | None]


class Kernel(ABC):
    """A kernel of one arch for one workload."""

    name: str
    device_kernel = ""  # what the name of the one that is predicted holds, where a call launches several of a size

    def __init__(self, workload: Workload, arch: SmArch, settings: dict[str, Any]):
        self.workload, self.arch, self.settings = workload, arch, settings
        if workload.lengths != "dense" or workload.page_size or workload.plan or workload.decode:
            raise ArgumentError("predict: sequences of one length, without pages, plans and decoding")
        if workload.dtype not in _DTYPES:
            raise ArgumentError(
                f"predict: dtype={workload.dtype.value!r}: one of {', '.join(d.value for d in _DTYPES)}"
            )
        if arch.number // 10 == 10:
            raise ArgumentError(f"predict: {arch.value}: tcgen05 and tensor memory are not timed")
        self.problem = problem_of(workload, arch)
        self.shape = self.tile_shape()

    @abstractmethod
    def tile_shape(self) -> TileShape:
        """How the kernel cuts the workload."""

    @abstractmethod
    def chain(self, l2_bytes: int) -> list[ChainedTile]:
        """Of a deterministic backward: its tiles in the order of the launch, and which waits for which."""

    @abstractmethod
    def run(self, probe: Probe, recorder: Recorder) -> None:
        """Run a probe in simulation, recorded."""

    @property
    def others(self) -> list[Kernel]:
        """Further kernels of the call, each with tiles of its own, that run after this one."""
        return []

    @property
    def identity(self) -> tuple:
        """What the recordings of probes depend on."""
        w = self.workload
        ratio = w.heads // w.heads_kv
        return (self.name, self.device_kernel, self.arch.value, w.direction.value, w.deterministic, w.dtype.value,
                w.head_dim, w.head_dim_v, ratio,
                w.window_size[0] is not None, w.window_size[1],  # probes have a left bound of their own
                *sorted(self.settings.items()), self.shape)  # fmt: skip

    def probe(self, tiles: int, steps: int, cubin: bytes | None = None) -> TimedLaunch:
        """The main kernel on so many tiles of so many steps. ``cubin``: machine code that it has to be."""
        w, shape = self.workload, self.shape
        left, right = w.window_size
        if w.direction is Direction.BACKWARD:
            return self._probe_backward(tiles, steps, cubin)
        keys = steps * shape.step
        if left is not None:  # two blocks before the window's edge, so that it is met
            left, keys = keys - shape.tokens, keys + 2 * shape.step
        # a persistent CTA walks over all tiles that there are
        ratio = shape.heads if shape.persistent else w.heads // w.heads_kv
        heads_kv = -(-tiles * shape.heads // ratio)
        launch = self._record(Probe(heads_kv, ratio, shape.tokens, keys, (left, right)), cubin)
        clusters = launch.ctas // shape.cluster
        return launch if shape.persistent or clusters == tiles else launch.only(range(tiles * shape.cluster))

    def _probe_backward(self, tiles, steps, cubin):
        """Of a CTA a tile: those that take so many steps, and of a deterministic backward wait for others at all sums
        (a tile that is the first may not even ask)."""
        w, shape = self.workload, self.shape
        left, right = w.window_size
        ratio = w.heads // w.heads_kv
        apart = ratio - 1 if w.deterministic and ratio > shape.heads else ratio  # heads whose tiles do
        heads_kv = -(-tiles * shape.heads // apart)
        length = steps // shape.heads * shape.step
        if left is None and right is None:
            keys = shape.tokens * (1 + w.deterministic)
        else:
            if left is not None:  # a tile in the middle is seen by ``length`` queries
                right = min(right, (length - shape.tokens) // 2)
                left = length - shape.tokens - right
                length += 4 * shape.step
            keys = length
        launch = self._record(Probe(heads_kv, ratio, length, keys, (left, right)), cubin)
        # CTAs in the order of what they execute are tiles in the order of their steps, then of what they wait for
        ctas = shape.cluster
        longest = sorted(range(0, launch.ctas, ctas), key=launch.rows_of, reverse=True)
        return launch.only([first + rank for first in sorted(longest[:tiles]) for rank in range(ctas)])

    def _record(self, probe, cubin):
        recorder = Recorder()
        self.run(probe, recorder)
        recordings = [recording for recording in recorder.recordings if self.device_kernel in recording.name]
        longest = max(recordings, key=lambda r: sum(len(trace) for trace in r.ctas[0]))
        if longest.cluster_size != self.shape.cluster:
            raise ArgumentError(f"predict: clusters of {longest.cluster_size} CTAs ran, not of {self.shape.cluster}")
        return TimedLaunch(longest, cubin)

    def watch(self, simulation: ptxsim.Simulation, recorder: Recorder) -> None:
        """Record what runs in a simulation, where no tile of a deterministic backward waits in vain."""
        simulation.observers.append(recorder)
        if self.workload.deterministic:
            simulation.together = 1

    def tensors(self, probe: Probe) -> list[torch.Tensor]:
        """q, k, v of a probe."""
        w = self.workload
        torch.manual_seed(0)
        dtype = _DTYPES[w.dtype]
        q = torch.randn(1, probe.seqlen_q, probe.heads_kv * probe.ratio, w.head_dim).to(dtype)
        k = torch.randn(1, probe.seqlen_k, probe.heads_kv, w.head_dim).to(dtype)
        v = torch.randn(1, probe.seqlen_k, probe.heads_kv, w.head_dim_v).to(dtype)
        return [q, k, v]


def problem_of(workload: Workload, arch: SmArch) -> AttentionProblem:
    """What the dispatch table is asked for."""
    return problem_of_spec(workload.spec(), arch, direction=workload.direction, deterministic=workload.deterministic)


def settings_of(workload: Workload, arch: SmArch, changes: Sequence[str]) -> dict[str, Any]:
    """Fields of our kernel's config from words like ``cluster=2``; ArgumentError for what cannot be set."""
    return settings(TABLE.lookup(problem_of(workload, arch)), changes)


class OurKernel(Kernel):
    """This package's, by the dispatch table."""

    name = "ours"

    def tile_shape(self) -> TileShape:
        w, self.kernel = self.workload, TABLE.lookup(self.problem)
        with forced(self.kernel, **self.settings):
            config = self.kernel.configure(self.problem)
        # a probe is shorter than the workload, and gets the workload's config all the same
        self.fields = {name: getattr(config, name) for name in tunable(self.kernel)}
        if isinstance(config, Fa3SplitBackwardConfig):
            self.device_kernel = "KeyGradientKernel"
            self.workload = dataclasses.replace(w, deterministic=False)  # as it always is
            shape = TileShape(config.tile_n * config.cluster, config.tile_m, w.heads // w.heads_kv, config.cluster)
            return dataclasses.replace(shape, by_head=not config.longest_first)
        if w.deterministic and not config.turns:
            reason = "dQ has a kernel of its own, which is not timed"
            raise ArgumentError(f"predict: deterministic gradients on {self.arch.value}: {reason}")
        if w.direction is Direction.BACKWARD:
            by_head = not config.longest_first
            return TileShape(config.tile_n, config.tile_m, w.heads // w.heads_kv, by_head=by_head)
        by_head = self.kernel.family == "fa2"
        tokens = getattr(config, "tile_tokens", None) or config.tile_m
        return TileShape(tokens, config.tile_n, getattr(config, "pack_gqa", 1), getattr(config, "cluster", 1),
                         getattr(config, "persistent", False), by_head=by_head)  # fmt: skip

    @property
    def others(self) -> list[Kernel]:
        return [QueryGradientPart(self)] if self.device_kernel else []

    def chain(self, l2_bytes: int) -> list[ChainedTile]:
        return our_chain(self.shape, self.workload, l2_bytes)

    @property
    def identity(self) -> tuple:
        return (*super().identity, *sorted(self.fields.items()))

    def run(self, probe: Probe, recorder: Recorder) -> None:
        q, k, v = self.tensors(probe)
        backward = self.workload.direction is Direction.BACKWARD
        with forced(self.kernel, **self.fields), cute_fa.simulate(self.arch, num_sms=self.shape.cluster) as simulation:
            self.watch(simulation, recorder)
            if not backward:
                cute_fa.flash_attn_func(q, k, v, window_size=_window(probe))
                return
            for x in (q, k, v):
                x.requires_grad_()
            deterministic = self.workload.deterministic
            out = cute_fa.flash_attn_func(q, k, v, window_size=_window(probe), deterministic=deterministic)
            recorder.recordings.clear()
            out.backward(torch.randn_like(out))


class QueryGradientPart(OurKernel):
    """Of a backward whose dQ has a kernel of its own that kernel, which walks over the keys as a forward does."""

    device_kernel = "QueryGradientKernel"

    def __init__(self, whole: OurKernel):
        self.whole = whole
        super().__init__(dataclasses.replace(whole.workload, direction=Direction.FORWARD), whole.arch, whole.settings)

    def tile_shape(self) -> TileShape:
        self.kernel, self.fields = self.whole.kernel, self.whole.fields
        config = self.kernel.configure(self.whole.problem)
        return TileShape(config.query_rows, config.tile_n, by_head=not config.longest_first)

    @property
    def others(self) -> list[Kernel]:
        return []

    def run(self, probe: Probe, recorder: Recorder) -> None:
        self.whole.run(probe, recorder)


def _window(probe):
    return tuple(-1 if edge is None else edge for edge in probe.window)


@contextmanager
def _refusals():
    """What FlashAttention-4 does not serve, as an ArgumentError."""
    try:
        yield
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise ArgumentError(f"predict: FlashAttention-4 refuses: {error}") from error


class Fa4Kernel(Kernel):
    """FlashAttention-4's, of the flash-attn-4 that is installed."""

    name = "fa4"

    def __init__(self, workload: Workload, arch: SmArch, settings: dict[str, Any]):
        os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = os.environ["QUACK_CACHE_ENABLED"] = "0"
        os.environ.setdefault("FLASH_ATTENTION_NUM_SMS", "132")  # which decides nothing that is predicted
        ptxsim.install()
        try:
            from flash_attn.cute import interface, utils
        except ImportError as error:
            raise ArgumentError(f"predict: flash-attn-4 is not installed ({error})") from None
        self.interface, self.utils = interface, utils
        super().__init__(workload, arch, settings)

    def tile_shape(self) -> TileShape:
        w = self.workload
        left, right = w.window_size
        causal, local = left is None and right == 0, left is not None
        major = self.arch.number // 10
        if w.direction is Direction.BACKWARD:
            if major != 9:
                raise ArgumentError(f"predict: FlashAttention-4 has no backward for {self.arch.value} that is timed")
            with _refusals():
                config = self.settings.get("config") or self.interface._tile_size_bwd_sm90(
                    w.head_dim, w.head_dim_v, causal, local
                )
            # its scheduler that takes several heads together (SingleTileLPTBwdScheduler) is the deterministic kernel's
            return TileShape(config.n_block_size, config.m_block_size, by_head=True)
        if major == 8:
            tokens, step, packed = 128, 64, False
        elif major == 9:
            with _refusals():
                config = self.interface._tile_size_fwd_sm90(w.head_dim, w.head_dim_v, causal, local)
            tokens, step, packed = config.m_block_size, config.n_block_size, w.heads > w.heads_kv
        else:
            raise ArgumentError(f"predict: FlashAttention-4 has no forward for {self.arch.value} that is timed")
        tokens, step = self.settings.get("tile_mn", (tokens, step))
        ratio = w.heads // w.heads_kv if packed and tokens % (w.heads // w.heads_kv) == 0 else 1
        return TileShape(tokens // ratio, step, ratio, skips_left=major >= 9)

    def chain(self, l2_bytes: int) -> list[ChainedTile]:
        return fa4_chain(self.shape, self.workload)

    def run(self, probe: Probe, recorder: Recorder) -> None:
        q, k, v = self.tensors(probe)
        left, right = probe.window
        window = (
            dict(causal=True) if (left, right) == (None, 0) else dict(window_size_left=left, window_size_right=right)
        )
        backward = self.workload.direction is Direction.BACKWARD
        with ExitStack() as stack:
            simulation = stack.enter_context(ptxsim.simulate(self.arch.value, sm_count=132))
            stack.enter_context(posing(simulation))
            self.watch(simulation, recorder)
            stack.enter_context(_refusals())
            if backward:
                out = torch.randn(*q.shape[:-1], v.shape[-1]).to(q.dtype)
                lse = torch.full((1, q.shape[2], q.shape[1]), 8.0)
                # where it takes the semaphores, a name that was bound when it was imported
                stack.enter_context(mock.patch.object(self.utils, "from_dlpack", cutlass.cute.runtime.from_dlpack))
                deterministic = self.workload.deterministic
                self.interface._flash_attn_bwd(
                    q, k, v, out, torch.randn_like(out), lse, deterministic=deterministic, **window
                )
            else:
                self.interface._flash_attn_fwd(
                    q, k, v, _arch=self.arch.number, return_lse=True, **window, **self.settings
                )


KERNELS: dict[str, Callable[..., Kernel]] = {"ours": OurKernel, "fa4": Fa4Kernel}


def probe_steps(kernel: Kernel) -> Sequence[tuple[int, int]]:
    """(tiles a place, steps) of the probes: one tile of few and of many steps, three tiles of many."""
    windowed = kernel.workload.window_size[0] is not None
    short = max(4 if windowed else 8, -(-kernel.shape.tokens // kernel.shape.step) + 1)
    if kernel.workload.direction is Direction.BACKWARD:
        short *= kernel.shape.heads  # which a tile walks over one after the other
    return (1, short), (1, 2 * short), (3, 2 * short)


__all__ = ["KERNELS", "Fa4Kernel", "Kernel", "OurKernel", "Probe", "probe_steps", "problem_of", "steps_of"]

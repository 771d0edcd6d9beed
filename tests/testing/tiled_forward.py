"""The forward of a family on an architecture, simulated, against the reference, and which blocks of keys it loads."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import cute_fa
from cute_fa.engine import compiler
from cute_fa.engine.contract import AttentionTensors
from cute_fa.semantics.reference import expected
from cute_fa.semantics.tensors import TORCH_DTYPES, problem_of
from cute_fa.tools.inputs import Inputs, InputSpec, make_inputs
from cute_fa.tools.trial import problem_of_spec
from tests.testing.forward_grid import spec_of_case
from tests.testing.loads import recorded_loads
from tests.testing.simulated import call

if TYPE_CHECKING:
    import ptxsim
    from cute_fa.device.tiled_forward import TiledForward
    from cute_fa.engine.contract import KernelConfig
    from cute_fa.semantics.types import SmArch

_SIMULATION = ("num_sms", "late", "schedule_seed", "race", "fp8_bits")


@dataclass(frozen=True)
class Forward:
    """What the tests of a family call."""

    kernel: type[TiledForward]
    arch: SmArch

    def config_of(self, spec: InputSpec, **choices: Any):
        """The kernel's config for a spec; ``choices``: fields of the problem."""
        return self.kernel.configure(dataclasses.replace(problem_of_spec(spec, self.arch), **choices))

    def launch(self, given: Inputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor, ptxsim.Simulation]:
        """(out, lse, simulation) of one call; ``options``: those of the simulation and of the public function."""
        simulation = {name: options.pop(name) for name in _SIMULATION if name in options}
        return call(given, self.arch.value, simulation, family=self.kernel.family, **self._taken(given, options))

    def run(self, spec: InputSpec, inputs: str = "peaked", **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of one call, compared with the reference."""
        return self.check(make_inputs(spec, inputs), **options)

    def check(self, given: Inputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for given inputs."""
        out, lse, _ = self.launch(given, **options)
        compare(given, out, lse)
        return out, lse

    def run_case(self, case: dict) -> None:
        """One case of a grid of ``tests.testing.forward_grid``."""
        options = self._choices(case) | {"num_sms": case["ctas"][1]} | case["schedule"]
        out, _ = self.run(spec_of_case(case), case["inputs"], **options)
        assert out.dtype is case.get("out_dtype", out.dtype)

    def run_case_on_the_gpu(self, case: dict) -> None:
        """The same with 11 times as many tokens."""
        given = make_inputs(spec_of_case(case, scale=11), case["inputs"], device="cuda")
        options = self._taken(given, self._choices(case))
        compare(given, *given.run(return_lse=True, family=self.kernel.family, **options))

    def check_with(self, config: KernelConfig, given: Inputs, **simulation: Any) -> None:
        """A kernel of this config, whether or not the heuristic would choose it, compared with the reference."""
        call = given.call()
        problem = problem_of(self.arch, call)
        out = torch.full((*call.q.shape[:-1], call.v.shape[-1]), math.nan, dtype=TORCH_DTYPES[problem.out_dtype])
        lse = torch.full(call.lse_shape, math.nan)
        tensors = AttentionTensors(call.q, call.k, call.v, out, lse, call.extras)
        with cute_fa.simulate(self.arch.value, **simulation) as simulated:
            arguments = self.kernel.arguments(problem, config, tensors, simulated.sm_count)
            compiler.compiled(config).launch(arguments)
        compare(given, out, lse)

    @staticmethod
    def _choices(case: dict) -> dict[str, Any]:
        choices = {name: case[name] for name in ("pack_gqa", "out_dtype") if name in case}
        return choices | {"persistent": case["ctas"][0]}

    @staticmethod
    def _taken(given: Inputs, options: dict[str, Any]) -> dict[str, Any]:
        """The function for caches takes no persistent."""
        return {name: value for name, value in options.items() if name != "persistent" or not given.spec.is_cache}

    def visible_blocks(self, spec: InputSpec) -> list[list[int]]:
        """Key blocks that hold a key which a query of the tile sees, for each tile of queries."""
        config = self.config_of(spec)
        left, right = (bound if bound is not None else spec.seqlen_k + spec.seqlen_q for bound in spec.window)
        right = 0 if spec.causal else right
        query = torch.arange(spec.seqlen_q)[:, None] + spec.seqlen_k - spec.seqlen_q
        key = torch.arange(spec.seqlen_k)
        visible = (key <= query + right) & ((key >= query - left) | (key < spec.sink_tokens))
        tiles = [visible[start : start + config.tile_tokens] for start in range(0, spec.seqlen_q, config.tile_tokens)]
        return [sorted({key // config.tile_n for key in tile.any(0).nonzero()[:, 0].tolist()}) for tile in tiles]

    def loaded_blocks(self, spec: InputSpec, operand: str = "k") -> list[list[int]]:
        """Key blocks in the order in which each CTA loads them, one CTA a tile; a dense problem with one head."""
        with recorded_loads() as loads:
            self.run(spec, persistent="off")
        head_dim = spec.head_dim if operand == "k" else spec.head_dim_v
        tile_n = self.config_of(spec).tile_n
        blocks = {}
        for load in loads:
            if load.extents[:2] == (head_dim, spec.seqlen_k):
                blocks.setdefault(load.cta, []).append(load.start[1] // tile_n)
        return [blocks[cta] for cta in sorted(blocks)]


def compare(given: Inputs, out: torch.Tensor, lse: torch.Tensor) -> None:
    """With the reference, within the tolerance of the output's dtype."""
    result = expected(given.q, given.k, given.v, out_dtype=out.dtype, **given.options()).check(out, lse)
    assert result.ok, result

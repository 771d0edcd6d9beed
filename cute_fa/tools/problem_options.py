"""The command line's options that describe one problem: sizes written out here, features as their declarations in
``AttentionProblem`` and ``AppendProblem`` have them."""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass, fields
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any

import click

from cute_fa.api.attention import chunk_keys
from cute_fa.engine.range_plans import walk_configs
from cute_fa.engine.table import FAMILIES, TABLE
from cute_fa.semantics.append_problem import AppendProblem
from cute_fa.semantics.errors import ArgumentError, LengthError
from cute_fa.semantics.options import options_of
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.tensors import TORCH_DTYPES
from cute_fa.semantics.types import Direction, DType, PersistentMode, SmArch
from cute_fa.tools.inputs import InputSpec
from cute_fa.tools.trial import Machine, choose_machine, problem_of_spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from cute_fa.engine.contract import AttentionKernel, KernelConfig

_SIMULATION = ("schedule_seed", "late", "race", "num_sms", "fp8_bits", "arithmetic")


def _feature_options(problem: type) -> list[Callable]:
    """An option for each declared feature that has a help text."""
    hints = typing.get_type_hints(problem)
    defaults = {field.name: field.default for field in fields(problem)}
    options = []
    for name, of in options_of(problem).items():
        if of.help:
            options.append(_feature_option(of.cli or name, hints[name], defaults[name], of.help))
    return options


def _feature_option(name: str, hint: Any, default: Any, text: str) -> Callable:
    dashed = name.replace("_", "-")
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if kinds == (bool,):
        return click.option(f"--{dashed}", name, is_flag=True, help=text)
    if bool in kinds:
        return click.option(f"--{dashed}/--no-{dashed}", name, default=default, help=text)
    if issubclass(kinds[0], Enum):
        choices = click.Choice([member.value for member in kinds[0]])
        value = default and default.value
        return click.option(f"--{dashed}", name, type=choices, default=value, show_default=True, help=text)
    return click.option(f"--{dashed}", name, type=kinds[0], default=default, help=text)


PROBLEM_OPTIONS = [
    click.option("--arch", type=click.Choice([arch.value for arch in SmArch]), help="[default: the GPU's, else sm_80]"),
    click.option("--dtype", type=click.Choice([d.value for d in DType]), default="bf16", show_default=True),
    click.option("--batch", type=int, default=1, show_default=True),
    click.option("--seqlen-q", type=int, default=256, show_default=True),
    click.option("--seqlen-k", type=int, help="[default: seqlen-q]"),
    click.option("--heads", type=int, default=4, show_default=True),
    click.option("--heads-kv", type=int, help="[default: heads]"),
    click.option("--head-dim", type=int, default=128, show_default=True),
    click.option("--head-dim-v", type=int, help="[default: head-dim]"),
    click.option("--causal", is_flag=True),
    click.option("--window", type=int, nargs=2, metavar="L R", help="Keys visible to the left and right; -1: all."),
    *_feature_options(AttentionProblem),
    click.option("--ranges", type=int, default=0, help="What queries see is a plan of so many ranges, from the seed."),
    click.option("--positions", is_flag=True, help="ALiBi's distances under a range plan are between positions."),
    click.option("--family", type=click.Choice(FAMILIES), help="Kernels of that family alone."),
    click.option("--backward", is_flag=True, help="Also the gradients, for random ones of the output."),
    click.option("--append", is_flag=True, help="Not attention: seqlen-q new tokens into a cache of seqlen-k."),
    *_feature_options(AppendProblem),
]
_OF_AN_APPEND = {of.cli or name for name, of in options_of(AppendProblem).items() if of.help}
_OF_ATTENTION = {of.cli or name for name, of in options_of(AttentionProblem).items() if of.help} | {"causal", "window"}
_OF_ATTENTION |= {"ranges", "positions"}
_OF_BOTH = {"page_size", "cache_batch_idx", "varlen", "seqused_q", "seqused_k", "dtype_k", "dtype_v"}


@dataclass(frozen=True)
class ProblemOptions:
    """Options as given, by name. ``None`` lengths and heads follow their counterpart."""

    given: dict[str, Any]

    def __post_init__(self):
        alone = _OF_ATTENTION - _OF_BOTH if self.append else _OF_AN_APPEND
        for name in sorted(self._chosen() & alone):
            asked = "an append does not have it" if self.append else "only --append has it"
            raise ArgumentError(f"--{name.replace('_', '-')}: {asked}")
        if self.append and self["backward"]:
            raise ArgumentError("--append with --backward: an append has no gradient")
        if self.append and self["seqused_q"] and not self["query"]:
            raise ArgumentError("--seqused-q: an append without --query has none")
        if self.append and self["query"] and not self["rotary_dim"]:
            raise ArgumentError("--query without --rotary-dim: nothing rotates")

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def _chosen(self) -> set[str]:
        """Options that are not at their defaults."""
        return {name for name, default in _defaults().items() if name in self.given and self.given[name] != default}

    @property
    def append(self) -> bool:
        return self["append"]

    @property
    def machine(self) -> Machine:
        simulation = {name: self.given[name] for name in _SIMULATION if name in self.given}
        return choose_machine(SmArch(self["arch"]) if self["arch"] else None, **simulation)

    @property
    def spec(self) -> InputSpec:
        """Of attention."""
        alike = {field.name for field in fields(InputSpec)} & self.given.keys()
        described = {name: self.given[name] for name in alike}
        described |= {
            **{name: self[name] and DType(self[name]) for name in ("dtype", "dtype_k", "dtype_v")},
            "window": self["window"] or (None, None),
            "sink_tokens": self["sink"],
        }
        described |= {"varlen_q": self["varlen"], "varlen_k": self["varlen"] and self["page_size"] is None}
        return InputSpec(**described | self._sizes)

    @property
    def _sizes(self) -> dict[str, int]:
        given = self.given
        return {
            "seqlen_k": given["seqlen_q"] if given["seqlen_k"] is None else given["seqlen_k"],
            "heads_kv": given["heads"] if given["heads_kv"] is None else given["heads_kv"],
        }

    @property
    def choices(self) -> dict[str, Any]:
        """How to compute the forward, in the public functions' terms; only what is no default."""
        names = ("pack_gqa", "num_splits", "seqlen_k_per_split", "family", "promote_every")
        chosen = {name: self[name] for name in names}
        chosen["persistent"] = PersistentMode(self["persistent"])
        chosen["out_dtype"] = self["out_dtype"] and TORCH_DTYPES[DType(self["out_dtype"])]
        nothing = {"pack_gqa": None, "num_splits": 1, "family": None, "persistent": PersistentMode.AUTO}
        nothing |= {"out_dtype": None, "promote_every": None, "seqlen_k_per_split": 0}
        return {name: value for name, value in chosen.items() if value != nothing[name]}

    @property
    def forward_problem(self) -> AttentionProblem:
        """Its number of splits is 1 where the table is to choose."""
        if not self["backward"] and self["deterministic"]:
            raise ArgumentError("--deterministic without --backward: the forward is deterministic anyway")
        if not self["backward"] and self["lse_gradient"]:
            raise ArgumentError("--lse-gradient without --backward: a forward takes no gradient")
        if self.spec.is_cache and PersistentMode(self["persistent"]) is not PersistentMode.AUTO:
            raise ArgumentError(
                "--persistent with --cache-batch-idx or --cache-leftpad: the function for caches takes none"
            )
        choices = {name: value for name, value in self.choices.items() if name != "family"}
        choices["num_splits"] = self["num_splits"] or 1
        choices["seqlen_k_per_split"] = chunk_keys(None, choices.get("seqlen_k_per_split"))
        choices["out_dtype"] = self["out_dtype"] and DType(self["out_dtype"])
        return problem_of_spec(self.spec, self.machine.arch, **choices)

    @property
    def backward_problem(self) -> AttentionProblem:
        return problem_of_spec(
            self.spec,
            self.machine.arch,
            direction=Direction.BACKWARD,
            deterministic=self["deterministic"],
            lse_gradient=self["lse_gradient"],
            slopes_gradient=self["alibi"],
        )

    @property
    def capacity(self) -> int:
        """Of an append: tokens that a sequence of the cache has room for."""
        if self["seqlen_k"] is None:
            return 2 * self["seqlen_q"]
        if self["seqlen_k"] < self["seqlen_q"]:
            raise LengthError(f"seqlen-k={self['seqlen_k']}: a cache with room for {self['seqlen_q']} tokens is needed")
        return self["seqlen_k"]

    @property
    def append_problem(self) -> AppendProblem:
        alike = {field.name for field in fields(AppendProblem)} & self.given.keys()
        described = {name: self.given[name] for name in alike} | {"dtype": DType(self["dtype"])}
        described |= {name: DType(self[name]) for name in ("dtype_k", "dtype_v") if self[name] is not None}
        described["arch"] = self.machine.arch
        described["head_dim_v"] = self["head_dim"] if self["head_dim_v"] is None else self["head_dim_v"]
        described |= {"tokens_k": self["seqlen_q"], "num_heads_kv": self._sizes["heads_kv"]}
        described |= {"packed_k": self["varlen"], "used_k": self["seqused_k"]}
        if self["query"]:
            described |= {"tokens_q": self["seqlen_q"], "num_heads": self["heads"]}
            described |= {"packed_q": self["varlen"], "used_q": self["seqused_q"]}
        return AppendProblem(**described)

    def compiled(self) -> tuple[AttentionProblem | AppendProblem, type[AttentionKernel]]:
        """The problem whose kernel is to be compiled, and that kernel."""
        if self.append:
            return self.append_problem, TABLE.lookup(self.append_problem, self["family"])
        if self["backward"]:
            others = self.choices.keys() - {"family"}
            if others:
                names = " or ".join(f"--{name.replace('_', '-')}" for name in sorted(others))
                raise ArgumentError(f"{names} of a backward: how a forward is computed")
            return self.backward_problem, TABLE.lookup(self.backward_problem, self["family"])
        return self.forward()

    def configs(self) -> list[KernelConfig]:
        """Of all kernels that are to be compiled: the problem's, then those that make its walks."""
        problem, kernel = self.compiled()
        config = kernel.configure(problem)
        return [config, *walk_configs(problem, config)]

    def forward(self) -> tuple[AttentionProblem, type[AttentionKernel]]:
        """The forward's problem and kernel."""
        problem, machine = self.forward_problem, self.machine
        return TABLE.choose(problem, self["family"], machine.sms, self["num_splits"])


@cache
def _defaults() -> dict[str, Any]:
    """The defaults of all options, by name."""

    @click.command()
    @with_options(PROBLEM_OPTIONS)
    def command(**given: Any) -> dict[str, Any]:
        return given

    return command.main([], standalone_mode=False)


def with_options(*groups: list) -> Callable:
    """A decorator that gives a command these options, in their order."""

    def add(command: Callable) -> Callable:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return add

"""What is declared of a feature, beside its type and default, in the metadata of its field of a problem.

``AttentionProblem`` is where features are declared. From it follow the flags of the kernels' configs, the key that the
dispatch table is asked by, the tokens of the names, the fake tensors that kernels are compiled with, the command line's
options and the rows of the support table.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cute_fa.semantics.types import Direction


@dataclass(frozen=True)
class TensorOption:
    """The tensor of ``cute_fa.semantics.call.Extras`` whose presence says that a feature is used, as kernels take it:
    its dtype and number of dimensions; ``strided``: its last dimension may have any stride; ``wider``: the flag with
    which it has one dimension more, contiguous; ``cache_like``: that with which it has two more; ``packed``:
    that with which it has one fewer, rows of all sequences."""

    name: str
    dtype: str = "int32"
    dimensions: int = 1
    strided: bool = False
    wider: str = ""
    cache_like: str = ""
    packed: str = ""


@dataclass(frozen=True)
class Option:
    """One feature.

    tensor: how a caller gives it, where that is a tensor.
    flag: the field of ``FeatureConfig`` that says whether machine code has the feature; empty for what is a number at
        run time alone. ``needs``: another field without which it has no effect. ``flag_value``: machine code depends on
        the value itself.
    flag_token, token: what stands for it in compile names and, followed by its value, in canonical names.
    key: its field of ``DispatchKey``.
    direction: the only one that a kernel's choice or a gradient is of; None for what all share.
    help: of the command line's option; without it there is none. ``cli``: its name there, the field's by default.
    rows: the support table's rows about it: the fields of a problem, by the row's name.
    """

    tensor: TensorOption | None = None
    flag: str = ""
    needs: str = ""
    flag_value: bool = False
    flag_token: str = ""
    token: str = ""
    key: str = ""
    direction: Direction | None = None
    help: str = ""
    cli: str = ""
    rows: tuple[tuple[str, dict[str, Any]], ...] = ()


def declares(*, rows: dict[str, dict[str, Any]] | None = None, **declared: Any) -> dict[str, Option]:
    """The metadata of a dataclass field: an :class:`Option`."""
    return {"option": Option(**declared, rows=tuple((rows or {}).items()))}


def option(default: Any, **declared: Any) -> Any:
    """A dataclass field with this default and what :func:`declares` makes of the rest."""
    return dataclasses.field(default=default, metadata=declares(**declared))


def options_of(problem: Any) -> dict[str, Option]:
    """The declared features of a problem, or of its class, by field, in their order."""
    declared = ((field.name, field.metadata.get("option")) for field in dataclasses.fields(problem))
    return {name: option for name, option in declared if option is not None}


def is_used(problem: Any, name: str) -> bool:
    """Whether the problem uses the feature of a field: its value is not the default, and what it needs is used."""
    field = problem.__dataclass_fields__[name]
    needs = field.metadata["option"].needs
    return getattr(problem, name) != field.default and (not needs or is_used(problem, needs))


def flags_of(problem: Any) -> dict[str, Any]:
    """The flags of a config for a problem, by name: whether a feature is used, or its value."""
    return {
        option.flag: getattr(problem, name) if option.flag_value else is_used(problem, name)
        for name, option in options_of(problem).items()
        if option.flag
    }


def flag_tokens(config: Any, problem: type) -> list[str]:
    """The tokens of a compile name: of each flag of a config that is set, as the class of its problem declares it."""
    values = [(of, getattr(config, of.flag)) for of in options_of(problem).values() if of.flag]
    named = [(of, value) for of, value in values if value and (of.flag_token or isinstance(value, str))]
    return [of.flag_token + (str(value) if of.flag_value else "") for of, value in named]


def rows_of(problem: Any) -> dict[str, dict[str, Any]]:
    """The support table's rows about a problem, or its class: changes of its fields, by the row's name."""
    return {row: changes for of in options_of(problem).values() for row, changes in of.rows}

"""What a caller calls the arguments of an operator, so that messages name what the caller wrote.

Several public functions end in one operator: ``flash_attn_with_kvcache`` hands ``k_cache`` on as ``k``. The names go
with the arguments, as text since no schema takes a dictionary, so that compiled code and a backward have them too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

Value = TypeVar("Value")


class ArgumentNames(dict[str, str]):
    """From an operator's name of an argument to the caller's; what is not listed is called alike by both."""

    def __missing__(self, name: str) -> str:
        return name

    def of(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """The same values under the caller's names."""
        return {self[name]: value for name, value in values.items()}


def spelled(**names: str) -> str:
    """The text that stands for these names; ``""`` for none."""
    return ",".join(f"{ours}={theirs}" for ours, theirs in names.items())


def names_of(text: str) -> ArgumentNames:
    """The names that a text of :func:`spelled` stands for."""
    return ArgumentNames(pair.split("=") for pair in text.split(",")) if text else ArgumentNames()

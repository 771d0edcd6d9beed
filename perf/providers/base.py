"""What a provider of attention is to the sweep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cute_fa.tools.inputs import Inputs


class Unavailable(Exception):
    """Why a provider cannot run at all, or not this problem."""


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class Layout(NamedTuple):
    """How a provider wants tensors that have ours, (batch, seqlen, heads, head_dim) or (total, heads, head_dim), and
    the way back. Views, but where a provider's kernels need memory in another order."""

    adapt: Callable[[torch.Tensor], torch.Tensor] = _same
    restore: Callable[[torch.Tensor], torch.Tensor] = _same


OURS = Layout()
HEADS_FIRST = Layout(lambda tensor: tensor.transpose(1, 2), lambda tensor: tensor.transpose(1, 2))


@dataclass(frozen=True)
class Attention:
    """A provider's attention for inputs of one shape and one set of lengths.

    ``forward``: (q, k, v) → out, all in the provider's ``layout``; differentiable where it has a backward. ``build``:
    makes anew, on the device, what calls over the same ranges share.
    """

    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    layout: Layout = OURS
    build: Callable[[], object] | None = None


class Provider(ABC):
    """One implementation of attention. ``takes_ranges``: whether what is visible may be a range plan's;
    ``takes_codes``: whether k and v may be fp8 beside q of 16 bits."""

    name: str
    takes_ranges = False
    takes_codes = False

    @abstractmethod
    def version(self) -> str:
        """Of what is installed; raises Unavailable if it is not."""

    @abstractmethod
    def prepare(self, inputs: Inputs) -> Attention:
        """Attention over tensors like those of ``inputs``, with their lengths, pages and options.

        Raises Unavailable for what the provider does not do. What it refuses by itself it may raise when it is called.
        """

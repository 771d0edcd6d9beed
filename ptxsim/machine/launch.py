"""What all waves of a launch have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..frontend.program import Program
from .global_memory import Ranges
from .tensor_sums import TensorSums


@dataclass(frozen=True)
class LaunchConfig:
    """A kernel with its geometry and arguments, and how it is to be simulated.

    ``grid``, ``block`` and ``cluster`` are dim3 tuples (CTAs, threads, CTAs), ``smem`` bytes of dynamic shared memory,
    ``params`` the bytes of the parameters (uint8, 64-byte aligned), ``ranges`` the legal global memory,
    ``global_addresses`` those of the module's variables. ``registers`` are those of a thread, as the cubin says (None:
    not known); ``resizes``: whether its machine code has kept setmaxnreg. ``seed`` makes the order of the warps random
    and adversarial; ``late`` performs asynchronous operations as late as is legal; ``fp8_bits`` is what wgmma keeps of
    sums of fp8 products (``accumulate``); ``tensor_sums`` adds the products of all tensor instructions (None: in
    float32).
    """

    program: Program
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    smem: int
    params: np.ndarray
    ranges: Ranges
    global_addresses: dict[str, int] = field(default_factory=dict)
    registers: int | None = None
    resizes: bool = True
    seed: int | None = None
    late: bool = False
    fp8_bits: int | None = None
    tensor_sums: TensorSums | None = None

"""Plans: what is known of every call with one description, found once.

A call is described by the operator, the tensors' shapes, strides, dtypes and devices, and the options. Validation,
dispatch, configuration and compilation depend on nothing else. One cache holds the plans of all operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter, methodcaller
from typing import TYPE_CHECKING, Any

import torch

from cute_fa.engine.compiler import compiled
from cute_fa.semantics.tensors import ALIGNMENT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cute_fa.engine.compiler import CompiledKernel
    from cute_fa.engine.contract import AttentionKernel, KernelConfig, Memory
    from cute_fa.engine.worlds import Target
    from cute_fa.semantics.argument_names import ArgumentNames

# A description that changes at every call (decoding, packed batches) must not fill the memory.
_MAX_PLANS = 4096
PLANS: dict[tuple, Any] = {}
# What is told of each config that is about to be launched for the first time; see cute_fa.engine.recording.
recorder: Callable[[KernelConfig], None] | None = None


def plan_of(key: tuple, make: Callable[..., Any], *arguments: Any) -> Any:
    """The plan of a description, made of these arguments where it is new; too many are forgotten together."""
    plan = PLANS.get(key)
    if plan is None:
        plan = make(*arguments)
        if len(PLANS) >= _MAX_PLANS:
            PLANS.clear()
        PLANS[key] = plan
    return plan


@dataclass(kw_only=True)
class Plan:
    """``kind``: the NamedTuple of the tensors that the kernel is launched with; ``problem``: of the direction's kind;
    ``names``: what the caller calls the arguments; ``launches``: whether there is anything to compute. ``compiled``,
    ``pack``, which gives the kernel's arguments, and ``new_scratch``, which allocates its scratch memory, None if it
    has none, are set by the first launch, after all checks."""

    kind: Any
    problem: Any
    names: ArgumentNames
    kernel: type[AttentionKernel]
    target: Target
    launches: bool
    config: KernelConfig | None = None
    compiled: CompiledKernel | None = None
    pack: Callable[..., tuple] | None = None
    new_scratch: Callable[[tuple], tuple] | None = None

    def launch(self, tensors: tuple) -> None:
        """Run the kernel with the items of ``kind``, without its scratch memory."""
        if self.compiled is None:
            self._prepare(tensors)
        if self.new_scratch is not None:
            tensors += (self.new_scratch(tensors),)
        self.compiled.launch(self.pack(tensors))

    def _prepare(self, tensors: tuple) -> None:
        self.config = self.kernel.configure(self.problem)
        if recorder is not None:
            recorder(self.config)
        self.new_scratch = allocation(self._scratch(tensors), tensors)
        if self.new_scratch is not None:
            tensors += (self.new_scratch(tensors),)
        self.pack = packing(self._arguments, tensors)
        self.compiled = compiled(self.config)

    def _scratch(self, tensors: tuple) -> tuple[Memory | None, ...]:
        return self.kernel.scratch(self.problem, self.config, self.kind(*tensors), self.target.num_sms)

    def _arguments(self, tensors: tuple) -> tuple:
        return self.kernel.arguments(self.problem, self.config, self.kind(*tensors), self.target.num_sms)


def allocation(parts: Sequence[Memory | None], tensors: tuple) -> Callable[[tuple], tuple] | None:
    """A function of tensors like these that allocates the parts where they lie; None if there are no parts."""
    if not any(parts):
        return None
    place = next(i for i, value in enumerate(tensors) if isinstance(value, torch.Tensor))
    new = [None if part is None else new_like(part.shape, part.dtype) for part in parts]

    def allocate(tensors: tuple) -> tuple:
        like = tensors[place]
        return tuple([None if make is None else make(like) for make in new])

    return allocate


def packing(arguments: Callable[[tuple], tuple], tensors: tuple) -> Callable[[tuple], tuple]:
    """``arguments`` for tensors of this description. All but the tensors are the same in every call, so it is asked
    once and only the tensors are put in their places; at every call where it makes tensors itself."""
    # Objects of their own: one tensor may be q, k and v at once.
    own = _detached(tensors)
    return packer(arguments(own), own) or arguments


def _detached(value: Any) -> Any:
    if isinstance(value, tuple):
        items = [_detached(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value.detach() if isinstance(value, torch.Tensor) else value


def packer(arguments: tuple, tensors: tuple) -> Callable[[tuple], tuple] | None:
    """A function of a tuple like ``tensors`` that gives ``arguments`` with its tensors in the places of these; None if
    there are tensors of another origin.

    What it picks from is a pool: the tensors, then the items of each tuple in the pool that holds tensors, then the
    constants, then each tuple with tensors inside as soon as it is made."""
    flat = list(tensors)
    nested = []  # places of the tuples whose items follow
    for i, value in enumerate(flat):  # which grows meanwhile
        if isinstance(value, tuple) and _holds_tensors(value):
            nested.append(i)
            flat += value
    places = {id(tensor): i for i, tensor in enumerate(flat) if isinstance(tensor, torch.Tensor)}
    constants: list[Any] = []
    made: list[list[tuple[str, int]]] = []  # for each tuple with tensors, inner ones first: where its items lie

    def place(value: Any) -> tuple[str, int]:
        if isinstance(value, torch.Tensor):
            return "tensor", places[id(value)]
        if isinstance(value, tuple) and _holds_tensors(value):
            made.append([place(item) for item in value])
            return "made", len(made) - 1
        constants.append(value)
        return "constant", len(constants) - 1

    try:
        place(arguments)
    except KeyError:
        return None
    if not made:
        return lambda tensors: arguments
    first = {"tensor": 0, "constant": len(flat), "made": len(flat) + len(constants)}
    *inner, whole = [_picker([first[kind] + index for kind, index in items]) for items in made]
    fixed = tuple(constants)
    if made[-1][0] == ("made", len(inner) - 1) and not any(map(_holds_tensors, arguments[1:])):
        # All tensors stand in the first item, as those of attention do: no need to look the others up.
        common, others = arguments[0], arguments[1:]
        leading = sum(isinstance(item, torch.Tensor) for item in common)
        if made[0][:leading] == [("tensor", i) for i in range(leading)] and len(inner) == 1:
            tail = common[leading:]  # a dense call: 0.2 µs instead of 0.6
            return lambda tensors: (tensors[:leading] + tail, *others)
        *before, last = inner

        def pack_first(tensors: tuple) -> tuple:
            pool = tensors
            for i in nested:
                pool += pool[i]
            pool += fixed
            for pick in before:
                pool += (pick(pool),)
            return (last(pool), *others)

        return pack_first

    def pack(tensors: tuple) -> tuple:
        pool = tensors
        for i in nested:
            pool += pool[i]
        pool += fixed
        for pick in inner:
            pool += (pick(pool),)
        return whole(pool)

    return pack


def _picker(indices: Sequence[int]) -> Callable[[tuple], tuple]:
    if len(indices) == 1:
        (index,) = indices
        return lambda pool: (pool[index],)
    return itemgetter(*indices)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, tuple) and any(map(_holds_tensors, value)))


def signature(tensor: torch.Tensor | None) -> tuple | None:
    """What a plan knows of a tensor."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def signatures(tensors: Sequence[torch.Tensor | None]) -> tuple:
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors])


def new_like(shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that allocates a contiguous tensor on its argument's device. With its strides at hand that takes two
    thirds of the time."""
    strides = torch.empty(shape, dtype=dtype, device="meta").stride()
    return methodcaller("new_empty_strided", shape, strides, dtype=dtype)


def new_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """:func:`new_like`, of zeros."""
    return methodcaller("new_zeros", shape, dtype=dtype)


def odd_strides(tensor: torch.Tensor | None, contiguous: int = -1) -> tuple[int, ...] | None:
    """Strides to use instead: those of dimensions of size 1 mean nothing, but kernels ask for multiples of 16 bytes,
    and for 1 in the ``contiguous`` dimension."""
    if tensor is None:
        return None
    step = ALIGNMENT // tensor.element_size()
    outer = list(tensor.stride())
    inner = outer.pop(contiguous)
    sizes = list(tensor.shape)
    sizes.pop(contiguous)
    canonical = [0 if size == 1 else stride for size, stride in zip(sizes, outer, strict=True)]
    canonical.insert(len(outer) if contiguous == -1 else contiguous, 1)
    return tuple(canonical) if inner != 1 or any(stride % step for stride in outer) else None


def restrided(tensor: torch.Tensor, strides: tuple[int, ...] | None) -> torch.Tensor:
    """The same elements with other strides, the tensor itself for None."""
    return tensor if strides is None else tensor.as_strided(tensor.shape, strides)

"""Everything that can be wrong with a call: one base class, one subclass per cause.

Every message holds the offending value and the rule it breaks. All of them are raised before a kernel is launched.
"""

from __future__ import annotations

import copyreg
from typing import Any


class CuteFaError(ValueError, RuntimeError):
    """Base of all errors that cute_fa raises about its input. Also a RuntimeError, which is what the extensions of
    FlashAttention 2 and 3 raise and their callers catch. Fields are plain values, of tensors and functions their
    description: what raises in a worker process must arrive in its parent."""

    def __reduce__(self) -> tuple:
        """For pickle and copy. Exception's own calls the class with the message, which is not what ``__init__`` of some
        takes; a pool of processes then breaks or hangs."""
        new = copyreg.__newobj__  # type: ignore[attr-defined]  # typeshed leaves it out
        return new, (type(self), *self.args), self.__dict__


class ArgumentError(CuteFaError):
    """An argument of the wrong kind, or a value outside its range."""


class UnsupportedArgumentError(CuteFaError):
    """An argument that a peer knows and cute_fa does not implement, given a value other than its default."""

    def __init__(self, name: str, value: Any):
        super().__init__(f"{name}={_short(value)} is not implemented: leave it at its default")
        self.name = name


class ShapeError(CuteFaError):
    """A tensor whose shape does not fit the others or the layout."""


class StrideError(CuteFaError):
    """A tensor whose strides no kernel can load: last dimension not contiguous, or a stride not 16-byte aligned."""

    def __init__(self, name: str, strides: tuple[int, ...], rule: str):
        super().__init__(f"{name} has strides {tuple(strides)} (elements): {rule}")


class AlignmentError(CuteFaError):
    """A tensor whose first element is not at a multiple of 16 bytes."""

    def __init__(self, name: str, pointer: int, required: int):
        super().__init__(f"{name} starts at address {pointer:#x}: the address must be a multiple of {required} bytes")


class DTypeError(CuteFaError):
    """A tensor of the wrong element type."""

    def __init__(self, name: str, dtype: Any, rule: str):
        super().__init__(f"{name} is {str(dtype).removeprefix('torch.')}: {rule}")


class Fp8Error(CuteFaError):
    """fp8 input where no kernel offers it."""


class DeviceError(CuteFaError):
    """Tensors of one call that lie on different devices, or on one that cute_fa does not know."""


class NoDeviceError(CuteFaError):
    """CPU tensors without a simulator chosen, or a GPU needed where there is none."""


class BundleError(CuteFaError):
    """A bundle of compiled kernels that cannot be used: damaged, of another version, for a newer driver."""


class CompilerMissingError(CuteFaError):
    """A kernel that has to be compiled where nvidia-cutlass-dsl is not installed."""

    def __init__(self, kernel: str, looked_into: str):
        super().__init__(
            f"{kernel}: {looked_into}; and nvidia-cutlass-dsl, which compiles kernels and loads them from the disk "
            "cache, is not installed. Install it, or bundle the kernel: python -m cute_fa bundle"
        )
        self.kernel = kernel


class MockModeError(NoDeviceError):
    """A service begun where there is neither a GPU nor a simulation: ``cute_fa.service.mock()`` is for tests there."""


class QueueFullError(CuteFaError):
    """A service that has as many requests waiting as it may."""


class ServiceClosedError(CuteFaError):
    """A request to a service that takes no more."""


class WindowError(CuteFaError):
    """A window bound that is neither a size nor infinite (−1 or None)."""


class EmptyBatchError(CuteFaError):
    """A batch of 0 sequences."""


class ZeroLengthError(CuteFaError):
    """A length of 0 where it has no meaning: a max_seqlen, or a chunk's tokens."""


class LengthError(CuteFaError):
    """seqused or max_seqlen that does not fit the tensors."""


class CumulativeSeqlensError(CuteFaError):
    """Cumulative sequence lengths that overflow int32, decrease, do not start at 0 or exceed the tensor."""


class RangeError(CuteFaError):
    """A range of a plan that is reversed, leaves its tensor or has a type that there is not; offsets of key segments
    that name others than those given; a plan that cannot take the path asked for."""


class ChunkIndexError(CuteFaError):
    """A chunk that no sequence reaches."""


class PageSizeError(CuteFaError):
    """A page size that no kernel knows."""


class EmptyCacheError(CuteFaError):
    """A paged cache without pages, or a page table without columns."""


class PagedHeadDimError(CuteFaError):
    """A paged cache whose head_dim is not the query's."""


class PageTableError(CuteFaError):
    """A page number outside the cache."""


class CacheIndexError(CuteFaError):
    """An index of a sequence outside the cache."""


class Fa3ArchError(CuteFaError):
    """FA3 kernels asked for on an architecture without WGMMA."""


class UnsupportedKeyError(CuteFaError):
    """No kernel serves the dispatch key; ``reasons`` maps each candidate to why it does not."""

    def __init__(self, key: Any, reasons: dict[str, list[str]]):
        lines = [f"  {name}: {'; '.join(why)}" for name, why in reasons.items()]
        super().__init__("\n".join([f"no kernel serves {key}", *(lines or ["  no kernel exists for this request"])]))
        self.key = key
        self.reasons = reasons


class NoBackwardError(CuteFaError):
    """A derivative that nothing computes: of the gradients themselves, in forward mode, or by a transform of
    torch.func."""


def _short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"tensor of shape {tuple(shape)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

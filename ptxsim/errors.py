"""Errors of the simulator: one base class, one subclass per cause.

Every error names the PTX line (number and text) of the instruction, and, once warps run, the CTA and the warps that
executed it. Code deep in the simulator raises with a message only; ``located`` adds the rest on the way out.
"""

from __future__ import annotations

import copyreg

from .names import readable


class SimError(Exception):
    """Base class of everything that the simulator raises about a kernel.

    ``message`` says what is wrong; ``line`` (1-based) and ``text`` name the PTX instruction; ``where`` names the CTA
    and the warps; ``kernel`` is the full name of the kernel, of which the text shows the readable part. The last four
    are None where they have no meaning. ``account`` (``report.account.Account``; of a Deadlock that no
    ``History`` has seen, lines of text) tells which roles are where and what they did last; it is None for what no
    running kernel raised.
    """

    def __init__(self, message: str, *, line: int | None = None, text: str | None = None, where: str | None = None):
        super().__init__(message)
        self.message, self.line, self.text, self.where = message, line, text, where
        self.kernel = self.account = None

    def __reduce__(self) -> tuple:
        """For pickle and copy: the text and the fields, whatever ``__init__`` takes."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__

    def located(self, line: int | None = None, text: str | None = None, where: str | None = None) -> SimError:
        """Fill in what the raiser did not know, and return the error."""
        if self.line is None:
            self.line, self.text = line, text
        if self.where is None:
            self.where = where
        return self

    def __str__(self) -> str:
        parts = [self.message if self.kernel is None else f"{readable(self.kernel)}: {self.message}"]
        if self.line:
            parts.append(f"at PTX line {self.line}: {self.text}")
        if self.where:
            parts.append(f"by {self.where}")
        if self.account:
            parts += str(self.account).split("\n")
        return "\n    ".join(parts)


class PtxError(SimError):
    """PTX that the simulator does not know or does not simulate: instruction, modifier, operand, descriptor mode."""


class Deadlock(SimError):
    """No warp can run: every live warp waits for something that will not happen."""


class MemoryFault(SimError):
    """An access outside legal memory, or misaligned."""


class SyncError(SimError):
    """Synchronisation used wrongly: uninitialised barriers, too many arrivals, data used while a copy is in flight."""


class RaceError(SimError):
    """Two accesses to the same bytes, one of them a write, without an order between them.

    ``other`` names the earlier access: (PTX line, its text, who did it).
    """

    def __init__(self, message: str, *, other: tuple[int, str, str] | None = None, **where):
        super().__init__(message, **where)
        self.other = other


class ProxyError(RaceError):
    """An access through one proxy of bytes written through another, without a proxy fence between; ``other`` is the
    write."""


class BarrierInitError(RaceError):
    """Use of an mbarrier without its initialisation being visible to the user; ``other`` is the initialisation."""


class WgmmaError(RaceError):
    """Registers of a wgmma touched without wgmma.fence before it or wgmma.wait_group after it; ``other`` is the
    other instruction."""


class TensorFenceError(RaceError):
    """An access to tensor memory that synchronisation orders, but without the tcgen05.fence::before_thread_sync or
    ::after_thread_sync around it; ``other`` is the earlier access."""


class UninitializedRead(SimError):
    """A read of shared memory that nothing has written."""


class Trap(SimError):
    """The kernel executed ``trap``."""

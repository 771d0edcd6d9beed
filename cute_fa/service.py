"""Attention as a service: requests go in from any thread, a worker of the service runs them, futures hold the results.

An actor with a reply, in Python's own terms: :class:`AttentionService` is used like an executor of
``concurrent.futures``, and its futures can be awaited too. :func:`mock` is for tests of what calls it.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
from collections import OrderedDict
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from cute_fa.api.cache_requests import ChunkedPrefillRequest
from cute_fa.api.requests import Fa2BwdRequest, ForwardRequest
from cute_fa.engine import worlds
from cute_fa.semantics.errors import (
    ArgumentError,
    DeviceError,
    MockModeError,
    QueueFullError,
    ServiceClosedError,
)
from cute_fa.semantics.types import SmArch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

__all__ = ["AttentionFuture", "AttentionService", "MockModeError", "MockService", "mock"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
_KINDS = (ForwardRequest, Fa2BwdRequest, ChunkedPrefillRequest)


class Runnable(Protocol[T_co]):
    """What all requests share."""

    def run(self) -> T_co: ...


class AttentionFuture(Future[T]):
    """The result of a request to come: a ``concurrent.futures.Future`` that coroutines of any event loop can await.

    Cancelling a coroutine that awaits it cancels the request if it has not begun. An error is the very exception that
    the request raised.
    """

    def result(self, timeout: float | None = None) -> T:
        """The result, as of ``Future``: complete, and safe to use on the current stream. A stream that it goes to from
        there is told to torch by ``Tensor.record_stream``, as always."""
        result = super().result(timeout)
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                # Its memory is the service's stream's: freed, it must not be used anew before the caller's work ends.
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return result

    def __await__(self) -> Generator[Any, None, T]:
        # Not asyncio.wrap_future: it makes other objects of some exceptions, and never ends for a StopIteration.
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def wake(_: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop is closed, and who waited there is gone
                loop.call_soon_threadsafe(done.set)

        self.add_done_callback(wake)
        try:
            yield from done.wait().__await__()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if self.cancelled():
            raise asyncio.CancelledError
        return self.result()


class AttentionService:
    """Runs requests one at a time, in the order of :meth:`submit`, in a thread and on a CUDA stream of its own.

    A request waits for what the submitting thread's current stream had been given before. Its future is done when the
    GPU is done with it: who awaits it blocks neither a thread nor an event loop on the GPU, and the queue's bound and
    cancellation hold for work that the GPU has not begun. Between two requests the GPU waits for the host; several
    services fill the gap. What a request reads must not be written before its future is done.

    Results have no autograd history, and the caller's autocast and grad modes do not reach the worker.

    device: a CUDA device, by default the current one, whose tensors requests must hold; inside ``cute_fa.simulate`` the
    CPU. max_pending: how many requests may wait. Raises MockModeError here, not at the first request, where there is
    neither a GPU nor a simulation: a server fails when it starts.

    ``close()``, or leaving a ``with`` block, serves what waits and ends the thread; so does the interpreter's exit.
    """

    device: torch.device | None  # None: any, of a mock

    def __init__(self, device: torch.device | str | int | None = None, *, max_pending: int = 256) -> None:
        self.device = _device(device)
        self._start(max_pending)

    def _start(self, max_pending: int) -> None:
        if isinstance(max_pending, bool) or not isinstance(max_pending, int) or max_pending < 1:
            raise ArgumentError(f"max_pending={max_pending!r}: an int of at least 1 is needed")
        self.max_pending = max_pending
        self._process = os.getpid()
        on_gpu = self.device is not None and self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None
        self._pending: OrderedDict[Future[Any], tuple[Any, Any]] = OrderedDict()  # request, event of its stream
        self._closed = False
        self._changed = threading.Condition()  # of _pending or _closed
        # A daemon, since the interpreter joins other threads before it runs what is registered with atexit, which is
        # what ends this one.
        self._worker = threading.Thread(target=self._serve, name=type(self).__name__, daemon=True)
        self._worker.start()
        atexit.register(self.close)

    def submit(self, request: Runnable[T], *, block: bool = True, timeout: float | None = None) -> AttentionFuture[T]:
        """The future of a request's ``run()``. A full queue is waited for, at most ``timeout`` seconds; then, or at
        once without ``block``, QueueFullError. Raises ServiceClosedError after ``close()``, or in a process forked
        since, which has no worker; ArgumentError for what is no request, DeviceError for tensors elsewhere."""
        if os.getpid() != self._process:
            raise ServiceClosedError(f"the service runs in process {self._process}, which this one was forked from")
        self._check(request)
        ready = None if self._stream is None else torch.cuda.current_stream(self.device).record_event()
        future: AttentionFuture[T] = AttentionFuture()
        future.add_done_callback(self._forget)
        with self._changed:
            if block and threading.current_thread() is not self._worker:  # which would wait for itself
                self._changed.wait_for(lambda: self._closed or len(self._pending) < self.max_pending, timeout)
            if self._closed:
                raise ServiceClosedError("the service is closed")
            if len(self._pending) >= self.max_pending:
                raise QueueFullError(f"{len(self._pending)} requests are waiting, max_pending={self.max_pending}")
            self._pending[future] = request, ready
            self._changed.notify_all()
        return future

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests, serve those that wait (without ``drain`` cancel them), and end the thread. Returns
        when that is done, but at once where the worker itself calls it, in a future's callback."""
        if os.getpid() != self._process:  # the lock may have been held when it was forked
            return
        with self._changed:
            self._closed = True
            dropped = [] if drain else list(self._pending)
            self._changed.notify_all()
        for future in dropped:
            future.cancel()
        if threading.current_thread() is not self._worker:
            self._worker.join()
            atexit.unregister(self.close)

    def __enter__(self) -> AttentionService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, request: Any) -> None:
        if not isinstance(request, _KINDS):
            raise ArgumentError(f"request is {type(request).__name__}: one of cute_fa's requests is needed")
        device = (request.attention if isinstance(request, ChunkedPrefillRequest) else request).q.device
        if self.device is not None and device != self.device:
            raise DeviceError(f"the request's tensors are on {device}: the service's device is {self.device}")

    def _forget(self, future: Future[Any]) -> None:
        """Take a cancelled future's request out of the queue."""
        with self._changed:
            if self._pending.pop(future, None) is None:
                return
            self._changed.notify_all()
        future.set_running_or_notify_cancel()  # what wait() and as_completed() wait for

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closed)
                if not self._pending:
                    return
                future, (request, ready) = self._pending.popitem(last=False)
                self._changed.notify_all()
            if future.set_running_or_notify_cancel():
                self._answer(future, request, ready)
            del future, request, ready  # not to be kept until the next one comes

    def _answer(self, future: Future[Any], request: Any, ready: Any) -> None:
        try:
            try:
                result = self._run(request, ready)
            except BaseException as error:  # a SystemExit, too, is the answer to this request alone
                future.set_exception(error)
            else:
                future.set_result(result)
        except BaseException:  # set_result itself logs what is an Exception
            logging.getLogger(__name__).exception("a callback of %r raised", future)
        finally:
            del future  # the error's traceback holds this frame: no circle

    def _run(self, request: Any, ready: Any) -> Any:
        with torch.no_grad():
            if self._stream is None:
                return request.run()
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                try:
                    return request.run()
                finally:
                    # Also behind an error: until then kernels may read the request's tensors, which it alone may hold.
                    self._stream.record_event(torch.cuda.Event(blocking=True)).synchronize()


class MockService(AttentionService):
    """A service without kernels, as :func:`mock` makes it. ``requests``: those that were begun, in order."""

    def __init__(self, answer: Callable[[Any], Any], max_pending: int) -> None:
        self.device = None
        self.requests: list[Any] = []
        self._given = answer
        self._start(max_pending)

    def __enter__(self) -> MockService:
        return self

    def _run(self, request: Any, ready: Any) -> Any:
        self.requests.append(request)
        with torch.no_grad():
            return self._given(request)


@contextmanager
def mock(
    answer: Callable[[Any], Any] | None = None, *, arch: str | SmArch = SmArch.SM_90A, max_pending: int = 256
) -> Iterator[MockService]:
    """A service for tests of its callers, without GPU, simulator and compiler: ``with mock() as service:``.

    It is an AttentionService, whose results are ``answer(request)``, by default ``request.reference()``. Inside,
    requests can be made of CPU tensors, as if they were those of a GPU of ``arch``. Leaving it closes the service.
    """
    with worlds.assume(SmArch.named(arch)), MockService(answer or _reference, max_pending) as service:
        yield service


def _reference(request: Any) -> Any:
    return request.reference()


def _device(device: torch.device | str | int | None) -> torch.device:
    """The device that a service is for, with its index."""
    simulated = worlds.simulated_arch() is not None
    if not simulated and not torch.cuda.is_available():
        raise MockModeError(
            "neither a GPU nor a simulation: serve inside cute_fa.simulate(arch); tests of what calls the service take "
            "the one that cute_fa.service.mock() gives"
        )
    current = torch.device("cpu") if simulated else torch.device("cuda", torch.cuda.current_device())
    chosen = current if device is None else torch.device(device)
    if chosen.type != current.type:
        raise DeviceError(f"device={chosen}: " + ("a simulation takes the CPU" if simulated else "a GPU is needed"))
    return current if simulated or chosen.index is None else chosen

"""The service: every request gets its own answer, error or cancellation, whatever happens around it.

Most tests use ``mock``, whose worker, queue and futures are the service's own.
"""

import asyncio
import concurrent.futures
import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
import torch

import cute_fa
from cute_fa import (
    ChunkedPrefillRequest,
    ChunkLayout,
    CumulativeSeqlens,
    Fa2BwdRequest,
    Fa2FwdRequest,
    MaskKind,
    PagedAttentionRequest,
    PagedKvCache,
    SmArch,
)
from cute_fa.semantics import reference
from cute_fa.semantics.errors import (
    ArgumentError,
    DeviceError,
    NoDeviceError,
    QueueFullError,
    ServiceClosedError,
    UnsupportedKeyError,
)
from cute_fa.service import AttentionService, MockModeError, mock
from cute_fa.tools.inputs import InputSpec, make_inputs

WAIT = 60  # seconds after which something hangs
DENSE = InputSpec(2, 40, 70, 4, 2, 64, causal=True)


def request_of(seed=0, device="cpu", **options):
    given = make_inputs(DENSE, seed=seed, device=device)
    return Fa2FwdRequest(given.q, given.k, given.v, mask=MaskKind.CAUSAL, **options)


def requests(count):
    """Requests without content, to be told apart."""
    q = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16)
    return [Fa2FwdRequest(q, q, q, arch=SmArch.SM_80) for _ in range(count)]


class Gate:
    """An answer, the request itself, that is held back until ``open`` is set; ``begun`` tells that one waits."""

    def __init__(self):
        self.begun, self.open = threading.Event(), threading.Event()

    def __call__(self, request):
        self.begun.set()
        assert self.open.wait(2 * WAIT)
        return request


@contextlib.contextmanager
def held(count, max_pending=256):
    """A service whose worker is held up by the first request: (service, gate, futures of ``count`` requests)."""
    gate = Gate()
    with mock(gate, max_pending=max_pending) as service:
        try:
            futures = [service.submit(requests(1)[0])]
            assert gate.begun.wait(WAIT)
            futures += map(service.submit, requests(count - 1))
            yield service, gate, futures
        finally:
            gate.open.set()


class TestWhereItRuns:
    def test_neither_gpu_nor_simulation(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        threads = threading.active_count()
        with pytest.raises(MockModeError, match=r"simulate\(arch\).*cute_fa\.service\.mock\(\)") as raised:
            AttentionService()
        assert isinstance(raised.value, NoDeviceError)
        assert threading.active_count() == threads

    @pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
    def test_simulated(self, arch):
        """A forward, a backward and a chunk over pages, by the worker: as the requests themselves give them."""
        given = make_inputs(DENSE)
        paged = make_inputs(InputSpec(2, 30, 60, 4, 2, 64, page_size=16, causal=True, varlen_q=True), seed=1)
        offsets = CumulativeSeqlens.from_tensor(paged.cu_seqlens_q)
        with cute_fa.simulate(arch) as simulation, AttentionService() as service:
            assert service.device == torch.device("cpu")
            forward = Fa2FwdRequest(given.q.clone().requires_grad_(), given.k, given.v, mask=MaskKind.CAUSAL)
            future = service.submit(forward)
            out, lse = future.result(WAIT)
            assert not out.requires_grad and reference.check(out, lse, given.q, given.k, given.v, causal=True).ok
            dout = torch.randn_like(out)
            backward = Fa2BwdRequest(given.q, given.k, given.v, out, lse, dout, mask=MaskKind.CAUSAL)
            attention = PagedAttentionRequest(
                paged.q, PagedKvCache(paged.k, paged.v), paged.page_table, paged.seqused_k,
                mask=MaskKind.CAUSAL, cu_seqlens_q=offsets,
            )  # fmt: skip
            chunk = ChunkedPrefillRequest(attention, ChunkLayout(30, 30, 1, 0))
            futures = [service.submit(backward), service.submit(chunk)]
            grads, (out, lse) = (future.result(WAIT) for future in futures)
            launches = len(simulation.launches)
        errors = reference.check_gradients(grads, given.q, given.k, given.v, dout, causal=True)
        assert all(error.ok for error in errors.values()) and len(errors) == 3
        assert reference.check(out, lse, paged.q, paged.k, paged.v, **paged.options()).ok
        assert launches >= 4  # a backward is more than one

    def test_a_simulation_serves_the_cpu(self):
        with cute_fa.simulate("sm_80"):
            with pytest.raises(DeviceError, match=r"device=cuda:0: a simulation takes the CPU"):
                AttentionService("cuda:0")
            with AttentionService("cpu") as service:
                for what in (None, request_of, lambda: 1):
                    with pytest.raises(ArgumentError, match=f"request is {type(what).__name__}: one of cute_fa's"):
                        service.submit(what)

    def test_an_error_of_the_call(self):
        """A request for another machine: what ``run`` raises is the future's."""
        with cute_fa.simulate("sm_80"), AttentionService() as service:
            future = service.submit(request_of(arch=SmArch.SM_90A))
            with pytest.raises(ArgumentError, match="arch=sm_90a: the tensors are on cpu, sm_80"):
                future.result(WAIT)
            assert len(service.submit(request_of()).result(WAIT)) == 2

    def test_max_pending(self):
        for wrong in (0, -1, True, 2.5, None):
            with pytest.raises(ArgumentError, match=r"max_pending=.*: an int of at least 1"), mock(max_pending=wrong):
                pass


class TestMock:
    def test_the_reference(self):
        """Of CPU tensors, as on a GPU: rounded as a kernel's, and refused where no kernel is."""
        given = make_inputs(DENSE)
        with mock() as service:
            assert isinstance(service, AttentionService)
            request = request_of(seed=0)
            assert request.arch is SmArch.SM_90A
            out, lse = service.submit(request).result(WAIT)
            dout, dlse = torch.randn_like(out), torch.randn_like(lse)
            slopes = torch.rand(4)
            backward = Fa2BwdRequest(
                given.q, given.k, given.v, out, lse, dout, dlse=dlse, slopes_gradient=True,
                position_bias=cute_fa.PositionBias.ALIBI, alibi_slopes=slopes, mask=MaskKind.SLIDING, window=(20, 8),
            )  # fmt: skip
            grads = service.submit(backward).result(WAIT)
            assert service.requests == [request, backward]
            wide = torch.zeros(1, 8, 1, 512, dtype=torch.bfloat16)
            with pytest.raises(UnsupportedKeyError, match="head_dim 512"):
                service.submit(Fa2FwdRequest(wide, wide, wide)).result(WAIT)
        expected, expected_lse = reference.attention(given.q, given.k, given.v, causal=True)
        assert out.dtype == torch.bfloat16 and torch.equal(out, expected.bfloat16()) and torch.equal(lse, expected_lse)
        options = {"window_size": (20, 8), "alibi_slopes": slopes}
        for name, grad in reference.gradients(given.q, given.k, given.v, dout, dlse, **options)._asdict().items():
            ours = getattr(grads, name)
            assert (ours is None) if grad is None else torch.equal(ours, grad.to(ours.dtype))
        with pytest.raises(NoDeviceError):
            request_of()

    def test_pages(self):
        given = make_inputs(InputSpec(2, 30, 60, 4, 2, 64, page_size=16, causal=True, sink_tokens=3, window=(20, 0)))
        with mock(arch="sm_80") as service:
            options = {"mask": MaskKind.SLIDING_CAUSAL, "window": (20, 0), "sink_tokens": 3}
            cache = PagedKvCache(given.k, given.v)
            attention = PagedAttentionRequest(given.q, cache, given.page_table, given.seqused_k, **options)
            assert attention.arch is SmArch.SM_80
            chunk = ChunkedPrefillRequest(attention, ChunkLayout(30, 30, 1, 0))
            out, lse = service.submit(chunk).result(WAIT)
        comparison = reference.check(out, lse, given.q, given.k, given.v, **given.options())
        assert comparison.ok and comparison.lse_error == 0

    def test_an_answer_of_the_test(self):
        with mock(lambda request: (request, "answer")) as service:
            request = request_of()
            assert service.submit(request).result(WAIT) == (request, "answer")

    def test_they_nest(self):
        with mock(arch="sm_80"), mock(arch="sm_90a"):
            assert request_of().arch is SmArch.SM_90A
        with mock(arch="sm_80"):
            with mock(arch="sm_90a"):
                pass
            assert request_of().arch is SmArch.SM_80


class TestQueue:
    def test_each_gets_its_own_answer(self):
        """200 requests by 8 threads, through a queue that is full most of the time."""
        with mock(lambda request: (request,), max_pending=5) as service, ThreadPoolExecutor(8) as pool:
            everything = requests(200)
            futures = list(pool.map(service.submit, everything))
            assert [future.result(WAIT)[0] for future in futures] == everything
        assert len(service.requests) == 200 and set(service.requests) == set(everything)

    def test_order(self):
        done = []
        with mock(lambda request: request) as service:
            everything = requests(100)
            for request in everything:
                service.submit(request).add_done_callback(lambda future: done.append(future.result()))
        assert service.requests == everything == done

    def test_full(self):
        with held(3, max_pending=2) as (service, gate, futures):
            (extra,) = requests(1)
            with pytest.raises(QueueFullError, match="2 requests are waiting, max_pending=2"):
                service.submit(extra, block=False)
            started = time.monotonic()
            with pytest.raises(QueueFullError):
                service.submit(extra, timeout=0.05)
            assert 0.05 <= time.monotonic() - started < WAIT
            with ThreadPoolExecutor(1) as pool:
                blocked = pool.submit(service.submit, extra, timeout=WAIT)
                assert not concurrent.futures.wait([blocked], 0.05).done
                gate.open.set()
                assert blocked.result(WAIT).result(WAIT) is extra
        assert [future.result(0) for future in futures] + [extra] == service.requests

    def test_cancellation(self):
        with held(4, max_pending=3) as (service, gate, futures):
            running, first, second, third = futures
            assert running.running() and not running.cancel()
            assert second.cancel() and second.cancel() and second.cancelled()
            assert concurrent.futures.wait([second], 0).done == {second}
            with pytest.raises(CancelledError):
                second.result(0)
            (extra,) = requests(1)
            last = service.submit(extra, block=False)  # in its place
            gate.open.set()
            answers = [future.result(WAIT) for future in (running, first, third, last)]
        assert service.requests == answers and len(answers) == 4

    def test_cancellation_against_the_worker(self):
        """Each of many futures is either cancelled and never begun, or answered."""
        with mock(lambda request: request) as service, ThreadPoolExecutor(1) as pool:
            everything = requests(300)
            futures = [service.submit(request) for request in everything]
            cancelled = pool.submit(lambda: [future.cancel() for future in reversed(futures)]).result(WAIT)[::-1]
            concurrent.futures.wait(futures, WAIT)
        answered = [r for r, future, gone in zip(everything, futures, cancelled, strict=True) if not gone]
        assert all(future.done() for future in futures) and service.requests == answered

    @pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, StopIteration, GeneratorExit])
    def test_an_error_is_of_its_request_alone(self, error):
        raised = error("this one")

        def answer(request):
            if request is wrong:
                raise raised
            return request

        before, wrong, after = requests(3)
        with mock(answer) as service:
            futures = [service.submit(request) for request in (before, wrong, after)]
            assert futures[1].exception(WAIT) is raised
            assert [futures[i].result(WAIT) for i in (0, 2)] == [before, after]

    @pytest.mark.parametrize("error", [ValueError, SystemExit])
    def test_a_callback_that_raises(self, error, caplog):
        def callback(_):
            raise error("a callback's")

        with held(3) as (service, gate, futures):
            futures[1].add_done_callback(callback)
            gate.open.set()
        assert [future.result(0) for future in futures] == service.requests
        assert "a callback's" in caplog.text

    def test_a_callback_may_submit(self):
        """A full queue is an error there: the worker would wait for itself."""
        more, failed = requests(3), concurrent.futures.Future()

        def submit(_):
            try:
                futures.extend(map(service.submit, more))
            except Exception as error:
                failed.set_exception(error)

        with held(2, max_pending=2) as (service, gate, futures):
            futures[0].add_done_callback(submit)
            gate.open.set()
            assert isinstance(failed.exception(WAIT), QueueFullError)
        assert len(futures) == 3
        assert service.requests == [future.result(0) for future in futures]

    def test_nothing_is_kept(self):
        """An idle worker holds neither the last request nor its result, and an error's traceback not the future."""

        def answer(request):
            if request.softcap:
                raise ValueError
            return (torch.zeros(1),)

        gc.disable()
        try:
            with mock(answer) as service:
                alive = []
                for softcap in (0.0, 1.0):
                    request = request_of(softcap=softcap)
                    future = service.submit(request)
                    concurrent.futures.wait([future], WAIT)
                    service.requests.clear()
                    alive += map(weakref.ref, (request, future) if softcap == 0.0 else (future,))
                    del request, future
                until = time.monotonic() + WAIT
                while any(ref() is not None for ref in alive) and time.monotonic() < until:
                    time.sleep(0.001)  # the worker is yet to come back from telling that the future is done
                assert [ref() for ref in alive] == [None] * 3
        finally:
            gc.enable()


class TestClose:
    def test_drains(self):
        with held(20) as (service, gate, futures):
            threading.Timer(0.02, gate.open.set).start()
            service.close()
            assert all(future.done() for future in futures)
            service.close()
        assert [future.result(0) for future in futures] == service.requests
        with pytest.raises(ServiceClosedError, match="the service is closed"):
            service.submit(requests(1)[0])

    def test_without_draining(self):
        with held(20) as (service, gate, futures):
            threading.Timer(0.02, gate.open.set).start()
            service.close(drain=False)
        assert [future.cancelled() for future in futures] == [False] + [True] * 19
        assert service.requests == [futures[0].result(0)]

    def test_an_error_in_the_block(self):
        with pytest.raises(ZeroDivisionError), mock(lambda request: request) as service:
            futures = [service.submit(request) for request in requests(10)]
            raise ZeroDivisionError
        assert [future.result(0) for future in futures] == service.requests

    @pytest.mark.parametrize("drain", [True, False])
    def test_while_others_submit(self, drain):
        """What submit took has an outcome, also where it was blocked by a full queue."""
        with mock(lambda request: request, max_pending=3) as service:
            taken = [[] for _ in range(8)]

            def submit(mine):
                with contextlib.suppress(ServiceClosedError):
                    while True:
                        (request,) = requests(1)
                        mine.append((request, service.submit(request)))

            threads = [threading.Thread(target=submit, args=(mine,)) for mine in taken]
            for thread in threads:
                thread.start()
            time.sleep(0.02)
            service.close(drain=drain)
            for thread in threads:
                thread.join(WAIT)
                assert not thread.is_alive()
        pairs = [pair for mine in taken for pair in mine]
        assert all(future.done() for _, future in pairs)
        answered = [request for request, future in pairs if not future.cancelled()]
        assert answered and set(service.requests) == set(answered)
        assert len(pairs) == len(answered) or not drain
        assert all(future.result(0) is request for request, future in pairs if not future.cancelled())

    def test_wakes_who_waits_for_room(self):
        with held(2, max_pending=1) as (service, gate, futures), ThreadPoolExecutor(2) as pool:
            blocked = pool.submit(service.submit, requests(1)[0])
            assert not concurrent.futures.wait([blocked], 0.02).done
            closed = pool.submit(service.close)
            assert isinstance(blocked.exception(WAIT), ServiceClosedError)
            gate.open.set()
            closed.result(WAIT)
            assert all(future.done() for future in futures)

    def test_in_a_callback(self):
        with held(5) as (service, gate, futures):
            futures[1].add_done_callback(lambda _: service.close())
            gate.open.set()
        assert [future.result(0) for future in futures] == service.requests


class TestAwait:
    def test_in_two_loops(self):
        async def all_of(service, mine):
            futures = [service.submit(request) for request in mine]
            return await asyncio.gather(*futures)

        with mock(lambda request: request, max_pending=8) as service, ThreadPoolExecutor(2) as pool:
            halves = requests(50), requests(50)
            answers = pool.map(lambda mine: asyncio.run(all_of(service, mine)), halves)
            assert tuple(answers) == halves

    def test_one_future_in_two_loops(self):
        async def answer(future):
            return await future, await future

        with held(2) as (service, gate, futures), ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(asyncio.run, answer(futures[1])) for _ in range(2)]
            assert not concurrent.futures.wait(waiting, 0.05).done
            gate.open.set()
            results = [future.result(WAIT) for future in waiting]
        assert results == [(service.requests[1],) * 2] * 2

    def test_the_loop_goes_on(self):
        async def tick_until_done():
            task, ticks = asyncio.ensure_future(futures[0]), 0
            while not task.done():
                ticks += 1
                if ticks == 5:
                    gate.open.set()
                await asyncio.sleep(0.002)
            return ticks, task.result()

        with held(1) as (service, gate, futures):
            ticks, result = asyncio.run(tick_until_done())
        assert ticks >= 5 and result is service.requests[0]

    def test_errors(self):
        error = ValueError("this one")

        def answer(request):
            raise StopIteration if request.softcap else error

        async def caught(future):
            try:
                return await future
            except Exception as raised:
                return raised

        with mock(answer) as service:
            assert asyncio.run(caught(service.submit(request_of()))) is error
            stopped = asyncio.run(caught(service.submit(request_of(softcap=1.0))))
            assert isinstance(stopped, RuntimeError) and isinstance(stopped.__cause__, StopIteration)

    def test_cancellation_of_the_task(self):
        async def give_up(future):
            await asyncio.wait_for(future, 0.01)

        with held(2) as (service, gate, futures):
            for future in futures:
                with pytest.raises(asyncio.TimeoutError):
                    asyncio.run(give_up(future))
            assert [future.cancelled() for future in futures] == [False, True]  # the first has begun
            gate.open.set()
        assert service.requests == [futures[0].result(0)]

    def test_cancellation_of_the_future(self):
        async def cancelled(future):
            asyncio.get_running_loop().call_later(0.01, future.cancel)
            with pytest.raises(asyncio.CancelledError):
                await future

        with held(2) as (_, _, futures):
            asyncio.run(cancelled(futures[1]))

    def test_a_loop_that_is_gone(self, caplog):
        with held(2) as (service, gate, futures):
            loop = asyncio.new_event_loop()
            task = loop.create_task(asyncio.wait([asyncio.ensure_future(futures[0], loop=loop)]))
            loop.run_until_complete(asyncio.sleep(0.01))
            loop.close()
            gate.open.set()
            assert futures[1].result(WAIT) is service.requests[1]
            assert not task.done() and "exception calling callback" not in caplog.text
            task._log_destroy_pending = False


EXIT = """
import sys, threading, time, torch
from cute_fa import Fa2FwdRequest, SmArch
from cute_fa.service import mock
q = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16)
def answer(request):
    time.sleep(0.01)
    return request.softcap
context = mock(answer, max_pending=100)
service = context.__enter__()
for i in range(20):
    future = service.submit(Fa2FwdRequest(q, q, q, softcap=float(i), arch=SmArch.SM_80))
    future.add_done_callback(lambda future: print(future.result()))
"""


class TestProcess:
    @pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise ValueError", "future.add_done_callback(sys.exit)"])
    def test_exit(self, end):
        """What was submitted is answered before the interpreter ends, which does not hang."""
        command = [sys.executable, "-W", "ignore", "-c", EXIT + end]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT)
        assert done.stdout.split() == [str(float(i)) for i in range(20)], done.stderr
        assert done.returncode == {"sys.exit(3)": 3, "raise ValueError": 1}.get(end, 0)

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_fork(self):
        """A child has no worker: it is told so, and its exit changes nothing for the parent."""
        with held(3) as (service, gate, futures):
            child = os.fork()
            if child == 0:
                try:
                    service.close()
                    service.submit(requests(1)[0])
                except ServiceClosedError as error:
                    os._exit(0 if f"process {os.getppid()}" in str(error) else 2)
                finally:
                    os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            gate.open.set()
            assert [future.result(WAIT) for future in futures] == service.requests


class FakeCuda:
    """Streams that note what happens on them."""

    def __init__(self):
        self.trace = []

    def stream(self, name):
        cuda = self

        class Stream:
            def record_event(self, event=None):
                cuda.trace.append(f"{name}: record")
                return event or f"event of {name}"

            def wait_event(self, event):
                cuda.trace.append(f"{name}: wait for {event}")

        return Stream()

    def run(self, fails):
        self.trace.append("run")
        if fails:
            raise ValueError("in run")
        return "result"


@pytest.mark.parametrize("fails", [False, True])
def test_streams(fails, monkeypatch):
    """The service's stream waits for the caller's, and a future for the service's, behind an error too."""
    cuda = FakeCuda()
    service_stream = cuda.stream("service")

    @contextlib.contextmanager
    def on(stream):
        assert stream is service_stream
        cuda.trace.append("begin")
        yield
        cuda.trace.append("end")

    class Event:
        def __init__(self, blocking):
            assert blocking

        def synchronize(self):
            cuda.trace.append("synchronize")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: service_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: cuda.stream(f"caller on {device}"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(AttentionService, "_check", lambda self, request: None)
    request = type("Request", (), {"run": lambda self: cuda.run(fails)})()
    with AttentionService() as service:
        assert service.device == torch.device("cuda", 1)
        future = service.submit(request)
        assert isinstance(future.exception(WAIT), ValueError) if fails else future.result(WAIT) == "result"
    assert cuda.trace[:3] == ["caller on cuda:1: record", "begin", "service: wait for event of caller on cuda:1"]
    assert cuda.trace[3:6] == ["run", "service: record", "synchronize"]


@pytest.mark.gpu
def test_a_gpu_waits_for_the_callers_stream():
    """The inputs are written behind a long wait on the caller's stream: a service that did not wait for that stream
    would read the zeros. Everything is compiled before, so that nothing else takes as long."""
    request, given = request_of(device="cuda"), make_inputs(DENSE, seed=1, device="cuda")
    written = ((request.q, given.q), (request.k, given.k), (request.v, given.v))
    with AttentionService() as service:
        service.submit(request).result(WAIT)
        for tensor, _ in written:
            tensor.zero_()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(400_000_000)
            for tensor, values in written:
                tensor.copy_(values)
            future = service.submit(request)
            assert not stream.query()  # else the wait was too short to show anything
            out, lse = future.result(WAIT)
            assert stream.query()
    assert reference.check(out, lse, given.q, given.k, given.v, causal=True).ok


@pytest.mark.gpu
def test_a_gpu_keeps_a_result_while_the_caller_reads_it():
    """A result is dropped while its copy still waits on the caller's stream. Without ``record_stream`` the next request
    of the same shape would be given its memory, and overwrite it."""
    first, second = (request_of(seed, device="cuda") for seed in (0, 1))
    with AttentionService() as service:
        expected = service.submit(first).result(WAIT)[0].cpu()
        kept = torch.empty(expected.shape, dtype=expected.dtype, device="cuda")
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            out = service.submit(first).result(WAIT)[0]
            torch.cuda._sleep(400_000_000)
            kept.copy_(out)
            del out
        for _ in range(4):
            service.submit(second).result(WAIT)
        assert not stream.query()
        stream.synchronize()
    torch.testing.assert_close(kept.cpu(), expected, rtol=0, atol=0)

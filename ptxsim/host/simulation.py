"""The simulated world: what the DSL's host code reaches while a simulation is on.

``simulate`` switches the stand-in library over and prepares the DSL: target architecture, PTX kept with every compiled
function, no driver calls. The library's events (load, launch …) arrive at ``Simulation.handle``; a launch parses and
translates the kernel's PTX once per process and runs it wave by wave (``launches``).
"""

from __future__ import annotations

import ctypes
import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import SimError
from ..machine.events import Observer
from ..machine.global_memory import Ranges
from ..machine.limits import SMEM_LIMIT
from ..machine.tensor_maps import encode
from ..machine.tensor_sums import ARITHMETICS
from ..report.history import History
from ..report.trace import Trace, Tracer
from . import dsl, programs, standin
from .host_memory import integers, merged
from .images import Image, image_at
from .launches import MAX_CTAS, Conditions, Launch, Launcher, LaunchRequest, LoadedKernel
from .programs import LoadedProgram, number
from .views import DeviceView, map_tensors, storage

# Events of standin.c, in its order
EVENTS = (
    "load_library",
    "get_kernel",
    "launch",
    "tensor_map",
    "device_attribute",
    "kernel_attribute",
    "allocated",
    "freed",
    "not_simulated",
)
HANDLE_TAG = 0x50545853 << 32  # standin.c knows simulated handles by it
ERROR_LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure


_current: Simulation | None = None
# What the handles that host code holds stand for. Functions outlive the simulation that loaded them.
_modules: dict[int, Image] = {}
_kernels: dict[int, LoadedKernel] = {}
_handles = itertools.count(HANDLE_TAG + 1)


def current() -> Simulation | None:
    """The simulation that is on, if any."""
    return _current


@contextmanager
def simulate(
    arch: str,
    *,
    schedule_seed: int | None = None,
    late: bool = False,
    race: bool = False,
    sm_count: int = 4,
    trace: str | Path | None = None,
    line_info: bool = False,
    fp8_bits: int | None = None,
    arithmetic: str = "float32",
    observers: Iterable[Observer] = (),
) -> Iterator[Simulation]:
    """Run the kernels of CuTe DSL functions on host memory, as a GPU of architecture ``arch`` would.

    ``arch`` is a target name of ptxas, "sm_80", "sm_90a", "sm_100a" …; it is also what the DSL compiles for meanwhile.
    ``schedule_seed`` runs warps in a seeded adversarial order instead of the deterministic default one; ``late`` delays
    asynchronous copies and MMAs until something waits for them. ``race`` looks for missing synchronisation in any
    schedule: RaceError and its subclasses, see ``analysis.races``. ``sm_count`` is what the device reports: few, so
    that persistent kernels loop. ``trace`` names a file to which leaving writes what the warps did, see
    ``report.trace``. ``line_info`` compiles with line information: reports then name Python source lines.
    ``fp8_bits`` (8 to 24) is how many significant bits wgmma keeps of sums of fp8 products; 14 is what is reported of
    Hopper, None sums in float32, see ``ptxsim.machine.accumulate``.
    ``arithmetic`` is how all tensor instructions add products: "float32" in order with each sum rounded, "hardware" as
    MMA-Sim found tensor cores to, "distinct" with another number of bits for each instruction, so that a result that
    two of them computed shows it, see ``ptxsim.machine.tensor_sums``.
    ``observers`` (``ptxsim.Observer``) hear what the warps of every wave do.
    Leaving restores everything; simulations do not nest.

    Functions compiled or loaded inside belong to the simulated world; keep them apart from those of the real one.
    """
    global _current
    if _current is not None:
        raise SimError(f"simulations do not nest: one of {_current.arch} is on")
    if not re.fullmatch(r"sm_\d+[af]?", arch) or number(arch) not in SMEM_LIMIT:
        raise SimError(f"cannot simulate {arch!r}; known are sm_{', sm_'.join(map(str, sorted(SMEM_LIMIT)))}")
    if fp8_bits is not None and not 8 <= fp8_bits <= 24:
        raise SimError(f"fp8_bits is {fp8_bits}; the significant bits of sums of fp8 products are 8 to 24, or None")
    if arithmetic not in ARITHMETICS:
        raise SimError(f"arithmetic is {arithmetic!r}; there are {', '.join(ARITHMETICS)}")
    if fp8_bits is not None and arithmetic != "float32":
        raise SimError(f"fp8_bits with arithmetic {arithmetic!r}, which rounds sums of fp8 products itself")
    library = standin.install()
    simulation = Simulation(arch, schedule_seed, late, race, sm_count, library, fp8_bits, arithmetic)
    simulation.line_info = line_info
    simulation.observers += observers
    written = None if trace is None else Trace(trace)
    with ExitStack() as stack:
        if written is not None:
            simulation.tracer = Tracer(written)
            stack.callback(written.write)
        if library.of_dsl:
            dsl.prepare(stack, simulation, line_info)
        library.simulate(simulation.handle)
        stack.callback(library.leave)
        _current = simulation
        try:
            yield simulation
        finally:
            _current = None


class Simulation:
    """What ``simulate`` gives: the log of launches, and calls with exact bounds.

    ``together``: CTAs that run together in a wave. One at a time, in the order of the launch, a CTA finds all done that
    those before it do, and a kernel whose CTAs wait for earlier ones never polls in vain.
    """

    together: int = MAX_CTAS

    def __init__(self, arch: str, seed: int | None, late: bool, race: bool, sm_count: int, library: standin.Standin,
                 fp8_bits: int | None = None, arithmetic: str = "float32"):  # fmt: skip
        self.arch, self.schedule_seed, self.late, self.race, self.sm_count = arch, seed, late, race, sm_count
        self.fp8_bits, self.arithmetic = fp8_bits, arithmetic
        self.line_info = False  # whether kernels are compiled with line information
        self.launches: list[Launch] = []
        self.observers: list[Observer] = []  # hear what every wave does
        self.tracer: Tracer | None = None  # if a trace is written
        # Set by who examines launches (ptxsim.analysis.mutate): gives the program to run instead.
        self.before_launch: Callable[[LoadedProgram], LoadedProgram] | None = None
        self._launcher = Launcher()
        self._library = library
        self._views: list[DeviceView] = []  # kept, so that what is registered stays mapped
        self._arguments: list[tuple[int, int]] | None = None  # legal memory of the sim.call that runs
        self._allocations: dict[int, int] = {}
        self._idle = False
        self._error: BaseException | None = None
        self._calling = threading.Lock()

    # ---- calls --------------------------------------------------------------------------------------------------

    def call(self, function: Callable, *args: Any) -> Any:
        """Call a compiled function with CPU tensors, anywhere in nested tuples, NamedTuples and lists of ``args``.

        ``function`` is what ``cute.compile`` returned, with or without TVM-FFI, or a function of an object loaded by
        ``cute.runtime.load_module(…, enable_tvm_ffi=True)``. Global memory is exactly the storages of these tensors:
        an access elsewhere raises MemoryFault. Errors inside a launch come out as themselves.
        """
        import tvm_ffi

        if _current is not self:
            raise SimError("this simulation is over")

        tvm = isinstance(function, tvm_ffi.Function) or hasattr(function, "__tvm_ffi_object__")
        legal = []

        def convert(tensor: Any) -> Any:
            view = tensor if isinstance(tensor, DeviceView) else DeviceView(tensor)
            legal.append(storage(view.tensor))
            return tvm_ffi.from_dlpack(view) if tvm else _cute_tensor(view)

        converted = [map_tensors(convert, value) for value in args]
        with self._calling:
            self._arguments = legal
            try:
                return self.run(function, *converted)
            finally:
                self._arguments = None

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call with ready arguments; re-raise what happened inside a launch instead of the DSL's report of it."""
        self._error = None
        try:
            result = function(*args, **kwargs)
        except Exception:
            if self._error is None:
                raise
        if self._error is not None:
            error, self._error = self._error, None
            raise error from None
        return result

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Launches succeed and run nothing meanwhile: what is left of a call is the host's side, to be timed."""
        self._idle = True
        self._library.set_idle(True)
        try:
            yield
        finally:
            self._idle = False
            self._library.set_idle(False)

    def register_view(self, view: DeviceView) -> None:
        """Add the view's storage to the global memory of plain calls."""
        self._views.append(view)

    # ---- events -------------------------------------------------------------------------------------------------

    def handle(self, event: int, arguments: Any) -> int:
        """Callback of the stand-in library: a CUDA error code; the exception is kept for ``run``."""
        try:
            getattr(self, "_on_" + EVENTS[event])(arguments)
            return 0
        except BaseException as error:  # it must not cross the C boundary
            if self._error is None:
                self._error = error
            self._library.set_message(f"{type(error).__name__} in the simulated GPU: {error}")
            return ERROR_LAUNCH_FAILURE

    def _on_load_library(self, a: Any) -> None:
        image = image_at(a[1])
        _modules[_new_handle(a[0])] = image

    def _on_get_kernel(self, a: Any) -> None:
        name = ctypes.string_at(a[2]).decode()
        if a[1] not in _modules:
            raise _foreign(name)
        image = _modules[a[1]]
        _kernels[_new_handle(a[0])] = LoadedKernel(image.ptx, name, image.registers.get(name), name in image.resizing)

    def _on_device_attribute(self, a: Any) -> None:
        known = {  # cudaDeviceAttr
            1: 1024,  # maxThreadsPerBlock
            8: 49152,  # maxSharedMemoryPerBlock
            10: 32,  # warpSize
            16: self.sm_count,  # multiProcessorCount
            39: 2048,  # maxThreadsPerMultiProcessor
            75: number(self.arch) // 10,  # computeCapabilityMajor
            76: number(self.arch) % 10,  # computeCapabilityMinor
            81: SMEM_LIMIT[number(self.arch)] + 1024,  # maxSharedMemoryPerMultiprocessor
            97: SMEM_LIMIT[number(self.arch)],  # maxSharedMemoryPerBlockOptin
        }
        if a[1] not in known:
            raise SimError(f"device attribute {a[1]} (cudaDeviceAttr) is not simulated")
        ctypes.c_int32.from_address(a[0]).value = known[a[1]]

    def _on_kernel_attribute(self, a: Any) -> None:
        if a[2] not in _kernels:
            raise _foreign(f"kernel {a[2]:#x}")
        kernel = _kernels[a[2]]
        with _naming(kernel.name):
            if self._idle:  # nothing will run: what the host code asks for needs no translation
                parsed = programs.parsed_kernel(kernel.ptx, kernel.name)
            else:
                parsed = programs.load_program(kernel.ptx, kernel.name).program.k
        static = programs.static_smem(parsed)
        known = {1: static, 8: SMEM_LIMIT[number(self.arch)] - static}  # shared memory: static, largest dynamic
        if a[1] not in known:
            raise SimError(f"kernel attribute {a[1]} (CUfunction_attribute) is not simulated")
        ctypes.c_int32.from_address(a[0]).value = known[a[1]]

    def _on_tensor_map(self, a: Any) -> None:
        rank = a[2]
        extent, stride = integers(a[4], "Q", rank), integers(a[5], "Q", rank - 1)
        box, element_stride = integers(a[6], "I", rank), integers(a[7], "I", rank)
        encoded = encode(a[1], rank, a[3], extent, stride, box, element_stride, a[8], a[9], a[10])
        ctypes.memmove(a[0], encoded, 128)

    def _on_allocated(self, a: Any) -> None:
        self._allocations[a[0]] = a[1]

    def _on_freed(self, a: Any) -> None:
        self._allocations.pop(a[0], None)

    def _on_not_simulated(self, a: Any) -> None:
        raise SimError(f"{ctypes.string_at(a[0]).decode()} of the CUDA runtime is not simulated")

    def _on_launch(self, a: Any) -> None:
        if a[1] not in _kernels:
            raise _foreign(f"handle {a[1]:#x}")
        self.launch(LaunchRequest.read(_kernels[a[1]], a[0], a[2]))

    # ---- launches -----------------------------------------------------------------------------------------------

    def launch(self, request: LaunchRequest) -> None:
        """Run one launch, and log it."""
        with _naming(request.kernel.name):
            loaded = programs.load_program(request.kernel.ptx, request.kernel.name)
            if self.before_launch is not None:
                loaded = self.before_launch(loaded)
            under = Conditions(self.arch, self.schedule_seed, self.late, self.race, self.sm_count, self.fp8_bits,
                               self.arithmetic, self.together, self.legal_memory(), self.observers_of_wave)  # fmt: skip
            self.launches.append(self._launcher.run(request, loaded, under))

    def observers_of_wave(self) -> list[Observer]:
        """Who hears what the next wave does."""
        return [*([] if self.tracer is None else [self.tracer]), History(), *self.observers]

    def legal_memory(self) -> Ranges:
        """Legal global memory: the arguments of the ``call``, or for a plain call every view made in this simulation
        (if there is none, whatever is mapped), and what the host code allocated."""
        ranges = Ranges()
        legal = [storage(view.tensor) for view in self._views] if self._arguments is None else list(self._arguments)
        if legal or self._arguments is not None:
            # An empty set of ranges would mean "whatever is mapped": a call without tensors has no global memory.
            for address, size in merged([*legal, *self._allocations.items()]) or [(0, 0)]:
                ranges.register(address, size)
        return ranges


def device_view(tensor: Any) -> DeviceView:
    """The CPU tensor (torch or NumPy) as a CUDA tensor, for ``cutlass.cute.runtime.from_dlpack`` and
    ``tvm_ffi.from_dlpack``; made inside a simulation, it becomes part of the global memory of that simulation."""
    view = DeviceView(tensor)
    if _current is not None:
        _current.register_view(view)
    return view


# ---- small helpers --------------------------------------------------------------------------------------------------


def _new_handle(address: int) -> int:
    """A handle, written where host code wants it."""
    handle = next(_handles)
    ctypes.c_uint64.from_address(address).value = handle
    return handle


def _foreign(what: str) -> SimError:
    return SimError(f"{what} was loaded in the real world: a loaded function stays in the world that loaded it")


@contextmanager
def _naming(kernel: str) -> Iterator[None]:
    """Name the kernel in the errors of the simulator."""
    try:
        yield
    except SimError as error:
        error.kernel = kernel
        raise


def _cute_tensor(view: DeviceView) -> Any:
    """What the DSL makes of a plain tensor argument: dynamic shape and strides."""
    from cutlass.cute.runtime import from_dlpack

    return from_dlpack(view).mark_layout_dynamic()

"""Builds and loads the stand-in for the DSL's CUDA runtime library, and switches it between the two worlds.

The DSL's engine resolves the runtime's symbols once per process, from whichever library was loaded first. ``install``
therefore puts a library of our own (standin.c) in its place before the engine loads anything: it exports the same
symbols and forwards each call either to the real library, which it opens privately, or to the simulator.

Exported kernels may also be linked to a runtime library that can be switched; ``attach`` tells of one. Where the DSL is
not installed, those are all there is.

The library is built on first use (``ptxsim.compiled``).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import struct
import sys
from pathlib import Path

from ptxsim.compiled import compiled
from ptxsim.errors import SimError

SOURCE = Path(__file__).with_name("standin.c")
RUNTIME_LIBRARY = "cute_dsl_runtime"
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_uint64))
DSL = "nvidia_cutlass_dsl"


class RuntimeAlreadyLoaded(SimError):
    """The DSL has loaded its real CUDA runtime library, so the stand-in can no longer take its place."""


class Standin:
    """The loaded stand-in library of this process; ``of_dsl``: whether it stands for the DSL's runtime library."""

    def __init__(self, path: Path, of_dsl: bool):
        self.path, self.of_dsl, self._simulating = path, of_dsl, False
        self._library = ctypes.CDLL(str(path))
        self._library.ptxsim_set_callback.argtypes = [CALLBACK]
        self._library.ptxsim_set_message.argtypes = [ctypes.c_char_p]
        self._callback = CALLBACK()
        if of_dsl:
            self._library.ptxsim_load_error.restype = ctypes.c_char_p
            problem = self._library.ptxsim_load_error().decode()
            if problem:
                raise SimError(f"the DSL's runtime library cannot be opened: {problem}")

    def simulate(self, callback) -> None:
        """Enter the simulated world: calls go to ``callback(event, arguments) -> CUDA error code``."""
        self._callback = CALLBACK(callback)
        self._library.ptxsim_set_callback(self._callback)
        self._switch(True)

    def leave(self) -> None:
        """Enter the real world: calls go to the libraries themselves."""
        self._switch(False)

    def _switch(self, simulating: bool) -> None:
        self._simulating = simulating
        if self.of_dsl:
            self._library.ptxsim_switch(int(simulating))
        for library in _attached:
            self.switch_attached(library)

    def switch_attached(self, library: ctypes.CDLL) -> None:
        """Bring an attached library into the present world."""
        missing = library.host_runtime_switch(self._library.ptxsim_function if self._simulating else None)
        if missing:
            raise SimError(f"{missing.decode()} of {library._name} is not simulated")

    def set_idle(self, idle: bool) -> None:
        """Whether simulated launches succeed at once, unseen by the callback."""
        self._library.ptxsim_set_idle(int(idle))

    def set_message(self, text: str) -> None:
        """What the DSL reports if the current call fails."""
        self._library.ptxsim_set_message(text.encode())


_installed: Standin | None = None
_attached: list[ctypes.CDLL] = []


def attach(library: ctypes.CDLL) -> None:
    """Let simulations take over a loaded runtime library that can be switched; idempotent.

    It exports ``const char *host_runtime_switch(void *(*find)(const char *name))``: its functions then do what those do
    that ``find`` gives for the names of the CUDA runtime's (with a leading underscore) or the DSL's, or their own again
    for NULL; it returns the name of one that ``find`` does not know, and then changes nothing.
    """
    if all(library._handle != other._handle for other in _attached):
        library.host_runtime_switch.argtypes, library.host_runtime_switch.restype = [ctypes.c_void_p], ctypes.c_char_p
        if _installed is not None:
            _installed.switch_attached(library)
        _attached.append(library)


def install() -> Standin:
    """Put the stand-in library in the place of the DSL's runtime library, for the rest of the process; idempotent.

    Plain (real) use of the DSL goes on working. Raises RuntimeAlreadyLoaded if the DSL has compiled or loaded a
    function before, CompilerMissing if the library must be built and there is no C compiler. Where the DSL is not
    installed, only attached libraries are simulated.
    """
    global _installed
    if _installed is None and importlib.util.find_spec(DSL) is None:
        _require_platform()
        _installed = Standin(compiled(SOURCE, "libptxsim_runtime.so", ["-O2"], "the simulated runtime"), of_dsl=False)
    if _installed is None:
        environment = _dsl().envar
        libraries = (environment.shared_libs or "").split(os.pathsep)
        real = next((path for path in libraries if RUNTIME_LIBRARY in os.path.basename(path)), None)
        if real is None:
            raise SimError(f"the DSL names no lib{RUNTIME_LIBRARY}.so to stand in for; its libraries: {libraries}")
        if _mapped(RUNTIME_LIBRARY):
            raise RuntimeAlreadyLoaded(
                f"the DSL has already loaded {real}, and an engine binds its symbols once per process: enter the "
                "simulation once, or call ptxsim.install(), before the first cute.compile, @cute.jit call or "
                "cute.runtime.load_module of the process"
            )
        standin = Standin(build(Path(real)), of_dsl=True)
        environment.shared_libs = environment.shared_libs.replace(real, str(standin.path))
        _redirect_discovery(real, str(standin.path))
        _installed = standin
    return _installed


def _dsl():
    """The DSL's one object of settings and compile state."""
    from cutlass.cutlass_dsl import CuTeDSL

    return CuTeDSL._get_dsl()


def _redirect_discovery(real: str, standin: str) -> None:
    """The TVM-FFI path and ``load_module`` look the libraries up again each time. ``CUTE_DSL_LIBS`` would be the
    official answer to them, but the DSL has read it already, and child processes would inherit it."""
    from cutlass.base_dsl import env_manager

    discover = env_manager.get_prefix_dsl_libs

    def get_prefix_dsl_libs(prefix: str) -> str | None:
        found = discover(prefix)
        return found and found.replace(real, standin)

    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "cutlass"]:
        if vars(module).get("get_prefix_dsl_libs") is discover:
            module.get_prefix_dsl_libs = get_prefix_dsl_libs


def _mapped(name: str) -> bool:
    """Whether a file with that in its name is mapped into this process."""
    with open("/proc/self/maps") as maps:
        return any(name in os.path.basename(line.split(maxsplit=5)[-1]) for line in maps)


def build(real: Path) -> Path:
    """Path of the stand-in for the runtime library ``real``, built if it is not in the cache."""
    _require_platform()
    real = real.resolve()
    symbols = exported_functions(real.read_bytes())
    listed = " ".join(f"X({index}, {name})" for index, name in enumerate(symbols))
    header = f'#define PTXSIM_SYMBOLS(X) {listed}\n#define PTXSIM_REAL "{real}"\n'
    # The file name stays: the DSL looks for a path that ends so.
    return compiled(SOURCE, real.name, ["-O2", "-ldl"], "the stand-in library", header)


def _require_platform() -> None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise SimError(f"the simulator needs Linux on x86_64, not {platform.system()} on {platform.machine()}")


def exported_functions(elf: bytes) -> list[str]:
    """Names of the functions that a 64-bit little-endian ELF shared library defines and exports, in file order."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise SimError("the DSL's runtime library is not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, entries = struct.unpack_from("<HH", elf, 0x3A)
    # Elf64_Shdr: name, type, flags, addr, offset, size, link, info, addralign, entsize
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, table + entry_size * i) for i in range(entries)]
    names = []
    for section in sections:
        if section[1] != 11:  # SHT_DYNSYM
            continue
        strings = sections[section[6]][4]
        for at in range(section[4], section[4] + section[5], 24):
            # Elf64_Sym: name, info (binding << 4 | type), other, section, value, size
            name, info, _, defined_in = struct.unpack_from("<IBBH", elf, at)
            if defined_in and info >> 4 in (1, 2) and info & 15 == 2:  # global or weak, a function
                start = strings + name
                names.append(elf[start : elf.index(b"\0", start)].decode())
    return [name for name in names if name not in ("_init", "_fini")]

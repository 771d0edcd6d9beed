"""Small PTX kernels as text, run through the simulator's core without the DSL.

``run`` wraps a snippet into a kernel: pointers to the arrays are in ``%in0``, ``%in1`` … and ``%out0`` …, the thread
number in the CTA in ``%t`` and the number in the grid in ``%g``; ``%r``, ``%rs``, ``%rd``, ``%f``, ``%fd``, ``%p`` are
register files. ``same_bits`` compares arrays bit by bit.
"""

from __future__ import annotations

import re

import numpy as np

from ptxsim.analysis.races import LaunchHistory
from ptxsim.frontend.parser import parse_module
from ptxsim.frontend.program import Program
from ptxsim.machine.global_memory import Ranges
from ptxsim.machine.launch import LaunchConfig
from ptxsim.machine.machine import Machine

HEADER = ".version 8.8\n.target {target}\n.address_size 64\n"


def aligned(array, alignment=128):
    """A copy of an array whose address is a multiple of ``alignment`` bytes."""
    array = np.ascontiguousarray(array)
    room = np.zeros(array.nbytes + alignment, np.uint8)
    start = -room.ctypes.data % alignment
    out = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


def kernel_text(body, inputs, outputs, *, declarations="", target="sm_90a", params=""):
    """The PTX of a kernel around ``body``; ``inputs`` and ``outputs`` are counts of pointers."""
    body = re.sub(r";\s*", ";\n  ", body)  # one instruction a line, as errors name lines
    names = [f"in{i}" for i in range(inputs)] + [f"out{i}" for i in range(outputs)]
    listed = ", ".join([f".param .u64 p_{n}" for n in names] + ([params] if params else []))
    loads = "\n".join(f"  ld.param.u64 %{n}, [p_{n}];" for n in names)
    registers = "\n".join(f"  .reg .b64 %{n};" for n in names)
    return f"""{HEADER.format(target=target)}
{declarations}
.visible .entry kernel({listed})
{{
  .reg .pred %p<64>; .reg .b16 %rs<64>; .reg .b32 %r<256>; .reg .b64 %rd<64>; .reg .f32 %f<256>; .reg .f64 %fd<64>;
  .reg .b32 %t; .reg .b32 %g; .reg .b32 %n; .reg .b32 %c;
{registers}
{loads}
  mov.u32 %t, %tid.x;
  mov.u32 %c, %ctaid.x;
  mov.u32 %n, %ntid.x;
  mad.lo.u32 %g, %c, %n, %t;
{body}
  ret;
}}
"""


def launch(text, arrays, *, threads=32, grid=1, cluster=1, smem=0, extra_params=b"", seed=None, late=False, legal=(),
           race=False, waves=1, registers=None, fp8_bits=None,
           tensor_sums=None, observers=()):  # fmt: skip
    """Run the kernel of a PTX text; ``arrays`` are its pointer parameters and the only legal global memory. ``waves``:
    run the CTAs in so many equal parts, one after the other; ``registers``: those of a thread at launch; ``fp8_bits``
    and ``tensor_sums``: see ``LaunchConfig``; ``observers`` hear what happens. Returns the machine of the last part."""
    program = Program(parse_module(text).kernels["kernel"])
    ranges = Ranges()
    for array in (*arrays, *legal):
        ranges.register(array.ctypes.data, array.nbytes)
    params = aligned(np.zeros(max(program.k.param_bytes, 1), np.uint8), 64)
    pointers = b"".join(int(a.ctypes.data).to_bytes(8, "little") for a in arrays)
    params[: len(pointers)] = np.frombuffer(pointers, np.uint8)
    if extra_params:
        start = program.k.param_list[len(arrays)][0]
        params[start : start + len(extra_params)] = np.frombuffer(extra_params, np.uint8)
    shape = ((grid, 1, 1), (threads, 1, 1), (cluster, 1, 1))
    config = LaunchConfig(
        program, *shape, smem, params, ranges, registers=registers, seed=seed, late=late, fp8_bits=fp8_bits,
        tensor_sums=tensor_sums,
    )  # fmt: skip
    races = LaunchHistory(program) if race else None
    for ctas in np.split(np.arange(grid), waves):
        machine = Machine(config, ctas.tolist())
        ranges.prepare([(params.ctypes.data, params.ctypes.data + params.nbytes)]
                       + [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in machine.symbols.local_arrays])  # fmt: skip
        machine.attach(*observers, *([] if races is None else [races.detector(machine)]))
        machine.run()
    return machine


def run(body, inputs=(), outputs=(), **options):
    """Run a snippet. ``inputs`` are arrays, ``outputs`` arrays that give shape, dtype and initial contents.

    Returns the outputs after the run (one array if there is one).
    """
    text_options = {k: options.pop(k) for k in ("declarations", "target", "params") if k in options}
    inputs, outputs = [aligned(x) for x in inputs], [aligned(x) for x in outputs]
    text = kernel_text(body, len(inputs), len(outputs), **text_options)
    launch(text, [*inputs, *outputs], **options)
    return outputs[0] if len(outputs) == 1 else outputs


_REGISTER = {1: ("%rs", "u8"), 2: ("%rs", "b16"), 4: ("%r", "b32"), 8: ("%rd", "b64")}


def elementwise(instruction, arrays, out_dtype, *, target="sm_90a"):
    """Apply an instruction to each element: ``{d}`` is the result, ``{a}``, ``{b}``, ``{c}``, ``{e}``, ``{f}`` are the
    operands.

    A bool ``out_dtype`` makes ``{d}`` a predicate. Arrays are flat and of equal length, at most 1024 elements.
    """
    count = len(arrays[0])
    assert count <= 1024 and all(len(x) == count for x in arrays)
    lines, names = [], {}
    for i, (name, array) in enumerate(zip("abcef"[: len(arrays)], arrays, strict=True)):
        size = array.dtype.itemsize
        prefix, kind = _REGISTER[size]
        names[name] = f"{prefix}{i + 1}"
        lines.append(f"mad.wide.u32 %rd{20 + i}, %t, {size}, %in{i};")
        lines.append(f"ld.global.{kind} {names[name]}, [%rd{20 + i}];")
    predicate = out_dtype is bool
    out_dtype = np.dtype(np.uint32 if predicate else out_dtype)
    size = out_dtype.itemsize
    prefix, kind = _REGISTER[size]
    names["d"] = "%p1" if predicate else f"{prefix}40"
    lines.append(instruction.format(**names))
    if predicate:
        lines.append("selp.u32 %r40, 1, 0, %p1;")
    lines.append(f"mad.wide.u32 %rd30, %t, {size}, %out0;")
    lines.append(f"st.global.{kind} [%rd30], {prefix}40;")
    out = np.zeros(count, out_dtype)
    result = run("\n".join("  " + x for x in lines), arrays, [out], threads=count, target=target)
    return result.astype(bool) if predicate else result


def same_bits(a, b):
    """Assert equal bits; NaNs of any payload are equal."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    bits = np.dtype(f"u{a.dtype.itemsize}")
    different = a.view(bits) != b.view(bits)
    if a.dtype.kind == "f":
        different &= ~(np.isnan(a) & np.isnan(b))
    if different.any():
        at = np.flatnonzero(different.ravel())[:8]
        raise AssertionError(f"{different.sum()} of {a.size} differ, first at {at}: {a.ravel()[at]} != {b.ravel()[at]}")

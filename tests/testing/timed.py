"""Small PTX kernels as text, run in the simulator, recorded, and ready to be replayed with a GPU's constants."""

from __future__ import annotations

import re

import numpy as np

from ptxsim.timing.gpus import load
from ptxsim.timing.recorder import Recorder
from ptxsim.timing.replay import TimedLaunch
from tests.testing import ptx

H100, A100 = load("h100"), load("a100")


def timed(body, inputs=(), outputs=(), *, declarations="", target="sm_90a", **options):
    """A snippet as ``ptx.run`` takes it, recorded, with its machine code."""
    return TimedLaunch(recorded(body, inputs, outputs, declarations=declarations, target=target, **options))


def recorded(body, inputs=(), outputs=(), *, declarations="", target="sm_90a", **options):
    """The recording of a snippet."""
    arrays = [ptx.aligned(x) for x in (*inputs, *outputs)]
    text = ptx.kernel_text(body, len(inputs), len(outputs), declarations=declarations, target=target)
    recorder = Recorder()
    ptx.launch(text, arrays, observers=[recorder], **options)
    (recording,) = recorder.recordings
    return recording


def issued(launch, replay, warp, opcode):
    """When a warp issued the instructions of an opcode with its modifiers, which a regular expression finds."""
    span = slice(*launch.offsets[warp : warp + 2])
    names = [".".join((i.opcode, *i.modifiers)) for i in launch.code.instructions]
    found = [k for k, row in enumerate(launch.rows[span, 0]) if row >= 0 and re.match(opcode, names[row])]
    return replay.issued[span][found]


def gaps(launch, gpu, opcode, warp=0, **options):
    """Cycles between such instructions of a warp."""
    replay = launch.replay(gpu, times=True, **options)
    return np.diff(issued(launch, replay, warp, opcode)).tolist()


def chains(instruction, count, steps, *, start="", first=10):
    """``steps`` times an instruction on each of ``count`` accumulators, ``{d}``; %f2 … %f5 are numbers, and what the
    accumulators hold in the end is stored, so that nothing is left out."""
    registers = [f"%f{first + k}" for k in range(count)]
    begin = "cvt.rn.f32.u32 %f1, %t;" + "".join(f"add.f32 %f{k}, %f1, 0f3F00000{k};" for k in range(2, 6))
    begin += "".join(f"add.f32 {r}, %f1, 0f3E0000{k:02x};" for k, r in enumerate(registers))
    body = "".join(instruction.format(d=r, k=k) for _ in range(steps) for k, r in enumerate(registers))
    end = "".join(f"add.f32 %f1, %f1, {r};" for r in registers)
    return begin + start + body + end + "mad.wide.u32 %rd1, %g, 4, %out0; st.global.f32 [%rd1], %f1;"

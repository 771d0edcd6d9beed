"""Static figures of compiled CUDA kernels, read from their SASS. Needs no GPU.

``report_cubin`` gives, for every kernel of a cubin, its resources and the instruction mix of its hot loops, with a
crude bound model. The figure to compare is *per score*: the non-tensor instructions per thread and element of S = QKᵀ
in the steady-state loop.
"""

from perf.sass.metrics import KernelReport, LoopReport, add_per_score, attention_report, report_cubin
from ptxsim.timing.cubin import assemble_ptx, disassemble, kernel_resources

__all__ = [
    "KernelReport",
    "LoopReport",
    "add_per_score",
    "assemble_ptx",
    "attention_report",
    "disassemble",
    "kernel_resources",
    "report_cubin",
]

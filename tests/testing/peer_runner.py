"""Runs third-party kernels in the simulator, in a process of their own: ``python -m tests.testing.peer_runner ARCH``.

Reads a JSON list of jobs from standard input and writes one JSON object a job to standard output, in order. Started by
``tests.testing.peers``.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import sys
import time

import ptxsim
from ptxsim.host import programs, simulation
from ptxsim.host.posing import posing
from tests.testing import quack_jobs
from tests.testing.faults import plan
from tests.testing.fence_faults import plan_fences


def reference(q, k, v, causal):
    """softmax(q·kᵀ/√d)·v in fp32 and the natural-log LSE; causal is aligned to the bottom right. Shapes: q (batch,
    seqlen_q, heads, d), k and v (batch, seqlen_k, heads_kv, d); out like q, lse (batch, heads, seqlen_q)."""
    import torch

    q, k, v = (x.float() for x in (q, k, v))
    ratio = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(ratio, 2), v.repeat_interleave(ratio, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if causal:
        seqlen_q, seqlen_k = scores.shape[-2:]
        hidden = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).triu(seqlen_k - seqlen_q + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), v), torch.logsumexp(scores, -1)


class Attention:
    """One forward problem of FlashAttention-4, its inputs and the reference's answer."""

    def __init__(self, arch, *, batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, causal, dtype, seed=0):
        import torch

        self.arch, self.causal = int(arch.strip("sm_a")), causal
        torch.manual_seed(seed)
        shapes = (seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv)
        self.q, self.k, self.v = (torch.randn(batch, s, h, head_dim).to(getattr(torch, dtype)) for s, h in shapes)
        self.expected, self.expected_lse = reference(self.q, self.k, self.v, causal)

    def outputs(self):
        """(O, LSE); O starts as NaN."""
        import torch
        from flash_attn.cute.interface import _flash_attn_fwd

        out = torch.full_like(self.q, float("nan"))
        lse = _flash_attn_fwd(self.q, self.k, self.v, causal=self.causal, _arch=self.arch, return_lse=True, out=out)[1]
        return out, lse

    def run(self):
        """(largest error of O, largest error of LSE)."""
        out, lse = self.outputs()
        return (out.float() - self.expected).abs().max().item(), (lse - self.expected_lse).abs().max().item()


def attention(arch, modes, **problem):
    """Errors of FlashAttention-4's forward in each mode (late, seed, race)."""
    case = Attention(arch, **problem)
    return {"errors": [_in_mode(mode, case.run) for mode in modes]}


def backward(arch, modes, repaired=False, **problem):
    """Errors of FlashAttention-4's dQ, dK and dV in each mode; ``repaired``: with ``_repaired`` PTX."""
    from flash_attn.cute.interface import _flash_attn_bwd

    case = Attention(arch, **problem)
    out, lse, dout, exact = _gradients(case)

    def run():
        ours = _flash_attn_bwd(case.q, case.k, case.v, out, dout, lse, causal=case.causal)[:3]
        return _errors(ours, exact)

    with _repairing() if repaired else contextlib.nullcontext():
        return {"errors": _outcomes(modes, run)}


def bits(arch, modes, **problem):
    """Digests of O, LSE, dQ, dK and dV of FlashAttention-4's forward and its deterministic backward, repaired, in each
    mode (SMs, late, seed), and the last one's errors."""
    import torch
    from flash_attn.cute.interface import _flash_attn_bwd

    case = Attention(arch, **problem)
    out, lse, dout, exact = _gradients(case)

    def run():
        given = case.q, case.k, case.v, out, dout, lse
        return *case.outputs(), *_flash_attn_bwd(*given, causal=case.causal, deterministic=True)[:3]

    found = []
    with _repairing():
        for sms, late, seed in modes:
            os.environ["FLASH_ATTENTION_NUM_SMS"] = str(sms)  # read at each call
            tensors = _in_mode((late, seed, False), run)
            raw = [x.contiguous().view(torch.uint8).numpy().tobytes() for x in tensors]
            found.append([hashlib.sha256(x).hexdigest() for x in raw])
    return {"bits": found, "errors": _errors(tensors, (case.expected, case.expected_lse, *exact))}


@contextlib.contextmanager
def _repairing():
    """Kernels run as ``_repaired`` makes them."""
    load_program = programs.load_program
    programs.load_program = lambda text, name: load_program(_repaired(text), name)
    try:
        yield
    finally:
        programs.load_program = load_program


def training(arch, modes, **problem):
    """Errors of O, dQ, dK and dV in each mode where torch's autograd calls FlashAttention-4's backward."""
    from flash_attn.cute import flash_attn_func

    case = Attention(arch, **problem)
    expected, _, dout, exact = _gradients(case)

    def run():
        leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
        out = flash_attn_func(*leaves, causal=case.causal)[0]
        out.backward(dout)
        return _errors([out, *(leaf.grad for leaf in leaves)], [expected, *exact])

    return {"errors": [_in_mode(mode, run) for mode in modes]}


def _gradients(case):
    """The reference's O in the problem's dtype, its LSE, a random dO, and the gradients of q, k and v."""
    import torch

    exact = [x.float().requires_grad_() for x in (case.q, case.k, case.v)]
    out, lse = reference(*exact, case.causal)
    dout = torch.randn(out.shape).to(case.q.dtype)
    gradients = torch.autograd.grad(out, exact, dout.float())
    return out.detach().to(case.q.dtype), lse.detach().contiguous(), dout, gradients


def _errors(ours, exact):
    return [(x.detach().float() - y.float()).abs().max().item() for x, y in zip(ours, exact, strict=True)]


def _repaired(ptx):
    """Without what the simulator refuses in the backward for sm_100: the warps of a warpgroup give up registers to
    different counts, and nobody waits for the last bulk stores of dK and dV."""
    counts = re.findall(r"setmaxnreg\.dec\S*\s+(\d+);", ptx)
    ptx = re.sub(r"(setmaxnreg\.dec\S*\s+)24;", rf"\g<1>{max(counts, key=int, default='')};", ptx)
    parts = re.split(r"(cp\.(?:reduce\.)?async\.bulk\.[\w.:]*global\.shared::cta[^;]*;)", ptx)
    for n in range(1, len(parts), 2):
        if "cp.async.bulk.commit_group" not in parts[n + 1]:
            parts[n] += " cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;"
    return "".join(parts)


def _outcomes(modes, run):
    """What the function gives in each mode, or the error that the simulator raises."""
    seen = []
    for mode in modes:
        try:
            seen.append(_in_mode(mode, run))
        except ptxsim.SimError as error:
            seen.append(f"{type(error).__name__}: {error.message}")
    return seen


def quack(arch, modes, kernel, **problem):
    """Errors of the results of a function of ``quack_jobs`` in each mode."""
    import torch

    torch.manual_seed(0)
    return {"errors": getattr(quack_jobs, kernel)(lambda run: _outcomes(modes, run), **problem)}


def faults(arch, modes, kinds, per_kind, seed, **problem):
    """Plant faults in the forward kernel: at most ``per_kind`` sites of each kind, a seeded choice. For each fault,
    what became of it in the modes, up to the first in which it was noticed: an error's name or the error of O."""
    case = Attention(arch, **problem)
    baseline = [_in_mode(mode, case.run)[0] for mode in modes]
    load_program = programs.load_program
    ptx = simulation._kernels[max(simulation._kernels)].ptx
    planned = [fault for fault in [*plan(ptx), *plan_fences(ptx)] if fault.kind in kinds]
    chosen = [fault for kind in kinds for fault in _sample([f for f in planned if f.kind == kind], per_kind, seed)]
    result = {}
    for fault in chosen:
        damaged = fault.plant(ptx)
        programs.load_program = lambda text, name, damaged=damaged: load_program(damaged if text == ptx else text, name)
        result[str(fault)] = seen = []
        for mode in modes:
            try:
                seen.append(_in_mode(mode, case.run)[0])
            except ptxsim.SimError as error:
                seen.append(type(error).__name__)
            if isinstance(seen[-1], str) or not seen[-1] < 0.02:
                break
    programs.load_program = load_program
    return {"baseline": baseline, "faults": result}


def _sample(values, count, seed):
    return random.Random(seed).sample(values, min(count, len(values)))


def _in_mode(mode, function):
    simulation = ptxsim.current()
    simulation.late, simulation.schedule_seed, simulation.race = mode
    return function()


JOBS = {"attention": attention, "backward": backward, "bits": bits, "training": training, "quack": quack,
        "faults": faults}  # fmt: skip


def main(arch):
    jobs = json.load(sys.stdin)
    with ptxsim.simulate(arch) as simulation, posing(simulation):
        for job in jobs:
            started = time.perf_counter()
            simulation.launches.clear()
            try:
                result = JOBS[job.pop("job")](arch, **job)
            except Exception as error:
                result = {"raised": f"{type(error).__name__}: {error}"}
            result["launches"] = [launch.name for launch in simulation.launches]
            result["seconds"] = time.perf_counter() - started
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

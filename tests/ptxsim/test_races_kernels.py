"""The race detector on kernels of the DSL: Python lines in a report; nothing to report about this project's kernels."""

import cutlass
import cutlass.cute as cute
import pytest
import torch
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

import cute_fa
import ptxsim
from cute_fa.semantics.reference import attention as reference


class Colliding:
    """Threads t and t + 32 write the same element."""

    @cute.jit
    def __call__(self, a: cute.Tensor, b: cute.Tensor, stream):
        self.kernel(a, b).launch(grid=(1, 1, 1), block=(64, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, a: cute.Tensor, b: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        b[thread % 32] = a[thread]  # the racing line


def test_python_lines():
    with open(__file__) as source:
        line = next(n for n, text in enumerate(source, 1) if text.endswith("# the racing line\n"))
    tensors = [make_fake_tensor(cutlass.Float32, (64,), stride=(1,)) for _ in range(2)]
    with ptxsim.simulate("sm_80", race=True) as simulation:
        function = cute.compile(Colliding(), *tensors, make_fake_stream(use_tvm_ffi_env_stream=True),
                                options="--enable-tvm-ffi --generate-line-info")  # fmt: skip
        with pytest.raises(ptxsim.RaceError, match=r"write of global memory .* not ordered after the write") as found:
            simulation.call(function, torch.arange(64.0), torch.zeros(64))
        assert found.value.message.count(f"({__file__}:{line})") == 2
        simulation.race = False
        simulation.call(function, torch.arange(64.0), torch.zeros(64))


CASES = {
    "sm_80": [
        {"seqlens": (200, 333), "heads": (4, 1), "head_dim": 128, "causal": True},
        {"seqlens": (130, 130), "heads": (2, 2), "head_dim": 64},
    ],
    "sm_90a": [
        {"seqlens": (200, 333), "heads": (4, 1), "head_dim": 128, "causal": True, "persistent": "on"},
        {"seqlens": (300, 300), "heads": (4, 2), "head_dim": 64, "causal": True, "pack_gqa": True},
        {"seqlens": (130, 450), "heads": (2, 2), "head_dim": 256, "window_size": (100, 0)},
    ],
}


@pytest.mark.sampled
@pytest.mark.parametrize(("arch", "case"), [(arch, n) for arch in CASES for n in range(len(CASES[arch]))])
def test_own_kernels(arch, case):
    """Clean, and right: 2 SMs, so that persistent CTAs use every buffer again."""
    options = dict(CASES[arch][case])
    (seqlen_q, seqlen_k), (heads, heads_kv), head_dim = (options.pop(k) for k in ("seqlens", "heads", "head_dim"))
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, n, h, head_dim).bfloat16()
        for n, h in ((seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv))
    )
    with cute_fa.simulate(arch, num_sms=2, race=True) as simulation:
        out = cute_fa.flash_attn_func(q, k, v, **options)
        assert simulation.race
        assert simulation.launches
    options = {name: value for name, value in options.items() if name in ("causal", "window_size")}
    expected, _ = reference(q, k, v, **options)
    assert (out.float() - expected).abs().max() < 0.02

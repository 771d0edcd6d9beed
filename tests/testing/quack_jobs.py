"""Jobs of ``peer_runner`` that run quack's kernels: largest errors against torch in fp32, of each result in each mode.

Rows fill whole tiles but where a test wants otherwise: for missing ones quack reads shared memory that nothing wrote,
and drops what it computes from it. With more than 16384 columns a row is spread over a cluster, whose CTAs reduce
through st.async.
"""

import torch


def _largest(pairs):
    return [(ours.float() - expected.detach()).abs().max().item() for ours, expected in pairs]


def softmax(outcome, rows, columns, dtype):
    """Softmax and its gradient."""
    from quack.softmax import softmax_bwd, softmax_fwd

    x = (torch.randn(rows, columns) * 4).to(getattr(torch, dtype))
    dy = torch.randn(rows, columns).to(x.dtype)
    exact = x.float().requires_grad_()
    expected = torch.softmax(exact, -1)
    expected.backward(dy.float())

    def run():
        y = softmax_fwd(x)
        return _largest([(y, expected), (softmax_bwd(dy, y), exact.grad)])

    return outcome(run)


def rmsnorm(outcome, rows, columns, dtype):
    """RMS norm with fp32 weights, and its gradients of the input and of the weights."""
    from quack.rmsnorm import rmsnorm_bwd, rmsnorm_fwd

    x, dy = (torch.randn(rows, columns).to(getattr(torch, dtype)) for _ in range(2))
    weight = torch.randn(columns)
    exact, exact_weight = x.float().requires_grad_(), weight.clone().requires_grad_()
    expected = torch.nn.functional.rms_norm(exact, (columns,), exact_weight, 1e-6)
    expected.backward(dy.float())

    def run():
        y, _, rstd = rmsnorm_fwd(x, weight, store_rstd=True)[:3]
        dx, dw = rmsnorm_bwd(x, weight, dy, rstd)[:2]
        return _largest([(y, expected), (dx, exact.grad), (dw, exact_weight.grad)])

    return outcome(run)


def cross_entropy(outcome, rows, columns, dtype):
    """Cross entropy of each row and its gradient."""
    from quack.cross_entropy import cross_entropy_bwd, cross_entropy_fwd

    x = (torch.randn(rows, columns) * 2).to(getattr(torch, dtype))
    target = torch.randint(0, columns, (rows,))
    exact = x.float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, target, reduction="none")
    expected.sum().backward()

    def run():
        loss, lse = cross_entropy_fwd(x, target, return_lse=True)[:2]
        dx = cross_entropy_bwd(x, target, torch.ones(rows), lse)
        return _largest([(loss, expected), (dx, exact.grad)])

    return outcome(run)


def gemm(outcome, m, n, k, dtype):
    """a (m, k) times b (k, n), in quack's default configuration."""
    from quack.gemm_interface import gemm

    a, b = (torch.randn(*shape).to(getattr(torch, dtype)) for shape in ((m, k), (k, n)))
    expected = a.float() @ b.float()
    return outcome(lambda: _largest([(gemm(a, b, tuned=False), expected)]))

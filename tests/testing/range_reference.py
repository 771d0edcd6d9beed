"""Attention over a dense mask in plain torch, all features of range plans and their gradients: what their kernels are
compared with, by the rule of ``cute_fa.semantics.reference``, and inputs for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from cute_fa.semantics.reference import LSE_TOLERANCE, Comparison, Error, _largest_error

if TYPE_CHECKING:
    from tests.testing.range_walks import Ranges

_NAMES = {"q": "dq", "k": "dk", "v": "dv", "alibi_slopes": "dalibi", "learnable_sink": "dsink"}


@dataclass(frozen=True)
class RangeInputs:
    """q (total_q, heads, d), k, v (total_k, heads_kv, d | d_v), ``mask`` bool (total_q, total_k), the features, and the
    gradients that come in: dout like O, dlse fp32 (heads, total_q) or None for none."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    q_positions: torch.Tensor | None = None
    k_positions: torch.Tensor | None = None
    learnable_sink: torch.Tensor | None = None

    @classmethod
    def make(
        cls,
        ranges: Ranges,
        heads: tuple[int, int] = (2, 1),
        head_dims: tuple[int, int] = (64, 64),
        dtype: torch.dtype = torch.bfloat16,
        *,
        peaked: bool = False,
        alibi: bool = False,
        positions: bool = False,
        sink: bool = False,
        lse_gradient: bool = True,
        seed: int = 0,
        **options: float,
    ) -> RangeInputs:
        """Random ones. ``peaked``: each query's scores single out a few of the keys that stand for it, and of the keys
        it must not see as many, with values that tell keys apart."""
        rng = torch.Generator().manual_seed(seed)
        (h, g), (d, d_v), rows, keys = heads, head_dims, ranges.total_q, ranges.total_k

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=rng)

        q, k, v, dout = normal(rows, h, d), normal(keys, g, d), normal(keys, g, d_v), normal(rows, h, d_v)
        if peaked:
            k *= 4.0
            v = torch.where(v < 0, -1.0, 1.0)
        fields = {}
        if alibi:
            fields["alibi_slopes"] = 0.02 * torch.rand(h, generator=rng) + 0.002
        if positions:
            draw = [torch.randint(-300, 300, (n,), generator=rng, dtype=torch.int32) for n in (rows, keys)]
            fields |= dict(zip(("q_positions", "k_positions"), draw, strict=True))
        if sink:
            fields["learnable_sink"] = 2.0 * normal(h)
        dlse = normal(h, rows) if lse_gradient else None
        tensors = (t.to(dtype) for t in (q, k, v))
        return cls(*tensors, torch.from_numpy(ranges.mask()), dout.to(dtype), dlse, **fields, **options)

    def options(self) -> dict:
        """Keyword arguments of ``cute_fa.range_attention``."""
        names = ("softmax_scale", "softcap", "alibi_slopes", "q_positions", "k_positions", "learnable_sink")
        return {name: getattr(self, name) for name in names}

    def variables(self) -> dict[str, torch.Tensor]:
        """What has a gradient, by name."""
        return {name: getattr(self, name) for name in _NAMES if getattr(self, name) is not None}

    def on(self, device: str) -> RangeInputs:
        """The same on a device."""
        tensors = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, torch.Tensor)}
        return replace(self, **tensors)

    def requiring_gradients(self) -> RangeInputs:
        """The same with copies of the variables that require gradients."""
        return replace(self, **{name: t.clone().requires_grad_() for name, t in self.variables().items()})

    def attention(self, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
        """(out (total_q, heads, d_v), lse (heads, total_q)). A ``dtype`` of 16 bits rounds what a plain implementation
        would store in it, forward and backward: scores, probabilities, O and their gradients."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        h = self.q.shape[1]
        q = self.q.to(compute)
        k, v = (t.to(compute).repeat_interleave(h // t.shape[1], 1) for t in (self.k, self.v))
        scale = self.q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale

        def rounded(x: torch.Tensor) -> torch.Tensor:
            return x if dtype == compute else _Rounded.apply(x, dtype)

        s = rounded(rounded(torch.einsum("ihd,jhd->hij", q, k)) * scale)
        if self.softcap:
            s = rounded(self.softcap * rounded(torch.tanh(s / self.softcap)))
        if self.alibi_slopes is not None:
            # slopes may come as (heads, total_q, total_k): the gradient then has its terms apart
            slopes = self.alibi_slopes.to(compute)
            s = s - (slopes if slopes.dim() == 3 else slopes[:, None, None]) * self.distance().to(compute)
        sink = torch.full((h, q.shape[0]), -torch.inf, dtype=compute, device=q.device)
        if self.learnable_sink is not None:
            own = self.learnable_sink.to(compute)
            sink = own if own.dim() == 2 else own[:, None].expand(h, q.shape[0])
        # hidden scores take no part, not even as an exponential that overflows
        shown = s.detach().masked_fill(~self.mask, -torch.inf)
        largest = torch.maximum(shown.amax(-1) if s.shape[-1] else torch.full_like(sink, -torch.inf), sink.detach())
        largest = largest.masked_fill(largest == -torch.inf, 0.0)
        weights = torch.exp(torch.where(self.mask, s, largest[..., None]) - largest[..., None]) * self.mask
        total = weights.sum(-1) + torch.exp(sink - largest)
        empty = total == 0
        total = total.masked_fill(empty, 1.0)
        lse = torch.where(empty, -torch.inf, largest + total.log())
        out = rounded(torch.einsum("hij,jhd->ihd", rounded(weights / total[..., None]), v))
        return out, lse

    def distance(self) -> torch.Tensor:
        """(total_q, total_k): what ALiBi multiplies."""
        own = ((self.q, self.q_positions), (self.k, self.k_positions))
        i, j = (torch.arange(len(t), device=t.device) if given is None else given.long() for t, given in own)
        return (i[:, None] - j).abs()

    def check(self, out: torch.Tensor, lse: torch.Tensor) -> Comparison:
        """A kernel's result against fp64."""
        with torch.no_grad():
            (exact, exact_lse), (low, _) = self.attention(), self.attention(self.q.dtype)
        largest = exact.abs().max().item() if exact.numel() else 0.0
        allowed = 2.0 * _largest_error(low, exact) + torch.finfo(self.q.dtype).eps * largest
        return Comparison(_largest_error(out, exact), allowed, _largest_error(lse, exact_lse), LSE_TOLERANCE)

    def gradients(self, dtype: torch.dtype = torch.float64) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """By variable, and of slopes and sink √Σ terms²: the size of what is summed."""
        rows, keys, h = self.q.shape[0], self.k.shape[0], self.q.shape[1]
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        variables = {name: t.detach().to(compute) for name, t in self.variables().items()}
        if self.alibi_slopes is not None:
            variables["alibi_slopes"] = variables["alibi_slopes"][:, None, None].expand(h, rows, keys).clone()
        if self.learnable_sink is not None:
            variables["learnable_sink"] = variables["learnable_sink"][:, None].expand(h, rows).clone()
        variables = {name: t.requires_grad_() for name, t in variables.items()}
        out, lse = replace(self, **variables).attention(dtype)
        results, incoming = [out], [self.dout.to(compute)]
        if self.dlse is not None:
            results.append(lse)
            incoming.append(self.dlse.to(compute).masked_fill(lse == -torch.inf, 0.0))
        grads = dict(zip(variables, torch.autograd.grad(results, list(variables.values()), incoming), strict=True))
        sizes = {}
        for name in ("alibi_slopes", "learnable_sink"):
            if name in grads:
                terms = grads[name].flatten(1)
                sizes[name], grads[name] = terms.square().sum(1).sqrt(), terms.sum(1)
        return grads, sizes

    def check_gradients(self, actual: dict[str, torch.Tensor]) -> dict[str, Error]:
        """A kernel's gradients by variable against fp64; as for dalibi and dsink in ``cute_fa.semantics.reference``,
        what is one sum over everything is allowed the error of its terms."""
        exact, sizes = self.gradients()
        low, _ = self.gradients(self.q.dtype)
        errors = {}
        for name, right in exact.items():
            size = sizes.get(name, right.abs())
            largest = size.max().item() if size.numel() else 0.0
            rounded = low[name] if name in sizes else low[name].to(self.q.dtype)
            allowed = 2.0 * _largest_error(rounded, right) + torch.finfo(self.q.dtype).eps * largest
            errors[name] = Error(_largest_error(actual[name], right), allowed)
        return errors


class _Rounded(torch.autograd.Function):
    """To ``dtype`` and back, and so for the gradient."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad.to(ctx.dtype).to(grad.dtype), None

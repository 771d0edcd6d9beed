"""Draws which keys each query sees under five masks: python docs/draw_masks.py FIGURE.png

A dark cell is a visible key. What is drawn is what ``cute_fa.reference`` computes: with q = 0 every visible key has the
same weight, and with V the identity row i of the output holds the weights themselves.
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from cute_fa.semantics import reference

SEQLEN_Q, SEQLEN_K = 8, 12
MASKS = {
    "causal=True": {"causal": True},
    "window_size=(3, 0)": {"window_size": (3, 0)},
    "window_size=(2, 1)": {"window_size": (2, 1)},
    "window_size=(3, 0)\nsink_tokens=2": {"window_size": (3, 0), "sink_tokens": 2},
    "causal=True\ntwo packed sequences": {
        "causal": True,
        "cu_seqlens_q": torch.tensor([0, 3, 8], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 5, 12], dtype=torch.int32),
    },
}


def visible(options: dict) -> torch.Tensor:
    """(SEQLEN_Q, SEQLEN_K) of bool."""
    q, k, v = torch.zeros(SEQLEN_Q, 1, 8), torch.zeros(SEQLEN_K, 1, 8), torch.eye(SEQLEN_K)[:, None]
    if "cu_seqlens_q" not in options:
        q, k, v = q[None], k[None], v[None]
    out, _ = reference.attention(q, k, v, **options)
    return out.reshape(SEQLEN_Q, SEQLEN_K) > 0


def draw(figure: str) -> None:
    fig, panels = plt.subplots(1, len(MASKS), figsize=(13, 2.6), dpi=90)
    for axes, (title, options) in zip(panels, MASKS.items(), strict=True):
        axes.pcolormesh(visible(options), cmap="Blues", vmin=-0.15, vmax=1.4, edgecolor="white", linewidth=1.5)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.set_xticks([0.5, SEQLEN_K - 0.5], ["key 0", str(SEQLEN_K - 1)])
        axes.set_yticks([0.5, SEQLEN_Q - 0.5], ["query 0", str(SEQLEN_Q - 1)])
        axes.tick_params(length=0, labelsize=8)
        axes.spines[:].set_visible(False)
        axes.set_title(title, fontsize=9, family="monospace")
    fig.tight_layout()
    fig.savefig(figure)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    draw(sys.argv[1])

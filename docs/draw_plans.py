"""Draws the masks of docs/range_plans.md: python docs/draw_plans.py [FOLDER], by default docs/plans

A dark cell is a visible key, as ``HostRanges.mask`` has it. What is drawn of ready-made plans is the code shown there.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from cute_fa.api.ready_plans import (
    block_diagonal,
    causal_documents,
    chunked_local,
    hybrid_mtp_decode,
    prefix_lm,
    shared_prefix_tree,
    speculative_tree,
    streaming_llm,
    window_and_global,
)
from cute_fa.semantics.ranges import TYPE_NAMES, HostRanges

TYPES = {
    f"{kind}: {name}": HostRanges([[2, 8]], [[3, 12]], [kind], 10, 14)  # six queries, nine keys
    for kind, name in enumerate(TYPE_NAMES)
}
PLANS = {
    "causal_documents": causal_documents([7, 4, 9]),
    "block_diagonal": block_diagonal([7, 4, 9], [5, 8, 7]),
    "chunked_local": chunked_local(20, 20, chunk=8),
    "window_and_global": window_and_global(20, window=3, global_tokens=2),
    "streaming_llm": streaming_llm(20, 20, sink_tokens=2, window=5),
    "prefix_lm": prefix_lm(20, prefix=8),
    "shared_prefix_tree": shared_prefix_tree([6, 3, 3, 2, 4], [-1, 0, 1, 1, 0]),
    "speculative_tree": speculative_tree(8, 20, parents=[-1, 0, 1, 2, 1, 0, 5]),
    "hybrid_mtp_decode": hybrid_mtp_decode(past=[8, 5], new=[2, 1], window=4),
}


def draw(axes: plt.Axes, plan: HostRanges) -> None:
    axes.pcolormesh(plan.mask(), cmap="Blues", vmin=-0.15, vmax=1.4, edgecolor="white", linewidth=0.8)
    for (q_start, q_stop), (k_start, k_stop) in zip(plan.q_ranges, plan.k_ranges, strict=True):
        size = k_stop - k_start, q_stop - q_start
        frame = Rectangle((k_start, q_start), *size, fill=False, edgecolor="darkorange", linewidth=1.2, clip_on=False)
        axes.add_patch(frame)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.set_xticks([0.5, plan.total_k - 0.5], ["key 0", str(plan.total_k - 1)])
    axes.set_yticks([0.5, plan.total_q - 0.5], ["query 0", str(plan.total_q - 1)])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    fig, panels = plt.subplots(1, len(TYPES), figsize=(10, 2.2), dpi=80)
    for axes, (title, plan) in zip(panels, TYPES.items(), strict=True):
        draw(axes, plan)
        axes.set_title(title, fontsize=9, family="monospace")
    fig.tight_layout()
    fig.savefig(folder / "types.png")
    for name, plan in PLANS.items():
        fig, axes = plt.subplots(figsize=(3.2, 3.2 * plan.total_q / plan.total_k + 0.3), dpi=80)
        draw(axes, plan)
        fig.tight_layout()
        fig.savefig(folder / f"{name}.png")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]) if len(sys.argv) == 2 else Path(__file__).parent / "plans")

"""Range plans that a sweep times: by name, of so many tokens, queries and keys alike. No pair is named twice, since
MagiAttention would count it twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from cute_fa.api.ready_plans import causal_documents, shared_prefix_tree, streaming_llm, window_and_global
from cute_fa.semantics.ranges import BOTH, HostRanges

_WINDOW, _FIRST_TOKENS = 1024, 64
_CELLS_PER_RANGE = 8


def _documents(tokens: int) -> HostRanges:
    """Of lengths up to a quarter of the tokens, all equally likely."""
    rng, lengths = np.random.default_rng(tokens), []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(int(rng.integers(1, max(tokens // 4, 1) + 1)), left))
    return causal_documents(lengths)


def _prefix_tree(tokens: int) -> HostRanges:
    """A prompt, four continuations of it and four of each of these, of 4 : 1 : ½; the last one has what is left."""
    lengths = [max(tokens // share, 1) for share in (4, *[16] * 4, *[32] * 16)]
    lengths[-1] += tokens - sum(lengths)
    return shared_prefix_tree(lengths, [-1, *[0] * 4, *[1 + i // 4 for i in range(16)]])


def _random(count: int, tokens: int) -> HostRanges:
    """Cells of a grid whose lines are drawn, one in eight, of any type."""
    rng = np.random.default_rng(count)
    parts = math.ceil(math.sqrt(_CELLS_PER_RANGE * count))
    lines = [np.sort(rng.integers(0, tokens + 1, parts - 1)) for _ in range(2)]
    rows, columns = (np.lib.stride_tricks.sliding_window_view(np.r_[0, cuts, tokens], 2) for cuts in lines)
    row, column = np.divmod(rng.choice(parts * parts, count, replace=False), parts)
    return HostRanges(rows[row], columns[column], rng.integers(0, BOTH + 1, count), tokens, tokens)


PLANS: dict[str, Callable[[int], HostRanges]] = {
    "documents": _documents,
    "window-global": lambda tokens: window_and_global(tokens, min(_WINDOW, tokens), min(_FIRST_TOKENS, tokens)),
    "prefix-tree": _prefix_tree,
    "streaming-llm": lambda tokens: streaming_llm(tokens, tokens, min(_FIRST_TOKENS, tokens), _WINDOW),
    **{f"random-{count}": partial(_random, count) for count in (10, 100, 1000)},
}


def keys_of(plan: HostRanges) -> int:
    """How many keys some query sees."""
    (q_start, q_stop), (k_start, k_stop) = plan.q_ranges.T, plan.k_ranges.T
    sees = (q_stop > q_start) & ~((plan.types == BOTH) & (k_stop - k_start < q_stop - q_start))
    steps = np.zeros(plan.total_k + 1, np.int64)
    np.add.at(steps, k_start[sees], 1)
    np.add.at(steps, k_stop[sees], -1)
    return int((steps.cumsum() > 0).sum())

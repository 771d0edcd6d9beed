"""How many tiles of queries a problem has, how many CTAs compute them, and how many heads share the L2 cache.

What the host tells the kernels' tile schedulers (``cute_fa.device.tile_scheduler``): plain numbers, without the DSL.
"""

MAX_TILES = 2**31 - 1  # of a grid in x, and what the schedulers count to

# What many tiles read again (forward: K and V) gets this share of the L2 cache, everything else the rest: 32 MB of the
# H100's 50 MB, as in the persistent scheduler of the FlashAttention-3 repository.
_SHARE = 0.64


def ceil_div(dividend: int, divisor: int) -> int:
    """Quotient of two whole numbers, rounded up."""
    return -(-dividend // divisor)


def dense_tiles(seqlen_q: int, tile_tokens: int, heads: int, batches: int) -> int:
    """Tiles of ``batches`` · ``heads`` equally long sequences; a tile has ``tile_tokens`` tokens."""
    return ceil_div(seqlen_q, tile_tokens) * heads * batches


def packed_tiles(total_q: int, tile_tokens: int, heads: int, batches: int) -> int:
    """Upper bound of the tiles of packed sequences whose lengths only the device knows.

    Of ``batches`` sequences with ``total_q`` tokens together at most min(batches, total_q) are not empty, and one of
    l tokens has ⌈l / t⌉ ≤ (l + t − 1) / t tiles of t = ``tile_tokens``. Sequences of n·t + 1 tokens reach the bound.
    """
    return (total_q + min(batches, total_q) * (tile_tokens - 1)) // tile_tokens * heads


def num_ctas(tiles: int, num_sms: int, persistent: bool) -> int:
    """CTAs to launch in x for that many tiles: one a tile, or for persistent CTAs at most one an SM."""
    return min(tiles, num_sms) if persistent else tiles


def head_group(bytes_per_head: int, l2_bytes: int, heads_per_kv: int = 1) -> int:
    """Heads whose tiles are computed together so that what these share stays in an L2 cache of ``l2_bytes``: ≥ 1.

    ``bytes_per_head``: K and V of one kv head of the longest sequence (backward: :func:`backward_row_bytes` of each row
    of its query heads); ``heads_per_kv``: heads with tiles of their own that read the same K and V (the GQA ratio; 1
    where query heads are packed). Idea: the LPT scheduler of the FlashAttention repository.
    """
    fitting = int(_SHARE * l2_bytes) // max(bytes_per_head, 1)
    return min(max(fitting, 1) * heads_per_kv, MAX_TILES)


def backward_row_bytes(head_dim: int, head_dim_v: int, element: int) -> int:
    """What a row of queries of a head has in the L2 cache while tiles of keys meet it: Q and dO, ``element`` bytes a
    number, and the fp32 sums of dQ."""
    return (head_dim + head_dim_v) * element + head_dim * 4

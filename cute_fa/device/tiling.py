"""How many tiles of queries a problem has, how many CTAs compute them, and how many heads share the L2 cache.

What the host tells the kernels' tile schedulers (``cute_fa.device.tile_scheduler``): plain numbers, without the DSL.
"""

MAX_TILES = 2**31 - 1  # of a grid in x, and what the schedulers count to

# K and V get this share of the L2 cache, Q, O and everything else the rest: 32 MB of the H100's 50 MB, as in the
# persistent scheduler of the FlashAttention-3 repository.
_KV_SHARE = 0.64


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
    """Heads whose tiles are computed together so that their keys and values stay in an L2 cache of ``l2_bytes``: ≥ 1.

    ``bytes_per_head``: K and V of one kv head of the longest sequence; ``heads_per_kv``: heads with tiles of their own
    that read the same K and V (the GQA ratio; 1 where query heads are packed). Idea: the LPT scheduler of the
    FlashAttention repository.
    """
    fitting = int(_KV_SHARE * l2_bytes) // max(bytes_per_head, 1)
    return min(max(fitting, 1) * heads_per_kv, MAX_TILES)

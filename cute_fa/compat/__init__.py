"""The signatures of FlashAttention 2, 3 and 4, each with its own positional order, defaults and return values.

Values follow cute_fa's meaning (``cute_fa.reference``). It differs from a peer's in two places: a row without visible
keys has LSE −inf, where FA2 gives +inf; a window of (−1, 0) is causal attention, where FA4 gives full attention.
"""

from cute_fa.compat import fa2, fa3, fa4

__all__ = ["fa2", "fa3", "fa4"]

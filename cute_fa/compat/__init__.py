"""The signatures of FlashAttention 2, 3 and 4, each with its own positional order, defaults and return values, and of
FlashInfer's append and merge.

Values follow cute_fa's meaning (``cute_fa.reference``), which differs from a peer's in one place: a row without visible
keys has LSE −inf, where FA2 gives +inf. A window means in each module what it means to the peer: −1 is infinite in
``fa2`` and ``fa3``; in ``fa4`` None is, two negative bounds are full attention, and any other bound is literal, so that
(None, −1) hides the diagonal and what lies right of it, and (−1, 0) everything.
"""

from cute_fa.compat import fa2, fa3, fa4, flashinfer

__all__ = ["fa2", "fa3", "fa4", "flashinfer"]

"""A ring of tiles as data: what a config says of its pipelines. No DSL."""

from __future__ import annotations

from dataclasses import dataclass

# Of the tiles that a running cluster takes over (``cute_fa.device.tile_handout``): an answer, and how many at a time.
RESPONSE_BYTES = 16
HANDOUT_STAGES = 2


@dataclass(frozen=True)
class PipelineSpec:
    """One ring of tiles in shared memory between the loader and the consumers.

    ``name``: what it carries; ``stages``: tiles in the ring; ``stage_bytes``: what the TMA copies of one
    stage deliver, 0 where warps write it; ``consumer_warps``: warps that release a stage, one arrival each;
    ``producer_warps``: warps that fill one. ``shared``: by a cluster, whose warps all arrive at the barriers of its
    first CTA. ``ctas``: of a cluster that have the same tile, of which each brings its part to all: a stage's consumers
    are those of all of them, and release it in each.
    ``copying_lanes``: lanes of a warp whose own copies (cp.async) fill a part.
    """

    name: str
    stages: int
    stage_bytes: int
    consumer_warps: int
    producer_warps: int = 1
    shared: bool = False
    ctas: int = 1
    copying_lanes: int = 0

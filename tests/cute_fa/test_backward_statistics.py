"""Where a backward's preprocessing kernel puts the LSE and D of a query."""

from types import SimpleNamespace

import pytest

from cute_fa.device.backward_preprocess import statistics_place


@pytest.mark.parametrize("tile_m", [32, 64, 128])
def test_rows_are_one_after_the_other(tile_m):
    config = SimpleNamespace(tile_m=tile_m, statistics="rows")
    assert [statistics_place(config, place) for place in range(tile_m)] == list(range(tile_m))


@pytest.mark.parametrize("tile_m", [64, 128])
def test_wgmma_has_what_a_thread_of_the_accumulator_reads(tile_m):
    """Register 4·b + 2·h + e of thread t of Sᵀ = K·Qᵀ is of query 8·b + 2·(t mod 4) + e, in key t // 4 + 8·h (PTX ISA,
    matrix fragments of wgmma with D of n columns). Blocks 2·p and 2·p + 1: e of either one, four numbers in a row from
    16·p + 4·(t mod 4)."""
    config = SimpleNamespace(tile_m=tile_m, statistics="wgmma")
    queries = {statistics_place(config, query): query for query in range(tile_m)}
    assert sorted(queries) == list(range(tile_m))
    for lane in range(4):
        for pair in range(tile_m // 16):
            first = 16 * pair + 4 * lane
            own = [8 * block + 2 * lane + e for block in (2 * pair, 2 * pair + 1) for e in (0, 1)]
            assert [queries[first + i] for i in range(4)] == own

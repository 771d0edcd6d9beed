"""Where a backward's preprocessing kernel puts the LSE and D of a query."""

from types import SimpleNamespace

import pytest

from cute_fa.device.backward_preprocess import statistics_places


@pytest.mark.parametrize("tile_m", [32, 64, 128])
def test_rows_have_all_lse_then_all_d(tile_m):
    config = SimpleNamespace(tile_m=tile_m, statistics="rows")
    for place in range(tile_m):
        assert statistics_places(config, place) == (place, (tile_m + place,), 1)


@pytest.mark.parametrize("tile_m", [64, 128])
def test_wgmma_has_what_a_thread_of_the_accumulator_reads(tile_m):
    """Register 4·b + 2·h + e of thread t of Sᵀ = K·Qᵀ is of query 8·b + 2·(t mod 4) + e, in key t // 4 + 8·h (PTX ISA,
    matrix fragments of wgmma with D of n columns). −D of block b: four registers in a row from 16·b + 4·(t mod 4). LSE
    of blocks 2·p and 2·p + 1: e of either one in a row from 16·p + 4·(t mod 4)."""
    config = SimpleNamespace(tile_m=tile_m, statistics="wgmma")
    numbers, signs = {}, set()
    for query in range(tile_m):
        at_lse, at_delta, sign = statistics_places(config, query)
        signs.add(sign)
        for at, what in ((at_lse, "lse"), *((at, "delta") for at in at_delta)):
            assert at not in numbers
            numbers[at] = (what, query)
    assert signs == {-1} and sorted(numbers) == list(range(3 * tile_m))
    for lane in range(4):
        for block in range(tile_m // 8):
            queries = [8 * block + 2 * lane + e for e in (0, 1)]
            first = tile_m + 16 * block + 4 * lane
            assert [numbers[first + i] for i in range(4)] == [("delta", q) for q in queries * 2]
            pair, half = divmod(block, 2)
            first = 16 * pair + 4 * lane + 2 * half
            assert [numbers[first + e] for e in (0, 1)] == [("lse", q) for q in queries]

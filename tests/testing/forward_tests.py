"""Tests that the forwards in 16 bits have in common: a family's test class inherits them."""

import dataclasses
from typing import ClassVar

import pytest
import torch

import cute_fa
from cute_fa.semantics.reference import expected
from cute_fa.tools.inputs import InputSpec, make_inputs
from tests.testing.forward_grid import case_name, cases
from tests.testing.loads import recorded_loads
from tests.testing.tiled_forward import Forward, compare

# Q and V differ from K in their shapes, so that loads tell.
BLOCKS = dict(batch=1, heads=1, heads_kv=1, head_dim=64, head_dim_v=32)


class ForwardTests:
    """``packed_tokens``: how many tokens a CTA takes at a time where so many query heads of a kv head share its tiles
    of head_dim 64; ``lse_error``: how far apart two ways to the same LSE may be."""

    forward: ClassVar[Forward]
    packed_tokens: ClassVar[dict[int, int]]
    lse_error: ClassVar[float] = 1e-5

    def check_grid(self, grid: tuple[int, int, int], num_sms: int, spec: InputSpec) -> None:
        """Of a persistent kernel on fewer SMs than there are tiles."""
        assert grid == (num_sms, 1, 1)

    @pytest.mark.sampled
    @pytest.mark.parametrize("case", cases(), ids=case_name)
    def test_features_in_pairs(self, case):
        self.forward.run_case(case)

    @pytest.mark.gpu
    @pytest.mark.parametrize("case", cases(), ids=case_name)
    def test_features_in_pairs_on_the_gpu(self, case):
        """The same pairs with 1000 to 3300 keys."""
        self.forward.run_case_on_the_gpu(case)

    @pytest.mark.sampled
    @pytest.mark.parametrize(
        ("anchor", "tokens"),
        [
            ("start", 1),
            ("block before", 0),
            ("block before", 1),
            ("block", -1),
            ("block", 0),
            ("block", 1),
            ("window", -1),
            ("window", 0),
            ("window", 1),
            ("end", 0),
            ("end", 10_000),
        ],
    )
    def test_sink_inside_touching_and_beyond_the_window(self, anchor, tokens):
        """The sink ends so many tokens behind the first key, the block before the window's first one, that one, the
        window's first key or the last key."""
        spec = InputSpec(seqlen_q=192, seqlen_k=640, window=(100, 0), sink_tokens=1, **BLOCKS)
        tile_n = self.forward.config_of(spec).tile_n
        first_key = 640 - 192 - 100
        block = first_key // tile_n * tile_n
        anchors = {"start": 0, "block before": block - tile_n, "block": block, "window": first_key, "end": 640}
        spec = dataclasses.replace(spec, sink_tokens=anchors[anchor] + tokens)
        (keys,), (values,) = (self.forward.loaded_blocks(spec, operand) for operand in "kv")
        assert keys == values
        (visible,) = self.forward.visible_blocks(spec)
        assert sorted(keys) == visible
        assert (visible == list(range(-(-640 // tile_n)))) == (spec.sink_tokens > block - tile_n)

    @pytest.mark.sampled
    @pytest.mark.parametrize(
        "mask",
        [
            {},
            {"causal": True},
            {"window": (None, 70)},
            {"window": (150, 0)},
            {"window": (3, 200)},
            {"window": (200, None)},
            {"window": (90, 0), "sink_tokens": 7},
            {"window": (90, None), "sink_tokens": 300},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("seqlens", [(500, 700), (640, 500)])
    def test_exactly_the_blocks_with_visible_keys_are_loaded_once(self, mask, seqlens):
        """Tiles that see no key load one block: a branch around the main loop would cost more."""
        spec = InputSpec(seqlen_q=seqlens[0], seqlen_k=seqlens[1], **mask, **BLOCKS)
        loaded = [sorted(blocks) for blocks in self.forward.loaded_blocks(spec)]
        assert sorted(loaded) == sorted(blocks or [0] for blocks in self.forward.visible_blocks(spec))

    def test_causal_costs_half(self):
        """A causal row has half the keys, and blocks that need a mask are few."""
        full, causal = (
            self.forward.launch(make_inputs(InputSpec(1, 1536, 1536, 1, 1, 64, causal=causal)))[2]
            .launches[-1]
            .warp_instrs
            for causal in (False, True)
        )
        assert causal < 0.68 * full

    @pytest.mark.sampled
    @pytest.mark.parametrize("mask", [{"window": (64, 0)}, {"window": (64, 0), "sink_tokens": 4}], ids=str)
    def test_cost_does_not_grow_with_hidden_keys(self, mask):
        """A tile of queries loads as many blocks whether 512 or 1536 keys precede its window."""
        near, far = (
            self.forward.loaded_blocks(InputSpec(seqlen_q=128, seqlen_k=n, **mask, **BLOCKS))[0] for n in (640, 1664)
        )
        assert len(far) == len(near) < 7

    @pytest.mark.sampled
    @pytest.mark.parametrize("left", [0, 1, 127, 128, 300, 2**31 - 2])
    @pytest.mark.parametrize("right", [0, 64, 2**31 - 2])
    def test_window_edges(self, left, right):
        self.forward.run(InputSpec(1, 150, 390, 1, 1, 64, window=(left, right)))

    @pytest.mark.sampled
    @pytest.mark.parametrize("residue", [-2, -1, 0, 1, 2])
    @pytest.mark.parametrize("blocks", [(None, 0), (1, 0), (1, 1)])
    def test_mask_edges_that_meet_block_edges(self, blocks, residue):
        """The diagonal and the window's sides pass within two keys of the corner of a block, on either side."""
        c = self.forward.config_of(InputSpec(1, 192, 384, 1, 1, 64, window=blocks))
        window = tuple(bound and bound * c.tile_n for bound in blocks)
        spec = InputSpec(1, c.tile_tokens, 2 * c.tile_n + c.tile_tokens + residue, 1, 1, 64, window=window)
        for inputs in ("peaked", "random"):  # peaked ones look at few edges, but tell them apart
            self.forward.run(spec, inputs)

    @pytest.mark.sampled
    @pytest.mark.parametrize(
        ("seqlen_q", "seqlen_k"),
        [(192, 128), (193, 127), (191, 129), (64, 256), (65, 255), (128, 257), (385, 1), (400, 7)],
    )
    @pytest.mark.parametrize("causal", [False, True])
    def test_lengths_around_the_tiles(self, seqlen_q, seqlen_k, causal):
        """Keys beyond the end would score 0, far below what peaked inputs look at."""
        for inputs in ("peaked", "random"):
            self.forward.run(InputSpec(1, seqlen_q, seqlen_k, 1, 1, 64, causal=causal), inputs)

    def test_rows_without_keys_give_zero_and_minus_infinity(self):
        out, lse = self.forward.run(InputSpec(1, 400, 70, 2, 2, 64, causal=True))
        assert (out[:, :330] == 0).all() and (lse[:, :, :330] == -torch.inf).all()
        assert lse[:, :, 330:].isfinite().all()
        spec = InputSpec(1, 400, 70, 2, 2, 64, causal=True, learnable_sink=True)
        sink = make_inputs(spec, "peaked").learnable_sink
        out, lse = self.forward.run(spec)
        assert (out[:, :330] == 0).all()
        assert torch.allclose(lse[0, :, :330], sink[:, None].expand(-1, 330), atol=1e-6)

    @pytest.mark.sampled
    @pytest.mark.parametrize("schedule", [{}, {"late": True}, {"late": True, "schedule_seed": 1}], ids=str)
    @pytest.mark.parametrize("head_dim", [64, 256])
    def test_tiles_without_keys_between_others(self, head_dim, schedule):
        """Where O takes Q's place, a tile that loads nothing must not write over the next one's queries."""
        spec = InputSpec(3, 100, 100, 2, 2, head_dim, seqused_k=True, lengths_k=(100, 0, 90))
        out, lse = self.forward.run(spec, persistent="on", num_sms=1, **schedule)
        assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()

    @pytest.mark.sampled
    @pytest.mark.parametrize("packed", [False, True])
    def test_same_bits_under_every_schedule_and_on_any_number_of_sms(self, packed):
        spec = InputSpec(3, 250, 250, 2, 1, 64, causal=True, alibi=True, varlen_q=packed, varlen_k=packed)
        given = make_inputs(spec, "peaked")
        first, first_lse = self.forward.run(spec, persistent="off", pack_gqa=False)
        for options in (
            {"num_sms": 1},
            {"num_sms": 3, "late": True, "schedule_seed": 1},
            {"num_sms": 5, "late": True, "schedule_seed": 2},
            {"num_sms": 1000, "schedule_seed": 3},
            {"persistent": "off", "late": True, "schedule_seed": 4},
        ):
            out, lse, simulation = self.forward.launch(given, pack_gqa=False, **{"persistent": "on", **options})
            assert torch.equal(out, first) and torch.equal(lse, first_lse)
            if options.get("num_sms", 1000) < 1000:
                self.check_grid(simulation.launches[-1].grid, options["num_sms"], spec)

    @pytest.mark.sampled
    @pytest.mark.parametrize("heads", [(3, 1), (10, 2), (32, 1)])
    def test_packed_heads(self, heads):
        """A tile has so many tokens, with all heads of a kv head. The two ways agree to the rounding of exponentials:
        when a row's reference moves on depends on the rows beside it."""
        given = make_inputs(InputSpec(1, 50, 200, *heads, 64, causal=True, alibi=True, learnable_sink=True), "peaked")
        grids, lses = [], []
        for pack, schedule in ((False, {}), (True, {"late": True, "schedule_seed": 1})):
            out, lse, simulation = self.forward.launch(given, pack_gqa=pack, persistent="off", **schedule)
            compare(given, out, lse)
            lses.append(lse)
            grids.append(simulation.launches[-1].grid)
        assert torch.allclose(*lses, rtol=0, atol=self.lse_error)
        tokens = self.packed_tokens[heads[0] // heads[1]]
        assert grids == [(heads[0], 1, 1), (-(-50 // tokens) * heads[1], 1, 1)]

    @pytest.mark.sampled
    @pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128, 256])
    def test_pages_give_the_bits_of_contiguous_keys(self, page_size):
        """And of the pages only those in use are read, where the others' numbers in the table are beyond the cache."""
        spec = InputSpec(3, 100, 300, 2, 1, 64, causal=True, seqused_k=True, lengths_k=(300, 129, 0))
        paged_spec = dataclasses.replace(spec, seqused_k=False, page_size=page_size)
        assert self.forward.config_of(spec).tile_n == self.forward.config_of(paged_spec).tile_n
        contiguous, contiguous_lse = self.forward.run(spec, pack_gqa=False)
        given = make_inputs(paged_spec, "peaked")
        used = [-(-length // page_size) for length in spec.lengths_k]
        for row, count in zip(given.page_table, used, strict=True):
            row[count:] = 2**30
        with recorded_loads() as loads:
            out, lse, _ = self.forward.launch(given, pack_gqa=False, late=True)
        assert torch.equal(out, contiguous) and torch.equal(lse, contiguous_lse)
        # (columns, rows of a box, heads, pages, page_size + 1); a box that starts beyond its rows reads nothing
        boxes = [load for load in loads if len(load.extents) == 5]
        listed = {page for row, count in zip(given.page_table.tolist(), used, strict=True) for page in row[:count]}
        assert {load.start[3] for load in boxes if load.start[1] < load.extents[1]} == listed
        assert all(0 <= load.start[3] < given.k.shape[0] for load in boxes)

    def test_dominant_sink_logit_neither_overflows_nor_vanishes(self):
        given = make_inputs(InputSpec(1, 65, 65, 2, 2, 64, learnable_sink=True))
        for logit in (300.0, -300.0):
            self.forward.check(dataclasses.replace(given, learnable_sink=torch.full((2,), logit)))

    @pytest.mark.parametrize("softcap", [0.01, 8192.0])
    def test_smallest_and_largest_softcap(self, softcap):
        self.forward.run(InputSpec(1, 130, 130, 2, 2, 64, softcap=softcap), "random")

    def test_nan_in_the_input_is_not_hidden(self):
        given = make_inputs(InputSpec(1, 40, 300, 1, 1, 64))
        q, v = given.q.clone(), given.v.clone()
        q[0, 7], v[0, 150, 0, 3] = float("nan"), float("nan")
        out, lse, _ = self.forward.launch(dataclasses.replace(given, q=q, v=v))
        others = torch.arange(40) != 7
        assert out[0, 7].isnan().all() and lse[0, 0, 7].isnan() and lse[0, 0, others].isfinite().all()
        assert out[0, others, 0, 3].isnan().all() and out[0, others, 0, :3].isfinite().all()

    @pytest.mark.parametrize(("packed", "dim"), [(False, 0), (False, 1), (False, 2), (True, 0), (True, 1)])
    def test_offsets_beyond_32_bits(self, packed, dim):
        """Elements more than 2^31 apart, along the batch, the sequence or the heads; what lies between is never
        touched."""
        given = make_inputs(InputSpec(2, 40, 72, 2, 2, 64, varlen_q=packed, varlen_k=packed))

        def spread(tensor: torch.Tensor) -> torch.Tensor:
            strides = list(tensor.stride())
            strides[dim] = (2**31 + 64) // (tensor.shape[dim] - 1) // 8 * 8 + 8
            reach = 1 + sum(stride * (size - 1) for stride, size in zip(strides, tensor.shape, strict=True))
            assert reach > 2**31
            return torch.empty(reach, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)

        out = spread(torch.full_like(given.q, float("nan")))
        sparse = dataclasses.replace(given, q=spread(given.q), k=spread(given.k), v=spread(given.v))
        with cute_fa.simulate(self.forward.arch.value):
            _, lse = sparse.run(return_lse=True, family=self.forward.kernel.family, out=out)
        result = expected(given.q, given.k, given.v, **given.options()).check(out, lse)
        assert result.ok, result

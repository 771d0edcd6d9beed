"""Tests that the forwards in fp8 have in common: a family's test classes inherit them."""

import dataclasses
import itertools
import random
from typing import ClassVar

import pytest
import torch

from cute_fa.tools.inputs import InputSpec, make_inputs
from tests.testing.forward_grid import E4M3, E5M2, case_name, fp8_cases
from tests.testing.loads import recorded_loads
from tests.testing.tiled_forward import Forward

HEAD_DIMS = range(16, 257, 16)
PAIRS = random.Random(1).sample(list(itertools.product(HEAD_DIMS, HEAD_DIMS)), 9)
SCHEDULES = [{"race": True}, {"late": True, "schedule_seed": 1}, {"late": True, "schedule_seed": 2, "race": True}]


class Fp8Tests:
    """Edges of the lengths and of what is in the input."""

    forward: ClassVar[Forward]

    @pytest.mark.sampled
    @pytest.mark.parametrize("index", range(len(PAIRS)))
    def test_pairs_of_head_dims(self, index):
        """Two tiles of queries and three blocks of keys, the last ones of few; two heads where the others have one."""
        head_dim, head_dim_v = PAIRS[index]
        spec = InputSpec(1, 135, 130, 1 + index % 2, 1, head_dim, head_dim_v, E4M3, causal=index % 3 == 0)
        spec = dataclasses.replace(spec, seqlen_k=2 * self.forward.config_of(spec).tile_n + 5)
        schedule = SCHEDULES[index % len(SCHEDULES)]
        self.forward.run(spec, ("peaked", "random")[index % 2], num_sms=1, pack_gqa=False, **schedule)

    @pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(128, 128), (129, 129), (127, 127), (1, 1), (200, 7)])
    def test_lengths_around_the_tiles(self, seqlen_q, seqlen_k):
        """Keys beyond the end would score 0, far below what peaked inputs look at."""
        for inputs in ("peaked", "random"):
            self.forward.run(InputSpec(1, seqlen_q, seqlen_k, 1, 1, 64, dtype=E4M3, causal=True), inputs)

    def test_nan_in_the_input_is_not_hidden(self):
        given = make_inputs(InputSpec(1, 40, 300, 1, 1, 64, dtype=E4M3))
        given.q[0, 7], given.v[0, 150, 0, 3] = float("nan"), float("nan")
        out, lse, _ = self.forward.launch(given)
        others = torch.arange(40) != 7
        assert out[0, 7].isnan().all() and lse[0, 0, 7].isnan() and lse[0, 0, others].isfinite().all()
        assert out[0, others, 0, 3].isnan().all() and out[0, others, 0, :3].isfinite().all()


PAGED = InputSpec(3, 100, 300, 2, 1, 64, 96, E4M3, causal=True, seqused_k=True, lengths_k=(300, 129, 0))


class Fp8FeatureTests:
    """Types, head_dims, masks, scores and layouts in pairs; pages; schedules."""

    forward: ClassVar[Forward]

    @pytest.mark.sampled
    @pytest.mark.parametrize("case", fp8_cases(), ids=case_name)
    def test_features_in_pairs(self, case):
        self.forward.run_case(case)

    @pytest.mark.gpu
    @pytest.mark.parametrize("case", fp8_cases(), ids=case_name)
    def test_features_in_pairs_on_the_gpu(self, case):
        """The same pairs with 800 to 3300 keys."""
        self.forward.run_case_on_the_gpu(case)

    @pytest.fixture(scope="class")
    @classmethod
    def contiguous(cls):
        """(out, lse) of contiguous keys, in blocks of as many keys as paged ones have."""
        paged = dataclasses.replace(PAGED, seqused_k=False, page_size=8)
        assert cls.forward.config_of(PAGED).tile_n == cls.forward.config_of(paged).tile_n
        return cls.forward.run(PAGED, pack_gqa=False)

    @pytest.mark.sampled
    @pytest.mark.parametrize("page_size", [8, 16, 64, 128, 512, 1024])
    def test_pages_give_the_bits_of_contiguous_keys(self, page_size, contiguous):
        """And of the pages only those in use are read, where the others' numbers in the table are beyond the cache."""
        given = make_inputs(dataclasses.replace(PAGED, seqused_k=False, page_size=page_size), "peaked")
        used = [-(-length // page_size) for length in PAGED.lengths_k]
        for row, count in zip(given.page_table, used, strict=True):
            row[count:] = 2**30
        with recorded_loads() as loads:
            out, lse, _ = self.forward.launch(given, pack_gqa=False, late=True)
        assert torch.equal(out, contiguous[0]) and torch.equal(lse, contiguous[1])
        # (columns, rows of a box, heads, pages, page_size + 1); a box that starts beyond its rows reads nothing
        boxes = [load for load in loads if len(load.extents) == 5]
        listed = {page for row, count in zip(given.page_table.tolist(), used, strict=True) for page in row[:count]}
        assert {load.start[3] for load in boxes if load.start[1] < load.extents[1]} == listed

    def test_same_bits_under_every_schedule_and_on_any_number_of_sms(self):
        given = make_inputs(InputSpec(2, 130, 150, 1, 1, 256, 240, E4M3, causal=True), "peaked")
        first = self.forward.launch(given, persistent="off")[:2]
        for options in ({"num_sms": 1, "late": True, "schedule_seed": 1}, {"num_sms": 3, "schedule_seed": 3}):
            again = self.forward.launch(given, persistent="on", **options)[:2]
            assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


BLOCKS = InputSpec(1, 40, 300, heads=1, heads_kv=1, head_dim=128, dtype=E4M3, block_descales=True, causal=True)
LATE = {"late": True, "race": True}
BLOCK_CASES = [
    ({"heads": 4, "heads_kv": 2, "seqlen_q": 130, "seqlen_k": 400}, LATE | {"schedule_seed": 1}),
    ({"batch": 3, "causal": False, "seqused_k": True, "lengths_k": (300, 0, 129)}, {"num_sms": 1}),
    ({"batch": 3, "head_dim": 64, "varlen_q": True, "varlen_k": True, "alibi": True}, {"num_sms": 1}),
    (
        {"head_dim": 256, "causal": False, "window": (137, 11), "sink_tokens": 5, "heads": 2},
        {"late": True, "schedule_seed": 2},
    ),
    ({"head_dim": 64, "seqlen_k": 401, "softcap": 15.0, "page_size": 16}, {}),
    ({"batch": 2, "dtype_k": E5M2, "softcap": 15.0, "alibi": True, "cache_leftpad": True}, {"race": True}),
    ({"head_dim": 192, "head_dim_v": 128, "seqlen_q": 200, "learnable_sink": True, "seqused_k": True}, {"num_sms": 1}),
]


class Fp8BlockDescaleTests:
    """Descales of blocks of keys: masks, scores and layouts, of k alone, of v alone, far apart."""

    forward: ClassVar[Forward]

    @pytest.mark.sampled
    @pytest.mark.parametrize(("changes", "simulation"), BLOCK_CASES)
    def test_blocks_against_the_reference(self, changes, simulation):
        spec = dataclasses.replace(BLOCKS, **changes)
        assert 128 % self.forward.config_of(spec).tile_n == 0
        self.forward.run(spec, "peaked" if simulation else "random", **simulation)

    @pytest.mark.sampled
    @pytest.mark.parametrize("alone", ["k", "v"])
    def test_blocks_of_k_or_v_alone(self, alone):
        given = make_inputs(BLOCKS, "random")
        other = {"k": "v_descale", "v": "k_descale"}[alone]
        self.forward.check(dataclasses.replace(given, **{other: getattr(given, other)[..., 0].clone()}))

    @pytest.mark.sampled
    @pytest.mark.parametrize("factors", [(1.0, 2.0**20, 1.0), (2.0**20, 1.0, 2.0**-20), (2.0**-32, 2.0**-32, 2.0**32)])
    def test_values_of_blocks_far_apart(self, factors):
        given = make_inputs(dataclasses.replace(BLOCKS, causal=False), "random")
        v_descale = torch.tensor([*factors, 1.0]).expand_as(given.v_descale)
        self.forward.check(dataclasses.replace(given, v_descale=v_descale))

    def test_ones_are_as_none(self):
        given = make_inputs(BLOCKS, "peaked")
        of_blocks, none = torch.ones(1, 1, 3), dict.fromkeys(("q_descale", "k_descale", "v_descale"))
        results = [
            self.forward.launch(dataclasses.replace(given, **none | more))[:2]
            for more in ({}, {"k_descale": of_blocks, "v_descale": of_blocks})
        ]
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


KEY_MAJOR = InputSpec(1, 40, 301, heads=1, heads_kv=1, head_dim=128, dtype=E4M3, v_layout="key_major")
KEY_MAJOR_CASES = [
    ({"batch": 2, "heads": 4, "heads_kv": 2, "causal": True}, {"num_sms": 2, "race": True, "late": True}),
    ({"head_dim": 64, "seqlen_k": 401, "causal": True}, {"late": True, "schedule_seed": 1}),
    ({"batch": 2, "head_dim": 256, "seqlen_k": 135, "window": (70, 11), "sink_tokens": 5}, {"num_sms": 1}),
    ({"head_dim": 48, "head_dim_v": 80, "seqlen_k": 7, "batch": 2}, {"race": True, "schedule_seed": 2}),
    ({"head_dim": 192, "head_dim_v": 128, "heads": 2, "heads_kv": 2, "layout": "expanded", "block_descales": True}, {}),
    ({"dtype_v": E5M2, "seqlen_k": 1}, {}),
]


class Fp8KeyMajorTests:
    """The keys of V contiguous: head_dims, masks, odd numbers of keys."""

    forward: ClassVar[Forward]

    @pytest.mark.sampled
    @pytest.mark.parametrize(("changes", "simulation"), KEY_MAJOR_CASES)
    def test_against_the_reference(self, changes, simulation):
        self.forward.run(dataclasses.replace(KEY_MAJOR, **changes), "peaked" if simulation else "random", **simulation)

    def test_the_same_as_of_values_whose_columns_are_contiguous(self):
        spec = dataclasses.replace(KEY_MAJOR, head_dim=64)
        given = make_inputs(spec, "random")
        theirs = dataclasses.replace(given, spec=dataclasses.replace(spec, v_layout="head_dim"), v=given.v.contiguous())
        assert theirs.v.stride(-1) == 1 and given.v.stride(1) == 1
        pairs = zip(self.forward.launch(given)[:2], self.forward.launch(theirs)[:2], strict=True)
        assert all(torch.equal(*pair) for pair in pairs)

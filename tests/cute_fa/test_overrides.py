"""Forced configs: which fields and values there are, where they hold, and that each call gets the kernel of its own."""

import re

import pytest

import cute_fa
from cute_fa.engine.overrides import forced, settings, tunable
from cute_fa.engine.table import TABLE
from cute_fa.semantics.errors import ArgumentError
from cute_fa.semantics.types import DType, SmArch
from cute_fa.tools.inputs import InputSpec, make_inputs
from fa2_sm80.forward.entry import Fa2Forward
from fa3_sm90.forward.entry import Fa3Forward
from tests.testing.cases import small_problem

FIELDS = "warpgroups, tile_n, stages, turns, pack_gqa, persistent, promoted_columns, cluster, max_chains"


def problem(**changes):
    return small_problem(**{"arch": SmArch.SM_90A, "seqlen_q": 4096, "seqlen_k": 4096, **changes})


def test_fields_are_those_that_no_feature_decides():
    assert ", ".join(tunable(Fa3Forward)) == FIELDS
    assert tunable(Fa2Forward) == {}


def test_words_become_values():
    words = ["cluster=2", "turns=False", "promoted_columns=None"]
    assert settings(Fa3Forward, words) == {"cluster": 2, "turns": False, "promoted_columns": None}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tile_m=64", f"tile_m=64 of Fa3Forward: its fields are {FIELDS}"),
        ("head_dim=64", f"head_dim=64 of Fa3Forward: its fields are {FIELDS}"),
        ("turns=1", "turns=1 of Fa3Forward: bool is needed"),
        ("cluster=True", "cluster=True of Fa3Forward: int is needed"),
        ("promoted_columns=all", "promoted_columns='all' of Fa3Forward: int or None is needed"),
        ("cluster", f"'cluster': FIELD=VALUE, of {FIELDS}"),
    ],
)
def test_unknown_fields_and_values_of_other_types(word, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        settings(Fa3Forward, [word])


def test_a_kernel_whose_configs_cannot_be_forced():
    message = "tile_n=64 of Fa2Forward: its configs cannot be forced"
    with pytest.raises(ArgumentError, match=message), forced(Fa2Forward, tile_n=64):
        pass


@pytest.mark.parametrize(
    ("changes", "choices", "message"),
    [
        ({}, {"tile_n": 100}, "tile_n 100: a multiple of 16 up to 256 (forced: tile_n=100)"),
        ({}, {"tile_n": 272}, "tile_n 272: a multiple of 16 up to 256 (forced: tile_n=272)"),
        ({"dtype": DType.E4M3}, {"tile_n": 48}, "tile_n 48: a multiple of 32 up to 256 (forced: tile_n=48)"),
        ({"page_size": 8}, {"tile_n": 256}, None),
        ({"ranges": True}, {"tile_n": 64}, "tiles (192, 64): walks of a range plan are made for (192, 128)"),
        ({}, {"stages": 1}, "stages 1: 2 to 30"),
        ({}, {"stages": 5}, None),
        ({}, {"stages": 7}, "shared memory: 254,976 bytes of tiles of 128 keys in 7 stages, 232,448 available"),
        ({}, {"warpgroups": 1, "cluster": 2}, "warpgroups 1: 2 or 3 (forced: warpgroups=1, cluster=2)"),
        ({}, {"pack_gqa": 2}, "pack_gqa 2: 1, or the gqa_ratio 1 up to 64"),
        ({"num_heads": 6, "num_heads_kv": 3}, {"pack_gqa": 2}, None),
        ({}, {"promoted_columns": 32}, "promoted_columns 32: of fp8 alone"),
        ({"dtype": DType.E4M3}, {"promoted_columns": 48}, "promoted_columns 48: a multiple of 8 that divides 64"),
        ({}, {"max_chains": 5}, "max_chains 5: 1 to 4"),
        ({}, {"cluster": 3}, "cluster 3: 1 or 2"),
    ],
    ids=str,
)
def test_values_that_a_problem_is_not_served_with(changes, choices, message):
    given = problem(**changes)
    with forced(Fa3Forward, **choices):
        if message is None:
            config = TABLE.lookup(given).configure(given)
            assert {name: getattr(config, name) for name in choices} == choices
            return
        with pytest.raises(ArgumentError, match=re.escape(message)):
            TABLE.lookup(given)


def test_they_nest_and_end():
    own = Fa3Forward.configure(problem())
    with forced(Fa3Forward, stages=3):
        with pytest.raises(ZeroDivisionError), forced(Fa3Forward, turns=False):
            config = Fa3Forward.configure(problem())
            assert (config.stages, config.turns, config.tile_n) == (3, False, own.tile_n)
            raise ZeroDivisionError
        assert (Fa3Forward.configure(problem()).stages, Fa3Forward.configure(problem()).turns) == (3, True)
    assert Fa3Forward.configure(problem()) == own and Fa3Forward.override is None


def test_each_call_gets_its_own_kernel():
    """Also where the same call was made before, outside or inside."""
    given = make_inputs(InputSpec(1, 200, 100, 1, 1, 64), "peaked")

    def clusters(simulation) -> int:
        given.run(persistent="off", family="fa3")
        return simulation.launches[-1].cluster[0]

    with cute_fa.simulate("sm_90a") as simulation:
        found = [clusters(simulation)]
        with forced(Fa3Forward, cluster=2):
            found += [clusters(simulation), clusters(simulation)]
        found.append(clusters(simulation))
    assert found == [1, 2, 2, 1]

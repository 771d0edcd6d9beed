"""Which cases of the grids ``make test`` runs."""

from pathlib import Path
from types import SimpleNamespace

from tests.conftest import beyond_sample

HERE = Path(__file__)


class Item(SimpleNamespace):
    """What a sample looks at of a test; compared by identity, as pytest's are."""

    __hash__ = object.__hash__

    def get_closest_marker(self, name):
        return name in self.markers


def grid(size, name="test_grid", parent="test_sample.py", markers=("sampled",)):
    return [
        Item(name=f"{name}[{case}]", originalname=name, parent=SimpleNamespace(name=parent), path=HERE, markers=markers)
        for case in range(size)
    ]


def test_a_sixteenth_of_each_grid_is_left():
    grids = [grid(48), grid(17, "test_other"), grid(2, parent="TestClass"), grid(1, "test_one")]
    beyond = beyond_sample([case for cases in grids for case in cases], "0")
    assert [sum(case not in beyond for case in cases) for cases in grids] == [3, 2, 1, 1]


def test_what_is_thorough_is_not_left():
    slow = grid(3, markers=("thorough",))
    assert beyond_sample(slow + grid(8, markers=()), "0") == set(slow)


def test_what_is_no_grid_or_is_for_a_gpu_is_left():
    assert not beyond_sample(grid(8, markers=()) + grid(8, "test_other", markers=("sampled", "gpu")), "0")


def test_seeds_choose():
    cases = grid(48)
    chosen = {
        seed: {case.name for case in cases if case not in beyond_sample(cases, seed)} for seed in map(str, range(150))
    }
    assert set.union(*chosen.values()) >= {case.name for case in cases}
    assert len(set(map(frozenset, chosen.values()))) > 100
    assert beyond_sample(cases, "3") == beyond_sample(cases[::-1], "3")

"""The page of mutations: its figures, and its list of what escaped."""

import re

import pytest

from ptxsim.analysis.mutate import CAUGHT, EQUIVALENT, ESCAPED, NOT_EXECUTED, Record
from tests.testing import functions
from tests.testing.mutations import NOTES, VICTIMS, Victim, note, page

PLACE = "site-packages/flash_attn/cute/flash_fwd_sm90.py:157"
FA4 = Victim("FA4", "fa4", "sm_90a", 64, "full")


def record(line, outcome, by="", kind="fence", text="@%p1 wgmma.fence.sync.aligned;", change="deleted"):
    return Record("kernel", "hash", line, text, PLACE, kind, change, outcome, by)


def test_figures_and_escapes():
    records = [
        record(1, CAUGHT, "WgmmaError"),
        record(2, CAUGHT, "WgmmaError"),
        record(2, CAUGHT, "Deadlock", change="one group more"),
        record(3, ESCAPED),
        record(4, EQUIVALENT, "peek", kind="wait"),
        record(5, ESCAPED, NOT_EXECUTED, kind="barrier", text="bar.sync 0;"),
    ]
    text = page({FA4: records})
    # 5 instructions; 3 of the 5 mutants that are not equivalent
    assert "| FA4-sm_90a-d64-full | 5 | 6 | 3 | 1 | 2 | 60.0 % | 20" in text
    assert "**6 mutants of 5 instructions in 1 kernels: 3 caught, 1 equivalent, 2 escaped." in text
    assert "60.0 %.** FA4: 60.0 %." in text
    assert "| FA4 sm_90a | fence | 3 | 4 | 3 (2 WgmmaError, 1 Deadlock) | 0 | 1 |" in text
    assert "| FA4 sm_90a | wait | 1 | 1 | 0 | 1 (1 peek) | 0 |" in text
    fence, barrier = text.split("## Escapes")[1].strip().splitlines()[-2:]
    place = "flash_attn/cute/flash_fwd_sm90.py FlashAttentionForwardSm90.__call__"
    assert fence.startswith(f"| FA4 sm_90a | {place} | `wgmma.fence.sync.aligned` | deleted | P·V")
    assert fence.endswith("| d64-full: 3 |")
    # what has no note keeps its line
    assert barrier.startswith("| FA4 sm_90a | flash_attn/cute/flash_fwd_sm90.py:157 | `bar.sync` | deleted |")
    assert NOT_EXECUTED in barrier and barrier.endswith("| d64-full: 5 |")


def test_groups_that_were_not_run_stay():
    """A group of which a kernel on the page is not known keeps all its rows; the others are written anew."""
    full, causal = (Victim("FA4", "fa4", "sm_90a", 64, mask) for mask in ("full", "causal"))
    split = Victim("FA2", "cute-fa", "sm_80", 64, "full", "split")
    first = page({full: [record(1, CAUGHT, "Deadlock"), record(2, ESCAPED)], causal: [record(3, ESCAPED)]})
    second = page({full: [record(1, CAUGHT, "Deadlock")], split: [record(1, CAUGHT, "RaceError")]}, first)
    for row in first.splitlines():
        assert row in second or "FA4" not in row or row.startswith(("**", "FA2", "Not run yet"))
    assert "**4 mutants of 4 instructions in 3 kernels: 2 caught, 0 equivalent, 2 escaped." in second
    assert "50.0 %.** FA4: 33.3 %, FA2: 100.0 %." in second
    assert "| FA2 split sm_80 | fence | 1 | 1 | 1 (1 RaceError) | 0 | 0 |" in second
    known = {victim: [record(1, CAUGHT, "Deadlock")] for victim in (full, causal)}
    third = page(known, second)
    assert "| FA4 sm_90a | fence | 1 | 2 | 2 (2 Deadlock) | 0 | 0 |" in third
    assert "3 kernels: 3 caught, 0 equivalent, 0 escaped" in third and third.endswith("from the code.\n\nNone.\n")
    assert page({}, third) == third


def test_names_of_victims():
    """Of files, and in the table by group."""
    split = Victim("FA2", "cute-fa", "sm_80", 128, "paged", "split")
    assert (str(FA4), FA4.group) == ("FA4-sm_90a-d64-full", "FA4 sm_90a")
    assert (str(split), split.group) == ("FA2-split-sm_80-d128-paged", "FA2 split sm_80")
    assert len({str(victim) for victim in VICTIMS}) == len(VICTIMS)


SOURCE = """\
import functools

limit = 5

@functools.cache
def first(): pass

class Ring:
    stages = 2

    def release(self):
        @functools.cache
        def inner():
            return 1
        return inner()

    async def wait(self): pass
"""


@pytest.mark.parametrize(
    ("line", "function"),
    [(3, ""), (5, "first"), (6, "first"), (9, ""), (11, "Ring.release"), (12, "Ring.release.inner")]
    + [(14, "Ring.release.inner"), (15, "Ring.release"), (16, ""), (17, "Ring.wait"), (99, "")],
)
def test_functions_of_lines(monkeypatch, tmp_path, line, function):
    for folder in ("ROOT", "PACKAGES"):
        path = tmp_path / folder / "device" / f"{folder}.py"
        path.parent.mkdir(parents=True)
        path.write_text(SOURCE)
        monkeypatch.setattr(functions, folder, tmp_path / folder)
    expected = f"device/ROOT.py:{function}" if function else ""
    assert functions.function_of(f"device/ROOT.py:{line}") == expected
    assert functions.function_of(f"{tmp_path}/ROOT/device/ROOT.py:{line}") == expected
    # another machine's folder of packages
    installed = functions.function_of(f"/elsewhere/site-packages/device/PACKAGES.py:{line}")
    assert installed == expected.replace("ROOT", "PACKAGES")
    assert functions.function_of(f"device/absent.py:{line}") == ""


@pytest.mark.parametrize(("family", "place", "instruction", "text"), NOTES)
def test_notes_name_functions_that_exist(family, place, instruction, text):
    file, name = place.split(":")
    folders = (functions.ROOT, functions.PACKAGES, functions.PACKAGES / "flash_attn" / "cute")
    (path,) = (folder / file for folder in folders if (folder / file).is_file())
    found = [function for _, _, function in functions.functions(path) if re.fullmatch(name, function)]
    assert found
    for function in found:
        assert note(family, f"{path}:{function}", f"@%p1 {instruction}.x;") == text
        assert note(family, f"{path}:{function}_x", f"@%p1 {instruction}.x;") != text

"""The page of mutations: its figures, and its list of what escaped."""

from ptxsim.mutate import CAUGHT, EQUIVALENT, ESCAPED, NOT_EXECUTED, Record
from tests.testing.mutations import VICTIMS, Victim, page

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
    assert "| FA4-sm_90a-d64-full | 5 | 6 | 3 | 1 | 2 | 60.0 % |" in text
    assert "**6 mutants of 5 instructions in 1 kernels: 3 caught, 1 equivalent, 2 escaped." in text
    assert "60.0 %.** FA4: 60.0 %." in text
    assert "| FA4 sm_90a | fence | 3 | 4 | 3 (2 WgmmaError, 1 Deadlock) | 0 | 1 |" in text
    assert "| FA4 sm_90a | wait | 1 | 1 | 0 | 1 (1 peek) | 0 |" in text
    fence, barrier = text.split("## Escapes")[1].strip().splitlines()[-2:]
    row = "| FA4 sm_90a | flash_attn/cute/flash_fwd_sm90.py:157 | `wgmma.fence.sync.aligned` | deleted | P·V"
    assert fence.startswith(row)
    assert fence.endswith("| d64-full: 3 |")
    assert NOT_EXECUTED in barrier and barrier.endswith("| d64-full: 5 |")


def test_names_of_victims():
    """Of files, and in the table by group."""
    split = Victim("FA2", "cute-fa", "sm_80", 128, "paged", "split")
    assert (str(FA4), FA4.group) == ("FA4-sm_90a-d64-full", "FA4 sm_90a")
    assert (str(split), split.group) == ("FA2-split-sm_80-d128-paged", "FA2 split sm_80")
    assert len({str(victim) for victim in VICTIMS}) == len(VICTIMS)

"""Tables of what became of mutants (``ptxsim.analysis.mutate.Record``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..analysis.equivalence import CLASSES
from ..analysis.mutants import KINDS


def rows(records: Iterable) -> list[tuple[str, ...]]:
    """(kernel, kind, instructions, mutants, caught, equivalent, escaped) for each kernel and kind of instruction."""
    records = list(records)
    table = []
    for kernel in dict.fromkeys(record.kernel for record in records):
        for kind in KINDS:
            mine = [record for record in records if (record.kernel, record.kind) == (kernel, kind)]
            if mine:
                table.append((kernel, kind, *counts(mine)))
    return table


def counts(records: list) -> tuple[str, ...]:
    """(instructions, mutants, caught, equivalent, escaped): the caught by error, the equivalent by class."""
    by = Counter((record.outcome, record.by) for record in records)

    def told(outcome, names):
        total = sum(count for (found, _), count in by.items() if found == outcome)
        parts = [f"{by[outcome, name]} {name}" for name in names if by[outcome, name]]
        return f"{total}" + (f" ({', '.join(parts)})" if parts else "")

    errors = sorted({name for outcome, name in by if outcome == "caught"}, key=lambda name: -by["caught", name])
    sites = len({(record.ptx, record.line) for record in records})
    escaped = sum(record.outcome == "escaped" for record in records)
    return str(sites), str(len(records)), told("caught", errors), told("equivalent", CLASSES), str(escaped)

"""Writes docs/mutations.md: ``python -m tests.testing.mutations [--jobs N] [--again] [NAME …]``, ``make mutations``.

Runs ``python -m ptxsim mutate tests/testing/attention.py`` on the kernels below, or those whose names contain a NAME.
What is known stays in build/mutations/, so that an interrupted run goes on; after a change of the simulator remove that
folder, or pass ``--again`` to try once more what escaped. The page has every kernel that has been run to the end: a
group, whose kernels differ in head_dim and mask alone, is written anew when build/mutations/ has all that the page has
of it; the others stay as they are there.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ptxsim.analysis.equivalence import CLASSES
from ptxsim.analysis.mutants import KINDS
from ptxsim.analysis.mutate import CAUGHT, EQUIVALENT, ESCAPED, Record, read
from ptxsim.report.mutation_table import counts
from tests.testing.functions import ROOT, function_of, short

KEPT = ROOT / "build" / "mutations"
PAGE = ROOT / "docs" / "mutations.md"


@dataclass(frozen=True)
class Victim:
    """What one call of attention launches on one architecture; ``whose`` to ``what`` are arguments of attention.py."""

    family: str
    whose: str
    arch: str
    head_dim: int
    mask: str
    what: str = "forward"

    def __str__(self) -> str:
        return f"{self.group.replace(' ', '-')}-d{self.head_dim}-{self.mask}"

    @property
    def group(self) -> str:
        """Those that differ in head_dim and mask alone."""
        return " ".join([self.family, *[self.what] * (self.what != "forward"), self.arch])

    @property
    def sms(self) -> int:
        """Kernels for Blackwell may have clusters of two CTAs from head_dim 128 on."""
        return 2 if self.arch == "sm_100a" and self.head_dim >= 128 else 1

    @property
    def file(self) -> Path:
        return KEPT / f"{self}.jsonl"

    @property
    def done(self) -> Path:
        """Is there once the file has every mutant."""
        return self.file.with_suffix(".done")

    def command(self) -> list[str]:
        script = ["tests/testing/attention.py", "--arch", self.arch, "--sms", str(self.sms), "--out", str(self.file)]
        return [sys.executable, "-W", "ignore", "-m", "ptxsim", "mutate", *script]

    def run(self, options: list[str]) -> bool:
        """Whether all mutants of the kernel are known then."""
        arguments = ["--", self.whose, str(self.head_dim), self.mask, self.what]
        command = [*self.command(), *options, *arguments]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode < 2 and self.file.exists():
            self.done.touch()
        return self.done.exists()


FAMILIES = (
    ("FA2", "cute-fa", "sm_80"),
    ("FA3", "cute-fa", "sm_90a"),
    ("FA4", "fa4", "sm_80"),
    ("FA4", "fa4", "sm_90a"),
    ("FA4", "fa4", "sm_100a"),
    ("fa4_sm100", "cute-fa", "sm_100a"),
)
VICTIMS = [
    Victim(*family, head_dim, mask)
    for family, head_dim, mask in itertools.product(FAMILIES, (64, 128), ("full", "causal", "varlen"))
]
BACKWARDS = ("backward", "deterministic")
VICTIMS += [
    Victim(*FAMILIES[0], head_dim, mask, what)
    for what, masks in (
        ("split", ("full", "causal", "varlen", "paged")),
        *((what, ("full", "causal", "varlen")) for what in BACKWARDS),
    )
    for head_dim, mask in itertools.product((64, 128), masks)
]
TILED = FAMILIES[1], FAMILIES[5]
VICTIMS += [Victim(*family, head_dim, "paged") for family in TILED for head_dim in (64, 128)]
VICTIMS += [
    Victim(*family, head_dim, mask, "fp8")
    for family, head_dim, mask in itertools.product(TILED, (64, 128), ("full", "causal"))
]
VICTIMS += [
    Victim(*family, 256, mask, what)
    for mask in ("full", "causal", "varlen")
    for family, what in (
        *((family, "forward") for family in (FAMILIES[0], *TILED)),
        *((FAMILIES[0], what) for what in BACKWARDS),
    )
]
VICTIMS += [Victim(*FAMILIES[3], head_dim, mask, "backward") for head_dim in (64, 128) for mask in ("full", "causal")]
VICTIMS += [
    Victim(*FAMILIES[1], head_dim, mask, what)
    for what, head_dim, mask in itertools.product(BACKWARDS, (64, 128), ("full", "causal", "varlen"))
]
VICTIMS += [
    Victim(*FAMILIES[1], 256, mask, "backward") for mask in ("full", "causal", "varlen")
]  # always deterministic

DECODES = (("decode", "causal"), ("decode", "varlen"), ("decode", "paged"), ("rows", "causal"), ("codes", "paged"))
DECODES += (("descales", "paged"), ("invariant", "causal"), ("invariant", "varlen"))
VICTIMS += [Victim(*FAMILIES[1], head_dim, mask, what) for head_dim in (64, 128) for what, mask in DECODES]


# What escapes are: family, or group of kernels, whose notes come first; file and function, instruction, and what it
# does there.
_SM90, _SM100 = "flash_fwd_sm90.py:FlashAttentionForwardSm90", "flash_fwd_sm100.py:FlashAttentionForwardSm100"
_BACKWARD = "flash_bwd_sm90.py:FlashAttentionBackwardSm90"
NOTES = (
    ("FA3", "fa3_sm90/decode/epilogue.py:Epilogue.store", "bar.warp.sync",
     "behind a chunk's stores, which other threads of the warp read in the next chunk: the votes and products in "
     "between, which all of them take part in, order a warp's threads for the simulator, and PTX promises it of none"),
    ("FA3 descales", "fa3_sm90/decode/consumer.py:Consumer.step", "bar.warp.sync",
     "before one lane releases K's stage, whose descales all of its warp have read: of reads such a release counts for "
     "the warp (docs/ptxsim.md)"),
    ("FA3", "cute_fa/device/ring.py:Ring.release", "mbarrier.arrive",
     "releases V from the third block at the right edge on; in these problems 128 queries meet two of 80 keys there"),
    ("FA3", "cute_fa/device/ring.py:Ring.acquire", "mbarrier.try_wait",
     "before a tile's first K is loaded: where all tiles have as many blocks, the wait for V of the tile before, or at "
     "head_dim 256 for its Q, which is released with O, covers it"),
    ("fa4_sm100", "cute_fa/device/tile_handout.py:Handout.take", "fence.proxy.async",
     "between reading an answer and the next one, which overwrites it: of a generic read before an asynchronous write "
     "no proxy fence is asked (docs/ptxsim.md)"),
    ("FA4", f"{_BACKWARD}.load", "mbarrier.try_wait",
     "before dO is loaded: the stage of the same block's Q, which is released later, was waited for"),
    ("FA4", "quack/sm90_utils.py:gemm", "wgmma",
     "so that dO's stage is released when dV no longer reads it: the producer waits for the stage of Q first, which is "
     "released later"),
    ("FA4", f"{_BACKWARD}.__call__", "wgmma.fence",
     "its product follows another one, whose fence has covered these registers, too"),
    ("FA4", f"{_BACKWARD}.epilogue_dKV", "cp.async.bulk.commit_group",
     "lets dV's store go on beside dK's: each has memory of its own"),
    ("FA4", f"{_BACKWARD}.epilogue_dKV", "cp.async.bulk.wait_group",
     "waits for the stores of the tile before, of which a CTA has none, or lets dV's store go on beside "
     "dK's: each has memory of its own"),
    ("FA4", f"{_BACKWARD}.epilogue_dKV", "bar.sync",
     "before dV takes the place of V, or dK that of K: the loop's barrier after the last product with V, and the two "
     "barriers around dV, order the same"),
    ("FA4", f"{_SM90}.__call__", "wgmma.fence",
     "P·V follows Q·Kᵀ without a wait: the fence before Q·Kᵀ has covered its registers"),
    ("FA4", f"{_SM90}.load", "mbarrier.try_wait",
     "producer_tail: by its own comment useful in clusters only, so that no CTA exits early"),
    ("FA4", f"{_SM100}.load_Q", "mbarrier.try_wait",
     "before the second stage of Q is loaded: the two stages are released together, and the first was waited for"),
    ("FA4", f"{_SM100}.load_KV", "mbarrier.try_wait",
     "before a tile's first V is loaded: the release of Q, which was waited for, follows all but the last P·V of the "
     "tile before"),
    ("FA4", f"{_SM100}.(softmax|correction)_loop", "mbarrier.try_wait",
     "a producer's tail, as its comment says; behind it is the arrival that lets another warp free tensor memory: "
     "the waits for this warp's loads precede that"),
    ("FA4", f"{_SM100}.load", "mbarrier.try_wait",
     "producer_tail: nothing follows in this warp; the wait for the other phase was over at once"),
    ("FA4", f"{_SM100}.epilogue_s2g", "cp.async.bulk",
     "frees the first stage of O, which no tile takes where a CTA has one; the wait for both stages follows"),
    ("FA4", f"{_SM100}.mma", "tcgen05.commit",
     "releases Q, which no tile takes where a CTA has one"),
    ("FA4", f"{_SM100}.softmax_step", "bar.warp.sync",
     "between tcgen05.wait::st.sync.aligned and one lane's arrival: accepted without it, since FlashAttention-4's "
     "backward arrives so with two CTAs"),
    ("FA4", f"{_SM100}.kernel", "fence.mbarrier_init",
     "behind the barrier that tensor memory is freed by: all threads execute the fence behind the other barriers, too"),
    ("FA4", f"{_SM100}.correction_epilogue", "fence.proxy.async",
     "behind what O's tile is written by: packed sequences leave without TMA, so that no async proxy reads it"),
    ("FA4", "flash_fwd.py:FlashAttentionForwardSm80.kernel", "cp.async.commit_group",
     "closes the group of the queries: the loop waits for the group of the first keys, which then has both"),
    ("FA4", "flash_fwd.py:FlashAttentionForwardSm80.kernel.preprocess_Q", "cp.async.wait_group",
     "waits for the queries before the loop, which waits itself before it reads them (Q_in_regs off)"),
    ("FA4", "flash_fwd.py:FlashAttentionForwardBase.epilogue", "bar.sync",
     "before O takes the queries' memory: each warp writes the rows that it alone has read"),
)  # fmt: skip


def note(group: str, function: str, instruction: str) -> str:
    """What is known of an escape in a ``file.py:function``, of kernels of a group, or of any of a family."""
    found = (text for name, place, op, text in NOTES
             if group.startswith(name) and re.search(f"(^|/){place}$", function) and op in instruction)  # fmt: skip
    return next(found, "")


KERNELS = ("kernel", "instructions", "mutants", "caught", "equivalent", "escaped", "caught of the others", "run on")
BY_KIND = ("kernels", "kind", "instructions", "mutants", "caught", "equivalent", "escaped")
ESCAPES = ("kernels", "source", "instruction", "change", "what it is", "PTX lines")


def page(known: dict[Victim, list[Record]], before: str = "") -> str:
    """The text of docs/mutations.md; ``before``: what it was, from which groups stay that are not all known."""
    had = {head: _rows(before, head) for head in (KERNELS, BY_KIND, ESCAPES)}
    names = {row[0] for row in had[KERNELS]}
    kernels, kinds, escapes = [], [], []
    for group in dict.fromkeys(victim.group for victim in VICTIMS):
        victims = [victim for victim in VICTIMS if victim.group == group]
        if all(victim in known for victim in victims if str(victim) in names):
            mine = {victim: known[victim] for victim in victims if victim in known}
            kernels += [_kernel(victim, records) for victim, records in mine.items()]
            kinds += _kinds(group, mine)
            escapes += _escapes(group, mine)
        else:
            kernels += [row for row in had[KERNELS] if row[0] in map(str, victims)]
            kinds += [row for row in had[BY_KIND] if row[0] == group]
            escapes += [row for row in had[ESCAPES] if row[0] == group]
    order = {str(victim): number for number, victim in enumerate(VICTIMS)}
    kernels.sort(key=lambda row: order[row[0]])
    sites, mutants, caught, equivalent, escaped = (sum(int(row[column]) for row in kernels) for column in range(1, 6))
    run = {row[0] for row in kernels}
    missing = ", ".join(name for name in order if name not in run)
    versions = ", ".join(f"{name} {version(name)}" for name in ("nvidia-cutlass-dsl", "flash-attn-4", "numpy"))
    parts = [
        "# Mutations: synchronisation damaged, one instruction at a time",
        f"Made by `make mutations`, last with {versions}; each kernel by `python -m\n"
        "ptxsim mutate tests/testing/attention.py --arch ARCH --sms 1 -- (cute-fa|fa4) HEAD_DIM MASK [WHAT]`.\n"
        "What is damaged, which mutants count as equivalent, and by which rules: [sanitizer.md](sanitizer.md).",
        f"**{mutants} mutants of {sites} instructions in {len(kernels)} kernels: {caught} caught, "
        f"{equivalent} equivalent, {escaped} escaped. Caught of those that are not equivalent: {_share(kernels)}.** "
        f"{_shares(kernels)}.",
        "FA2, FA3 and fa4_sm100 are this project's kernels, FA4 is FlashAttention-4 as it comes from the package\n"
        "index: forwards where nothing else is said; *backward* has atomic additions, *deterministic* none, *split*\n"
        "three parts of the keys, *decode* keys cut evenly between CTAs, *rows* the same from pages of one token,\n"
        "*codes* from a cache in e4m3, *descales* from one with a descale for each row, *invariant* in\n"
        "batch-invariant mode; each with the small kernels around it. bf16; *varlen* is packed sequences with a\n"
        "window, *paged* keys in pages of 16 (of few queries) or 64 under a causal mask.",
        _table(KERNELS, kernels),
        f"Not run yet: {missing}." if missing else "",
        "By kind of instruction, with the errors that caught the mutants and the classes of the equivalent ones\n"
        f"({', '.join(CLASSES)}):",
        _table(BY_KIND, kinds),
        "## Escapes",
        "Every one, with its PTX line in the build of each kernel. What it is was written by hand, from the code.",
        _table(ESCAPES, escapes) if escapes else "None.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _kernel(victim: Victim, records: list[Record]) -> tuple[str, ...]:
    sites, mutants, *_ = counts(records)
    outcomes = Counter(record.outcome for record in records)
    row = (str(victim), sites, mutants, *(str(outcomes[outcome]) for outcome in (CAUGHT, EQUIVALENT, ESCAPED)))
    return (*row, _share([row]), str(datetime.date.today()))


def _kinds(group: str, known: dict[Victim, list[Record]]) -> Iterator[tuple[str, ...]]:
    for kind in KINDS:
        if mine := [record for records in known.values() for record in records if record.kind == kind]:
            yield group, kind, *counts(mine)


def _escapes(group: str, known: dict[Victim, list[Record]]) -> list[tuple[str, ...]]:
    where = defaultdict(list)  # what escaped -> its lines
    for victim, records in known.items():
        for record in records:
            if record.outcome == ESCAPED:
                function = function_of(record.source)
                known_as = note(group, function, record.text)
                what = ": ".join(filter(None, (record.by, known_as))) or "not explained"
                place = function.replace(":", " ") if known_as else short(record.source)
                row = (group, place, f"`{_operation(record.text)}`", record.change, what)
                where[row].append(f"d{victim.head_dim}-{victim.mask}: {record.line}")
    return [(*row, ", ".join(lines)) for row, lines in where.items()]


def _share(kernels: list[tuple[str, ...]]) -> str:
    """Caught mutants of those that are not equivalent, of rows of kernels."""
    caught, escaped = (sum(int(row[KERNELS.index(name)]) for row in kernels) for name in ("caught", "escaped"))
    return f"{100 * caught / (caught + escaped):.1f} %" if caught + escaped else "–"


def _shares(kernels: list[tuple[str, ...]]) -> str:
    """The same of each family."""
    families = defaultdict(list)
    for row in kernels:
        families[row[0].split("-")[0]].append(row)
    return ", ".join(f"{family}: {_share(rows)}" for family, rows in families.items())


def _operation(text: str) -> str:
    """An instruction without registers and guard."""
    return re.sub(r"^@\S+ ", "", text).split(" ")[0].rstrip(";")


def _line(row: tuple[str, ...]) -> str:
    return "| " + " | ".join(row) + " |"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join([_line(head), "|" + "---|" * len(head), *map(_line, rows)])


def _rows(text: str, head: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The rows of a table of the page."""
    _, _, rest = text.partition(_line(head) + "\n")
    lines = itertools.takewhile(lambda line: line.startswith("| "), rest.splitlines()[1:])
    return [tuple(line.removeprefix("| ").removesuffix(" |").split(" | ")) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--jobs", default="2")
    parser.add_argument("--again", action="store_true")
    chosen = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    wanted = [v for v in VICTIMS if not chosen.names or any(name in str(v) for name in chosen.names)]
    begun = time.monotonic()
    for number, victim in enumerate(wanted, 1):
        minutes = (time.monotonic() - begun) / 60
        print(f"kernel {number} of {len(wanted)}, after {minutes:.0f} minutes: {victim}", flush=True)
        if not victim.run(["--jobs", chosen.jobs, *["--again"] * chosen.again]):
            sys.exit(f"{victim}: nothing is known of this kernel")
    known = {victim: read(victim.file) for victim in VICTIMS if victim.done.exists()}
    PAGE.write_text(page(known, PAGE.read_text()))


if __name__ == "__main__":
    main()

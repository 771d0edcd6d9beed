"""Random small problems over every public function, simulated, against the reference: ``make fuzz``.

    python -m tests.testing.fuzz --problems 600 --seed 1 --jobs 2
    python -m tests.testing.fuzz --only 1:37        # problem 37 of seed 1 again
    python -m tests.testing.fuzz --only '{"call": …}'

Failures are printed with the call that reproduces them and the smallest problem that still fails. An interrupted run
goes on where it was, as long as the sources are the same.
"""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cute_fa.semantics.errors import ArgumentError
from tests.testing.fuzz.draw import draw
from tests.testing.fuzz.execute import Failure, wrong_numbers
from tests.testing.fuzz.problem import Problem
from tests.testing.fuzz.runner import Found, State, find

COMMAND = "python -m tests.testing.fuzz --only"


def report(seed: int, index: int, found: Found) -> str:
    """What is printed of a failure."""
    lines = [f"{seed}:{index} fails: {found.failure.kind}", *_indented(found.failure)]
    lines.append(f"  {COMMAND} {seed}:{index}")
    if found.shrunk != draw(seed, index):
        lines += ["smallest that still does:", *_indented(Failure(found.failure.kind, found.message))]
        lines.append(f"  {COMMAND} {shlex.quote(found.shrunk.to_json())}")
    return "\n".join(lines)


def _indented(failure: Failure) -> list[str]:
    lines = failure.message.splitlines()
    shown = lines if len(lines) <= 24 else [*lines[:20], f"… {len(lines) - 22} lines", *lines[-2:]]
    return [f"    {line}" for line in shown]


def problem_named(name: str) -> Problem:
    """From SEED:INDEX or JSON."""
    seed, colon, index = name.partition(":")
    if colon and seed.lstrip("-").isdigit() and index.isdigit():
        return draw(int(seed), int(index))
    return Problem.from_json(name)


@click.command(help=__doc__.split("\n")[0])
@click.option("--problems", type=click.IntRange(1), default=100, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes.")
@click.option("--state", type=click.Path(dir_okay=False, path_type=Path), help="[default: beside the kernels' cache]")
@click.option("--only", help="One problem: SEED:INDEX, or JSON. Prints it and raises what it raises.")
def main(problems: int, seed: int, jobs: int, state: Path | None, only: str | None) -> None:
    if only is not None:
        sys.exit(_run_one(only))
    done = State(state, seed)
    known = {index: found for index, found in done.done.items() if index < problems}
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for index, found in sorted(known.items()):
        if found is not None:
            console.print(report(seed, index, found))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("fuzzing", total=problems, completed=len(known))
        for index, found in find(seed, set(range(problems)) - set(known), jobs):
            done.add(index, found)
            known[index] = found
            if found is not None:
                progress.console.print(report(seed, index, found))
            progress.advance(task)
    failed = Counter(found.failure.kind for found in known.values() if found is not None)
    kinds = ", ".join(f"{kind} {count}" for kind, count in failed.most_common())
    console.print(f"{problems} problems of seed {seed}, {failed.total()} failed{': ' * bool(kinds)}{kinds}")
    sys.exit(1 if failed else 0)


def _run_one(name: str) -> int:
    try:
        problem = problem_named(name)
    except ArgumentError as error:
        raise click.UsageError(str(error)) from None
    click.echo(problem.to_json())
    if objection := problem.objection():
        raise click.UsageError(f"not a problem: {objection}")
    wrong = wrong_numbers(problem)
    click.echo("\n".join(wrong) or "right")
    return 1 if wrong else 0


if __name__ == "__main__":
    main()

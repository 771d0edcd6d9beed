"""Checks of the fuzzer's own tests in the place of :func:`tests.testing.fuzz.execute.failure_of`: no kernel runs."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from tests.testing.fuzz.draw import draw
from tests.testing.fuzz.execute import WRONG, Failure

if TYPE_CHECKING:
    from tests.testing.fuzz.problem import Problem


def capped_queries_fail(problem: Problem) -> Failure | None:
    """Wrong where more than 5 queries of a sequence meet a softcap."""
    longest = max(problem.lengths_q)
    return Failure(WRONG, f"{longest} queries") if problem.spec.softcap and longest > 5 else None


def fifth_kills(problem: Problem) -> Failure | None:
    """Problem 5 of seed 1 ends the process."""
    if problem == draw(1, 5):
        os.kill(os.getpid(), signal.SIGSEGV)
    return None

"""Errors of the simulator reach another process as they are. ``test_account`` does the same with raised ones."""

from ptxsim.errors import RaceError, SimError
from ptxsim.report.account import Account, Role
from tests.testing import exceptions

ROLE = Role("warp 0", "waits", 7, "bar.sync 0;", " (kernel.py:42)", ("step 1", "step 2"))
LATER = {"line": 7, "text": "bar.sync 0;", "where": "cta(0,0,0).w0", "kernel": "kernel", "account": Account((ROLE,), 2)}
EXAMPLES = {
    SimError: (("what is wrong",), LATER),
    RaceError: (("two accesses",), {**LATER, "other": (5, "st.shared", "w1")}),
}


def test_every_error_can_be_sent():
    errors = exceptions.instances("ptxsim", EXAMPLES)
    assert len(errors) > 10
    for error in errors:
        if isinstance(error, SimError):
            assert "at PTX line 7: bar.sync 0;" in str(error) and "and 2 roles more" in str(error)
        exceptions.assert_survives(error)


def test_an_error_may_take_what_it_likes():
    """Of a subclass too, whose ``__init__`` takes something else than the message."""
    error = _Odd(3, why="no reason")
    assert str(error) == "3: no reason"
    exceptions.assert_survives(error)


class _Odd(SimError):
    def __init__(self, number: int, *, why: str):
        super().__init__(f"{number}: {why}")
        self.number = number

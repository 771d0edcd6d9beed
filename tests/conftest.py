"""Set-up of the whole suite."""

import pytest

import ptxsim


@pytest.fixture(scope="session", autouse=True)
def _standin():
    """Simulations work in any order of the tests, also after a test that uses the DSL in the real world."""
    ptxsim.install()

"""Planted faults: one wrong line or one damaged synchronisation in the FA4 forward must be noticed, by an error, a
deadlock or a wrong result."""

import pytest

import ptxsim
from cute_fa.tools.inputs import InputSpec, make_inputs
from tests.fa4_sm100.test_softmax import B200
from tests.testing.damaged_fa4 import FAULTS, DamagedConfig

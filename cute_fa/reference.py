"""The reference in plain torch: ``cute_fa.semantics.reference`` under its public name."""

from cute_fa.semantics.reference import *  # noqa: F403

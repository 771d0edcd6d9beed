"""The errors that the package raises: ``cute_fa.semantics.errors`` under its public name."""

from cute_fa.semantics.errors import *  # noqa: F403

"""``python -m cute_fa``."""

from cute_fa.cli import main

main()

"""``python -m cute_fa``."""

from cute_fa.tools.cli import main

main()

"""``python -m ptxsim``."""

from ptxsim.cli import main

main()

"""``python -m ptxsim``."""

from ptxsim.report.cli import main

main()

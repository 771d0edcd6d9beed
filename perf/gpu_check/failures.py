"""A pytest plugin (``-p perf.gpu_check.failures``) for runs that may be stopped, on a GPU that may break.

What a test that fails says is written when it fails, not at the end, which a run that is stopped does not reach. An
xdist worker whose CUDA context a test has broken ends, so that another takes its place: all its later tests would fail.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch


class _AsTheyCome:
    """In the process that the reports come to."""

    def __init__(self, terminal: Any):
        self._terminal = terminal

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._terminal.ensure_newline()
            self._terminal.write_line(report.longreprtext)


class _Worker:
    """In a worker of xdist, which has sent the report by then."""

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(1)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: Any) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(_Worker())
    elif terminal is not None:
        config.pluginmanager.register(_AsTheyCome(terminal))

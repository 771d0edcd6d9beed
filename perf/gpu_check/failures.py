"""A pytest plugin (``-p perf.gpu_check.failures``): what a test that fails says is written when it fails, not at the
end, which a run that is stopped does not reach.
"""

from __future__ import annotations

from typing import Any

import pytest


class _AsTheyCome:
    def __init__(self, terminal: Any):
        self._terminal = terminal

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._terminal.ensure_newline()
            self._terminal.write_line(report.longreprtext)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: Any) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):  # xdist's workers send their reports here
        config.pluginmanager.register(_AsTheyCome(terminal))

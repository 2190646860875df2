"""A pytest plugin: a failure is told when it happens, as the process may not live to tell it at the end."""

from __future__ import annotations

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print what failed."""
    if report.failed:
        print(f"\n{report.longreprtext}\n{report.capstderr}", flush=True)

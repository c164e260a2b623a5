# SPDX-License-Identifier: Apache-2.0
"""Plug-in of pytest that appends a line of JSON for each test that has ended, so that a run that is killed tells, too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

FILE_VARIABLE = "GPU_CHECK_RECORDS"
"""Environment variable that names the file."""

_TEXT_NCHARS = 3000


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record a test, or a fixture of it that failed or skipped it."""
    if report.when == "call" or report.outcome != "passed":
        _record(report, seconds=round(report.duration, 3), figures=report.user_properties)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Record a file that cannot be imported, or skips all of its tests."""
    if report.outcome != "passed":
        _record(report)


def _record(report: Any, **more: Any) -> None:
    # With pytest-xdist, its controller is told of all tests.
    if FILE_VARIABLE not in os.environ or "PYTEST_XDIST_WORKER" in os.environ:
        return
    text = ""
    if report.skipped:
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        text = text.removeprefix("Skipped: ")
    elif report.failed:
        text = report.longreprtext[-_TEXT_NCHARS:]
    with Path(os.environ[FILE_VARIABLE]).open("a") as file:
        file.write(json.dumps({"test": report.nodeid, "outcome": report.outcome, "text": text, **more}) + "\n")

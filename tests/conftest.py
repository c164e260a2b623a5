# SPDX-License-Identifier: Apache-2.0
"""Settings for every test: a repeatable hypothesis profile, and no leak of the machine's environment into the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[1]

# derandomize: a red run on one machine is red on every machine; `HYPOTHESIS_PROFILE=search` looks for new examples.
settings.register_profile("repeat", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "search",
    deadline=None,
    max_examples=int(os.environ.get("SEARCH_EXAMPLES", "2000")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))

# A shell that starts pytest in the background lets it, and all its children, ignore ctrl-C. Some tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


SLOW = (
    "tests/cli/test_model_types.py",
    "tests/conformance/test_suite_catches.py",
    "tests/core/runtime/test_any_pair_moved.py",
    "tests/deploy/test_alerts.py",
    "tests/devices/test_cross_device.py",
    "tests/devices/test_gpu.py::TestKernel",
    "tests/hostile/",
    "tests/mooncake/test_conformance.py",
    "tests/mooncake/test_endpoints.py",
    "tests/mooncake/test_engine.py",
    "tests/nixl/test_conformance.py::TestNixlAgentOverTcp",
    "tests/nixl/test_close.py",
    "tests/nixl/test_report.py",
    "tests/process/",
    "tests/race/",
    "tests/soak/",
    "tests/transformers/",
)
"""Tests that `make unit` leaves to `make slow`: together they take two thirds of the time. Tests may also be marked one by one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests, and let them begin first: the others go on beside them, in the processes of the other cores."""
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _no_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests see the defaults, whatever KVXFER_* the person who runs them has set."""
    for name in os.environ:
        if name.startswith("KVXFER_"):
            monkeypatch.delenv(name)


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program in a fresh interpreter that finds this tree; its output comes back."""

    def run(program: str, *, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        paths = [*environment.pop("PYTHONPATH", "").split(os.pathsep), str(ROOT), str(ROOT / "adapters")]
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run

# SPDX-License-Identifier: Apache-2.0
"""These tests need a real NIXL; without one they are skipped, with the adapter's own reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvxfer_nixl import NixlAgent

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _needs_nixl() -> None:
    reason = NixlAgent.why_unavailable()
    if reason is not None:
        pytest.skip(reason)


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

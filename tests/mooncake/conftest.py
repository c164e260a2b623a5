# SPDX-License-Identifier: Apache-2.0
"""These tests need a real Mooncake; without one they are skipped, with the adapter's own reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvxfer_mooncake import MooncakeAgent

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _needs_mooncake() -> None:
    reason = MooncakeAgent.why_unavailable()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _no_settings_of_mooncake(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("MC_"):
            monkeypatch.delenv(name)


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program in a fresh interpreter that finds this tree; its output comes back."""

    def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
        paths = [str(ROOT), str(ROOT / "adapters"), os.environ.get("PYTHONPATH", "")]
        return subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )

    return run

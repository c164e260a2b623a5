# SPDX-License-Identifier: Apache-2.0
"""These tests need a real Mooncake; without one they are skipped, with the adapter's own reason."""

from __future__ import annotations

import os

import pytest

from kvxfer_mooncake import MooncakeAgent


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

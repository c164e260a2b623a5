# SPDX-License-Identifier: Apache-2.0
"""These tests need a real NIXL; without one they are skipped, with the adapter's own reason."""

from __future__ import annotations

import pytest

from kvxfer_nixl import NixlAgent


@pytest.fixture(autouse=True)
def _needs_nixl() -> None:
    reason = NixlAgent.why_unavailable()
    if reason is not None:
        pytest.skip(reason)

# SPDX-License-Identifier: Apache-2.0
"""Mooncake passes the suite of all agents."""

from __future__ import annotations

import pytest

from kvxfer.testing import AgentSuite
from kvxfer_mooncake import MooncakeAgent
from tests.mooncake.agents import mooncake_agent

pytestmark = pytest.mark.skipif(
    MooncakeAgent.why_unavailable() is not None, reason=str(MooncakeAgent.why_unavailable())
)


class TestMooncakeAgent(AgentSuite):
    make_agent = staticmethod(mooncake_agent)

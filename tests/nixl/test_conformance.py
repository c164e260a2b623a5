# SPDX-License-Identifier: Apache-2.0
"""NIXL passes the suite of all agents, over each kind of link of one host."""

from __future__ import annotations

import pytest

from kvxfer.testing import AgentSuite
from kvxfer_nixl import NixlAgent
from tests.nixl.agents import nixl_agent, nixl_agent_over_tcp

pytestmark = pytest.mark.skipif(NixlAgent.why_unavailable() is not None, reason=str(NixlAgent.why_unavailable()))


class TestNixlAgent(AgentSuite):
    make_agent = staticmethod(nixl_agent)


class TestNixlAgentOverTcp(AgentSuite):
    make_agent = staticmethod(nixl_agent_over_tcp)

# SPDX-License-Identifier: Apache-2.0
"""The suite's own trial: an asynchronous agent that reaches other processes passes it, processes and all."""

from __future__ import annotations

from kvxfer.testing import AgentSuite
from tests.conformance.socket_agent import SocketAgent


class TestSocketAgent(AgentSuite):
    make_agent = staticmethod(SocketAgent)

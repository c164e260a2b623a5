# SPDX-License-Identifier: Apache-2.0
"""The reference agent passes the suite that every adapter has to pass."""

from __future__ import annotations

from kvxfer.agents.inproc import InprocAgent
from kvxfer.testing import AgentSuite


class TestInprocAgent(AgentSuite):
    make_agent = staticmethod(InprocAgent)

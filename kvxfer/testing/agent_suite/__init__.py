# SPDX-License-Identifier: Apache-2.0
"""The conformance suite of transfer agents: `AgentSuite`, its tests by subject, and the testbed that they run on."""

from kvxfer.testing.agent_suite.suite import AgentSuite

__all__ = ["AgentSuite"]

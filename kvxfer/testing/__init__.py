# SPDX-License-Identifier: Apache-2.0
"""For authors of adapters and of tests: conformance suites, peers, faults. Needs pytest: ``pip install 'kvxfer[test]'``.

An adapter joins with a few lines::

    from kvxfer.testing import AgentSuite
    from my_package import MyAgent

    class TestMyAgent(AgentSuite):
        make_agent = staticmethod(MyAgent)  # name -> agent; importable, so that spawned processes can make it too
"""

from __future__ import annotations

import pytest

# Before any of them is imported: otherwise a failing suite shows a bare AssertionError, without the values.
pytest.register_assert_rewrite(
    *(
        f"{__name__}.{module}"
        for module in (
            "actor",
            "agent_suite",
            "buffer_suite",
            "conformance",
            "devices",
            "peers",
        )
    )
)

from kvxfer.testing.actor import Actor, FlightLog  # noqa: E402
from kvxfer.testing.agent_suite import AgentSuite  # noqa: E402
from kvxfer.testing.buffer_suite import BufferSuite, MadeBuffer  # noqa: E402
from kvxfer.testing.devices import Device, HostDevice, on_device  # noqa: E402
from kvxfer.testing.eventually import eventually, stays  # noqa: E402
from kvxfer.testing.faults import Faults, FaultyAgent  # noqa: E402
from kvxfer.testing.oracle import HostSpan, OracleMemory, noise, same_bytes  # noqa: E402
from kvxfer.testing.peers import Peer, PeerGoneError, ProcessPeer, ThreadPeer  # noqa: E402

__all__ = [
    "Actor",
    "AgentSuite",
    "BufferSuite",
    "Device",
    "Faults",
    "FaultyAgent",
    "FlightLog",
    "HostDevice",
    "HostSpan",
    "MadeBuffer",
    "OracleMemory",
    "Peer",
    "PeerGoneError",
    "ProcessPeer",
    "ThreadPeer",
    "eventually",
    "noise",
    "on_device",
    "same_bytes",
    "stays",
]

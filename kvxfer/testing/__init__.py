# SPDX-License-Identifier: Apache-2.0
"""Conformance suites, peers and faults, for tests of adapters. Needs pytest: ``pip install 'kvxfer[test]'``.

An adapter joins with a few lines::

    from kvxfer.testing import AgentSuite
    from my_package import MyAgent

    class TestMyAgent(AgentSuite):
        make_agent = staticmethod(MyAgent)  # name -> agent; importable, so that spawned processes can make it too
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvxfer.testing.actor import Actor, FlightLog
    from kvxfer.testing.agent_suite import AgentSuite
    from kvxfer.testing.buffer_suite import BufferSuite, MadeBuffer
    from kvxfer.testing.child import Child
    from kvxfer.testing.devices import Device, HostDevice, on_device
    from kvxfer.testing.faults import Faults, FaultyAgent
    from kvxfer.testing.oracle import HostSpan, OracleMemory, noise, same_bytes
    from kvxfer.testing.peers import ProcessPeer, RemotePeer, ThreadPeer
    from kvxfer.testing.remote import ChildError, ChildGoneError
    from kvxfer.testing.waiting import eventually, stays

__all__ = [
    "Actor",
    "AgentSuite",
    "BufferSuite",
    "Child",
    "ChildError",
    "ChildGoneError",
    "Device",
    "Faults",
    "FaultyAgent",
    "FlightLog",
    "HostDevice",
    "HostSpan",
    "MadeBuffer",
    "OracleMemory",
    "ProcessPeer",
    "RemotePeer",
    "ThreadPeer",
    "eventually",
    "noise",
    "on_device",
    "same_bytes",
    "stays",
]

_MODULES = {
    "actor": ("Actor", "FlightLog"),
    "agent_suite": ("AgentSuite",),
    "buffer_suite": ("BufferSuite", "MadeBuffer"),
    "child": ("Child",),
    "devices": ("Device", "HostDevice", "on_device"),
    "waiting": ("eventually", "stays"),
    "faults": ("Faults", "FaultyAgent"),
    "oracle": ("HostSpan", "OracleMemory", "noise", "same_bytes"),
    "remote": ("ChildError", "ChildGoneError"),
    "peers": ("ProcessPeer", "RemotePeer", "ThreadPeer"),
}

# Modules whose asserts pytest has to rewrite before they are imported: else a failing suite shows a bare AssertionError.
if sys.modules.get("pytest") is not None:
    sys.modules["pytest"].register_assert_rewrite(
        *(
            f"{__name__}.{module}"
            for module in ("actor", "agent_suite", "buffer_suite", "conformance", "devices", "peers")
        )
    )


def __getattr__(name: str) -> object:
    """Import a public name at its first use: the processes of `kvxfer demo` use `child`, and need no pytest for it."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

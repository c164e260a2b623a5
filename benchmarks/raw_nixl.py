# SPDX-License-Identifier: Apache-2.0
"""NIXL itself, between the same two processes and over the same memory as kvxfer."""

from __future__ import annotations

import importlib
import time
from typing import TYPE_CHECKING

import numpy as np

from kvxfer_nixl._module import _logging_left_alone, find

if TYPE_CHECKING:
    import kvxfer
    from kvxfer.memory.spans import Descriptors

_PAUSE_S = 5e-5
"""Between two looks at a transfer: over TCP the other end needs a core too."""


class RawNixl:
    """NIXL without kvxfer: one agent over one cache.

    Args:
        name: of the agent.
        memory: what it registers.
        as_adapter: the backend options of kvxfer's adapter; else those of NIXL's own Python package, whose progress
            thread takes a core.
        ucx: settings of UCX beside them, ``NAME=value,NAME=value``.
    """

    def __init__(self, name: str, memory: kvxfer.Memory, *, as_adapter: bool, ucx: str = "") -> None:
        found = find()
        with _logging_left_alone():
            api = importlib.import_module(f"{found.name}._api")
        if as_adapter:
            self.agent = api.nixl_agent(name, api.nixl_agent_config(backends=[]))
            config = found.bindings.nixlAgentConfig()
            config.useProgThread, config.pthrDelay = True, 10_000
            config.syncMode = found.bindings.NIXL_THREAD_SYNC_RW
            self.agent.agent = found.bindings.nixlAgent(name, config)
            self.agent.create_backend(
                "UCX", {"ucx_error_handling_mode": "peer", **({"engine_config": ucx} if ucx else {})}
            )
        else:
            self.agent = api.nixl_agent(name)
        self._regions = self.agent.register_memory([(memory.address, memory.nbytes, 0, "")], "DRAM")
        self.metadata: bytes = self.agent.get_agent_metadata()
        self._peer = b""

    def meet(self, metadata: bytes) -> None:
        """Load a peer's metadata: bytes are moved from or to it from now on."""
        self._peer = self.agent.add_remote_agent(metadata)

    def move(self, op: str, spans: Descriptors) -> float:
        """Read or write all spans, and wait; returns the seconds that it took, making NIXL's descriptor lists included."""
        agent = self.agent
        begin = time.perf_counter()
        zero = np.zeros(len(spans), np.uint64)
        local = agent.get_xfer_descs(np.column_stack((spans.local, spans.nbytes, zero)), "DRAM")
        remote = agent.get_xfer_descs(np.column_stack((spans.remote, spans.nbytes, zero)), "DRAM")
        handle = agent.initialize_xfer(op, local, remote, self._peer.decode())
        state = agent.transfer(handle)
        while state == "PROC":
            time.sleep(_PAUSE_S)
            state = agent.check_xfer_state(handle)
        seconds = time.perf_counter() - begin
        handle.release()
        if state != "DONE":
            raise RuntimeError(f"raw NIXL: {state}")
        return seconds

    def close(self) -> None:
        """End the agent and its threads."""
        self._regions = self.agent = None

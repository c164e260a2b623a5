# SPDX-License-Identifier: Apache-2.0
"""Links between two processes of this host, and the bare engine of each: what moves the bytes, over what, and from which end."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.raw_nixl import RawNixl
from kvxfer.config import Settings

if TYPE_CHECKING:
    import kvxfer
    from kvxfer.memory.spans import Descriptors

__all__ = ["LINKS", "NIXL_CMA", "EngineLink", "RawMooncake"]

_MOST_OF_MOONCAKE = 1_024


@dataclass(frozen=True)
class EngineLink:
    """One link.

    Attributes:
        name: for tables.
        agent: transfer agent of both ends.
        ucx: settings of UCX, as NIXL's ``engine_config``.
        move_by: which end moves the bytes, ``read`` or ``write``.
    """

    name: str
    agent: str = "nixl"
    ucx: str = ""
    move_by: str = "read"

    def of_endpoint(self) -> dict[str, Any]:
        """Arguments of `kvxfer.Endpoint`."""
        options = {"backend_options": {"UCX": {"engine_config": self.ucx}}} if self.ucx else None
        return {"agent": self.agent, "agent_options": options, "settings": Settings.resolve(move_by=self.move_by)}

    def raw(self, name: str, memory: kvxfer.Memory, *, as_adapter: bool) -> RawNixl | RawMooncake:
        """The bare engine over this memory; see `RawNixl` for ``as_adapter``."""
        if self.agent == "mooncake":
            return RawMooncake(memory)
        return RawNixl(name, memory, as_adapter=as_adapter, ucx=self.ucx)


_TCP = "TLS=tcp,NET_DEVICES=lo"
NIXL_CMA = EngineLink("NIXL, CMA")
LINKS = (
    NIXL_CMA,
    EngineLink("NIXL, TCP, READ", ucx=_TCP),
    EngineLink("NIXL, TCP, WRITE", ucx=_TCP, move_by="write"),
    EngineLink("Mooncake, TCP, READ", agent="mooncake"),
)


class RawMooncake:
    """Mooncake's engine used directly, as vLLM and SGLang use it: synchronous batches.

    Args:
        memory: what it registers.
    """

    def __init__(self, memory: kvxfer.Memory) -> None:
        self._engine: Any = importlib.import_module("mooncake.engine").TransferEngine()
        if self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
            raise RuntimeError("raw Mooncake does not start")
        self._engine.register_memory(memory.address, memory.nbytes)
        self.metadata = f"127.0.0.1:{self._engine.get_rpc_port()}".encode()
        self._peer = ""

    def meet(self, metadata: bytes) -> None:
        """Move bytes from or to this engine from now on."""
        self._peer = metadata.decode()

    def move(self, op: str, spans: Descriptors) -> float:
        """Move all spans, and wait; returns the seconds that it took."""
        move = self._engine.batch_transfer_sync_read if op == "READ" else self._engine.batch_transfer_sync_write
        begin = time.perf_counter()
        near, far, sizes = (array.tolist() for array in (spans.local, spans.remote, spans.nbytes))
        # More than the queue of a peer has room for would block that peer for ever.
        for first in range(0, len(near), _MOST_OF_MOONCAKE):
            part = slice(first, first + _MOST_OF_MOONCAKE)
            if move(self._peer, near[part], far[part], sizes[part]) != 0:
                raise RuntimeError("raw Mooncake: a batch failed")
        return time.perf_counter() - begin

    def close(self) -> None:
        """End the engine and its threads."""
        self._engine = None

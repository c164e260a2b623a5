# SPDX-License-Identifier: Apache-2.0
"""One end of ``kvxfer bench pair``: a cache, an endpoint over it, and an agent without the protocol over the same memory."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvxfer import addresses, registry
from kvxfer.agents.flights import FlightState
from kvxfer.buffers.cache import KVCache
from kvxfer.endpoint import Endpoint
from kvxfer.errors import ConfigError, KvxferError
from kvxfer.memory.spans import Descriptors, Memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvxfer.agents.base import TransferAgent
    from kvxfer.agents.capabilities import Op
    from kvxfer.agents.description import AgentPeer
    from kvxfer.secret import Secret

LEAST_BLOCK_NBYTES = 4 << 10
MOST_BLOCK_NBYTES = 4 << 20
_HEAD_DIM = 128
_TOKEN_OF_A_HEAD_NBYTES = 2 * 2 * _HEAD_DIM
"""K and V in bfloat16."""
_MOST_HEADS = 8
_LEAST_TOKENS = 4
_PAUSE_S = 5e-5
"""Between two looks at a transfer of the bare agent: over TCP the other end needs a core, too."""


@dataclass(frozen=True)
class BlockShape:
    """Heads and tokens of one block of one layer, which lies in one piece."""

    heads: int
    tokens: int

    @classmethod
    def of(cls, nbytes: int) -> BlockShape:
        """The shape of blocks of this size. Raises ConfigError."""
        if not LEAST_BLOCK_NBYTES <= nbytes <= MOST_BLOCK_NBYTES or nbytes & (nbytes - 1):
            raise ConfigError(
                f"blocks have {LEAST_BLOCK_NBYTES >> 10} to {MOST_BLOCK_NBYTES >> 10} KiB, a power of two, not {nbytes} bytes"
            )
        rows = nbytes // _TOKEN_OF_A_HEAD_NBYTES
        heads = min(_MOST_HEADS, rows // _LEAST_TOKENS)
        return cls(heads, rows // heads)


class PairedEnd:
    """A cache of one layer, its endpoint, and an agent without the protocol over the same memory.

    Args:
        order: memory order of heads and tokens, ``HND`` or ``NHD``.
        agent: name of the transfer agent.
        host: address for the endpoint's side channel.

    Attributes:
        array: the cache as ``[layer, block, head, token, content]``.
        base: address of the first block.
    """

    def __init__(
        self, order: str, block_nbytes: int, blocks: int, agent: str, host: str, secret: Secret | None
    ) -> None:
        shape = BlockShape.of(block_nbytes)
        cache, arrays = KVCache.allocate(
            order, layers=1, blocks=blocks, heads=shape.heads, block_tokens=shape.tokens, head_dim=_HEAD_DIM
        )
        self.array: npt.NDArray[Any] = arrays["kv"]
        self.array.fill(0xEEEE)  # the first access to memory takes longer than a transfer
        self.base: int = self.array.ctypes.data
        self._block_nbytes = block_nbytes
        self.endpoint: Endpoint = Endpoint(cache, agent, bind=addresses.join(host, 0), secret=secret)
        self._peer: AgentPeer | None = None
        self._peer_base = 0
        try:
            # The fabric's ports of both agents are for the same peers.
            loopback = addresses.is_loopback(host)
            self.bare: TransferAgent = registry.agent_maker(
                agent, {}, f"bare/{secrets.token_hex(8)}", loopback=loopback
            )()
            self.bare.register(Memory(self.base, self.array.nbytes))
        except BaseException:
            self.endpoint.close()
            raise

    @property
    def port(self) -> int:
        """Port of the endpoint's side channel."""
        return addresses.parse(self.endpoint.address)[1]

    @property
    def agent_info(self) -> bytes:
        """Description of the bare agent."""
        return self.bare.describe()

    def meet(self, agent_info: bytes, base: int) -> None:
        """Have the bare agent move blocks from and to the other end's, whose first block is at ``base``."""
        if self._peer is not None:
            self.bare.disconnect(self._peer)
        self._peer, self._peer_base = self.bare.connect(agent_info), base

    def bare_s(self, op: Op, here: Sequence[int], there: Sequence[int], timeout_s: float) -> float:
        """Seconds of the bare agent for these blocks. Raises KvxferError."""
        if self._peer is None:
            raise KvxferError("the bare agents have not met")
        begin = time.perf_counter()
        spans = Descriptors(
            np.asarray(here, np.uint64) * np.uint64(self._block_nbytes) + np.uint64(self.base),
            np.asarray(there, np.uint64) * np.uint64(self._block_nbytes) + np.uint64(self._peer_base),
            np.full(len(here), self._block_nbytes, np.uint64),
        )
        flight = self.bare.submit(op, self._peer, spans, deadline=self.bare.now() + timeout_s)
        self.bare.poll()
        while flight.state is FlightState.PENDING:
            if not self.bare.has_parts_to_submit:
                time.sleep(_PAUSE_S)
            self.bare.poll()
        seconds = time.perf_counter() - begin
        if flight.state is not FlightState.DONE:
            raise flight.error or KvxferError("the bare agent gave no reason")
        return seconds

    def close(self) -> None:
        """End the agent and the endpoint."""
        self.bare.close()
        self.endpoint.close()

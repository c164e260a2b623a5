# SPDX-License-Identifier: Apache-2.0
"""Actions that the protocol asks of the outside. It does no I/O itself: events and a clock go in, these come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvxfer.errors import shown

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from kvxfer.errors import KvxferError
    from kvxfer.layout.block_table import BlockTable, CheckedTable
    from kvxfer.layout.spec import CacheSpec
    from kvxfer.memory.spans import Descriptors
    from kvxfer.protocol.lease import ConsumerRank
    from kvxfer.protocol.messages import Message
    from kvxfer.protocol.transfer import Event, Transfer


@dataclass(frozen=True)
class SendTo:
    """Send to the peer that listens at a control address, connecting first if need be."""

    address: str
    message: Message


@dataclass(frozen=True)
class Reply:
    """Send over a connection that a consumer opened; dropped if the connection has ended."""

    connection: bytes
    message: Message


@dataclass(frozen=True)
class Hangup:
    """Forget the connection to a control address."""

    address: str


@dataclass(frozen=True)
class Source:
    """Blocks that one rank of a producer has granted of a lease.

    Attributes:
        number: its rank.
        agent_info: how its memory is reached.
        route: how its KV travels: what `Routes` gave, which means nothing to the protocol.
        tables: its block tables, one per cache group.
        cell: address of the lease's cell on its board; ``check`` what stands there while the lease does.
        complete: these are all blocks of the lease; else there will be more (`MoreGranted`).
        epoch: of the process that has granted them.
        writes: that process can move the bytes itself.
    """

    number: int
    agent_info: bytes
    route: Any
    tables: Sequence[CheckedTable]
    cell: int
    check: bytes
    complete: bool = True
    epoch: str = ""
    writes: bool = False


@dataclass(frozen=True)
class StartRead:
    """Move the bytes of a granted lease from each source, and see that it stood until then; ends in `Consumer.read_ended`."""

    transfer: Transfer
    sources: Sequence[Source]


@dataclass(frozen=True)
class MoreGranted:
    """More blocks of a source have become readable, while the read is under way; what was granted before is among them."""

    transfer: Transfer
    source: Source


@dataclass(frozen=True)
class ChunkStaged:
    """Give a read the chunk that it asked for, which a source has packed."""

    transfer: Transfer
    source: int
    number: int
    address: int
    digest: bytes = b""


@dataclass(frozen=True)
class StopRead:
    """Fail a read that still needs grants or chunks: none will come. A read whose bytes are all on their way goes on."""

    transfer: Transfer
    error: KvxferError


@dataclass(frozen=True)
class WriteEnded:
    """Tell a read that a write which it had asked a source for is over; ``error`` is empty if all is in place."""

    transfer: Transfer
    number: int
    error: str = ""
    ended: bool = False
    """That is because the lease has ended."""
    quiet: bool = True
    """Nothing of it will be written any more."""


Packed = int | bytes
"""Result of packing a chunk: the address where it is, or its digest."""


class PackKey(NamedTuple):
    """Share of a lease for which chunks are packed: the lease, and a rank of its consumer."""

    token: str
    rank: int

    def __repr__(self) -> str:
        return f"PackKey({shown(self.token)!r}, {self.rank})"


@dataclass(frozen=True)
class StartPack:
    """Pack part of a leased request into a chunk; ends in `Producer.packed`."""

    key: PackKey
    number: int
    layout: CacheSpec
    tokens: tuple[int, int]
    blocks: Sequence[BlockTable]
    digest: bool = False
    """Only the chunk's digest is wanted."""
    consumer: Hashable = None
    """Process of the consumer: each gets no more than its share of slots while others wait."""


@dataclass(frozen=True)
class EndPack:
    """Drop chunks that are not needed any more; all of ``key`` if there are no numbers."""

    key: PackKey
    numbers: Sequence[int] = ()


class WriteKey(NamedTuple):
    """A write that a consumer has asked for."""

    consumer: ConsumerRank
    number: int


@dataclass(frozen=True)
class StartWrite:
    """Write into a consumer's memory, step by step; ends in `Producer.written`. Local addresses are the producer's."""

    key: WriteKey
    token: str
    agent_info: bytes
    steps: Sequence[Descriptors]
    within_s: float
    blocks: Sequence[bytes]
    """Ids of the leased blocks of each group, which the consumer may have."""
    cell: int


@dataclass(frozen=True)
class EndWrite:
    """Give a write up; what the engine has of it goes on, and ends in `Producer.written`."""

    key: WriteKey
    cut_off: bool = False
    """The agent that it writes to is closed, so that nothing of it arrives: it is over at once."""


@dataclass(frozen=True)
class ForgetAgent:
    """Forget the agent with this description: it is gone for good."""

    agent_info: bytes


@dataclass(frozen=True)
class Emit:
    """Tell the engine."""

    event: Event


DataAction = (
    StartRead
    | MoreGranted
    | ChunkStaged
    | WriteEnded
    | StopRead
    | StartPack
    | EndPack
    | StartWrite
    | EndWrite
    | ForgetAgent
)
"""Actions of the data thread."""

Action = SendTo | Reply | Hangup | Emit | DataAction

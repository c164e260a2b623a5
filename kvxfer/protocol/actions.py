# SPDX-License-Identifier: Apache-2.0
"""What the protocol code asks the outside world to do. It does no I/O itself: events and a clock go in, these come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvxfer.errors import shown

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from kvxfer.errors import KvxferError
    from kvxfer.layout.block_table import BlockTable, CheckedTable
    from kvxfer.layout.spec import CacheSpec
    from kvxfer.protocol.messages import Message
    from kvxfer.protocol.transfer import Event, Transfer


@dataclass(frozen=True)
class SendTo:
    """Send to the peer that listens at a control address, connecting first if need be."""

    address: str
    message: Message


@dataclass(frozen=True)
class Reply:
    """Send back over the connection on which something came in; dropped if it is gone."""

    connection: bytes
    message: Message


@dataclass(frozen=True)
class Hangup:
    """Forget the connection to a control address."""

    address: str


@dataclass(frozen=True)
class Source:
    """What one rank of a producer has granted of a lease.

    Attributes:
        number: its rank.
        agent_info: how its memory is reached.
        route: how its KV travels: what `Routes` gave, which means nothing to the protocol.
        tables: its block tables, one per cache group.
        cell: address of the lease's cell on its board; ``check`` what stands there while the lease does.
        complete: these are all blocks of the lease; else there will be more (`MoreGranted`).
    """

    number: int
    agent_info: bytes
    route: Any
    tables: Sequence[CheckedTable]
    cell: int
    check: bytes
    complete: bool = True


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
    """A source has packed the chunk that a read asked for."""

    transfer: Transfer
    source: int
    number: int
    address: int
    digest: bytes = b""


@dataclass(frozen=True)
class StopRead:
    """A source will grant and stage no more: a read that needs that fails. One whose bytes are all on their way does not."""

    transfer: Transfer
    error: KvxferError


Packed = int | bytes
"""What became of a chunk: it lies at an address, or this is its digest."""


class PackKey(NamedTuple):
    """For whom chunks are packed: a lease, and a rank of its reader."""

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
    """Only that is wanted."""
    consumer: Hashable = None
    """The consumer's process: no one of them gets more than its share of slots while others wait."""


@dataclass(frozen=True)
class EndPack:
    """These chunks are not needed any more; all of ``key``'s if there are no numbers."""

    key: PackKey
    numbers: Sequence[int] = ()


@dataclass(frozen=True)
class ForgetAgent:
    """The agent behind this description is gone for good."""

    agent_info: bytes


@dataclass(frozen=True)
class Emit:
    """Tell the engine."""

    event: Event


DataAction = StartRead | MoreGranted | ChunkStaged | StopRead | StartPack | EndPack | ForgetAgent
"""What the data thread does."""

Action = SendTo | Reply | Hangup | Emit | DataAction

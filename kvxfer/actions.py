# SPDX-License-Identifier: Apache-2.0
"""What the protocol code asks the outside world to do. It does no I/O itself: events and a clock go in, these come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvxfer.blocks import BlockIds
    from kvxfer.plan import TransferPlan
    from kvxfer.transfer import Event, Transfer
    from kvxfer.wire import Message


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
class StartRead:
    """Move the bytes of a granted lease and fence them; ends in `Consumer.read_ended`."""

    transfer: Transfer
    plan: TransferPlan
    agent_info: bytes
    source_blocks: list[BlockIds]
    cell: int


@dataclass(frozen=True)
class ForgetAgent:
    """The agent behind this description is gone for good."""

    agent_info: bytes


@dataclass(frozen=True)
class Emit:
    """Tell the engine."""

    event: Event


Action = SendTo | Reply | Hangup | StartRead | ForgetAgent | Emit

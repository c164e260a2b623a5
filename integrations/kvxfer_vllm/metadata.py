# SPDX-License-Identifier: Apache-2.0
"""What the scheduler's half tells the workers' halves with each engine step, and what a worker tells once at start-up.

Both are pickled by vLLM, so they hold plain data. They import vLLM's base classes only because vLLM checks for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata

if TYPE_CHECKING:
    from kvxfer.protocol.lease_ref import LeaseRef
    from kvxfer_vllm.groups import HeldBlocks


@dataclass(frozen=True)
class Read:
    """Fill ``blocks`` of this engine, by cache group, with the lease's KV from ``first_token`` on."""

    request_id: str
    lease: LeaseRef
    blocks: list[HeldBlocks]
    first_token: int


@dataclass(frozen=True)
class Seal:
    """First blocks of a prefill that goes on, by cache group, which are complete when this step has been computed.

    ``before`` says how many of each group are complete now. Groups that drop blocks give none.
    """

    lease: LeaseRef
    blocks: list[list[int]]
    before: list[int]


@dataclass(frozen=True)
class Offer:
    """Prefill is done: these blocks, by cache group, are the lease's until it ends; then ``request_id`` is reported as sent."""

    request_id: str
    lease: LeaseRef
    blocks: list[HeldBlocks]


@dataclass
class KvxferMetadata(KVConnectorMetadata):
    """One step's orders. A worker follows the lists in the order in which they stand here.

    Attributes:
        announce: producer: leases whose tokens are about to be handed out.
        seal: producer: what this step will have computed of prefills.
        offer: producer: finished prefills.
        withdraw: producer: leases that will never be offered.
        hold: consumer: leases to keep alive while their requests wait.
        read: consumer: loads to start.
        drop: consumer: leases that were never read and are not needed; their producer may have its blocks back.
        cancel: consumer: requests that are over while they load; they are still reported, once their blocks are quiet.
        fail: consumer: requests that vLLM waits for in vain, because reading could not even be asked for.
        idle: this step computes nothing.
    """

    announce: list[LeaseRef] = field(default_factory=list)
    seal: list[Seal] = field(default_factory=list)
    offer: list[Offer] = field(default_factory=list)
    withdraw: list[LeaseRef] = field(default_factory=list)
    hold: list[LeaseRef] = field(default_factory=list)
    read: list[Read] = field(default_factory=list)
    drop: list[LeaseRef] = field(default_factory=list)
    cancel: list[str] = field(default_factory=list)
    fail: list[str] = field(default_factory=list)
    idle: bool = False


@dataclass(frozen=True)
class KvxferHandshake(KVConnectorHandshakeMetadata):
    """Where one worker's endpoint listens, for the leases that the scheduler mints."""

    address: str

# SPDX-License-Identifier: Apache-2.0
"""What the scheduler's half tells the workers' halves with each engine step, and what a worker tells once at start-up.

Both are pickled by vLLM, so they hold plain data. They import vLLM's base classes only because vLLM checks for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata

if TYPE_CHECKING:
    from kvxfer.lease import LeaseRef


@dataclass(frozen=True)
class Read:
    """Fill ``blocks`` of this engine with the lease's KV, from the token on with which they begin."""

    request_id: str
    lease: LeaseRef
    blocks: list[int]
    first_token: int


@dataclass(frozen=True)
class Seal:
    """When this step has been computed, these first blocks of a prefill that goes on are complete; ``before`` of them are now."""

    lease: LeaseRef
    blocks: list[int]
    before: int


@dataclass(frozen=True)
class Offer:
    """Prefill is done: these blocks belong to the lease until it ends, then ``request_id`` is reported as sent."""

    request_id: str
    lease: LeaseRef
    blocks: list[int]


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

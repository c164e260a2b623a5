# SPDX-License-Identifier: Apache-2.0
"""One step's orders from the scheduler's half to the workers' halves, and the address that a worker reports at start-up.

vLLM pickles both, so they hold plain data. They have base classes of vLLM because vLLM checks for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.v1.request import Request

    from kvxfer.protocol.lease_ref import LeaseRef
    from kvxfer_vllm.groups import GroupBlocks

IDLE_WAIT_S = 0.005
"""Longest wait of a step that computes nothing: it delays a request that arrives meanwhile by as much."""


@dataclass(frozen=True)
class Traced:
    """Trace of a request, if its client sent one and vLLM exports traces.

    Attributes:
        headers: ``traceparent`` and ``tracestate``, as the client sent them.
        arrived: time of the request's arrival, of the system's clock.
    """

    headers: Mapping[str, str]
    arrived: float

    @classmethod
    def of(cls, request: Request) -> Traced | None:
        """Return the trace of a request."""
        headers = getattr(request, "trace_headers", None)
        return cls(dict(headers), request.arrival_time) if headers else None


@dataclass(frozen=True)
class ReadOrder:
    """Read the lease's KV from ``first_token`` on into ``blocks`` of this engine, by cache group."""

    request_id: str
    lease: LeaseRef
    blocks: list[GroupBlocks]
    first_token: int
    traced: Traced | None = None


@dataclass(frozen=True)
class PartialPublishOrder:
    """Publish the first blocks of a running prefill, which are complete when this step has been computed.

    Attributes:
        lease: of the prefill.
        blocks: by cache group; none of groups that drop blocks.
        complete_before: number of these blocks, by cache group, that are complete before this step.
    """

    lease: LeaseRef
    blocks: list[list[int]]
    complete_before: list[int]


@dataclass(frozen=True)
class PublishOrder:
    """Publish all blocks, by cache group, of a finished prefill; when the lease ends, report ``request_id`` as sent."""

    request_id: str
    lease: LeaseRef
    blocks: list[GroupBlocks]
    traced: Traced | None = None


@dataclass
class KvxferMetadata(KVConnectorMetadata):
    """One step's orders. A worker follows the lists in this order, and ``publish_partial`` when it has computed the step.

    Attributes:
        announce: producer: leases whose tokens are about to be handed out.
        publish_partial: producer: blocks of running prefills that this step completes.
        publish: producer: finished prefills.
        reset: the engine drops its caches, so all leases end and all loads fail that began before this step.
        revoke: producer: leases whose prefill ended without a result.
        acquire: consumer: leases to acquire and renew while their requests wait.
        read: consumer: loads to start.
        release: consumer: leases that are not needed and were not read; the producer may reuse their blocks.
        cancel: consumer: requests that ended while they load; a worker still reports each of them, when its blocks are quiet.
        fail: consumer: requests that vLLM waits for although no load could be ordered; a worker reports them as failed.
        idle: this step computes nothing.
    """

    announce: list[LeaseRef] = field(default_factory=list)
    publish_partial: list[PartialPublishOrder] = field(default_factory=list)
    publish: list[PublishOrder] = field(default_factory=list)
    reset: bool = False
    revoke: list[LeaseRef] = field(default_factory=list)
    acquire: list[LeaseRef] = field(default_factory=list)
    read: list[ReadOrder] = field(default_factory=list)
    release: list[LeaseRef] = field(default_factory=list)
    cancel: list[str] = field(default_factory=list)
    fail: list[str] = field(default_factory=list)
    idle: bool = False


@dataclass(frozen=True)
class KvxferHandshake(KVConnectorHandshakeMetadata):
    """Address of one worker's endpoint, for the leases that the scheduler's half makes."""

    address: str

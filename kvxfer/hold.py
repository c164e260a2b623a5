# SPDX-License-Identifier: Apache-2.0
"""One lease as its consumer holds it: state, what the producer granted, and what there is to read. Pure, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from kvxfer.actions import StartRead
from kvxfer.errors import BlockError, KvxferError

if TYPE_CHECKING:
    from kvxfer.blocks import BlockIds
    from kvxfer.lease import LeaseRef
    from kvxfer.peer import Peer
    from kvxfer.transfer import Transfer
    from kvxfer.wire import Grant

_SHORTEST_RENEWAL_S = 0.02


class HoldState(str, Enum):
    """See the diagram of `kvxfer.consumer`. ENDED is a hold that failed before anybody asked to read it."""

    WAITING = "waiting"
    GRANTED = "granted"
    READING = "reading"
    SETTLING = "settling"
    ENDED = "ended"


@dataclass(eq=False)
class Hold:
    """One lease held by this consumer."""

    ref: LeaseRef
    peer: Peer
    since: float
    deadline: float
    state: HoldState = HoldState.WAITING
    grant: Grant | None = None
    transfer: Transfer | None = None
    error: KvxferError | None = None
    read: bool = False
    ask_at: float = 0.0
    """When to say the next thing to the peer."""

    def renew_at(self, now: float) -> float:
        """Three renewals in the time a lease has: two may be lost. Not more often, whatever a producer grants."""
        return now + max(self.grant.ttl_s / 3 if self.grant is not None else 0.0, _SHORTEST_RENEWAL_S)

    def job(self, transfer: Transfer) -> StartRead | None:
        """What the data thread needs to read it; None before it is granted.

        Raises:
            BlockError: the read does not fit the lease.
        """
        grant, plan = self.grant, self.peer.plan
        if grant is None or plan is None:
            return None
        source = _select([_block_ids(ids) for ids in grant.blocks], transfer.into, transfer.skip_blocks)
        return StartRead(transfer, plan, self.peer.agent_info, source, grant.cell)


def _block_ids(raw: bytes) -> BlockIds:
    if len(raw) % 4:
        raise BlockError(f"a list of block ids has {len(raw)} bytes")
    return np.frombuffer(raw, dtype="<u4").astype(np.int64)


def _select(source: list[BlockIds], into: object, skip_blocks: object) -> list[BlockIds]:
    """The leased blocks that correspond to the target's, per group."""
    targets, skips = list(into), list(skip_blocks)  # type: ignore[call-overload]
    if not len(source) == len(targets) == len(skips):
        raise BlockError(f"the lease covers {len(source)} cache groups, the read {len(targets)}")
    selected = []
    for group, (ids, target, skip) in enumerate(zip(source, targets, skips, strict=True)):
        if skip < 0 or skip + len(target) > len(ids):
            raise BlockError(f"group {group}: blocks {skip} to {skip + len(target)} of {len(ids)} leased ones")
        selected.append(ids[skip : skip + len(target)])
    return selected

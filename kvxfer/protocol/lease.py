# SPDX-License-Identifier: Apache-2.0
"""One lease at its producer: the states, what leads from one to the next, and what is known of the lease. Pure, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvxfer.errors import LeaseError, shown
from kvxfer.protocol.transitions import Transition, TransitionTable

if TYPE_CHECKING:
    from collections.abc import Sequence


class ContradictionError(LeaseError):
    """The published blocks do not begin with those published before, which a consumer may have read since.

    Cure: A fault of the calling engine: each publication of a lease has all blocks of the one before, in their order.
    """


class LeaseState(str, Enum):
    """State of a lease at its producer."""

    UNKNOWN = "unknown"
    """The producer knows nothing of the token, or has forgotten it."""
    EXPECTED = "expected"
    """A consumer has asked for the lease, and the engine has not announced it yet (rendezvous)."""
    ANNOUNCED = "announced"
    """The engine has handed out the token, and no block is complete."""
    PARTIAL = "partial"
    """Some blocks are complete and may be read; more follow."""
    READY = "ready"
    """All blocks are complete, and no consumer has asked for them: the lease's time runs."""
    IN_USE = "in use"
    """All blocks are complete, and a consumer has them."""
    RELEASED = "released"
    """Every rank of the consumer is done with the blocks."""
    EXPIRED = "expired"
    """The time of the lease is up."""
    REVOKED = "revoked"
    """The producer ended the lease."""


class LeaseEvent(str, Enum):
    """Event of a lease at its producer."""

    EXPECT = "expect"
    DISPLACE = "displace"
    ANNOUNCE = "announce"
    PUBLISH_PARTIAL = "publish some blocks"
    PUBLISH = "publish all blocks"
    NO_CELL = "no cell"
    ACQUIRE = "acquire"
    RENEW = "renew"
    RELEASE = "release"
    REVOKE = "revoke"
    EXPIRE = "expire"
    LAST_LONGER_THAN_ALLOWED = "last longer than allowed"


_S, _E = LeaseState, LeaseEvent
_LIVE = (_S.EXPECTED, _S.ANNOUNCED, _S.PARTIAL, _S.READY, _S.IN_USE)

LEASE_TRANSITIONS: TransitionTable[LeaseState, LeaseEvent] = TransitionTable(
    _S.UNKNOWN,
    (_S.RELEASED, _S.EXPIRED, _S.REVOKED),
    Transition((_S.UNKNOWN,), _E.EXPECT, _S.EXPECTED, "Acquire {rendezvous} before the announcement / Pending"),
    Transition((_S.EXPECTED,), _E.DISPLACE, _S.UNKNOWN, "max_leases newer ones are expected"),
    Transition((_S.UNKNOWN, _S.EXPECTED), _E.ANNOUNCE, _S.ANNOUNCED, "announce"),
    Transition((_S.ANNOUNCED, _S.PARTIAL), _E.PUBLISH_PARTIAL, _S.PARTIAL, "publish, not complete / Grant"),
    Transition((_S.ANNOUNCED, _S.PARTIAL), _E.PUBLISH, _S.READY, "publish, complete / Grant"),
    Transition((_S.UNKNOWN, _S.EXPECTED), _E.PUBLISH, _S.REVOKED, "publish without announce / LeaseRevoked"),
    Transition((_S.ANNOUNCED,), _E.NO_CELL, _S.REVOKED, "no cell is free / LeaseRevoked"),
    Transition((_S.EXPECTED, _S.ANNOUNCED), _E.ACQUIRE, None, "Acquire / Pending"),
    Transition((_S.PARTIAL,), _E.ACQUIRE, None, "Acquire / Grant"),
    Transition((_S.READY, _S.IN_USE), _E.ACQUIRE, _S.IN_USE, "Acquire / Grant"),
    Transition((_S.IN_USE,), _E.RENEW, None, "Renew"),
    Transition((_S.UNKNOWN,), _E.RELEASE, _S.RELEASED, "Release before the announcement"),
    Transition(_LIVE, _E.RELEASE, _S.RELEASED, "Release of every rank / LeaseReleased"),
    Transition(
        _LIVE, _E.REVOKE, _S.REVOKED, "revoke, close, other blocks than before, slots not given back / LeaseRevoked"
    ),
    Transition((_S.EXPECTED,), _E.EXPIRE, _S.EXPIRED, "rendezvous_timeout_s"),
    Transition((_S.ANNOUNCED, _S.PARTIAL), _E.EXPIRE, _S.EXPIRED, "announce_timeout_s, or devices late by lease_s"),
    Transition((_S.READY, _S.IN_USE), _E.EXPIRE, _S.EXPIRED, "lease_s without Renew / LeaseExpired"),
    Transition((_S.READY, _S.IN_USE), _E.LAST_LONGER_THAN_ALLOWED, _S.REVOKED, "max_lease_s / LeaseRevoked"),
)


class ConsumerRank(NamedTuple):
    """One process of a consumer: its engine's name, its own epoch, and which of how many ranks it is."""

    name: str
    epoch: str
    rank: int = 0
    world: int = 1


@dataclass(eq=False)
class Lease:
    """One lease of the producer. Only `LeaseTable` changes it.

    A lease belongs to one consumer, whose ranks each read what they need of it. It ends when all of them have released it.

    Attributes:
        blocks: block ids that are readable, per cache group, as little-endian uint32.
        first_tokens: per cache group, the token with which the first block begins.
        cell: address of the lease's cell on the lease board, while it has one.
        check: 16 random bytes in the cell; no other lease ever has the same.
        announced: the engine made the lease known. Otherwise only consumers have named its token.
        end_awaited: the engine has published all blocks, and waits for the one event of the lease's end.
        last_at: when the lease ends, however often it is renewed.
        consumers: processes of the consumer that have asked for the lease, by rank.
        released: ranks that are done with the lease.
        read: some rank read the blocks.
        pause_allowed: the lease was given time after a pause of this process, and no consumer has asked for it since.
    """

    token: str = field(repr=False)
    request: str
    deadline: float
    state: LeaseState = LeaseState.ANNOUNCED
    blocks: list[bytes] = field(default_factory=list)
    first_tokens: list[int] = field(default_factory=list)
    cell: int | None = None
    check: bytes = field(default=b"", repr=False)
    announced: bool = False
    end_awaited: bool = False
    last_at: float = float("inf")
    consumers: dict[int, ConsumerRank] = field(default_factory=dict)
    released: set[int] = field(default_factory=set)
    read: bool = False
    pause_allowed: bool = False

    @property
    def complete(self) -> bool:
        """All of its blocks are readable."""
        return self.state in (LeaseState.READY, LeaseState.IN_USE)

    @property
    def readable(self) -> bool:
        """Some of its blocks are readable."""
        return self.complete or self.state is LeaseState.PARTIAL

    def waiting(self) -> list[ConsumerRank]:
        """Processes that have asked for the lease and not released it."""
        return [consumer for rank, consumer in self.consumers.items() if rank not in self.released]

    def admits(self, consumer: ConsumerRank) -> bool:
        """The lease is free, or has this process or another rank of the same consumer."""
        for known in self.consumers.values():
            same_consumer = (known.name, known.world) == (consumer.name, consumer.world)
            return same_consumer and self.consumers.get(consumer.rank, consumer) == consumer
        return True

    def check_continued(self, blocks: Sequence[bytes], first_tokens: Sequence[int]) -> None:
        """Raise ContradictionError unless each group's blocks begin with those that were published before."""
        for group, (before, after) in enumerate(zip(self.blocks, blocks, strict=False)):
            if not before:
                continue
            what = f"lease {shown(self.token)} of {self.request!r}, group {group}"
            first_before, first_after = (firsts[group] if firsts else 0 for firsts in (self.first_tokens, first_tokens))
            if first_before != first_after:
                raise ContradictionError(
                    f"{what}: it began with token {first_before} when it was published, and now {first_after}"
                )
            if not after.startswith(before):
                old, new = np.frombuffer(before, "<u4"), np.frombuffer(after, "<u4")[: len(before) // 4]
                if len(new) < len(old):
                    raise ContradictionError(f"{what}: {len(old)} blocks were published, and now there are {len(new)}")
                at = int(np.flatnonzero(old != new)[0])
                raise ContradictionError(
                    f"{what}: entry {at} was block {old[at]} when it was published, and now {new[at]}"
                )

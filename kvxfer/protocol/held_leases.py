# SPDX-License-Identifier: Apache-2.0
"""The life of the leases that a consumer holds: what is to be asked of whom, until when, and how each ends. Pure, no I/O.

::

    WAITING --Grants--> GRANTED --read--> READING --ended--> RELEASING --Released--> (forgotten)
       |                  |                                    ^
       +---- drop --------+---- drop, failure -----------------+

A producer has one or more ranks, and a lease is granted, renewed and released at each of them; what its KV is to this rank
(`kvxfer.planner.plan`) is known when all of them were met. Every state has a deadline. Whatever is asked of a peer is asked again
each ``retry_interval_s`` until it answers.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

import msgspec

from kvxfer.errors import (
    BlockError,
    ClosedError,
    IncompatibleError,
    KvxferError,
    LeaseEndedError,
    PeerTimeoutError,
    shown,
)
from kvxfer.protocol.actions import Action, MoreGranted, SendTo, StopRead
from kvxfer.protocol.grants import Assembly
from kvxfer.protocol.held_lease import Asked, HeldLease, HeldLeaseState, RankLease
from kvxfer.protocol.messages import MAX_TOKENS_PER_RENEW, Acquire, Release, Renew
from kvxfer.protocol.peer import PeerState
from kvxfer.protocol.timers import Timers

if TYPE_CHECKING:
    from kvxfer.config import Settings
    from kvxfer.defects import Defects
    from kvxfer.errors import InternalError
    from kvxfer.protocol.lease_ref import LeaseRef
    from kvxfer.protocol.messages import Message, StageChunk
    from kvxfer.protocol.peer import Peer
    from kvxfer.protocol.peers import Peers
    from kvxfer.protocol.transfer import Transfer

_log = logging.getLogger(__name__)

_MOST_UNMET = 32
"""Ranks of one lease at once that are to be met. A first rank may name any addresses as those of the others."""


class HeldLeases:
    """Leases by their token.

    Attributes:
        granted: those that a read may rank_lease: the one thing here that other threads change, by popping.
    """

    def __init__(self, settings: Settings, peers: Peers, out: list[Action], defects: Defects) -> None:
        self._settings = settings
        self._defects = defects
        self._peers = peers
        self._out = out
        self.by_token: dict[str, HeldLease] = {}
        self.granted: dict[str, HeldLease] = {}
        self._timers = Timers()
        self._renewals: dict[str, list[str]] = {}
        """By address, what goes out with the next tick: leases of one peer are renewed together."""

    def in_use(self) -> dict[str, int]:
        """See `Endpoint.in_use`."""
        return {
            "held_leases": len(self.by_token),
            "granted_leases": len(self.granted),
            "held_timers": len(self._timers),
            "asked_chunks": sum(len(hold.asked) for hold in list(self.by_token.values())),
        }

    def acquire(self, ref: LeaseRef, now: float) -> HeldLease:
        """The hold of a lease; one that is new begins to ask for its grants."""
        known = self.by_token.get(ref.token)
        if known is not None:
            return known
        held = self.by_token[ref.token] = HeldLease(ref, now, now + self._settings.unread_lease_s, [])
        self._add_rank(held, 0)
        self.advance(held, now)
        return held

    def read_by(self, transfer: Transfer) -> HeldLease | None:
        """The lease that this transfer is reading, if it still is."""
        held = self.by_token.get(transfer.ref.token)
        under_way = held is not None and held.transfer is transfer and held.state is HeldLeaseState.READING
        return held if under_way else None

    def at(self, peer: Peer, token: str) -> tuple[HeldLease, RankLease] | None:
        """A lease and its rank_lease at one peer; None if that peer has nothing to say about it."""
        held = self.by_token.get(token)
        rank_lease = held.at_rank_of(peer) if held is not None else None
        return (held, rank_lease) if held is not None and rank_lease is not None else None

    def tick(self, now: float) -> None:
        """Do what is due: ask again, renew, give up."""
        for token in self._timers.due(now):
            held = self.by_token.get(token)
            if held is not None:
                self.advance(held, now)
        renewals, self._renewals = self._renewals, {}
        for address, tokens in renewals.items():
            peer = self._peers.by_address.get(address)
            if peer is not None:
                for i in range(0, len(tokens), MAX_TOKENS_PER_RENEW):
                    self._send(peer, Renew(to=peer.epoch, tokens=tokens[i : i + MAX_TOKENS_PER_RENEW]))

    def next_deadline(self) -> float | None:
        """When `tick` has something to do next; may be early, never late."""
        return self._timers.next_at() if not self._renewals else float("-inf")

    def close(self) -> None:
        """End everything, and let producers have back what is held."""
        for held in self.by_token.values():
            if held.transfer is not None:
                held.transfer.end(ClosedError("the endpoint was closed"))
            for rank_lease in held.rank_leases:
                if rank_lease.peer.is_met and not rank_lease.released:
                    self._send(rank_lease.peer, Release(to=rank_lease.peer.epoch, token=held.ref.token, read=held.read))
                rank_lease.peer.needed_by.pop(held.ref.token, None)
            self._timers.cancel(held.ref.token)
        self.by_token.clear()
        self.granted.clear()
        self._renewals.clear()

    # -- what happens to them ---------------------------------------------------------------------------------------

    def advance_all(self, peer: Peer, now: float) -> None:
        """Something is new at a peer: see what that means for the leases that need it."""
        for held, rank_lease in self._of(peer):
            if held.state is not HeldLeaseState.READING and held.ref.token in self.by_token:
                rank_lease.ask_at = now
                self.advance(held, now)

    def gone(self, peer: Peer, error: KvxferError, now: float) -> None:
        """Nobody listens at a peer's address any more. Its engine made these leases, so it did once, and with it they have ended.

        A shared reference may be earlier than its engine, if that was never met: it is waited for.
        """
        for held, rank_lease in self._of(peer):
            if held.state in (HeldLeaseState.RELEASING, HeldLeaseState.FAILED):
                self.done_with(held, rank_lease, now)
            elif held.ref.rendezvous and not peer.name:
                continue
            elif held.state is HeldLeaseState.READING:
                self.stop_read(held, error)
            else:
                self.fail(held, error, now, rank_lease)

    def lost(self, peer: Peer, now: float) -> None:
        """Another process lives at a peer's address: what the one before had granted is void."""
        for held, rank_lease in self._of(peer):
            if held.state is HeldLeaseState.WAITING:
                held.routers = None  # they are of the memory of the one that is gone
            if held.state in (HeldLeaseState.RELEASING, HeldLeaseState.FAILED):
                self.done_with(held, rank_lease, now)
            elif held.state is HeldLeaseState.READING:
                if not rank_lease.complete:
                    self.stop_read(held, LeaseEndedError("the producer was restarted"))
            elif rank_lease.grant is not None:
                self.fail(held, LeaseEndedError("the producer was restarted"), now, rank_lease)

    def ask_chunk(self, held: HeldLease, source: int, message: StageChunk, now: float) -> None:
        """Ask one of a read's sources for a chunk, again and again until it is there."""
        peer = held.rank_leases[source].peer
        held.asked[source, message.number] = Asked(message, now, now + self._settings.retry_interval_s)
        self._send(peer, msgspec.structs.replace(message, to=peer.epoch))
        self.advance(held, now)

    def stop_read(self, held: HeldLease, error: KvxferError) -> None:
        """No more grants and chunks will come: a read that waits for one ends. Of bytes in flight the lease board decides."""
        if held.waits and held.transfer is not None:
            held.asked.clear()
            self._out.append(StopRead(held.transfer, error))

    def fail(self, held: HeldLease, error: KvxferError, now: float, rank_lease: RankLease | None = None) -> None:
        """Not in flight: the target blocks are quiet. ``rank_lease`` is the one that failed, to which nothing is to be said."""
        self.granted.pop(held.ref.token, None)
        held.error = error
        if rank_lease is not None:
            rank_lease.released = True
        if held.transfer is None:
            held.state = HeldLeaseState.FAILED  # until somebody asks to read it
            self._ask_all(held, now)
        else:
            held.transfer.end(error)
            self.release(held, now)

    def release(self, held: HeldLease, now: float) -> None:
        """It is not needed any more: tell each rank, which then has its blocks back."""
        self.granted.pop(held.ref.token, None)
        held.state = HeldLeaseState.RELEASING
        held.deadline = now + self._settings.lease_s
        if all(rank_lease.released for rank_lease in held.rank_leases):
            self.forget(held, now)
        else:
            self._ask_all(held, now)

    def done_with(self, held: HeldLease, rank_lease: RankLease, now: float) -> None:
        """One rank has nothing more to be told."""
        for each in held.rank_leases:
            each.released = each.released or each.peer is rank_lease.peer
        if held.state is HeldLeaseState.RELEASING and all(each.released for each in held.rank_leases):
            self.forget(held, now)

    def advance(self, held: HeldLease, now: float) -> None:
        """Do the next thing for a held, and set the timer for the one after. A fault in that ends the held, and its read."""
        try:
            self._advance(held, now)
        except Exception as error:  # noqa: BLE001 - the other holds are not touched
            self.broken(held, self._defects.caught(error), now)

    def broken(self, held: HeldLease, error: InternalError, now: float) -> None:
        """A fault of kvxfer while something was done for a held: the read that it is for ends with it."""
        if self.by_token.get(held.ref.token) is not held:
            return
        self.granted.pop(held.ref.token, None)
        if held.state is HeldLeaseState.READING:
            # Of bytes in flight the data thread takes care, which also keeps the deadline; the lease is renewed until then.
            if held.transfer is not None:
                self._out.append(StopRead(held.transfer, error))
            self._timers.set(held.ref.token, now + self._settings.retry_interval_s)
        elif held.state in (HeldLeaseState.RELEASING, HeldLeaseState.FAILED):
            self.forget(held, now)  # the lease's own deadline frees the producer
        else:
            self.fail(held, error, now)

    def forget(self, held: HeldLease, now: float) -> None:
        """Nothing more is to be done for it."""
        token = held.ref.token
        self.by_token.pop(token, None)
        self.granted.pop(token, None)
        self._timers.cancel(token)
        for rank_lease in held.rank_leases:
            if token in rank_lease.peer.needed_by:
                self._peers.need_no_more(rank_lease.peer, token, now)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _advance(self, held: HeldLease, now: float) -> None:
        if held.state is not HeldLeaseState.READING and now >= held.deadline:
            self._give_up(held, now)  # of a read the data thread keeps the deadline; only the renewals go on
            return
        self._spread(held)
        for rank_lease in list(held.rank_leases):
            if not rank_lease.released and held.ref.token in self.by_token:
                self._advance_rank(held, rank_lease, now)
        self._ask_again(held, now)
        if held.ref.token in self.by_token and held.state is HeldLeaseState.WAITING:
            self._plan(held, now)
        if held.ref.token not in self.by_token:
            return
        if held.transfer is not None and held.may_begin:
            self._start(held, held.transfer, now)
        if held.ref.token in self.by_token:
            self._schedule(held, now)

    def _schedule(self, held: HeldLease, now: float) -> None:
        silence_s = self._settings.peer_timeout_s
        silences = [(max(c.peer.heard_at, since) + silence_s, c.peer.address) for c, since in held.waits_for()]
        silent = [address for at, address in silences if at <= now]
        if silent:
            why = f"{held.ref.producer!r} has said nothing for {silence_s:g} s: {', '.join(silent[:3])}"
            if held.state is not HeldLeaseState.READING:
                self.fail(held, PeerTimeoutError(why), now)
                return
            self.stop_read(held, PeerTimeoutError(why))
        dues = [max(rank_lease.ask_at, now + 0.001) for rank_lease in held.rank_leases if not rank_lease.released]
        dues += [max(asked.again_at, now + 0.001) for asked in held.asked.values()]
        if held.state is not HeldLeaseState.READING:
            dues.append(held.deadline)
        dues += [at for at, _ in silences if at > now]
        if dues:
            self._timers.set(held.ref.token, min(dues))

    def _spread(self, held: HeldLease) -> None:
        """Once the first rank was met, rank_lease the lease at the others, as many at a time as may be unmet.

        So a stranger's reference opens one connection only.
        """
        first = held.rank_leases[0]
        if not held.spread and first.peer.is_met and held.mistake(first) is None:
            unmet = sum(not rank_lease.peer.is_met for rank_lease in held.rank_leases)
            while not held.spread and unmet < _MOST_UNMET:
                self._add_rank(held, len(held.rank_leases))
                unmet += not held.rank_leases[-1].peer.is_met

    def _add_rank(self, held: HeldLease, number: int) -> None:
        peer = self._peers.need(held.addresses[number], number, held.ref.token, held.ref.producer)
        held.rank_leases.append(RankLease(peer, pieces=Assembly(self._peers.most_ids)))

    def _advance_rank(self, held: HeldLease, rank_lease: RankLease, now: float) -> None:
        peer = rank_lease.peer
        if not peer.is_met:
            if held.state is not HeldLeaseState.FAILED:
                self._meet(held, rank_lease, now)
        elif held.state in (HeldLeaseState.RELEASING, HeldLeaseState.FAILED):
            self._ask(rank_lease, Release(to=peer.epoch, token=held.ref.token, read=held.read), now)
        elif not rank_lease.complete:
            self._ask_grant(held, rank_lease, now)
        elif now >= rank_lease.ask_at:
            rank_lease.ask_at = rank_lease.renew_at(now)
            self._renewals.setdefault(peer.address, []).append(held.ref.token)

    def _meet(self, held: HeldLease, rank_lease: RankLease, now: float) -> None:
        peer = rank_lease.peer
        rank_lease.ask_at = now + self._settings.retry_interval_s
        if peer.state is PeerState.REFUSED and peer.error is not None and peer.greeted_at >= held.since:
            if held.state is HeldLeaseState.RELEASING:
                self.done_with(held, rank_lease, now)
            elif held.state is HeldLeaseState.READING:
                self.stop_read(held, peer.error)
            else:
                self.fail(held, peer.error, now, rank_lease)
        else:
            self._peers.meet(peer, now)

    def _ask_grant(self, held: HeldLease, rank_lease: RankLease, now: float) -> None:
        peer, mistake = rank_lease.peer, held.mistake(rank_lease)
        if mistake is None:
            peer.confirmed = True
            have, check = (rank_lease.pieces.have, rank_lease.pieces.check) if rank_lease.wants_more else ([], b"")
            message = Acquire(
                to=peer.epoch, token=held.ref.token, rendezvous=held.ref.rendezvous, have=have, check=check
            )
            self._ask(rank_lease, message, now)
        elif held.state is HeldLeaseState.READING:
            self.stop_read(held, mistake)
        elif peer.met_at >= held.since:
            # An engine that the lease is of, if not with these ranks, may have the blocks back.
            self.fail(held, mistake, now, rank_lease if mistake.code == "identity" else None)
        else:
            self._peers.greet(peer, now)  # perhaps another process lives there since we met
            rank_lease.ask_at = now + self._settings.retry_interval_s

    def _ask(self, rank_lease: RankLease, message: Acquire | Release, now: float) -> None:
        """Say it when it is due, and when it is this rank_lease's turn: thousands of leases do not all ask one peer at once."""
        if now < rank_lease.ask_at:
            return
        pace = rank_lease.peer.pace
        if rank_lease.turn_at is None:
            rank_lease.turn_at = pace.reserve(now)
        rank_lease.ask_at = rank_lease.turn_at
        if now >= rank_lease.turn_at:
            rank_lease.turn_at = None
            rank_lease.ask_at = now + max(
                self._settings.retry_interval_s, pace.repeat_s(len(rank_lease.peer.needed_by))
            )
            self._send(rank_lease.peer, message)

    def _ask_again(self, held: HeldLease, now: float) -> None:
        for (source, _), asked in held.asked.items():
            peer = held.rank_leases[source].peer
            if now >= asked.again_at and peer.is_met:
                asked.again_at = now + self._settings.retry_interval_s
                self._send(peer, msgspec.structs.replace(asked.message, to=peer.epoch))

    def _ask_all(self, held: HeldLease, now: float) -> None:
        for rank_lease in held.rank_leases:
            rank_lease.ask_at = now
        self.advance(held, now)

    def _plan(self, held: HeldLease, now: float) -> None:
        """All ranks were met: what is their KV to us? And granted by all: it can be read."""
        if not held.met:
            return
        if held.routers is None:
            try:
                held.routers = self._peers.routers([rank_lease.peer for rank_lease in held.rank_leases])
            except IncompatibleError as error:
                self.fail(held, error, now)
                return
        if held.granted:
            held.state = HeldLeaseState.GRANTED
            if held.transfer is None:
                with contextlib.suppress(BlockError):  # the read will find it again, and fail
                    for rank_lease in held.rank_leases:
                        rank_lease.leased()  # here, where nobody waits for it
                self.granted[held.ref.token] = held

    def _start(self, held: HeldLease, transfer: Transfer, now: float) -> None:
        self.granted.pop(held.ref.token, None)
        try:
            job = held.job(transfer)
        except BlockError as error:
            self.fail(held, error, now)
            return
        if job is None:
            return
        held.state = HeldLeaseState.READING
        for rank_lease in held.rank_leases:
            if rank_lease.complete:
                rank_lease.ask_at = rank_lease.renew_at(now)
        self._out.append(job)

    def more_granted(self, held: HeldLease, rank_lease: RankLease, now: float) -> None:
        """A lease that is being read has more to read."""
        if held.transfer is None:
            return
        try:
            source = held.source(held.rank_leases.index(rank_lease), held.transfer)
        except BlockError as error:
            self._out.append(StopRead(held.transfer, error))
            return
        if source is not None:
            self._out.append(MoreGranted(held.transfer, source))
        self._schedule(held, now)

    def _give_up(self, held: HeldLease, now: float) -> None:
        if held.state in (HeldLeaseState.RELEASING, HeldLeaseState.FAILED):
            self.forget(held, now)  # the lease's own deadline frees the producer
        elif held.transfer is not None:
            waited = f"{now - held.transfer.started:.1f} s"
            unmet = [rank_lease.peer.address for rank_lease in held.rank_leases if not rank_lease.peer.name]
            what = "to be met" if unmet else "for its blocks"
            who = unmet or [rank_lease.peer.address for rank_lease in held.rank_leases if rank_lease.grant is None]
            self.fail(held, PeerTimeoutError(f"waited {waited} {what}: {', '.join(who[:3])}"), now)
        else:
            _log.warning("lease %s of %r was held too long without a read", shown(held.ref.token), held.ref.request)
            self.release(held, now)

    def _of(self, peer: Peer) -> list[tuple[HeldLease, RankLease]]:
        return [found for token in list(peer.needed_by) if (found := self.at(peer, token)) is not None]

    def _send(self, peer: Peer, message: Message) -> None:
        self._out.append(SendTo(peer.address, message))

# SPDX-License-Identifier: Apache-2.0
"""The leases that a consumer holds: what is to be done for each, until when, and how each ends. Pure, no I/O.

`kvxfer.protocol.held_lease` has the states and what leads from one to the next, and `kvxfer.protocol.lease_requests` sends what is
asked here. A producer has one or more ranks, and a lease is granted, renewed and released at each of them. Every state has a
deadline. Whatever is asked of a peer is asked again each ``retry_interval_s`` until it answers.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from kvxfer.errors import (
    BlockError,
    ClosedError,
    IncompatibleError,
    KvxferError,
    LeaseEndedError,
    PeerTimeoutError,
    shown,
)
from kvxfer.protocol.actions import Action, MoreGranted, StopRead
from kvxfer.protocol.grants import Assembly
from kvxfer.protocol.held_lease import HeldLease, HeldLeaseEvent, HeldLeaseState, RankLease
from kvxfer.protocol.lease_requests import LeaseRequests
from kvxfer.protocol.peer import PeerState
from kvxfer.protocol.timers import Timers

if TYPE_CHECKING:
    from kvxfer.config import Settings
    from kvxfer.defects import Defects
    from kvxfer.errors import InternalError
    from kvxfer.protocol.lease_ref import LeaseRef
    from kvxfer.protocol.messages import StageChunk, StopWrite, Write
    from kvxfer.protocol.peer import Peer
    from kvxfer.protocol.peers import Peers
    from kvxfer.protocol.transfer import Transfer

_log = logging.getLogger(__name__)

_MOST_UNMET = 32
"""Most ranks of one lease that are to be met at once. A first rank may name any addresses as those of the others."""
_SHORTEST_PAUSE_S = 0.001


class HeldLeases:
    """Leases by their token.

    Attributes:
        granted: leases that a read may claim. Other threads pop from it; nothing else here is changed by them.
    """

    def __init__(self, settings: Settings, peers: Peers, out: list[Action], defects: Defects) -> None:
        self._settings = settings
        self._defects = defects
        self._peers = peers
        self._out = out
        self._requests = LeaseRequests(settings, out)
        self.by_token: dict[str, HeldLease] = {}
        self.granted: dict[str, HeldLease] = {}
        self._timers = Timers()

    def in_use(self) -> dict[str, int]:
        """See `Endpoint.in_use`."""
        return {
            "held_leases": len(self.by_token),
            "granted_leases": len(self.granted),
            "held_timers": len(self._timers),
            "asked": sum(len(held.asked) for held in list(self.by_token.values())),
        }

    def acquire(self, ref: LeaseRef, now: float) -> HeldLease:
        """The held lease of a reference. A new one begins to ask for its grants."""
        known = self.by_token.get(ref.token)
        if known is not None:
            return known
        held = self.by_token[ref.token] = HeldLease(ref, now, now + self._settings.unread_lease_s, [])
        held.step(HeldLeaseEvent.ACQUIRE)
        self._add_rank(held, 0)
        self.advance(held, now)
        return held

    def read_by(self, transfer: Transfer) -> HeldLease | None:
        """The lease that this transfer is reading, if it still is."""
        held = self.by_token.get(transfer.ref.token)
        is_read = held is not None and held.transfer is transfer and held.state is HeldLeaseState.READING
        return held if is_read else None

    def at(self, peer: Peer, token: str) -> tuple[HeldLease, RankLease] | None:
        """A lease, and its share at one peer; None if that peer has nothing to say about it."""
        held = self.by_token.get(token)
        rank_lease = held.at_rank_of(peer) if held is not None else None
        return (held, rank_lease) if held is not None and rank_lease is not None else None

    def of(self, peer: Peer) -> list[tuple[HeldLease, RankLease]]:
        """Leases that need a peer, each with its share there."""
        return [found for token in list(peer.needed_by) if (found := self.at(peer, token)) is not None]

    def tick(self, now: float) -> None:
        """Do what is due: ask again, renew, give up."""
        for token in self._timers.due(now):
            held = self.by_token.get(token)
            if held is not None:
                self.advance(held, now)
        self._requests.send_renewals(self._peers.by_address)

    def next_deadline(self) -> float | None:
        """Time at which `tick` has something to do next, or earlier; None if never."""
        return float("-inf") if self._requests.renewals_wait else self._timers.next_at()

    def close(self) -> None:
        """End everything, and tell producers that their blocks are not needed any more."""
        for held in self.by_token.values():
            if held.transfer is not None:
                held.transfer.end(ClosedError("the endpoint was closed"))
            self._requests.release_at_once(held)
            for rank_lease in held.rank_leases:
                rank_lease.peer.needed_by.pop(held.ref.token, None)
            self._timers.cancel(held.ref.token)
            held.step(HeldLeaseEvent.DISCARD)
        self.by_token.clear()
        self.granted.clear()
        self._requests.clear()

    # -- what happens at peers --------------------------------------------------------------------------------------

    def advance_all(self, peer: Peer, now: float) -> None:
        """Do what follows for all leases that need a peer of which something is new."""
        for held, rank_lease in self.of(peer):
            if held.state is not HeldLeaseState.READING and held.ref.token in self.by_token:
                rank_lease.ask_at = now
                self.advance(held, now)

    def gone(self, peer: Peer, error: KvxferError, now: float) -> None:
        """End the leases of a peer at whose address no process listens any more. Its engine made them, and they ended with it.

        A rendezvous may be earlier than its producer: where that was never met, it is waited for.
        """
        for held, rank_lease in self.of(peer):
            if held.is_over or not held.ref.rendezvous or peer.name:
                self.rank_failed(held, rank_lease, error, now)

    def lost(self, peer: Peer, now: float) -> None:
        """End what another process at a peer's address had granted: a new one has taken its place."""
        for held, rank_lease in self.of(peer):
            if held.state is HeldLeaseState.WAITING:
                held.routes = None  # they are of the memory of the process that is gone
            granted_before = rank_lease.grant is not None
            if held.state is HeldLeaseState.READING:
                # Of bytes that are all on their way the lease check decides, unless it is the one that is gone who moves them.
                writes = held.asks_writes(held.rank_leases.index(rank_lease))
                granted_before = writes or not rank_lease.complete
            if held.is_over or granted_before:
                self.rank_failed(held, rank_lease, LeaseEndedError("the producer was restarted"), now)

    def rank_failed(self, held: HeldLease, rank_lease: RankLease, error: KvxferError, now: float) -> None:
        """Take what ends a lease at one rank: nothing more is to be said to that rank."""
        if held.is_unread:
            self.fail(held, error, now, rank_lease)
        elif held.state is HeldLeaseState.READING:
            self.stop_read(held, error)
        else:
            self.released_by(held, rank_lease, now)

    def released_by(self, held: HeldLease, rank_lease: RankLease, now: float) -> None:
        """Note that nothing more is to be said to one rank."""
        for each in held.rank_leases:
            each.released = each.released or each.peer is rank_lease.peer
        if held.state is HeldLeaseState.RELEASING and all(each.released for each in held.rank_leases):
            self.forget(held, now, HeldLeaseEvent.ALL_RELEASED)

    # -- what happens to one lease ----------------------------------------------------------------------------------

    def ask(self, held: HeldLease, source: int, message: StageChunk | Write | StopWrite, now: float) -> None:
        """Ask one of a read's sources for a chunk or a write, again and again until it is there."""
        self._requests.ask(held, source, message, now)
        self.advance(held, now)

    def send_write(self, held: HeldLease, source: int, number: int, now: float) -> None:
        """Send a write in full once more to a source that asks for it."""
        self._requests.send_write(held, source, number, now)

    def stop_read(self, held: HeldLease, error: KvxferError) -> None:
        """End a read that waits for a grant or a chunk, because none will come. Of bytes in flight the lease check decides."""
        if held.waits and held.transfer is not None:
            held.asked.clear()
            self._out.append(StopRead(held.transfer, error))

    def fail(self, held: HeldLease, error: KvxferError, now: float, rank_lease: RankLease | None = None) -> None:
        """Fail a lease of which nothing is in flight, and its read.

        Args:
            rank_lease: the share that failed; nothing is to be said to that rank.
        """
        self.granted.pop(held.ref.token, None)
        held.error = error
        if rank_lease is not None:
            rank_lease.released = True
        if held.transfer is not None:
            held.transfer.end(error)
            self.release(held, now, HeldLeaseEvent.FAIL_READ)
        elif held.step(HeldLeaseEvent.FAIL_UNREAD):
            self._ask_all(held, now)

    def release(self, held: HeldLease, now: float, event: HeldLeaseEvent = HeldLeaseEvent.RELEASE) -> None:
        """Tell each rank that its blocks are not needed any more."""
        self.granted.pop(held.ref.token, None)
        if not held.step(event):
            return
        held.deadline = now + self._settings.lease_s
        if all(rank_lease.released for rank_lease in held.rank_leases):
            self.forget(held, now, HeldLeaseEvent.ALL_RELEASED)
        else:
            self._ask_all(held, now)

    def advance(self, held: HeldLease, now: float) -> None:
        """Do the next thing for a lease, and set the timer for the one after. A fault in that ends the lease, and its read."""
        try:
            self._advance(held, now)
        except Exception as error:  # noqa: BLE001 - the other leases are not touched
            self.broken(held, self._defects.caught(error), now)

    def broken(self, held: HeldLease, error: InternalError, now: float) -> None:
        """End a lease and its read, because kvxfer failed while it did something for them."""
        if self.by_token.get(held.ref.token) is not held:
            return
        self.granted.pop(held.ref.token, None)
        if held.state is HeldLeaseState.READING:
            # Of bytes in flight the data thread takes care, which also keeps the deadline; the lease is renewed until then.
            if held.transfer is not None:
                self._out.append(StopRead(held.transfer, error))
            self._timers.set(held.ref.token, now + self._settings.retry_interval_s)
        elif held.is_over:
            self.forget(held, now)  # the lease's own deadline frees the producer
        else:
            self.fail(held, error, now)

    def forget(self, held: HeldLease, now: float, event: HeldLeaseEvent = HeldLeaseEvent.DISCARD) -> None:
        """Do nothing more for a lease."""
        held.step(event)
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
        self._add_ranks(held)
        for rank_lease in list(held.rank_leases):
            if not rank_lease.released and held.ref.token in self.by_token:
                self._advance_rank(held, rank_lease, now)
        self._requests.repeat_asked(held, now)
        if held.ref.token in self.by_token and held.state is HeldLeaseState.WAITING:
            self._plan(held, now)
        if held.ref.token not in self.by_token:
            return
        if held.transfer is not None and held.may_begin:
            self._start(held, held.transfer, now)
        if held.ref.token in self.by_token:
            self._schedule(held, now)

    def _schedule(self, held: HeldLease, now: float) -> None:
        """Set the timer for the next thing to do. A peer that has been silent for too long ends the read."""
        silence_s = self._settings.peer_timeout_s
        silences = [(max(c.peer.heard_at, since) + silence_s, c.peer.address) for c, since in held.waits_for()]
        silent = [address for at, address in silences if at <= now]
        if silent:
            why = f"{held.ref.producer!r} has said nothing for {silence_s:g} s: {', '.join(silent[:3])}"
            if held.state is not HeldLeaseState.READING:
                self.fail(held, PeerTimeoutError(why), now)
                return
            self.stop_read(held, PeerTimeoutError(why))
        dues = [max(each.ask_at, now + _SHORTEST_PAUSE_S) for each in held.rank_leases if not each.released]
        dues += [max(asked.again_at, now + _SHORTEST_PAUSE_S) for asked in held.asked.values()]
        if held.state is not HeldLeaseState.READING:
            dues.append(held.deadline)
        dues += [at for at, _ in silences if at > now]
        if dues:
            self._timers.set(held.ref.token, min(dues))

    def _add_ranks(self, held: HeldLease) -> None:
        """Once the first rank was met, acquire the lease at the others, as many at a time as may be unmet.

        So a reference made by an unknown peer opens one connection only.
        """
        first = held.rank_leases[0]
        if not held.spread and first.peer.is_met and held.mistake(first) is None:
            unmet = sum(not rank_lease.peer.is_met for rank_lease in held.rank_leases)
            while not held.spread and unmet < _MOST_UNMET:
                self._add_rank(held, len(held.rank_leases))
                unmet += not held.rank_leases[-1].peer.is_met

    def _add_rank(self, held: HeldLease, number: int) -> None:
        peer = self._peers.need(held.addresses[number], number, held.ref.token, held.ref.producer)
        held.rank_leases.append(RankLease(peer, batches=Assembly(self._peers.most_ids)))

    def _advance_rank(self, held: HeldLease, rank_lease: RankLease, now: float) -> None:
        if not rank_lease.peer.is_met:
            if held.state is not HeldLeaseState.FAILED:
                self._meet(held, rank_lease, now)
        elif held.is_over:
            self._requests.release(held, rank_lease, now)
        elif rank_lease.complete:
            self._requests.renew(held, rank_lease, now)
        else:
            self._ask_grant(held, rank_lease, now)

    def _meet(self, held: HeldLease, rank_lease: RankLease, now: float) -> None:
        peer = rank_lease.peer
        rank_lease.ask_at = now + self._settings.retry_interval_s
        if peer.state is PeerState.REFUSED and peer.error is not None and peer.greeted_at >= held.since:
            self.rank_failed(held, rank_lease, peer.error, now)
        else:
            self._peers.meet(peer, now)

    def _ask_grant(self, held: HeldLease, rank_lease: RankLease, now: float) -> None:
        peer, mistake = rank_lease.peer, held.mistake(rank_lease)
        if mistake is None:
            peer.confirmed = True
            self._requests.acquire(held, rank_lease, now)
        elif held.state is HeldLeaseState.READING:
            self.stop_read(held, mistake)
        elif peer.met_at >= held.since:
            # An engine that the lease is of, even if not with these ranks, may have the blocks back.
            self.fail(held, mistake, now, rank_lease if mistake.code == "identity" else None)
        else:
            self._peers.greet(peer, now)  # another process may live there since we met
            rank_lease.ask_at = now + self._settings.retry_interval_s

    def _ask_all(self, held: HeldLease, now: float) -> None:
        for rank_lease in held.rank_leases:
            rank_lease.ask_at = now
        self.advance(held, now)

    def _plan(self, held: HeldLease, now: float) -> None:
        """All ranks were met: what is their KV to us? And granted by all: it can be read."""
        if not held.met:
            return
        if held.routes is None:
            try:
                held.routes = self._peers.routes([rank_lease.peer for rank_lease in held.rank_leases])
            except IncompatibleError as error:
                self.fail(held, error, now)
                return
        if held.granted:
            held.step(HeldLeaseEvent.GRANT_ALL)
            if held.transfer is None:
                with contextlib.suppress(BlockError):  # the read will find it again, and fail
                    for rank_lease in held.rank_leases:
                        rank_lease.leased()  # here, where no read waits for it
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
        held.step(HeldLeaseEvent.BEGIN_READ)
        for rank_lease in held.rank_leases:
            if rank_lease.complete:
                rank_lease.ask_at = rank_lease.renew_at(now)
        self._out.append(job)

    def more_granted(self, held: HeldLease, rank_lease: RankLease, now: float) -> None:
        """A lease that is being read has more to read."""
        if held.transfer is None:
            return
        try:
            source = held.source(held.rank_leases.index(rank_lease))
        except BlockError as error:
            self._out.append(StopRead(held.transfer, error))
            return
        if source is not None:
            self._out.append(MoreGranted(held.transfer, source))
        self._schedule(held, now)

    def _give_up(self, held: HeldLease, now: float) -> None:
        if held.is_over:
            self.forget(held, now, HeldLeaseEvent.TIME_OUT)  # the lease's own deadline frees the producer
        elif held.transfer is not None:
            waited = f"{now - held.transfer.started:.1f} s"
            unmet = [rank_lease.peer.address for rank_lease in held.rank_leases if not rank_lease.peer.name]
            what = "to be met" if unmet else "for its blocks"
            waits = unmet or [each.peer.address for each in held.rank_leases if each.grant is None]
            self.fail(held, PeerTimeoutError(f"waited {waited} {what}: {', '.join(waits[:3])}"), now)
        else:
            _log.warning("lease %s of %r was held too long without a read", shown(held.ref.token), held.ref.request)
            self.release(held, now, HeldLeaseEvent.TIME_OUT)

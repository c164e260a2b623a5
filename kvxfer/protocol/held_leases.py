# SPDX-License-Identifier: Apache-2.0
"""The life of the leases that a consumer holds: what is to be asked of whom, until when, and how each ends. Pure, no I/O.

::

    WAITING --Grants--> GRANTED --read--> READING --ended--> SETTLING --Released--> (forgotten)
       |                  |                                    ^
       +---- drop --------+---- drop, failure -----------------+

A producer has one or more ranks, and a lease is granted, renewed and settled at each of them; what its KV is to this rank
(`kvxfer.planner.plan`) is known when all of them were met. Every state has a deadline. Whatever is asked of a peer is asked again
each ``retry_s`` until it answers.
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
from kvxfer.protocol.held_lease import Asked, Claim, Hold, HoldState
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
    from kvxfer.protocol.peers import Acquaintances
    from kvxfer.protocol.transfer import Transfer

_log = logging.getLogger(__name__)

_MOST_UNMET = 32
"""Ranks of one lease at once that are to be met. A first rank may name any addresses as those of the others."""


class Holds:
    """Leases by their token.

    Attributes:
        granted: those that a read may claim: the one thing here that other threads change, by popping.
    """

    def __init__(self, settings: Settings, peers: Acquaintances, out: list[Action], defects: Defects) -> None:
        self._settings = settings
        self._defects = defects
        self._peers = peers
        self._out = out
        self.by_token: dict[str, Hold] = {}
        self.granted: dict[str, Hold] = {}
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

    def acquire(self, ref: LeaseRef, now: float) -> Hold:
        """The hold of a lease; one that is new begins to ask for its grants."""
        known = self.by_token.get(ref.token)
        if known is not None:
            return known
        hold = self.by_token[ref.token] = Hold(ref, now, now + self._settings.hold_s, [])
        self._claim(hold, 0)
        self.pump(hold, now)
        return hold

    def read_by(self, transfer: Transfer) -> Hold | None:
        """The lease that this transfer is reading, if it still is."""
        hold = self.by_token.get(transfer.ref.token)
        under_way = hold is not None and hold.transfer is transfer and hold.state is HoldState.READING
        return hold if under_way else None

    def at(self, peer: Peer, token: str) -> tuple[Hold, Claim] | None:
        """A lease and its claim at one peer; None if that peer has nothing to say about it."""
        hold = self.by_token.get(token)
        claim = hold.claim_at(peer) if hold is not None else None
        return (hold, claim) if hold is not None and claim is not None else None

    def tick(self, now: float) -> None:
        """Do what is due: ask again, renew, give up."""
        for token in self._timers.due(now):
            hold = self.by_token.get(token)
            if hold is not None:
                self.pump(hold, now)
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
        for hold in self.by_token.values():
            if hold.transfer is not None:
                hold.transfer.end(ClosedError("the endpoint was closed"))
            for claim in hold.claims:
                if claim.peer.is_met and not claim.settled:
                    self._send(claim.peer, Release(to=claim.peer.epoch, token=hold.ref.token, read=hold.read))
                claim.peer.needed_by.pop(hold.ref.token, None)
            self._timers.cancel(hold.ref.token)
        self.by_token.clear()
        self.granted.clear()
        self._renewals.clear()

    # -- what happens to them ---------------------------------------------------------------------------------------

    def pump_all(self, peer: Peer, now: float) -> None:
        """Something is new at a peer: see what that means for the leases that need it."""
        for hold, claim in self._of(peer):
            if hold.state is not HoldState.READING and hold.ref.token in self.by_token:
                claim.ask_at = now
                self.pump(hold, now)

    def gone(self, peer: Peer, error: KvxferError, now: float) -> None:
        """Nobody listens at a peer's address any more. Its engine made these leases, so it did once, and with it they have ended.

        A shared reference may be earlier than its engine, if that was never met: it is waited for.
        """
        for hold, claim in self._of(peer):
            if hold.state in (HoldState.SETTLING, HoldState.ENDED):
                self.done_with(hold, claim, now)
            elif hold.ref.rendezvous and not peer.name:
                continue
            elif hold.state is HoldState.READING:
                self.stop_read(hold, error)
            else:
                self.fail(hold, error, now, claim)

    def lost(self, peer: Peer, now: float) -> None:
        """Another process lives at a peer's address: what the one before had granted is void."""
        for hold, claim in self._of(peer):
            if hold.state is HoldState.WAITING:
                hold.routers = None  # they are of the memory of the one that is gone
            if hold.state in (HoldState.SETTLING, HoldState.ENDED):
                self.done_with(hold, claim, now)
            elif hold.state is HoldState.READING:
                if not claim.complete:
                    self.stop_read(hold, LeaseEndedError("the producer was restarted"))
            elif claim.grant is not None:
                self.fail(hold, LeaseEndedError("the producer was restarted"), now, claim)

    def ask_chunk(self, hold: Hold, source: int, message: StageChunk, now: float) -> None:
        """Ask one of a read's sources for a chunk, again and again until it is there."""
        peer = hold.claims[source].peer
        hold.asked[source, message.number] = Asked(message, now, now + self._settings.retry_s)
        self._send(peer, msgspec.structs.replace(message, to=peer.epoch))
        self.pump(hold, now)

    def stop_read(self, hold: Hold, error: KvxferError) -> None:
        """No more grants and chunks will come: a read that waits for one ends. Of bytes in flight the lease board decides."""
        if hold.waits and hold.transfer is not None:
            hold.asked.clear()
            self._out.append(StopRead(hold.transfer, error))

    def fail(self, hold: Hold, error: KvxferError, now: float, claim: Claim | None = None) -> None:
        """Not in flight: the target blocks are quiet. ``claim`` is the one that failed, to which nothing is to be said."""
        self.granted.pop(hold.ref.token, None)
        hold.error = error
        if claim is not None:
            claim.settled = True
        if hold.transfer is None:
            hold.state = HoldState.ENDED  # until somebody asks to read it
            self._ask_all(hold, now)
        else:
            hold.transfer.end(error)
            self.settle(hold, now)

    def settle(self, hold: Hold, now: float) -> None:
        """It is not needed any more: tell each rank, which then has its blocks back."""
        self.granted.pop(hold.ref.token, None)
        hold.state = HoldState.SETTLING
        hold.deadline = now + self._settings.lease_s
        if all(claim.settled for claim in hold.claims):
            self.forget(hold, now)
        else:
            self._ask_all(hold, now)

    def done_with(self, hold: Hold, claim: Claim, now: float) -> None:
        """One rank has nothing more to be told."""
        for each in hold.claims:
            each.settled = each.settled or each.peer is claim.peer
        if hold.state is HoldState.SETTLING and all(each.settled for each in hold.claims):
            self.forget(hold, now)

    def pump(self, hold: Hold, now: float) -> None:
        """Do the next thing for a hold, and set the timer for the one after. A fault in that ends the hold, and its read."""
        try:
            self._pump(hold, now)
        except Exception as error:  # noqa: BLE001 - the other holds are not touched
            self.broken(hold, self._defects.caught(error), now)

    def broken(self, hold: Hold, error: InternalError, now: float) -> None:
        """A fault of kvxfer while something was done for a hold: the read that it is for ends with it."""
        if self.by_token.get(hold.ref.token) is not hold:
            return
        self.granted.pop(hold.ref.token, None)
        if hold.state is HoldState.READING:
            # Of bytes in flight the data thread takes care, which also keeps the deadline; the lease is renewed until then.
            if hold.transfer is not None:
                self._out.append(StopRead(hold.transfer, error))
            self._timers.set(hold.ref.token, now + self._settings.retry_s)
        elif hold.state in (HoldState.SETTLING, HoldState.ENDED):
            self.forget(hold, now)  # the lease's own deadline frees the producer
        else:
            self.fail(hold, error, now)

    def forget(self, hold: Hold, now: float) -> None:
        """Nothing more is to be done for it."""
        token = hold.ref.token
        self.by_token.pop(token, None)
        self.granted.pop(token, None)
        self._timers.cancel(token)
        for claim in hold.claims:
            if token in claim.peer.needed_by:
                self._peers.need_no_more(claim.peer, token, now)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _pump(self, hold: Hold, now: float) -> None:
        if hold.state is not HoldState.READING and now >= hold.deadline:
            self._give_up(hold, now)  # of a read the data thread keeps the deadline; only the renewals go on
            return
        self._spread(hold)
        for claim in list(hold.claims):
            if not claim.settled and hold.ref.token in self.by_token:
                self._pump_claim(hold, claim, now)
        self._ask_again(hold, now)
        if hold.ref.token in self.by_token and hold.state is HoldState.WAITING:
            self._plan(hold, now)
        if hold.ref.token not in self.by_token:
            return
        if hold.transfer is not None and hold.may_begin:
            self._start(hold, hold.transfer, now)
        if hold.ref.token in self.by_token:
            self._schedule(hold, now)

    def _schedule(self, hold: Hold, now: float) -> None:
        silence_s = self._settings.peer_timeout_s
        silences = [(max(c.peer.heard_at, since) + silence_s, c.peer.address) for c, since in hold.waits_for()]
        silent = [address for at, address in silences if at <= now]
        if silent:
            why = f"{hold.ref.owner!r} has said nothing for {silence_s:g} s: {', '.join(silent[:3])}"
            if hold.state is not HoldState.READING:
                self.fail(hold, PeerTimeoutError(why), now)
                return
            self.stop_read(hold, PeerTimeoutError(why))
        dues = [max(claim.ask_at, now + 0.001) for claim in hold.claims if not claim.settled]
        dues += [max(asked.again_at, now + 0.001) for asked in hold.asked.values()]
        if hold.state is not HoldState.READING:
            dues.append(hold.deadline)
        dues += [at for at, _ in silences if at > now]
        if dues:
            self._timers.set(hold.ref.token, min(dues))

    def _spread(self, hold: Hold) -> None:
        """Once the first rank was met, claim the lease at the others, as many at a time as may be unmet.

        So a stranger's reference opens one connection only.
        """
        first = hold.claims[0]
        if not hold.spread and first.peer.is_met and hold.mistake(first) is None:
            unmet = sum(not claim.peer.is_met for claim in hold.claims)
            while not hold.spread and unmet < _MOST_UNMET:
                self._claim(hold, len(hold.claims))
                unmet += not hold.claims[-1].peer.is_met

    def _claim(self, hold: Hold, number: int) -> None:
        peer = self._peers.need(hold.addresses[number], number, hold.ref.token, hold.ref.owner)
        hold.claims.append(Claim(peer, pieces=Assembly(self._peers.most_ids)))

    def _pump_claim(self, hold: Hold, claim: Claim, now: float) -> None:
        peer = claim.peer
        if not peer.is_met:
            if hold.state is not HoldState.ENDED:
                self._meet(hold, claim, now)
        elif hold.state in (HoldState.SETTLING, HoldState.ENDED):
            self._ask(claim, Release(to=peer.epoch, token=hold.ref.token, read=hold.read), now)
        elif not claim.complete:
            self._ask_grant(hold, claim, now)
        elif now >= claim.ask_at:
            claim.ask_at = claim.renew_at(now)
            self._renewals.setdefault(peer.address, []).append(hold.ref.token)

    def _meet(self, hold: Hold, claim: Claim, now: float) -> None:
        peer = claim.peer
        claim.ask_at = now + self._settings.retry_s
        if peer.state is PeerState.REFUSED and peer.error is not None and peer.greeted_at >= hold.since:
            if hold.state is HoldState.SETTLING:
                self.done_with(hold, claim, now)
            elif hold.state is HoldState.READING:
                self.stop_read(hold, peer.error)
            else:
                self.fail(hold, peer.error, now, claim)
        else:
            self._peers.meet(peer, now)

    def _ask_grant(self, hold: Hold, claim: Claim, now: float) -> None:
        peer, mistake = claim.peer, hold.mistake(claim)
        if mistake is None:
            peer.confirmed = True
            have, check = (claim.pieces.have, claim.pieces.check) if claim.wants_more else ([], b"")
            message = Acquire(
                to=peer.epoch, token=hold.ref.token, rendezvous=hold.ref.rendezvous, have=have, check=check
            )
            self._ask(claim, message, now)
        elif hold.state is HoldState.READING:
            self.stop_read(hold, mistake)
        elif peer.met_at >= hold.since:
            # An engine that the lease is of, if not with these ranks, may have the blocks back.
            self.fail(hold, mistake, now, claim if mistake.code == "identity" else None)
        else:
            self._peers.greet(peer, now)  # perhaps another process lives there since we met
            claim.ask_at = now + self._settings.retry_s

    def _ask(self, claim: Claim, message: Acquire | Release, now: float) -> None:
        """Say it when it is due, and when it is this claim's turn: thousands of leases do not all ask one peer at once."""
        if now < claim.ask_at:
            return
        pace = claim.peer.pace
        if claim.turn_at is None:
            claim.turn_at = pace.reserve(now)
        claim.ask_at = claim.turn_at
        if now >= claim.turn_at:
            claim.turn_at = None
            claim.ask_at = now + max(self._settings.retry_s, pace.repeat_s(len(claim.peer.needed_by)))
            self._send(claim.peer, message)

    def _ask_again(self, hold: Hold, now: float) -> None:
        for (source, _), asked in hold.asked.items():
            peer = hold.claims[source].peer
            if now >= asked.again_at and peer.is_met:
                asked.again_at = now + self._settings.retry_s
                self._send(peer, msgspec.structs.replace(asked.message, to=peer.epoch))

    def _ask_all(self, hold: Hold, now: float) -> None:
        for claim in hold.claims:
            claim.ask_at = now
        self.pump(hold, now)

    def _plan(self, hold: Hold, now: float) -> None:
        """All ranks were met: what is their KV to us? And granted by all: it can be read."""
        if not hold.met:
            return
        if hold.routers is None:
            try:
                hold.routers = self._peers.routers([claim.peer for claim in hold.claims])
            except IncompatibleError as error:
                self.fail(hold, error, now)
                return
        if hold.granted:
            hold.state = HoldState.GRANTED
            if hold.transfer is None:
                with contextlib.suppress(BlockError):  # the read will find it again, and fail
                    for claim in hold.claims:
                        claim.leased()  # here, where nobody waits for it
                self.granted[hold.ref.token] = hold

    def _start(self, hold: Hold, transfer: Transfer, now: float) -> None:
        self.granted.pop(hold.ref.token, None)
        try:
            job = hold.job(transfer)
        except BlockError as error:
            self.fail(hold, error, now)
            return
        if job is None:
            return
        hold.state = HoldState.READING
        for claim in hold.claims:
            if claim.complete:
                claim.ask_at = claim.renew_at(now)
        self._out.append(job)

    def more_granted(self, hold: Hold, claim: Claim, now: float) -> None:
        """A lease that is being read has more to read."""
        if hold.transfer is None:
            return
        try:
            source = hold.source(hold.claims.index(claim), hold.transfer)
        except BlockError as error:
            self._out.append(StopRead(hold.transfer, error))
            return
        if source is not None:
            self._out.append(MoreGranted(hold.transfer, source))
        self._schedule(hold, now)

    def _give_up(self, hold: Hold, now: float) -> None:
        if hold.state in (HoldState.SETTLING, HoldState.ENDED):
            self.forget(hold, now)  # the lease's own deadline frees the producer
        elif hold.transfer is not None:
            waited = f"{now - hold.transfer.started:.1f} s"
            unmet = [claim.peer.address for claim in hold.claims if not claim.peer.name]
            what = "to be met" if unmet else "for its blocks"
            who = unmet or [claim.peer.address for claim in hold.claims if claim.grant is None]
            self.fail(hold, PeerTimeoutError(f"waited {waited} {what}: {', '.join(who[:3])}"), now)
        else:
            _log.warning("lease %s of %r was held too long without a read", shown(hold.ref.token), hold.ref.request)
            self.settle(hold, now)

    def _of(self, peer: Peer) -> list[tuple[Hold, Claim]]:
        return [found for token in list(peer.needed_by) if (found := self.at(peer, token)) is not None]

    def _send(self, peer: Peer, message: Message) -> None:
        self._out.append(SendTo(peer.address, message))

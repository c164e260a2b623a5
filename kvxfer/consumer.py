# SPDX-License-Identifier: Apache-2.0
"""The consumer's half of the protocol: meets producers, opens and renews leases, starts reads, settles. Pure, no I/O.

A lease that this side holds goes through

::

    WAITING --Grants--> GRANTED --read--> READING --ended--> SETTLING --Settled--> (forgotten)
       |                  |                                    ^
       +---- drop --------+---- drop, failure -----------------+

A producer has one or more ranks, and a lease is granted, renewed and settled at each of them; what its KV is to this rank
(`kvxfer.plan`) is known when all of them were met. Every state has a deadline. Whatever is asked of a peer is asked again
each ``retry_s`` until it answers.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

from kvxfer.actions import Action, ChunkStaged, ForgetAgent, Hangup, SendTo, StartRead, StopRead
from kvxfer.errors import (
    BlockError,
    ClosedError,
    HandshakeError,
    IncompatibleError,
    KvxferError,
    LeaseEndedError,
    LeaseError,
    LeaseUnknownError,
    PeerTimeoutError,
    TransferFailedError,
)
from kvxfer.hold import Asked, Claim, Hold, HoldState
from kvxfer.peer import Identity, Peer, PeerState
from kvxfer.timers import Timers
from kvxfer.wire import (
    MAX_TOKENS_PER_RENEW,
    Grant,
    Message,
    Open,
    Pending,
    Refused,
    Renew,
    Renewed,
    Revoked,
    Settle,
    Settled,
    Stage,
    Staged,
    Unstage,
    Welcome,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.config import Settings
    from kvxfer.lease import LeaseRef
    from kvxfer.metrics import Metrics
    from kvxfer.route import Router
    from kvxfer.transfer import Transfer

    Routes = Callable[[Sequence[Peer]], Sequence[Router]]

_log = logging.getLogger(__name__)

_LEASE_ERRORS: dict[str, type[LeaseError]] = {
    "unknown_lease": LeaseUnknownError,
    "ended_lease": LeaseEndedError,
    "taken_lease": LeaseError,
}


class Consumer:
    """All leases that this endpoint holds, and the producers they came from.

    All calls but `take` come from the control thread, which then takes what has been added to ``out``. The engine hears
    of a failure through the transfer; a hold that fails before it is read fails the read.

    Args:
        routes: how KV travels from these peers, all ranks of one producer, to this side; raises IncompatibleError.
    """

    def __init__(
        self, identity: Identity, settings: Settings, metrics: Metrics, out: list[Action], routes: Routes
    ) -> None:
        self._me = identity
        self._settings = settings
        self._metrics = metrics
        self._out = out
        self._routes = routes
        self._routers: dict[tuple[tuple[str, str], ...], Sequence[Router] | IncompatibleError] = {}
        """By address and epoch of each rank."""
        self._peers: dict[str, Peer] = {}
        self._holds: dict[str, Hold] = {}
        self._of_peer: dict[str, set[str]] = {}
        self._granted: dict[str, Hold] = {}
        """Those that `take` may claim: the one thing here that other threads change, by popping."""
        self._timers = Timers()
        """Keys are tokens of holds and addresses of peers that nothing is asked of."""
        self._renewals: dict[str, list[str]] = {}

    # -- the engine -------------------------------------------------------------------------------------------------

    def hold(self, ref: LeaseRef, now: float) -> Hold:
        """Open a lease ahead of its read, and renew it from then on. Known already: nothing changes."""
        known = self._holds.get(ref.token)
        if known is not None:
            return known
        hold = Hold(ref, now, now + self._settings.hold_s, [])
        self._holds[ref.token] = hold
        self._claim(hold, 0)
        self._pump(hold, now)
        return hold

    def read(self, transfer: Transfer, now: float) -> None:
        """Read a lease, held before or not. The transfer ends by `Transfer.end`, at its deadline at the latest."""
        hold = self.hold(transfer.ref, now)
        if hold.transfer is not None or hold.state in (HoldState.READING, HoldState.SETTLING):
            transfer.end(LeaseError(f"lease {transfer.ref.token} was read or dropped before"))
            return
        hold.transfer = transfer
        hold.deadline = transfer.deadline
        if hold.state is HoldState.ENDED:
            self._fail(hold, hold.error or LeaseError("the lease ended"), now)
        else:
            self._pump(hold, now)

    def take(self, transfer: Transfer) -> StartRead | None:
        """Any thread: claim a lease that was granted ahead, for a read that need not wait for the control thread.

        What is looked at here may change in this moment. That is harmless: the lease board decides whether bytes count.

        Returns:
            the job for the data thread, of which `reading` has to be told before; None if `read` is the way.
        """
        hold = self._granted.pop(transfer.ref.token, None)
        if hold is None or hold.state is not HoldState.GRANTED or hold.transfer is not None or not hold.met:
            return None
        try:
            return hold.job(transfer)
        except BlockError:
            return None  # `read` will find the same, and fail it

    def granted(self, token: str) -> bool:
        """Any thread: `take` would find it."""
        return token in self._granted

    def reading(self, transfer: Transfer) -> None:
        """A read was claimed by `take`."""
        hold = self._holds.get(transfer.ref.token)
        if hold is not None and hold.transfer is None and hold.state in (HoldState.GRANTED, HoldState.ENDED):
            hold.transfer, hold.deadline, hold.state = transfer, transfer.deadline, HoldState.READING

    def drop(self, ref: LeaseRef, now: float) -> None:
        """The blocks will not be read: let the producer have them back. While they are being read: no effect."""
        hold = self.hold(ref, now)
        if hold.state in (HoldState.WAITING, HoldState.GRANTED):
            if hold.transfer is not None:
                hold.transfer.end(LeaseError("dropped by this engine before it was read"))
            self._settle(hold, now)
        elif hold.state is HoldState.ENDED:
            self._settle(hold, now)

    # -- the data thread --------------------------------------------------------------------------------------------

    def stage(self, transfer: Transfer, source: int, message: Stage, now: float) -> None:
        """A read needs a chunk packed by one of its sources: ask for it, again and again until it is there."""
        hold = self._reading(transfer)
        if hold is None:
            # Dropped, or read a second time, in the moment in which `take` claimed it; or over by now.
            self._out.append(StopRead(transfer, LeaseEndedError("the lease was dropped before it was read")))
            return
        peer = hold.claims[source].peer
        hold.asked[source, message.number] = Asked(message, now, now + self._settings.retry_s)
        self._send(peer.address, msgspec.structs.replace(message, to=peer.epoch))
        self._pump(hold, now)

    def unstage(self, transfer: Transfer, source: int, numbers: list[int]) -> None:
        """A read has taken these chunks."""
        hold = self._reading(transfer)
        if hold is not None:
            peer = hold.claims[source].peer
            for number in numbers:
                hold.asked.pop((source, number), None)
            self._send(peer.address, Unstage(to=peer.epoch, token=hold.ref.token, numbers=numbers))

    def read_ended(self, transfer: Transfer, error: KvxferError | None, now: float) -> None:
        """The data thread is done with a read it was given; it has ended the transfer itself."""
        hold = self._reading(transfer)
        if hold is None:
            return  # dropped, or read a second time, in the moment in which `take` claimed it
        hold.read = error is None
        hold.asked.clear()
        if error is not None and error.retryable:
            # A peer may have been restarted, or may have replaced its agent: meet it afresh before the next read.
            for claim in hold.claims:
                claim.peer.state = PeerState.UNKNOWN
        self._settle(hold, now)

    # -- the clock --------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Do what is due: ask again, renew, give up."""
        for key in self._timers.due(now):
            hold = self._holds.get(key)
            if hold is not None:
                self._pump(hold, now)
            elif key in self._peers:
                self._retire(self._peers[key])
        for address, tokens in self._renewals.items():
            epoch = self._peers[address].epoch
            for i in range(0, len(tokens), MAX_TOKENS_PER_RENEW):
                self._send(address, Renew(to=epoch, tokens=tokens[i : i + MAX_TOKENS_PER_RENEW]))
        self._renewals.clear()

    def next_deadline(self) -> float | None:
        """When `tick` has something to do next; may be early, never late."""
        return self._timers.next_at() if not self._renewals else float("-inf")

    def close(self) -> None:
        """End everything, and let producers have back what is held. The data path must have been closed before."""
        for hold in self._holds.values():
            if hold.transfer is not None:
                hold.transfer.end(ClosedError("the endpoint was closed"))
            for claim in hold.claims:
                if claim.peer.is_met and not claim.settled:
                    self._send(claim.peer.address, Settle(to=claim.peer.epoch, token=hold.ref.token, read=hold.read))
        self._holds.clear()
        self._granted.clear()
        self._of_peer.clear()
        self._renewals.clear()

    # -- producers --------------------------------------------------------------------------------------------------

    def garbage(self, address: str, why: str) -> None:
        """A peer that we connected to sends something that is no message."""
        self._metrics.count("kvxfer_refused_messages_total", reason="garbage")
        _log.warning("%s sends garbage: %s", address, why)

    def unreachable(self, address: str, why: str, now: float) -> None:
        """The address cannot even be connected to."""
        peer = self._peers.get(address)
        if peer is not None:
            peer.refused(HandshakeError("address", why))
            self._pump_all(peer, now)

    def received(self, address: str, message: Message, now: float) -> None:
        """Take one message of the peer at ``address``."""
        peer = self._peers.get(address)
        if peer is None:
            return
        peer.heard_at = now
        if isinstance(message, Welcome):
            self._welcome(peer, message, now)
        elif isinstance(message, Refused):
            self._refused(peer, message, now)
        elif isinstance(message, Renewed):
            for token in message.ended:
                self._ended(peer, token, "the producer says the lease has ended", now)
        elif isinstance(message, Revoked):
            self._ended(peer, message.token, message.reason, now)
        elif isinstance(message, (Pending, Grant, Staged, Settled)):
            hold, claim = self._mine(peer, message.token)
            if hold is not None and claim is not None:
                self._answered(hold, claim, message, now)
        else:
            self.garbage(address, f"{type(message).__name__} is not for a consumer")

    # -- inside -----------------------------------------------------------------------------------------------------

    def _answered(self, hold: Hold, claim: Claim, message: Pending | Grant | Staged | Settled, now: float) -> None:
        if isinstance(message, Grant) and hold.state is HoldState.WAITING and claim.grant is None:
            claim.grant = message
            claim.ask_at = claim.renew_at(now)
            self._pump(hold, now)
        elif isinstance(message, Staged) and hold.state is HoldState.READING and hold.transfer is not None:
            source = hold.claims.index(claim)
            if hold.asked.pop((source, message.number), None) is not None:
                self._out.append(ChunkStaged(hold.transfer, source, message.number, message.address))
        elif isinstance(message, Settled) and hold.state in (HoldState.SETTLING, HoldState.ENDED):
            self._done_with(hold, claim, now)

    def _welcome(self, peer: Peer, message: Welcome, now: float) -> None:
        old_agent = peer.agent_info
        repeated = peer.is_met
        gone = peer.welcomed(self._me, message, now)
        self._metrics.count("kvxfer_handshakes_total", outcome="met" if peer.error is None else peer.error.code)
        if old_agent and old_agent != peer.agent_info:
            self._out.append(ForgetAgent(old_agent))
        if gone is not None:
            _log.warning("%s at %s was restarted (epoch %s, before %s)", peer.name, peer.address, peer.epoch, gone)
            self._forget_routers(peer)
            for hold, claim in self._holds_of(peer):
                if hold.state is HoldState.WAITING:
                    hold.routers = None  # they are of the memory of the one that is gone
                if hold.state in (HoldState.SETTLING, HoldState.ENDED):
                    self._done_with(hold, claim, now)
                elif claim.grant is not None and hold.state is not HoldState.READING:
                    self._fail(hold, LeaseEndedError("the producer was restarted"), now, claim)
        elif repeated and peer.is_met:
            return  # a busy producer answers each Hello of a long wait: that must not multiply all questions
        self._pump_all(peer, now)

    def _refused(self, peer: Peer, message: Refused, now: float) -> None:
        code, reason = message.code, message.reason
        if code in _LEASE_ERRORS:
            self._lease_over(peer, message.token, _LEASE_ERRORS[code](reason), now)
        elif code == "staging":
            hold, _ = self._mine(peer, message.token)
            self._stop_read(hold, TransferFailedError(f"{peer.name or peer.address} cannot stage: {reason}"))
        elif code in ("stale_epoch", "not_introduced"):
            # Restarted, or it forgot us. Its Welcome tells which. One that says so to everything is not asked faster.
            if peer.is_met:
                if now >= peer.greeted_at + self._settings.retry_s:
                    self._greet(peer, now)
                else:
                    peer.state = PeerState.GREETED  # each hold greets again when it is due
        elif code == "rank" and message.rank is not None:
            # Some lease names it for another rank than its own. Leases that name it rightly ask again when they are due.
            if peer.state is PeerState.GREETED:
                peer.rank = message.rank
        elif peer.state is PeerState.GREETED:
            self._metrics.count("kvxfer_handshakes_total", outcome=code)
            peer.refused(HandshakeError(code, f"{peer.address} refused: {reason}"))
            self._pump_all(peer, now)
        else:
            _log.warning("%s refused a message: %s: %s", peer.address, code, reason)

    def _ended(self, peer: Peer, token: str, reason: str, now: float) -> None:
        self._lease_over(peer, token, LeaseEndedError(reason), now)

    def _lease_over(self, peer: Peer, token: str, error: LeaseError, now: float) -> None:
        hold, claim = self._mine(peer, token)
        if hold is None or claim is None:
            return
        if hold.state in (HoldState.WAITING, HoldState.GRANTED):
            self._fail(hold, error, now, claim)
        elif hold.state is HoldState.READING:
            # Bytes in flight are let in: the lease board decides whether they count. Only no more chunks will come.
            self._stop_read(hold, error)
        else:
            self._done_with(hold, claim, now)

    def _stop_read(self, hold: Hold | None, error: KvxferError) -> None:
        if hold is not None and hold.state is HoldState.READING and hold.transfer is not None and hold.asked:
            hold.asked.clear()
            self._out.append(StopRead(hold.transfer, error))

    def _pump(self, hold: Hold, now: float) -> None:
        """Do the next thing for a hold, and set the timer for the one after."""
        if hold.state is not HoldState.READING and now >= hold.deadline:
            self._give_up(hold, now)  # of a read the data thread keeps the deadline; only the renewals go on
            return
        self._spread(hold)
        for claim in list(hold.claims):
            if not claim.settled and hold.ref.token in self._holds:
                self._pump_claim(hold, claim, now)
        self._ask_again(hold, now)
        if hold.ref.token in self._holds and hold.state is HoldState.WAITING:
            self._plan(hold, now)
        if hold.ref.token not in self._holds:
            return
        if hold.state is HoldState.GRANTED and hold.transfer is not None and hold.met:
            self._start(hold, hold.transfer, now)
        if hold.ref.token in self._holds:
            self._schedule(hold, now)

    def _schedule(self, hold: Hold, now: float) -> None:
        silent_at = self._silent_at(hold)
        if silent_at is not None and now >= silent_at:
            error = PeerTimeoutError(
                f"a producer has said nothing for {self._settings.peer_timeout_s:g} s: {hold.ref.owner}"
            )
            if hold.state is HoldState.READING:
                self._stop_read(hold, error)
            else:
                self._fail(hold, error, now)
                return
        dues = [max(claim.ask_at, now + 0.001) for claim in hold.claims if not claim.settled]
        dues += [max(asked.again_at, now + 0.001) for asked in hold.asked.values()]
        if hold.state is not HoldState.READING:
            dues.append(hold.deadline)
        if silent_at is not None and silent_at > now:
            dues.append(silent_at)
        if dues:
            self._timers.set(hold.ref.token, min(dues))

    def _spread(self, hold: Hold) -> None:
        """Once the first rank was met, claim the lease at the others: a stranger's reference opens one connection only."""
        first = hold.claims[0]
        if not hold.spread and first.peer.is_met and hold.mistake(first) is None:
            for number in range(1, len(hold.ref.addresses)):
                self._claim(hold, number)

    def _claim(self, hold: Hold, number: int) -> None:
        address = hold.ref.addresses[number]
        peer = self._peers.setdefault(address, Peer(address, number))
        self._timers.cancel(address)
        hold.claims.append(Claim(peer))
        self._of_peer.setdefault(address, set()).add(hold.ref.token)

    def _pump_claim(self, hold: Hold, claim: Claim, now: float) -> None:
        peer = claim.peer
        if not peer.is_met:
            if hold.state is not HoldState.ENDED:
                self._meet(hold, claim, now)
        elif hold.state in (HoldState.SETTLING, HoldState.ENDED):
            self._ask(claim, Settle(to=peer.epoch, token=hold.ref.token, read=hold.read), now)
        elif claim.grant is None:
            self._ask_grant(hold, claim, now)
        elif now >= claim.ask_at:
            claim.ask_at = claim.renew_at(now)
            self._renewals.setdefault(peer.address, []).append(hold.ref.token)

    def _plan(self, hold: Hold, now: float) -> None:
        """All ranks were met: what is their KV to us? And granted by all: it can be read."""
        if not hold.met:
            return
        if hold.routers is None:
            peers = [claim.peer for claim in hold.claims]
            key = tuple((peer.address, peer.epoch) for peer in peers)
            if key not in self._routers:
                try:
                    self._routers[key] = self._routes(peers)
                except IncompatibleError as error:
                    self._metrics.count("kvxfer_handshakes_total", outcome="incompatible")
                    self._routers[key] = error
            routers = self._routers[key]
            if isinstance(routers, IncompatibleError):
                self._fail(hold, IncompatibleError(routers.axis, str(routers)), now)  # each read raises its own
                return
            hold.routers = routers
        if hold.granted:
            hold.state = HoldState.GRANTED
            if hold.transfer is None:
                self._granted[hold.ref.token] = hold

    def _meet(self, hold: Hold, claim: Claim, now: float) -> None:
        peer = claim.peer
        claim.ask_at = now + self._settings.retry_s
        if peer.state is PeerState.REFUSED and peer.error is not None and peer.greeted_at >= hold.since:
            if hold.state is HoldState.SETTLING:
                self._done_with(hold, claim, now)
            elif hold.state is not HoldState.READING:
                self._fail(hold, peer.error, now, claim)
            return
        if peer.state is not PeerState.GREETED or now >= peer.greeted_at + self._settings.retry_s:
            self._greet(peer, now)

    def _greet(self, peer: Peer, now: float) -> None:
        self._send(peer.address, peer.greet(self._me, now))

    def _ask_grant(self, hold: Hold, claim: Claim, now: float) -> None:
        peer, mistake = claim.peer, hold.mistake(claim)
        if mistake is None:
            self._ask(claim, Open(to=peer.epoch, token=hold.ref.token), now)
        elif peer.met_at >= hold.since:
            # An engine that the lease is of, if not with these ranks, may have the blocks back.
            self._fail(hold, mistake, now, claim if mistake.code == "identity" else None)
        else:
            self._greet(peer, now)  # perhaps another process lives there since we met
            claim.ask_at = now + self._settings.retry_s

    def _ask(self, claim: Claim, message: Open | Settle, now: float) -> None:
        if now >= claim.ask_at:
            claim.ask_at = now + self._settings.retry_s
            self._send(claim.peer.address, message)

    def _ask_again(self, hold: Hold, now: float) -> None:
        for (source, _), asked in hold.asked.items():
            peer = hold.claims[source].peer
            if now >= asked.again_at and peer.is_met:
                asked.again_at = now + self._settings.retry_s
                self._send(peer.address, msgspec.structs.replace(asked.message, to=peer.epoch))

    def _silent_at(self, hold: Hold) -> float | None:
        """When a peer that a read waits for has been silent for too long."""
        if hold.transfer is None or hold.state in (HoldState.SETTLING, HoldState.ENDED):
            return None
        if hold.state is HoldState.READING:
            since = {hold.claims[source].peer.address: asked.since for (source, _), asked in hold.asked.items()}
            heard = [max(self._peers[address].heard_at, at) for address, at in since.items()]
        else:
            waiting = [
                c for c in hold.claims if not c.peer.is_met or (c.grant is None and hold.state is HoldState.WAITING)
            ]
            heard = [max(claim.peer.heard_at, hold.transfer.started) for claim in waiting]
        return min(heard) + self._settings.peer_timeout_s if heard else None

    def _start(self, hold: Hold, transfer: Transfer, now: float) -> None:
        self._granted.pop(hold.ref.token, None)
        try:
            job = hold.job(transfer)
        except BlockError as error:
            self._fail(hold, error, now)
            return
        if job is None:
            return
        hold.state = HoldState.READING
        for claim in hold.claims:
            claim.ask_at = claim.renew_at(now)
        self._out.append(job)

    def _give_up(self, hold: Hold, now: float) -> None:
        if hold.state in (HoldState.SETTLING, HoldState.ENDED):
            self._forget(hold, now)  # the lease's own deadline frees the producer
        elif hold.transfer is not None:
            waited = f"{now - hold.transfer.started:.1f} s"
            unmet = [claim.peer.address for claim in hold.claims if not claim.peer.name]
            what = "to be met" if unmet else "for its blocks"
            who = unmet or [claim.peer.address for claim in hold.claims if claim.grant is None]
            self._fail(hold, PeerTimeoutError(f"waited {waited} {what}: {', '.join(who[:3])}"), now)
        else:
            _log.warning("lease %s of %r was held too long without a read", hold.ref.token, hold.ref.request)
            self._settle(hold, now)

    def _fail(self, hold: Hold, error: KvxferError, now: float, claim: Claim | None = None) -> None:
        """Not in flight: the target blocks are quiet. ``claim`` is the one that failed, to which nothing is to be said."""
        self._granted.pop(hold.ref.token, None)
        hold.error = error
        if claim is not None:
            claim.settled = True
        if hold.transfer is None:
            hold.state = HoldState.ENDED  # until somebody asks to read it
            self._ask_all(hold, now)
        else:
            hold.transfer.end(error)
            self._settle(hold, now)

    def _settle(self, hold: Hold, now: float) -> None:
        self._granted.pop(hold.ref.token, None)
        hold.state = HoldState.SETTLING
        hold.deadline = now + self._settings.lease_s
        if all(claim.settled for claim in hold.claims):
            self._forget(hold, now)
        else:
            self._ask_all(hold, now)

    def _ask_all(self, hold: Hold, now: float) -> None:
        for claim in hold.claims:
            claim.ask_at = now
        self._pump(hold, now)

    def _done_with(self, hold: Hold, claim: Claim, now: float) -> None:
        """One rank has nothing more to be told."""
        for each in hold.claims:
            each.settled = each.settled or each.peer is claim.peer
        if hold.state is HoldState.SETTLING and all(each.settled for each in hold.claims):
            self._forget(hold, now)

    def _forget(self, hold: Hold, now: float) -> None:
        self._holds.pop(hold.ref.token, None)
        self._granted.pop(hold.ref.token, None)
        self._timers.cancel(hold.ref.token)
        for peer in [claim.peer for claim in hold.claims]:
            tokens = self._of_peer.get(peer.address)
            if tokens is None:
                continue
            tokens.discard(hold.ref.token)
            if not tokens:
                del self._of_peer[peer.address]
                # A stranger's address that never became a peer is not worth keeping a socket for.
                self._timers.set(peer.address, now + (self._settings.idle_peer_s if peer.name else 0.0))

    def _retire(self, peer: Peer) -> None:
        if peer.address not in self._of_peer:
            del self._peers[peer.address]
            self._renewals.pop(peer.address, None)
            self._forget_routers(peer)
            self._out.append(Hangup(peer.address))
            if peer.agent_info:
                self._out.append(ForgetAgent(peer.agent_info))

    def _forget_routers(self, peer: Peer) -> None:
        for key in [key for key in self._routers if any(address == peer.address for address, _ in key)]:
            del self._routers[key]

    def _reading(self, transfer: Transfer) -> Hold | None:
        hold = self._holds.get(transfer.ref.token)
        under_way = hold is not None and hold.transfer is transfer and hold.state is HoldState.READING
        return hold if under_way else None

    def _mine(self, peer: Peer, token: str) -> tuple[Hold | None, Claim | None]:
        hold = self._holds.get(token)
        claim = hold.claim_at(peer) if hold is not None else None
        return (hold, claim) if claim is not None else (None, None)

    def _holds_of(self, peer: Peer) -> list[tuple[Hold, Claim]]:
        holds = [self._holds[token] for token in self._of_peer.get(peer.address, ())]
        return [(hold, claim) for hold in holds if (claim := hold.claim_at(peer)) is not None]

    def _pump_all(self, peer: Peer, now: float) -> None:
        for hold, claim in self._holds_of(peer):
            if hold.state is not HoldState.READING and hold.ref.token in self._holds:
                claim.ask_at = now
                self._pump(hold, now)

    def _send(self, address: str, message: Message) -> None:
        self._out.append(SendTo(address, message))

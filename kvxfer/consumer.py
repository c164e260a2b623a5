# SPDX-License-Identifier: Apache-2.0
"""The consumer's half of the protocol: meets producers, opens and renews leases, starts reads, settles. Pure, no I/O.

A lease that this side holds goes through

::

    WAITING --Grant--> GRANTED --read--> READING --ended--> SETTLING --Settled--> (forgotten)
       |                  |                                    ^
       +---- drop --------+---- drop, failure -----------------+

Every state has a deadline. Whatever is asked of a peer is asked again each ``retry_s`` until it answers.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvxfer.actions import Action, ForgetAgent, Hangup, SendTo, StartRead
from kvxfer.errors import (
    BlockError,
    ClosedError,
    HandshakeError,
    KvxferError,
    LeaseEndedError,
    LeaseError,
    LeaseUnknownError,
    PeerTimeoutError,
)
from kvxfer.hold import Hold, HoldState
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
    Welcome,
)

if TYPE_CHECKING:
    from kvxfer.config import Settings
    from kvxfer.lease import LeaseRef
    from kvxfer.metrics import Metrics
    from kvxfer.transfer import Transfer

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
    """

    def __init__(self, identity: Identity, settings: Settings, metrics: Metrics, out: list[Action]) -> None:
        self._me = identity
        self._settings = settings
        self._metrics = metrics
        self._out = out
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
        rank = self._me.spec.rank
        address = ref.addresses[rank] if rank < len(ref.addresses) else ref.addresses[0]
        peer = self._peers.setdefault(address, Peer(address))
        self._timers.cancel(address)
        hold = Hold(ref, peer, now, now + self._settings.hold_s)
        self._holds[ref.token] = hold
        self._of_peer.setdefault(address, set()).add(ref.token)
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
        if hold is None or hold.state is not HoldState.GRANTED or hold.transfer is not None or not hold.peer.is_met:
            return None
        try:
            return hold.job(transfer)
        except BlockError:
            return None  # `read` will find the same, and fail it

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
            self._forget(hold, now)

    def read_ended(self, transfer: Transfer, error: KvxferError | None, now: float) -> None:
        """The data thread is done with a read it was given; it has ended the transfer itself."""
        hold = self._holds.get(transfer.ref.token)
        if hold is None or hold.transfer is not transfer:
            return  # dropped, or read a second time, in the moment in which `take` claimed it
        hold.read = error is None
        if error is not None and error.retryable:
            # The peer may have been restarted, or may have replaced its agent: meet it afresh before the next read.
            hold.peer.state = PeerState.UNKNOWN
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
        return self._timers.next_at()

    def close(self) -> None:
        """End everything, and let producers have back what is held. The data path must have been closed before."""
        for hold in self._holds.values():
            if hold.transfer is not None:
                hold.transfer.end(ClosedError("the endpoint was closed"))
            if hold.peer.state is PeerState.MET and hold.state is not HoldState.ENDED:
                self._send(hold.peer.address, Settle(to=hold.peer.epoch, token=hold.ref.token, read=hold.read))
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
        elif isinstance(message, (Pending, Grant, Settled)):
            hold = self._mine(peer, message.token)
            if hold is None:
                return
            if isinstance(message, Grant) and hold.state is HoldState.WAITING:
                hold.grant, hold.state = message, HoldState.GRANTED
                hold.ask_at = hold.renew_at(now)
                if hold.transfer is None:
                    self._granted[message.token] = hold
                self._pump(hold, now)
            elif isinstance(message, Settled) and hold.state is HoldState.SETTLING:
                self._forget(hold, now)
        else:
            self.garbage(address, f"{type(message).__name__} is not for a consumer")

    # -- inside -----------------------------------------------------------------------------------------------------

    def _welcome(self, peer: Peer, message: Welcome, now: float) -> None:
        old_agent = peer.agent_info
        repeated = peer.state is PeerState.MET
        gone = peer.welcomed(self._me, message, now)
        self._metrics.count("kvxfer_handshakes_total", outcome="met" if peer.error is None else "incompatible")
        if old_agent and old_agent != peer.agent_info:
            self._out.append(ForgetAgent(old_agent))
        if gone is not None:
            _log.warning("%s at %s was restarted (epoch %s, before %s)", peer.name, peer.address, peer.epoch, gone)
            for hold in self._holds_of(peer):
                if hold.state is HoldState.GRANTED:
                    self._fail(hold, LeaseEndedError("the producer was restarted"), now)
                elif hold.state is HoldState.SETTLING:
                    self._forget(hold, now)
        elif repeated and peer.state is PeerState.MET:
            return  # a busy producer answers each Hello of a long wait: that must not multiply all questions
        self._pump_all(peer, now)

    def _refused(self, peer: Peer, message: Refused, now: float) -> None:
        code, reason = message.code, message.reason
        if code in _LEASE_ERRORS:
            hold = self._mine(peer, message.token)
            if hold is not None and hold.state is HoldState.SETTLING:
                self._forget(hold, now)
            elif hold is not None and hold.state in (HoldState.WAITING, HoldState.GRANTED):
                self._fail(hold, _LEASE_ERRORS[code](reason), now)
        elif code in ("stale_epoch", "not_introduced"):
            # Restarted, or it forgot us. Its Welcome tells which. One that says so to everything is not asked faster.
            if peer.state is PeerState.MET:
                if now >= peer.greeted_at + self._settings.retry_s:
                    self._greet(peer, now)
                else:
                    peer.state = PeerState.GREETED  # each hold greets again when it is due
        elif peer.state is PeerState.GREETED:
            self._metrics.count("kvxfer_handshakes_total", outcome=code)
            peer.refused(HandshakeError(code, f"{peer.address} refused: {reason}"))
            self._pump_all(peer, now)
        else:
            _log.warning("%s refused a message: %s: %s", peer.address, code, reason)

    def _ended(self, peer: Peer, token: str, reason: str, now: float) -> None:
        # A read in flight goes on: the lease board decides whether its bytes count.
        hold = self._mine(peer, token)
        if hold is not None and hold.state in (HoldState.WAITING, HoldState.GRANTED):
            self._fail(hold, LeaseEndedError(reason), now)
        elif hold is not None and hold.state is HoldState.SETTLING:
            self._forget(hold, now)

    def _pump(self, hold: Hold, now: float) -> None:
        """Do the next thing for a hold, and set the timer for the one after."""
        peer = hold.peer
        if hold.state is HoldState.READING:
            pass  # the data thread keeps this deadline; only the renewals go on
        elif now >= hold.deadline:
            self._give_up(hold, now)
            return
        if hold.state is HoldState.ENDED:
            self._wake(hold.deadline, hold)
            return
        if peer.state is not PeerState.MET:
            self._meet(hold, now)
        elif hold.state is HoldState.WAITING:
            self._ask_grant(hold, now)
        elif hold.state is HoldState.GRANTED and hold.transfer is not None:
            self._start(hold, hold.transfer, now)
        elif hold.state is HoldState.SETTLING:
            self._ask(hold, Settle(to=peer.epoch, token=hold.ref.token, read=hold.read), now)
        elif now >= hold.ask_at and hold.grant is not None:
            hold.ask_at = hold.renew_at(now)
            self._renewals.setdefault(peer.address, []).append(hold.ref.token)
        # What was done above may have ended it, which mypy cannot see.
        if hold.ref.token in self._holds and hold.state is not HoldState.ENDED:  # type: ignore[comparison-overlap]
            silent_at = self._silent_at(hold)
            if silent_at is not None and now >= silent_at:
                why = f"{peer.name or peer.address} has said nothing for {self._settings.peer_timeout_s:g} s"
                self._fail(hold, PeerTimeoutError(why), now)
                return
            due = max(hold.ask_at, now + 0.001)
            if hold.state is not HoldState.READING:
                due = min(due, hold.deadline, silent_at if silent_at is not None else hold.deadline)
            self._wake(due, hold)

    def _meet(self, hold: Hold, now: float) -> None:
        peer = hold.peer
        hold.ask_at = now + self._settings.retry_s
        if peer.state is PeerState.REFUSED and peer.error is not None and peer.greeted_at >= hold.since:
            if hold.state is HoldState.SETTLING:
                self._forget(hold, now)
            elif hold.state is not HoldState.READING:
                self._fail(hold, peer.error, now)
            return
        if peer.state is not PeerState.GREETED or now >= peer.greeted_at + self._settings.retry_s:
            self._greet(peer, now)

    def _greet(self, peer: Peer, now: float) -> None:
        self._send(peer.address, peer.greet(self._me, now))

    def _ask_grant(self, hold: Hold, now: float) -> None:
        peer, ref = hold.peer, hold.ref
        if peer.name != ref.owner:
            if peer.met_at >= hold.since:
                why = f"{peer.address} is {peer.name!r}, the lease is {ref.owner!r}'s"
                self._fail(hold, HandshakeError("identity", why), now)
            else:
                self._greet(peer, now)  # perhaps another process lives there since we met
                hold.ask_at = now + self._settings.retry_s
            return
        self._ask(hold, Open(to=peer.epoch, token=ref.token), now)

    def _ask(self, hold: Hold, message: Open | Settle, now: float) -> None:
        if now >= hold.ask_at:
            hold.ask_at = now + self._settings.retry_s
            self._send(hold.peer.address, message)

    def _silent_at(self, hold: Hold) -> float | None:
        """When the peer has been silent for too long, for a read that waits for it."""
        waiting = hold.state is HoldState.WAITING
        if hold.transfer is None or not (waiting or (hold.state is HoldState.GRANTED and not hold.peer.is_met)):
            return None
        return max(hold.peer.heard_at, hold.transfer.started) + self._settings.peer_timeout_s

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
        hold.ask_at = hold.renew_at(now)
        self._out.append(job)

    def _give_up(self, hold: Hold, now: float) -> None:
        if hold.state in (HoldState.SETTLING, HoldState.ENDED):
            self._forget(hold, now)  # the lease's own deadline frees the producer
        elif hold.transfer is not None:
            waited = f"{now - hold.transfer.started:.1f} s"
            what = "to be met" if hold.state is HoldState.WAITING and hold.peer.name == "" else "for its blocks"
            self._fail(hold, PeerTimeoutError(f"waited {waited} {what}: {hold.peer.address}"), now)
        else:
            _log.warning("lease %s of %r was held too long without a read", hold.ref.token, hold.ref.request)
            self._settle(hold, now)

    def _fail(self, hold: Hold, error: KvxferError, now: float) -> None:
        """Not in flight: the target blocks are quiet."""
        hold.error = error
        if hold.transfer is None:
            hold.state = HoldState.ENDED  # until somebody asks to read it
            self._wake(hold.deadline, hold)
            return
        hold.transfer.end(error)
        if isinstance(error, (LeaseError, HandshakeError)):
            self._forget(hold, now)
        else:
            self._settle(hold, now)

    def _settle(self, hold: Hold, now: float) -> None:
        hold.state = HoldState.SETTLING
        hold.deadline = now + self._settings.lease_s
        hold.ask_at = now
        self._pump(hold, now)

    def _forget(self, hold: Hold, now: float) -> None:
        self._holds.pop(hold.ref.token, None)
        self._granted.pop(hold.ref.token, None)
        self._timers.cancel(hold.ref.token)
        tokens = self._of_peer.get(hold.peer.address)
        if tokens is None:
            return
        tokens.discard(hold.ref.token)
        if not tokens:
            del self._of_peer[hold.peer.address]
            # A stranger's address that never became a peer is not worth keeping a socket for.
            self._timers.set(hold.peer.address, now + (self._settings.idle_peer_s if hold.peer.name else 0.0))

    def _retire(self, peer: Peer) -> None:
        if peer.address not in self._of_peer:
            del self._peers[peer.address]
            self._out.append(Hangup(peer.address))
            if peer.agent_info:
                self._out.append(ForgetAgent(peer.agent_info))

    def _mine(self, peer: Peer, token: str) -> Hold | None:
        hold = self._holds.get(token)
        return hold if hold is not None and hold.peer is peer else None

    def _holds_of(self, peer: Peer) -> list[Hold]:
        return [self._holds[token] for token in self._of_peer.get(peer.address, ())]

    def _pump_all(self, peer: Peer, now: float) -> None:
        for hold in self._holds_of(peer):
            if hold.state is not HoldState.READING:
                hold.ask_at = now
                self._pump(hold, now)

    def _wake(self, at: float, hold: Hold) -> None:
        self._timers.set(hold.ref.token, at)

    def _send(self, address: str, message: Message) -> None:
        self._out.append(SendTo(address, message))

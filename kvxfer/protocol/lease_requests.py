# SPDX-License-Identifier: Apache-2.0
"""Requests of a consumer to the producers of its leases: sent at a peer's pace, and again until they are answered. Pure, no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from kvxfer.protocol.actions import Action, SendTo
from kvxfer.protocol.held_lease import Asked
from kvxfer.protocol.messages import MAX_TOKENS_PER_RENEW, Acquire, AskWrite, Release, Renew, StopWrite, Write

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvxfer.config import Settings
    from kvxfer.protocol.held_lease import HeldLease, RankLease
    from kvxfer.protocol.messages import Message, StageChunk
    from kvxfer.protocol.peer import Peer

_SHORTEST_PAUSE_S = 0.01
"""Between two times that a write is sent in full."""


class LeaseRequests:
    """Sends the requests of a consumer. Each method sends only what is due, and notes when it is due again."""

    def __init__(self, settings: Settings, out: list[Action]) -> None:
        self._settings = settings
        self._out = out
        self._renewals: dict[str, list[str]] = {}
        """Tokens that go out with the next `send_renewals`, by address: leases of one peer are renewed together."""

    @property
    def renewals_wait(self) -> bool:
        """`send_renewals` has something to send."""
        return bool(self._renewals)

    def acquire(self, held: HeldLease, rank_lease: RankLease, now: float) -> None:
        """Ask a rank for its blocks, or for those that come after what it has granted."""
        have, check = (rank_lease.batches.have, rank_lease.batches.check) if rank_lease.wants_more else ([], b"")
        token, rendezvous = held.ref.token, held.ref.rendezvous
        message = Acquire(to=rank_lease.peer.epoch, token=token, rendezvous=rendezvous, have=have, check=check)
        self._ask(rank_lease, message, now)

    def release(self, held: HeldLease, rank_lease: RankLease, now: float) -> None:
        """Tell a rank that its blocks are not needed any more."""
        self._ask(rank_lease, Release(to=rank_lease.peer.epoch, token=held.ref.token, read=held.read), now)

    def release_at_once(self, held: HeldLease) -> None:
        """Tell all ranks so, once, whatever is due: this consumer is closed."""
        for rank_lease in held.rank_leases:
            if rank_lease.peer.is_met and not rank_lease.released:
                message = Release(to=rank_lease.peer.epoch, token=held.ref.token, read=held.read)
                self.send(rank_lease.peer, message)

    def renew(self, held: HeldLease, rank_lease: RankLease, now: float) -> None:
        """Renew a lease at a rank with the next `send_renewals`."""
        if now >= rank_lease.ask_at:
            rank_lease.ask_at = rank_lease.renew_at(now)
            self._renewals.setdefault(rank_lease.peer.address, []).append(held.ref.token)

    def send_renewals(self, peers: Mapping[str, Peer]) -> None:
        """Send all renewals that are due, those of one peer in one message."""
        renewals, self._renewals = self._renewals, {}
        for address, tokens in renewals.items():
            peer = peers.get(address)
            if peer is not None:
                for i in range(0, len(tokens), MAX_TOKENS_PER_RENEW):
                    self.send(peer, Renew(to=peer.epoch, tokens=tokens[i : i + MAX_TOKENS_PER_RENEW]))

    def ask(self, held: HeldLease, source: int, message: StageChunk | Write | StopWrite, now: float) -> None:
        """Ask a rank for a chunk or a write; `repeat_asked` asks again until it is there."""
        key = (source, type(message).__name__, message.number)
        held.asked[key] = asked = Asked(message, now, now + self._settings.retry_interval_s, now)
        self._send_asked(held.rank_leases[source].peer, asked.message)

    def repeat_asked(self, held: HeldLease, now: float) -> None:
        """Ask again for what is not there yet. Of a write, which may be long, only what became of it."""
        for (source, _, _), asked in held.asked.items():
            peer = held.rank_leases[source].peer
            if now >= asked.again_at and peer.is_met:
                asked.again_at = now + self._settings.retry_interval_s
                message = asked.message
                if isinstance(message, Write):
                    self._send_asked(peer, AskWrite(to=message.to, token=message.token, number=message.number))
                else:
                    self._send_asked(peer, message)

    def send_write(self, held: HeldLease, source: int, number: int, now: float) -> None:
        """Send a write in full once more, because its producer asks for it; or say that it is not wanted any more."""
        peer = held.rank_leases[source].peer
        asked = held.asked.get((source, "Write", number))
        if asked is None:
            self._send_asked(peer, StopWrite(token=held.ref.token, number=number))
        elif now >= asked.sent_at + _SHORTEST_PAUSE_S:
            asked.sent_at, asked.again_at = now, now + self._settings.retry_interval_s
            self._send_asked(peer, asked.message)

    def _send_asked(self, peer: Peer, message: StageChunk | Write | AskWrite | StopWrite) -> None:
        # A write names the process that it was asked of. One that has taken its place would say, truly, that it writes nothing.
        self.send(peer, message if message.to else msgspec.structs.replace(message, to=peer.epoch))

    def send(self, peer: Peer, message: Message) -> None:
        """Send a message to a peer now."""
        self._out.append(SendTo(peer.address, message))

    def clear(self) -> None:
        """Send no renewal any more."""
        self._renewals.clear()

    def _ask(self, rank_lease: RankLease, message: Acquire | Release, now: float) -> None:
        """Send when it is due and this lease's turn: thousands of leases do not all ask one peer at once."""
        if now < rank_lease.ask_at:
            return
        pacer = rank_lease.peer.pacer
        if rank_lease.turn_at is None:
            rank_lease.turn_at = pacer.reserve(now)
        rank_lease.ask_at = rank_lease.turn_at
        if now >= rank_lease.turn_at:
            rank_lease.turn_at = None
            repeat_s = pacer.repeat_s(len(rank_lease.peer.needed_by))
            rank_lease.ask_at = now + max(self._settings.retry_interval_s, repeat_s)
            self.send(rank_lease.peer, message)

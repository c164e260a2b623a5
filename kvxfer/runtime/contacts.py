# SPDX-License-Identifier: Apache-2.0
"""First contacts: a peer's fabric has to answer once before anything is asked of it that could hold up others.

The first transfer between two agents also connects them, and it may hang for ever: the peer's port is closed by a firewall, its
process stands still, or the engine itself has lost the connection (seen with UCX 1.23, rarely, after other consumers of the same
producer had been killed). So the first transfer is a contact: it reads a few bytes that are not used, belongs to no read, and has
no deadline. Reads of that peer wait for it. When it has hung for ``contact_timeout_s`` the peer is *silent*: reads that want something of
it fail at once, by name and retryably, until the contact ends; other peers are served by the same agent as before.

A new agent helps only against a connection that the transfer engine has lost, and it has a price: reads under way begin again, and
reads from this endpoint fail once. So the agent is made anew for a silent peer only if some read asks for that peer,
preferably while nothing else is under way, and each time after a longer pause.

UCX loses a connection while it is being made, which may be a moment after the contact went through: both ends connect, and one of
the two connections is given up. So what a read moves within ``contact_timeout_s`` after the contact is *early*. An early move that
hangs, for longer than a slow wire needs for its bytes, costs a new agent too: its read begins again, instead of waiting for its deadline.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from kvxfer.agents.capabilities import Op
from kvxfer.agents.flights import Flight, FlightState
from kvxfer.errors import KvxferError, PeerTimeoutError, TransferFailedError
from kvxfer.memory.spans import Descriptors
from kvxfer.protocol.lease_board import CELL_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.metrics import Metrics
    from kvxfer.runtime.agent_lifecycle import AgentLifecycle
    from kvxfer.runtime.read_task import Move, ReadTask, SourceRead, Strand
    from kvxfer.runtime.remote_flights import RemoteFlight, RemoteFlights

    Key = tuple[Op, bytes]

_log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.05
"""How often to look whether a silent peer answers after all."""

_PATIENCE = 2.0
"""Times ``contact_timeout_s``, for a contact on an agent that was made anew: a busy machine is slow to connect."""
_BUSY = 8.0
"""Times ``contact_timeout_s``, for which a contact must have hung before an agent that others use is made anew."""
_PAUSES = (8.0, 8.0, 24.0)
"""Times ``contact_timeout_s``, between one new agent for the sake of silent peers and the next: by how many agents such a peer has not
answered before this one; the last one from then on."""
_EARLY_PAUSE = 1.0
"""Times ``contact_timeout_s``, between one new agent and the next for the sake of early moves: the contact before each went through."""
SLOWEST_BYTES_PER_S = 2e6
"""A wire that is slower than this is taken for a lost connection, if the connection is new."""
_MOST_REMEMBERED = 1024


class Contact:
    """A contact under way.

    Attributes:
        key: what moves the bytes, and the description of the peer's agent; ``name`` its name.
        waiting: strands that wait for the answer.
        silent: it has hung for too long.
        asked_at: when a read last asked for that peer, although it is silent.
    """

    def __init__(self, key: Key, name: str, since: float) -> None:
        self.key = key
        self.name = name
        self.since = since
        self.waiting: list[Strand] = []
        self.silent = False
        self.asked_at: float = -math.inf


class EarlyMove(NamedTuple):
    """A move over a connection that was made a moment ago.

    Attributes:
        key, name: see `Contact`.
        strand: the one that waits for it.
        since: when it began.
        nbytes: its size.
    """

    key: Key
    name: str
    strand: Strand
    since: float
    nbytes: int


class Contacts:
    """Contacts with the peers of one endpoint's agent. Used by the data thread alone.

    Args:
        life: of the agent.
        remote: contacts that peers carry out: they write the few bytes here.
        place: address of memory into which every contact reads, and whose content means nothing.
        contact_timeout_s: how long a contact may hang before its peer is silent.
        now: the clock.
    """

    def __init__(
        self,
        life: AgentLifecycle,
        remote: RemoteFlights,
        place: int,
        contact_timeout_s: float,
        metrics: Metrics,
        now: Callable[[], float],
    ) -> None:
        self._life = life
        self._remote = remote
        self._place = place
        self._contact_s = contact_timeout_s
        self._metrics = metrics
        self._now = now
        self._by_flight: dict[Flight | RemoteFlight, Key] = {}
        self._strays: set[Flight | RemoteFlight] = set()
        """Flights of contacts that have failed, and may still land."""
        self._contacts: dict[Key, Contact] = {}
        self._early: dict[Flight | RemoteFlight, EarlyMove] = {}
        self._agents_tried: dict[Key, int] = {}
        """Number of times that the agent was made anew for the sake of a peer, by peer."""
        self._renewed_at = -math.inf

    @property
    def pending(self) -> bool:
        """Some contact or early move has not ended."""
        return bool(self._by_flight or self._early)

    @property
    def under_way(self) -> int:
        """Number of contacts that have not ended."""
        return len(self._by_flight)

    @property
    def awaited(self) -> bool:
        """Some read waits for a contact."""
        return any(strand.task.error is None for each in self._contacts.values() for strand in each.waiting)

    def meet(self, strand: Strand, source: SourceRead) -> None:
        """Have a strand wait until the agent of its source has answered once: a lease's cell there is a few bytes that may be moved.

        Raises:
            KvxferError: the peer is silent, or cannot be asked.
        """
        key = (source.op, source.granted.agent_info)
        contact = self._contacts.get(key)
        if contact is None:
            agent, peer = self._life.ensure(), self._life.peer(source.granted.agent_info)
            contact = Contact(key, peer.name, self._now())
            some = Descriptors.of(self._place, source.granted.cell, CELL_NBYTES)
            flight: Flight | RemoteFlight
            if source.op is Op.WRITE:
                flight = self._remote.submit(source, [some], math.inf)
            else:
                flight = agent.submit(Op.READ, peer, some, deadline=math.inf)
            self._by_flight[flight] = key
            self._contacts[key] = contact
        elif contact.silent:
            contact.asked_at = self._now()
            raise self._silence(contact)
        contact.waiting.append(strand)

    def left_by(self, task: ReadTask) -> list[Strand]:
        """Forget the contacts that peers carry out for a read that is over; returns the strands of others that waited for them."""
        left = [flight for flight in self._by_flight if not isinstance(flight, Flight) and flight.task is task]
        waiting: list[Strand] = []
        for flight in left:
            waiting += self._contacts.pop(self._by_flight.pop(flight)).waiting
            self._remote.discard(flight)
        return [strand for strand in waiting if strand.task is not task]

    def owns(self, flight: Flight | RemoteFlight) -> bool:
        """Tell whether a flight is that of a contact."""
        return flight in self._by_flight or flight in self._strays

    def ended(self, flight: Flight | RemoteFlight) -> tuple[list[Strand], KvxferError | None]:
        """Take the end of a contact's flight, which may be that its peer is forgotten.

        Returns:
            the strands that waited for it, and why it failed; None if the peer has answered.
        """
        self._strays.discard(flight)
        if not flight.finished:
            self._strays.add(flight)
        key = self._by_flight.pop(flight, None)
        if key is None:
            return [], None
        contact = self._contacts.pop(key)
        answered = flight.state is FlightState.DONE
        self._metrics.count("kvxfer_contacts_total", outcome="answered" if answered else "failed")
        if answered:
            self._life.proven[key] = self._now()
            self._agents_tried.pop(key, None)
            if contact.silent:
                _log.warning("the fabric of %s answers now", contact.name)
            return contact.waiting, None
        return contact.waiting, flight.error or TransferFailedError("no reason given")

    def hanging(self) -> list[Contact]:
        """Contacts that have just hung for too long, and those of silent peers that a read asked for a moment ago."""
        now = self._now()
        return [
            contact
            for key, contact in self._contacts.items()
            if (
                now < contact.asked_at + self._contact_s
                if contact.silent
                else now >= contact.since + self._contact_s * (_PATIENCE if key in self._agents_tried else 1.0)
            )
        ]

    def moves(self, flight: Flight | RemoteFlight, strand: Strand, move: Move, name: str) -> None:
        """Note that a strand moves something from the source of this name; it is watched if the connection is new."""
        key, now = (move.source.op, move.source.granted.agent_info), self._now()
        if now < self._life.proven.get(key, -math.inf) + self._contact_s:
            nbytes = sum(spans.total_nbytes for spans in move.steps)
            self._early[flight] = EarlyMove(key, name, strand, now, nbytes)

    def moved(self, flight: Flight | RemoteFlight) -> None:
        """Note that a move has ended, or was given up."""
        self._early.pop(flight, None)

    def hanging_early(self) -> list[EarlyMove]:
        """Early moves over connections on which all of them together should have ended by now."""
        if not self._early:
            return []
        now = self._now()
        nbytes: Counter[Key] = Counter()
        for move in self._early.values():
            nbytes[move.key] += move.nbytes
        return [
            move
            for move in self._early.values()
            if now >= move.since + self._contact_s + nbytes[move.key] / SLOWEST_BYTES_PER_S
        ]

    def may_renew(self, hanging: Sequence[Contact | EarlyMove], *, busy: bool) -> bool:
        """Tell whether the agent may be made anew for the sake of these, all of one kind; ``busy`` if it has something else to do."""
        now, pause = self._now(), min(self._pause(each) for each in hanging)
        if now < self._renewed_at + self._contact_s * pause:
            return False
        return not busy or now >= min(each.since for each in hanging) + self._contact_s * _BUSY

    def _pause(self, hanging: Contact | EarlyMove) -> float:
        if isinstance(hanging, EarlyMove):
            return _EARLY_PAUSE
        return _PAUSES[min(self._agents_tried.get(hanging.key, 0), len(_PAUSES) - 1)]

    def renewed(self, hanging: Sequence[Contact | EarlyMove]) -> None:
        """Note that the agent is made anew for the sake of these, see `may_renew`."""
        silent = any(isinstance(each, Contact) for each in hanging)
        self._metrics.count("kvxfer_contacts_total", outcome="renewed" if silent else "lost")
        self._renewed_at = self._now()
        if len(self._agents_tried) > _MOST_REMEMBERED:
            self._agents_tried.clear()
        for key in {each.key for each in hanging}:
            self._agents_tried[key] = self._agents_tried.get(key, 0) + 1

    def silence(self, contact: Contact) -> tuple[list[Strand], KvxferError]:
        """Take a peer for silent from now on; returns the strands that need not wait for it any longer, and what their reads end with."""
        if not contact.silent:
            self._metrics.count("kvxfer_contacts_total", outcome="silent")
            _log.warning("the fabric of %s does not answer: reads from it fail until it does", contact.name)
        contact.silent = True
        strands, contact.waiting = contact.waiting, []
        return strands, self._silence(contact)

    def torn_down(self) -> list[Strand]:
        """Forget all contacts: the agent they were made on is closed.

        Returns:
            the strands that waited for one.
        """
        waiting = [each for contact in self._contacts.values() for each in contact.waiting]
        self._contacts.clear()
        self._by_flight.clear()
        self._early.clear()
        self._strays.clear()
        return waiting

    def _silence(self, contact: Contact) -> PeerTimeoutError:
        return PeerTimeoutError(
            f"the fabric of {contact.name!r} has not answered for {self._now() - contact.since:.1f} s, though its control channel does: "
            "its process stands still, or its transfer engine's port cannot be reached from here"
        )

# SPDX-License-Identifier: Apache-2.0
"""One read, from the job to its end: a leg for each source, each of which moves bytes and then fences them.

::

    leg:   contact --> move --> fence --> done
             a cell     | ^       a cell
                        | +-- again, for as long as its source has more to grant
                        |
                        +-- direct: runs from cache to cache
                        +-- packed: chunks, several at a time: [ask, packed there] --> wire --> [unpack, here]
                        +-- after either, if asked to verify: `kvxfer.runtime.verify.Check`

A read is over when all of its legs are, or when one has failed and nothing is in flight any more. Runs on the data thread, by
way of a `Carrier`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from kvxfer.errors import IncompatibleError, KvxferError, LeaseEndedError, TransferTimeoutError
from kvxfer.memory.spans import Descriptors
from kvxfer.planner.router import Route
from kvxfer.protocol.lease_board import CELL_NBYTES
from kvxfer.protocol.messages import StageChunk
from kvxfer.runtime.packer import start_copies
from kvxfer.runtime.verify import Check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvxfer.buffers.base import Completion
    from kvxfer.buffers.cache import KVCache
    from kvxfer.errors import Difference
    from kvxfer.planner.chunk_layout import Chunk, ChunkLayout
    from kvxfer.planner.chunks import ChunkPlanner
    from kvxfer.planner.rank_plan import MatchedTables, ResolvedPlan
    from kvxfer.protocol.actions import Source, StartRead
    from kvxfer.runtime.staging import Bytes


_MOST_DESCRIPTORS: Final = 1 << 19
"""Made at a time, with about 150 bytes each: how many a read has depends on its source's description of its cache."""
_MOST_OF_A_READ: Final = 1 << 26
"""From one source; they would take minutes."""
_MOST_GATHERED: Final = 1 << 21
"""For one chunk."""


class Carrier(Protocol):
    """What a read needs of the data thread."""

    cache: KVCache

    def now(self) -> float:
        """The clock."""

    def submit(self, leg: Leg, steps: Sequence[Descriptors], then: Callable[[], None]) -> None:
        """Move bytes from the leg's source, step by step; ``then`` when all are in place. Raises KvxferError: nothing was started."""

    def copying(self, leg: Leg, copies: list[Completion], then: Callable[[], None]) -> None:
        """Call ``then`` when copies of this side's devices have ended."""

    def take_scratch(self, leg: Leg, then: Callable[[int], None]) -> None:
        """Call ``then`` with a scratch cell, at once or when one is free."""

    def give_scratch(self, leg: Leg, scratch: int) -> None:
        """It holds nothing of interest any more."""

    def read_scratch(self, scratch: int) -> bytes:
        """What a read brought into it."""

    def take_slot(self, leg: Leg, then: Callable[[int], None]) -> None:
        """Call ``then`` with a staging slot, at once or when one is free."""

    def give_slot(self, leg: Leg, slot: int) -> None:
        """It holds nothing of interest any more."""

    def view_slot(self, slot: int, nbytes: int) -> Bytes:
        """Its first bytes."""

    def proven(self, agent_info: bytes) -> bool:
        """Something was read from that agent before."""

    def meet(self, leg: Leg, then: Callable[[], None]) -> None:
        """Call ``then`` when the leg's source, from which nothing was read before, has answered. Raises KvxferError: it does not."""

    def stage(self, leg: Leg, message: StageChunk) -> None:
        """Ask the leg's source to pack a chunk."""

    def unstage(self, leg: Leg, numbers: list[int]) -> None:
        """Tell it that chunks were taken."""

    def leg_ended(self, leg: Leg) -> None:
        """Bytes are in place, and their lease stood."""


class Reading:
    """One read under way.

    Attributes:
        pending: flights and copies that have to end before its blocks are quiet.
        error: why it failed; set once, and nothing new is started from then on.
        nbytes, descriptors: what went over the wire so far.
        routes: which it took so far.
        partial_nbytes: what was here when the last source had granted all.
        differences: what was asked to be verified and is not what a source has.
        quarantined_at: since when an engine may still write to its blocks after it was given up.
    """

    def __init__(self, job: StartRead) -> None:
        self.job = job
        self.legs: list[Leg] = [Leg(self, source) for source in job.sources]
        self.ended_legs = 0
        self.pending = 0
        self.error: KvxferError | None = None
        self.nbytes = 0
        self.partial_nbytes = 0
        self.descriptors = 0
        self.via: str = ""
        self.routes: set[str] = set()
        self.differences: list[Difference] = []
        self.quarantined_at: float | None = None

    @property
    def deadline(self) -> float:
        """When it ends at the latest."""
        return self.job.transfer.deadline

    def start(self, carrier: Carrier) -> None:
        """Begin with all legs. Raises KvxferError: what is under way has to be waited for."""
        if carrier.now() >= self.deadline:
            raise TransferTimeoutError("the deadline passed before the read could start")
        for leg in self.legs:
            leg.start(carrier)

    def restarted(self, carrier: Carrier) -> Reading:
        """The same read, to be started on a new agent."""
        reading = Reading(self.job)
        reading.legs = [leg.again(carrier, reading) for leg in self.legs]
        return reading


class Leg:
    """What a read gets from one source.

    Attributes:
        source: as far as it has granted its blocks.
        meets: its source has not answered yet.
        next_number: of the next chunk that is asked for.
    """

    def __init__(self, reading: Reading, source: Source) -> None:
        self.reading = reading
        self.source: Source = source
        self.meets: bool = False
        self.next_number = 0
        self._work: _Packed | Check | None = None
        self._moving = True
        """Something is under way, and before the first contact nothing may be."""
        self._moved: dict[int, int] = {}
        """By target group, the token up to which all is here."""
        self._sent_nbytes = self._here_nbytes = 0

    def start(self, carrier: Carrier) -> None:
        """Move its bytes: of a source that is new after a first contact (`kvxfer.runtime.contacts`), and if its lease still stands."""
        if carrier.proven(self.source.agent_info):
            self._begin(carrier)
        else:
            self.meets = True
            carrier.meet(self, lambda: self._met(carrier))

    def _met(self, carrier: Carrier) -> None:
        self.meets = False
        self._read_cell(carrier, self._begin)

    def _begin(self, carrier: Carrier) -> None:
        self._moving = False
        self._go_on(carrier)

    def granted(self, carrier: Carrier, source: Source) -> None:
        """Its source has more."""
        if source.complete and not self.source.complete:
            self.reading.partial_nbytes += self._here_nbytes
        self.source = source
        self._go_on(carrier)

    def _go_on(self, carrier: Carrier) -> None:
        """Move what is granted and not here yet; when that was all, fence."""
        if self._moving:
            return
        match = self.source.match
        if self._moved:
            spans = [(max(start, self._moved.get(i, start)), stop) for i, (start, stop) in enumerate(match.tokens)]
            match = match._replace(tokens=spans)
        if any(start < stop for start, stop in match.tokens):
            self._moving = True
            self._move(carrier, match)
        elif self.source.complete:
            self._moving = True
            self._fence(carrier)

    def _move(self, carrier: Carrier, match: MatchedTables) -> None:
        def moved() -> None:
            self._here_nbytes = self._sent_nbytes
            if not self.reading.job.transfer.verify:
                arrived()
                return
            self._work = Check(self, match, self.source.router.for_comparison(), arrived)
            self._work.go_on(carrier)

        def arrived() -> None:
            self._work, self._moving = None, False
            self._moved.update({group: stop for group, (start, stop) in enumerate(match.tokens) if start < stop})
            self._go_on(carrier)

        choice = self.source.router.choose(match)
        self.reading.routes.add(choice.route.value)
        if choice.chunk_planner is not None:
            self._work = _Packed(self, match, choice.route, choice.chunk_planner, moved)
            self._work.go_on(carrier)
            return
        if choice.resolved.runs()[0] > _MOST_DESCRIPTORS:
            self._move_in_pieces(carrier, choice.resolved, moved)
            return
        spans = choice.resolved.descriptors()
        self.count(spans)
        if not len(spans):
            moved()
        elif self.source.complete and not self.reading.job.transfer.verify:
            # The last bytes, and the fence after them: the transfer engine need not be asked twice.
            self._fence(carrier, spans)
        else:
            carrier.submit(self, [spans], moved)

    def _move_in_pieces(self, carrier: Carrier, bound: ResolvedPlan, then: Callable[[], None]) -> None:
        """Move what is too many descriptors to be made at once: a piece, and when it is here the next."""
        runs, _ = bound.runs()
        if runs > _MOST_OF_A_READ:
            what = f"{runs:,} runs would have to be moved one by one, more than {_MOST_OF_A_READ:,}"
            raise IncompatibleError("descriptors", f"{what}: read fewer tokens at a time, or let chunks be packed")
        pieces = iter(bound.split_by_runs(_MOST_DESCRIPTORS))

        def go_on() -> None:
            piece = next(pieces, None)
            if piece is None:
                then()
                return
            spans = bound.rank_plan.descriptors(piece)
            self.count(spans)
            carrier.submit(self, [spans], go_on)

        go_on()

    def count(self, spans: Descriptors) -> None:
        """Add what goes over the wire to the read's figures."""
        self._sent_nbytes += spans.total_nbytes
        self.reading.nbytes += spans.total_nbytes
        self.reading.descriptors += len(spans)

    def staged(self, carrier: Carrier, number: int, address: int, digest: bytes) -> None:
        """The source has packed a chunk."""
        if self._work is not None:
            self._work.staged(carrier, number, address, digest)

    def again(self, carrier: Carrier, reading: Reading) -> Leg:
        """The same leg of a read that is started again. Chunks are numbered on: a number means one chunk only."""
        if self._work is not None:
            self._work.abandon(carrier)
        leg = Leg(reading, self.source)
        leg.next_number = self.next_number
        return leg

    @property
    def waits(self) -> bool:
        """It waits for blocks that its source grants, or for chunks that it packs."""
        return not self.source.complete or (self._work is not None and self._work.asks)

    def _fence(self, carrier: Carrier, *last: Descriptors) -> None:
        """The leg has ended when its lease stood after the last bytes were in place."""
        self._read_cell(carrier, lambda carrier: carrier.leg_ended(self), *last)

    def _read_cell(self, carrier: Carrier, then: Callable[[Carrier], None], *before: Descriptors) -> None:
        """Read the lease's cell, when what is to be read ``before`` is in place."""

        def read(scratch: int) -> None:
            cell = Descriptors.of(scratch, self.source.cell, CELL_NBYTES)
            carrier.submit(self, [*before, cell], lambda: told(scratch))

        def told(scratch: int) -> None:
            found = carrier.read_scratch(scratch)
            carrier.give_scratch(self, scratch)
            if found != self.source.check:
                raise LeaseEndedError("the lease had ended when the bytes arrived; they are thrown away")
            then(carrier)

        carrier.take_scratch(self, read)


class _Packed:
    """Tokens of one leg, in chunks: `Router.in_flight` of them are asked for, on the wire or being unpacked at a time."""

    def __init__(
        self, leg: Leg, match: MatchedTables, route: Route, chunk_planner: ChunkPlanner, then: Callable[[], None]
    ) -> None:
        self._leg = leg
        self._chunk_planner = chunk_planner
        self._route = route
        self._match = match
        self._then = then
        self._todo: Iterator[Chunk] = chunk_planner.chunks(match.tokens)
        self._asked: dict[int, Chunk] = {}
        self._open: set[int] = set()
        self._taken: list[int] = []
        self._busy = 0
        self._in_flight = leg.source.router.in_flight
        self._exhausted = False
        self._over = False

    @property
    def asks(self) -> bool:
        return bool(self._asked)

    def abandon(self, carrier: Carrier) -> None:
        """Nobody waits for what was asked for."""
        if self._open:
            carrier.unstage(self._leg, sorted(self._open))

    def go_on(self, carrier: Carrier) -> None:
        """Begin with further chunks, until all are done."""
        while not self._exhausted and self._busy < self._in_flight:
            chunk = next(self._todo, None)
            if chunk is None:
                self._exhausted = True
                break
            self._busy += 1
            layout = self._chunk_planner.layout(chunk)
            if self._route is Route.TARGET_UNPACKED:
                self._land(carrier, chunk, layout, None, None)
            else:
                number, self._leg.next_number = self._leg.next_number, self._leg.next_number + 1
                self._asked[number] = chunk
                self._open.add(number)
                token = self._leg.reading.job.transfer.ref.token
                taken, self._taken = self._taken, []
                carrier.stage(
                    self._leg,
                    StageChunk(token=token, number=number, layout=layout.encoded, tokens=chunk.tokens, released=taken),
                )
        if self._taken:
            taken, self._taken = self._taken, []
            carrier.unstage(self._leg, taken)
        if self._exhausted and not self._busy and not self._over:
            self._over = True
            self._then()

    def staged(self, carrier: Carrier, number: int, address: int, digest: bytes) -> None:  # noqa: ARG002
        """The source has packed a chunk at ``address``."""
        chunk = self._asked.pop(number, None)
        if chunk is None:
            return
        layout = self._chunk_planner.layout(chunk)
        if self._route is Route.BOTH:
            self._land(carrier, chunk, layout, number, address)
            return
        spans = layout.unpack_plan.descriptors(layout.unpack_tables(chunk, self._match))
        spans = Descriptors(spans.local, spans.remote + np.uint64(address), spans.nbytes)
        self._submit(carrier, spans, lambda: self._arrived(carrier, number))

    def _land(
        self, carrier: Carrier, chunk: Chunk, layout: ChunkLayout, number: int | None, address: int | None
    ) -> None:
        """Fetch a chunk into a slot of this side: as it was packed, or run by run from the source's cache."""

        def fetch(slot: int) -> None:
            if address is not None:
                spans = Descriptors.of(slot, address, layout.nbytes)
            else:
                bound = layout.pack_plan.resolve(layout.pack_tables(chunk, self._match))
                if bound.runs()[0] > _MOST_GATHERED:
                    raise IncompatibleError(
                        "descriptors", f"a chunk of the source is more than {_MOST_GATHERED:,} runs"
                    )
                gathered = bound.descriptors()
                spans = Descriptors(gathered.local + np.uint64(slot), gathered.remote, gathered.nbytes)
            self._submit(carrier, spans, lambda: landed(slot))

        def landed(slot: int) -> None:
            if number is not None:
                self._open.discard(number)
                carrier.unstage(self._leg, [number])  # at once: to unpack takes a while
            packed = carrier.view_slot(slot, layout.nbytes)
            bound = layout.unpack_plan.copies(layout.unpack_tables(chunk, self._match))
            copies = start_copies(carrier.cache, bound, packed, pack=False)
            carrier.copying(self._leg, copies, lambda: unpacked(slot))

        def unpacked(slot: int) -> None:
            carrier.give_slot(self._leg, slot)
            self._ended(carrier)

        carrier.take_slot(self._leg, fetch)

    def _submit(self, carrier: Carrier, spans: Descriptors, then: Callable[[], None]) -> None:
        self._leg.count(spans)
        carrier.submit(self._leg, [spans], then)

    def _arrived(self, carrier: Carrier, number: int) -> None:
        self._open.discard(number)
        self._taken.append(number)
        self._ended(carrier)

    def _ended(self, carrier: Carrier) -> None:
        self._busy -= 1
        self.go_on(carrier)

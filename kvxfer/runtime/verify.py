# SPDX-License-Identifier: Apache-2.0
"""Did the bytes that landed mean what their source has? Asked on request (``verify``), chunk by chunk, before the fence.

A chunk is named as on the packed route: some layers and tokens of one record, laid out like the reader's cache, elements of the
reader's type. Its source packs it from its own blocks and sends a digest instead of the chunk; the reader packs the same from the
blocks into which it read, and compares. So what is compared is what the cache means, whatever either side looks like in memory,
and by whatever route the bytes came. The read goes on whatever is found: only its fence tells whether the source still had these
blocks for it. A chunk that differs is halved, until a layer and a block are found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvxfer.errors import Difference, IncompatibleError, IntegrityError
from kvxfer.planner.chunk_layout import chunk_table, digest
from kvxfer.planner.rank_plan import MatchedTables
from kvxfer.protocol.messages import StageChunk
from kvxfer.runtime.packer import start_copies

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvxfer.planner.chunk_layout import Chunk
    from kvxfer.planner.chunks import ChunkPlanner
    from kvxfer.runtime.read_task import Carrier, Leg

MOST_DIFFERENCES = 16
"""After so many are found no more are looked for."""


def verdict(differences: Sequence[Difference]) -> IntegrityError | None:
    """Why a read that is over has failed, if it has."""
    return IntegrityError(differences, more=len(differences) >= MOST_DIFFERENCES) if differences else None


class Check:
    """Tokens of one leg, in chunks: `Router.in_flight` of them are asked for or compared at a time. Data thread only.

    Args:
        chunk_planner: the chunks.
        match: what the leg has read.
        then: called when all of it was compared.
    """

    def __init__(self, leg: Leg, match: MatchedTables, chunk_planner: ChunkPlanner, then: Callable[[], None]) -> None:
        self._leg = leg
        self._match = match
        self._chunk_planner = chunk_planner
        self._then = then
        self._todo: Iterator[Chunk] = chunk_planner.chunks(match.tokens)
        self._halves: list[Chunk] = []
        self._asked: dict[int, Chunk] = {}
        self._told: list[int] = []
        self._busy = 0
        self._in_flight = leg.source.router.in_flight
        self._over = False

    @property
    def asks(self) -> bool:
        """It waits for its source."""
        return bool(self._asked)

    def abandon(self, carrier: Carrier) -> None:
        """Nobody waits for what was asked for."""
        if self._asked or self._told:
            carrier.unstage(self._leg, sorted([*self._asked, *self._told]))

    def go_on(self, carrier: Carrier) -> None:
        """Ask for further digests, until all are compared. What differs is noted with the read, which fails when it is over."""
        while self._busy < self._in_flight:
            chunk = self._next()
            if chunk is None:
                break
            self._busy += 1
            number, self._leg.next_number = self._leg.next_number, self._leg.next_number + 1
            self._asked[number] = chunk
            told, self._told = self._told, []
            token, layout = self._leg.reading.job.transfer.ref.token, self._chunk_planner.layout(chunk)
            stage = StageChunk(
                token=token, number=number, layout=layout.encoded, tokens=chunk.tokens, released=told, digest=True
            )
            carrier.stage(self._leg, stage)
        if not self._busy and not self._over:
            self._over = True
            if self._told:
                carrier.unstage(self._leg, self._told)
            self._then()

    def staged(self, carrier: Carrier, number: int, address: int, theirs: bytes) -> None:  # noqa: ARG002
        """The source has told the digest of a chunk."""
        chunk = self._asked.pop(number, None)
        if chunk is None:
            return
        self._told.append(number)
        if not theirs:
            raise IncompatibleError("verify", "the producer's version of kvxfer makes no digests")
        layout = self._chunk_planner.layout(chunk)

        def pack(slot: int) -> None:
            packed = carrier.view_slot(slot, layout.nbytes)
            packed.fill(0)
            table = chunk_table(layout.target, chunk.tokens)
            match = MatchedTables(self._match.targets, [table], [chunk.tokens], self._match.alignments)
            copies = start_copies(carrier.cache, layout.repack_plan.copies(match), packed, pack=True)
            carrier.copying(self._leg, copies, lambda: compare(slot))

        def compare(slot: int) -> None:
            ours = digest(carrier.view_slot(slot, layout.nbytes))
            carrier.give_slot(self._leg, slot)
            if ours != theirs:
                self._differs(chunk)
            self._busy -= 1
            self.go_on(carrier)

        carrier.take_slot(self._leg, pack)

    def _next(self) -> Chunk | None:
        if len(self._leg.reading.differences) >= MOST_DIFFERENCES:
            return None
        return self._halves.pop() if self._halves else next(self._todo, None)

    def _differs(self, chunk: Chunk) -> None:
        halves = self._chunk_planner.halves(chunk)
        if halves:
            self._halves += reversed(halves)
            return
        template = self._chunk_planner.templates[chunk.template]
        spec, table = self._chunk_planner.rank_plan.target, self._match.targets[template.group]
        number = template.layers[chunk.layers[0]][1]
        name = spec.layer_names[number - spec.layers.start] if spec.layer_names else ""
        first, last = ((token - table.first_token) // table.tokens for token in (chunk.tokens[0], chunk.tokens[1] - 1))
        blocks = tuple(table.ids[first : last + 1].tolist())
        self._leg.reading.differences.append(
            Difference(spec.groups[template.group].name, number, name, template.record, chunk.tokens, blocks)
        )

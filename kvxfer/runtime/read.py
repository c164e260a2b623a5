# SPDX-License-Identifier: Apache-2.0
"""One read, from top to bottom: what it does first stands first.

::

    read          match block tables, wait for the engine's own device
    read_source   first contact; move what is granted, again and again until that is all; validation read of the lease's cell
    move          direct: runs from cache to cache, in pieces where there are too many
                  packed: chunks, several at a time, each asked for, moved and unpacked
    compare       if asked to verify: digests of what arrived, chunk by chunk

All of these are generators that yield what they want (`kvxfer.runtime.read_task`) and are resumed on the data thread with the
answer (`kvxfer.runtime.read_requests`). What a read borrows is given back when the ``with`` ends in which it was borrowed. A read that fails
is closed as soon as nothing of it is in flight, so that its places are never given back while something may be written there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from kvxfer.errors import IncompatibleError, LeaseEndedError, TransferTimeoutError
from kvxfer.memory.spans import Descriptors
from kvxfer.planner.chunk_layout import digest
from kvxfer.planner.router import Route
from kvxfer.protocol.lease_board import CELL_NBYTES
from kvxfer.runtime.packer import start_copies
from kvxfer.runtime.read_task import (
    AskChunk,
    AwaitCopies,
    AwaitDevice,
    AwaitGrant,
    BorrowScratch,
    BorrowSlot,
    ChunkTaken,
    Connect,
    Move,
    RunAll,
)
from kvxfer.runtime.verify import MOST_DIFFERENCES, difference, repacked

if TYPE_CHECKING:
    from collections.abc import Generator

    from kvxfer.planner.chunk_layout import Chunk
    from kvxfer.planner.chunks import ChunkPlanner
    from kvxfer.planner.rank_plan import MatchedTables, ResolvedPlan
    from kvxfer.protocol.actions import ChunkStaged
    from kvxfer.runtime.pool import Loan
    from kvxfer.runtime.read_task import ReadTask, Request, SourceRead, Steps


_MOST_DESCRIPTORS: Final = 1 << 19
"""Most descriptors that are made at a time, with about 150 bytes each: how many a read has depends on its source's description of its cache."""
_MOST_OF_A_READ: Final = 1 << 26
"""Most descriptors from one source; more would take minutes."""
_MOST_GATHERED: Final = 1 << 21
"""Most runs of one chunk."""


# -- the steps of a read -------------------------------------------------------------------------------------------------


def read(task: ReadTask) -> Steps:
    """Read from all sources of a lease at the same time.

    Raises:
        KvxferError: as do all generators here; the read ends with it.
    """
    for source in task.sources:
        source.match()
    yield AwaitDevice(task.job.transfer.after)
    if task.now() >= task.deadline:
        raise TransferTimeoutError("the deadline passed before the read could start")
    sources = iter(task.sources)

    def following() -> Steps | None:
        source = next(sources, None)
        return read_source(source) if source is not None else None

    yield RunAll(following, len(task.sources))


def read_source(source: SourceRead) -> Steps:
    """Read all that one source gives, and find its lease's check in its cell when the last byte is in place."""
    if (yield Connect(source)):
        yield from validation_read(source)  # of a lease that has ended no byte is moved
    last: list[Descriptors] = []
    while not last:
        tables = source.unmoved()
        if tables is not None:
            last = yield from move(source, tables)
        elif source.granted.complete:
            break
        else:
            yield AwaitGrant(source)
    yield from validation_read(source, *last)


def move(source: SourceRead, tables: MatchedTables) -> Generator[Request, None, list[Descriptors]]:
    """Move the tokens of these block tables.

    Returns:
        what is still to be moved: the last bytes of a read that is not verified go together with the validation read after
        them, so that the transfer engine is asked once and not twice.
    """
    task = source.task
    choice = source.router.choose(tables)
    source.routes.add(choice.route.value)
    last: list[Descriptors] = []
    if choice.chunk_planner is not None:
        yield from move_packed(source, tables, choice.route, choice.chunk_planner)
    elif choice.resolved.runs()[0] > _MOST_DESCRIPTORS:
        yield from move_in_pieces(source, choice.resolved)
    else:
        spans = choice.resolved.descriptors()
        source.count(spans)
        if len(spans) and source.granted.complete and not task.job.transfer.verify:
            last = [spans]
        elif len(spans):
            yield Move(source, [spans])
    source.here_nbytes = source.sent_nbytes
    if task.job.transfer.verify:
        yield from compare(source, tables)
    source.moved.update({group: stop for group, (start, stop) in enumerate(tables.tokens) if start < stop})
    return last


def move_in_pieces(source: SourceRead, resolved: ResolvedPlan) -> Steps:
    """Move what is too many descriptors to be made at once: piece by piece."""
    runs, _ = resolved.runs()
    if runs > _MOST_OF_A_READ:
        what = f"{runs:,} runs would have to be moved one by one, more than {_MOST_OF_A_READ:,}"
        raise IncompatibleError("descriptors", f"{what}: read fewer tokens at a time, or let chunks be packed")
    for piece in resolved.split_by_runs(_MOST_DESCRIPTORS):
        spans = resolved.rank_plan.descriptors(piece)
        source.count(spans)
        yield Move(source, [spans])


def move_packed(source: SourceRead, tables: MatchedTables, route: Route, planner: ChunkPlanner) -> Steps:
    """Move chunks, several at a time."""
    chunks = planner.chunks(tables.tokens)

    def following() -> Steps | None:
        chunk = next(chunks, None)
        if chunk is None:
            return None
        if route is Route.SOURCE_PACKED:
            return scatter_chunk(source, tables, planner, chunk)
        return land_chunk(source, tables, route, planner, chunk)

    yield RunAll(following, source.router.in_flight)


def scatter_chunk(source: SourceRead, tables: MatchedTables, planner: ChunkPlanner, chunk: Chunk) -> Steps:
    """Have the source pack a chunk, and move it from there to where it belongs in this cache."""
    layout = planner.layout(chunk)
    packed: ChunkStaged = yield AskChunk(source, layout.encoded, chunk.tokens)
    spans = layout.unpack_plan.descriptors(layout.unpack_tables(chunk, tables))
    spans = Descriptors(spans.local, spans.remote + np.uint64(packed.address), spans.nbytes)
    source.count(spans)
    yield Move(source, [spans])
    yield ChunkTaken(source, packed.number)


def land_chunk(source: SourceRead, tables: MatchedTables, route: Route, planner: ChunkPlanner, chunk: Chunk) -> Steps:
    """Fetch a chunk into a slot of this side, as the source packed it or run by run from its cache, and unpack it."""
    task, layout = source.task, planner.layout(chunk)
    packed: ChunkStaged | None = None
    if route is Route.BOTH:
        packed = yield AskChunk(source, layout.encoded, chunk.tokens)
    loan: Loan = yield BorrowSlot()
    with loan as slot:
        if packed is not None:
            spans = Descriptors.of(slot, packed.address, layout.nbytes)
        else:
            resolved = layout.pack_plan.resolve(layout.pack_tables(chunk, tables))
            if resolved.runs()[0] > _MOST_GATHERED:
                raise IncompatibleError("descriptors", f"a chunk of the source is more than {_MOST_GATHERED:,} runs")
            gathered = resolved.descriptors()
            spans = Descriptors(gathered.local + np.uint64(slot), gathered.remote, gathered.nbytes)
        source.count(spans)
        yield Move(source, [spans])
        if packed is not None:
            yield ChunkTaken(source, packed.number, at_once=True)  # to unpack takes a while
        copies = layout.unpack_plan.copies(layout.unpack_tables(chunk, tables))
        view = task.tools.arena.view(slot, layout.nbytes)
        yield AwaitCopies(start_copies(task.tools.cache, copies, view, pack=False))


def compare(source: SourceRead, tables: MatchedTables) -> Steps:
    """Compare what arrived with what the source has, see `kvxfer.runtime.verify`; several chunks at a time."""
    task, planner = source.task, source.router.for_comparison()
    chunks = planner.chunks(tables.tokens)
    halves: list[Chunk] = []

    def following() -> Steps | None:
        if len(task.differences) >= MOST_DIFFERENCES:
            return None
        chunk = halves.pop() if halves else next(chunks, None)
        return compare_chunk(source, tables, planner, chunk, halves) if chunk is not None else None

    yield RunAll(following, source.router.in_flight)


def compare_chunk(
    source: SourceRead, tables: MatchedTables, planner: ChunkPlanner, chunk: Chunk, halves: list[Chunk]
) -> Steps:
    """Compare one chunk by its digest. One that differs is halved, until a layer and a block are found."""
    task, layout = source.task, planner.layout(chunk)
    theirs: ChunkStaged = yield AskChunk(source, layout.encoded, chunk.tokens, digest=True)
    yield ChunkTaken(source, theirs.number)
    if not theirs.digest:
        raise IncompatibleError("verify", "the producer's version of kvxfer makes no digests")
    loan: Loan = yield BorrowSlot()
    with loan as slot:
        view = task.tools.arena.view(slot, layout.nbytes)
        view.fill(0)
        yield AwaitCopies(start_copies(task.tools.cache, repacked(layout, chunk, tables), view, pack=True))
        ours = digest(view)
    if ours != theirs.digest:
        smaller = planner.halves(chunk)
        halves += reversed(smaller)
        if not smaller:
            task.differences.append(difference(planner, chunk, tables))


def validation_read(source: SourceRead, *before: Descriptors) -> Steps:
    """Read the lease's cell when what is to be moved ``before`` is in place. Raises LeaseEndedError: its check is not there."""
    loan: Loan = yield BorrowScratch()
    with loan as scratch:
        cell = Descriptors.of(scratch, source.granted.cell, CELL_NBYTES)
        yield Move(source, [*before, cell], checks=True)
        found = source.task.tools.board.read_scratch(scratch)
    if found != source.granted.check:
        raise LeaseEndedError("the lease had ended when the bytes arrived; they are thrown away")

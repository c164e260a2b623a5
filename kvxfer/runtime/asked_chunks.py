# SPDX-License-Identifier: Apache-2.0
"""Chunks that reads ask their sources to pack: each is asked for by a number, and its slot is given back when it was taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvxfer.protocol.messages import StageChunk

if TYPE_CHECKING:
    from kvxfer.runtime.read_task import AskChunk, ChunkTaken, SourceRead, Strand
    from kvxfer.runtime.reports import ReadReports


class AskedChunks:
    """Requests for chunks of all reads of an endpoint. Used by the data thread alone.

    Args:
        reports: takes the messages to the sources.
    """

    def __init__(self, reports: ReadReports) -> None:
        self._reports = reports
        self._with_taken: dict[SourceRead, None] = {}
        """Sources that may have chunks to be given back."""

    def ask(self, strand: Strand, request: AskChunk) -> None:
        """Have a source pack a chunk; the chunks that were taken meanwhile are given back with the same message."""
        source, number = request.source, request.source.next_number()
        source.asked[number] = strand
        source.unreleased.add(number)
        released, source.taken = source.taken, []
        transfer = strand.task.job.transfer
        message = StageChunk(
            token=transfer.ref.token,
            number=number,
            layout=request.layout,
            tokens=request.tokens,
            released=released,
            digest=request.digest,
        )
        self._reports.stage(transfer, source.granted.number, message)

    def taken(self, request: ChunkTaken) -> None:
        """Note that a chunk was taken."""
        source = request.source
        source.unreleased.discard(request.number)
        if request.at_once:
            self._give_back(source, [request.number])
        else:
            source.taken.append(request.number)
            self._with_taken[source] = None

    def tell_taken(self) -> None:
        """Give back the chunks that were taken and went with no request for another one."""
        sources, self._with_taken = self._with_taken, {}
        for source in sources:
            if source.taken and source.task.error is None:
                self._give_back(source, source.taken)
            source.taken = []

    def give_all_back(self, source: SourceRead) -> None:
        """Let a source have the slots of all chunks that a read has asked it for."""
        unreleased = sorted([*source.unreleased, *source.taken])
        source.taken = []
        if unreleased:
            self._give_back(source, unreleased)

    def _give_back(self, source: SourceRead, numbers: list[int]) -> None:
        self._reports.unstage(source.task.job.transfer, source.granted.number, numbers)

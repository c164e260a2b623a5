# SPDX-License-Identifier: Apache-2.0
"""Resumes the generators of reads.

A strand is resumed by `Strands.step` only, and an answer waits in a line until no strand runs. So no generator is ever resumed
while it runs, or twice by one answer; and a strand of a read that has failed is not resumed at all: it is closed when nothing of the
read is in flight.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from kvxfer.runtime.read_task import ReadTask, Request, RunAll, Strand, StrandGroup

if TYPE_CHECKING:
    from collections.abc import Callable


class Strands:
    """The generators of all reads of an endpoint. Data thread only.

    Args:
        begin: begins what a strand asks for. What that raises is raised at the strand's ``yield``; nothing was begun then.
        ended: called when all strands of a read have ended.
        raised: called when a strand of a read has raised.
    """

    def __init__(
        self,
        begin: Callable[[Strand, Request], object],
        ended: Callable[[ReadTask], object],
        raised: Callable[[ReadTask, Exception], object],
    ) -> None:
        self._begin = begin
        self._all_ended = ended
        self._raised = raised
        self._answered: deque[tuple[Strand, Any]] = deque()
        """Strands to be resumed, with the answer."""

    def spawn(self, strand: Strand) -> None:
        """Add a strand to its read, to be begun when its turn comes."""
        strand.task.strands[strand] = None
        self.answer(strand)

    def answer(self, strand: Strand, answer: Any = None) -> None:
        """Have a strand resumed when its turn comes."""
        self._answered.append((strand, answer))

    def run(self, serve: Callable[[], object]) -> None:
        """Resume all that were answered, until none is left; ``serve`` answers those that wait for what others have given back."""
        serve()
        while self._answered:
            strand, answer = self._answered.popleft()
            self.step(strand, answer)
            if not self._answered:
                serve()

    def step(self, strand: Strand, answer: Any = None, error: Exception | None = None) -> None:
        """Resume a strand with an answer, or raise an error in it, and begin what it asks for next. No strand may be running."""
        task = strand.task
        if task.error is not None or strand not in task.strands:
            return
        strand.request = None
        try:
            request = strand.steps.send(answer) if error is None else strand.steps.throw(error)
        except StopIteration:
            del task.strands[strand]
            self._ended(strand)
            return
        except Exception as raised:  # noqa: BLE001 - one bad read must not end the thread
            del task.strands[strand]
            self._raised(task, raised)
            return
        strand.request = request
        self.begin(strand)

    def begin(self, strand: Strand) -> None:
        """Begin what a strand asks for, or begin it again. No effect if the strand has ended."""
        if strand.request is None or strand not in strand.task.strands:
            return
        try:
            self._begin(strand, strand.request)
        except Exception as raised:  # noqa: BLE001 - what the request fails with is the strand's
            self.step(strand, error=raised)

    def run_all(self, strand: Strand, request: RunAll) -> None:
        """Run the generators of a request side by side."""
        self._refill(StrandGroup(strand, request))

    def _ended(self, strand: Strand) -> None:
        if strand.group is None:
            self._all_ended(strand.task)
            return
        strand.group.running -= 1
        try:
            self._refill(strand.group)
        except Exception as error:  # noqa: BLE001 - one bad read must not end the thread
            self._raised(strand.task, error)

    def _refill(self, group: StrandGroup) -> None:
        while group.running < group.request.window:
            steps = group.request.following()
            if steps is None:
                break
            group.running += 1
            self.spawn(Strand(group.strand.task, steps, group))
        if not group.running:
            self.answer(group.strand)

# SPDX-License-Identifier: Apache-2.0
"""Places that reads borrow: slots of the staging arena and scratch cells of the lease board."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvxfer.runtime.staging import FairQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvxfer.runtime.read_task import ReadTask, Strand


class Loan:
    """A place that a read has borrowed: a context that yields the place's address and gives it back at its end."""

    def __init__(self, pool: Pool, task: ReadTask, address: int) -> None:
        self._pool = pool
        self._task = task
        self._address = address

    def __enter__(self) -> int:
        return self._address

    def __exit__(self, *_: object) -> None:
        self._pool.give_back(self._task, self._address)


class Pool:
    """Lends places of one kind; reads that wait for one take turns. Data thread only.

    Args:
        take: returns the address of a free place, or None.
        give: frees a place.
    """

    def __init__(self, take: Callable[[], int | None], give: Callable[[int], None]) -> None:
        self._take = take
        self._give = give
        self._waiting: FairQueue[Strand] = FairQueue()
        self._lent: dict[ReadTask, set[int]] = {}

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a place."""
        return len(self._waiting)

    def ask(self, strand: Strand) -> None:
        """Wait for a place."""
        self._waiting.put(strand.task, strand)

    def lend(self) -> Iterator[tuple[Strand, Loan]]:
        """Each request that can be answered, with the place that it is given."""
        while self._waiting:
            address = self._take()
            if address is None:
                return
            strand = self._waiting.take()
            self._lent.setdefault(strand.task, set()).add(address)
            yield strand, Loan(self, strand.task, address)

    def give_back(self, task: ReadTask, address: int) -> None:
        """Free a place that a read has borrowed, if it still has it."""
        lent = self._lent.get(task, set())
        if address in lent:
            lent.remove(address)
            self._give(address)

    def stop_waiting(self, task: ReadTask) -> None:
        """Forget what a read waits for. It keeps what it has borrowed: something may still be written there."""
        self._waiting.drop(task)

    def release(self, task: ReadTask) -> None:
        """Free all that a read has borrowed. Nothing of it may be in flight."""
        self.stop_waiting(task)
        for address in self._lent.pop(task, ()):
            self._give(address)

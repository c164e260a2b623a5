# SPDX-License-Identifier: Apache-2.0
"""Blocks of a cache that reads under way write to: two reads into one block at once would mix two requests."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from kvxfer.errors import BlockError
from kvxfer.layout.block_table import pieces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvxfer.layout.block_table import CheckedTable
    from kvxfer.layout.spec import CacheSpec


class TargetBlocks:
    """Blocks of one cache that belong to reads. Any thread; nothing here lets go of the interpreter's lock.

    Args:
        spec: of the cache.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self._spec = spec
        # Of memory that is touched where blocks are used only.
        self._taken = [np.zeros(group.num_blocks, np.bool_) for group in spec.groups]
        self._lock = threading.RLock()
        """Of engines' threads only. What ends elsewhere is put in line: the data thread waits for no engine, nor an engine for it."""
        self._ended: deque[Sequence[CheckedTable]] = deque()

    def take(self, into: Sequence[CheckedTable]) -> None:
        """Reserve blocks for a read. Raises BlockError: one belongs to another read; nothing changes."""
        with self._lock:
            self._free_ended()
            for taken, table in zip(self._taken, into, strict=True):
                ids = table.ids
                for one in pieces(len(ids)):
                    if np.logical_or.reduce(taken[ids[one]]):
                        raise self._refusal(into)
            self._mark(into, taken=True)

    @property
    def in_use(self) -> int:
        """Blocks that belong to reads under way."""
        with self._lock:
            self._free_ended()
            return sum(int(np.count_nonzero(taken)) for taken in self._taken)

    def give_back(self, into: Sequence[CheckedTable]) -> None:
        """Their read has ended, and nothing writes to them any more."""
        self._ended.append(into)

    def _free_ended(self) -> None:
        while self._ended:
            self._mark(self._ended.popleft(), taken=False)

    def _mark(self, into: Sequence[CheckedTable], *, taken: bool) -> None:
        for marks, table in zip(self._taken, into, strict=True):
            ids = table.ids
            for one in pieces(len(ids)):
                marks[ids[one]] = taken

    def _refusal(self, into: Sequence[CheckedTable]) -> BlockError:
        for group, taken, table in zip(self._spec.groups, self._taken, into, strict=True):
            twice = table.ids[taken[table.ids]]
            if len(twice):
                where = f" of group {group.name!r}" if len(self._spec.groups) > 1 else ""
                others = f" (and {len(twice) - 1} more)" if len(twice) > 1 else ""
                break
        return BlockError(
            f"target block {int(twice[0])}{where}{others} belongs to another read that has not ended: wait for that one, or read into"
            " other blocks"
        )

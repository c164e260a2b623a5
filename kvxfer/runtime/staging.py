# SPDX-License-Identifier: Apache-2.0
"""The staging arena: a bounded piece of host memory in which chunks of packed transfers lie while they cross the wire."""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np

from kvxfer.memory.spans import Memory

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

_PAGE_NBYTES = 4096
_FEWEST_SLOTS = 8

_kept: list[Bytes] = []
"""Memory that must outlive the endpoints that it was made for."""


class Staging(NamedTuple):
    """Size and use of an endpoint's staging arena.

    Attributes:
        memory: where the slots lie.
        slots: number of them, each of ``slot_nbytes``: no chunk is larger.
        most_slots: most that were in use at a time.
    """

    memory: Memory
    slots: int
    slot_nbytes: int
    most_slots: int


class Use(str, Enum):
    """Use of a slot."""

    OUTGOING = "outgoing"
    """A chunk packed for a consumer, until that says that it has taken it."""
    LANDING = "landing"
    """A chunk that is being read, until it is unpacked: it waits for no peer."""


class StagingArena:
    """Slots of one size in one allocation, whose size is a hard limit. Owns its memory; one thread uses it.

    One slot is never given to outgoing chunks, and one never to landing ones. So whatever two processes want of each other,
    each can land a chunk, and that frees a slot of the other one: they do not wait for each other in a circle.

    Args:
        nbytes: of the whole arena, at least 32 KiB. Memory is taken by the operating system when a slot is first used.
        longest_chunk_nbytes: no slot is larger; there are at least 8 of them.
    """

    def __init__(self, nbytes: int, longest_chunk_nbytes: int = 8 << 20) -> None:
        slot = min(longest_chunk_nbytes, nbytes // _FEWEST_SLOTS) // _PAGE_NBYTES * _PAGE_NBYTES
        self.slot_nbytes: int = slot
        """Of one slot: no chunk is larger."""
        self.slots: int = nbytes // slot
        # Aligned by hand; np.empty leaves pages untouched, and so unused.
        memory = np.empty(self.slots * slot + _PAGE_NBYTES, dtype=np.uint8)
        begin = -int(memory.ctypes.data) % _PAGE_NBYTES
        self._bytes: Bytes = memory[begin : begin + self.slots * slot]
        self._base = int(self._bytes.ctypes.data)
        self._free = list(range(self.slots - 1, -1, -1))
        self._taken: dict[int, Use] = {}
        self._used = dict.fromkeys(Use, 0)
        self.peak: int = 0
        """Most slots that were in use at a time."""

    @property
    def memory(self) -> Memory:
        """Memory of the arena."""
        return Memory(self._base, len(self._bytes))

    @property
    def staging(self) -> Staging:
        """Its size, and how much of it was in use. Any thread."""
        return Staging(self.memory, self.slots, self.slot_nbytes, self.peak)

    @property
    def bytes(self) -> Bytes:
        """All of it."""
        return self._bytes

    @property
    def in_use(self) -> int:
        """Slots in use now."""
        return len(self._taken)

    def take(self, use: Use) -> int | None:
        """Address of a free slot, the last that was given back first; None if there is none for this use."""
        if not self._free or self._used[use] >= self.slots - 1:
            return None
        index = self._free.pop()
        self._taken[index] = use
        self._used[use] += 1
        self.peak = max(self.peak, len(self._taken))
        return self._base + index * self.slot_nbytes

    def give(self, address: int) -> None:
        """Give back a slot into which, and from which, nothing is copied any more."""
        index = (address - self._base) // self.slot_nbytes
        self._used[self._taken.pop(index)] -= 1
        self._free.append(index)

    def keep(self) -> None:
        """Never free this memory: a device that was given up may still copy to or from it."""
        _kept.append(self._bytes)

    def view(self, address: int, nbytes: int) -> Bytes:
        """The first bytes of a slot."""
        begin = address - self._base
        return self._bytes[begin : begin + nbytes]


_Item = TypeVar("_Item")


class FairQueue(Generic[_Item]):
    """Items that wait: first come, first served within one transfer, and transfers take turns."""

    def __init__(self) -> None:
        self._lines: dict[Hashable, deque[_Item]] = {}

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __len__(self) -> int:
        return sum(map(len, list(self._lines.values())))

    def put(self, whose: Hashable, item: _Item) -> None:
        """Wait in the line of one transfer."""
        self._lines.setdefault(whose, deque()).append(item)

    def take(self, prefer: Callable[[_Item], bool] | None = None) -> _Item:
        """The next one, whose transfer then waits until the others had theirs. Raises KeyError: nothing waits.

        Args:
            prefer: transfers whose first item is not preferred wait until no other one is.
        """
        whose = next(iter(self._lines), None)
        if whose is None:
            raise KeyError("nothing waits")
        if prefer is not None:
            whose = next((each for each, line in self._lines.items() if prefer(line[0])), whose)
        line = self._lines.pop(whose)
        item = line.popleft()
        if line:
            self._lines[whose] = line
        return item

    def remove(self, whose: Hashable, unwanted: Callable[[_Item], bool]) -> None:
        """Forget some of what waits in one line."""
        line = deque(item for item in self._lines.get(whose, ()) if not unwanted(item))
        if line:
            self._lines[whose] = line
        else:
            self._lines.pop(whose, None)

    def drop(self, whose: Hashable) -> list[_Item]:
        """Forget all that waits in one line; returns it."""
        return list(self._lines.pop(whose, ()))

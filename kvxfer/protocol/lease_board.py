# SPDX-License-Identifier: Apache-2.0
"""The lease board, from which a consumer reads whether its lease stood when its bytes were in place.

The producer keeps one 16-byte *cell* per published lease in registered host memory. It holds the *check* of the lease, random
bytes that were never used before and will never be used again, from the moment its first blocks are published, and is wiped
before they are given back. The grant tells the check to the consumer, which reads the blocks, and when those bytes are in place reads the cell
through the same transfer agent. If the check is still there, the lease had not ended when the last byte was read; if not (wiped, or
already the check of another lease), what was read is thrown away.

The check is not the lease's token: two sides that make the same token twice (`LeaseRef.for_rendezvous`) publish other blocks the second time.

That is one small one-sided read instead of a round trip through the producer's Python, whose threads may wait for the
engine's interpreter lock; and it answers also for a producer that is frozen, which cannot have given back its blocks.
A torn read of a cell being wiped differs from the check, so it counts as ended.
"""

from __future__ import annotations

import numpy as np

from kvxfer.errors import LeaseError
from kvxfer.memory.spans import Memory, MemoryKind

CELL_NBYTES = 16


class LeaseBoard:
    """Cells of one endpoint: those of its leases, and scratch cells into which its own reads fetch those of other producers.

    Owns its memory; the endpoint registers `memory` with its agent. Cells of the producer belong to the control
    thread, scratch cells to the data thread; the two halves share nothing.

    Args:
        cells: most leases published at once.
        scratch: most reads of this endpoint checking their lease at once.

    Attributes:
        unread: address of a cell into which anything may be read, for its content means nothing.
    """

    def __init__(self, cells: int, scratch: int = 1024) -> None:
        self._array = np.zeros((cells + scratch + 1, CELL_NBYTES), dtype=np.uint8)
        self._begin = int(self._array.ctypes.data)
        self._free = list(range(cells - 1, -1, -1))
        self._free_scratch = list(range(cells + scratch - 1, cells - 1, -1))
        self.unread: int = self._address(cells + scratch)
        self._cells, self._scratch = cells, scratch

    @property
    def memory(self) -> Memory:
        """Memory of the board."""
        return Memory(self._begin, self._array.nbytes, MemoryKind.DRAM)

    @property
    def cells_in_use(self) -> int:
        """Cells that hold the check of a lease."""
        return self._cells - len(self._free)

    @property
    def scratch_in_use(self) -> int:
        """Scratch cells that are lent."""
        return self._scratch - len(self._free_scratch)

    def post(self, check: bytes) -> int:
        """Write ``check`` (16 bytes) into a free cell; returns the cell's address.

        Raises:
            LeaseError: all cells are taken.
        """
        if not self._free:
            raise LeaseError("too many leases are published at once (setting max_leases)")
        index = self._free.pop()
        self._array[index] = np.frombuffer(check, dtype=np.uint8)
        return self._address(index)

    def wipe(self, address: int) -> None:
        """Forget a posted check. Must come before the lease's blocks are given back."""
        index = self._index(address)
        self._array[index] = 0
        self._free.append(index)

    def take_scratch(self) -> int | None:
        """Address of a scratch cell, wiped; None when all are in use."""
        if not self._free_scratch:
            return None
        index = self._free_scratch.pop()
        self._array[index] = 0
        return self._address(index)

    def read_scratch(self, address: int) -> bytes:
        """Content that a read brought into a scratch cell."""
        return bytes(self._array[self._index(address)].tobytes())

    def give_scratch(self, address: int) -> None:
        """Return a scratch cell into which nothing will be written any more."""
        self._free_scratch.append(self._index(address))

    def _address(self, index: int) -> int:
        return self._begin + index * CELL_NBYTES

    def _index(self, address: int) -> int:
        return (address - self._begin) // CELL_NBYTES

# SPDX-License-Identifier: Apache-2.0
"""Spans of memory: registered regions (`Memory`, `RegionTable`) and transfers between them (`Descriptors`)."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from kvxfer.errors import DescriptorError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    U64Array = npt.NDArray[np.uint64]

MAX_REGIONS = 65_536
"""Most regions in a peer's description; no cache has so many allocations."""


class MemoryKind(str, Enum):
    """Kind of memory, in the terms of transfer engines."""

    DRAM = "dram"
    VRAM = "vram"


class Memory(msgspec.Struct, frozen=True):
    """Span of one device's memory, ``[address, address + nbytes)``. Does not own it."""

    address: int
    nbytes: int
    kind: MemoryKind = MemoryKind.DRAM
    device_id: int = 0

    @property
    def end(self) -> int:
        """First address after the span."""
        return self.address + self.nbytes

    def overlaps(self, other: Memory) -> bool:
        """Whether some byte belongs to both spans."""
        same = (self.kind, self.device_id) == (other.kind, other.device_id)
        return same and self.address < other.end and other.address < self.end

    def __str__(self) -> str:
        return f"{self.kind.value}{self.device_id}[{self.address:#x}+{self.nbytes}]"


@dataclass(frozen=True, eq=False)
class Descriptors:
    """Spans to move: span i has ``nbytes[i]`` bytes at ``local[i]`` in this process and at ``remote[i]`` in the peer's memory.

    Three C-contiguous one-dimensional uint64 arrays of equal length; addresses are absolute in each process.

    Attributes:
        apart: whether no two neighbours of one allocation are adjacent on both sides, so that nothing can be merged.

    Raises:
        DescriptorError: arrays of another shape or type, or an empty span.
    """

    local: U64Array
    remote: U64Array
    nbytes: U64Array
    apart: bool = False

    def __post_init__(self) -> None:
        for array in (self.local, self.remote, self.nbytes):
            if not isinstance(array, np.ndarray) or array.dtype != np.uint64 or array.ndim != 1:
                raise DescriptorError("descriptors are one-dimensional uint64 arrays")
        if not len(self.local) == len(self.remote) == len(self.nbytes):
            raise DescriptorError("descriptor arrays differ in length")
        if not np.logical_and.reduce(self.nbytes):
            raise DescriptorError("a descriptor is empty")

    @classmethod
    def of(cls, local: object, remote: object, nbytes: object) -> Descriptors:
        """Make descriptors from anything that NumPy converts to integer arrays, for tests and small lists."""
        near, far, sizes = (np.array(a, dtype=np.uint64, ndmin=1, order="C") for a in (local, remote, nbytes))
        return cls(near, far, sizes)

    def __len__(self) -> int:
        return len(self.nbytes)

    @cached_property
    def total_nbytes(self) -> int:
        """Sum of all spans."""
        return int(np.add.reduce(self.nbytes))

    def merged(self, *partitions: npt.NDArray[Any]) -> Descriptors:
        """Merge neighbours that are adjacent on both sides; the order stays.

        Args:
            partitions: for each span an index, such as that of its region. Spans with different ones are not merged, because
                engines accept no span across two registrations. A single index is that of all spans.
        """
        if self.apart or len(self) < 2:
            return self
        joins = (self.local[1:] == self.local[:-1] + self.nbytes[:-1]) & (
            self.remote[1:] == self.remote[:-1] + self.nbytes[:-1]
        )
        for partition in partitions:
            if len(partition) > 1:
                joins &= partition[1:] == partition[:-1]
        if not joins.any():
            return Descriptors(self.local, self.remote, self.nbytes, apart=True)
        starts = np.flatnonzero(np.concatenate(([True], ~joins)))
        return Descriptors(self.local[starts], self.remote[starts], np.add.reduceat(self.nbytes, starts), apart=True)

    def split(self, max_descriptors: int | None, max_nbytes: int | None) -> list[Descriptors]:
        """Split into consecutive lists within both limits; a span longer than ``max_nbytes`` is cut."""
        if (max_descriptors is None or len(self) <= max_descriptors) and (
            max_nbytes is None or self.total_nbytes <= max_nbytes
        ):
            return [self] if len(self) else []
        whole = self if max_nbytes is None else self._cut(max_nbytes)
        ends = []
        cumulative = np.cumsum(whole.nbytes)
        begin, moved = 0, 0
        while begin < len(whole):
            end = len(whole)
            if max_nbytes is not None:
                end = int(np.searchsorted(cumulative, moved + max_nbytes, side="right"))
            if max_descriptors is not None:
                end = min(end, begin + max_descriptors)
            ends.append((begin, end))
            begin, moved = end, int(cumulative[end - 1])
        return [Descriptors(whole.local[b:e], whole.remote[b:e], whole.nbytes[b:e]) for b, e in ends]

    def _cut(self, max_nbytes: int) -> Descriptors:
        if int(self.nbytes.max(initial=0)) <= max_nbytes:
            return self
        limit = np.uint64(max_nbytes)
        pieces = (self.nbytes + (limit - np.uint64(1))) // limit
        index = np.repeat(np.arange(len(self)), pieces.astype(np.int64))
        first = np.concatenate(([0], np.cumsum(pieces.astype(np.int64))[:-1]))
        offset = (np.arange(len(index)) - first[index]).astype(np.uint64) * limit
        nbytes = np.minimum(self.nbytes[index] - offset, limit)
        return Descriptors(self.local[index] + offset, self.remote[index] + offset, nbytes)


class RegionTable:
    """Registered regions of one agent, to check n descriptors against r regions in O(n log r).

    Raises:
        ValueError: too many regions, or one that is empty or wraps around the address space.
    """

    def __init__(self, memories: Sequence[Memory]) -> None:
        if len(memories) > MAX_REGIONS:
            raise ValueError(f"{len(memories)} regions are more than {MAX_REGIONS}")
        for memory in memories:
            if memory.address < 0 or memory.nbytes <= 0 or memory.end > 1 << 63:
                raise ValueError(f"impossible region {memory}")
        self._memories = sorted(memories, key=lambda m: m.address)
        self._addresses = [m.address for m in self._memories]
        self._starts = np.array(self._addresses, dtype=np.uint64)
        self._ends = np.array([m.end for m in self._memories], dtype=np.uint64)
        devices = {(m.kind, m.device_id): i for i, m in reversed(list(enumerate(self._memories)))}
        self._device = np.array([devices[m.kind, m.device_id] for m in self._memories], dtype=np.int64)

    def __getitem__(self, index: int) -> Memory:
        return self._memories[index]

    def __len__(self) -> int:
        return len(self._memories)

    def locate(self, addresses: U64Array, nbytes: U64Array, whose: str) -> npt.NDArray[np.int64]:
        """Index of the region that contains each span; a single index if it is the same for all.

        Raises:
            DescriptorError: a span lies outside, or across two regions; ``whose`` is part of the message.
        """
        one = self._locate_in_one(addresses, nbytes)
        if one is not None:
            return one
        index = np.searchsorted(self._starts, addresses, side="right").astype(np.int64) - 1
        clipped = np.maximum(index, 0)
        if len(self):
            # Compared with the room left in the region, because address + nbytes could wrap around.
            fits = (index >= 0) & (addresses < self._ends[clipped])
            fits &= nbytes <= self._ends[clipped] - np.minimum(addresses, self._ends[clipped])
        else:
            fits = np.zeros(len(addresses), dtype=bool)
        if not fits.all():
            bad = int(np.flatnonzero(~fits)[0])
            raise DescriptorError(
                f"span {bad} ({int(addresses[bad]):#x}+{int(nbytes[bad])}) is outside {whose} registered memory"
            )
        return clipped

    def _locate_in_one(self, addresses: U64Array, nbytes: U64Array) -> npt.NDArray[np.int64] | None:
        """Fast path for the common case that one region contains all spans. None if that is not certain."""
        if len(addresses) == 1:
            first = int(addresses[0])
            end = first + int(nbytes[0])
        elif not len(addresses):
            return None
        else:
            # An upper bound, as if the last span were the longest; Python's integers do not wrap around.
            first, end = int(np.minimum.reduce(addresses)), int(_highest(addresses)) + int(_highest(nbytes))
        index = bisect_right(self._addresses, first) - 1
        return np.array([index]) if index >= 0 and end <= self._memories[index].end else None

    def one_device(self, index: npt.NDArray[np.int64]) -> Memory:
        """First region of the device on which all spans lie. ``index`` is what `locate` returned.

        Raises:
            DescriptorError: they lie on several devices; an engine accepts one kind and device per side and call.
        """
        if len(index) == 1:
            return self._memories[int(self._device[index[0]])]
        devices = self._device[index]
        if (devices != devices[0]).any():
            raise DescriptorError("spans of one side lie on more than one device: submit one transfer for each")
        return self._memories[int(devices[0])]


_highest = np.maximum.reduce
"""Faster than the method ``max``, which calls this from Python."""

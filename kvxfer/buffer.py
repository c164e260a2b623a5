# SPDX-License-Identifier: Apache-2.0
"""Memory that holds a cache: the contract for a device, and host memory as the first of them.

A device answers two questions. Can a transfer engine reach its memory by address? And whether or not it can: how are
chosen bytes gathered into one contiguous piece of host memory, and scattered back?
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final, Protocol, final

import numpy as np
from numpy.lib.stride_tricks import as_strided

from kvxfer.dlpack import ArrayView, allocations, read_array
from kvxfer.errors import DescriptorError, UnsupportedBufferError
from kvxfer.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    U64Array = npt.NDArray[np.uint64]
    IntArray = npt.NDArray[np.intp]
    Bytes = npt.NDArray[np.uint8]

_CHUNK_NBYTES: Final = 1 << 20
"""Gathering without a grid needs a temporary copy; of this size it stays in the cache (4 to 12 GB/s instead of 2 to 4)."""


class Completion(Protocol):
    """A copy that may still be running. Any thread may ask."""

    @property
    def done(self) -> bool:
        """The copy has ended; its bytes are in place unless `wait` raises."""

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until it has ended, at most ``timeout_s``; returns `done`. Raises what made the copy fail."""


class _Finished:
    """The completion of a copy that was carried out at once."""

    done: Final = True

    def wait(self, timeout_s: float | None = None) -> bool:  # noqa: ARG002
        return True


FINISHED: Final[Completion] = _Finished()
"""For devices whose copies end before `DeviceBuffer.pack` returns."""


class DeviceBuffer(ABC):
    """One allocation on one device, holding all or part of a cache.

    An adapter implements two properties and two methods; arguments are checked here, once for all devices. Spans are
    given as byte offsets from the start of the buffer, so a buffer without an address is used like any other.

    Thread: one at a time; which one does not matter.
    """

    @property
    @abstractmethod
    def memory(self) -> Memory | None:
        """The span a transfer engine may register, or None if this device gives no address (XLA)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Size, gaps between strided elements included."""

    @property
    @abstractmethod
    def device(self) -> str:
        """Where it lies, as a person writes it: ``cpu``, ``cuda:0``."""

    @abstractmethod
    def _pack(self, offsets: U64Array, nbytes: U64Array, out: Bytes) -> Completion:
        """Start copying the spans, one after the other, to ``out``. Arguments are checked."""

    @abstractmethod
    def _unpack(self, offsets: U64Array, nbytes: U64Array, source: Bytes) -> Completion:
        """Start the reverse copy. Arguments are checked."""

    @final
    def pack(self, offsets: U64Array, nbytes: U64Array, out: Bytes) -> Completion:
        """Gather spans of this buffer into contiguous host memory.

        Args:
            offsets: where the spans begin, in bytes from the start of the buffer; uint64, in any order.
            nbytes: their lengths, uint64, none 0.
            out: contiguous and writable uint8 of exactly ``nbytes.sum()`` bytes; span i follows span i - 1.

        Returns:
            when it is done; until then neither memory may be written, and the caller keeps ``out`` alive.

        Raises:
            DescriptorError: a span lies outside the buffer, or ``out`` is not as above. Nothing was copied.
        """
        self._check(offsets, nbytes, out)
        if not out.flags.writeable:
            raise DescriptorError("the bytes to pack into are read-only")
        return self._pack(offsets, nbytes, out) if len(offsets) else FINISHED

    @final
    def unpack(self, offsets: U64Array, nbytes: U64Array, source: Bytes) -> Completion:
        """Scatter contiguous host memory to spans of this buffer: the reverse of `pack`, with its arguments.

        The spans must not overlap; of bytes given twice, either may win.

        Raises:
            DescriptorError: as `pack`. Nothing was copied.
        """
        self._check(offsets, nbytes, source)
        return self._unpack(offsets, nbytes, source) if len(offsets) else FINISHED

    def _check(self, offsets: U64Array, nbytes: U64Array, packed: Bytes) -> None:
        for array in (offsets, nbytes):
            if getattr(array, "dtype", None) != np.uint64 or array.ndim != 1:
                raise DescriptorError("offsets and lengths are one-dimensional uint64 arrays")
        if len(offsets) != len(nbytes):
            raise DescriptorError(f"{len(offsets)} offsets and {len(nbytes)} lengths")
        if getattr(packed, "dtype", None) != np.uint8 or packed.ndim != 1:
            raise DescriptorError("packed bytes are a one-dimensional uint8 array")
        if not packed.flags.c_contiguous:
            raise DescriptorError("packed bytes must be contiguous")
        if len(offsets):
            if not nbytes.all():
                raise DescriptorError("a span is empty")
            size = np.uint64(self.nbytes)
            # Compared as room left in the buffer: offset + length could wrap around.
            if (nbytes > size).any() or (offsets > size - nbytes).any():
                raise DescriptorError(f"a span lies outside the buffer of {self.nbytes} bytes")
        # The sum of a hostile list could wrap around 64 bits; as a float it cannot.
        if float(nbytes.sum(dtype=np.float64)) > float(1 << 62) or int(nbytes.sum()) != len(packed):
            raise DescriptorError(f"the spans are not of {len(packed)} bytes together")


class HostBuffer(DeviceBuffer):
    """Host memory of NumPy arrays, or of anything with ``__array_interface__`` or DLPack: PyTorch's CPU tensors too.

    Covers everything from the first to the last byte of its arrays, gaps included, and keeps them alive.

    Args:
        arrays: one array, or several views of one allocation (the layers of a cache).

    Raises:
        UnsupportedBufferError: not writable host memory, or arrays of different allocations.
    """

    def __init__(self, *arrays: Any) -> None:
        views = [array if isinstance(array, ArrayView) else read_array(array) for array in arrays]
        if not views:
            raise UnsupportedBufferError("a buffer needs at least one array")
        if max(allocations(views)) > 0:
            raise UnsupportedBufferError("the arrays are not of one allocation: make one buffer for each")
        self._owners = [view.owner for view in views]
        low = min(view.address for view in views)
        self._memory = Memory(low, max(view.end for view in views) - low)
        self._bytes: Bytes = np.ctypeslib.as_array((ctypes.c_uint8 * self._memory.nbytes).from_address(low))

    @property
    def memory(self) -> Memory:
        """Always registrable."""
        return self._memory

    @property
    def nbytes(self) -> int:
        """Size, gaps between strided elements included."""
        return self._memory.nbytes

    @property
    def device(self) -> str:
        """Always ``cpu``."""
        return "cpu"

    def __repr__(self) -> str:
        return f"HostBuffer({self._memory})"

    def _pack(self, offsets: U64Array, nbytes: U64Array, out: Bytes) -> Completion:
        for length, where, starts in _by_length(offsets, nbytes):
            first = int(where.min())
            steps = where - first
            target = _rows(out, starts, length)
            if target is not None and not (steps % length).any():
                # All spans lie on one grid, as blocks do: NumPy's fastest gather.
                grid = self._bytes[first:][: (self.nbytes - first) // length * length].reshape(-1, length)
                np.take(grid, steps // length, axis=0, out=target, mode="clip")
            else:
                self._gather(where, starts, length, out)
        return FINISHED

    def _gather(self, where: IntArray, starts: IntArray, length: int, out: Bytes) -> None:
        spans, target = _windows(self._bytes, length), _windows(out, length)
        step = max(1, _CHUNK_NBYTES // length)
        for begin in range(0, len(where), step):
            target[starts[begin : begin + step]] = spans[where[begin : begin + step]]

    def _unpack(self, offsets: U64Array, nbytes: U64Array, source: Bytes) -> Completion:
        for length, where, starts in _by_length(offsets, nbytes):
            spans, packed = _windows(self._bytes, length), _windows(source, length)
            rows = _rows(source, starts, length)
            if rows is not None:
                spans[where] = rows
                continue
            step = max(1, _CHUNK_NBYTES // length)
            for begin in range(0, len(where), step):
                spans[where[begin : begin + step]] = packed[starts[begin : begin + step]]
        return FINISHED


def _by_length(offsets: U64Array, nbytes: U64Array) -> Iterator[tuple[int, IntArray, IntArray]]:
    """Spans sorted into groups of one length: (length, offsets in the buffer, offsets in the packed bytes)."""
    where = offsets.astype(np.intp)
    starts = np.cumsum(nbytes, dtype=np.intp) - nbytes.astype(np.intp)
    if (nbytes == nbytes[0]).all():
        yield int(nbytes[0]), where, starts
        return
    order = np.argsort(nbytes, kind="stable")
    cuts = np.flatnonzero(np.diff(nbytes[order])) + 1
    for group in np.split(order, cuts):
        yield int(nbytes[group[0]]), where[group], starts[group]


def _windows(memory: Bytes, length: int) -> Bytes:
    """Row i is ``memory[i : i + length]``: indexing the rows copies whole spans at any offset."""
    return as_strided(memory, (len(memory) - length + 1, length), (1, 1))


def _rows(packed: Bytes, starts: IntArray, length: int) -> Bytes | None:
    """The part of ``packed`` in which spans of one length follow each other, a span per row; None if they do not."""
    begin, count = int(starts[0]), len(starts)
    if int(starts[-1]) != begin + (count - 1) * length:
        return None
    return packed[begin : begin + count * length].reshape(count, length)

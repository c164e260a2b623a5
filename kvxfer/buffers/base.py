# SPDX-License-Identifier: Apache-2.0
"""The contract between kvxfer and the memory of a device that holds a cache, and host memory as its first implementation.

A `DeviceBuffer` says whether a transfer engine reaches its memory by address. Whether or not it does, a buffer gathers chosen
bytes into host memory, in another order and perhaps as another dtype, and scatters them back.
"""

from __future__ import annotations

import ctypes
import logging
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, TypeAlias, final, runtime_checkable

import numpy as np

from kvxfer.buffers import host_cast
from kvxfer.buffers.background import ends_within
from kvxfer.buffers.host_copy import copy_runs
from kvxfer.errors import DescriptorError, UnsupportedBufferError, UnsupportedError
from kvxfer.memory.arrays import ArrayView, read_array, views_of_one
from kvxfer.memory.copies import Copy
from kvxfer.memory.spans import Memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    Bytes: TypeAlias = npt.NDArray[np.uint8]
    BufferCopies: TypeAlias = "Sequence[tuple[DeviceBuffer, Sequence[Copy]]]"
    Start: TypeAlias = Callable[["DeviceBuffer", Sequence[Copy]], "Completion"]

_log = logging.getLogger(__name__)


LONGEST_WAIT_S: Final = 30.0
"""Longest time for which kvxfer waits for copies when it closes or resets an agent."""


@runtime_checkable
class Completion(Protocol):
    """Work of a device that may still be running, such as a copy or a kernel. Any thread may ask.

    A completion that raises has ended, and failed. If neither ``done`` nor, once it is True, ``wait`` blocks, the class sets
    the attribute ``answers_at_once`` to True: kvxfer then asks on the thread that needs the answer. It asks all others on
    another thread, so that one that blocks delays only what waits for it (`kvxfer.buffers.completions`).
    """

    @property
    def done(self) -> bool:
        """Whether the work has ended; its bytes are in place unless `wait` raises."""

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the work has ended, at most ``timeout_s``; return `done`. Raises the error that made it fail."""


class _Finished:
    """Completion of a copy that has ended."""

    answers_at_once: ClassVar[bool] = True
    done: Final = True

    def wait(self, timeout_s: float | None = None) -> bool:  # noqa: ARG002
        return True


FINISHED: Final[Completion] = _Finished()
"""For devices whose copies end before `DeviceBuffer.pack` returns."""


class DeviceBuffer(ABC):
    """One allocation on one device, holding all or part of a cache.

    An adapter implements three properties and two methods, and `can_cast` if it casts; this class checks arguments, once for
    all devices. An adapter may also start the work of several buffers at once (`_pack_all`, `_unpack_all`) and prepare the
    memory in which chunks are staged (`prepare_staging`). Offsets are bytes from the start of the buffer, so a buffer without
    an address is used like any other.

    Thread: any, but one at a time.
    """

    longest_chunk_nbytes: ClassVar[int] = 8 << 20
    """Longest chunk, if the staging arena allows it. Host memory: chunks of this length stay in the processor's caches between
    packing and the wire."""

    @property
    @abstractmethod
    def memory(self) -> Memory | None:
        """The span that a transfer engine may register, or None if this device gives no address (XLA)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Size, gaps between strided elements included."""

    @property
    @abstractmethod
    def device(self) -> str:
        """Name of the device for people: ``cpu``, ``cuda:0``."""

    @classmethod
    def why_unavailable(cls) -> str | None:
        """Reason why no such buffers can be made in this process, with what to do; None if they can."""
        return None

    @classmethod
    def view_of(cls, array: Any) -> ArrayView:  # noqa: ARG003 - for overrides
        """Shape and address of an array from which buffers of this class are made. Raises UnsupportedBufferError."""
        raise UnsupportedBufferError(f"{cls.__name__} reads no arrays: make its buffers and the CacheSpec by hand")

    @abstractmethod
    def _pack(self, copies: Sequence[Copy], out: Bytes) -> Completion:
        """Start copying from this buffer to ``out``. Arguments are checked, and at least one copy is given."""

    @abstractmethod
    def _unpack(self, copies: Sequence[Copy], packed: Bytes) -> Completion:
        """Start copying from ``packed`` to this buffer. Arguments are checked, and at least one copy is given."""

    @classmethod
    def _pack_all(cls, shares: BufferCopies, out: Bytes) -> list[Completion]:
        """Start `_pack` of several buffers of this class together, for devices on which many small starts cost more than one."""
        return _begin_each(shares, lambda buffer, copies: buffer._pack(copies, out))  # noqa: SLF001 - of this class

    @classmethod
    def _unpack_all(cls, shares: BufferCopies, packed: Bytes) -> list[Completion]:
        """Start `_unpack` of several buffers of this class together."""
        return _begin_each(shares, lambda buffer, copies: buffer._unpack(copies, packed))  # noqa: SLF001 - of this class

    def mark(self) -> Completion:
        """Completion of all work that the calling thread has given this device so far. For ``after=`` of `kvxfer.Endpoint`.

        The default is done at once: for devices whose work has ended when a call returns.
        """
        return FINISHED

    @classmethod
    def prepare_staging(cls, memory: Bytes) -> Callable[[], object] | None:  # noqa: ARG003 - for overrides
        """Prepare the host memory in which chunks will lie, for a device that copies faster from and to prepared memory.

        Args:
            memory: stays in place until the returned function was called. Other devices may prepare it too.

        Returns:
            a function that undoes it, or None if there is nothing to undo. Raises nothing: a device that cannot prepare the
            memory logs that, and copies all the same.
        """
        return None

    def can_cast(self, source: str, target: str) -> bool:  # noqa: ARG002 - for overrides
        """Whether `pack` and `unpack` take a `Cast` from one dtype (of `kvxfer.layout.dtypes.DTYPE_NBYTES`) to the other.

        The default is False. An adapter that returns True casts as `Cast` defines, with any factor, in both directions.
        """
        return False

    @final
    def pack(self, copies: Sequence[Copy], out: Bytes) -> Completion:
        """Gather bytes of this buffer into host memory.

        Args:
            copies: source offsets are bytes from the start of this buffer, target offsets bytes from the start of ``out``.
                Bytes between target runs are left as they are. No two copies write the same byte.
            out: one-dimensional uint8, contiguous and writable; it shares no memory with the buffer.

        Returns:
            a completion; until it is done neither memory may be written, and the caller keeps ``out`` alive.

        Raises:
            DescriptorError: a copy is not as documented or leaves the buffer or ``out``, or ``out`` is not as above.
            UnsupportedError: a copy has a cast that this device cannot do. After either, nothing was copied.
        """
        self._check_pack(copies, out)
        return self._pack(copies, out) if len(copies) else FINISHED

    @final
    def unpack(self, copies: Sequence[Copy], packed: Bytes) -> Completion:
        """Scatter bytes of host memory into this buffer.

        Args:
            copies: source offsets are bytes from the start of ``packed``, target offsets bytes from the start of this
                buffer. Bytes between target runs are left as they are. No two copies write the same byte.
            packed: one-dimensional uint8, contiguous, only read; it shares no memory with the buffer.

        Returns:
            a completion; until it is done neither memory may be written, and the caller keeps ``packed`` alive.

        Raises:
            DescriptorError: a copy is not as documented or leaves ``packed`` or the buffer, or ``packed`` is not as above.
            UnsupportedError: a copy has a cast that this device cannot do. After either, nothing was copied.
        """
        self._check_unpack(copies, packed)
        return self._unpack(copies, packed) if len(copies) else FINISHED

    def _check_pack(self, copies: Sequence[Copy], out: Bytes) -> None:
        self._check_host(out)
        if not out.flags.writeable:
            raise DescriptorError("the bytes to pack into are read-only")
        self._check(copies, self.nbytes, len(out))

    def _check_unpack(self, copies: Sequence[Copy], packed: Bytes) -> None:
        self._check_host(packed)
        self._check(copies, len(packed), self.nbytes)

    @staticmethod
    def _check_host(memory: Bytes) -> None:
        if not isinstance(memory, np.ndarray) or memory.dtype != np.uint8 or memory.ndim != 1:
            raise DescriptorError("packed bytes are a one-dimensional uint8 array")
        if not memory.flags.c_contiguous:
            raise DescriptorError("packed bytes must be contiguous")

    def _check(self, copies: Sequence[Copy], source_nbytes: int, target_nbytes: int) -> None:
        if not isinstance(copies, (list, tuple)):
            raise DescriptorError(f"copies are a list or a tuple, not a {type(copies).__name__}")
        for copy in copies:
            if not isinstance(copy, Copy):
                raise DescriptorError(f"{type(copy).__name__} is no Copy")
            copy.check(source_nbytes, target_nbytes)
            cast = copy.cast
            if cast is not None and not self.can_cast(cast.source, cast.target):
                raise UnsupportedError(self._why_no_cast(cast.source, cast.target))

    def _why_no_cast(self, source: str, target: str) -> str:
        """Message for the error; a device whose casts need a package names it."""
        return f"{self.device} cannot cast {source} to {target}"


def pack_all(shares: BufferCopies, out: Bytes) -> list[Completion]:
    """Pack several buffers into the same memory; buffers of one class start together.

    Raises:
        KvxferError: as `DeviceBuffer.pack`, or an error of a device. Copies that had started have ended.
    """
    for buffer, copies in shares:
        buffer._check_pack(copies, out)  # noqa: SLF001 - this module
    return _begin_all(shares, lambda kind, mine: kind._pack_all(mine, out))  # noqa: SLF001 - this module


def unpack_all(shares: BufferCopies, packed: Bytes) -> list[Completion]:
    """Unpack the same memory into several buffers; buffers of one class start together. Raises as `pack_all`."""
    for buffer, copies in shares:
        buffer._check_unpack(copies, packed)  # noqa: SLF001 - this module
    return _begin_all(shares, lambda kind, mine: kind._unpack_all(mine, packed))  # noqa: SLF001 - this module


def _begin_all(
    shares: BufferCopies, begin: Callable[[type[DeviceBuffer], BufferCopies], list[Completion]]
) -> list[Completion]:
    kinds: dict[type[DeviceBuffer], list[tuple[DeviceBuffer, Sequence[Copy]]]] = {}
    for share in shares:
        if len(share[1]):
            kinds.setdefault(type(share[0]), []).append(share)
    begun: list[Completion] = []
    try:
        for kind, mine in kinds.items():
            begun += begin(kind, mine)
    except BaseException:
        wait_for_end(begun)
        raise
    return begun


def _begin_each(shares: BufferCopies, start: Start) -> list[Completion]:
    begun: list[Completion] = []
    try:
        for buffer, copies in shares:
            begun.append(start(buffer, copies))
    except BaseException:
        wait_for_end(begun)
        raise
    return begun


def wait_for_end(copies: Sequence[Completion], timeout_s: float = LONGEST_WAIT_S) -> bool:
    """Wait until copies have succeeded or failed, so that their devices no longer touch their memory.

    Returns:
        False if a copy has not ended after ``timeout_s``, which is logged: its device may still touch the memory.
    """
    deadline = time.monotonic() + timeout_s
    late = [copy for copy in copies if copy is not FINISHED and not _ends_by(copy, deadline)]
    if late:
        _log.error(
            "%d copies of a device have not ended after %g s: it may still write to their memory", len(late), timeout_s
        )
    return not late


def _ends_by(copy: Completion, deadline: float) -> bool:
    left_s, ended = max(0.0, deadline - time.monotonic()), False

    def wait() -> None:
        nonlocal ended
        try:
            ended = bool(copy.wait(left_s))
        except BaseException:  # noqa: BLE001 - an error of a vendor, of any type: the copy has ended
            ended = True

    if getattr(type(copy), "answers_at_once", False):
        wait()
    else:
        ends_within(wait, left_s)
    return ended


class HostBuffer(DeviceBuffer):
    """Host memory of NumPy arrays, or of anything with ``__array_interface__`` or DLPack: PyTorch's CPU tensors too.

    Covers all bytes from the first to the last of its arrays, gaps included, and keeps the arrays alive.

    Args:
        arrays: one array, or several views of one allocation (the layers of a cache).

    Raises:
        UnsupportedBufferError: not writable host memory, or arrays of different allocations.
    """

    def __init__(self, *arrays: Any) -> None:
        views = views_of_one(arrays, self.view_of)
        self._owners = [view.owner for view in views]
        low = min(view.address for view in views)
        self._memory = Memory(low, max(view.end for view in views) - low)
        self._bytes: Bytes = np.ctypeslib.as_array((ctypes.c_uint8 * self._memory.nbytes).from_address(low))

    @classmethod
    def view_of(cls, array: Any) -> ArrayView:
        """Read an array as `kvxfer.memory.arrays.read_array` does."""
        return read_array(array)

    @property
    def memory(self) -> Memory:
        """The span; always registrable."""
        return self._memory

    @property
    def nbytes(self) -> int:
        """Size, gaps between strided elements included."""
        return self._memory.nbytes

    @property
    def device(self) -> str:
        """``cpu``."""
        return "cpu"

    def __repr__(self) -> str:
        return f"HostBuffer({self._memory})"

    def can_cast(self, source: str, target: str) -> bool:
        """Whether both are castable (`kvxfer.layout.dtypes`). bfloat16 and float8 need ``kvxfer[dtypes]``."""
        return host_cast.can_cast(source, target)

    def _why_no_cast(self, source: str, target: str) -> str:
        return host_cast.why_not(source, target) or super()._why_no_cast(source, target)

    def _pack(self, copies: Sequence[Copy], out: Bytes) -> Completion:
        copy_runs(copies, self._bytes, out)
        return FINISHED

    def _unpack(self, copies: Sequence[Copy], packed: Bytes) -> Completion:
        copy_runs(copies, packed, self._bytes)
        return FINISHED

# SPDX-License-Identifier: Apache-2.0
"""Memory that holds a cache: the contract for a device, and host memory as the first of them.

A device answers two questions. Can a transfer engine reach its memory by address? And whether or not it can: how are
chosen bytes gathered into host memory, in another order and perhaps as another dtype, and scattered back?
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
    Shares: TypeAlias = "Sequence[tuple[DeviceBuffer, Sequence[Copy]]]"
    Start: TypeAlias = Callable[["DeviceBuffer", Sequence[Copy]], "Completion"]

_log = logging.getLogger(__name__)


LET_END_S: Final = 30.0
"""Longest time for which kvxfer waits for copies that it cannot go on without, when it closes or begins anew."""


@runtime_checkable
class Completion(Protocol):
    """Something that a device may still be doing, such as a copy or a kernel. Any thread may ask.

    One that raises has ended, and failed. A class whose ``done``, and whose ``wait`` after that, return at once sets the class
    attribute ``answers_at_once`` to True: kvxfer then asks it on the thread that wants to know. Others are asked on another
    thread, so that one that blocks harms what waits for it and nothing else (`kvxfer.buffers.completions`).
    """

    @property
    def done(self) -> bool:
        """It has ended; its bytes are in place unless `wait` raises."""

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until it has ended, at most ``timeout_s``; returns `done`. Raises what made it fail."""


class _Finished:
    """The completion of a copy that was carried out at once."""

    answers_at_once: ClassVar[bool] = True
    done: Final = True

    def wait(self, timeout_s: float | None = None) -> bool:  # noqa: ARG002
        return True


FINISHED: Final[Completion] = _Finished()
"""For devices whose copies end before `DeviceBuffer.pack` returns."""


class DeviceBuffer(ABC):
    """One allocation on one device, holding all or part of a cache.

    An adapter implements three properties and two methods, and `can_cast` if it casts; arguments are checked here, once for
    all devices. It may also do the work of several buffers at once (`_pack_all`, `_unpack_all`) and prepare the memory that
    chunks are staged in (`prepare_staging`). Places are given as byte offsets from the start of the buffer, so a buffer without an address is used like
    any other.

    Thread: one at a time; which one does not matter.
    """

    longest_chunk_nbytes: ClassVar[int] = 8 << 20
    """Chunks are as long as the staging arena allows and no longer than this. Host memory: so long they stay in the processor's
    caches between packing and the wire."""

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

    @classmethod
    def why_unavailable(cls) -> str | None:
        """None if such buffers can be made in this process, else the reason in one sentence, with what to do."""
        return None

    @classmethod
    def view_of(cls, array: Any) -> ArrayView:  # noqa: ARG003 - for those who override it
        """Shape and place of an array that buffers of this class are made of. Raises UnsupportedBufferError."""
        raise UnsupportedBufferError(f"{cls.__name__} reads no arrays: make its buffers and the CacheSpec by hand")

    @abstractmethod
    def _pack(self, copies: Sequence[Copy], out: Bytes) -> Completion:
        """Start copying from this buffer to ``out``. Arguments are checked, and at least one copy is given."""

    @abstractmethod
    def _unpack(self, copies: Sequence[Copy], packed: Bytes) -> Completion:
        """Start copying from ``packed`` to this buffer. Arguments are checked, and at least one copy is given."""

    @classmethod
    def _pack_all(cls, shares: Shares, out: Bytes) -> list[Completion]:
        """`_pack` for several buffers of this class: for devices on which many small beginnings cost more than one."""
        return _begin_each(shares, lambda buffer, copies: buffer._pack(copies, out))  # noqa: SLF001 - of this class

    @classmethod
    def _unpack_all(cls, shares: Shares, packed: Bytes) -> list[Completion]:
        """`_unpack` for several buffers of this class."""
        return _begin_each(shares, lambda buffer, copies: buffer._unpack(copies, packed))  # noqa: SLF001 - of this class

    def mark(self) -> Completion:
        """When all that the calling thread has asked this device to do by now has ended. For ``after=`` of `kvxfer.Endpoint`.

        Done at once, unless an adapter says otherwise: for devices whose work has ended when a call returns.
        """
        return FINISHED

    @classmethod
    def prepare_staging(cls, memory: Bytes) -> Callable[[], object] | None:  # noqa: ARG003 - for those who override it
        """Host memory in which chunks will lie, for a device that reads and writes faster what it was told of.

        Args:
            memory: stays where it is until what this returns was called. Other devices may be told of it too.

        Returns:
            how to take it back, or None if there is nothing to take back. Raises nothing: a device that cannot prepare it
            says so in the log, and copies all the same.
        """
        return None

    def can_cast(self, source: str, target: str) -> bool:  # noqa: ARG002 - for those who override it
        """Whether `pack` and `unpack` take a `Cast` from one dtype (of `kvxfer.layout.dtypes.DTYPE_NBYTES`) to the other.

        False unless an adapter says otherwise. It then casts as `Cast` defines, with any factor, in both directions.
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
            when it is done; until then neither memory may be written, and the caller keeps ``out`` alive.

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
            when it is done; until then neither memory may be written, and the caller keeps ``packed`` alive.

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
        """For the error: a device whose casts have to be installed says how."""
        return f"{self.device} cannot cast {source} to {target}"


def pack_all(shares: Shares, out: Bytes) -> list[Completion]:
    """`DeviceBuffer.pack` of several buffers into the same memory; those of one class begin together.

    Raises:
        KvxferError: as of `DeviceBuffer.pack`, or what a device raised. What had begun has ended.
    """
    for buffer, copies in shares:
        buffer._check_pack(copies, out)  # noqa: SLF001 - this module
    return _begin_all(shares, lambda kind, mine: kind._pack_all(mine, out))  # noqa: SLF001 - this module


def unpack_all(shares: Shares, packed: Bytes) -> list[Completion]:
    """`DeviceBuffer.unpack` of several buffers from the same memory; those of one class begin together. Raises as `pack_all`."""
    for buffer, copies in shares:
        buffer._check_unpack(copies, packed)  # noqa: SLF001 - this module
    return _begin_all(shares, lambda kind, mine: kind._unpack_all(mine, packed))  # noqa: SLF001 - this module


def _begin_all(shares: Shares, begin: Callable[[type[DeviceBuffer], Shares], list[Completion]]) -> list[Completion]:
    kinds: dict[type[DeviceBuffer], list[tuple[DeviceBuffer, Sequence[Copy]]]] = {}
    for share in shares:
        if len(share[1]):
            kinds.setdefault(type(share[0]), []).append(share)
    begun: list[Completion] = []
    try:
        for kind, mine in kinds.items():
            begun += begin(kind, mine)
    except BaseException:
        let_end(begun)
        raise
    return begun


def _begin_each(shares: Shares, start: Start) -> list[Completion]:
    begun: list[Completion] = []
    try:
        for buffer, copies in shares:
            begun.append(start(buffer, copies))
    except BaseException:
        let_end(begun)
        raise
    return begun


def let_end(copies: Sequence[Completion], timeout_s: float = LET_END_S) -> bool:
    """Wait until copies have ended, well or not, so that nothing touches their memory any more.

    Returns:
        False if one has not ended after ``timeout_s``, which is logged: its device may still touch that memory.
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
        except BaseException:  # noqa: BLE001 - a vendor's, of any kind: it has ended
            ended = True

    if getattr(type(copy), "answers_at_once", False):
        wait()
    else:
        ends_within(wait, left_s)
    return ended


class HostBuffer(DeviceBuffer):
    """Host memory of NumPy arrays, or of anything with ``__array_interface__`` or DLPack: PyTorch's CPU tensors too.

    Covers everything from the first to the last byte of its arrays, gaps included, and keeps them alive.

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
        """See `kvxfer.memory.arrays.read_array`."""
        return read_array(array)

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

    def can_cast(self, source: str, target: str) -> bool:
        """Between bfloat16, float16, float32 and float8_e4m3fn. All but float16 and float32 need ``kvxfer[dtypes]``."""
        return host_cast.can_cast(source, target)

    def _why_no_cast(self, source: str, target: str) -> str:
        return host_cast.why_not(source, target) or super()._why_no_cast(source, target)

    def _pack(self, copies: Sequence[Copy], out: Bytes) -> Completion:
        copy_runs(copies, self._bytes, out)
        return FINISHED

    def _unpack(self, copies: Sequence[Copy], packed: Bytes) -> Completion:
        copy_runs(copies, packed, self._bytes)
        return FINISHED

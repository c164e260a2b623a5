# SPDX-License-Identifier: Apache-2.0
"""Buffers that are wrong on purpose, each in one way. `test_suite_catches.py` runs the suite on them and expects it to fail.

White-box: what is wrong is often what the base class keeps for itself.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np

from kvxfer.buffers.base import FINISHED, HostBuffer
from kvxfer.memory.copies import StridedLoop
from kvxfer.memory.spans import Memory
from kvxfer.testing import BufferSuite, MadeBuffer


def target_ends(copy):
    """Offsets of the last byte of each run at the target."""
    ends = np.add.outer(copy.target, copy.target_blocks)
    for loop in copy.loops:
        ends = np.add.outer(ends, np.arange(loop.count) * loop.target_stride)
    return ends.reshape(-1) + copy.target_nbytes - 1


class SortsTheBlocks(HostBuffer):
    """Sorts the blocks of the source, but not those of the target."""

    def _pack(self, copies, out):
        return super()._pack([replace(copy, source_blocks=np.sort(copy.source_blocks)) for copy in copies], out)


class LosesTheLastByte(HostBuffer):
    def _unpack(self, copies, packed):
        ends = np.concatenate([target_ends(copy) for copy in copies])
        kept = self._bytes[ends].copy()
        super()._unpack(copies, packed)
        self._bytes[ends] = kept
        return FINISHED


class FillsTheGaps(HostBuffer):
    """Fills the gaps between the runs that it unpacks, where a byte has a certain value."""

    def _unpack(self, copies, packed):
        for copy in copies:
            low, high = copy.target_bounds()
            rest = self._bytes[low:high]
            rest[rest == 0x55] = 0x54
        return super()._unpack(copies, packed)


class FillsTheGapsOfItsOutput(HostBuffer):
    def _pack(self, copies, out):
        for copy in copies:
            low, high = copy.target_bounds()
            out[low:high] = 0
            super()._pack([copy], out)
        return FINISHED


class PacksBeyondItsOutput(HostBuffer):
    def _pack(self, copies, out):
        super()._pack(copies, out)
        base = out
        while base.base is not None:
            base = base.base
        base[-1] ^= 0xFF
        return FINISHED


class MixesUpStrides(HostBuffer):
    """Swaps the strides of two loops of equal length, such as heads and tokens: within bounds, in the wrong order."""

    def _pack(self, copies, out):
        return super()._pack([self.mixed(copy) for copy in copies], out)

    @staticmethod
    def mixed(copy):
        if len(copy.loops) != 2:
            return copy
        outer, inner = copy.loops
        count = min(outer.count, inner.count)
        loops = (
            StridedLoop(count, outer.source_stride, inner.target_stride),
            StridedLoop(count, inner.source_stride, outer.target_stride),
        )
        return replace(copy, loops=loops)


class RunsForwardsOnly(HostBuffer):
    def _pack(self, copies, out):
        ahead = [
            replace(
                copy,
                source=copy.source - sum((x.count - 1) * max(0, -x.source_stride) for x in copy.loops),
                target=copy.target - sum((x.count - 1) * max(0, -x.target_stride) for x in copy.loops),
                loops=tuple(StridedLoop(x.count, abs(x.source_stride), abs(x.target_stride)) for x in copy.loops),
            )
            for copy in copies
        ]
        return super()._pack(ahead, out)


class KnowsOneBaseOnly(HostBuffer):
    def _unpack(self, copies, packed):
        return super()._unpack(
            [replace(copy, source=copy.source[:1], target=copy.target[:1]) for copy in copies], packed
        )


class IgnoresTheFactor(HostBuffer):
    def _pack(self, copies, out):
        return super()._pack(
            [copy if copy.cast is None else replace(copy, cast=replace(copy.cast, factor=1.0)) for copy in copies], out
        )


class RoundsTowardsZero(HostBuffer):
    """Rounds towards zero when it packs to bfloat16."""

    def _pack(self, copies, out):
        super()._pack(copies, out)
        for copy in copies:
            if copy.cast is not None and (copy.cast.source, copy.cast.target) == ("float32", "bfloat16"):
                (at, high), (to, end) = copy.source_bounds(), copy.target_bounds()
                if 2 * (end - to) == high - at:  # without gaps
                    out[to:end].reshape(-1, 2)[...] = self._bytes[at:high].reshape(-1, 4)[:, 2:]
        return FINISHED


class SaturatesNothing(HostBuffer):
    """Converts values that are too large for float8 to NaN."""

    def _unpack(self, copies, packed):
        super()._unpack(copies, packed)
        for copy in copies:
            if copy.cast is not None and copy.cast.target == "float8_e4m3fn":
                low, high = copy.target_bounds()
                written = self._bytes[low:high]
                written[written & 0x7F == 0x7E] |= 1
        return FINISHED


class SpoilsItsSource(HostBuffer):
    def _unpack(self, copies, packed):
        super()._unpack(copies, packed)
        if packed.flags.writeable:
            packed[0] ^= 1
        return FINISHED


class IsACopy(HostBuffer):
    """Packs the content that its array had when the buffer was made."""

    def __init__(self, *arrays):
        super().__init__(*(array.copy() for array in arrays))


class MovesAround(HostBuffer):
    @property
    def memory(self):
        span = super().memory
        self.moved = getattr(self, "moved", 0) + 1
        return Memory(span.address + self.moved, span.nbytes)


class TellsAnotherAddress(HostBuffer):
    @property
    def memory(self):
        self.__dict__.setdefault("elsewhere", np.zeros(self.nbytes, np.uint8))
        return Memory(int(self.elsewhere.ctypes.data), self.nbytes)


class ForgetsItsOwner(HostBuffer):
    def __init__(self, *arrays):
        super().__init__(*arrays)
        self._owners = []


class _Later:
    def __init__(self, copy, *, honest):
        self.honest = honest
        self.thread = threading.Thread(target=lambda: (time.sleep(0.05), copy()), daemon=True)
        self.thread.start()

    @property
    def done(self):
        return not self.honest or not self.thread.is_alive()

    def wait(self, timeout_s=None):
        if self.honest:
            self.thread.join(timeout_s)
        return self.done


class IsDoneTooEarly(HostBuffer):
    def _pack(self, copies, out):
        return _Later(lambda: HostBuffer._pack(self, copies, out), honest=False)


class ChecksNothing(HostBuffer):
    """Leaves out runs that lie outside, without an error."""

    def pack(self, copies, out):
        for copy in copies:
            (at, high), (to, _) = copy.source_bounds(), copy.target_bounds()
            part = self._bytes[max(0, at) : high]
            room = out[max(0, to) :]
            nbytes = min(len(part), len(room))
            room[:nbytes] = part[:nbytes]
        return FINISHED


class NotBrokenOnlySlow(HostBuffer):
    """Not broken: copies may end later, and this buffer passes."""

    def _pack(self, copies, out):
        return _Later(lambda: HostBuffer._pack(self, copies, out), honest=True)


class NotBrokenButCastsNothing(HostBuffer):
    """Not broken: the suite skips undeclared casts, and checks that they are refused."""

    def can_cast(self, source, target):
        return False


def _suite(kind: type) -> type[BufferSuite]:
    def make(nbytes: int) -> MadeBuffer:
        array = np.zeros(nbytes, np.uint8)

        def write(data: bytes) -> None:
            array[:] = np.frombuffer(data, np.uint8)

        return MadeBuffer(kind(array), array.tobytes, write)

    return type(f"Test{kind.__name__}", (BufferSuite,), {"make_buffer": staticmethod(make), "__module__": __name__})


for _kind in list(globals().values()):
    if isinstance(_kind, type) and issubclass(_kind, HostBuffer) and _kind is not HostBuffer:
        globals()[f"Test{_kind.__name__}"] = _suite(_kind)

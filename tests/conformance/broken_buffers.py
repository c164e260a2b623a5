# SPDX-License-Identifier: Apache-2.0
"""Buffers that are wrong on purpose, each in one way. `test_suite_catches.py` runs the suite on them and wants it to fail."""

from __future__ import annotations

import threading
import time

import numpy as np

from kvxfer.buffer import FINISHED, HostBuffer
from kvxfer.memory import Memory
from kvxfer.testing import BufferSuite, MadeBuffer


class SortsTheSpans(HostBuffer):
    def _pack(self, offsets, nbytes, out):
        order = np.argsort(offsets)
        return super()._pack(offsets[order], nbytes[order], out)


class LosesTheLastByte(HostBuffer):
    def _unpack(self, offsets, nbytes, source):
        ends = offsets + nbytes - np.uint64(1)
        kept = self._bytes[ends.astype(np.intp)].copy()
        super()._unpack(offsets, nbytes, source)
        self._bytes[ends.astype(np.intp)] = kept
        return FINISHED


class FillsTheGaps(HostBuffer):
    def _unpack(self, offsets, nbytes, source):
        low, high = int(offsets.min()), int((offsets + nbytes).max())
        rest = self._bytes[low:high]
        rest[rest == 0x55] = 0x54
        return super()._unpack(offsets, nbytes, source)


class PacksBeyondItsOutput(HostBuffer):
    def _pack(self, offsets, nbytes, out):
        super()._pack(offsets, nbytes, out)
        base = out
        while base.base is not None:
            base = base.base
        base[-1] ^= 0xFF
        return FINISHED


class SpoilsItsSource(HostBuffer):
    def _unpack(self, offsets, nbytes, source):
        super()._unpack(offsets, nbytes, source)
        if source.flags.writeable:
            source[0] ^= 1
        return FINISHED


class IsACopy(HostBuffer):
    """Of what its array held when it was made."""

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
    def _pack(self, offsets, nbytes, out):
        return _Later(lambda: HostBuffer._pack(self, offsets, nbytes, out), honest=False)


class ChecksNothing(HostBuffer):
    def pack(self, offsets, nbytes, out):
        ends = offsets.astype(np.int64) + nbytes.astype(np.int64)
        spans = [self._bytes[a:b] for a, b in zip(offsets.astype(np.int64), ends, strict=False)]
        packed = np.concatenate(spans)
        out[: len(packed)] = packed[: len(out)]
        return FINISHED


class NotBrokenOnlySlow(HostBuffer):
    """The suite has to take copies that end later: this one passes."""

    def _pack(self, offsets, nbytes, out):
        return _Later(lambda: HostBuffer._pack(self, offsets, nbytes, out), honest=True)


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

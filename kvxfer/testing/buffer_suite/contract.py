# SPDX-License-Identifier: Apache-2.0
"""The contract: the properties of a buffer, the end of its copies, and the calls that it refuses."""

from __future__ import annotations

import ctypes
import gc
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

import numpy as np
import pytest

from kvxfer.agents.capabilities import Op
from kvxfer.agents.flights import FlightState
from kvxfer.agents.inproc import InprocAgent
from kvxfer.buffers.base import DeviceBuffer
from kvxfer.errors import DescriptorError
from kvxfer.memory.copies import Cast, Copy, StridedLoop
from kvxfer.memory.spans import Memory, MemoryKind
from kvxfer.testing.actor import Actor
from kvxfer.testing.buffer_suite.fixtures import (
    PATIENCE_S,
    BufferTests,
    copies_of,
    finish,
    i64,
    one_copy,
    packed,
    unpack,
)
from kvxfer.testing.conformance import KIB, MIB, unique_name
from kvxfer.testing.oracle import noise, same_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

_FAR = 1 << 62
_HUGE = 1 << 200


def _copy(**changes: Any) -> Copy:
    """A correct copy with these changes."""
    right = Copy(i64([0]), i64([0]), i64([0, 100]), i64([100, 0]), (StridedLoop(3, 20, 24),), 16)
    return replace(right, **changes)


OUTSIDE: dict[str, Callable[[], Copy]] = {
    "source-ends-behind": lambda: one_copy(KIB - 7, 0, 8),
    "target-ends-behind": lambda: one_copy(0, KIB - 7, 8),
    "longer-than-all": lambda: one_copy(0, 0, KIB + 1),
    "source-before": lambda: one_copy(-1, 0, 8),
    "target-before": lambda: one_copy(0, -1, 8),
    "one-block-behind": lambda: _copy(source_blocks=i64([0, KIB])),
    "one-block-before": lambda: _copy(target_blocks=i64([0, -1])),
    "one-base-behind": lambda: _copy(source=i64([0, KIB]), target=i64([0, 200])),
    "loop-behind": lambda: _copy(loops=(StridedLoop(60, 20, 1),)),
    "loop-before": lambda: _copy(loops=(StridedLoop(3, 20, -24),)),
    "far": lambda: one_copy(_FAR, 0, 8),
    "sum-wraps-to-0": lambda: _copy(source=i64([_FAR]), source_blocks=i64([_FAR, _FAR])),
    "sum-wraps-below-0": lambda: _copy(target=i64([-_FAR]), target_blocks=i64([-_FAR, -_FAR])),
    "loop-wraps-to-0": lambda: _copy(loops=(StridedLoop((1 << 32) + 1, 1 << 32, 24),)),
    "two-loops-wrap-to-0": lambda: _copy(loops=(StridedLoop(3, _FAR, 48), StridedLoop(3, _FAR, 24))),
    "long-run": lambda: _copy(nbytes=_FAR),
    "endless": lambda: _copy(loops=(StridedLoop(_FAR, 0, 0),)),
}

WRONG: dict[str, Callable[[], Any]] = {
    "empty-run": lambda: _copy(nbytes=0),
    "negative-run": lambda: _copy(nbytes=-8),
    "huge-run": lambda: _copy(nbytes=_HUGE),
    "float-run": lambda: _copy(nbytes=16.0),
    "numpy-run": lambda: _copy(nbytes=np.int64(16)),
    "no-steps": lambda: _copy(loops=(StridedLoop(0, 20, 24),)),
    "negative-steps": lambda: _copy(loops=(StridedLoop(-3, 20, 24),)),
    "huge-steps": lambda: _copy(loops=(StridedLoop(_HUGE, 20, 24),)),
    "huge-stride": lambda: _copy(loops=(StridedLoop(2, -_HUGE, 24),)),
    "numpy-stride": lambda: _copy(loops=(StridedLoop(3, np.int64(20), 24),)),
    "tuple-for-loop": lambda: _copy(loops=((3, 20, 24),)),
    "list-of-loops": lambda: _copy(loops=[StridedLoop(3, 20, 24)]),
    "many-loops": lambda: _copy(loops=(StridedLoop(1, 20, 24),) * 65),
    "overlapping": lambda: _copy(loops=(StridedLoop(3, 20, 0),), target_blocks=i64([0, 0])),
    "no-bases": lambda: _copy(source=i64([]), target=i64([])),
    "no-blocks": lambda: _copy(source_blocks=i64([]), target_blocks=i64([])),
    "more-bases": lambda: _copy(source=i64([0, 0])),
    "more-blocks": lambda: _copy(target_blocks=i64([0, 100, 200])),
    "list": lambda: _copy(source=[0]),
    "int32": lambda: _copy(source_blocks=np.array([0, 100], np.int32)),
    "uint64": lambda: _copy(target_blocks=np.array([100, 0], np.uint64)),
    "big-endian": lambda: _copy(target_blocks=np.array([100, 0], ">i8")),
    "2-d": lambda: _copy(source_blocks=i64([0, 100]).reshape(2, 1)),
    "strided": lambda: _copy(source_blocks=i64([0, 0, 100, 0])[::2]),
    "unknown-dtype": lambda: _copy(cast=Cast("float31", "float32")),
    "half-an-element": lambda: _copy(cast=Cast("float32", "float16"), nbytes=14),
    "factor-0": lambda: _copy(cast=Cast("float32", "float16", 0.0)),
    "factor-nan": lambda: _copy(cast=Cast("float32", "float16", float("nan"))),
    "factor-huge": lambda: _copy(cast=Cast("float32", "float16", 1e300)),
    "tuple-for-cast": lambda: _copy(cast=("float32", "float16", 1.0)),
    "no-copy": lambda: (0, 0, 16),
    "none": lambda: None,
}


class BufferContractTests(BufferTests):
    """Properties that do not depend on the shape of a copy."""

    @final
    def test_describes_itself(self) -> None:
        """A buffer has a size and a device; its span, if it has one, covers all of it and never moves."""
        made = self._made(64 * KIB)
        buffer = made.buffer
        assert isinstance(buffer, DeviceBuffer)
        assert buffer.nbytes == 64 * KIB
        assert buffer.device
        span = buffer.memory
        if span is not None:
            assert isinstance(span, Memory)
            assert span.nbytes == buffer.nbytes
        unpack(buffer, [one_copy(0, 0, 100)], noise(100, 5))
        packed(buffer, [one_copy(0, 0, 100)], bytes(100))
        made.write(noise(64 * KIB, 6))
        assert buffer.memory == span

    @final
    def test_base_class_is_in_charge(self) -> None:
        """The checks of the base class are not overridden."""
        kind = type(self._made(KIB).buffer)
        for name in ("pack", "unpack"):
            assert getattr(kind, name) is getattr(DeviceBuffer, name), f"{kind.__name__} overrides {name}"

    @final
    def test_span_is_the_content(self) -> None:
        """Memory at the address that a transfer engine registers is the content of the buffer, both ways."""
        made = self._made(64 * KIB)
        span = _dram(made.buffer)
        same_bytes(ctypes.string_at(span.address, span.nbytes), made.read())
        data = noise(span.nbytes, 9)
        ctypes.memmove(span.address, data, len(data))
        same_bytes(made.read(), data)
        same_bytes(packed(made.buffer, [one_copy(0, 0, span.nbytes)], bytes(span.nbytes)), data)

    @final
    def test_moves_with_an_agent(self) -> None:
        """A buffer with an address in host memory is read and written by an agent like any other memory."""
        made, other = self._made(64 * KIB), self._made(64 * KIB, seed=1)
        ours, theirs = Actor(InprocAgent, unique_name("ours")), Actor(InprocAgent, unique_name("theirs"))
        try:
            near, far = _dram(made.buffer), _dram(other.buffer)
            ours.register(near)
            theirs.register(far)
            name = ours.connect(theirs.describe())
            expected = bytearray(made.read())
            expected[100:5100] = other.read()[7000:12000]
            flight = ours.start(Op.READ, name, [(near.address + 100, far.address + 7000, 5000)], PATIENCE_S)
            assert ours.log.wait(flight, timeout_s=PATIENCE_S).state is FlightState.DONE
            same_bytes(made.read(), expected)
        finally:
            ours.close()
            theirs.close()

    @final
    def test_no_copies(self) -> None:
        """An empty list of copies is allowed, done at once, and changes nothing."""
        made = self._made(KIB)
        before = made.read()
        same_bytes(packed(made.buffer, [], b""), b"")
        same_bytes(packed(made.buffer, [], b"left as it is"), b"left as it is")
        unpack(made.buffer, [], b"")
        assert made.buffer.unpack((), np.zeros(8, np.uint8)).done is True
        same_bytes(made.read(), before)

    @final
    def test_completion(self) -> None:
        """A finished copy says so, to any thread and repeatedly."""
        made = self._made(MIB)
        out = np.zeros(MIB, np.uint8)
        copy = made.buffer.pack([one_copy(0, 0, MIB)], out)
        assert copy.wait(PATIENCE_S) is True
        assert copy.done is True
        assert copy.wait() is True
        assert copy.wait(0.0) is True
        answers: list[bool] = []
        thread = threading.Thread(target=lambda: answers.extend([copy.done, copy.wait(0.0)]))
        thread.start()
        thread.join()
        assert answers == [True, True]

    @final
    def test_read_only_source(self) -> None:
        """Unpacking takes bytes that cannot be written."""
        made = self._made(KIB)
        source = np.frombuffer(noise(200, 3), np.uint8)
        assert not source.flags.writeable
        finish(made.buffer.unpack([one_copy(0, 17, 100)], source))
        same_bytes(made.read()[17:117], source[:100].tobytes())
        finish(made.buffer.unpack(copies_of([(0, 400, 30), (50, 300, 30), (90, 700, 30)]), source))
        same_bytes(made.read()[300:330], source[50:80].tobytes())

    @final
    @pytest.mark.parametrize("direction", ["pack", "unpack"])
    @pytest.mark.parametrize("case", OUTSIDE)
    def test_copies_outside(self, direction: str, case: str) -> None:
        """Copies that leave the buffer or the host memory are refused with DescriptorError, however their sums wrap."""
        self._refused(direction, OUTSIDE[case]())

    @final
    @pytest.mark.parametrize("direction", ["pack", "unpack"])
    @pytest.mark.parametrize("case", WRONG)
    def test_wrong_copies(self, direction: str, case: str) -> None:
        """Copies of which a field is not as documented are refused with DescriptorError; nothing is copied."""
        self._refused(direction, WRONG[case]())

    @final
    @pytest.mark.parametrize("direction", ["pack", "unpack"])
    @pytest.mark.parametrize(
        "memory",
        [
            np.zeros(128, np.int8),
            np.zeros(16, np.uint64),
            np.zeros((16, 8), np.uint8),
            np.zeros(256, np.uint8)[::2],
            np.zeros(256, np.uint8)[::-1],
            bytearray(128),
            None,
        ],
        ids=["int8", "words", "rows", "strided", "backwards", "bytearray", "none"],
    )
    def test_wrong_memory(self, direction: str, memory: Any) -> None:
        """Host memory of another type or shape than documented is refused with DescriptorError; nothing is copied."""
        made = self._made(KIB)
        before = made.read()
        with pytest.raises(DescriptorError):
            getattr(made.buffer, direction)([one_copy(0, 0, 8)], memory)
        assert memory is None or not any(bytes(memory))
        same_bytes(made.read(), before)

    @final
    def test_pack_into_read_only(self) -> None:
        """Packing into bytes that cannot be written is refused with DescriptorError."""
        made = self._made(KIB)
        out = np.zeros(8, np.uint8)
        out.flags.writeable = False
        with pytest.raises(DescriptorError):
            made.buffer.pack([one_copy(0, 0, 8)], out)
        assert not out.any()

    @final
    def test_keeps_its_memory_alive(self) -> None:
        """A buffer alone keeps its memory alive, even when all other references are gone."""
        # Below the size at which malloc maps separate pages, so that freed memory is reused and overwritten here.
        nbytes = 48 * KIB
        made = [self._made(nbytes, seed=i) for i in range(8)]
        contents = [each.read() for each in made]
        buffers = [each.buffer for each in made]
        del made
        gc.collect()
        churn = [np.full(nbytes, 0xEE, np.uint8) for _ in range(64)]
        for buffer, content in zip(buffers, contents, strict=True):
            same_bytes(packed(buffer, [one_copy(0, 0, nbytes)], bytes(nbytes)), content)
        del churn

    def _refused(self, direction: str, copy: Any) -> None:
        """Check that a copy is refused, and that a correct copy beside it is not carried out either."""
        made = self._made(KIB)
        before = made.read()
        memory = np.full(KIB, 0x5A, np.uint8)
        with pytest.raises(DescriptorError):
            getattr(made.buffer, direction)([one_copy(0, 8, 8), copy], memory)
        assert (memory == 0x5A).all()
        same_bytes(made.read(), before)


def _dram(buffer: DeviceBuffer) -> Memory:
    span = buffer.memory
    if span is None or span.kind is not MemoryKind.DRAM:
        pytest.skip("has no address in host memory")
    return span

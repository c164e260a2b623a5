# SPDX-License-Identifier: Apache-2.0
"""`BufferSuite`: what the buffers of every device have to pass before they hold a cache."""

from __future__ import annotations

import ctypes
import gc
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np
import pytest

from kvxfer.agent import FlightState, Op
from kvxfer.buffer import DeviceBuffer
from kvxfer.errors import DescriptorError
from kvxfer.inproc import InprocAgent
from kvxfer.memory import Memory, MemoryKind
from kvxfer.testing.actor import Actor
from kvxfer.testing.oracle import noise, same_bytes
from kvxfer.testing.stage import KIB, MIB, unique
from kvxfer.testing.suite import Suite

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvxfer.buffer import Completion

    Bytes = npt.NDArray[np.uint8]

_PATIENCE_S = 30.0
_GUARD = 64


@dataclass
class MadeBuffer:
    """A buffer and the way around it.

    Attributes:
        buffer: under test.
        read: all of its bytes, by other means than the buffer's.
        write: replace all of its bytes, by other means than the buffer's.
    """

    buffer: DeviceBuffer
    read: Callable[[], bytes]
    write: Callable[[bytes], None]


class BufferSuite(Suite):
    """Subclass it in a test module, name the way to make a buffer, and run pytest.

    Attributes:
        make_buffer: nbytes -> `MadeBuffer` of exactly that size, as a ``staticmethod``. The buffer alone has to keep its
            memory alive: the suite drops the rest.
        deviations: see `Suite`.
    """

    settings: ClassVar[frozenset[str]] = Suite.settings | {"make_buffer"}

    make_buffer: ClassVar[Callable[[int], MadeBuffer]]

    @final
    def test_describes_itself(self) -> None:
        """A buffer tells its size and its device, and its span, if it has one, covers all of it and never moves."""
        made = self._made(64 * KIB)
        buffer = made.buffer
        assert isinstance(buffer, DeviceBuffer)
        assert buffer.nbytes == 64 * KIB
        assert buffer.device
        span = buffer.memory
        if span is not None:
            assert isinstance(span, Memory)
            assert span.nbytes == buffer.nbytes
        _unpack(buffer, [(0, 100)], noise(100, 5))
        _pack(buffer, [(0, 100)])
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
        """What lies at the address that a transfer engine registers is what the buffer holds, both ways."""
        made = self._made(64 * KIB)
        span = _dram(made.buffer)
        same_bytes(ctypes.string_at(span.address, span.nbytes), made.read())
        data = noise(span.nbytes, 9)
        ctypes.memmove(span.address, data, len(data))
        same_bytes(made.read(), data)
        same_bytes(_pack(made.buffer, [(0, span.nbytes)]), data)

    @final
    def test_moves_with_an_agent(self) -> None:
        """A buffer with an address in host memory is read and written by an agent like any other memory."""
        made, other = self._made(64 * KIB), self._made(64 * KIB)
        ours, theirs = Actor(InprocAgent, unique("ours")), Actor(InprocAgent, unique("theirs"))
        try:
            near, far = _dram(made.buffer), _dram(other.buffer)
            ours.register(near)
            theirs.register(far)
            name = ours.connect(theirs.describe())
            expected = bytearray(made.read())
            expected[100:5100] = other.read()[7000:12000]
            flight = ours.start(Op.READ, name, [(near.address + 100, far.address + 7000, 5000)], _PATIENCE_S)
            assert ours.log.wait(flight, timeout_s=_PATIENCE_S).state is FlightState.DONE
            same_bytes(made.read(), expected)
        finally:
            ours.close()
            theirs.close()

    @final
    @pytest.mark.parametrize("nbytes", [1, 100, 64 * KIB, 24 * MIB])
    def test_whole(self, nbytes: int) -> None:
        """All of a buffer can be packed, and all of it unpacked."""
        made = self._made(nbytes)
        same_bytes(_pack(made.buffer, [(0, nbytes)]), made.read())
        data = noise(nbytes, 77)
        _unpack(made.buffer, [(0, nbytes)], data)
        same_bytes(made.read(), data)

    @final
    @pytest.mark.parametrize("case", ["mixed", "grid", "shifted grid", "adjacent", "bytes", "long", "one", "ends"])
    @pytest.mark.parametrize("seed", [1, 2, 3])
    def test_pack(self, case: str, seed: int) -> None:
        """Packing spans of any sizes, in any order, yields them one after the other and changes no other byte."""
        made = self._made(2 * MIB)
        spans = _spans(case, made.buffer.nbytes, seed)
        before = made.read()
        same_bytes(_pack(made.buffer, spans), b"".join(before[at : at + length] for at, length in spans))
        same_bytes(made.read(), before)

    @final
    @pytest.mark.parametrize("case", ["mixed", "grid", "shifted grid", "adjacent", "bytes", "long", "one", "ends"])
    @pytest.mark.parametrize("seed", [1, 2, 3])
    def test_unpack(self, case: str, seed: int) -> None:
        """Unpacking writes each span at its place, changes no other byte of the buffer and nothing of the source."""
        made = self._made(2 * MIB)
        spans = _spans(case, made.buffer.nbytes, seed)
        expected = bytearray(made.read())
        data = noise(sum(length for _, length in spans), seed + 50)
        _unpack(made.buffer, spans, data)
        begin = 0
        for at, length in spans:
            expected[at : at + length] = data[begin : begin + length]
            begin += length
        same_bytes(made.read(), bytes(expected))

    @final
    @pytest.mark.parametrize("seed", [1, 2, 3, 4])
    def test_round_trip(self, seed: int) -> None:
        """What one buffer packs and another unpacks at other places is what was there, byte for byte."""
        source, target = self._made(MIB), self._made(MIB)
        here, there = _spans("mixed", MIB, seed), _spans("mixed", MIB, seed + 100)
        count = min(len(here), len(there))
        spans = [(at, min(length, other)) for (at, length), (_, other) in zip(here[:count], there, strict=False)]
        landed = [(at, length) for (at, _), (_, length) in zip(there[:count], spans, strict=True)]
        content = source.read()
        _unpack(target.buffer, landed, _pack(source.buffer, spans))
        after = target.read()
        for (at, length), (to, _) in zip(spans, landed, strict=True):
            same_bytes(after[to : to + length], content[at : at + length])

    @final
    def test_pack_twice_the_same(self) -> None:
        """Packing may name a byte more than once."""
        made = self._made(64 * KIB)
        content = made.read()
        spans = [(1000, 3000), (1000, 3000), (2000, 3000), (0, 64 * KIB)]
        same_bytes(_pack(made.buffer, spans), b"".join(content[at : at + length] for at, length in spans))

    @final
    def test_content_of_the_moment(self) -> None:
        """Each pack shows what is in memory by then: nothing is remembered from an earlier one."""
        made = self._made(64 * KIB)
        for seed in range(20, 26):
            data = noise(64 * KIB, seed)
            made.write(data)
            same_bytes(_pack(made.buffer, [(100, 5000), (9000, 400)]), data[100:5100] + data[9000:9400])

    @final
    def test_no_spans(self) -> None:
        """An empty list of spans is allowed, done at once, and changes nothing."""
        made = self._made(KIB)
        before = made.read()
        same_bytes(_pack(made.buffer, []), b"")
        _unpack(made.buffer, [], b"")
        same_bytes(made.read(), before)

    @final
    def test_several_copies_at_once(self) -> None:
        """Copies that are started before others are done do not disturb each other."""
        made = self._made(4 * MIB)
        content = made.read()
        outs = [np.zeros(256 * KIB, np.uint8) for _ in range(8)]
        copies = [
            made.buffer.pack(_u64([i * 512 * KIB]), _u64([256 * KIB]), out) for i, out in enumerate(outs)
        ]  # fmt: skip
        for i, (copy, out) in enumerate(zip(copies, outs, strict=True)):
            _finish(copy)
            same_bytes(out.tobytes(), content[i * 512 * KIB :][: 256 * KIB])

    @final
    def test_completion(self) -> None:
        """A finished copy says so, to any thread and as often as it is asked."""
        made = self._made(MIB)
        out = np.zeros(MIB, np.uint8)
        copy = made.buffer.pack(_u64([0]), _u64([MIB]), out)
        assert copy.wait(_PATIENCE_S) is True
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
        source = np.frombuffer(noise(100, 3), np.uint8)
        assert not source.flags.writeable
        _finish(made.buffer.unpack(_u64([17]), _u64([100]), source))
        same_bytes(made.read()[17:117], source.tobytes())

    @final
    @pytest.mark.parametrize("direction", ["pack", "unpack"])
    @pytest.mark.parametrize(
        ("offsets", "nbytes"),
        [
            ([KIB], [1]),
            ([0], [KIB + 1]),
            ([KIB - 1], [2]),
            ([0, KIB - 4], [4, 8]),
            ([1 << 63], [4]),
            ([(1 << 64) - 4], [8]),
            ([4], [(1 << 64) - 4]),
            ([0, 0], [4, 0]),
            ([0], [4, 4]),
            ([0, 4], [4]),
        ],
    )
    def test_spans_outside(self, direction: str, offsets: list[int], nbytes: list[int]) -> None:
        """Spans that are empty, incomplete or not inside the buffer are refused with DescriptorError; nothing is copied."""
        made = self._made(KIB)
        before = made.read()
        total = sum(nbytes)
        packed = np.full(min(total, 4 * KIB), 0x5A, np.uint8)
        with pytest.raises(DescriptorError):
            getattr(made.buffer, direction)(_u64(offsets), _u64(nbytes), packed)
        assert (packed == 0x5A).all()
        same_bytes(made.read(), before)

    @final
    @pytest.mark.parametrize("direction", ["pack", "unpack"])
    @pytest.mark.parametrize(
        "arguments",
        [
            (np.array([0], np.int64), np.array([8], np.uint64), np.zeros(8, np.uint8)),
            (np.array([0], np.uint64), np.array([8], np.float64), np.zeros(8, np.uint8)),
            (np.array([[0]], np.uint64), np.array([[8]], np.uint64), np.zeros(8, np.uint8)),
            (np.array([0], np.uint64), np.array([8], np.uint64), np.zeros(7, np.uint8)),
            (np.array([0], np.uint64), np.array([8], np.uint64), np.zeros(9, np.uint8)),
            (np.array([0], np.uint64), np.array([8], np.uint64), np.zeros(1, np.uint64)),
            (np.array([0], np.uint64), np.array([8], np.uint64), np.zeros((1, 8), np.uint8)),
            (np.array([0], np.uint64), np.array([8], np.uint64), np.zeros(16, np.uint8)[::2]),
            (np.array([], np.uint64), np.array([], np.uint64), np.zeros(1, np.uint8)),
        ],
        ids=["int64", "float", "2-d", "too-short", "too-long", "words", "rows", "strided", "no-spans"],
    )
    def test_wrong_arrays(self, direction: str, arguments: tuple[Any, Any, Any]) -> None:
        """Arrays of another type, shape or size than documented are refused with DescriptorError; nothing is copied."""
        made = self._made(KIB)
        before = made.read()
        with pytest.raises(DescriptorError):
            getattr(made.buffer, direction)(*arguments)
        assert not arguments[2].any()
        same_bytes(made.read(), before)

    @final
    def test_pack_into_read_only(self) -> None:
        """Packing into bytes that cannot be written is refused with DescriptorError."""
        made = self._made(KIB)
        out = np.zeros(8, np.uint8)
        out.flags.writeable = False
        with pytest.raises(DescriptorError):
            made.buffer.pack(_u64([0]), _u64([8]), out)
        assert not out.any()

    @final
    def test_keeps_its_memory_alive(self) -> None:
        """A buffer is all that is needed to keep its bytes, also when whoever made it has forgotten everything else."""
        # Below the size at which malloc maps pages of their own: freed memory is then reused here, and seen to be.
        nbytes = 48 * KIB
        made = [self._made(nbytes) for _ in range(8)]
        contents = [each.read() for each in made]
        buffers = [each.buffer for each in made]
        del made
        gc.collect()
        churn = [np.full(nbytes, 0xEE, np.uint8) for _ in range(64)]
        for buffer, content in zip(buffers, contents, strict=True):
            same_bytes(_pack(buffer, [(0, nbytes)]), content)
        del churn

    def _made(self, nbytes: int) -> MadeBuffer:
        """A buffer full of noise."""
        made = type(self).make_buffer(nbytes)
        made.write(noise(nbytes, nbytes % 1009))
        same_bytes(made.read(), noise(nbytes, nbytes % 1009), "read by the oracle after it wrote them")
        return made


def _dram(buffer: DeviceBuffer) -> Memory:
    span = buffer.memory
    if span is None or span.kind is not MemoryKind.DRAM:
        pytest.skip("has no address in host memory")
    return span


def _u64(values: list[int]) -> npt.NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)


def _finish(copy: Completion) -> None:
    assert copy.wait(_PATIENCE_S), f"a copy is not done after {_PATIENCE_S} s"
    assert copy.done


def _guarded(nbytes: int) -> tuple[Bytes, Bytes]:
    """(all, the middle): the middle at an odd address between two bands that nobody may touch."""
    whole = np.full(nbytes + 2 * _GUARD + 1, 0xC3, np.uint8)
    return whole, whole[_GUARD + 1 : _GUARD + 1 + nbytes]


def _untouched(whole: Bytes) -> bool:
    return bool((whole[: _GUARD + 1] == 0xC3).all() and (whole[-_GUARD:] == 0xC3).all())


def _pack(buffer: DeviceBuffer, spans: list[tuple[int, int]]) -> bytes:
    whole, out = _guarded(sum(length for _, length in spans))
    _finish(buffer.pack(_u64([at for at, _ in spans]), _u64([length for _, length in spans]), out))
    assert _untouched(whole), "bytes beside the output were touched"
    return out.tobytes()


def _unpack(buffer: DeviceBuffer, spans: list[tuple[int, int]], data: bytes) -> None:
    whole, source = _guarded(len(data))
    source[:] = np.frombuffer(data, np.uint8)
    _finish(buffer.unpack(_u64([at for at, _ in spans]), _u64([length for _, length in spans]), source))
    assert _untouched(whole), "bytes beside the source were touched"
    same_bytes(source.tobytes(), data, "of the source, which unpack may not touch")


def _spans(case: str, nbytes: int, seed: int) -> list[tuple[int, int]]:
    """Spans that do not overlap, in random order: (offset, length)."""
    rng = np.random.default_rng(seed)
    if case == "one":
        at, end = sorted(rng.choice(nbytes, 2, replace=False).tolist())
        return [(at, end - at)]
    if case == "ends":
        return [(nbytes - 7, 7), (0, 5)]
    if case == "bytes":
        return [(int(at), 1) for at in rng.choice(nbytes, 500, replace=False)]
    if case == "long":
        third = nbytes // 3
        return [(2 * third, third), (0, third - 1)]
    if case == "adjacent":
        # Several runs of blocks that follow each other, as a prefix in a cache does.
        return [(int(at) * 65536 + i * 2048, 2048) for at in rng.permutation(nbytes // 65536)[:8] for i in range(16)]
    if case in ("grid", "shifted grid"):
        length, shift = 4096, 0 if case == "grid" else 1234
        return [(int(at) * length + shift, length) for at in rng.permutation(nbytes // length - 1)[:100]]
    slot = 4000
    places = rng.permutation(nbytes // slot)[:200]
    lengths = rng.integers(1, slot, len(places))
    return [
        (int(at) * slot + int(rng.integers(0, slot - length + 1)), int(length))
        for at, length in zip(places, lengths, strict=True)
    ]

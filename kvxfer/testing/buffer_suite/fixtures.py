# SPDX-License-Identifier: Apache-2.0
"""Helpers of the tests of buffers: memory between guard bands, copies made from spans or from logical arrays.

Nothing here computes the result of a copy: tests slice bytes or index logical arrays for that.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kvxfer.memory.copies import Copy, StridedLoop
from kvxfer.testing.oracle import noise, same_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from kvxfer.buffers.base import Completion, DeviceBuffer

    Bytes = npt.NDArray[np.uint8]

PATIENCE_S = 30.0
ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")

_GUARD = 64


@dataclass
class MadeBuffer:
    """A buffer, and access to its memory that bypasses it.

    Attributes:
        buffer: the buffer under test.
        read: return all of its bytes, by other means than the buffer.
        write: replace all of its bytes, by other means than the buffer.
    """

    buffer: DeviceBuffer
    read: Callable[[], bytes]
    write: Callable[[bytes], None]


class BufferTests:
    """Base class of the parts of `BufferSuite`."""

    make_buffer: ClassVar[Callable[[int], MadeBuffer]]

    def _made(self, nbytes: int, seed: int = 0) -> MadeBuffer:
        """A buffer full of noise."""
        made = type(self).make_buffer(nbytes)
        data = noise(nbytes, nbytes % 1009 + seed)
        made.write(data)
        same_bytes(made.read(), data, "read by the oracle after it wrote them")
        return made


def finish(copy: Completion) -> None:
    """Wait until the copy has ended."""
    assert copy.wait(PATIENCE_S), f"a copy is not done after {PATIENCE_S} s"
    assert copy.done


def packed(buffer: DeviceBuffer, copies: Sequence[Copy], before: bytes) -> bytes:
    """Content of host memory after `pack`. Before, it was ``before``; it lies at an odd address between two guard bands."""
    whole, out = _guarded(before)
    finish(buffer.pack(copies, out))
    assert _untouched(whole), "bytes beside the output were touched"
    return out.tobytes()


def unpack(buffer: DeviceBuffer, copies: Sequence[Copy], data: bytes) -> None:
    """Unpack from host memory at an odd address, and check that this memory has not changed."""
    whole, source = _guarded(data)
    finish(buffer.unpack(copies, source))
    assert _untouched(whole), "bytes beside the source were touched"
    same_bytes(source.tobytes(), data, "of the source, which unpack may not touch")


def _guarded(content: bytes) -> tuple[Bytes, Bytes]:
    whole = np.full(len(content) + 2 * _GUARD + 1, 0xC3, np.uint8)
    middle = whole[_GUARD + 1 : _GUARD + 1 + len(content)]
    middle[:] = np.frombuffer(content, np.uint8)
    return whole, middle


def _untouched(whole: Bytes) -> bool:
    return bool((whole[: _GUARD + 1] == 0xC3).all() and (whole[-_GUARD:] == 0xC3).all())


def i64(values: Sequence[int]) -> npt.NDArray[np.int64]:
    """Offsets of a copy, as an array."""
    return np.array(values, dtype=np.int64)


def one_copy(source: int, target: int, nbytes: int) -> Copy:
    """A copy of one run."""
    return Copy(i64([source]), i64([target]), i64([0]), i64([0]), (), nbytes)


Span = tuple[int, int, int]
"""Source, target, length."""


def copies_of(spans: Sequence[Span]) -> list[Copy]:
    """A copy for each length, with the spans of that length as its blocks, in their order."""
    lengths: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        lengths[span[2]].append(span)
    return [
        Copy(i64([0]), i64([0]), i64([span[0] for span in same]), i64([span[1] for span in same]), (), nbytes)
        for nbytes, same in lengths.items()
    ]


def move(spans: Sequence[Span], source: bytes, target: bytes) -> bytes:
    """The target with its spans replaced by slices of the source."""
    moved = bytearray(target)
    for at, to, nbytes in spans:
        moved[to : to + nbytes] = source[at : at + nbytes]
    return bytes(moved)


def places(lengths: Sequence[int], seed: int) -> tuple[list[int], int]:
    """Offsets of spans of these lengths, in random order with some gaps between them, and the size of their memory."""
    rng = np.random.default_rng(seed)
    found = [0] * len(lengths)
    at = int(rng.integers(0, 9))
    for i in rng.permutation(len(lengths)).tolist():
        found[i] = at
        at += lengths[i] + int(rng.choice([0, 0, 0, 1, 13]))
    return found, at + int(rng.integers(0, 9))


class Logical:
    """Memory of a cache, and its bytes as a logical array with the axes L, B, H, N and C.

    Args:
        order: of `ORDERS`, outermost first.
        extents: how many layers, blocks, heads, tokens of a block, bytes of a token of a head.
        padding: elements left unused after each of the other axes.
    """

    def __init__(self, order: str, extents: Sequence[int], padding: int = 0) -> None:
        self._made_of = (order, extents, padding)
        sizes = dict(zip("LBHNC", extents, strict=True))
        shape = [sizes[axis] + padding for axis in order]
        self.memory: Bytes = np.zeros(int(np.prod(shape)), np.uint8)
        used = self.memory.reshape(shape)[tuple(slice(sizes[axis]) for axis in order)]
        self.bytes: Bytes = used.transpose([order.index(axis) for axis in "LBHNC"])

    def another(self) -> Logical:
        """Memory of the same shape, all 0."""
        return Logical(*self._made_of)

    @property
    def nbytes(self) -> int:
        """Bytes of the memory, unused ones included."""
        return len(self.memory)

    def fill(self, data: bytes) -> Logical:
        """Replace all of the memory."""
        self.memory[:] = np.frombuffer(data, np.uint8)
        return self

    def at(self, part: Bytes) -> int:
        """Return the offset in the memory at which a part of ``bytes`` begins."""
        begin: int = part.__array_interface__["data"][0] - self.memory.__array_interface__["data"][0]
        return begin


def copy_between(
    source: Logical, here: Bytes, target: Logical, there: Bytes, blocks: tuple[list[int], list[int]]
) -> Copy:
    """The copy from a part of one cache, some blocks of it, to a part of another: ``there[:, b] = here[:, a]``."""
    loops = [StridedLoop(here.shape[i], here.strides[i], there.strides[i]) for i in (2, 3) if here.shape[i] > 1]
    layers = np.arange(here.shape[0], dtype=np.int64)
    return Copy(
        source.at(here) + layers * here.strides[0],
        target.at(there) + layers * there.strides[0],
        i64(blocks[0]) * here.strides[1],
        i64(blocks[1]) * there.strides[1],
        tuple(sorted(loops, key=lambda loop: -abs(loop.source_stride))),
        here.shape[4],
    )

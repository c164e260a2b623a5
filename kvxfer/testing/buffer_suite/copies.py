# SPDX-License-Identifier: Apache-2.0
"""Copies of every shape: the right bytes are in their places, and no others have changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import numpy as np
import pytest

from kvxfer.memory.copies import Copy, StridedLoop
from kvxfer.testing.buffer_suite.fixtures import (
    ORDERS,
    BufferTests,
    Logical,
    copies_of,
    copy_between,
    finish,
    i64,
    move,
    one_copy,
    packed,
    places,
    unpack,
)
from kvxfer.testing.conformance import KIB, MIB
from kvxfer.testing.oracle import noise, same_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvxfer.testing.buffer_suite.fixtures import MadeBuffer, Span

_cases = pytest.mark.parametrize("case", ["mixed", "grid", "shifted grid", "adjacent", "bytes", "long", "one", "ends"])

_LAYERS, _BLOCKS, _HEADS, _TOKENS = 3, 7, 4, 5
_FRAGMENTED = [5, 0, 3, 6]


class CopyTests(BufferTests):
    """Copies of every shape, out of the buffer and into it."""

    @final
    @pytest.mark.parametrize("nbytes", [1, 100, 64 * KIB, 24 * MIB])
    def test_whole(self, nbytes: int) -> None:
        """All of a buffer can be packed, and all of it unpacked."""
        made = self._made(nbytes)
        both_ways(made, [(0, 0, nbytes)], nbytes)

    @final
    @_cases
    @pytest.mark.parametrize("seed", [1, 2, 3])
    def test_pack(self, case: str, seed: int) -> None:
        """Packing spans of any sizes, in any order, copies each to its place and changes no other byte of either side."""
        made = self._made(2 * MIB)
        spans, size = _spans(case, made.buffer.nbytes, seed)
        content, before = made.read(), noise(size, seed + 70)
        same_bytes(packed(made.buffer, copies_of(spans), before), move(spans, content, before))
        same_bytes(made.read(), content, "of the buffer, which pack may not touch")

    @final
    @_cases
    @pytest.mark.parametrize("seed", [1, 2, 3])
    def test_unpack(self, case: str, seed: int) -> None:
        """Unpacking writes each span at its place, changes no other byte of the buffer and nothing of the source."""
        made = self._made(2 * MIB)
        spans, size = _spans(case, made.buffer.nbytes, seed)
        spans = [(to, at, nbytes) for at, to, nbytes in spans]
        content, data = made.read(), noise(size, seed + 50)
        unpack(made.buffer, copies_of(spans), data)
        same_bytes(made.read(), move(spans, data, content))

    @final
    @pytest.mark.parametrize("seed", [1, 2, 3, 4])
    def test_round_trip(self, seed: int) -> None:
        """Bytes that one buffer packs and another unpacks at other places arrive unchanged."""
        source, target = self._made(MIB), self._made(MIB, seed=1)
        spans, size = _spans("mixed", MIB, seed)
        landing, end = places([nbytes for _, _, nbytes in spans], seed + 9)
        assert end <= MIB
        content, before = source.read(), target.read()
        chunk = packed(source.buffer, copies_of(spans), bytes(size))
        unpack(target.buffer, copies_of([(s[1], to, s[2]) for s, to in zip(spans, landing, strict=True)]), chunk)
        direct = [(s[0], to, s[2]) for s, to in zip(spans, landing, strict=True)]
        same_bytes(target.read(), move(direct, content, before))

    @final
    @pytest.mark.parametrize("chunk", ORDERS)
    @pytest.mark.parametrize("cache", ORDERS)
    @pytest.mark.parametrize("token_nbytes", [24, 512])
    def test_orders(self, cache: str, chunk: str, token_nbytes: int) -> None:
        """A cache of any order is packed into a chunk of any order and unpacked from it: all kinds of blocks, padded or not."""
        extents = (_LAYERS, _BLOCKS, _HEADS, _TOKENS, token_nbytes)
        for padding in (0, 1):
            near = Logical(cache, extents, padding)
            made = self._made(near.nbytes)
            for ids in (_FRAGMENTED, [2, 3, 4, 5], [6, 5, 4], [0]):
                far = Logical(chunk, (_LAYERS, len(ids), _HEADS, _TOKENS, token_nbytes))
                rows = list(range(len(ids)))
                before = noise(far.nbytes, 11)
                near.fill(made.read())
                found = packed(made.buffer, [copy_between(near, near.bytes, far, far.bytes, (ids, rows))], before)
                far.fill(before).bytes[...] = near.bytes[:, ids]
                same_bytes(found, far.memory.tobytes(), f"blocks {ids} packed")
                data = noise(far.nbytes, 12)
                unpack(made.buffer, [copy_between(far, far.bytes, near, near.bytes, (rows, ids))], data)
                near.bytes[:, ids] = far.fill(data).bytes
                same_bytes(made.read(), near.memory.tobytes(), f"blocks {ids} unpacked")

    @final
    @pytest.mark.parametrize("chunk", ORDERS)
    @pytest.mark.parametrize("cache", ORDERS)
    def test_parts_of_blocks(self, cache: str, chunk: str) -> None:
        """Some layers, heads, tokens and bytes of each block go to their places among others, which stay as they are."""
        near = Logical(cache, (_LAYERS, _BLOCKS, _HEADS, _TOKENS, 48))
        far = Logical(chunk, (_LAYERS, 5, _HEADS, _TOKENS, 64))
        made = self._made(near.nbytes)
        here, there = near.bytes[1:, :, 1:3, 2:, 7:31], far.bytes[:2, :, 2:, 1:4, 40:]
        rows = [4, 1, 2, 0]
        before = noise(far.nbytes, 21)
        near.fill(made.read())
        found = packed(made.buffer, [copy_between(near, here, far, there, (_FRAGMENTED, rows))], before)
        far.fill(before)
        there[:, rows] = here[:, _FRAGMENTED]
        same_bytes(found, far.memory.tobytes())
        data = noise(far.nbytes, 22)
        unpack(made.buffer, [copy_between(far, there, near, here, (rows, _FRAGMENTED))], data)
        far.fill(data)
        here[:, _FRAGMENTED] = there[:, rows]
        same_bytes(made.read(), near.memory.tobytes())

    @final
    def test_several_bases(self) -> None:
        """A copy has any number of bases, at no regular distance, each with all of its blocks and loops."""
        made = self._made(256 * KIB)
        bases, blocks = [170_000, 3, 90_001], [4000, 0, 64_000, 12_345]
        spans, number = [], 0
        for base in bases:
            for block in blocks:
                for row in range(3):
                    spans.append((base + block + row * 700, number * 100 + 5, 100))
                    number += 1
        to_bases, to_blocks = [5, 1205, 2405], [0, 300, 600, 900]
        copy = Copy(i64(bases), i64(to_bases), i64(blocks), i64(to_blocks), (StridedLoop(3, 700, 100),), 100)
        content, before = made.read(), noise(number * 100 + 9, 31)
        same_bytes(packed(made.buffer, [copy], before), move(spans, content, before))
        back = Copy(i64(to_bases), i64(bases), i64(to_blocks), i64(blocks), (StridedLoop(3, 100, 700),), 100)
        data = noise(number * 100 + 9, 32)
        unpack(made.buffer, [back], data)
        same_bytes(made.read(), move([(to, at, n) for at, to, n in spans], data, content))

    @final
    def test_loops_run_backwards(self) -> None:
        """The strides of a loop may be negative on either side, or on both."""
        made = self._made(64 * KIB)
        for down, up in ((-400, 100), (400, -100), (-400, -100)):
            at = 30_000 if down < 0 else 9000
            to = 5000 if up < 0 else 100
            blocks = ([0, 7100, 20_000], [0, 8000, 16_000])  # at which no two runs overlap
            copy = Copy(
                i64([at]),
                i64([to]),
                i64(blocks[0]),
                i64(blocks[1]),
                (StridedLoop(2, 3000, 1600), StridedLoop(12, down, up)),
                90,
            )
            spans = [
                (at + a + i * 3000 + j * down, to + b + i * 1600 + j * up, 90)
                for a, b in zip(*blocks, strict=True)
                for i in range(2)
                for j in range(12)
            ]
            content, before = made.read(), noise(32 * KIB, 41)
            same_bytes(packed(made.buffer, [copy], before), move(spans, content, before), f"{down} to {up}")
            back = Copy(
                i64([to]),
                i64([at]),
                i64(blocks[1]),
                i64(blocks[0]),
                (StridedLoop(2, 1600, 3000), StridedLoop(12, up, down)),
                90,
            )
            data = noise(32 * KIB, 42)
            unpack(made.buffer, [back], data)
            same_bytes(made.read(), move([(t, s, n) for s, t, n in spans], data, content), f"{up} to {down}")

    @final
    def test_interleaved(self) -> None:
        """Two copies may write turn by turn: K and V of a token, from memory of their own to one chunk."""
        made = self._made(128 * KIB)
        content, before = made.read(), noise(200 * 64, 51)
        k = Copy(i64([0]), i64([0]), i64([0]), i64([0]), (StridedLoop(200, 32, 64),), 32)
        v = Copy(i64([64 * KIB]), i64([32]), i64([0]), i64([0]), (StridedLoop(200, 32, 64),), 32)
        spans = [(i * 32 + half * 64 * KIB, i * 64 + half * 32, 32) for half in (0, 1) for i in range(200)]
        same_bytes(packed(made.buffer, [k, v], before), move(spans, content, before))

    @final
    def test_pack_twice_the_same(self) -> None:
        """Packing may read a byte more than once."""
        made = self._made(64 * KIB)
        spans = [(1000, 0, 3000), (1000, 6000, 3000), (2000, 3000, 3000), (0, 9000, 64 * KIB)]
        size = 9000 + 64 * KIB
        same_bytes(packed(made.buffer, copies_of(spans), bytes(size)), move(spans, made.read(), bytes(size)))
        again = Copy(i64([500]), i64([0]), i64([0]), i64([0]), (StridedLoop(9, 0, 300),), 300)
        same_bytes(packed(made.buffer, [again], bytes(2700)), made.read()[500:800] * 9)

    @final
    def test_content_of_the_moment(self) -> None:
        """Each pack copies the content of memory at that time, and no content of an earlier one."""
        made = self._made(64 * KIB)
        copies = copies_of([(100, 0, 5000), (9000, 5000, 400)])
        for seed in range(20, 26):
            data = noise(64 * KIB, seed)
            made.write(data)
            same_bytes(packed(made.buffer, copies, bytes(5400)), data[100:5100] + data[9000:9400])

    @final
    def test_several_copies_at_once(self) -> None:
        """Copies that are started before others are done do not disturb each other."""
        made = self._made(4 * MIB)
        content = made.read()
        outs = [np.zeros(256 * KIB, np.uint8) for _ in range(8)]
        running = [made.buffer.pack([one_copy(i * 512 * KIB, 0, 256 * KIB)], out) for i, out in enumerate(outs)]
        for i, (copy, out) in enumerate(zip(running, outs, strict=True)):
            finish(copy)
            same_bytes(out.tobytes(), content[i * 512 * KIB :][: 256 * KIB])


def both_ways(made: MadeBuffer, spans: Sequence[Span], size: int) -> None:
    """Pack these spans, and unpack other bytes to the same places."""
    content = made.read()
    same_bytes(packed(made.buffer, copies_of(spans), bytes(size)), move(spans, content, bytes(size)))
    data = noise(size, 77)
    back = [(to, at, nbytes) for at, to, nbytes in spans]
    unpack(made.buffer, copies_of(back), data)
    same_bytes(made.read(), move(back, data, content))


def _spans(case: str, nbytes: int, seed: int) -> tuple[list[Span], int]:
    """(spans that overlap on neither side, in random order; bytes of host memory that they need)."""
    found = _pieces(case, nbytes, np.random.default_rng(seed))
    to, size = places([length for _, length in found], seed)
    return [(at, there, length) for (at, length), there in zip(found, to, strict=True)], size


def _pieces(case: str, nbytes: int, rng: np.random.Generator) -> list[tuple[int, int]]:
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
    slots = rng.permutation(nbytes // slot)[:200]
    lengths = rng.integers(1, slot, len(slots))
    return [
        (int(at) * slot + int(rng.integers(0, slot - length + 1)), int(length))
        for at, length in zip(slots, lengths, strict=True)
    ]

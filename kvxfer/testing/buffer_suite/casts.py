# SPDX-License-Identifier: Apache-2.0
"""Casts: elements are converted as `kvxfer.memory.copies.Cast` defines, or the device declares that it cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, final

import numpy as np
import pytest

from kvxfer.errors import UnsupportedError
from kvxfer.layout.dtypes import DTYPE_NBYTES
from kvxfer.memory.copies import Cast, Copy, StridedLoop
from kvxfer.testing.buffer_suite.fixtures import BufferTests, Logical, copy_between, i64, one_copy, packed, unpack
from kvxfer.testing.buffer_suite.floats import cast, same_elements, some_elements
from kvxfer.testing.oracle import noise, same_bytes

if TYPE_CHECKING:
    from kvxfer.buffers.base import DeviceBuffer

_FLOATS = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2")
_sources = pytest.mark.parametrize("source", _FLOATS)
_targets = pytest.mark.parametrize("target", _FLOATS)
_NUMBER = 3000


class CastTests(BufferTests):
    """Declared casts. Undeclared ones are skipped; one test checks that they are refused."""

    @final
    @pytest.mark.parametrize("factor", [1.0, 0.37, 3.0])
    @_targets
    @_sources
    def test_cast(self, source: str, target: str, factor: float) -> None:
        """Each element is multiplied as float32, rounded to nearest even and saturated, packed as well as unpacked."""
        made = self._made(_NUMBER * 4)
        _need(made.buffer, source, target)
        elements = some_elements(source, _NUMBER, seed=3)
        expected = cast(elements, source, target, factor)
        how = Cast(source, target, factor)
        made.write(elements.tobytes() + bytes(_NUMBER * 4 - len(elements)))
        out = packed(made.buffer, [replace(one_copy(0, 0, len(elements)), cast=how)], bytes(len(expected)))
        same_elements(out, expected, target)
        unpack(made.buffer, [replace(one_copy(0, 0, len(elements)), cast=how)], elements.tobytes())
        same_elements(made.read()[: len(expected)], expected, target)

    @final
    @pytest.mark.parametrize(("cache", "chunk"), [("LBHNC", "LBNHC"), ("BLNHC", "LHBNC"), ("LBHNC", "LBHNC")])
    @pytest.mark.parametrize(("source", "target"), [("bfloat16", "float32"), ("float32", "float8_e4m3fn")])
    def test_cast_between_orders(self, cache: str, chunk: str, source: str, target: str) -> None:
        """Elements of fragmented blocks are cast on their way to a chunk of another order, and back to other blocks."""
        channels, ids, rows = 24, [5, 0, 3, 6], [0, 1, 2, 3]
        near = Logical(cache, (3, 7, 4, 5, channels * DTYPE_NBYTES[source]))
        far = Logical(chunk, (3, 4, 4, 5, channels * DTYPE_NBYTES[target]), padding=1)
        size = max(near.nbytes, far.nbytes)
        made = self._made(size)
        _need(made.buffer, source, target)
        near.fill(some_elements(source, near.nbytes // DTYPE_NBYTES[source], seed=4).tobytes())
        before = noise(far.nbytes, 61)
        chosen = np.ascontiguousarray(near.bytes[:, ids])
        expected = cast(chosen.reshape(-1), source, target, 2.5).reshape(*chosen.shape[:4], -1)
        how = Cast(source, target, 2.5)

        made.write(near.memory.tobytes() + bytes(size - near.nbytes))
        copy = copy_between(near, near.bytes, far, far.bytes, (ids, rows))
        found = packed(made.buffer, [replace(copy, cast=how)], before)
        far.fill(before).bytes[...] = expected
        _same_cache(found, far, target)

        content = noise(size, 62)
        made.write(content)
        there = Logical(chunk, (3, 7, 4, 5, channels * DTYPE_NBYTES[target]), padding=0)
        assert there.nbytes <= size
        copy = copy_between(near, near.bytes, there, there.bytes, (ids, [1, 6, 2, 4]))
        unpack(made.buffer, [replace(copy, cast=how)], near.memory.tobytes())
        there.fill(content[: there.nbytes]).bytes[:, [1, 6, 2, 4]] = expected
        _same_cache(made.read()[: there.nbytes], there, target)
        same_bytes(made.read()[there.nbytes :], content[there.nbytes :])

    @final
    @_targets
    @_sources
    def test_cast_of_long_and_short_runs(self, source: str, target: str) -> None:
        """Runs of one element, and of a million, at any address and with gaps, are cast like others."""
        wide, narrow = DTYPE_NBYTES[source], DTYPE_NBYTES[target]
        long, count = 300_001, 50
        made = self._made(8 + max(long, count * 3) * 4)
        _need(made.buffer, source, target)
        elements = some_elements(source, long, seed=5)
        expected = cast(elements, source, target, 1.0)
        how = Cast(source, target)
        size = made.buffer.nbytes

        made.write(bytes(3) + elements.tobytes() + bytes(size - 3 - len(elements)))
        out = packed(made.buffer, [replace(one_copy(3, 1, len(elements)), cast=how)], bytes(2 + len(expected)))
        same_elements(out[1:-1], expected, target)
        single = Copy(i64([3]), i64([1]), i64([0]), i64([0]), (StridedLoop(count, wide, 3 * narrow),), wide, how)
        before = noise(1 + count * 3 * narrow, 63)
        found = np.frombuffer(packed(made.buffer, [single], before), np.uint8)
        kept = np.frombuffer(before, np.uint8)
        rows, untouched = found[1:].reshape(count, 3, narrow), kept[1:].reshape(count, 3, narrow)
        same_elements(rows[:, 0].tobytes(), expected[: count * narrow], target)
        same_bytes(rows[:, 1:].tobytes(), untouched[:, 1:].tobytes(), "between the runs")

    @final
    def test_undeclared_casts_are_refused(self) -> None:
        """Every cast that the device does not declare raises UnsupportedError; nothing is copied."""
        made = self._made(128)
        content, out = made.read(), np.full(128, 0x5A, np.uint8)
        refused = [(s, t) for s in DTYPE_NBYTES for t in DTYPE_NBYTES if not made.buffer.can_cast(s, t)]
        assert made.buffer.can_cast("float31", "bfloat16") is False
        assert made.buffer.can_cast("bfloat16", "float31") is False
        assert refused, "a device that casts anything to anything: are these casts tested?"
        for source, target in refused:
            copies = [one_copy(0, 0, 8), replace(one_copy(8, 8, 8), cast=Cast(source, target))]
            with pytest.raises(UnsupportedError):
                made.buffer.pack(copies, out)
            with pytest.raises(UnsupportedError):
                made.buffer.unpack(copies, out)
        assert (out == 0x5A).all()
        same_bytes(made.read(), content)


def _need(buffer: DeviceBuffer, source: str, target: str) -> None:
    if not buffer.can_cast(source, target):
        pytest.skip(f"{buffer.device} declares no cast of {source} to {target}")


def _same_cache(found: bytes, expected: Logical, name: str) -> None:
    """Assert that elements are as expected and that unused memory has not changed."""
    got = expected.another().fill(found)
    same_elements(got.bytes.tobytes(), np.frombuffer(expected.bytes.tobytes(), np.uint8), name)
    got.bytes[...] = expected.bytes
    same_bytes(got.memory.tobytes(), expected.memory.tobytes(), "beside the elements")

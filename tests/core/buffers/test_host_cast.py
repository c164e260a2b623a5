# SPDX-License-Identifier: Apache-2.0
"""Casts in host memory: every value of every short type, and the cases that go wrong elsewhere."""

from __future__ import annotations

import itertools
import math
import struct
import sys
import warnings

import numpy as np
import pytest

from kvxfer.buffers.base import HostBuffer
from kvxfer.buffers.host_cast import can_cast, caster
from kvxfer.errors import UnsupportedError
from kvxfer.layout.dtypes import CASTABLE, DTYPE_NBYTES
from kvxfer.memory.copies import Cast, Copy

FLOAT8_MAX = 448.0


def value_of(name, code):
    """What the bits mean, by their definition."""
    if name == "float16":
        return struct.unpack("<e", struct.pack("<H", code))[0]
    if name == "bfloat16":
        return struct.unpack("<f", struct.pack("<I", code << 16))[0]
    sign, exponent, fraction = code >> 7, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    size = math.ldexp(fraction, -9) if exponent == 0 else math.ldexp(8 + fraction, exponent - 10)
    return -size if sign else size


def all_codes(name):
    """Every element of a type of one or two bytes."""
    size = DTYPE_NBYTES[name]
    return np.arange(1 << 8 * size, dtype=np.uint64).astype(f"u{size}")


def float32_of(values):
    """As a cast's output."""
    with np.errstate(all="ignore"):
        return np.array(values, dtype=np.float64).astype(np.float32)


def cast(elements, source, target, factor=1.0):
    """With every warning an error: overflow is no surprise here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return caster(Cast(source, target, factor))(np.ascontiguousarray(elements).view(np.uint8).reshape(-1))


@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn"])
def test_all_values_of_a_short_type_become_float32(name, factor):
    """The value that the bits stand for, times the factor, rounded as float32 does; NaN stays NaN."""
    codes = all_codes(name)
    found = cast(codes, name, "float32", factor).view(np.float32)
    with np.errstate(all="ignore"):
        expected = float32_of([value_of(name, code) for code in codes.tolist()]) * np.float32(factor)
    np.testing.assert_array_equal(found, expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(found)[number], np.signbit(expected)[number])


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn"])
def test_all_values_of_a_short_type_survive_a_round_trip_through_float32(name):
    """Finite values come back bit for bit; infinities of float16 come back as its largest number."""
    codes = all_codes(name)
    back = cast(cast(codes, name, "float32"), "float32", name).view(codes.dtype)
    values = np.array([value_of(name, code) for code in codes.tolist()])
    same = np.isfinite(values) | (np.isinf(values) & (name == "bfloat16"))
    np.testing.assert_array_equal(back[same], codes[same])
    assert [value_of(name, code) for code in back[np.isinf(values)].tolist()] in (
        [], [65504.0, -65504.0], [math.inf, -math.inf]
    )  # fmt: skip
    assert all(math.isnan(value_of(name, code)) for code in back[np.isnan(values)].tolist())


@pytest.mark.parametrize("source", ["bfloat16", "float16", "float32"])
def test_float8_is_rounded_once_to_nearest_even(source):
    """Halfway between two neighbours the even one wins, a bit beside it the nearer; above 448 there is nothing."""
    finite = sorted({abs(value_of("float8_e4m3fn", code)) for code in range(0x7F)})
    for low, high in itertools.pairwise(finite):
        middle = (low + high) / 2
        codes = [code for code in range(0x7F) if value_of("float8_e4m3fn", code) in (low, high)]
        even = next(code for code in codes if code % 2 == 0)
        just = [np.nextafter(np.float32(middle), np.float32(way)) for way in (0, 1e9)]
        if source == "float32":
            found = cast(np.array([middle, *just], dtype=np.float32), source, "float8_e4m3fn").tolist()
            assert found == [even, *codes], middle
        else:
            short = cast(np.array([middle], dtype=np.float32), "float32", source)
            assert cast(short, source, "float8_e4m3fn").tolist() == [even]
    above = np.array([463.9, 464.0, 465.0, 1e9, np.inf, -449.0, -np.inf, np.nan], dtype=np.float32)
    found = cast(cast(above, "float32", source), source, "float8_e4m3fn").tolist()
    values = [value_of("float8_e4m3fn", code) for code in found]
    assert values[:7] == [FLOAT8_MAX] * 5 + [-FLOAT8_MAX] * 2
    assert math.isnan(values[7])


def test_shorter_types_do_not_round_twice():
    """A product that bfloat16 would round to a tie of float8 is rounded from float32, once."""
    # 1.0625 is halfway between 1.0 and 1.125; this is above it by less than bfloat16 tells.
    number = np.array([1.0625 + 2**-20], dtype=np.float32)
    assert value_of("float8_e4m3fn", cast(number, "float32", "float8_e4m3fn").item()) == 1.125
    third = cast(np.array([3.1875], dtype=np.float32), "float32", "bfloat16")
    assert (
        value_of("float8_e4m3fn", cast(third, "bfloat16", "float8_e4m3fn", (1.0625 + 2**-20) / 3.1875).item()) == 1.125
    )


def test_float16_saturates_and_bfloat16_does_not():
    """Beyond 65504 float16 stays there, infinity included; bfloat16 reaches as far as float32 and then is infinite."""
    large = np.array([65519.0, 65520.0, 1e30, np.inf, -np.inf, np.nan], dtype=np.float32)
    half = cast(large, "float32", "float16").view(np.float16)
    np.testing.assert_array_equal(half, np.array([65504, 65504, 65504, 65504, -65504, np.nan], dtype=np.float16))
    found = cast(np.array([3.4e38, np.inf], dtype=np.float32), "float32", "bfloat16").view(np.uint16).tolist()
    assert [value_of("bfloat16", code) for code in found] == [math.inf, math.inf]
    np.testing.assert_array_equal(cast(large, "float32", "float32", 1e38).view(np.float32)[:3], [np.inf] * 3)


def test_elements_may_lie_at_odd_addresses():
    """What is cast need not be aligned."""
    shifted = np.zeros(4001, dtype=np.uint8)[1:]
    shifted[:] = np.arange(1000, dtype=np.float32).view(np.uint8)
    for target in sorted(CASTABLE):
        expected = cast(np.arange(1000, dtype=np.float32), "float32", target)
        np.testing.assert_array_equal(caster(Cast("float32", target))(shifted), expected)
        odd = np.zeros(len(expected) + 1, dtype=np.uint8)[1:]
        odd[:] = expected
        back = caster(Cast(target, "float16"))
        np.testing.assert_array_equal(back(odd), back(expected))


def test_without_ml_dtypes_a_cast_says_what_to_install(monkeypatch):
    """Types that NumPy lacks need the extra `dtypes`; nothing is copied then, and float16 and float32 need nothing."""
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    zero = np.zeros(1, dtype=np.int64)
    right = Copy(zero, zero, zero, zero, (), 4)
    memory, out = np.full(64, 0x47, dtype=np.uint8), np.zeros(64, dtype=np.uint8)
    buffer = HostBuffer(memory)
    for source, target in (("bfloat16", "float32"), ("float32", "bfloat16"), ("float8_e4m3fn", "float16")):
        assert not buffer.can_cast(source, target)
        copies = [right, Copy(zero, zero + 8, zero, zero, (), 4, Cast(source, target))]
        with pytest.raises(UnsupportedError, match=r"pip install 'kvxfer\[dtypes\]'"):
            buffer.pack(copies, out)
        with pytest.raises(UnsupportedError, match=r"pip install 'kvxfer\[dtypes\]'"):
            buffer.unpack(copies, out)
        with pytest.raises(UnsupportedError, match=r"pip install 'kvxfer\[dtypes\]'"):
            caster(Cast(source, target))
    assert not out.any() and (memory == 0x47).all()
    buffer.pack([Copy(zero, zero, zero, zero, (), 8, Cast("float32", "float16"))], out).wait()
    assert out[:4].any()


def test_an_ml_dtypes_that_cannot_be_imported_is_an_unsupported_cast(monkeypatch):
    """Installed but broken, it fails the cast by name and not with the error of another library."""
    monkeypatch.setattr("kvxfer.buffers.host_cast.find_spec", lambda _: object())
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(UnsupportedError, match="installed but broken"):
        caster(Cast("bfloat16", "float32"))


def test_only_four_types_are_cast():
    """Integers, float64 and the other float8 types are not."""
    others = set(DTYPE_NBYTES) - CASTABLE
    assert not any(can_cast(a, b) or can_cast(b, a) for a in DTYPE_NBYTES for b in others)
    with pytest.raises(UnsupportedError, match="float64"):
        caster(Cast("float64", "float32"))

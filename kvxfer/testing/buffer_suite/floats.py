# SPDX-License-Identifier: Apache-2.0
"""Values of floating-point types, computed from their definition: the oracle for casts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]
    Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Format:
    """A floating-point format: a sign, then bits of the exponent and of the fraction.

    Attributes:
        largest: largest value that a cast returns; codes above it are no numbers, or a cast saturates.
        infinite: it has infinities, and a cast overflows to them.
    """

    nbytes: int
    exponent: int
    fraction: int
    largest: float
    infinite: bool

    def value(self, code: int) -> float:
        """Value of a code without its sign; for infinity, the number that would follow the largest."""
        bias = (1 << self.exponent - 1) - 1
        exponent, fraction = code >> self.fraction, code & (1 << self.fraction) - 1
        if exponent == 0:
            return math.ldexp(fraction, 1 - bias - self.fraction)
        return math.ldexp((1 << self.fraction) + fraction, exponent - bias - self.fraction)


FORMATS: Final = {
    "bfloat16": _Format(2, 8, 7, math.ldexp(255, 120), infinite=True),
    "float16": _Format(2, 5, 10, 65504.0, infinite=False),
    "float8_e4m3fn": _Format(1, 4, 3, 448.0, infinite=False),
    "float8_e5m2": _Format(1, 5, 2, 57344.0, infinite=False),
}


@lru_cache(maxsize=5)
def _magnitudes(name: str) -> Doubles:
    """Values of all codes without sign that casts return."""
    form = FORMATS[name]
    values = [form.value(code) for code in range(1 << form.exponent + form.fraction)]
    end = values.index(form.largest) + (2 if form.infinite else 1)
    return np.array(values[:end])


def decoded(name: str, elements: Bytes) -> Doubles:
    """Values of elements."""
    if name == "float32":
        with np.errstate(invalid="ignore"):  # a signalling NaN is a value like any other
            return elements.view(np.float32).astype(np.float64)
    form = FORMATS[name]
    codes = elements.view(f"u{form.nbytes}").astype(np.int64)
    sign, magnitude = codes >> (8 * form.nbytes - 1), codes & (1 << 8 * form.nbytes - 1) - 1
    values: list[float] = []
    for code in magnitude.tolist():
        value = form.value(code)
        if value > form.largest:
            ieee = name != "float8_e4m3fn"
            value = math.inf if ieee and code & (1 << form.fraction) - 1 == 0 else math.nan
        values.append(value)
    signed: Doubles = np.where(sign == 1, -1.0, 1.0) * np.array(values)
    return signed


def cast(elements: Bytes, source: str, target: str, factor: float) -> Bytes:
    """Elements as `kvxfer.memory.copies.Cast` defines them, as bytes; NaN has any of its codes."""
    with np.errstate(all="ignore"):
        products: npt.NDArray[np.float32] = decoded(source, elements).astype(np.float32) * np.float32(factor)
    if target == "float32":
        return products.view(np.uint8)
    form, known = FORMATS[target], _magnitudes(target)
    sizes = np.minimum(np.abs(products.astype(np.float64)), known[-1])
    above = np.clip(np.searchsorted(known, sizes), 1, len(known) - 1)
    down, up = sizes - known[above - 1], known[above] - sizes
    # Of two equally near values, the one whose last bit is 0.
    nearest = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)
    nearest = np.where(np.isnan(products), (1 << 8 * form.nbytes - 1) - 1, nearest)
    codes = nearest + (np.signbit(products).astype(np.int64) << 8 * form.nbytes - 1)
    bits: Bytes = codes.astype(f"u{form.nbytes}").view(np.uint8)
    return bits


def same_elements(found: bytes, expected: Bytes, name: str) -> None:
    """Assert that both are the same elements; all NaN are equal.

    Raises:
        AssertionError: they differ.
    """
    size = 4 if name == "float32" else FORMATS[name].nbytes
    got = np.frombuffer(found, np.uint8)
    assert len(got) == len(expected), f"{len(got)} bytes and not {len(expected)}"
    differ = (got.reshape(-1, size) != expected.reshape(-1, size)).any(axis=1)
    differ &= ~(np.isnan(decoded(name, got)) & np.isnan(decoded(name, expected)))
    wrong: list[Any] = np.flatnonzero(differ).tolist()
    if wrong:
        i = wrong[0]
        is_, should = (decoded(name, each[i * size : (i + 1) * size])[0] for each in (got, expected))
        raise AssertionError(f"{len(wrong)} elements of {name} are wrong; the first, {i}, is {is_} and not {should}")


def some_elements(name: str, number: int, seed: int) -> Bytes:
    """Elements of all magnitudes of a cache, without those that a device may flush to 0; special values come first."""
    rng = np.random.default_rng(seed)
    if name == "float32":
        special = [
            0.0,
            -0.0,
            math.inf,
            -math.inf,
            math.nan,
            448.0,
            464.0,
            -480.0,
            65504.0,
            65520.0,
            1e30,
            -3.4028234e38,
        ]
        # Halfway between two numbers of a shorter type, and one step of float32 beside.
        ties = np.array([1.0625, 1.1875, 17.0, 19.0, 1.00390625, 1.01171875, 1.00048828125, 2.0**-10, 3 * 2.0**-10])
        near = [np.nextafter(np.float32(tie), np.float32(way)) for tie in ties.tolist() for way in (0.0, 1e9)]
        values = np.concatenate([np.array(special), ties, -ties, np.array(near, dtype=np.float64)])
        rest = rng.normal(size=number) * 2.0 ** rng.integers(-14, 12, number)
        singles: npt.NDArray[np.float32] = np.concatenate([values, rest])[:number].astype(np.float32)
        return singles.view(np.uint8)
    form = FORMATS[name]
    if form.nbytes == 1:
        return np.resize(np.arange(256, dtype=np.uint8), number)
    codes = rng.permutation(1 << 16)[:number].astype(np.uint16)
    top = codes >> form.fraction & (1 << form.exponent) - 1
    if name == "bfloat16":
        codes[top < 20] |= np.uint16(1 << 14)
    special = [
        code << form.fraction for code in (0, 1 << form.exponent, (1 << form.exponent) - 1, (2 << form.exponent) - 1)
    ]
    codes[: len(special)] = special
    return codes.view(np.uint8)

# SPDX-License-Identifier: Apache-2.0
"""Conversion between floating-point types in host memory, bit by bit as `Cast` defines it.

bfloat16 and float8 are types of the library ml_dtypes, which is imported when a cast first needs it.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvxfer.errors import UnsupportedError
from kvxfer.layout.dtypes import CASTABLE, DTYPE_NBYTES, LARGEST

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvxfer.memory.copies import Cast

    Bytes = npt.NDArray[np.uint8]
    Floats = npt.NDArray[np.float32]

_NUMPY: Final = frozenset({"float16", "float32"})
_FLOAT8: Final = frozenset({"float8_e4m3fn", "float8_e5m2"})


def can_cast(source: str, target: str) -> bool:
    """Whether one dtype can be cast to the other here; without ml_dtypes only between types of NumPy."""
    return why_not(source, target) is None


def why_not(source: str, target: str) -> str | None:
    """Reason why the cast is not possible here, and what to install; None if it is."""
    asked = {source, target}
    if not asked <= CASTABLE:
        return f"host memory does not cast {source} to {target}"
    if not asked <= _NUMPY and find_spec("ml_dtypes") is None:
        return f"a cast of {source} to {target} needs ml_dtypes: pip install 'kvxfer[dtypes]'"
    return None


def looks_up(cast: Cast) -> bool:
    """Whether `caster` looks elements up in a table, which takes a fraction of the time of arithmetic."""
    plain = cast.source == "bfloat16" and cast.target in _FLOAT8 and cast.factor == 1
    return plain or DTYPE_NBYTES[cast.source] == 1


def caster(cast: Cast) -> Callable[[Bytes], Bytes]:
    """A function from the bytes of any number of source elements, contiguous, to new bytes of as many target elements.

    Raises:
        UnsupportedError: the cast is not supported, or it needs ml_dtypes, which is not installed.
    """
    why = why_not(cast.source, cast.target)
    if why is not None:
        raise UnsupportedError(why)
    read, written = _numpy_type(cast.source), _numpy_type(cast.target)
    factor = np.float32(cast.factor)

    def convert(elements: Bytes) -> Bytes:
        # Overflow and NaN are results that a cast defines: no warnings.
        with np.errstate(all="ignore"):
            values: Floats = elements.view(read).astype(np.float32)
            if factor != 1:
                np.multiply(values, factor, out=values)
            return _encoded(values, cast.target, written)

    if DTYPE_NBYTES[cast.source] == 1:
        # A type of one byte has 256 values: a table is 8 times as fast as ml_dtypes (0.6.0).
        table = convert(np.arange(256, dtype=np.uint8)).view(f"u{written.itemsize}")
        return lambda elements: np.take(table, elements).view(np.uint8)
    if looks_up(cast):
        return lambda elements: np.take(_float8_of_bfloat16(cast.target), elements.view(np.uint16))
    return convert


def _encoded(values: Floats, name: str, written: np.dtype[Any]) -> Bytes:
    if name in _FLOAT8:
        return np.take(_float8_of_bfloat16(name), _rounded_to_odd(values))
    if name == "float16":
        largest = np.finfo(np.float16).max
        np.clip(values, -largest, largest, out=values)
    return values.astype(written, copy=False).view(np.uint8)


def _rounded_to_odd(values: Floats) -> npt.NDArray[np.uint32]:
    """The upper halves of the bits, with the last bit set where the lower half was not 0.

    So a number between two values of bfloat16 becomes the odd one of them, which is never halfway between two values of a type
    with at least two bits less: rounding it further to nearest even gives the same result as rounding once.
    """
    bits = values.view(np.uint32)
    upper: npt.NDArray[np.uint32] = bits & np.uint32(0xFFFF)
    upper += np.uint32(0xFFFF)
    upper |= bits
    upper >>= np.uint32(16)
    return upper


@lru_cache(maxsize=2)
def _float8_of_bfloat16(name: str) -> Bytes:
    """A type of float8 of every bit pattern of bfloat16: ml_dtypes (0.6.0) takes 5 ns for an element, this table 0.5 ns."""
    patterns = np.arange(1 << 16, dtype=np.uint16).view(_numpy_type("bfloat16"))
    with np.errstate(all="ignore"):
        values = np.clip(patterns.astype(np.float32), -LARGEST[name], LARGEST[name])
        table: Bytes = values.astype(_numpy_type(name)).view(np.uint8)
    table.flags.writeable = False
    return table


def _numpy_type(name: str) -> np.dtype[Any]:
    if name in ("float16", "float32"):
        return np.dtype(name)
    try:
        import ml_dtypes  # noqa: PLC0415 - an optional dependency, for casts only
    except ImportError as error:
        raise UnsupportedError(f"casts of {name} need ml_dtypes, which is installed but broken: {error}") from error
    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return dtype

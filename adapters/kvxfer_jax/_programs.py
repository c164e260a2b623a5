# SPDX-License-Identifier: Apache-2.0
"""The two programs of a device, compiled once for each size of piece: gather units, scatter units."""

from __future__ import annotations

from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kvxfer.layout.dtypes import LARGEST

if TYPE_CHECKING:
    from collections.abc import Callable

_BITS: Final = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


class Program(NamedTuple):
    """Everything that a compiled program depends on.

    Attributes:
        shape, dtype, sharding: of the array, which is on one device.
        unit_nbytes: bytes of a unit.
        size: units of a piece.
        cast: source and target dtype of a conversion, or None.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sharding: jax.sharding.Sharding
    unit_nbytes: int
    size: int
    cast: tuple[str, str] | None


@cache
def gather(program: Program) -> Callable[..., jax.Array]:
    """A program (array, indices, factor) -> the units, one after the other."""

    def run(array: jax.Array, indices: jax.Array, factor: jax.Array) -> jax.Array:
        found = _rows(array, program.unit_nbytes).at[indices].get(mode="clip").reshape(-1)
        return found if program.cast is None else _cast(found, program.cast, factor)

    return _compiled(run, program, [])


@cache
def scatter(program: Program) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A program (array, indices, factor, values) -> (the new array, in the memory of the old one; a signal to wait for)."""

    def run(array: jax.Array, indices: jax.Array, factor: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        if program.cast is not None:
            values = _cast(values, program.cast, factor)
        bits = as_dtype(array, _BITS[array.dtype.itemsize]) if _widens(program) else array
        rows = _rows(bits, program.unit_nbytes)
        values = as_dtype(values, rows.dtype).reshape(-1, *rows.shape[1:])
        rows = rows.at[indices].set(values, mode="drop", unique_indices=True)
        return as_dtype(rows, array.dtype).reshape(array.shape), indices[0]

    values = jax.ShapeDtypeStruct((value_count(program),), value_dtype(program))
    return _compiled(run, program, [values])


def value_dtype(program: Program) -> np.dtype[Any]:
    """Type of a scatter's values: the cast's source, else the array's, or bytes where a unit is no whole number of elements."""
    if program.cast is not None:
        return numpy_dtype(program.cast[0])
    return np.dtype(np.uint8) if program.unit_nbytes % program.dtype.itemsize else program.dtype


def value_count(program: Program) -> int:
    """Number of values for a piece."""
    near = value_dtype(program).itemsize if program.cast is None else numpy_dtype(program.cast[1]).itemsize
    return program.size * program.unit_nbytes // near


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Type of NumPy or ml_dtypes by its name."""
    return np.dtype(getattr(ml_dtypes, name, name))


def as_dtype(array: jax.Array, dtype: Any) -> jax.Array:
    """The same bits as elements of another type; one-dimensional if their size differs."""
    mine, other = array.dtype.itemsize, np.dtype(dtype).itemsize
    if array.dtype == dtype:
        return array
    if mine == other:
        return jax.lax.bitcast_convert_type(array, dtype)
    flat = array.reshape(-1, other // mine) if mine < other else array.reshape(-1)
    return jax.lax.bitcast_convert_type(flat, dtype).reshape(-1)


def _widens(program: Program) -> bool:
    """Whether XLA computes a scatter in wider types, which may replace one NaN by another: JAX 0.10 on the CPU, small floats.

    A scatter of integers keeps every bit, but it, too, takes a temporary copy of the whole array. Accelerators do neither.
    """
    (device,) = program.sharding.device_set
    return device.platform == "cpu" and str(program.dtype).startswith(("bfloat16", "float8"))


def _rows(array: jax.Array, unit_nbytes: int) -> jax.Array:
    """The array with one row for each unit: where possible by a collapse of leading axes, which moves nothing on any device."""
    itemsize = array.dtype.itemsize
    for axis in range(1, array.ndim):
        if prod(array.shape[axis:]) * itemsize == unit_nbytes:
            return array.reshape(-1, *array.shape[axis:])
    if unit_nbytes % itemsize:
        return as_dtype(array, jnp.uint8).reshape(-1, unit_nbytes)
    return array.reshape(-1, unit_nbytes // itemsize)


def _cast(elements: jax.Array, cast: tuple[str, str], factor: jax.Array) -> jax.Array:
    """Convert elements as `kvxfer.memory.copies.Cast` defines."""
    source, target = (numpy_dtype(name) for name in cast)
    values = as_dtype(elements, source).astype(jnp.float32) * factor
    largest = LARGEST.get(cast[1])
    if largest is not None:
        values = jnp.clip(values, -largest, largest)
    return values.astype(target)


def _compiled(run: Callable[..., Any], program: Program, more: list[Any]) -> Callable[..., Any]:
    array = jax.ShapeDtypeStruct(program.shape, program.dtype, sharding=program.sharding)
    indices = jax.ShapeDtypeStruct((program.size,), jnp.int32)
    factor = jax.ShapeDtypeStruct((), jnp.float32)
    donated = (0,) if more else ()
    compiled: Callable[..., Any] = jax.jit(run, donate_argnums=donated).lower(array, indices, factor, *more).compile()
    return compiled

# SPDX-License-Identifier: Apache-2.0
"""The arrays of an engine's cache, which the engine and kvxfer have in turn.

A jax.Array never changes. What writes to a cache, a step of the engine or a transfer that arrives, *donates* the old array
and gets a new one in the same memory. Two that do so at the same time would each donate an array that the other holds: so
there is one place where the present arrays are, and whoever wants to use them takes them, and gives back what they became.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from kvxfer.buffers.background import Turn
from kvxfer.buffers.index_gather import paged, stand_in
from kvxfer.errors import UnsupportedBufferError
from kvxfer.layout.dtypes import DTYPE_NBYTES
from kvxfer.memory.arrays import ArrayView

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import jax
    import numpy as np


class Arrays:
    """The present arrays of a cache, one for each layer or for several, and whose turn it is.

    ::

        with arrays.turn() as caches:  # a list
            caches[:] = step(caches)  # with donate_argnums: the old ones are gone

    In between, kvxfer packs from them and unpacks into them, on threads of its own. A turn is as long as it takes to *start*
    what uses the arrays, not until that is computed: JAX orders the rest by itself. The engine must not use an array that it
    had in an earlier turn; JAX raises "Array has been deleted" if something has been unpacked since.

    Args:
        arrays: in the order in which `turn` gives them. Any sharding over the heads; see `shares`.

    Raises:
        UnsupportedBufferError: something is no jax.Array, or was deleted.
    """

    def __init__(self, arrays: Iterable[jax.Array]) -> None:
        self._arrays = list(arrays)
        self._turn = Turn()
        for array in self._arrays:
            if not isinstance(array, _jax().Array):
                raise UnsupportedBufferError(f"a {type(array).__name__} is no jax.Array")
        self._facts = [_facts(array) for array in self._arrays]
        self._check(self._arrays)
        self._bases = [[stand_in() for _ in array.addressable_shards] for array in self._arrays]

    def __len__(self) -> int:
        return len(self._arrays)

    @contextmanager
    def turn(self) -> Iterator[list[jax.Array]]:
        """Take the arrays, and give back what is in the list at the end, also if an error ends it. Any thread."""
        arrays = self.take()
        try:
            yield arrays
        except BaseException:
            # That is what has to be told, whatever it left in the list.
            with suppress(UnsupportedBufferError):
                self.give(arrays)
            raise
        self.give(arrays)

    def take(self, timeout_s: float | None = None) -> list[jax.Array]:
        """Begin a turn, when the present one is over; for engines that cannot use `turn`. Any thread.

        Raises:
            TimeoutError: the present turn was not over in time.
        """
        if not self._turn.take(timeout_s):
            raise TimeoutError("somebody else has had the arrays of this cache for too long")
        return list(self._arrays)

    def give(self, arrays: Sequence[jax.Array]) -> None:
        """End a turn: these are the present arrays from now on. Any thread.

        Raises:
            UnsupportedBufferError: they are not the same in number, shape, dtype or sharding, or one was donated and not
                replaced. The turn is over all the same, with the arrays it began with.
        """
        try:
            self._check(arrays)
            self._arrays = list(arrays)
        finally:
            self._turn.give()

    def _check(self, arrays: Sequence[jax.Array]) -> None:
        if len(arrays) != len(self._facts):
            raise UnsupportedBufferError(f"a cache of {len(self._facts)} arrays became one of {len(arrays)}")
        for array, facts in zip(arrays, self._facts, strict=True):
            if not _alike(_facts(array), facts):
                raise UnsupportedBufferError(f"an array of the cache was {facts} and became {_facts(array)}")
            if array.is_deleted():
                raise UnsupportedBufferError("an array of the cache was donated, and what it became was not given back")

    def shares(
        self, names: Sequence[str], *, order: str = "NHD", heads: int | None = None, components: int = 1
    ) -> list[Share]:
        """What each device has of the cache: arguments for `kvxfer.KVCache.from_layers`, for one rank each.

        Args:
            names: of the layers. Each has one array, or ``components`` of them (K and V), one after the other.
            order: ``NHD``: arrays are ``[block, token, head, ...]``, or ``HND``: ``[block, head, token, ...]``; what
                follows is the content of a token of a head.
            heads: KV heads of the whole array, where its axis of heads is something else, such as K and V of each head in
                turn, or is split: in the order ``NHD``, all that follows the tokens holds so many heads.
            components: arrays of one layer.

        Raises:
            UnsupportedBufferError: the arrays are not like that, or are sharded along another axis than the heads', or not
                all in the same way, or several devices have the same heads.
        """
        if len(names) * components != len(self._arrays):
            raise UnsupportedBufferError(
                f"{len(self._arrays)} arrays are not {components} for each of {len(names)} layers"
            )
        with self.turn() as arrays:
            ranks = [_ranks(array, order, heads) for array in arrays]
        if any(each != ranks[0] for each in ranks):
            raise UnsupportedBufferError("the arrays of a cache must be sharded alike")
        if len(set(ranks[0])) != len(ranks[0]):
            raise UnsupportedBufferError("several devices have copies of the same heads, of which one would be written")
        found = []
        for shard, (start, stop, total) in enumerate(ranks[0]):
            views = [self.place(number, shard).paged(order, stop - start) for number in range(len(self._arrays))]
            layers = {name: views[i * components : (i + 1) * components] for i, name in enumerate(names)}
            world = total // (stop - start)
            found.append(Share(layers, start, total, start // (stop - start), world, views[0].device))
        return found

    def place(self, number: int, shard: int = 0) -> Place:
        """One device's part of one array: ``shard`` counts those that this process has."""
        with self.turn() as arrays:
            part = _parts(arrays[number])[shard]
            if str(part.dtype) not in DTYPE_NBYTES or not part.size:
                raise UnsupportedBufferError(f"an array of shape {part.shape} and {part.dtype} is no cache")
            (device,) = part.devices()
            base = self._bases[number][shard]
            return Place(self, number, shard, part.shape, part.dtype, part.sharding, f"jax:{device.id}", base)


@dataclass(frozen=True, eq=False)
class Place:
    """One device's part of one of the `Arrays`.

    Attributes:
        shard: among the parts that this process has.
        shape, dtype, sharding: of the part.
        device: where it lies.
        base: what stands for its address where kvxfer tells allocations apart by address. Nobody reads memory there.
    """

    arrays: Arrays
    number: int
    shard: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sharding: jax.sharding.Sharding
    device: str
    base: int

    @property
    def nbytes(self) -> int:
        """Of the part."""
        return prod(self.shape) * self.dtype.itemsize

    def parts_of(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """All parts of the array that this process has, in a turn: arrays that share their memory with the whole."""
        return _parts(arrays[self.number])

    def put_together(self, arrays: list[jax.Array], parts: list[jax.Array]) -> None:
        """Some of the parts were donated, in a turn, and became others."""
        whole = arrays[self.number]
        if isinstance(whole.sharding, _jax().sharding.SingleDeviceSharding):
            (arrays[self.number],) = parts
        else:
            arrays[self.number] = _jax().make_array_from_single_device_arrays(whole.shape, whole.sharding, parts)

    def paged(self, order: str, heads: int) -> ArrayView:
        """As ``[block, head, token, content]``."""
        shape, steps = paged(self.shape, self.dtype.itemsize, order, heads)
        allocation = (self.base, self.base + self.nbytes)
        return ArrayView(self.base, shape, steps, self.dtype.itemsize, str(self.dtype), allocation, self, self.device)


@dataclass(frozen=True, eq=False)
class Share:
    """What one device has of a cache: one rank's part.

    ::

        KVCache.from_layers(share.layers, buffers=JaxBuffer, **share.place, fingerprint=...)
    """

    layers: Mapping[str, Sequence[ArrayView]]
    head_start: int
    heads_total: int
    rank: int
    world: int
    device: str

    @property
    def place(self) -> dict[str, Any]:
        """Where it stands among the others."""
        return {
            "head_start": self.head_start,
            "heads_total": self.heads_total,
            "rank": self.rank,
            "world": self.world,
        }


def _jax() -> Any:
    """The library, which is not imported before somebody has an array of it."""
    import jax  # noqa: PLC0415

    return jax


def _parts(array: jax.Array) -> list[jax.Array]:
    """The parts of an array that this process has, each on one device."""
    if array.is_deleted():
        raise UnsupportedBufferError("the array was deleted: something donated it and did not give back what it became")
    if isinstance(array.sharding, _jax().sharding.SingleDeviceSharding):
        return [array]
    return [part.data for part in array.addressable_shards]


def _facts(array: jax.Array) -> tuple[Any, ...]:
    return array.shape, array.dtype, array.sharding


def _alike(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Compiled programs may say of what they return in other words how it is sharded."""
    (shape, dtype, sharding), (its_shape, its_dtype, its_sharding) = one, other
    return (shape, dtype) == (its_shape, its_dtype) and (
        sharding is its_sharding or sharding == its_sharding or sharding.is_equivalent_to(its_sharding, len(shape))
    )


def _ranks(array: jax.Array, order: str, heads: int | None) -> list[tuple[int, int, int]]:
    """For each part (first head, end, heads in all)."""
    axis = 1 if order == "HND" else 2
    whole = array.shape[axis] if axis < array.ndim else 1
    total = whole if heads is None else heads
    paged(array.shape, array.dtype.itemsize, order, total)
    found = []
    for part in array.addressable_shards:
        spans = [each.indices(extent)[:2] for each, extent in zip(part.index, array.shape, strict=True)]
        start, stop = spans.pop(axis)
        others = array.shape[:axis] + array.shape[axis + 1 :]
        if spans != [(0, extent) for extent in others] or start * total % whole or stop * total % whole:
            raise UnsupportedBufferError(f"an array sharded otherwise than between heads: {array.sharding}")
        found.append((start * total // whole, stop * total // whole, total))
    return found

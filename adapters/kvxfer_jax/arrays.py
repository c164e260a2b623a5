# SPDX-License-Identifier: Apache-2.0
"""The arrays of an engine's cache, which the engine and kvxfer use in turns.

A jax.Array never changes. A write to a cache, by a step of the engine or by a transfer that arrives, *donates* the old array
and returns a new one in the same memory. Two writers at the same time would each donate an array that the other still uses.
So `Arrays` holds the present arrays: each side takes them for a turn, and gives back what they have become.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from kvxfer.buffers.fair_lock import FairLock
from kvxfer.buffers.index_gather import paged, stand_in
from kvxfer.errors import UnsupportedBufferError
from kvxfer.layout.dtypes import DTYPE_NBYTES
from kvxfer.memory.arrays import ArrayView

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import jax
    import numpy as np


class Arrays:
    """The present arrays of a cache, one for each layer or for several, and the lock for taking turns with them.

    ::

        with arrays.turn() as caches:  # a list
            caches[:] = step(caches)  # with donate_argnums: the old ones are gone

    Between these turns kvxfer packs from the arrays and unpacks into them, on threads of its own. A turn lasts until the
    computation that uses the arrays has *started*, not until it has ended: JAX orders the rest by itself. The engine must not
    use an array from an earlier turn; JAX raises "Array has been deleted" if blocks have been unpacked since.

    Args:
        arrays: in the order in which `turn` gives them. Any sharding over the heads; see `shares`.

    Raises:
        UnsupportedBufferError: an element is no jax.Array, or was deleted.
    """

    def __init__(self, arrays: Iterable[jax.Array]) -> None:
        self._arrays = list(arrays)
        self._turn = FairLock()
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
        """Take the arrays for a turn; at its end, also by an error, the list becomes the present arrays. Any thread."""
        arrays = self.take()
        try:
            yield arrays
        except BaseException:
            # That error is to be raised, whatever the list contains.
            with suppress(UnsupportedBufferError):
                self.give(arrays)
            raise
        self.give(arrays)

    def take(self, timeout_s: float | None = None) -> list[jax.Array]:
        """Begin a turn when the present one is over; for engines that cannot use `turn`. Any thread.

        Raises:
            TimeoutError: the present turn was not over in time.
        """
        if not self._turn.acquire(timeout_s):
            raise TimeoutError("another thread has held the arrays of this cache for too long")
        return list(self._arrays)

    def give(self, arrays: Sequence[jax.Array]) -> None:
        """End a turn and make these the present arrays. Any thread.

        Raises:
            UnsupportedBufferError: the arrays differ in number, shape, dtype or sharding from those before, or one was donated
                and not replaced. The turn ends all the same, and the present arrays stay those with which it began.
        """
        try:
            self._check(arrays)
            self._arrays = list(arrays)
        finally:
            self._turn.release()

    def _check(self, arrays: Sequence[jax.Array]) -> None:
        if len(arrays) != len(self._facts):
            raise UnsupportedBufferError(f"a cache of {len(self._facts)} arrays became one of {len(arrays)}")
        for array, facts in zip(arrays, self._facts, strict=True):
            if not _alike(_facts(array), facts):
                raise UnsupportedBufferError(f"an array of the cache was {facts} and became {_facts(array)}")
            if array.is_deleted():
                raise UnsupportedBufferError(
                    "an array of the cache was donated, and the array that it became was not given back"
                )

    def shares(
        self, names: Sequence[str], *, order: str = "NHD", heads: int | None = None, components: int = 1
    ) -> list[Share]:
        """Each device's share of the cache: arguments for `kvxfer.KVCache.from_layers`, for one rank each.

        Args:
            names: names of the layers. Each layer has one array, or ``components`` arrays (K and V), one after the other.
            order: ``NHD``: arrays are ``[block, token, head, ...]``, or ``HND``: ``[block, head, token, ...]``; what
                follows is the content of a token of a head.
            heads: KV heads of the whole array, where its axis of heads is something else, such as K and V of each head in
                turn, or is split: in the order ``NHD``, all that follows the tokens holds so many heads.
            components: arrays of one layer.

        Raises:
            UnsupportedBufferError: the arrays do not have this form, are sharded along another axis than the heads' or not all
                in the same way, or several devices have the same heads.
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
            raise UnsupportedBufferError(
                "several devices have copies of the same heads, and only one of them would be written"
            )
        found = []
        for shard, (start, stop, total) in enumerate(ranks[0]):
            views = [self.part(number, shard).paged(order, stop - start) for number in range(len(self._arrays))]
            layers = {name: views[i * components : (i + 1) * components] for i, name in enumerate(names)}
            world = total // (stop - start)
            found.append(Share(layers, start, total, start // (stop - start), world, views[0].device))
        return found

    def part(self, number: int, shard: int = 0) -> ArrayPart:
        """One device's part of one array; ``shard`` counts the parts that this process has."""
        with self.turn() as arrays:
            part = _parts(arrays[number])[shard]
            if str(part.dtype) not in DTYPE_NBYTES or not part.size:
                raise UnsupportedBufferError(f"an array of shape {part.shape} and {part.dtype} is no cache")
            (device,) = part.devices()
            base = self._bases[number][shard]
            return ArrayPart(self, number, shard, part.shape, part.dtype, part.sharding, f"jax:{device.id}", base)


@dataclass(frozen=True, eq=False)
class ArrayPart:
    """One device's part of one of the `Arrays`.

    Attributes:
        shard: number of the part among those that this process has.
        shape, dtype, sharding: of the part.
        device: on which it lies.
        base: number in place of an address, by which kvxfer tells allocations apart. No memory is read there.
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
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the part."""
        return prod(self.shape) * self.dtype.itemsize

    def parts_of(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """All parts of the array that this process has, as arrays that share its memory. In a turn."""
        return _parts(arrays[self.number])

    def put_together(self, arrays: list[jax.Array], parts: list[jax.Array]) -> None:
        """Replace the whole array after some of its parts were donated and became others. In a turn."""
        whole = arrays[self.number]
        if isinstance(whole.sharding, _jax().sharding.SingleDeviceSharding):
            (arrays[self.number],) = parts
        else:
            arrays[self.number] = _jax().make_array_from_single_device_arrays(whole.shape, whole.sharding, parts)

    def paged(self, order: str, heads: int) -> ArrayView:
        """The part as a view ``[block, head, token, content]``."""
        shape, steps = paged(self.shape, self.dtype.itemsize, order, heads)
        allocation = (self.base, self.base + self.nbytes)
        return ArrayView(self.base, shape, steps, self.dtype.itemsize, str(self.dtype), allocation, self, self.device)


@dataclass(frozen=True, eq=False)
class Share:
    """One device's share of a cache: one rank's part.

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
        """The rank's place among the others: arguments for `kvxfer.KVCache.from_layers`."""
        return {
            "head_start": self.head_start,
            "heads_total": self.heads_total,
            "rank": self.rank,
            "world": self.world,
        }


def _jax() -> Any:
    """The library, imported no earlier than the first array is given."""
    import jax  # noqa: PLC0415

    return jax


def _parts(array: jax.Array) -> list[jax.Array]:
    """Parts of an array that this process has, each on one device."""
    if array.is_deleted():
        raise UnsupportedBufferError(
            "the array was deleted: it was donated, and the array that it became was not given back"
        )
    if isinstance(array.sharding, _jax().sharding.SingleDeviceSharding):
        return [array]
    return [part.data for part in array.addressable_shards]


def _facts(array: jax.Array) -> tuple[Any, ...]:
    return array.shape, array.dtype, array.sharding


def _alike(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether both are equal; compiled programs may describe the same sharding in another way."""
    (shape, dtype, sharding), (its_shape, its_dtype, its_sharding) = one, other
    return (shape, dtype) == (its_shape, its_dtype) and (
        sharding is its_sharding or sharding == its_sharding or sharding.is_equivalent_to(its_sharding, len(shape))
    )


def _ranks(array: jax.Array, order: str, heads: int | None) -> list[tuple[int, int, int]]:
    """(first head, end, heads of the whole array) of each part."""
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

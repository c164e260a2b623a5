# SPDX-License-Identifier: Apache-2.0
"""`JaxBuffer`: one device's part of a jax.Array."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from kvxfer.buffers.background import Background
from kvxfer.buffers.base import DeviceBuffer
from kvxfer.errors import UnsupportedBufferError
from kvxfer.layout.dtypes import CASTABLE
from kvxfer.memory.arrays import ArrayView
from kvxfer_jax.arrays import Arrays, Place

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import jax

    from kvxfer.buffers.base import Bytes, Completion, Shares
    from kvxfer.memory.copies import Copy

_background: Final = Background("kvxfer-jax", threads=2)
"""One job may take the arrays and start programs while the one before waits for its bytes."""


class JaxBuffer(DeviceBuffer):
    """One device's part of a jax.Array; it gives no address, so what moves is packed.

    Packing gathers on the device, in the order in which the bytes lie in the chunk, and copies the result to the host once.
    Unpacking copies to the device once and scatters there, with donation: the array is updated in its memory. Programs are
    compiled once for each size of piece, whatever requests look like. All of it happens on two threads of this module, in
    the turns of the `Arrays` to which the array belongs.

    Args:
        place: an array on one device, for a cache of one array; or where an array of `Arrays` lies
            (`kvxfer.KVCache.from_layers` hands over all views of it that `Arrays.shares` made).

    Raises:
        UnsupportedBufferError: it is neither, or an array of several devices, or has elements of less than a byte.
    """

    def __init__(self, *places: Any) -> None:
        if not places:
            raise UnsupportedBufferError("a buffer needs an array")
        found = [_place_of(place) for place in places]
        first = found[0]
        if any((each.arrays, each.number, each.shard) != (first.arrays, first.number, first.shard) for each in found):
            raise UnsupportedBufferError("the views are not of one array: make one buffer for each")
        self.place: Place = first

    @classmethod
    def why_unavailable(cls) -> str | None:
        """None, or that JAX is not installed."""
        return None if find_spec("jax") else "jax is not installed: pip install 'kvxfer[jax]'"

    @classmethod
    def view_of(cls, array: Any) -> ArrayView:
        """A view that `Arrays.shares` made."""
        if isinstance(array, ArrayView) and isinstance(array.owner, Place):
            return array
        raise UnsupportedBufferError("the layers of a cache of jax.Arrays are what kvxfer_jax.Arrays.shares says")

    @property
    def array(self) -> jax.Array:
        """What the array is now: of this device alone. Not to be kept, see `Arrays`."""
        with self.arrays.turn() as arrays:
            return self.place.parts_of(arrays)[self.place.shard]

    @property
    def arrays(self) -> Arrays:
        """To which it belongs."""
        return self.place.arrays

    @property
    def memory(self) -> None:
        """XLA gives no address."""

    @property
    def nbytes(self) -> int:
        """Of this device's part."""
        return self.place.nbytes

    @property
    def device(self) -> str:
        """``jax:`` and the number that JAX has for the device."""
        return self.place.device

    def can_cast(self, source: str, target: str) -> bool:
        """Between bfloat16, float16, float32 and float8_e4m3fn."""
        return source in CASTABLE and target in CASTABLE

    def _pack(self, copies: Sequence[Copy], out: Bytes) -> Completion:
        return _background.start(partial(_jobs().pack, [(self.place, copies)], out))

    def _unpack(self, copies: Sequence[Copy], packed: Bytes) -> Completion:
        return _background.start(partial(_jobs().unpack, [(self.place, copies)], packed))

    @classmethod
    def _pack_all(cls, shares: Shares, out: Bytes) -> list[Completion]:
        return [_background.start(partial(_jobs().pack, mine, out)) for mine in _by_turn(shares)]

    @classmethod
    def _unpack_all(cls, shares: Shares, packed: Bytes) -> list[Completion]:
        return [_background.start(partial(_jobs().unpack, mine, packed)) for mine in _by_turn(shares)]


def _by_turn(shares: Shares) -> Iterable[list[tuple[Place, Sequence[Copy]]]]:
    """What can be done in one turn."""
    found: dict[Arrays, list[tuple[Place, Sequence[Copy]]]] = defaultdict(list)
    for buffer, copies in shares:
        if isinstance(buffer, JaxBuffer):
            found[buffer.arrays].append((buffer.place, copies))
    return found.values()


def _place_of(place: Any) -> Place:
    if isinstance(place, ArrayView):
        place = place.owner
    if isinstance(place, Place):
        return place
    arrays = Arrays([place])
    if len(place.sharding.device_set) != 1:
        raise UnsupportedBufferError("an array of several devices is a buffer for each: see kvxfer_jax.Arrays.shares")
    return arrays.place(0)


def _jobs() -> Any:
    """What needs JAX, for those who have it."""
    from kvxfer_jax import _jobs  # noqa: PLC0415

    return _jobs

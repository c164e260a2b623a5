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
from kvxfer.layout.dtypes import CASTABLE_ON_DEVICES
from kvxfer.memory.arrays import ArrayView
from kvxfer_jax.arrays import ArrayPart, Arrays

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import jax

    from kvxfer.buffers.base import BufferCopies, Bytes, Completion
    from kvxfer.memory.copies import Copy

_background: Final = Background("kvxfer-jax", threads=2)
"""A job may take the arrays and start programs while the job before it waits for its bytes."""


class JaxBuffer(DeviceBuffer):
    """One device's part of a jax.Array. XLA gives no address, so all transfers are packed.

    Packing gathers on the device, in the order in which the bytes lie in the chunk, and copies the result to the host once.
    Unpacking copies to the device once and scatters there, with donation: the array is updated in its memory. Programs are
    compiled once for each size of piece, whatever the requests. All of it runs on two threads of this module, in turns of the
    `Arrays` to which the array belongs.

    Args:
        parts: an array on one device, for a cache of one array; or a part of an array of `Arrays`
            (`kvxfer.KVCache.from_layers` passes all views of it that `Arrays.shares` made).

    Raises:
        UnsupportedBufferError: neither of these, an array of several devices, or elements of less than a byte.
    """

    def __init__(self, *parts: Any) -> None:
        if not parts:
            raise UnsupportedBufferError("a buffer needs an array")
        found = [_part_of(part) for part in parts]
        first = found[0]
        if any((each.arrays, each.number, each.shard) != (first.arrays, first.number, first.shard) for each in found):
            raise UnsupportedBufferError("the views are not of one array: make one buffer for each")
        self.part: ArrayPart = first

    @classmethod
    def why_unavailable(cls) -> str | None:
        """None, or that JAX is not installed."""
        return None if find_spec("jax") else "jax is not installed: pip install 'kvxfer[jax]'"

    @classmethod
    def view_of(cls, array: Any) -> ArrayView:
        """A view that `Arrays.shares` made."""
        if isinstance(array, ArrayView) and isinstance(array.owner, ArrayPart):
            return array
        raise UnsupportedBufferError("a cache of jax.Arrays is made of what kvxfer_jax.Arrays.shares returns")

    @property
    def array(self) -> jax.Array:
        """This device's part of the present array. Do not keep it, see `Arrays`."""
        with self.arrays.turn() as arrays:
            return self.part.parts_of(arrays)[self.part.shard]

    @property
    def arrays(self) -> Arrays:
        """The arrays to which it belongs."""
        return self.part.arrays

    @property
    def memory(self) -> None:
        """None: XLA gives no address."""

    @property
    def nbytes(self) -> int:
        """Bytes of this device's part."""
        return self.part.nbytes

    @property
    def device(self) -> str:
        """``jax:`` and JAX's number of the device."""
        return self.part.device

    def can_cast(self, source: str, target: str) -> bool:
        """Between bfloat16, float16, float32 and float8_e4m3fn."""
        return {source, target} <= CASTABLE_ON_DEVICES

    def _pack(self, copies: Sequence[Copy], out: Bytes) -> Completion:
        return _background.start(partial(_jobs().pack, [(self.part, copies)], out))

    def _unpack(self, copies: Sequence[Copy], packed: Bytes) -> Completion:
        return _background.start(partial(_jobs().unpack, [(self.part, copies)], packed))

    @classmethod
    def _pack_all(cls, shares: BufferCopies, out: Bytes) -> list[Completion]:
        return [_background.start(partial(_jobs().pack, mine, out)) for mine in _by_turn(shares)]

    @classmethod
    def _unpack_all(cls, shares: BufferCopies, packed: Bytes) -> list[Completion]:
        return [_background.start(partial(_jobs().unpack, mine, packed)) for mine in _by_turn(shares)]


def _by_turn(shares: BufferCopies) -> Iterable[list[tuple[ArrayPart, Sequence[Copy]]]]:
    """Work that can be done in one turn, for each `Arrays`."""
    found: dict[Arrays, list[tuple[ArrayPart, Sequence[Copy]]]] = defaultdict(list)
    for buffer, copies in shares:
        if isinstance(buffer, JaxBuffer):
            found[buffer.arrays].append((buffer.part, copies))
    return found.values()


def _part_of(part: Any) -> ArrayPart:
    if isinstance(part, ArrayView):
        part = part.owner
    if isinstance(part, ArrayPart):
        return part
    arrays = Arrays([part])
    if len(part.sharding.device_set) != 1:
        raise UnsupportedBufferError(
            "an array of several devices needs a buffer for each: see kvxfer_jax.Arrays.shares"
        )
    return arrays.part(0)


def _jobs() -> Any:
    """The module that needs JAX, imported at first use."""
    from kvxfer_jax import _jobs  # noqa: PLC0415

    return _jobs

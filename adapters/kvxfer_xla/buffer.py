# SPDX-License-Identifier: Apache-2.0
"""`XlaBuffer`: a tensor of torch_xla."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from math import prod
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kvxfer.buffers.background import Background, Turn
from kvxfer.buffers.base import DeviceBuffer
from kvxfer.buffers.index_gather import paged, stand_in
from kvxfer.errors import UnsupportedBufferError
from kvxfer.layout.dtypes import CASTABLE, DTYPE_NBYTES
from kvxfer.memory.arrays import ArrayView

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from kvxfer.buffers.base import Bytes, Completion, Shares
    from kvxfer.memory.copies import Copy

TURN: Final = Turn()
"""Held by whoever uses tensors of caches: torch_xla records what is done to tensors, for all threads of a process in common,
and `torch_xla.sync` carries out whatever is recorded by then."""

_background: Final = Background("kvxfer-xla", threads=2)
"""One job may record and start programs while the one before waits for its bytes."""


class Facts(NamedTuple):
    """A tensor, and what never changes of it."""

    tensor: torch.Tensor
    shape: tuple[int, ...]
    itemsize: int
    device: str

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return prod(self.shape) * self.itemsize


class XlaBuffer(DeviceBuffer):
    """A tensor of torch_xla; it gives no address, so what moves is packed.

    Packing gathers on the device, in the order in which the bytes lie in the chunk, and copies the result to the host.
    Unpacking copies to the device and scatters there; the tensor is a donor of its memory to what it becomes, so the cache
    is updated in place. Graphs have few shapes, whatever requests look like, and are compiled once. All of it happens on two
    threads of this module.

    An engine in the same process holds `TURN` while it records a step that uses its caches and calls `torch_xla.sync`, and
    not while that is computed: torch_xla orders the rest by itself. It goes on using its tensor, which stays the same object.

    Args:
        tensor: on an XLA device, not sharded; or the views of one that `layer` made
            (`kvxfer.KVCache.from_layers` hands them over).

    Raises:
        UnsupportedBufferError: it is none.
    """

    def __init__(self, *tensors: Any) -> None:
        found = [tensor.owner if isinstance(tensor, ArrayView) else tensor for tensor in tensors]
        if not found or any(each is not found[0] for each in found):
            raise UnsupportedBufferError("a buffer is made of one tensor: make one for each")
        self.tensor: torch.Tensor = _checked(found[0])
        """The engine's own. To be asked for anything, even its size, in a turn only."""
        shape, itemsize = tuple(self.tensor.shape), int(self.tensor.element_size())
        self.facts: Facts = Facts(self.tensor, shape, itemsize, str(self.tensor.device))

    @classmethod
    def why_unavailable(cls) -> str | None:
        """None, or that torch_xla is not installed."""
        return None if find_spec("torch_xla") else "torch_xla is not installed: pip install 'kvxfer[xla]'"

    @classmethod
    def layer(cls, tensor: torch.Tensor, *, order: str = "NHD", heads: int | None = None) -> ArrayView:
        """What `kvxfer.KVCache.from_layers` takes for a layer, or for one component of it.

        Args:
            tensor: ``[block, token, head, ...]`` in the order ``NHD``, or ``[block, head, token, ...]`` in the order ``HND``;
                what follows is the content of a token of a head.
            heads: KV heads, where the axis of heads is something else: in the order ``NHD``, all that follows the tokens
                holds so many.

        Raises:
            UnsupportedBufferError: it is no such tensor.
        """
        _checked(tensor)
        itemsize, axis = tensor.element_size(), 1 if order == "HND" else 2
        if heads is None:
            heads = tensor.shape[axis] if axis < tensor.dim() else 1
        shape, strides = paged(tensor.shape, itemsize, order, heads)
        base, name = stand_in(), str(tensor.dtype).removeprefix("torch.")
        return ArrayView(base, shape, strides, itemsize, name, (base, base + tensor.nbytes), tensor, str(tensor.device))

    @classmethod
    def view_of(cls, array: Any) -> ArrayView:
        """A view that `layer` made, or a tensor in the order ``NHD``."""
        return array if isinstance(array, ArrayView) else cls.layer(array)

    @property
    def memory(self) -> None:
        """XLA gives no address."""

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return self.facts.nbytes

    @property
    def device(self) -> str:
        """As torch_xla writes it: ``xla:0``."""
        return self.facts.device

    def can_cast(self, source: str, target: str) -> bool:
        """Between bfloat16, float16, float32 and float8_e4m3fn."""
        return source in CASTABLE and target in CASTABLE

    def _pack(self, copies: Sequence[Copy], out: Bytes) -> Completion:
        return _background.start(partial(_jobs().pack, [(self.facts, copies)], out, TURN))

    def _unpack(self, copies: Sequence[Copy], packed: Bytes) -> Completion:
        return _background.start(partial(_jobs().unpack, [(self.facts, copies)], packed, TURN))

    @classmethod
    def _pack_all(cls, shares: Shares, out: Bytes) -> list[Completion]:
        return [_background.start(partial(_jobs().pack, _work(shares), out, TURN))]

    @classmethod
    def _unpack_all(cls, shares: Shares, packed: Bytes) -> list[Completion]:
        return [_background.start(partial(_jobs().unpack, _work(shares), packed, TURN))]


def _work(shares: Shares) -> list[tuple[Facts, Sequence[Copy]]]:
    return [(buffer.facts, copies) for buffer, copies in shares if isinstance(buffer, XlaBuffer)]


def _jobs() -> Any:
    """What needs torch_xla, for those who have it."""
    from kvxfer_xla import _jobs  # noqa: PLC0415

    return _jobs


def _checked(tensor: Any) -> torch.Tensor:
    import torch  # noqa: PLC0415 - by now somebody has a tensor, or none

    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "xla":
        where = f"on {tensor.device}" if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
        raise UnsupportedBufferError(f"a buffer of torch_xla is made of a tensor on an XLA device, not {where}")
    if str(tensor.dtype).removeprefix("torch.") not in DTYPE_NBYTES or not tensor.numel():
        raise UnsupportedBufferError(f"a tensor of shape {tuple(tensor.shape)} and {tensor.dtype} is no cache")
    return tensor

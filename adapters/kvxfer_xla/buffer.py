# SPDX-License-Identifier: Apache-2.0
"""`XlaBuffer`: a tensor of torch_xla."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from math import prod
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kvxfer.buffers.background import Background
from kvxfer.buffers.base import DeviceBuffer
from kvxfer.buffers.fair_lock import FairLock
from kvxfer.buffers.index_gather import paged, stand_in
from kvxfer.errors import UnsupportedBufferError
from kvxfer.layout.dtypes import CASTABLE_ON_DEVICES, DTYPE_NBYTES
from kvxfer.memory.arrays import ArrayView

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from kvxfer.buffers.base import BufferCopies, Bytes, Completion
    from kvxfer.memory.copies import Copy

TURN: Final = FairLock()
"""Lock to hold while using tensors of caches: torch_xla records operations for all threads of a process together, and
`torch_xla.sync` carries out everything recorded so far."""

_background: Final = Background("kvxfer-xla", threads=2)
"""A job may record and start programs while the job before it waits for its bytes."""


class Facts(NamedTuple):
    """A tensor, and its properties that never change."""

    tensor: torch.Tensor
    shape: tuple[int, ...]
    itemsize: int
    device: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.itemsize


class XlaBuffer(DeviceBuffer):
    """A tensor of torch_xla. XLA gives no address, so all transfers are packed.

    Packing gathers on the device, in the order in which the bytes lie in the chunk, and copies the result to the host.
    Unpacking copies to the device and scatters there; the tensor donates its memory to the result, so the cache is updated in
    place. Graphs have few shapes, whatever the requests, and are compiled once. All of it runs on two threads of this module.

    An engine in the same process holds `TURN` while it records a step that uses its caches and calls `torch_xla.sync`, but
    not while the step is computed: torch_xla orders the rest by itself. The engine's tensor stays the same object.

    Args:
        tensors: one tensor on an XLA device, not sharded; or all views of it that `layer` made
            (`kvxfer.KVCache.from_layers` passes them).

    Raises:
        UnsupportedBufferError: anything else.
    """

    def __init__(self, *tensors: Any) -> None:
        found = [tensor.owner if isinstance(tensor, ArrayView) else tensor for tensor in tensors]
        if not found or any(each is not found[0] for each in found):
            raise UnsupportedBufferError("a buffer is made of one tensor: make one for each")
        self.tensor: torch.Tensor = _checked(found[0])
        """The engine's own tensor. Use it, even to ask for its size, only while holding `TURN`."""
        shape, itemsize = tuple(self.tensor.shape), int(self.tensor.element_size())
        self.facts: Facts = Facts(self.tensor, shape, itemsize, str(self.tensor.device))

    @classmethod
    def why_unavailable(cls) -> str | None:
        """None, or that torch_xla is not installed."""
        return None if find_spec("torch_xla") else "torch_xla is not installed: pip install 'kvxfer[xla]'"

    @classmethod
    def layer(cls, tensor: torch.Tensor, *, order: str = "NHD", heads: int | None = None) -> ArrayView:
        """A layer, or one component of it, for `kvxfer.KVCache.from_layers`.

        Args:
            tensor: ``[block, token, head, ...]`` in the order ``NHD``, or ``[block, head, token, ...]`` in the order ``HND``;
                the remaining axes are the content of a token of a head.
            heads: number of KV heads, for the order ``NHD`` where heads have no axis of their own: all axes after the tokens
                together hold so many heads.

        Raises:
            UnsupportedBufferError: no such tensor.
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
        """None: XLA gives no address."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.facts.nbytes

    @property
    def device(self) -> str:
        """The device as torch_xla writes it: ``xla:0``."""
        return self.facts.device

    def can_cast(self, source: str, target: str) -> bool:
        """Between bfloat16, float16, float32 and float8_e4m3fn."""
        return {source, target} <= CASTABLE_ON_DEVICES

    def _pack(self, copies: Sequence[Copy], out: Bytes) -> Completion:
        return _background.start(partial(_jobs().pack, [(self.facts, copies)], out, TURN))

    def _unpack(self, copies: Sequence[Copy], packed: Bytes) -> Completion:
        return _background.start(partial(_jobs().unpack, [(self.facts, copies)], packed, TURN))

    @classmethod
    def _pack_all(cls, shares: BufferCopies, out: Bytes) -> list[Completion]:
        return [_background.start(partial(_jobs().pack, _work(shares), out, TURN))]

    @classmethod
    def _unpack_all(cls, shares: BufferCopies, packed: Bytes) -> list[Completion]:
        return [_background.start(partial(_jobs().unpack, _work(shares), packed, TURN))]


def _work(shares: BufferCopies) -> list[tuple[Facts, Sequence[Copy]]]:
    return [(buffer.facts, copies) for buffer, copies in shares if isinstance(buffer, XlaBuffer)]


def _jobs() -> Any:
    """The module that needs torch_xla, imported at first use."""
    from kvxfer_xla import _jobs  # noqa: PLC0415

    return _jobs


def _checked(tensor: Any) -> torch.Tensor:
    import torch  # noqa: PLC0415 - needed only once a tensor is given

    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "xla":
        where = f"on {tensor.device}" if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
        raise UnsupportedBufferError(f"a buffer of torch_xla is made of a tensor on an XLA device, not {where}")
    if str(tensor.dtype).removeprefix("torch.") not in DTYPE_NBYTES or not tensor.numel():
        raise UnsupportedBufferError(f"a tensor of shape {tuple(tensor.shape)} and {tensor.dtype} is no cache")
    return tensor

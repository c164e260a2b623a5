# SPDX-License-Identifier: Apache-2.0
"""Caches of JAX that are sharded over several devices: each device has its heads, and is a rank."""

from __future__ import annotations

import numpy as np
import pytest

from kvxfer.buffers.cache import KVCache
from kvxfer.endpoint import Endpoint
from kvxfer.errors import UnsupportedBufferError
from kvxfer.protocol.lease_ref import LeaseRef
from tests.xla.requests import noise

jax = pytest.importorskip("jax", reason="jax is not installed: make test-xla")

from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from kvxfer_jax import Arrays, JaxBuffer  # noqa: E402

LAYERS, HEADS, HEAD_DIM = 2, 8, 16


def sharded(array, axis, devices):
    """An array whose ``axis`` is divided between so many devices."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("heads",))
    spec = PartitionSpec(*[None] * axis, "heads")
    return jax.device_put(array.view(jax.numpy.bfloat16), NamedSharding(mesh, spec), may_alias=False)


class Engine:
    """A cache with an endpoint for each device."""

    def __init__(self, name, order, blocks, block_tokens, devices, seed, packing=None):
        self.order = order
        inner = (block_tokens, HEADS) if order == "NHD" else (HEADS, block_tokens)
        self.before = [noise((blocks, *inner, 2 * HEAD_DIM), (seed, layer)) for layer in range(LAYERS)]
        shape, axis = self.before[0].shape, 2 if order == "NHD" else 1
        if packing is not None:
            # As tpu-inference has it: K and V of each head in turn, so many of them side by side.
            shape = (blocks, block_tokens, HEADS * 2 // packing, packing, HEAD_DIM)
        self.arrays = Arrays([sharded(array.reshape(shape), axis, devices) for array in self.before])
        names = [f"layers.{i}" for i in range(LAYERS)]
        shares = self.arrays.shares(names, order=order, heads=None if packing is None else HEADS)
        caches = [KVCache.from_layers(share.layers, buffers=JaxBuffer, **share.place) for share in shares]
        self.name, self.endpoints = name, [Endpoint(cache, "inproc", name=name) for cache in caches]

    @property
    def content(self):
        """``[block, token, head, content]`` of each layer, through JAX."""
        with self.arrays.turn() as arrays:
            found = [np.asarray(array).view(np.uint16).reshape(self.before[0].shape) for array in arrays]
        return [array if self.order == "NHD" else array.transpose(0, 2, 1, 3) for array in found]

    def lease(self, blocks):
        ref = LeaseRef.mint(producer=self.name, addresses=[endpoint.address for endpoint in self.endpoints])
        for endpoint in self.endpoints:
            endpoint.announce(ref)
            endpoint.publish(ref, blocks)
        return ref

    def close(self):
        for endpoint in self.endpoints:
            endpoint.close()


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (("NHD", 12, 16, 4), ("HND", 8, 32, 1)),
        (("HND", 12, 16, 1), ("NHD", 8, 32, 4)),
        (("NHD", 12, 16, 4), ("NHD", 12, 16, 2)),
        (("NHD", 12, 16, 4, 2), ("HND", 8, 32, 1)),
        (("NHD", 12, 16, 1), ("NHD", 8, 32, 4, 2)),
    ],
    ids=["4 to 1", "1 to 4", "4 to 2", "as of tpu-inference, 4 to 1", "1 to 4, as of tpu-inference"],
)
def test_devices_are_ranks(source, target, request):
    """A request goes from the devices of one engine to those of another, whatever each has, and into no other block."""
    near = Engine("near", *source[:4], 1, *source[4:])
    request.addfinalizer(near.close)
    far = Engine("far", *target[:4], 2, *target[4:])
    request.addfinalizer(far.close)
    blocks, into = [5, 11, 2, 8], [6, 3] if target[2] == 32 else [6, 3, 0, 1]
    wanted = [content.copy() for content in far.content]
    for here, there in zip(near.content, wanted, strict=True):
        there[into] = here[blocks].reshape(len(into), target[2], HEADS, -1)
    ref = near.lease(blocks)
    transfers = [endpoint.read(ref, into) for endpoint in far.endpoints]
    assert all(transfer.wait(60) for transfer in transfers)
    for found, expected in zip(far.content, wanted, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_place_of_each_share():
    """Each device has consecutive heads of the model, in the order of the mesh, and is a rank."""
    arrays = Arrays([sharded(noise((4, 8, HEADS, 32), 1), 2, 4)])
    shares = arrays.shares(["only"])
    assert [(share.head_start, share.rank, share.device) for share in shares] == [
        (2 * i, i, f"jax:{i}") for i in range(4)
    ]
    assert {(share.heads_total, share.world) for share in shares} == {(HEADS, 4)}


@pytest.mark.parametrize(
    ("axis", "options", "says"),
    [
        (0, {}, "otherwise than between heads"),
        (3, {}, "otherwise than between heads"),
        (2, {"order": "HND"}, "otherwise than between heads"),
        (2, {"order": "BHN"}, "NHD or HND"),
        (2, {"heads": 0}, "has KV heads"),
        (2, {"heads": 3}, "does not hold 3 heads"),
        (2, {"heads": 2}, "otherwise than between heads"),
        (2, {"components": 2}, "not 2 for each"),
    ],
)
def test_what_is_no_share(axis, options, says):
    """A cache that is sharded along another axis, or does not contain the given heads, is refused with a named error."""
    arrays = Arrays([sharded(noise((4, 8, HEADS, 32), 1), axis, 4)])
    with pytest.raises(UnsupportedBufferError, match=says):
        arrays.shares(["only"], **options)


def test_arrays_sharded_unlike_each_other():
    """All arrays of a cache are sharded in the same way, or it is refused with a named error."""
    arrays = Arrays([sharded(noise((4, 8, HEADS, 32), 1), 2, devices) for devices in (4, 2)])
    with pytest.raises(UnsupportedBufferError, match="alike"):
        arrays.shares(["one", "two"])


def test_arrays_that_several_devices_have_each_in_full():
    """Copies of the same heads on several devices are refused with a named error: only one of them would be written."""
    with pytest.raises(UnsupportedBufferError, match="several devices have copies of the same heads"):
        Arrays([replicated(noise((4, 8, HEADS, 32), 1), 4)]).shares(["only"])


def replicated(array, devices):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("heads",))
    return jax.device_put(array.view(jax.numpy.bfloat16), NamedSharding(mesh, PartitionSpec()))


def test_sharding_in_other_words():
    """The arrays that a step returns are accepted if they are sharded in the same way, however a program describes that."""
    array = sharded(noise((4, 8, HEADS, 32), 1), 2, 4)
    arrays = Arrays([array])
    said_otherwise = NamedSharding(array.sharding.mesh, PartitionSpec(None, None, ("heads",), None))
    assert said_otherwise != array.sharding
    with arrays.turn() as mine:
        mine[0] = jax.device_put(mine[0], said_otherwise)
    (share, *_) = arrays.shares(["only"])
    assert share.world == 4


def test_an_array_that_is_gone():
    """An array that was donated already is refused with a named error when it is handed over."""
    array = sharded(noise((4, 8, HEADS, 32), 1), 2, 4)
    array.delete()
    with pytest.raises(UnsupportedBufferError, match="donated"):
        Arrays([array])

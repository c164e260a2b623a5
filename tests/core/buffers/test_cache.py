# SPDX-License-Identifier: Apache-2.0
"""A cache from an engine's arrays: orders, allocations and layer numbers are read, nothing is copied."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from kvxfer.buffers.base import DeviceBuffer, HostBuffer
from kvxfer.buffers.cache import KVCache
from kvxfer.errors import LayoutError, UnsupportedBufferError
from kvxfer.layout.axes import Axes, Interval, KVLayout
from kvxfer.layout.spec import Scale

SMALL = {"layers": 4, "blocks": 6, "heads": 2, "block_tokens": 4, "head_dim": 8}


@pytest.mark.parametrize("padding", [None, Axes(layer=64, block=32, head=16, token=8)])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("order", list(KVLayout))
def test_allocated_caches_have_the_order_asked_for(order, apart, padding):
    """One region per component, with the strides of the arrays returned, all inside page-aligned buffers."""
    cache, arrays = KVCache.allocate(order, **SMALL, apart=apart, padding=padding, fingerprint="llama")
    assert list(arrays) == (["k", "v"] if apart else ["kv"])
    assert len(cache.buffers) == len(cache.spec.regions) == len(arrays)
    for region in cache.spec.regions:
        array = arrays[region.component]
        assert array.shape == (4, 6, 2, 4, 8 if apart else 16)
        assert region.layout is order
        assert region.address == array.ctypes.data and region.address % 4096 == 0
        assert msgspec.structs.astuple(region.strides) == array.strides[:4]
        assert region.layers == (0, 1, 2, 3)
    assert (cache.spec.dtype, cache.spec.fingerprint) == ("bfloat16", "llama")


@pytest.mark.parametrize(
    ("dtype", "storage"),
    [("bfloat16", "uint16"), ("float16", "float16"), ("float32", "float32"), ("float8_e4m3fn", "uint8")],
)
def test_allocated_arrays_have_the_size_of_the_dtype(dtype, storage):
    """Types that NumPy lacks are stored in unsigned integers of their size."""
    cache, arrays = KVCache.allocate("NHD", **SMALL, dtype=dtype)
    assert arrays["kv"].dtype == storage
    assert cache.spec.dtype == dtype
    assert not arrays["kv"].any()


@pytest.mark.parametrize(
    "changes", [{"layout": "XYZ"}, {"dtype": "bf16"}, {"heads": 0}, {"blocks": -1}, {"head_dim": 0}]
)
def test_impossible_allocations_are_refused(changes):
    """Bad arguments raise LayoutError, not an error of NumPy's."""
    with pytest.raises(LayoutError):
        KVCache.allocate(**{"layout": "HND", **SMALL, **changes})


def test_layers_of_one_allocation_are_one_region_and_one_buffer():
    """Views at equal distances need one region, whether layers are outermost or inside the block."""
    for axis in (0, 1):
        memory = np.zeros((4, 6, 2, 4, 16) if axis == 0 else (6, 4, 2, 4, 16), dtype=np.uint16)
        layers = {f"l.{i}": np.moveaxis(memory, axis, 0)[i] for i in range(4)}
        cache = KVCache.from_layers(layers, dtype="bfloat16")
        (region,) = cache.spec.regions
        assert region.layers == (0, 1, 2, 3)
        assert region.strides.layer == memory.strides[axis]
        (buffer,) = cache.buffers
        assert buffer.memory == HostBuffer(memory).memory


def test_layers_allocated_one_by_one_have_a_buffer_each():
    """Allocations are not joined, even if they happen to lie at equal distances."""
    layers = {f"l.{i}": np.zeros((6, 2, 4, 16), dtype=np.float16) for i in range(4)}
    cache = KVCache.from_layers(layers)
    assert len(cache.buffers) == len(cache.spec.regions) == 4
    assert cache.spec.dtype == "float16"
    for region in cache.spec.regions:
        memory = cache.buffers[region.buffer].memory
        assert (region.address, region.end) == (memory.address, memory.end)
        assert region.address == layers[f"l.{region.layers[0]}"].ctypes.data


def test_layers_in_reverse_order_of_address_are_one_region():
    """A region lists its layers in the order in which they lie in memory."""
    memory = np.zeros((4, 6, 2, 4, 16), dtype=np.uint8)
    cache = KVCache.from_layers({f"l.{i}": memory[3 - i] for i in range(4)})
    (region,) = cache.spec.regions
    assert region.layers == (3, 2, 1, 0)
    assert region.address == memory.ctypes.data


def test_layers_at_unequal_distances_become_as_few_regions_as_needed():
    """Slots 0, 1, 2 and 5 of an allocation are two regions in one buffer."""
    memory = np.zeros((8, 6, 2, 4, 16), dtype=np.uint8)
    cache = KVCache.from_layers({f"l.{i}": memory[slot] for i, slot in enumerate((0, 1, 2, 5))})
    assert [region.layers for region in cache.spec.regions] == [(0, 1, 2), (3,)]
    (buffer,) = cache.buffers
    assert buffer.nbytes == 6 * memory[0].nbytes


def test_k_and_v_apart_are_two_components():
    """Pairs of arrays are K and V, wherever they alternate in memory."""
    memory = np.zeros((4, 6, 2, 2, 4, 8), dtype=np.uint16)
    cache = KVCache.from_layers({f"l.{i}": (memory[i, :, 0], memory[i, :, 1]) for i in range(4)}, dtype="bfloat16")
    assert [(region.component, region.extents.layer) for region in cache.spec.regions] == [("k", 4), ("v", 4)]
    assert len(cache.buffers) == 1
    assert cache.spec.regions[1].address - cache.spec.regions[0].address == memory[0, 0, 0].nbytes


def test_other_components_are_named():
    """An MLA latent is one head, and its group is of that kind."""
    cache = KVCache.from_layers({"l.0": np.zeros((6, 1, 4, 576), dtype=np.float16)}, components=["latent"])
    assert cache.spec.groups[0].kind == "mla"
    assert cache.spec.regions[0].component == "latent"


def test_layers_number_themselves_by_their_names():
    """vLLM's names contain the layer's number; a mapping in another order means the same."""
    arrays = [np.zeros((6, 2, 4, 16), dtype=np.uint8) for _ in range(12)]
    names = [f"model.layers.{i}.self_attn.attn" for i in range(12)]
    layers = {names[i]: arrays[i] for i in sorted(range(12), key=str)}
    spec = KVCache.from_layers(layers).spec
    assert {region.layers[0]: region.address for region in spec.regions} == {
        i: array.ctypes.data for i, array in enumerate(arrays)
    }
    assert spec.layers == Interval(0, 12, 12)


def test_layers_without_one_number_each_are_counted():
    """Names without a number, or with the same one twice, are numbered by position from the rank's first layer."""
    arrays = [np.zeros((6, 2, 4, 16), dtype=np.uint8) for _ in range(2)]
    for names in (("a", "b"), ("m.0.attn", "draft.0.attn"), ("m.0.1", "m.0.2")):
        spec = KVCache.from_layers(dict(zip(names, arrays, strict=True)), layer_start=8, layers_total=16).spec
        assert spec.layers == Interval(8, 10, 16)
        assert {r.address: r.layers for r in spec.regions} == {a.ctypes.data: (8 + i,) for i, a in enumerate(arrays)}


def test_layers_that_share_their_memory_are_moved_once():
    """A layer that reuses an earlier layer's KV is left out: its bytes are those of that layer."""
    memory = np.zeros((2, 6, 2, 4, 16), dtype=np.uint8)
    cache = KVCache.from_layers({"l.0": memory[0], "l.1": memory[1], "l.2": memory[0]})
    assert cache.spec.groups[0].layers == (0, 1)
    assert cache.spec.groups[0].block_nbytes == 2 * 2 * 4 * 16


def test_groups_may_share_memory():
    """Layers of two block tables can lie in the same tensor, as hybrid models have them: both are described."""
    memory = np.zeros((6, 2, 4, 16), dtype=np.uint8)
    cache = KVCache.from_layers(
        {"l.0": memory, "l.1": memory},
        groups={"full": ["l.0"], "window": ["l.1"]},
        kinds={"window": "sliding_window"},
    )
    assert [(g.name, g.kind, g.layers) for g in cache.spec.groups] == [
        ("full", "full_attention", (0,)),
        ("window", "sliding_window", (1,)),
    ]
    assert len(cache.buffers) == 1


def test_a_rank_says_which_heads_and_layers_it_holds():
    """Shards are intervals of the model's heads and layers."""
    layers = {f"l.{i}": np.zeros((6, 2, 4, 16), dtype=np.uint8) for i in (4, 5)}
    spec = KVCache.from_layers(layers, heads_total=8, head_start=2, layers_total=8, rank=1, world=4).spec
    assert spec.groups[0].heads == Interval(2, 4, 8)
    assert spec.layers == Interval(4, 6, 8)
    assert (spec.rank, spec.world) == (1, 4)


def test_a_kernels_blocks_may_be_smaller_than_the_engines():
    """The table's block size is given, that of memory is read, and block ids are the table's."""
    layers = {f"l.{i}": np.zeros((12, 2, 4, 16), dtype=np.uint8) for i in range(2)}
    (group,) = KVCache.from_layers(layers, block_tokens=12).spec.groups
    assert (group.block_tokens, group.num_blocks) == (12, 4)
    assert {(region.extents.block, region.extents.token) for region in group.regions} == {(12, 4)}


def test_a_state_stands_for_any_number_of_tokens():
    """A block of a state is one entry of memory, however many tokens it stands for."""
    arrays = {"l.0": np.zeros((6, 2, 1, 16), dtype=np.uint8)}
    (group,) = KVCache.from_layers(arrays, components=["state"], kinds={"0": "state"}, block_tokens=256).spec.groups
    assert (group.block_tokens, group.num_blocks, group.table_tokens) == (256, 6, 1)


def test_scales_are_given_by_name_of_the_layer():
    """One number for all heads or one per head, in any container; layers without one have none."""
    layers = {f"model.layers.{i}.attn": np.zeros((6, 2, 4, 16), dtype=np.uint8) for i in (5, 6, 7)}
    scales = {
        "model.layers.7.attn": {"k": 0.5, "v": np.array([1, 2], dtype=np.float32)},
        "model.layers.5.attn": {"kv": [3]},
    }
    (group,) = KVCache.from_layers(layers, scales=scales).spec.groups
    assert group.scales == (Scale("kv", 5, (3.0,)), Scale("k", 7, (0.5,)), Scale("v", 7, (1.0, 2.0)))


def test_the_scale_of_a_layer_that_is_left_out_is_left_out():
    """A layer that is another one's memory has no scale of its own."""
    memory = np.zeros((6, 2, 4, 16), dtype=np.uint8)
    made = KVCache.from_layers({"l.0": memory, "l.1": memory}, scales={"l.0": {"kv": 2.0}, "l.1": {"kv": 2.0}})
    assert made.spec.groups[0].scales == (Scale("kv", 0, (2.0,)),)


def test_layers_can_be_known_by_name():
    """Names are listed in the order of the numbers, and only on request."""
    arrays = [np.zeros((6, 2, 4, 16), dtype=np.uint8) for _ in range(3)]
    for names in (["l.6", "l.4", "l.5"], ["b", "c", "a"]):
        layers = dict(zip(names, arrays, strict=True))
        spec = KVCache.from_layers(layers, layer_start=4, layers_total=8, name_layers=True).spec
        assert spec.layer_names == (("l.4", "l.5", "l.6") if "." in names[0] else ("b", "c", "a"))
        assert KVCache.from_layers(layers).spec.layer_names == ()


def test_layers_with_names_are_numbered_without_a_gap():
    """Where names leave numbers out, layers that are known by name are numbered by their position, others by their names."""
    layers = {name: np.zeros((6, 2, 4, 16), dtype=np.uint8) for name in ("l.0", "l.3", "l.1")}
    named, plain = (KVCache.from_layers(layers, name_layers=by_name).spec for by_name in (True, False))
    assert (named.layer_names, named.groups[0].layers) == (("l.0", "l.3", "l.1"), (0, 1, 2))
    assert (plain.layer_names, plain.groups[0].layers) == ((), (0, 1, 3))


def zeros(*shape, dtype=np.uint8):
    """An array of its own."""
    return np.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("layers", "options", "reason"),
    [
        ({}, {}, "at least one layer"),
        ({"l.0": zeros(6, 2, 4)}, {}, r"shape \(6, 2, 4\), not \[blocks, heads, tokens, content\]"),
        ({"l.0": [zeros(6, 2, 4, 8)] * 3}, {}, "3 arrays for 0 components"),
        ({"l.0": zeros(6, 2, 4, 8)}, {"components": ("k", "v")}, "1 arrays for 2 components"),
        ({"l.0": zeros(6, 2, 4, 8)}, {"components": ("x",)}, "unknown component 'x'"),
        ({"l.0": zeros(6, 2, 4, 8), "l.1": zeros(6, 2, 4, 8, dtype="f2")}, {}, "different dtypes: float16, uint8"),
        ({"l.0": zeros(6, 2, 4, 8, dtype=bool)}, {}, "unknown dtype 'bool'"),
        ({"l.0": zeros(6, 2, 4, 8), "l.1": zeros(7, 2, 4, 8)}, {}, "has 7 blocks, its group 6"),
        ({"l.0": zeros(6, 2, 4, 8)}, {"block_tokens": 6}, "has 4 tokens in a block, of which its group's 6 are no"),
        ({"l.0": zeros(6, 2, 4, 8)}, {"block_tokens": 2}, "has 4 tokens in a block, of which its group's 2 are no"),
        ({"l.0": zeros(6, 2, 4, 8)}, {"block_tokens": 0}, "block_tokens is out of range"),
        ({"l.0": zeros(7, 2, 4, 8)}, {"block_tokens": 8}, "has 7 blocks, its group 6"),
        ({"l.0": zeros(6, 2, 4, 8)}, {"block_tokens": 32}, "num_blocks is out of range"),
        ({"l.0": zeros(6, 2, 4, 8)}, {"scales": {"l.1": {"kv": 1.0}}}, "no layer 'l.1' to have a scale"),
        ({"l.0": zeros(6, 2, 4, 8)}, {"scales": {"l.0": {"latent": 1.0}}}, "scales 'latent' of layer 0, which"),
        ({"l.0": zeros(6, 2, 4, 8)}, {"scales": {"l.0": {"kv": "x"}}}, "'kv' of layer 'l.0' is no number"),
        ({"l.0": zeros(6, 2, 4, 8)}, {"scales": {"l.0": {"kv": [1, [2]]}}}, "'kv' of layer 'l.0' is no number"),
        ({"l.0": zeros(6, 2, 4, 8)}, {"scales": {"l.0": {"kv": [1, 2, 3]}}}, "3 scales are neither one nor one for"),
        ({"l.0": zeros(6, 2, 4, 8)}, {"heads_total": 1}, "is no part of 1"),
        ({"l.0": zeros(6, 2, 4, 8)}, {"layers_total": 0}, "is no part of 0"),
        ({"l.0": zeros(6, 2, 4, 8)}, {"groups": {"a": ["l.1"]}}, "each layer once"),
        ({"l.0": zeros(6, 2, 4, 8)}, {"groups": {"a": ["l.0"], "b": []}}, "group 'b' has no layers"),
        ({"l.0": np.lib.stride_tricks.as_strided(zeros(99), (6, 2, 4, 8), (8, 8, 8, 1))}, {}, "share bytes"),
    ],
)
def test_arrays_that_make_no_cache_are_refused(layers, options, reason):
    """Contradictions are found when the cache is described, and named."""
    with pytest.raises(LayoutError, match=reason):
        KVCache.from_layers(layers, **options)


def test_arrays_that_are_no_memory_are_refused():
    """A cache refuses arrays that its buffers refuse."""
    with pytest.raises(UnsupportedBufferError, match="list is no array"):
        KVCache.from_layers({"l.0": [[1]]})


def test_regions_must_lie_inside_their_buffers():
    """A spec whose addresses are not in the given memory is refused, before anything could be registered."""
    cache, arrays = KVCache.allocate("HND", **SMALL)
    whole = HostBuffer(arrays["kv"])
    assert KVCache(cache.spec, [whole]).spec == cache.spec
    with pytest.raises(LayoutError, match="not inside its buffer"):
        KVCache(cache.spec, [HostBuffer(arrays["kv"][:3])])
    with pytest.raises(LayoutError, match="not inside its buffer"):
        KVCache(cache.spec, [HostBuffer(arrays["kv"][1:])])
    with pytest.raises(LayoutError, match="buffer 0, of which there are 0"):
        KVCache(cache.spec, [])


def test_regions_of_a_device_without_addresses_are_counted_from_its_start():
    """Where there is no address, a region's is the offset in its buffer."""

    class Opaque(DeviceBuffer):
        memory = None
        nbytes = 4 * 6 * 2 * 4 * 32
        device = "tpu:0"

        def _pack(self, offsets, nbytes, out):
            raise AssertionError("reached")

        _unpack = _pack

    cache, _ = KVCache.allocate("HND", **SMALL)
    (group,) = cache.spec.groups
    moved = [
        msgspec.structs.replace(
            cache.spec,
            groups=(msgspec.structs.replace(group, regions=(msgspec.structs.replace(group.regions[0], address=at),)),),
        )
        for at in (0, 1)
    ]
    KVCache(moved[0], [Opaque()])
    with pytest.raises(LayoutError, match="not inside its buffer"):
        KVCache(moved[1], [Opaque()])


def test_tensors_of_pytorch_make_the_same_cache_as_arrays():
    """bfloat16 views of one storage, as vLLM gives them, are one region in one buffer, with no copy."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    for order in KVLayout:
        size = {"L": 4, "B": 6, "H": 2, "N": 4, "C": 16}
        memory = torch.zeros([size[axis] for axis in order.value], dtype=torch.bfloat16)
        logical = memory.permute([order.value.index(axis) for axis in "LBHNC"])
        cache = KVCache.from_layers({f"model.layers.{i}.attn": logical[i] for i in range(4)})
        (region,) = cache.spec.regions
        assert region.layout is order
        assert cache.spec.dtype == "bfloat16"
        (buffer,) = cache.buffers
        assert (buffer.memory.address, buffer.nbytes) == (memory.data_ptr(), memory.nbytes)


def test_keys_may_be_transposed():
    """A cache whose kernels keep the tokens of an element side by side says so, and its bytes are those of the array."""
    memory = np.arange(6 * 2 * 8 * 4, dtype=np.uint16).reshape(6, 2, 8, 4)  # block, head, element, token
    cache = KVCache.from_layers({"l.0": memory.transpose(0, 1, 3, 2)}, dtype="float16")
    (region,) = cache.spec.regions
    assert (region.content_nbytes, region.element_nbytes, region.element_stride) == (16, 2, 8)
    assert region.strides.token == 2
    assert region.end - region.address == memory.nbytes

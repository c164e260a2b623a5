# SPDX-License-Identifier: Apache-2.0
"""Cache descriptions: what they say about memory, and what they refuse, wherever they come from."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer.errors import LayoutError
from kvxfer.layout.axes import Axes, Interval, KVLayout
from kvxfer.layout.checks import MAX_REGIONS
from kvxfer.layout.spec import MAX_SCALE, CacheGroup, CacheRegion, CacheSpec, Scale

EXTENTS = Axes(3, 5, 2, 4)


def region(**changes):
    """A small HND region of layers 0 to 2, with some fields changed."""
    fields = {
        "component": "kv",
        "layers": (0, 1, 2),
        "address": 4096,
        "extents": EXTENTS,
        "strides": KVLayout.LBHNC.strides(EXTENTS, 16),
        "content_nbytes": 16,
    }
    return CacheRegion(**{**fields, **changes})


def group(**changes):
    """A group that holds `region`, with some fields changed."""
    fields = {
        "name": "0",
        "kind": "full_attention",
        "block_tokens": 4,
        "num_blocks": 5,
        "heads": Interval(0, 2, 2),
        "regions": (region(),),
    }
    return CacheGroup(**{**fields, **changes})


def spec(**changes):
    """A spec that holds `group`, with some fields changed."""
    return CacheSpec(**{"groups": (group(),), "dtype": "bfloat16", "layers": Interval(0, 3, 3), **changes})


# -- orders ------------------------------------------------------------------------------------------------------------


def test_orders_are_parsed_under_every_name_that_users_write():
    """HND and NHD are aliases, case does not matter, and an unknown name is refused with the known ones."""
    assert KVLayout.parse("HND") is KVLayout.LBHNC
    assert KVLayout.parse("nhd") is KVLayout.LBNHC
    assert all(KVLayout.parse(order.value.lower()) is order for order in KVLayout)
    with pytest.raises(LayoutError, match=r"unknown cache layout 'HNDX'.*LBHNC.*HND and NHD"):
        KVLayout.parse("HNDX")


@pytest.mark.parametrize("order", list(KVLayout))
def test_strides_are_those_of_a_contiguous_array_in_that_order(order):
    """Strides of the logical axes equal those of a transposed NumPy array, and the region tells its order from them."""
    size = {"L": 3, "B": 5, "H": 2, "N": 4}
    physical = np.zeros([size[axis] for axis in order.value[:-1]] + [16], dtype=np.uint8)
    logical = physical.transpose([order.value.index(axis) for axis in "LBHNC"])
    strides = order.strides(EXTENTS, 16)
    assert msgspec.structs.astuple(strides) == logical.strides[:4]
    assert region(strides=strides).layout is order
    assert region(strides=strides).end - 4096 == physical.nbytes


@pytest.mark.parametrize("order", list(KVLayout))
def test_padding_comes_after_each_element_of_its_axis(order):
    """Padded strides are those of the unpadded corner of a larger array."""
    pad = {"L": 32, "B": 64, "H": 16, "N": 48}
    strides = order.strides(EXTENTS, 16, padding=Axes(*pad.values()))
    inner = 16
    for axis, letter in zip(reversed(order.axes), reversed(order.value[:-1]), strict=True):
        assert getattr(strides, axis) == inner + pad[letter]
        inner = getattr(strides, axis) * getattr(EXTENTS, axis)
    assert region(strides=strides).layout is order


def test_an_order_that_is_none_of_the_six_has_no_name():
    """Strides decide what moves; an order no engine uses is described and merely has no name."""
    assert region(strides=Axes(layer=16, block=48, head=240, token=480)).layout is None


# -- regions -----------------------------------------------------------------------------------------------------------


@given(
    st.permutations(["layer", "block", "head", "token"]),
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
    st.lists(st.integers(-3, 3), min_size=4, max_size=4),
    st.integers(1, 3),
)
def test_a_region_that_is_accepted_never_has_two_indices_on_one_byte(order, extents, slack, content):
    """Strides that nest are accepted, and whatever is accepted has as many bytes as indices, all inside its span."""
    sizes = dict(zip(order, extents, strict=True))
    strides, inner = {}, content
    for axis, extra in zip(reversed(order), slack, strict=True):
        strides[axis] = max(0, inner + extra)
        inner = strides[axis] * (sizes[axis] - 1) + inner
    try:
        made = region(
            layers=tuple(range(sizes["layer"])), extents=Axes(**sizes), strides=Axes(**strides), content_nbytes=content
        )
    except LayoutError:
        assert any(extra < 0 for extra in slack)
        return
    axes = [range(sizes[axis]) for axis in order]
    starts = [
        sum(i * strides[axis] for i, axis in zip(index, order, strict=True)) for index in itertools.product(*axes)
    ]
    touched = {4096 + start + byte for start in starts for byte in range(content)}
    assert len(touched) == len(starts) * content
    assert (min(touched), max(touched) + 1) == (made.address, made.end)
    assert made.block_nbytes * sizes["block"] == len(touched)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"component": "q"}, "unknown component 'q'"),
        ({"address": -1}, "address is out of range"),
        ({"address": 2**63 - 8}, "does not fit in the address space"),
        ({"address": 2**64}, "address is out of range"),
        ({"address": 1.5}, "not an integer"),
        ({"address": True}, "not an integer"),
        ({"content_nbytes": 0}, "content_nbytes is out of range"),
        ({"content_nbytes": 2**50}, "content_nbytes is out of range"),
        ({"extents": Axes(3, 0, 2, 4)}, "number of blocks is out of range"),
        ({"extents": Axes(3, -5, 2, 4)}, "number of blocks is out of range"),
        ({"extents": Axes(3, 2**40, 2, 4)}, "number of blocks is out of range"),
        ({"extents": Axes(3, 5, 2**40, 4)}, "number of heads is out of range"),
        ({"extents": Axes(3, np.int64(5), 2, 4)}, "not an integer"),
        ({"strides": Axes(640, 128, 64, -16)}, "stride of tokens is out of range"),
        ({"strides": Axes(2**62, 128, 64, 16)}, "does not fit in the address space"),
        ({"strides": Axes(2**70, 128, 64, 16)}, "stride of layers is out of range"),
        ({"strides": Axes(640, 128, 64, 0)}, "two tokens share bytes"),
        ({"strides": Axes(640, 128, 64, 8)}, "two tokens share bytes: they are 8 bytes apart"),
        ({"strides": Axes(640, 100, 64, 16)}, "two blocks share bytes"),
        ({"strides": Axes(64, 128, 64, 16)}, "share bytes"),
        ({"layers": (0, 1)}, "2 layer numbers do not name 3 layers"),
        ({"layers": (0, 1, 1)}, "do not name 3 layers"),
        ({"layers": (0, 1, -1)}, "a layer number is out of range"),
        ({"buffer": -1}, "number of a buffer is out of range"),
        ({"element_nbytes": 2}, "holds no elements of 2"),
        ({"element_stride": 2}, "holds no elements of 0"),
        ({"element_nbytes": 3, "element_stride": 8}, "content of 16 bytes holds no elements of 3"),
        ({"element_nbytes": 32, "element_stride": 32}, "element_nbytes is out of range"),
        ({"element_nbytes": 2, "element_stride": -8}, "element_stride is out of range"),
        ({"element_nbytes": 2, "element_stride": 8}, "share bytes"),
    ],
)
def test_absurd_regions_are_refused(changes, reason):
    """Negative, overflowing, aliasing or misnumbered regions raise LayoutError when they are made."""
    with pytest.raises(LayoutError, match=reason):
        region(**changes)


def test_the_stride_of_an_axis_with_one_element_means_nothing():
    """Libraries put anything there, so it is neither checked against the others nor part of the span."""
    extents = Axes(1, 5, 1, 4)
    made = region(layers=(0,), extents=extents, strides=Axes(1, 64, 2**63 - 1, 16))
    assert made.end == 4096 + 5 * 64


# -- groups and specs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "linear"}, "unknown kind 'linear'"),
        ({"name": "a\nb"}, "printable"),
        ({"name": "a" * 300}, "at most 256"),
        ({"block_tokens": 0}, "block_tokens is out of range"),
        ({"block_tokens": 6}, "has 4 tokens in a block, of which its group's 6 are no multiple"),
        ({"block_tokens": 2}, "has 4 tokens in a block, of which its group's 2 are no multiple"),
        ({"block_tokens": 8}, "has 5 blocks, its group 10"),
        ({"block_tokens": 8, "num_blocks": 2}, "has 5 blocks, its group 4"),
        ({"num_blocks": 6}, "has 5 blocks, its group 6"),
        ({"heads": Interval(0, 1, 2)}, "has 2 heads, its group 1"),
        ({"regions": ()}, "no regions"),
        ({"regions": (region(), region())}, "'kv' of layer 0 twice"),
        ({"regions": (region(component="k"),)}, "'k' of layer 0 without 'v'"),
        ({"regions": tuple(region(component=c) for c in ("kv", "k", "v"))}, "both as 'kv' and as"),
        ({"regions": (region(),) * (MAX_REGIONS + 1)}, "more than 4096"),
    ],
)
def test_groups_that_contradict_their_regions_are_refused(changes, reason):
    """Block size, number of blocks, heads and components of a group are those of each of its regions."""
    with pytest.raises(LayoutError, match=reason):
        group(**changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"groups": ()}, "there must be 1 to 64"),
        ({"groups": (group(), group())}, "same name"),
        ({"groups": (group(name="0/a"), group(name="0/b"))}, "'0/a' and '0/b' both have layer 0 of '0'"),
        ({"groups": tuple(group(name=str(i)) for i in range(65))}, "there must be 1 to 64"),
        ({"dtype": "bf16"}, "unknown dtype 'bf16'"),
        ({"dtype": "float32", "groups": (group(regions=(region(content_nbytes=14),)),)}, "no whole number of float32"),
        ({"layers": Interval(0, 2, 3)}, "has layers outside"),
        ({"layers": Interval(1, 3, 3)}, "has layers outside"),
        ({"rank": 1}, "rank is out of range"),
        ({"world": 0}, "world is out of range"),
        ({"world": 1025}, "world is out of range"),
        ({"fingerprint": "\x1b[31m"}, "printable"),
        ({"fingerprint": b"x"}, "printable"),
        ({"layer_names": ("a", "b")}, "2 names do not name 3 layers"),
        ({"layer_names": ("a", "b", "b")}, "3 names do not name 3 layers"),
        ({"layer_names": ("a", "b", "c", "a")}, "4 names do not name 3 layers"),
        ({"layer_names": ("a", "b", "c\n")}, "printable"),
        ({"layer_names": ("a", "b", "c" * 300)}, "at most 256"),
    ],
)
def test_specs_that_contradict_themselves_are_refused(changes, reason):
    """A spec that is not refused describes one rank's cache without contradiction."""
    with pytest.raises(LayoutError, match=reason):
        spec(**changes)


@pytest.mark.parametrize("bounds", [(-1, 2, 2), (0, 0, 2), (2, 1, 2), (0, 3, 2), (0, 1, 2**30), (0.0, 1, 2)])
def test_impossible_intervals_are_refused(bounds):
    """An interval is not empty and lies inside its whole."""
    with pytest.raises(LayoutError):
        Interval(*bounds)


def test_a_state_has_no_tokens_inside():
    """The state of a state-space layer is copied whole, whatever the number of tokens its block stands for."""
    extents = Axes(3, 5, 2, 1)
    whole = region(component="state", extents=extents, strides=KVLayout.LBHNC.strides(extents, 16))
    assert group(kind="state", regions=(whole,), block_tokens=256).block_nbytes == 3 * 2 * 16


def test_blocks_of_a_kernel_may_be_smaller_than_those_of_the_table():
    """A table of 2 blocks of 8 tokens over memory in blocks of 4 has two of these for each of its own."""
    extents = Axes(3, 4, 2, 4)
    small = region(extents=extents, strides=KVLayout.LBHNC.strides(extents, 16))
    made = group(regions=(small,), block_tokens=8, num_blocks=2)
    assert made.table_tokens == 8
    assert group(regions=(small,), block_tokens=16, num_blocks=1).table_tokens == 16
    large = region(layers=(3, 4, 5), extents=Axes(3, 2, 2, 8), strides=KVLayout.LBHNC.strides(Axes(3, 2, 2, 8), 16))
    assert group(regions=(small, large), block_tokens=8, num_blocks=2).layers == (0, 1, 2, 3, 4, 5)


def transposed(component="kv", element_nbytes=2, tokens=4):
    """A group in whose blocks the tokens of an element lie side by side."""
    extents = Axes(3, 5, 2, tokens)
    stride = element_nbytes * tokens
    strides = msgspec.structs.replace(KVLayout.LBHNC.strides(extents, 16), token=element_nbytes)
    turned = region(
        component=component, extents=extents, strides=strides, element_nbytes=element_nbytes, element_stride=stride
    )
    return group(regions=(turned,), block_tokens=tokens)


def test_elements_of_a_token_may_lie_apart():
    """An element has the size of the dtype, or is a byte where nothing is known; its bytes stay together."""
    made = spec(groups=(transposed(),))
    assert made.regions[0].end - 4096 == 3 * 5 * 2 * 4 * 16
    assert spec(groups=(transposed("scale", 1),)).regions[0].end - 4096 == 3 * 5 * 2 * 4 * 16
    for wrong in (transposed("scale", 2), transposed("kv", 1), transposed("kv", 4)):
        with pytest.raises(LayoutError, match="bytes are no"):
            spec(groups=(wrong,))


def scaled(*scales, component="kv", content_nbytes=16):
    """`group` with scales."""
    parts = ("k", "v") if component == "k" else (component,)
    strides = KVLayout.LBHNC.strides(EXTENTS, content_nbytes)
    regions = tuple(region(component=c, strides=strides, content_nbytes=content_nbytes) for c in parts)
    return group(regions=regions, scales=scales)


def test_scales_belong_to_components_of_layers():
    """One factor or one per head, for a whole component or, where K and V lie together, for either half."""
    for scales in ([Scale("kv", 0, (0.5,)), Scale("k", 1, (1, 2.0)), Scale("v", 1, (1e-6,))], []):
        assert scaled(*scales).scales == tuple(scales)
    assert scaled(Scale("k", 0, (2.0,)), component="k").scales == (Scale("k", 0, (2.0,)),)
    assert scaled(Scale("latent", 2, (2.0, 3.0)), component="latent").scales[0].factors == (2.0, 3.0)


@pytest.mark.parametrize(
    ("scales", "component", "reason"),
    [
        ([Scale("kv", 0, (1.0, 2.0, 3.0))], "kv", "3 scales are neither one nor one for each of 2 heads"),
        ([Scale("kv", 0, ())], "kv", "0 scales"),
        ([Scale("kv", 3, (1.0,))], "kv", "scales 'kv' of layer 3, which it does not have"),
        ([Scale("latent", 0, (1.0,))], "kv", "scales 'latent' of layer 0, which"),
        ([Scale("kv", 0, (1.0,))], "k", "scales 'kv' of layer 0, which"),
        ([Scale("k", 0, (1.0,))], "latent", "scales 'k' of layer 0, which"),
        ([Scale("kv", 0, (1.0,)), Scale("kv", 0, (1.0,))], "kv", "two scales for 'kv' of layer 0"),
        ([Scale("kv", 0, (1.0,)), Scale("v", 0, (1.0,))], "kv", "two scales for 'v' of layer 0"),
        ([Scale("k", 0, (1.0,)), Scale("kv", 0, (1.0,))], "kv", "two scales for 'kv' of layer 0"),
    ],
)
def test_scales_that_contradict_their_group_are_refused(scales, component, reason):
    """A scale that no element has, or a second one for an element, would be forgotten silently."""
    with pytest.raises(LayoutError, match=reason):
        scaled(*scales, component=component)


def test_what_has_no_halves_has_no_scales_for_them():
    """K and V together are cut in the middle, which must lie between two elements."""
    made = scaled(Scale("kv", 0, (2.0,)), content_nbytes=6)
    assert spec(groups=(made,)).groups == (made,)
    with pytest.raises(LayoutError, match="content of 6 bytes has no halves"):
        spec(groups=(scaled(Scale("k", 0, (2.0,)), content_nbytes=6),))


@pytest.mark.parametrize(
    "factor", [0.0, -1.0, float("nan"), float("inf"), 5e-324, 2 * MAX_SCALE, 10**400, True, "1", None, np.float32(1)]
)
def test_absurd_scales_are_refused(factor):
    """Quotients of scales are numbers: none is zero, infinite or of no sane size."""
    with pytest.raises(LayoutError, match="a scale is a positive number"):
        Scale("kv", 0, (factor,))


def test_what_is_opaque_has_no_scale():
    """Nobody knows what its bytes mean."""
    with pytest.raises(LayoutError, match="'state' has no scale"):
        Scale("state", 0, (1.0,))
    with pytest.raises(LayoutError, match="layer of a scale is out of range"):
        Scale("kv", -1, (1.0,))


def test_a_spec_finds_its_groups_and_counts_its_bytes():
    """Groups are found by name; one block takes the bytes of all layers, heads, tokens and components."""
    made = spec()
    assert made.group("0") is made.groups[0]
    assert made.groups[0].layers == (0, 1, 2)
    assert made.groups[0].block_nbytes == 3 * 2 * 4 * 16
    with pytest.raises(KeyError):
        made.group("1")


# -- over the wire -----------------------------------------------------------------------------------------------------


def test_a_spec_is_the_same_after_the_wire_and_its_size_does_not_depend_on_blocks():
    """A decoded spec equals the encoded one, takes a few hundred bytes, and 1,000,000 blocks take what 1,000 do."""
    sizes = []
    for blocks in (1_000, 1_000_000):
        extents = Axes(80, blocks, 8, 16)
        layers = tuple(range(80))
        cache = region(layers=layers, extents=extents, strides=KVLayout.LBHNC.strides(extents, 512), content_nbytes=512)
        whole = group(num_blocks=blocks, block_tokens=16, heads=Interval(0, 8, 8), regions=(cache,))
        made = spec(groups=(whole,), layers=Interval(0, 80, 80))
        raw = msgspec.msgpack.encode(made)
        assert msgspec.msgpack.decode(raw, type=CacheSpec) == made
        assert hash(msgspec.msgpack.decode(raw, type=CacheSpec)) == hash(made)
        sizes.append(len(raw))
    named = spec(layer_names=("a", "b", "c"), groups=(scaled(Scale("k", 0, (0.5, 1.0)), Scale("v", 0, (3.0,))),))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(named), type=CacheSpec) == named
    assert sizes[1] < 400
    assert sizes[1] <= 1.1 * sizes[0]


def test_a_decoder_refuses_what_a_constructor_refuses():
    """Checks happen when a spec is made from bytes too: no unchecked spec exists."""
    raw = msgspec.msgpack.encode(spec())
    for old, new in ((b"bfloat16", b"bfloat99"), (b"full_attention", b"full_attentiom"), (b"\xa2kv", b"\xa2kw")):
        assert old in raw
        with pytest.raises(msgspec.ValidationError, match="unknown"):
            msgspec.msgpack.decode(raw.replace(old, new), type=CacheSpec)


@given(st.data())
def test_no_damage_on_the_wire_does_more_than_raise(data):
    """Changed, missing and added bytes give a valid spec or a decoding error, never another exception."""
    raw = bytearray(msgspec.msgpack.encode(spec()))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        made = msgspec.msgpack.decode(bytes(raw[: data.draw(st.integers(1, len(raw)))]), type=CacheSpec)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    assert all(part.end <= 2**63 for part in made.regions)

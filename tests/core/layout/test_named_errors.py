# SPDX-License-Identifier: Apache-2.0
"""What is given wrong to the public names that describe caches and plans: a named error where it is given, in one sentence."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import msgspec
import numpy as np
import pytest

import kvxfer
from kvxfer import Axes, CacheGroup, CacheSpec, Endpoint, Interval, KVCache, Scale
from kvxfer.config import Settings
from kvxfer.errors import IncompatibleError, KvxferError, LayoutError, OwnPeerError, PeerConflictError
from kvxfer.planner.plan import plan

ARRAY = np.zeros((8, 2, 4, 16), np.uint16)
CACHE = KVCache.from_layers({"layers.0": ARRAY})
REGION = CACHE.spec.groups[0].regions[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": [ARRAY]}, "layers must be a mapping .*, not list"),
        ({"layers": ARRAY}, "layers must be a mapping"),
        ({"layers": {0: ARRAY}}, "the name of a layer is a string, not 0"),
        ({"block_tokens": "16"}, "block_tokens is no whole number: '16'"),
        ({"block_tokens": 4.0}, "block_tokens is no whole number: 4.0"),
        ({"block_tokens": True}, "block_tokens is no whole number: True"),
        ({"block_tokens": {"0": "16"}}, "block_tokens of group '0' is no whole number: '16'"),
        ({"block_tokens": {"1": 16}}, "there is no group '1' to have block_tokens: there are '0'"),
        ({"heads_total": "2"}, "heads_total is no whole number"),
        ({"head_start": None}, "head_start is no whole number"),
        ({"layers_total": 1.5}, "layers_total is no whole number"),
        ({"rank": "0"}, "rank is no whole number"),
        ({"kinds": {"slidng": "sliding_window"}}, "there is no group 'slidng' to be 'sliding_window': there are '0'"),
        ({"kinds": ["sliding_window"]}, "kinds must be a mapping"),
        ({"groups": ["layers.0"]}, "groups must be a mapping"),
        ({"groups": {"a": [5]}}, "the groups do not name each layer once"),
        ({"scales": 4.0}, "scales must be a mapping"),
        ({"scales": {"layers.0": 4.0}}, "the scales of layer 'layers.0' must be a mapping"),
        ({"scales": {"layers.1": {"k": 4.0}}}, "there is no layer 'layers.1' to have a scale"),
        ({"scales": {1: {"k": 4.0}}}, "there is no layer 1 to have a scale"),
        ({"dtype": ["float16"]}, "a dtype must be of class str, not list"),
    ],
)
def test_slips_in_the_description_of_arrays(options, says):
    """Each option of `KVCache.from_layers` that is of the wrong type, or names what is not there, is told by its name."""
    with pytest.raises(LayoutError, match=says):
        KVCache.from_layers(**{"layers": {"layers.0": ARRAY}, **options})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: KVCache.allocate(5, layers=1, blocks=1, heads=1, block_tokens=1, head_dim=1),
            "a cache layout is a name",
        ),
        (lambda: allocated(padding=(0, 0, 0, 0)), "padding must be of class Axes, not tuple"),
        (lambda: allocated(blocks=1 << 50, head_dim=1 << 20), "no memory for a cache of"),
        (lambda: allocated(blocks="8"), "blocks is no whole number"),
        (lambda: allocated(heads=0), "every extent of a cache is at least 1"),
        (
            lambda: msgspec.structs.replace(REGION, extents=(1, 1, 1, 1)),
            "the extents of a region must be of class Axes",
        ),
        (lambda: msgspec.structs.replace(REGION, strides=[1]), "the strides of a region must be of class Axes"),
        (lambda: msgspec.structs.replace(REGION, layers=0), "the layers of a region must be of class tuple"),
        (
            lambda: CacheGroup("0", "full_attention", 4, 8, (0, 2, 2), (REGION,)),
            "the heads of a group must be of class Int",
        ),
        (
            lambda: CacheGroup("0", "full_attention", 4, 8, Interval(0, 2, 2), REGION),
            "the regions of a group must be of cl",
        ),
        (
            lambda: CacheSpec(CACHE.spec.groups[0], "uint16", Interval(0, 1, 1)),
            "the groups of a cache must be of class tu",
        ),
        (lambda: CacheSpec(CACHE.spec.groups, "uint16", 1), "the layers of a cache must be of class Interval"),
        (lambda: Scale("k", 0, 2.0), "the factors of a scale must be of class tuple"),
        (lambda: plan(CACHE, CACHE), "a plan needs a CacheSpec, not a KVCache: give its spec"),
        (lambda: plan(CACHE.spec, CACHE), "a plan needs a CacheSpec, not a KVCache: give its spec"),
        (lambda: plan([CACHE.spec, None], CACHE.spec), "a plan needs a CacheSpec, not a NoneType"),
        (lambda: plan("spec", CACHE.spec), "a plan needs a CacheSpec, not a str"),
    ],
)
def test_slips_in_descriptions_and_plans(make, says):
    """Fields and arguments of another class are told by name, and not as an AttributeError or TypeError from inside."""
    with pytest.raises(LayoutError, match=says):
        make()


def allocated(**changes):
    options = {"layers": 1, "blocks": 1, "heads": 1, "block_tokens": 1, "head_dim": 1, **changes}
    return KVCache.allocate("HND", **options)


def test_numbers_of_numpy_are_numbers():
    """Engines that count with NumPy give its integers, and get the same description."""
    one = KVCache.from_layers(
        {"layers.3": ARRAY}, block_tokens=8, heads_total=8, head_start=4, layers_total=9, rank=1, world=2
    )
    other = KVCache.from_layers(
        {"layers.3": ARRAY},
        block_tokens=np.int64(8),
        heads_total=np.int32(8),
        head_start=np.uint8(4),
        layers_total=np.int16(9),
        rank=np.int64(1),
        world=np.int64(2),
    )
    assert one.spec == other.spec
    assert allocated(blocks=np.int64(3))[0].spec.groups[0].num_blocks == 3


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"])
def test_every_dtype_of_ml_dtypes_that_a_cache_may_have(name):
    """A layer may be an array of ml_dtypes as it is; float8_e5m2 too, whose array interface NumPy cannot read."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    source, target = np.zeros((8, 1, 4, 8), getattr(ml_dtypes, name)), np.zeros((8, 1, 4, 8), getattr(ml_dtypes, name))
    source[3] = 2
    caches = [KVCache.from_layers({"layers.0": each}) for each in (source, target)]
    assert caches[0].spec.dtype == name
    with Endpoint(caches[0], "inproc") as producer, Endpoint(caches[1], "inproc") as consumer:
        assert consumer.read(producer.lease([3]), [5]).wait(30)
    assert (target[5] == 2).all() and not target[:5].any()


def test_arrays_of_an_unknown_type_are_refused():
    """Elements that NumPy cannot read are refused by name, from any class that tells its memory."""

    class Strange:
        @property
        def __array_interface__(self):
            return {"typestr": "<q3", "shape": (1, 1, 1, 1), "data": (4096, False), "version": 3}

    with pytest.raises(kvxfer.KvxferError, match="elements of type '<q3' are unknown"):
        KVCache.from_layers({"layers.0": Strange()})


@pytest.mark.parametrize("name", ["Axes", "Interval", "Scale", "Completion"])
def test_what_descriptions_are_made_of_is_public(name):
    """What `CacheSpec`, ``padding=`` and ``after=`` need can be imported from `kvxfer`."""
    assert name in kvxfer.__all__ and getattr(kvxfer, name)


def test_a_slot_too_small_to_verify_says_so():
    """A block of a layer that does not fit into a staging slot: reads go directly, and verify=True says that it is what needs more."""
    arrays = [np.zeros((4, 2, 64, 64), np.uint16) for _ in range(2)]
    small = Settings(staging_nbytes=1 << 15)
    with contextlib.ExitStack() as stack:
        caches = [KVCache.from_layers({"layers.0": array}) for array in arrays]
        producer, consumer = (stack.enter_context(Endpoint(each, "inproc", settings=small)) for each in caches)
        assert consumer.read(producer.lease([1]), [2]).wait(30)
        with pytest.raises(
            IncompatibleError, match=r"to verify \(verify=True\), chunks are packed .* a staging slot has"
        ):
            consumer.read(producer.lease([1]), [2], verify=True).wait(30)


def test_a_read_of_a_lease_of_ones_own_is_not_tried_again(engines):
    """Who reads a lease of its own is told so, and that the same call will not succeed later."""
    me = engines()
    with pytest.raises(OwnPeerError) as caught:
        me.endpoint.read(me.endpoint.lease([1]), [2]).wait(30)
    assert isinstance(caught.value, PeerConflictError) and not caught.value.retryable


def test_padding_is_axes():
    """What the message asks for is taken."""
    cache, _ = allocated(padding=Axes(0, 8, 0, 2), blocks=4)
    assert cache.spec.groups[0].regions[0].strides.block == 4 + 2 + 8


def test_no_named_error_is_a_raw_one():
    """The errors of descriptions are `KvxferError`s and ValueErrors, so that either catches them."""
    for make in (lambda: KVCache.from_layers([ARRAY]), lambda: plan(CACHE, CACHE)):
        with pytest.raises(KvxferError) as caught:
            make()
        assert isinstance(caught.value, ValueError)


def test_a_cache_larger_than_the_memory_is_a_layout_error():
    """`KVCache.allocate` under a limit of the address space says how much it wanted, in a process of its own."""
    script = (
        "import resource; from kvxfer import KVCache; from kvxfer.errors import LayoutError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "try:\n"
        "    KVCache.allocate(layers=1, blocks=1 << 20, heads=8, block_tokens=16, head_dim=128)\n"
        "except LayoutError as error:\n"
        "    print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.startswith("there is no memory for a cache of 64.0 GiB")

# SPDX-License-Identifier: Apache-2.0
"""Caches of other element types: float8 with scales, conversion between two servers, and formats that are moved as they are.

White-box where vLLM keeps the scales of a layer to itself.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SparseCacheRole,
)

from kvxfer.errors import ConfigError, IncompatibleError
from kvxfer.planner.plan import plan
from kvxfer.testing.buffer_suite.floats import cast
from kvxfer_vllm.groups import layer_groups
from kvxfer_vllm.heads import HeadCounts
from kvxfer_vllm.kv_dtypes import packed_format
from kvxfer_vllm.rank_cache import describe_cache
from tests.vllm.rig import (
    BLOCK_TOKENS,
    HEAD_DIM,
    HEADS,
    Engine,
    drain,
    handed_over,
    kv_cache_config,
    prompt_of,
    vllm_config,
)

pytestmark = pytest.mark.vllm

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "fp8": torch.uint8, "fp8_e5m2": torch.uint8}
NAMES = {"fp8": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
LENGTH = 3 * BLOCK_TOKENS + 5


class TypedEngine(Engine):
    """Engine whose cache has another element type; its numbers are small enough for float8."""

    def __init__(self, role, name, kv_dtype, scales=(1.0, 1.0), **options):
        self.kv_dtype, self.scales = kv_dtype, scales
        super().__init__(role, name=name, agent="inproc", policy="recompute", **options)
        for layer in self.config.compilation_config.static_forward_context.values():
            layer.kv_cache_dtype = kv_dtype
            layer._k_scale_float, layer._v_scale_float = scales

    def _adapt(self, config):
        config.cache_config.cache_dtype = self.kv_dtype

    def _caches(self, layer_names):
        return {name: cache.to(TYPES[self.kv_dtype]) for name, cache in super()._caches(layer_names).items()}

    def _computed(self, name, depth, request_id, count):
        rows, offsets, content = super()._computed(name, depth, request_id, count)
        stored = (content / 2**15).to(getattr(torch, NAMES.get(self.kv_dtype, self.kv_dtype)))
        return rows, offsets, stored.view(torch.uint8) if self.kv_dtype in NAMES else stored

    def elements(self, blocks):
        """Keys and values of the first tokens in these blocks, but the last, which decode computes itself."""
        both = []
        for half in (0, 1):
            views = [self._keys_and_values(name)[half][list(blocks)] for name in self.kv]
            tokens = torch.stack(views).transpose(2, 3).flatten(1, 2)[:, : LENGTH - 1]
            both.append(np.frombuffer(tokens.contiguous().view(torch.uint8).numpy().tobytes(), np.uint8))
        return both


@pytest.fixture
def typed(monkeypatch):
    """Makes a prefill and a decode engine with these KV dtypes, and closes them."""
    monkeypatch.setenv("KVXFER_SIDE_CHANNEL_HOST", "127.0.0.1")
    monkeypatch.setenv("KVXFER_SIDE_CHANNEL_PORT", "0")
    made = []

    def pair(producer, consumer, *, scales=((1.0, 1.0), (1.0, 1.0)), **options):
        made.append(TypedEngine("kv_producer", "P", producer, scales[0]))
        made.append(TypedEngine("kv_consumer", "D", consumer, scales[1], **options))
        for engine in made:
            engine.start()
        return made

    yield pair
    for engine in made:
        engine.close()


def moved(producer, consumer):
    """Keys and values of one request on both servers, after the transfer."""
    params = handed_over(producer, "p", prompt_of(LENGTH))
    consumer.add("d", prompt_of(LENGTH), params, max_tokens=2)
    while not consumer.answers["d"].tokens:
        consumer.step()
    (blocks,) = consumer.scheduler.kv_cache_manager.get_block_ids("d")
    found = producer.elements(*params["remote_block_ids"]), consumer.elements(blocks)
    drain(producer, consumer)
    return found


@pytest.mark.parametrize(
    ("source", "target"),
    [("bfloat16", "fp8"), ("fp8", "bfloat16"), ("bfloat16", "fp8_e5m2"), ("fp8_e5m2", "bfloat16"), ("fp8", "fp8_e5m2")],
)
def test_elements_are_converted(typed, source, target):
    """With the option ``convert``, decode's cache holds the numbers of prefill's cache in its own element type."""
    producer, consumer = typed(source, target, convert=True)
    here, there = moved(producer, consumer)
    assert len(consumer.stats["transfer_bytes"]) == 1
    for before, after in zip(here, there, strict=True):
        assert np.array_equal(after, cast(before, NAMES.get(source, source), NAMES.get(target, target), 1.0))


def test_scales_of_both_sides_count(typed):
    """Converted elements are stored numbers times prefill's scale, divided by decode's, for keys and for values apart."""
    producer, consumer = typed("fp8", "fp8", scales=((0.5, 2.0), (0.25, 1.0)), convert=True)
    here, there = moved(producer, consumer)
    for before, after, factor in zip(here, there, (2.0, 2.0), strict=True):
        assert np.array_equal(after, cast(before, "float8_e4m3fn", "float8_e4m3fn", factor))


@pytest.mark.parametrize(
    ("source", "target", "scales", "axis"),
    [
        ("bfloat16", "fp8", ((1.0, 1.0), (1.0, 1.0)), "dtype"),
        ("fp8", "fp8_e5m2", ((1.0, 1.0), (1.0, 1.0)), "dtype"),
        ("fp8", "fp8", ((0.5, 1.0), (0.5, 2.0)), "scale"),
    ],
)
def test_without_the_option_other_elements_are_refused(typed, caplog, source, target, scales, axis):
    """Without ``convert``, a pair with other element types or other scales is refused with the axis, and decode computes."""
    producer, consumer = typed(source, target, scales=scales)
    moved(producer, consumer)
    assert consumer.stats["failed_transfers"] == {"IncompatibleError": 1}
    assert f"{axis} " in caplog.text or f"{axis}:" in caplog.text


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2"])
def test_equal_scales_are_served(typed, dtype):
    """Servers with the same float8 type and scales, as of one checkpoint, need no option; bytes are moved as they are."""
    producer, consumer = typed(dtype, dtype, scales=((0.5, 2.0), (0.5, 2.0)))
    here, there = moved(producer, consumer)
    assert len(consumer.stats["transfer_bytes"]) == 1
    assert all(np.array_equal(*both) for both in zip(here, there, strict=True))


# ------------------------------------------------------------------------------------------- descriptions of a rank's cache

SIZES = {"block_size": BLOCK_TOKENS, "head_size": HEAD_DIM, "dtype": torch.bfloat16}


def described(specs, *, ranks=1, rank=0, tokens=BLOCK_TOKENS, instruction_sets=None):
    """Description of a rank's cache with one layer for each spec, each in a cache group of its own."""
    config = vllm_config()
    config.parallel_config.tensor_parallel_size = ranks
    caches = kv_cache_config(8)
    caches.kv_cache_groups = [
        KVCacheGroupSpec([f"model.layers.{i}.attn"], replace(spec, block_size=tokens)) for i, spec in enumerate(specs)
    ]
    groups = layer_groups(caches, counts=HeadCounts(config))
    tensors = {}
    for i, spec in enumerate(specs):
        content = spec.state_content_size_bytes // spec.dtype.itemsize
        tensors[f"model.layers.{i}.attn"] = torch.zeros(8, spec.num_heads, tokens, content, dtype=spec.dtype)
    return describe_cache(
        tensors,
        groups,
        config,
        caches,
        rank=rank,
        fingerprint="f",
        instruction_sets=instruction_sets and dict.fromkeys((group.name for group in groups), instruction_sets),
    ).spec


PLAIN = FullAttentionSpec(num_kv_heads=HEADS, **SIZES)
LATENT = MLAAttentionSpec(num_kv_heads=1, **SIZES)
PER_TOKEN = replace(PLAIN, dtype=torch.int8, kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD, state_content_bytes=16)
NVFP4 = replace(PLAIN, dtype=torch.uint8, kv_quant_mode=KVQuantMode.NVFP4, num_head_slots=4, state_content_bytes=3)
INDEX = replace(LATENT, dtype=torch.uint8, cache_role=SparseCacheRole.INDEXER)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (PLAIN, ""),
        (LATENT, ""),
        (replace(PLAIN, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR), ""),
        (PER_TOKEN, "int8_per_token_head"),
        (NVFP4, "nvfp4"),
        (INDEX, "indexer"),
        (replace(LATENT, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR, state_content_bytes=656), "packed-None-656"),
        (replace(PLAIN, num_head_slots=2, state_content_bytes=16), "packed-2-16"),
    ],
)
def test_formats_that_are_moved_as_they_are(spec, name):
    """Caches with scales among the values, and with anything else than elements of heads, are known by name."""
    assert packed_format(spec) == name


@pytest.mark.parametrize("spec", [PER_TOKEN, NVFP4])
def test_packed_heads_are_not_divided(spec):
    """A packed format is moved between servers with the same block size and tensor parallelism, and else refused by both."""
    halves = [described([spec], ranks=2, rank=rank) for rank in (0, 1)]
    assert [bool(each.overlaps) for each in plan(halves, halves[1]).rank_plans] == [False, True]
    for source, target in ((halves, described([spec])), ([described([spec])], halves[0])):
        with pytest.raises(IncompatibleError, match=r"fingerprint .*by 2 ranks in blocks of 32"):
            plan(source, target)
    with pytest.raises(IncompatibleError, match="in blocks of 64"):
        plan([described([spec])], described([spec], tokens=64))


def test_packed_latents_are_the_same_on_all_ranks():
    """A packed latent is moved between servers of any tensor parallelism, with the same block size."""
    spec = replace(LATENT, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR, state_content_bytes=656, dtype=torch.uint8)
    plan([described([spec], ranks=2, rank=rank) for rank in (0, 1)], described([spec]))
    with pytest.raises(IncompatibleError, match="in blocks of 64"):
        plan([described([spec])], described([spec], tokens=64))


def test_layers_of_different_dtypes_are_moved_as_bytes():
    """Latents of bfloat16 beside an indexer's keys of bytes are described as bytes, and the fingerprint tells the dtypes."""
    spec = described([LATENT, INDEX])
    assert spec.dtype == "uint8"
    assert spec.fingerprint == "f stored as indexer in blocks of 32, bfloat16 and uint8 (auto)"
    plan([spec], described([LATENT, INDEX]))
    with pytest.raises(IncompatibleError, match=r"dtype|fingerprint"):
        plan([spec], described([LATENT]))


def test_layers_of_different_dtypes_in_cpu_order_are_refused():
    """Keys whose elements are not side by side cannot be described as bytes; the sentence names the dtypes."""
    with pytest.raises(ConfigError, match=r"layers of different dtypes on CPUs yet \(bfloat16, float32\)"):
        described([PLAIN, replace(PLAIN, dtype=torch.float32)], instruction_sets="vec")


def test_an_order_that_is_not_known_is_moved_as_it_is():
    """With an instruction set whose order is not known, element type, block size and set must be equal."""
    spec = described([PLAIN], instruction_sets="amx")
    assert spec.fingerprint == "f stored as bfloat16 for amx in blocks of 32"
    assert described([PLAIN], instruction_sets="vec16").fingerprint == "f"


def test_latents_beside_keys_and_values():
    """A model may have latent attention in some layers and heads in others: each is a group with components of its own."""
    groups = described([LATENT, PLAIN]).groups
    assert [(group.kind, group.heads.total, group.regions[0].component) for group in groups] == [
        ("mla", 1, "latent"),
        ("full_attention", 2, "kv"),
    ]


# ----------------------------------------------------------------------------------------------- numbers of KV heads


def heterogeneous(totals, ranks):
    """Configuration of a model whose layers have these numbers of KV heads, on so many ranks."""
    config = vllm_config()
    config.parallel_config.tensor_parallel_size = ranks
    arch = config.model_config.model_arch_config
    arch.total_num_kv_heads = max(totals)
    arch.total_num_hidden_layers = len(totals)
    arch.per_layer_overrides = [{"total_num_kv_heads": total} for total in totals]
    return config


@pytest.mark.parametrize(
    ("totals", "ranks", "found"),
    [
        ((8, 2), 1, ["full/0 0-8 of 8", "full-2/0 0-2 of 2"]),
        ((8, 2), 2, ["full/0 4-8 of 8", "full-2/0 1-2 of 2"]),
        ((8, 2), 4, ["full/0 6-8 of 8", "full-2/0 1-2 of 2"]),
        ((8, 8), 4, ["full/0 6-8 of 8"]),
    ],
)
def test_heads_of_each_kind_of_layers(totals, ranks, found):
    """Layers with other numbers of KV heads are groups of their own, with the heads of this rank; ranks may have copies."""
    config = heterogeneous(totals, ranks)
    caches = kv_cache_config(8)
    specs = {
        f"model.layers.{i}.attn": FullAttentionSpec(num_kv_heads=max(1, total // ranks), **SIZES)
        for i, total in enumerate(totals)
    }
    caches.kv_cache_groups = [KVCacheGroupSpec([name], spec) for name, spec in specs.items()]
    if len(set(totals)) == 1:
        caches.kv_cache_groups = [KVCacheGroupSpec(list(specs), next(iter(specs.values())))]
    tensors = {name: torch.zeros(8, spec.num_kv_heads, 32, 8) for name, spec in specs.items()}
    groups = layer_groups(caches, counts=HeadCounts(config))
    cache = describe_cache(tensors, groups, config, caches, rank=ranks - 1, fingerprint="")
    assert [
        f"{group.name} {group.heads.start}-{group.heads.stop} of {group.heads.total}" for group in cache.spec.groups
    ] == found


def test_copies_that_cannot_be_told_apart():
    """If each rank has one head of layers that have 2 and of layers that have 1, the start ends with a sentence."""
    counts = HeadCounts(heterogeneous((2, 1), 2))
    with pytest.raises(ConfigError, match="tensor_parallel_size 2 with layers of 1 or 2 KV heads yet, of which"):
        counts.of("model.layers.0.attn", FullAttentionSpec(num_kv_heads=1, **SIZES))


@pytest.mark.parametrize("spec", [PER_TOKEN, INDEX])
def test_convert_needs_elements(spec):
    """The option ``convert`` with a packed cache ends the start with a sentence."""
    from kvxfer.buffers.cache import KVCache
    from kvxfer_serving.options import ConnectorOptions
    from kvxfer_vllm.startup import start_endpoints

    cache = KVCache.from_layers({"l.0": torch.zeros(4, 1, 4, 8, dtype=spec.dtype)})
    with pytest.raises(ConfigError, match=r"option 'convert' is not for caches of u?int8"):
        start_endpoints([cache], vllm_config(), ConnectorOptions(convert=True))

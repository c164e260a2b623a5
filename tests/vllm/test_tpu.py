# SPDX-License-Identifier: Apache-2.0
"""Caches of a runner that keeps them as jax.Arrays: registered by ``register_runner``, and used by the runner in each step.

vLLM's classes and JAX are real; the runner simulates tpu-inference's, and the devices are JAX's on the CPU.
White-box: one test makes the adapter's unpacking fail.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("jax", reason="jax is not installed")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import NamedSharding, PartitionSpec
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MLAAttentionSpec

from kvxfer.buffers.cache import KVCache
from kvxfer.config import Settings
from kvxfer.endpoint import Endpoint
from kvxfer.errors import ConfigError, KvxferError, TransferFailedError, UnavailableError
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.testing import eventually
from kvxfer_jax import Arrays, _jobs
from kvxfer_vllm.connector import KvxferConnector
from kvxfer_vllm.fingerprint import model_fingerprint
from kvxfer_vllm.groups import GroupBlocks, layer_groups
from kvxfer_vllm.metadata import KvxferMetadata, PublishOrder, ReadOrder
from kvxfer_vllm.rank_cache import attention_instruction_sets
from kvxfer_vllm.startup import refuse_unsupported
from kvxfer_vllm.worker import KvxferWorker
from tests.vllm.rig import (
    BLOCK_TOKENS,
    Engine,
    drain,
    expected,
    handed_over,
    kv_cache_config,
    prompt_of,
    sent_to_both,
    vllm_config,
)
from tests.vllm.tpu import TpuEngine, TpuRunner, on_tpu
from tests.xla.requests import noise
from tools.serve.process import free_port

pytestmark = pytest.mark.vllm


@pytest.fixture
def engines(monkeypatch):
    """Makes engines on a number of devices or in host memory, each with a port of its own, and closes them."""
    monkeypatch.setenv("KVXFER_SIDE_CHANNEL_HOST", "127.0.0.1")
    made = []

    def make(role, name, devices=None, agent="inproc", **options):
        port = free_port()
        monkeypatch.setenv("KVXFER_SIDE_CHANNEL_PORT", str(port))
        if devices is None:
            engine = Engine(role, name=name, agent=agent, **options)
        else:
            engine = TpuEngine(role, name=name, devices=devices, agent=agent, **options)
        made.append(engine)
        engine.side_channel_port = port
        engine.start()
        return engine

    yield make
    for engine in made:
        engine.close()


@pytest.mark.parametrize(
    ("source", "target"),
    [(2, 1), (1, 2), (2, 2), (4, 2), (1, 4), (2, None), (None, 2), (4, None), (None, 4)],
    ids=lambda devices: "host" if devices is None else f"{devices} devices",
)
def test_tokens_equal_those_of_one_engine(engines, agent, source, target):
    """KV moved between runners, or between a runner and host memory, gives the same tokens as KV computed by one engine."""
    sets = attention_instruction_sets(layer_groups(kv_cache_config()), vllm_config(), kv_cache_config())
    if None in (source, target) and set(sets.values()) != {"vec"}:
        pytest.skip("vLLM's CPU attention has another order of bytes on this processor, which no other engine knows")
    producer, consumer = engines("kv_producer", "P", source, agent), engines("kv_consumer", "D", target, agent)
    prompt = prompt_of(333)
    params = handed_over(producer, "p", prompt)
    consumer.add("d", prompt, params, max_tokens=5)
    consumer.run()
    drain(producer, consumer)
    assert consumer.answers["d"].tokens == expected(prompt, 5)
    assert consumer.computed_tokens == 5
    assert len(consumer.stats["transfer_seconds"]) == producer.stats["released_leases"] == 1
    heads = max(2, target or 1)
    assert consumer.stats["transfer_bytes"] == [-(-333 // BLOCK_TOKENS) * 2 * heads * BLOCK_TOKENS * 8 * 4]


@pytest.mark.parametrize("first", ["P", "D"])
def test_sent_to_both_at_once(engines, agent, first):
    """Blocks are read from all devices of a runner during its prefill, by a consumer that knows the address of rank 0 only."""
    producer = engines("kv_producer", "P", 2, agent, chunk=128)
    consumer = engines("kv_consumer", "D", 4, agent)
    prompt = prompt_of(700)
    where = {
        "do_remote_prefill": True,
        "remote_engine_id": "P",
        "remote_host": "127.0.0.1",
        "remote_port": producer.side_channel_port,
    }
    assert sent_to_both(producer, consumer, prompt, where, first=first) == expected(prompt, 4)
    assert consumer.computed_tokens == 4 and producer.stats["released_leases"] == 1


def test_ranks_of_one_process_share_its_arena(engines):
    """The host memory for chunks of a process does not grow with the number of its devices."""
    engine = engines("kv_producer", "P", 4)
    arenas = [endpoint.staging.memory.nbytes for endpoint in engine.kvxfer.worker_half.group.endpoints]
    assert len(arenas) == 4 and sum(arenas) <= Settings().staging_nbytes


def test_a_load_that_fails_at_one_device(engines, monkeypatch):
    """A device that cannot unpack its part fails that request and no other; its blocks are freed and its lease is released."""
    producer, consumer = engines("kv_producer", "P", 2), engines("kv_consumer", "D", 2)
    real, failed = _jobs.unpack, []

    def unpack(work, packed):
        if not failed and work[0][0].shard == 1:
            failed.append(work[0][0].device)
            raise TransferFailedError("the device is out of order")
        real(work, packed)

    monkeypatch.setattr(_jobs, "unpack", unpack)
    for name, prompt in (("one", prompt_of(100)), ("two", prompt_of(100, seed=2))):
        params = handed_over(producer, f"p-{name}", prompt)
        consumer.add(f"d-{name}", prompt, params, max_tokens=3)
        drain(consumer, producer)
    assert failed == ["jax:1"]
    assert (consumer.answers["d-one"].finish_reason, consumer.answers["d-one"].tokens) == ("error", [])
    assert consumer.answers["d-two"].tokens == expected(prompt, 3)
    assert consumer.stats["failed_transfers"] == {"TransferFailedError": 1}


def test_requests_while_the_runner_computes(engines):
    """Steps and loads, which both donate the caches, take turns: no donated array is used."""
    producer, consumer = engines("kv_producer", "P", 2), engines("kv_consumer", "D", 2)
    prompts = {f"{i}": prompt_of(150 + 40 * i, seed=i + 1) for i in range(6)}
    consumer.add("alone", prompt_of(64, seed=9), max_tokens=60)
    for name, prompt in prompts.items():
        consumer.add(f"d{name}", prompt, handed_over(producer, f"p{name}", prompt), max_tokens=4)
        consumer.step()
    drain(consumer, producer)
    assert consumer.answers["alone"].tokens == expected(prompt_of(64, seed=9), 60)
    for name, prompt in prompts.items():
        assert consumer.answers[f"d{name}"].tokens == expected(prompt, 4)
    assert "hook_errors" not in consumer.stats | producer.stats


def test_a_step_that_raises(engines, monkeypatch):
    """After a step that raises before it uses the caches, kvxfer and the next step can use them."""
    producer, consumer = engines("kv_producer", "P", 2), engines("kv_consumer", "D", 2)
    prompt = prompt_of(100)
    params = handed_over(producer, "p", prompt)
    with monkeypatch.context() as patch:
        patch.setattr(producer.runner, "model_fn", lambda *_: 1 / 0)
        producer.add("other", prompt_of(50))
        with pytest.raises(ZeroDivisionError):
            producer.step()
    consumer.add("d", prompt, params, max_tokens=3)
    drain(consumer)
    assert consumer.answers["d"].tokens == expected(prompt, 3)


def test_shut_down_in_the_middle_of_a_step(engines):
    """An engine that ends in its turn at the caches does not wait for threads that wait for them; its consumers' loads fail."""
    producer = engines("kv_producer", "P", 2)
    consumer = engines("kv_consumer", "D", 2, read_timeout_seconds=20, peer_timeout_seconds=1)
    prompt = prompt_of(100)
    params = handed_over(producer, "p", prompt)
    producer.worker.bind_connector_metadata(KvxferMetadata())
    consumer.add("d", prompt, params, max_tokens=3)
    consumer.step()
    endpoints = producer.kvxfer.worker_half.group.endpoints
    eventually(lambda: any(endpoint.in_use()["packing"] for endpoint in endpoints))
    producer.worker.shutdown()
    drain(consumer)
    assert consumer.answers["d"].finish_reason == "error"


@pytest.mark.parametrize("steps", [0, 2], ids=["at once", "some steps later"])
def test_caches_that_the_runner_replaces(engines, steps):
    """After new weights a runner has new caches: the content of the old ones is not served, and new requests work."""
    producer, consumer = engines("kv_producer", "P", 2), engines("kv_consumer", "D", 1)
    prompt, later = prompt_of(100), prompt_of(200, seed=5)
    params = handed_over(producer, "p", prompt)
    producer.runner.delete_kv_cache()
    for _ in range(steps):
        producer.step()
    producer.runner.reinitialize_kv_cache()
    producer.scheduler.reset_prefix_cache()
    drain(producer)
    assert producer.stats["revoked_leases"] == 1
    assert producer.stats.get("hook_errors", {}) == ({"caches_to_kvxfer": steps} if steps else {})
    consumer.add("d", prompt, params, max_tokens=3)
    drain(consumer)
    assert consumer.answers["d"].finish_reason == "error"
    consumer.add("d2", later, handed_over(producer, "p2", later), max_tokens=3)
    drain(consumer, producer)
    assert consumer.answers["d2"].tokens == expected(later, 3)


# -- byte by byte, in bfloat16 -------------------------------------------------------------------------------------------

HEADS, HEAD_DIM, BLOCKS = 8, 128, 12


def of_eight_heads(name, devices, block_tokens):
    """Configurations of a model with eight KV heads, whose caches are in bfloat16."""
    config = vllm_config("kv_both", engine_id=name, agent="inproc")
    on_tpu(config, devices)
    config.model_config.get_total_num_kv_heads = lambda: HEADS
    spec = FullAttentionSpec(block_size=block_tokens, num_kv_heads=HEADS, head_size=HEAD_DIM, dtype=torch.bfloat16)
    groups = [KVCacheGroupSpec(["layers.0", "layers.1"], spec)]
    return config, KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)


def numbers(shape, seed):
    """Bits of bfloat16 without NaN, which the simulated steps on the CPU would change."""
    return noise(shape, seed) & 0xBFFF


class OnTpu:
    """A worker whose runner has noise in its caches."""

    def __init__(self, name, devices, block_tokens, seed):
        config, cache_config = of_eight_heads(name, devices, block_tokens)
        self.runner = TpuRunner(config, devices, jnp.bfloat16)
        self.runner.kv_cache_config = cache_config
        self.runner.reinitialize_kv_cache()
        shape = self.runner.kv_caches[0].shape
        assert shape == (BLOCKS, block_tokens, HEADS, 2, HEAD_DIM)
        self.content = [numbers((BLOCKS, block_tokens, HEADS, 2 * HEAD_DIM), seed + i) for i in range(2)]
        self.runner.kv_caches = [
            jax.device_put(each.reshape(shape).view(jnp.bfloat16), self.runner.sharding, may_alias=False)
            for each in self.content
        ]
        self.connector = KvxferConnector(config, KVConnectorRole.WORKER, cache_config)
        self.connector.register_runner(self.runner)
        self.addresses = [self.connector.worker_half.group.endpoints[0].address]

    def step(self, **orders):
        """Take one step as vLLM's mixin does, with a forward that changes nothing."""
        self.connector.bind_connector_metadata(KvxferMetadata(**orders))
        self.runner.run([], [], [np.zeros((0, *cache.shape[2:]), jnp.bfloat16) for cache in self.runner.kv_caches])
        return self.connector.get_transfer_results(set())

    def now(self):
        """``[block, token, head, K and V]`` of each layer, as the last step saw it."""
        self.step()
        return [each.view(np.uint16).reshape(self.content[0].shape) for each in self.runner.logits]

    def close(self):
        self.connector.shutdown()


class InHostMemory:
    """A worker with the same model's caches in host memory: NHD, in one rank."""

    def __init__(self, name, devices, block_tokens, seed):
        config, _ = of_eight_heads(name, 1, block_tokens)
        self.content = [numbers((BLOCKS, block_tokens, HEADS, 2 * HEAD_DIM), seed + i) for i in range(2)]
        self.arrays = [each.copy() for each in self.content]
        seen = {f"layers.{i}": each.transpose(0, 2, 1, 3) for i, each in enumerate(self.arrays)}
        cache = KVCache.from_layers(
            seen,
            components=("kv",),
            dtype="bfloat16",
            groups={"full/0": list(seen)},
            fingerprint=model_fingerprint(config),
        )
        endpoint = Endpoint(cache, "inproc", name=name)
        self.addresses = [endpoint.address]
        self.worker = KvxferWorker([endpoint])

    def step(self, **orders):
        self.worker.follow(KvxferMetadata(**orders))
        return self.worker.results()

    def now(self):
        return self.arrays

    def close(self):
        self.worker.shutdown()


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((OnTpu, 4, 16), (OnTpu, 2, 32)),
        ((OnTpu, 2, 32), (OnTpu, 4, 16)),
        ((OnTpu, 4, 32), (OnTpu, 1, 32)),
        ((OnTpu, 4, 16), (InHostMemory, 1, 32)),
        ((InHostMemory, 1, 32), (OnTpu, 4, 16)),
        ((InHostMemory, 1, 16), (OnTpu, 2, 16)),
    ],
    ids=["4 to 2", "2 to 4", "4 to 1", "4 to host", "host to 4", "host to 2"],
)
def test_every_byte(source, target, request, monkeypatch):
    """Each head is read into its own place, K before V, in these blocks and in no other."""
    monkeypatch.setenv("KVXFER_SIDE_CHANNEL_PORT", "0")
    near, far = source[0]("P", *source[1:], seed=1), target[0]("D", *target[1:], seed=11)
    for worker in (near, far):
        request.addfinalizer(worker.close)
    blocks, into = ([5, 11, 2, 8], [3, 6]) if source[2] < target[2] else ([5, 11], [3, 6, 9, 0])
    if source[2] == target[2]:
        into = into[: len(blocks)]
    wanted = [each.copy() for each in far.content]
    for here, there in zip(near.content, wanted, strict=True):
        there[into] = here[blocks].reshape(len(into), target[2], HEADS, -1)
    lease = LeaseRef.mint(producer="P", addresses=near.addresses, num_tokens=64)
    near.step(announce=[lease])
    near.step(publish=[PublishOrder("p", lease, [GroupBlocks(blocks)])])
    loaded = far.step(read=[ReadOrder("d", lease, [GroupBlocks(into)], 0)])
    while not loaded.finished_recving:
        loaded = far.step()
    assert not loaded.failed_recving
    for found, expected_bytes in zip(far.now(), wanted, strict=True):
        np.testing.assert_array_equal(found, expected_bytes)
    sent = near.step()
    while not sent.finished_sending:
        sent = near.step()
    for found, before in zip(near.now(), near.content, strict=True):
        np.testing.assert_array_equal(found, before)


# -- what is refused, and what is said of the platform -------------------------------------------------------------------


def without_a_layer(runner):
    del runner.layer_name_to_kvcache_index["layers.1"]


def states(runner):
    runner.kv_caches[1] = (runner.kv_caches[0], runner.kv_caches[0])


def fewer_blocks(runner):
    runner.kv_caches = [jax.device_put(cache[:-1], runner.sharding) for cache in runner.kv_caches]


def padded_heads(runner):
    padded = [jnp.pad(cache, ((0, 0), (0, 0), (0, 4), (0, 0), (0, 0))) for cache in runner.kv_caches]
    runner.kv_caches = [jax.device_put(cache, runner.sharding) for cache in padded]


def divided_blocks(runner):
    spec = PartitionSpec("model")
    runner.kv_caches = [jax.device_put(cache, NamedSharding(runner.mesh, spec)) for cache in runner.kv_caches]


def copies(runner):
    runner.kv_caches = [jax.device_put(c, NamedSharding(runner.mesh, PartitionSpec())) for c in runner.kv_caches]


def deleted(runner):
    runner.kv_caches[0].delete()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_a_layer, "2 caches, which are not one for each of 2 layers"),
        (states, "a tuple is no jax.Array"),
        (fewer_blocks, "have 11 blocks, the block table has 12"),
        (padded_heads, r"shape \(12, 16, 12, 2, 128\), which is not K and V of 8 heads of 128 elements"),
        (divided_blocks, "sharded otherwise than between heads"),
        (copies, "several devices have copies of the same heads"),
        (deleted, "donated, and the array that it became was not given back"),
    ],
)
def test_caches_that_are_refused(change, says):
    """Caches that differ from vLLM's configuration or are not supported end the start by name, before a port is bound."""
    config, cache_config = of_eight_heads("P", 4, 16)
    runner = TpuRunner(config, 4, jnp.bfloat16)
    runner.kv_cache_config = cache_config
    runner.reinitialize_kv_cache()
    change(runner)
    connector = KvxferConnector(config, KVConnectorRole.WORKER, cache_config)
    with pytest.raises(KvxferError, match=says):
        connector.register_runner(runner)
    assert connector.get_handshake_metadata() is None


def test_devices_of_several_hosts_are_refused(monkeypatch):
    """A mesh over several hosts, of which a process has only a part, is refused by name."""
    config, cache_config = of_eight_heads("P", 4, 16)
    runner = TpuRunner(config, 4, jnp.bfloat16)
    runner.kv_cache_config = cache_config
    runner.reinitialize_kv_cache()
    real = Arrays.shares
    monkeypatch.setattr(Arrays, "shares", lambda *given, **more: real(*given, **more)[:2])
    connector = KvxferConnector(config, KVConnectorRole.WORKER, cache_config)
    with pytest.raises(ConfigError, match="several hosts yet: 2 of 4 are here"):
        connector.register_runner(runner)


def test_without_jax(monkeypatch):
    """The error for a missing JAX says what to install."""
    config, cache_config = of_eight_heads("P", 4, 16)
    monkeypatch.setattr("kvxfer_jax.buffer.find_spec", lambda _: None)
    connector = KvxferConnector(config, KVConnectorRole.WORKER, cache_config)
    with pytest.raises(UnavailableError, match=r"pip install 'kvxfer\[jax\]'"):
        connector.register_runner(object())


def test_what_a_tpu_has_not():
    """Configurations that TPUs do not support are refused before there are caches."""
    config, cache_config = of_eight_heads("P", 4, 16)
    with pytest.raises(ConfigError, match="granularity 'layer' on TPUs"):
        refuse_unsupported(config, cache_config, layer_by_layer=True)
    spec = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    latents = KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l.0"], spec)])
    with pytest.raises(ConfigError, match="MLA on TPUs yet"):
        refuse_unsupported(config, latents)


def test_one_worker_reports_for_all_devices():
    """vLLM waits for one report of each request on TPUs, where one process drives all devices, and for all workers elsewhere."""
    config, cache_config = of_eight_heads("P", 4, 16)
    assert KvxferConnector(config, KVConnectorRole.SCHEDULER, cache_config).get_finished_count() == 1
    assert KvxferConnector(vllm_config(), KVConnectorRole.SCHEDULER, kv_cache_config()).get_finished_count() is None


def test_importing_imports_no_jax():
    """Importing the connector does not import JAX."""
    code = (
        "import sys, kvxfer_vllm.connector, kvxfer_vllm.worker, kvxfer_vllm.tpu, kvxfer_vllm.startup, kvxfer_vllm.rank_cache\n"
        "assert not {'jax', 'kvxfer_jax', 'kvxfer_nixl'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=115)

# SPDX-License-Identifier: Apache-2.0
"""Servers of several workers, in pipeline stages of several tensor parallel ranks: vLLM's scheduler, real endpoints."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from kvxfer.errors import ConfigError
from kvxfer_vllm.startup import refuse_unsupported
from tests.vllm.rig import (
    BLOCK_TOKENS,
    HEAD_DIM,
    HEADS,
    drain,
    expected,
    handed_over,
    kv_cache_config,
    prompt_of,
    sent_to_both,
    vllm_config,
    where,
)
from tests.vllm.staged import StagedEngine, patch_process_groups

pytestmark = pytest.mark.vllm

FULL = (0, 0, 0)
WINDOW = 3 * BLOCK_TOKENS
HYBRID = (0, WINDOW, WINDOW)
LAYER_BLOCK_NBYTES = HEADS * BLOCK_TOKENS * 2 * HEAD_DIM * 4
PAIRS = {
    "2 stages to 1": (FULL, {"stages": (3, 3)}, {"stages": (6,)}),
    "1 stage to 2": (HYBRID, {"stages": (6,)}, {"stages": (2, 4)}),
    "2 stages to 3": (HYBRID, {"stages": (4, 2)}, {"stages": (1, 4, 1)}),
    "2 stages of 2 ranks to 1": (HYBRID, {"stages": (2, 4), "tp_size": 2}, {"stages": (6,)}),
    "2 ranks to 2 stages": (FULL, {"stages": (6,), "tp_size": 2}, {"stages": (5, 1)}),
    "2 stages to 2 stages of 2 ranks": (FULL, {"stages": (3, 3)}, {"stages": (1, 5), "tp_size": 2}),
}


@pytest.fixture
def staged(engines, monkeypatch):
    """Makes engines of several workers and closes them."""
    patch_process_groups(monkeypatch)
    return lambda role, name, agent="inproc", **options: engines(role, name, make=StagedEngine, agent=agent, **options)


def assert_served(producer, consumer, prompt, windows, name="1"):
    """Hand a prompt over; the tokens are those of one worker without transfers, and no block stays in use."""
    params = handed_over(producer, f"p{name}", prompt)
    consumer.add(f"d{name}", prompt, params, max_tokens=6)
    consumer.run()
    drain(producer, consumer)
    assert consumer.answers[f"d{name}"].tokens == expected(prompt, 6, windows)
    return params


@pytest.mark.parametrize("pair", PAIRS)
def test_tokens_equal_those_of_one_worker(staged, pair):
    """Tokens are those of one worker without transfers for any two divisions of the model, and each byte is moved once."""
    windows, source, target = PAIRS[pair]
    producer = staged("kv_producer", "P", windows=windows, **source)
    consumer = staged("kv_consumer", "D", windows=windows, **target)
    params = assert_served(producer, consumer, prompt_of(700), windows)
    assert (params["tp_size"], params["pp_size"]) == (source.get("tp_size", 1), len(source["stages"]))
    own = [worker.connector.worker_half.group.endpoints[0].address for worker in producer.workers]
    assert list(params["kvxfer"]["addresses"]) == own
    assert len(consumer.stats["transfer_seconds"]) == len(consumer.workers)
    assert producer.stats["released_leases"] == len(producer.workers)
    if windows is FULL:
        assert sum(consumer.stats["transfer_bytes"]) == -(-700 // BLOCK_TOKENS) * 6 * LAYER_BLOCK_NBYTES
    for length in (1, BLOCK_TOKENS + 1, WINDOW + BLOCK_TOKENS - 1):
        assert_served(producer, consumer, prompt_of(length, seed=length), windows, f"-{length}")


def test_stages_over_nixl(staged):
    """Stages of two ranks with windows are served over NIXL."""
    producer = staged("kv_producer", "P", "nixl", windows=HYBRID, stages=(2, 4), tp_size=2)
    consumer = staged("kv_consumer", "D", "nixl", windows=HYBRID, stages=(1, 5))
    assert_served(producer, consumer, prompt_of(700), HYBRID)


@pytest.mark.parametrize(("granularity", "windows"), [("chunk", HYBRID), ("layer", FULL)])
def test_sent_to_both_at_once(staged, granularity, windows):
    """Blocks of a running prefill leave stage by stage, while two batches are under way, and the tokens are right."""
    options = {"windows": windows, "granularity": granularity}
    producer = staged("kv_producer", "P", stages=(3, 3), chunk=128, **options)
    consumer = staged("kv_consumer", "D", stages=(2, 4), **options)
    prompt, params = prompt_of(1000), {**where(producer), "pp_size": 2}
    assert sent_to_both(producer, consumer, prompt, params, max_tokens=6) == expected(prompt, 6, windows)
    assert producer.stats["released_leases"] == 2
    assert producer.stats["partial_publishes"] > 0


def test_a_stage_that_fails(staged):
    """If one stage cannot read, the request fails when all stages have ended, once, and the next one is served."""
    producer = staged("kv_producer", "P", stages=(6,))
    consumer = staged("kv_consumer", "D", stages=(3, 3), policy="recompute")
    prompt = prompt_of(300)
    params = handed_over(producer, "p", prompt)
    group = consumer.workers[1].connector.worker_half.group
    read, group.read = group.read, lambda *_, **__: 1 / 0
    consumer.add("d", prompt, params, max_tokens=3)
    while "failed_transfers" not in consumer.stats:
        consumer.step()
    group.read = read
    drain(consumer, producer)
    assert consumer.stats["failed_transfers"] == {"ZeroDivisionError": 1}
    assert consumer.answers["d"].tokens == expected(prompt, 3, FULL)
    assert_served(producer, consumer, prompt_of(200, seed=2), FULL, "2")


def test_copies_of_the_kv(staged):
    """Ranks of prefill context parallelism all have the KV, and the bytes are read from them in equal shares, each once."""
    producer = staged("kv_producer", "P", stages=(3, 3), copies=2)
    consumer = staged("kv_consumer", "D", stages=(6,))
    params = assert_served(producer, consumer, prompt_of(700), FULL)
    assert len(params["kvxfer"]["addresses"]) == 1  # rank 0 knows the others
    assert producer.stats["released_leases"] == 4
    assert sum(consumer.stats["transfer_bytes"]) == -(-700 // BLOCK_TOKENS) * 6 * LAYER_BLOCK_NBYTES


@pytest.mark.parametrize(
    ("sizes", "role", "message"),
    [
        ({"decode": 2}, "kv_producer", "decode context parallelism, .*decode_context_parallel_size is 2.; set it to 1"),
        ({"prefill": 2}, "kv_consumer", "prefill context parallelism on servers that decode .*set it to 1"),
        ({"prefill": 2}, "kv_both", "prefill context parallelism on servers that decode .*kv_role to 'kv_producer'"),
        ({"prefill": 2}, "kv_producer", None),
    ],
)
def test_context_parallelism(sizes, role, message):
    """Ranks that have some tokens each are refused; ranks that all have all tokens may prefill."""
    config = vllm_config(role)
    for name, size in sizes.items():
        setattr(config.parallel_config, f"{name}_context_parallel_size", size)
    if message is None:
        refuse_unsupported(config, kv_cache_config())
        return
    with pytest.raises(ConfigError, match=f"does not support {message}"):
        refuse_unsupported(config, kv_cache_config())


def test_stages_that_are_refused():
    """Stages on TPUs, and a stage without a cache, are refused by a sentence that says what to do."""
    config, caches = vllm_config(), kv_cache_config()
    config.parallel_config.pipeline_parallel_size = 2
    refuse_unsupported(config, caches)
    caches.kv_cache_groups[0].layer_names.clear()
    with pytest.raises(ConfigError, match=r"pipeline stages without a KV cache; .*VLLM_PP_LAYER_PARTITION"):
        refuse_unsupported(config, caches)
    object.__setattr__(config.device_config, "device_type", "tpu")
    with pytest.raises(
        ConfigError, match=r"pipeline parallelism on TPUs yet .pipeline_parallel_size is 2.; set it to 1"
    ):
        refuse_unsupported(config, kv_cache_config())

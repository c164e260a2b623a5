# SPDX-License-Identifier: Apache-2.0
"""Caches of a runner that keeps them as jax.Arrays: handed over by ``register_runner``, and the runner's in each step.

vLLM's classes and JAX are real; the runner is a stand-in for tpu-inference's, and the devices are JAX's on the CPU.
"""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("jax", reason="jax is not installed")

from kvxfer import registry
from kvxfer_vllm.local.process import free_port
from tests.vllm.rig import BLOCK_TOKENS, Engine, drain, expected, handed_over, prompt_of
from tests.vllm.tpu import TpuEngine

pytestmark = pytest.mark.vllm


@pytest.fixture
def engines(monkeypatch):
    """Makes engines, on so many devices or in host memory, each with a port of its own; closes them."""
    monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setenv("KVXFER_SIDE_CHANNEL_HOST", "127.0.0.1")
    made = []

    def make(role, name, devices=None, agent="inproc", **options):
        monkeypatch.setenv("KVXFER_SIDE_CHANNEL_PORT", str(free_port()))
        if devices is None:
            engine = Engine(role, name=name, agent=agent, **options)
        else:
            engine = TpuEngine(role, name=name, devices=devices, agent=agent, **options)
        made.append(engine)
        engine.start()
        return engine

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(params=["inproc", "nixl"])
def agent(request):
    """Each transfer engine that can run here."""
    reason = registry.why_unavailable(request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize(
    ("source", "target"),
    [(2, 1), (1, 2), (2, 2), (4, 2), (1, 4), (2, None), (None, 2), (4, None), (None, 4)],
    ids=lambda devices: "host" if devices is None else f"{devices} devices",
)
def test_tokens_equal_those_of_one_engine(engines, agent, source, target):
    """KV that went between runners, or between a runner and host memory, gives the tokens of KV computed there."""
    producer, consumer = engines("kv_producer", "P", source, agent), engines("kv_consumer", "D", target, agent)
    prompt = prompt_of(333)
    params = handed_over(producer, "p", prompt)
    consumer.add("d", prompt, params, max_tokens=5)
    consumer.run()
    drain(producer, consumer)
    assert consumer.answers["d"].tokens == expected(prompt, 5)
    assert consumer.computed_tokens == 5
    assert len(consumer.stats["transfer_seconds"]) == producer.stats["settled_leases"] == 1
    heads = max(2, target or 1)
    assert consumer.stats["transfer_bytes"] == [-(-333 // BLOCK_TOKENS) * 2 * heads * BLOCK_TOKENS * 8 * 4]

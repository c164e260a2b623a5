# SPDX-License-Identifier: Apache-2.0
"""Caches on a GPU: the buffers for them, and work that waits until the GPU has finished what it was given before.

vLLM's classes are real; the GPU is simulated, because no machine here has one that vLLM runs on.
"""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("triton", reason="the kernel of GPU buffers is written in Triton")

import torch

from kvxfer import registry
from kvxfer.errors import ConfigError
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer_vllm.groups import GroupBlocks
from kvxfer_vllm.metadata import KvxferMetadata, PartialPublishOrder, PublishOrder, ReadOrder
from kvxfer_vllm.rank_cache import buffer_adapter
from kvxfer_vllm.startup import refuse_unsupported
from kvxfer_vllm.worker import KvxferWorker
from tests.devices.host_gpu import RowsBuffer
from tests.vllm.rig import drain, expected, handed_over, in_groups, kv_cache_config, prompt_of, vllm_config
from tests.vllm.scripted import ScriptedEndpoint

pytestmark = pytest.mark.vllm


def on(device, by_way_of):
    config = vllm_config()
    object.__setattr__(config.device_config, "device_type", device)
    object.__setattr__(config.kv_transfer_config, "kv_buffer_device", by_way_of)
    return config


@pytest.mark.parametrize(
    ("device", "by_way_of", "hip", "name"),
    [
        ("cpu", "cpu", None, "host"),
        ("cuda", "cuda", None, "cuda"),
        ("cuda", "cpu", None, "cuda-staged"),
        ("cuda", "cuda", "7.1", "rocm"),
        ("cuda", "cpu", "7.1", "rocm-staged"),
    ],
)
def test_buffers_of_a_configuration(monkeypatch, device, by_way_of, hip, name):
    """vLLM's device and ``kv_buffer_device`` select the adapter for the caches; AMD's GPUs are called cuda, too."""
    monkeypatch.setattr(torch.version, "hip", hip)
    config = on(device, by_way_of)
    refuse_unsupported(config, kv_cache_config())
    assert buffer_adapter(config) == name
    assert name in registry.names("buffers")


def test_an_unsupported_buffer_device():
    """Another ``kv_buffer_device`` than the GPU or the CPU is refused for caches on a GPU."""
    with pytest.raises(ConfigError, match="kv_buffer_device 'xpu' with caches on 'cuda'; set 'cuda' or 'cpu'"):
        refuse_unsupported(on("cuda", "xpu"), kv_cache_config())


class Mark:
    """Completion of work on a device; True after it was asked this many times."""

    def __init__(self, questions):
        self.questions = questions

    @property
    def done(self):
        self.questions -= 1
        return self.questions < 0

    def wait(self, timeout_s=None):
        return True


def test_orders_wait_for_the_device():
    """Partial publication waits for the step that fills the blocks; complete publication and reads wait for the steps before."""
    endpoint, marks = ScriptedEndpoint(), (Mark(i) for i in itertools.count())
    made = []

    def mark():
        made.append(next(marks))
        return made[-1]

    worker = KvxferWorker([endpoint], in_groups([["a"], ["b"]]), mark)
    first, second, third = (LeaseRef.mint(producer="P", addresses=["tcp://p:1"]) for _ in range(3))
    worker.follow(KvxferMetadata(publish_partial=[PartialPublishOrder(first, [[7, 8]], [1])]))
    assert made == []
    worker.layer_computed("a")
    assert endpoint.after == [("publish part", [made[0]])]
    worker.step_computed()
    worker.results()
    assert endpoint.after[1:] == [("publish part", [made[1]])] and len(made) == 2
    endpoint.after.clear()
    worker.follow(
        KvxferMetadata(
            publish=[PublishOrder("r", second, [GroupBlocks([1])])], read=[ReadOrder("q", third, [GroupBlocks([2])], 0)]
        )
    )
    assert endpoint.after == [("publish", [made[2]]), ("read", [made[2]])] and len(made) == 3
    worker.follow(KvxferMetadata(read=[ReadOrder("s", first, [GroupBlocks([3])], 0)]))
    assert endpoint.after[-1] == ("read", [made[3]])


def test_tokens_through_a_gpu_with_work_queued(engines, monkeypatch):
    """Tokens are right for caches on a GPU whose work ends long after the call that started it."""
    asked = []

    class Behind(RowsBuffer):
        def mark(self):
            asked.append(Mark(3))
            return asked[-1]

    real = registry.load
    monkeypatch.setattr("kvxfer_vllm.rank_cache.buffer_adapter", lambda _: "behind")
    monkeypatch.setattr(registry, "load", lambda name, kind="agents": Behind if name == "behind" else real(name, kind))
    producer, consumer = (
        engines(role, name, agent="inproc") for role, name in (("kv_producer", "P"), ("kv_consumer", "D"))
    )
    prompt = prompt_of(333)
    params = handed_over(producer, "p", prompt)
    consumer.add("d", prompt, params, max_tokens=5)
    consumer.run()
    drain(producer, consumer)
    assert consumer.answers["d"].tokens == expected(prompt, 5)
    assert len(asked) >= 2
    assert all(mark.questions < 0 for mark in asked)
    assert not producer.kvxfer.worker_half.group.endpoints[0].cache.buffers[0].memory

# SPDX-License-Identifier: Apache-2.0
"""Requests that come without parameters, or are computed locally although they asked for a transfer, are counted and warned of."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from kvxfer.errors import PeerTimeoutError
from kvxfer_serving.transfer_params import Role
from kvxfer_vllm.arrivals import LOCAL_IN_TURN, PLAIN_IN_TURN, Arrivals
from kvxfer_vllm.stats import KvxferStats
from tests.vllm.rig import Engine, drain, expected, handed_over, prompt_of, scripted
from tests.vllm.scripted import ScriptedEndpoint

pytestmark = pytest.mark.vllm


class _Clock:
    def __init__(self):
        self.s = 0.0

    def __call__(self):
        return self.s


def _decode(clock, *, recomputes=False):
    stats = KvxferStats()
    return stats, Arrivals(stats, Role("D", is_producer=False, is_consumer=True), recomputes=recomputes, now=clock)


@pytest.fixture
def said(caplog):
    """Give the warnings so far."""
    caplog.set_level(logging.WARNING, "vllm.kvxfer_vllm.arrivals")
    logging.getLogger("vllm").propagate, before = True, logging.getLogger("vllm").propagate
    yield lambda: [record.message for record in caplog.records if record.name.endswith("arrivals")]
    logging.getLogger("vllm").propagate = before


def test_plain_requests_are_warned_of(said):
    """After many plain requests in turn one warning names the router's settings; not again within an hour, and not before that many."""
    clock = _Clock()
    stats, arrivals = _decode(clock)
    for _ in range(PLAIN_IN_TURN - 1):
        arrivals.plain()
    arrivals.asked()
    for _ in range(PLAIN_IN_TURN - 1):
        arrivals.plain()
    assert said() == []
    for _ in range(3 * PLAIN_IN_TURN):
        arrivals.plain()
    (line,) = said()
    assert line.startswith("100 requests in turn came to this decode server and none had kv_transfer_params")
    assert "--kv-connector" in line
    for clock.s, warnings in ((3599.0, 1), (3601.0, 2)):
        arrivals.asked()
        for _ in range(PLAIN_IN_TURN):
            arrivals.plain()
        assert len(said()) == warnings
    assert stats.data["plain_requests"] == 2 * (PLAIN_IN_TURN - 1) + 5 * PLAIN_IN_TURN


def test_local_requests_are_warned_of(said):
    """When no transfer is served for many requests in turn, one warning names the most frequent reason and its likely cause."""
    stats, arrivals = _decode(_Clock())
    for _ in range(LOCAL_IN_TURN - 1):
        arrivals.local("no_lease")
    arrivals.served()
    for _ in range(LOCAL_IN_TURN - 1):
        arrivals.local("no_lease")
    assert said() == []
    for _ in range(3 * LOCAL_IN_TURN):
        arrivals.local("bad_type")
    (line,) = said()
    assert f"(no_lease: {LOCAL_IN_TURN - 1}): the prefill server runs another connector" in line
    assert stats.data["local_requests"] == {"no_lease": 2 * (LOCAL_IN_TURN - 1), "bad_type": 3 * LOCAL_IN_TURN}


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_requests_of_a_decode_server_are_counted(policy):
    """A plain request, one with refused parameters, one whose transfer fails and one that is served: each is in its own series."""
    net = {}
    producer = Engine("kv_producer", name="P", endpoint=ScriptedEndpoint(net))
    consumer = Engine("kv_consumer", name="D", endpoint=ScriptedEndpoint(net), policy=policy)
    scripted(consumer).automatic = False
    prompts = [prompt_of(40, seed=seed) for seed in range(4)]
    params = [handed_over(producer, f"p{number}", prompt) for number, prompt in enumerate(prompts)]
    consumer.add("plain", prompts[0], max_tokens=2)
    consumer.add("flags", prompts[0], {"do_remote_prefill": False}, max_tokens=2)
    consumer.add("refused", prompts[1], params[1] | {"kvxfer": None}, max_tokens=2)
    consumer.add("fails", prompts[2], params[2], max_tokens=2)
    consumer.add("served", prompts[3], params[3], max_tokens=2)
    while len(scripted(consumer).reading) < 2:
        consumer.step()
    failing, good = (params[number]["kvxfer"]["token"] for number in (2, 3))
    scripted(consumer).finish(failing, PeerTimeoutError("no answer"))
    scripted(consumer).finish(good)
    consumer.run()
    drain(consumer)
    assert consumer.answers["served"].tokens == expected(prompts[3], 2)
    assert consumer.stats["plain_requests"] == 2
    recomputed = {"failed_transfer": 1} if policy == "recompute" else {}
    assert consumer.stats["local_requests"] == {"no_lease": 1} | recomputed
    assert consumer.stats["failed_transfers"] == {"PeerTimeoutError": 1}
    producer.close()
    consumer.close()


def test_a_load_that_a_reset_ends_is_counted():
    """A request that waits when the engine drops its caches is computed locally, and counted."""
    net = {}
    producer = Engine("kv_producer", name="P", endpoint=ScriptedEndpoint(net))
    consumer = Engine("kv_consumer", name="D", endpoint=ScriptedEndpoint(net))
    prompt = prompt_of(40)
    consumer.add("d", prompt, handed_over(producer, "p", prompt), max_tokens=2)
    consumer.scheduler.connector.reset_cache()
    consumer.run()
    assert consumer.answers["d"].tokens == expected(prompt, 2)
    assert consumer.stats["local_requests"] == {"caches_dropped": 1}
    producer.close()
    consumer.close()

# SPDX-License-Identifier: Apache-2.0
"""Two of vLLM's schedulers hand requests over through real endpoints: torch tensors, threads, leases, the lease check."""

from __future__ import annotations

import socket
import threading

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from kvxfer.errors import ConfigError, UnavailableError
from tests.vllm.rig import BLOCK_TOKENS, P_PARAMS, drain, expected, handed_over, prompt_of

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("length", [1, 33, 1000])
def test_tokens_equal_those_of_one_engine(engines, agent, length):
    """KV from a real transfer engine gives the same tokens as KV computed by one engine."""
    producer, consumer = (
        engines(role, name, agent=agent) for role, name in (("kv_producer", "P"), ("kv_consumer", "D"))
    )
    prompt = prompt_of(length)
    params = handed_over(producer, "p", prompt)
    consumer.add("d", prompt, params, max_tokens=5)
    consumer.run()
    drain(producer, consumer)
    assert consumer.answers["d"].tokens == expected(prompt, 5)
    assert consumer.computed_tokens == 5
    assert len(consumer.stats["transfer_seconds"]) == producer.stats["released_leases"] == 1
    assert consumer.stats["handshakes"] == {"met": 1}
    block_nbytes = 2 * 2 * BLOCK_TOKENS * 8 * 4  # layers, heads, tokens, content, float32
    assert consumer.stats["transfer_bytes"] == [-(-length // BLOCK_TOKENS) * block_nbytes]


def test_requests_in_both_directions_of_two_equal_engines(engines):
    """Two engines of role kv_both serve each other."""
    a, b = engines("kv_both", "A", agent="inproc"), engines("kv_both", "B", agent="inproc")
    for source, target, name in ((a, b, "ab"), (b, a, "ba")):
        prompt = prompt_of(200, seed=len(name) + ord(name[0]))
        params = handed_over(source, f"p-{name}", prompt)
        target.add(f"d-{name}", prompt, params, max_tokens=3)
        target.run()
        assert target.answers[f"d-{name}"].tokens == expected(prompt, 3)
    drain(a, b)


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_expired_lease(engines, policy):
    """A consumer that reads after the lease has ended gets no token made of the new content of the blocks."""
    producer = engines("kv_producer", "P", agent="inproc", lease_seconds=0.05)
    consumer = engines("kv_consumer", "D", agent="inproc", policy=policy)
    prompt = prompt_of(300)
    params = handed_over(producer, "p", prompt)
    drain(producer)  # the lease runs out
    producer.add("other", prompt_of(2000, seed=9), max_tokens=2)
    drain(producer)
    consumer.add("d", prompt, params, max_tokens=3)
    drain(consumer)
    assert producer.stats["expired_leases"] == 1
    assert consumer.stats["failed_transfers"] == {"LeaseEndedError": 1}
    if policy == "fail":
        assert (consumer.answers["d"].finish_reason, consumer.answers["d"].tokens) == ("error", [])
    else:
        assert consumer.answers["d"].tokens == expected(prompt, 3)


def test_producer_gone(engines):
    """A producer that has ended costs one error within the configured time; a new one is served."""
    producer = engines("kv_producer", "P", agent="inproc")
    consumer = engines("kv_consumer", "D", agent="inproc", peer_timeout_seconds=0.3, read_timeout_seconds=2)
    params = handed_over(producer, "p", prompt_of(100))
    producer.close()
    consumer.add("d", prompt_of(100), params, max_tokens=3)
    drain(consumer)
    assert consumer.answers["d"].finish_reason == "error"
    params = handed_over(engines("kv_producer", "P2", agent="inproc"), "p", prompt_of(100))
    consumer.add("d2", prompt_of(100), params, max_tokens=3)
    drain(consumer)
    assert consumer.answers["d2"].tokens == expected(prompt_of(100), 3)


def test_a_waiting_request_keeps_its_lease(engines):
    """A consumer that has no room yet renews the lease from another thread, without an engine step."""
    producer = engines("kv_producer", "P", agent="inproc", lease_seconds=2)
    consumer = engines("kv_consumer", "D", agent="inproc")
    prompt = prompt_of(1000)
    params = handed_over(producer, "p", prompt)
    consumer.add("blocker", prompt_of(3500, seed=3), max_tokens=2)
    consumer.step()
    consumer.add("d", prompt, params, max_tokens=3)
    consumer.step()
    assert not threading.Event().wait(30)  # the engine takes no step for longer than two leases
    consumer.run()
    drain(producer, consumer)
    assert consumer.answers["d"].tokens == expected(prompt, 3)
    assert producer.stats["released_leases"] == 1


def test_different_models_are_refused(engines):
    """Servers of different models refuse each other by name, and the request ends."""
    producer = engines("kv_producer", "P", agent="inproc", model_fingerprint="one")
    consumer = engines("kv_consumer", "D", agent="inproc", model_fingerprint="other")
    params = handed_over(producer, "p", prompt_of(100))
    consumer.add("d", prompt_of(100), params)
    drain(consumer)
    assert consumer.answers["d"].finish_reason == "error"
    assert consumer.stats["failed_transfers"] == {"IncompatibleError": 1}


def test_port_taken(engines, monkeypatch):
    """A side channel port that is in use ends the start with a sentence that names it and the variable to set."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("KVXFER_SIDE_CHANNEL_PORT", str(port))
        with pytest.raises(ConfigError, match=f"cannot listen on tcp://127.0.0.1:{port}.*KVXFER_SIDE_CHANNEL_PORT"):
            engines("kv_producer", "P", agent="inproc")


def test_agent_not_there(engines):
    """An unknown transfer engine ends the start with the list of those that are installed."""
    with pytest.raises((ConfigError, UnavailableError), match="warp"):
        engines("kv_producer", "P", agent="warp")


def test_side_channel_address_is_in_the_response(engines):
    """The response's remote_host and remote_port are the lease's first address."""
    producer = engines("kv_producer", "P", agent="inproc")
    producer.add("p", prompt_of(10), P_PARAMS)
    producer.run_until_answered("p")
    params = producer.answers["p"].kv_transfer_params
    assert list(params["kvxfer"]["addresses"]) == [f"tcp://{params['remote_host']}:{params['remote_port']}"]

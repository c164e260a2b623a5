# SPDX-License-Identifier: Apache-2.0
"""What ends early: caches that the engine drops (reset, update of weights), and requests that are preempted under pressure."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.v1.engine.core import EngineCore

from kvxfer_vllm.plugin import register
from tests.vllm.rig import Engine, drain, expected, handed_over, prompt_of, scripted
from tests.vllm.scripted import ScriptedEndpoint

pytestmark = pytest.mark.vllm

PROMPT = prompt_of(100)


def pair_of(*, producer=None, **consumer):
    """A producer and a consumer whose reads copy blocks."""
    net = {}
    made = Engine("kv_producer", name="P", endpoint=ScriptedEndpoint(net), **producer or {})
    return made, Engine("kv_consumer", name="D", endpoint=ScriptedEndpoint(net), **consumer)


def reset(engine, **options):
    """Reset the engine's caches as /reset_prefix_cache?reset_external=true does."""
    return engine.scheduler.reset_prefix_cache(reset_connector=True, **options)


def refused_reset(engine):
    """Reset the engine's caches while something stands that its first answer has to wait for."""
    assert not reset(engine)


def update_weights(engine, version="2"):
    """Name the version of new weights, as /update_weight_version does."""
    core = object.__new__(EngineCore)
    core.scheduler = engine.scheduler
    core.set_weight_version(version)


def test_a_reset_ends_leases():
    """A reset on the prefill server revokes the leases that stand, so that the next reset succeeds at once."""
    producer, _ = pair_of()
    handed_over(producer, "p", PROMPT)
    assert not reset(producer)  # their blocks are in use still
    producer.run()
    assert producer.blocks_in_use == 0 and producer.stats["revoked_leases"] == 1
    assert reset(producer)
    handed_over(producer, "next", PROMPT)
    assert producer.blocks_in_use == 4


def test_a_reset_ends_a_lease_that_is_published_in_the_same_step():
    """A prefill that has finished just before a reset is not read after it."""
    producer, _ = pair_of()
    producer.add("p", PROMPT, {"do_remote_decode": True})
    producer.run_until_answered("p")
    reset(producer)
    drain(producer)
    assert scripted(producer).names()[-2:] == ["publish", "revoke"]


def test_a_reset_before_a_load():
    """A request that waits when the decode server is reset computes its prompt, and its lease is released."""
    producer, consumer = pair_of()
    params = handed_over(producer, "p", PROMPT)
    for name in ("0_d", "1_d"):
        consumer.add(name, PROMPT, params, max_tokens=3)
    assert reset(consumer)
    drain(consumer, producer)
    assert scripted(consumer).names() == ["acquire", "release"]
    assert [consumer.answers[name].tokens for name in ("0_d", "1_d")] == [expected(PROMPT, 3)] * 2
    assert producer.stats["unread_leases"] == 1


@pytest.mark.parametrize("interrupt", [refused_reset, update_weights])
@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_a_load_is_under_way(policy, interrupt):
    """A load that is under way at a reset, or while the weights change, fails, also if its bytes arrive; the policy decides what follows."""
    producer, consumer = pair_of(policy=policy)
    scripted(consumer).automatic = False
    params = handed_over(producer, "p", PROMPT)
    consumer.add("d", PROMPT, params, max_tokens=3)
    consumer.step()
    interrupt(consumer)
    consumer.step()
    scripted(consumer).finish(params["kvxfer"]["token"])
    drain(consumer, producer)
    assert consumer.answers["d"].tokens == ([] if policy == "fail" else expected(PROMPT, 3))


@pytest.mark.parametrize("multi", [False, True], ids=["alone", "in MultiConnector"])
def test_kv_of_other_weights_is_not_used(multi):
    """While one server of a pair has other weights, its KV is refused by name; it is used again when both have them."""
    register()  # MultiConnector looks its children up by name
    producer, consumer = pair_of(producer={"multi": multi})
    refused = []
    for number, updated in enumerate([[], [producer], [consumer], [producer, consumer]]):
        for engine in updated:
            update_weights(engine, str(number))
        prompt = prompt_of(100, seed=number)
        consumer.add(f"d{number}", prompt, handed_over(producer, f"p{number}", prompt), max_tokens=3)
        consumer.run()
        refused.append(consumer.stats.get("refused_params", {}).get("other_weights", 0))
        assert consumer.answers[f"d{number}"].tokens == expected(prompt, 3)
    assert refused == [0, 1, 2, 2]
    for token in list(scripted(producer).published):
        scripted(producer).end(token, read=False)
    drain(producer, consumer)


def test_an_update_that_names_the_weights_of_the_checkpoint():
    """The version that vLLM begins with is that of a server whose weights nobody has named."""
    producer, consumer = pair_of()
    update_weights(producer, "default")
    consumer.add("d", PROMPT, handed_over(producer, "p", PROMPT), max_tokens=3)
    drain(consumer, producer)
    assert scripted(consumer).names() == ["acquire", "read"]


@pytest.mark.parametrize("chunk", [2048, 40])
def test_an_update_during_a_prefill(chunk):
    """A prefill that the weights change under ends without parameters, and what it has published is revoked."""
    producer, _ = pair_of(producer={"chunk": chunk})
    producer.add("p", PROMPT, {"do_remote_decode": True})
    if chunk == 40:
        producer.step()
    update_weights(producer)
    drain(producer)
    assert producer.answers["p"].kv_transfer_params is None
    assert scripted(producer).names()[-1] == "revoke" and not scripted(producer).published
    handed_over(producer, "next", PROMPT)


def test_an_update_ends_leases():
    """A lease that stands when the weights change is revoked."""
    producer, _ = pair_of()
    handed_over(producer, "p", PROMPT)
    update_weights(producer)
    drain(producer)
    assert producer.stats["revoked_leases"] == 1


def test_a_defect_in_an_update_costs_no_engine(monkeypatch):
    """If the connector cannot take a version of the weights, the engine goes on."""
    producer, _ = pair_of()
    monkeypatch.setattr(producer.scheduler.connector.scheduler_half, "weights_updated", None)
    update_weights(producer)
    handed_over(producer, "p", PROMPT)
    assert producer.stats["hook_errors"] == {"weights_updated": 1}


def test_a_defect_in_a_reset_costs_no_engine(monkeypatch):
    """If the reset of the connector raises, vLLM is told that it failed, and the engine goes on."""
    producer, _ = pair_of()
    monkeypatch.setattr(producer.scheduler.connector.scheduler_half, "reset_cache", None)
    assert not reset(producer)
    handed_over(producer, "p", PROMPT)
    assert producer.stats["hook_errors"] == {"reset_cache": 1}


def test_preemption_on_decode_while_a_request_loads():
    """A running request is preempted while another one loads, and both have the right tokens."""
    producer, consumer = pair_of(num_blocks=9)
    scripted(consumer).automatic = False
    running = consumer.add("runs", prompt_of(60, seed=2), max_tokens=90)
    consumer.step()
    params = handed_over(producer, "p", PROMPT)
    consumer.add("d", PROMPT, params, max_tokens=3)
    for _ in range(80):
        consumer.step()
    assert running.num_preemptions
    scripted(consumer).automatic = True
    drain(consumer, producer)
    assert consumer.answers["runs"].tokens == expected(prompt_of(60, seed=2), 90)
    assert consumer.answers["d"].tokens == expected(PROMPT, 3)


def test_preemption_on_prefill_while_a_lease_stands():
    """Blocks of a lease are kept while other requests of the prefill server are preempted for want of them."""
    producer, consumer = pair_of(producer={"num_blocks": 10})
    params = handed_over(producer, "p", PROMPT)
    running = [producer.add(f"r{seed}", prompt_of(40, seed=seed), max_tokens=80) for seed in (2, 3)]
    for _ in range(60):
        producer.step()
    assert any(request.num_preemptions for request in running)
    consumer.add("d", PROMPT, params, max_tokens=3)
    drain(consumer, producer)
    assert consumer.answers["d"].tokens == expected(PROMPT, 3)
    assert [producer.answers[f"r{seed}"].tokens for seed in (2, 3)] == [
        expected(prompt_of(40, seed=seed), 80) for seed in (2, 3)
    ]

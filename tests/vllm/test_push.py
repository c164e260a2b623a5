# SPDX-License-Identifier: Apache-2.0
"""Requests that are sent to both servers at once: two of vLLM's schedulers, real endpoints, blocks that leave chunk by chunk."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from kvxfer import registry
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.testing import eventually
from kvxfer_vllm.metadata import KvxferMetadata, PartialPublishOrder
from kvxfer_vllm.worker import KvxferWorker
from tests.vllm.rig import (
    BLOCK_TOKENS,
    P_PARAMS,
    Engine,
    drain,
    expected,
    handed_over,
    in_groups,
    prompt_of,
    scripted,
    sent_to_both,
    where,
)
from tests.vllm.scripted import ScriptedEndpoint

pytestmark = pytest.mark.vllm


def pair_of(engines, agent="inproc", *, producer=(), consumer=()):
    """A prefill server that computes 512 tokens a step, and a decode server."""
    return (
        engines("kv_producer", "P", agent=agent, **{"chunk": 512, **dict(producer)}),
        engines("kv_consumer", "D", agent=agent, **dict(consumer)),
    )


def loaded(consumer):
    """Bytes that loads in flight have brought so far."""
    endpoint = consumer.kvxfer.worker_half.group.endpoints[0]
    return endpoint.in_use()["read_nbytes"]


LAYER = {"granularity": "layer"}
BLOCK_NBYTES = 2 * 2 * BLOCK_TOKENS * 8 * 4  # layers, heads, tokens, content, float32


@pytest.mark.parametrize("agent", ["inproc", "nixl"])
@pytest.mark.parametrize("first", ["P", "D"])
@pytest.mark.parametrize("length", [1, 33, 700, 3000])
@pytest.mark.parametrize(
    "granularity", [("chunk", "chunk"), ("layer", "layer"), ("layer", "chunk"), ("chunk", "layer")]
)
def test_tokens_equal_those_of_one_engine(engines, agent, first, length, granularity):
    """Tokens are those of one engine, whichever server begins, for all lengths of prompts and granularities of both sides."""
    if registry.why_unavailable(agent):
        pytest.skip(registry.why_unavailable(agent))
    theirs, mine = ({"granularity": each} for each in granularity)
    producer, consumer = pair_of(engines, agent, producer=theirs, consumer=mine)
    prompt = prompt_of(length)
    assert sent_to_both(producer, consumer, prompt, where(producer), first=first) == expected(prompt, 4)
    assert consumer.computed_tokens == 4 and producer.stats["released_leases"] == 1
    assert consumer.stats["transfer_bytes"] == [-(-length // BLOCK_TOKENS) * BLOCK_NBYTES]


def test_most_bytes_arrive_before_the_last_chunk(engines):
    """Of 3,000 tokens in chunks of 512 at least 80 % of the bytes arrive before the last chunk is computed."""
    producer, consumer = pair_of(engines)
    prompt = prompt_of(3000)
    producer.add("p-11111111", prompt, P_PARAMS)
    consumer.add("p-22222222", prompt, where(producer), max_tokens=2)
    consumer.step()
    for done in range(512, 3000, 512):
        producer.step()
        eventually(lambda tokens=done: loaded(consumer) == tokens // BLOCK_TOKENS * BLOCK_NBYTES)
    total = -(-3000 // BLOCK_TOKENS) * BLOCK_NBYTES
    assert loaded(consumer) >= 0.8 * total
    producer.run_until_answered("p-11111111")
    producer.step()
    consumer.run()
    assert consumer.answers["p-22222222"].tokens == expected(prompt, 2)
    assert consumer.stats["partial_bytes"] >= 0.8 * total
    drain(producer, consumer)


def test_the_first_layers_arrive_before_the_last_ones_are_computed(engines):
    """With granularity "layer" blocks are read while the step that computes them goes on, and no layer before it is computed."""
    producer, consumer = pair_of(engines, producer=LAYER, consumer=LAYER)
    prompt, arrived = prompt_of(1000), []
    producer.add("p-11111111", prompt, P_PARAMS)
    consumer.add("p-22222222", prompt, where(producer), max_tokens=2)
    consumer.step()
    half = BLOCK_NBYTES // 2
    first, last = producer.kv

    def after_layer(name):
        before = 512 // BLOCK_TOKENS if arrived else 0
        now = (1000 if arrived else 512) // BLOCK_TOKENS
        if name == first:
            eventually(lambda: loaded(consumer) == (before + now) * half)
        else:
            assert loaded(consumer) == (before + now) * half  # the step is not over yet
            arrived.append(name)

    producer.after_layer = after_layer
    producer.step()
    eventually(lambda: loaded(consumer) == 512 // BLOCK_TOKENS * BLOCK_NBYTES)
    producer.run_until_answered("p-11111111")
    assert arrived == [last, last] and producer.kvxfer.worker_half.stats.is_empty()
    producer.step()
    consumer.run()
    assert consumer.answers["p-22222222"].tokens == expected(prompt, 2)
    assert producer.stats["partial_publishes"] == 2
    drain(producer, consumer)


def test_layers_in_any_order_and_again():
    """A part of the layers is published after the last of them, in any order; layers that share a cache change nothing."""
    endpoint = ScriptedEndpoint()
    worker = KvxferWorker([endpoint], in_groups([["a", "b"], ["c"]]))
    lease = LeaseRef.mint(producer="P", addresses=["tcp://p:1"])

    def step(*names):
        worker.follow(KvxferMetadata(publish_partial=[PartialPublishOrder(lease, [[7, 8, 9]], [1])]))
        for name in names:
            worker.layer_computed(name)
        parts = [blocks for _, _, blocks in endpoint.calls]
        worker.step_computed()
        worker.results()
        assert endpoint.calls[-1] == ("publish part", lease.token, [[7, 8, 9]] * 2)
        endpoint.calls.clear()
        return parts

    assert step("b", "b", "shares", "a", "c") == [[[7, 8, 9], [7]]]
    assert step("c", "a", "b") == [[[7], [7, 8, 9]]]
    assert step("a") == step() == []
    worker.layer_computed("c")
    assert endpoint.calls == []
    endpoint.raises["publish part"] = RuntimeError("on purpose")
    worker.follow(KvxferMetadata(publish_partial=[PartialPublishOrder(lease, [[7]], [0])]))
    worker.layer_computed("c")
    assert worker.stats.data["hook_errors"] == {"publish_partial": 1}


def test_a_request_id_is_enough_of_a_key(engines):
    """Without a transfer id two servers recognise a request by its id, without vLLM's random suffix, and by its prompt."""
    producer, consumer = pair_of(engines)
    consumer.add("cmpl-abc-0-0a1b2c3d", prompt_of(100), where(producer), max_tokens=2)
    consumer.add("cmpl-abc-0-aaaaaaaa", prompt_of(100, seed=4), where(producer), max_tokens=2)
    consumer.step()
    producer.add("cmpl-abc-0-ffffffff", prompt_of(100), P_PARAMS)
    producer.add("cmpl-abc-0-99999999", prompt_of(100, seed=4), P_PARAMS)
    while "cmpl-abc-0-99999999" in producer.scheduler.requests:
        producer.step()
        consumer.step()
    drain(consumer, producer)
    assert consumer.answers["cmpl-abc-0-0a1b2c3d"].tokens == expected(prompt_of(100), 2)
    assert consumer.answers["cmpl-abc-0-aaaaaaaa"].tokens == expected(prompt_of(100, seed=4), 2)


def test_one_after_the_other_works_in_every_mode(engines):
    """A proxy that waits for the prefill server's answer is served in every mode."""
    for number, mode in enumerate(("auto", "push", "pull")):
        producer = engines("kv_producer", f"P{number}", agent="inproc", mode=mode)
        consumer = engines("kv_consumer", f"D{number}", agent="inproc", mode=mode)
        params = handed_over(producer, "p", prompt_of(300))
        consumer.add("d", prompt_of(300), params, max_tokens=2)
        consumer.run()
        drain(producer, consumer)
        assert consumer.answers["d"].tokens == expected(prompt_of(300), 2) and consumer.computed_tokens == 2


def test_pull_mode_computes_what_was_sent_to_both(engines):
    """A decode server in mode "pull" refuses the parameters by name and computes the prompt."""
    producer, consumer = pair_of(engines, consumer={"mode": "pull"})
    consumer.add("d", prompt_of(100), where(producer), max_tokens=2)
    consumer.run()
    assert consumer.answers["d"].tokens == expected(prompt_of(100), 2)
    assert {k: v for k, v in consumer.stats["refused_params"].items() if v} == {"other_mode": 1}


@pytest.mark.parametrize("policy", ["fail", "recompute"])
@pytest.mark.parametrize("when", ["before its first step", "half way", "never arrives"])
def test_a_prefill_that_does_not_end_well(engines, policy, when):
    """A prefill that is aborted, or never arrives, costs its decode request one error or a recomputation, within the timeout."""
    producer, consumer = pair_of(engines, producer={"rendezvous_timeout_seconds": 0.3}, consumer={"policy": policy})
    prompt = prompt_of(2000)
    if when != "never arrives":
        producer.add("p", prompt, P_PARAMS | {"transfer_id": "t"})
    consumer.add("d", prompt, where(producer) | {"transfer_id": "t"}, max_tokens=2)
    consumer.step()
    if when == "half way":
        producer.step()
        producer.step()
    if when != "never arrives":
        producer.abort("p")
    producer.run()
    drain(consumer, producer)
    if policy == "fail":
        assert (consumer.answers["d"].finish_reason, consumer.answers["d"].tokens) == ("error", [])
    else:
        assert consumer.answers["d"].tokens == expected(prompt, 2)
    assert sum(consumer.stats["failed_transfers"].values()) == 1


@pytest.mark.parametrize("granularity", ["chunk", "layer"])
def test_preempted_while_its_blocks_are_read(engines, granularity):
    """A prefill that loses its published blocks fails the load that has read some: no token is made of other requests' KV."""
    told = {"granularity": granularity}
    producer, consumer = pair_of(engines, producer=told, consumer={"policy": "recompute", **told})
    prompt = prompt_of(3000)
    producer.add("p", prompt, P_PARAMS | {"transfer_id": "t"})
    consumer.add("d", prompt, where(producer) | {"transfer_id": "t"}, max_tokens=2)
    consumer.step()
    producer.step()
    eventually(lambda: loaded(consumer) > 0)
    producer.scheduler.reset_prefix_cache(reset_running_requests=True)
    producer.add("other", prompt_of(1500, seed=8), max_tokens=1)
    producer.run_until_answered("p")
    producer.step()
    consumer.run()
    assert consumer.answers["d"].tokens == expected(prompt, 2)
    # A request with the prefill server's answer is served all the same.
    consumer.add("again", prompt, producer.answers["p"].kv_transfer_params, max_tokens=2)
    drain(consumer, producer)
    assert consumer.answers["again"].tokens == expected(prompt, 2)


def test_a_decode_server_that_needs_nothing(engines):
    """A prompt that vLLM wants to compute itself frees the prefill server's blocks at once."""
    producer, consumer = pair_of(engines)
    producer.add("p", prompt_of(600), P_PARAMS | {"transfer_id": "t"})
    request = consumer.add("d", prompt_of(600), where(producer) | {"transfer_id": "t"}, max_tokens=2)
    request.skip_reading_prefix_cache = True
    consumer.run()
    assert consumer.stats["local_hits"] == 1
    drain(producer)
    assert consumer.answers["d"].tokens == expected(prompt_of(600), 2)
    # Revoked if the release came before the blocks were published, else unread.
    assert producer.stats.get("revoked_leases", 0) + producer.stats.get("unread_leases", 0) == 1


def test_sent_twice(engines):
    """The same request sent again under the same id takes what the first one loads, and nothing stays allocated."""
    producer, consumer = pair_of(engines)
    for name in ("p-11111111", "p-22222222"):
        producer.add(name, prompt_of(200), P_PARAMS)
        consumer.add(name, prompt_of(200), where(producer), max_tokens=2)
    producer.run_until_answered("p-22222222")
    producer.step()
    consumer.run()
    for name in ("p-11111111", "p-22222222"):
        assert consumer.answers[name].tokens == expected(prompt_of(200), 2)
    assert consumer.stats["shared_loads"] == 1 and "refused_params" not in consumer.stats
    answer = producer.answers["p-22222222"].kv_transfer_params
    consumer.add("late", prompt_of(200), answer, max_tokens=2)
    drain(consumer, producer)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("granularity", "moments"), [("chunk", 500), ("layer", 200)])
def test_a_consumer_that_aborts_at_any_moment(engines, granularity, moments):
    """No request on the decode server, before or after an abort at a random moment (seeded), has tokens made of other KV."""
    told = {"granularity": granularity}
    producer, consumer = pair_of(
        engines, producer={"chunk": 64, "num_blocks": 64, **told}, consumer={"num_blocks": 32, **told}
    )
    for seed in range(moments):
        rng = random.Random(seed)
        length = rng.randrange(1, 400)
        prompt, name = prompt_of(length, seed=seed + 2), f"r{seed}"
        key = {"transfer_id": name}
        left = [
            lambda p=prompt, n=name, k=key: producer.add(f"p-{n}", p, P_PARAMS | k),
            lambda p=prompt, n=name, k=key: consumer.add(f"d-{n}", p, where(producer) | k, max_tokens=2),
        ]
        rng.shuffle(left)
        abort_at = rng.randrange(0, 14)
        for moment in range(14):
            if left and rng.random() < 0.7:
                left.pop()()
            rng.choice((producer, consumer)).step()
            if moment == abort_at and f"d-{name}" in consumer.scheduler.requests:
                consumer.abort(f"d-{name}")
        other = prompt_of(rng.randrange(1, 700), seed=seed + 900)
        consumer.add(f"o-{seed}", other, max_tokens=2)
        for late in left:
            late()
        while producer.scheduler.has_requests() or consumer.scheduler.has_requests():
            producer.step()
            consumer.step()
        assert consumer.answers[f"o-{seed}"].tokens == expected(other, 2)
        got = consumer.answers[f"d-{name}"]
        assert got.tokens == expected(prompt, 2)[: len(got.tokens)] and got.finish_reason in ("length", "abort", "")
    assert producer.blocks_in_use == consumer.blocks_in_use == 0
    assert not consumer.stats.get("hook_errors") and not producer.stats.get("hook_errors")


@pytest.mark.parametrize("same", [True, False])
def test_with_a_secret(engines, monkeypatch, tmp_path, same):
    """Servers with the same secret match a request and transfer it; with different ones the decode server computes it."""
    names = ("one", "one" if same else "two")
    for name in names:
        (tmp_path / name).write_text(f"the secret of servers of kind {name}")
        (tmp_path / name).chmod(0o600)
    theirs, mine = ({"secret_file": str(tmp_path / name)} for name in names)
    brief = {"policy": "recompute", "peer_timeout_seconds": 1.0}
    producer, consumer = pair_of(engines, producer=theirs | {"lease_seconds": 1.5}, consumer=mine | brief)
    prompt, key = prompt_of(300), {"transfer_id": "t-1"}
    producer.add("p", prompt, P_PARAMS | key)
    consumer.add("d", prompt, where(producer) | key, max_tokens=2)
    consumer.step()
    producer.run_until_answered("p")
    producer.step()
    consumer.run()
    assert consumer.answers["d"].tokens == expected(prompt, 2)
    assert consumer.computed_tokens == (2 if same else 301)
    assert consumer.stats.get("failed_transfers", {}) == ({} if same else {"PeerTimeoutError": 1})
    drain(producer, consumer)


def test_a_step_that_cannot_be_read_costs_no_engine(monkeypatch):
    """A defect in reading vLLM's step ends nothing: the blocks are published when the prefill has finished."""
    producer = Engine("kv_producer", name="P", endpoint=ScriptedEndpoint())
    monkeypatch.setattr("kvxfer_vllm.prefills.PartialPublishOrder", None)
    producer.add("p", prompt_of(100), P_PARAMS)
    producer.run_until_answered("p")
    producer.step()
    assert scripted(producer).names() == ["announce", "publish"] and producer.answers["p"].kv_transfer_params
    assert producer.stats["hook_errors"]["build_connector_meta"] >= 1
    producer.close()

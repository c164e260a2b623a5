# SPDX-License-Identifier: Apache-2.0
"""The connector in vLLM's real scheduler: transfers, reports, and no block that stays allocated."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from kvxfer.errors import LeaseEndedError
from kvxfer_vllm import scheduler
from kvxfer_vllm.metadata import IDLE_WAIT_S
from kvxfer_vllm.plugin import register
from tests.vllm.rig import (
    BLOCK_TOKENS,
    P_PARAMS,
    Engine,
    drain,
    expected,
    handed_over,
    prompt_of,
    scripted,
)
from tests.vllm.scripted import ScriptedEndpoint

pytestmark = pytest.mark.vllm


@pytest.fixture
def pair():
    """A producer and a consumer whose reads copy blocks."""
    net = {}
    producer = Engine("kv_producer", name="P", endpoint=ScriptedEndpoint(net))
    consumer = Engine("kv_consumer", name="D", endpoint=ScriptedEndpoint(net))
    yield producer, consumer
    for engine in (producer, consumer):
        engine.close()


@pytest.fixture
def said(monkeypatch):
    """Warnings of the scheduler's half."""
    lines = []
    monkeypatch.setattr(scheduler.logger, "warning", lambda text, *values: lines.append(text % values))
    return lines


@pytest.mark.parametrize("length", [1, 31, 32, 33, 700])
def test_tokens_equal_those_of_one_engine(pair, length):
    """A prompt prefilled elsewhere gives the same tokens as one computed here, and both sides end empty."""
    producer, consumer = pair
    prompt = prompt_of(length)
    params = handed_over(producer, "p", prompt)
    consumer.add("d", prompt, params, max_tokens=6)
    consumer.run()
    producer.run()
    assert consumer.answers["d"].tokens == expected(prompt, 6)
    # The last prompt token is computed again, for its logits.
    assert consumer.computed_tokens == 6
    assert consumer.blocks_in_use == producer.blocks_in_use == 0
    assert producer.stats["released_leases"] == 1
    assert consumer.stats["transfer_bytes"] == [4096 * -(-length // BLOCK_TOKENS)]


def test_order_of_the_producers_calls(pair):
    """A lease is announced when the request arrives, published partially by the step that fills blocks, then completely."""
    producer, _ = pair
    prompt = prompt_of(100)
    producer.add("p", prompt, P_PARAMS)
    producer.step()
    announced = scripted(producer).calls[0]
    producer.step()
    token = producer.answers["p"].kv_transfer_params["kvxfer"]["token"]
    assert announced == ("announce", token)
    assert scripted(producer).names() == ["announce", "publish part", "publish"]
    assert scripted(producer).calls[1][2] == scripted(producer).published[token][:3]  # the fourth is not full
    assert len(scripted(producer).published[token]) == producer.blocks_in_use == 4
    for _ in range(3):
        producer.step()
    assert producer.blocks_in_use == 4
    scripted(producer).end(token, read=True)
    producer.run()
    assert producer.blocks_in_use == 0


def test_a_step_waits_only_if_it_computes_nothing(pair):
    """Steps without tokens wait a moment for a pending transfer; other steps do not wait."""
    producer, consumer = pair
    params = handed_over(producer, "p", prompt_of(100))
    scripted(consumer).automatic = False
    consumer.add("d", prompt_of(100), params, max_tokens=2)
    for _ in range(3):
        consumer.step()
    assert scripted(consumer).waited == [IDLE_WAIT_S] * 3
    consumer.add("local", prompt_of(50, seed=3), max_tokens=3)
    scripted(consumer).waited.clear()
    consumer.step()
    assert scripted(consumer).waited == [0.0]
    scripted(consumer).automatic = True
    drain(consumer, producer)
    scripted(consumer).waited.clear()
    consumer.step()
    assert scripted(consumer).waited == [0.0]  # nothing is waited for


def test_expired_lease_frees_the_producer(pair):
    """Blocks that no consumer reads are freed and counted."""
    producer, _ = pair
    params = handed_over(producer, "p", prompt_of(50))
    scripted(producer).end(params["kvxfer"]["token"], read=False, expired=True)
    producer.run()
    assert producer.blocks_in_use == 0
    assert producer.stats["expired_leases"] == 1


def test_acquire_precedes_the_read(pair):
    """A consumer acquires the lease in the first step after the request's arrival, before there is room for its blocks."""
    producer, consumer = pair
    params = handed_over(producer, "p", prompt_of(1000))
    blocker = consumer.add("local", prompt_of(3500, seed=3), max_tokens=4)
    consumer.step()
    consumer.add("d", prompt_of(1000), params, max_tokens=2)
    consumer.step()
    assert scripted(consumer).names() == ["acquire"]
    assert not blocker.is_finished()
    consumer.run()
    assert scripted(consumer).names() == ["acquire", "read"]
    assert consumer.answers["d"].tokens == expected(prompt_of(1000), 2)


def test_partial_prefix_hit_reads_only_the_rest(pair):
    """Blocks that the consumer has are neither read nor computed."""
    producer, consumer = pair
    prefix, prompt = prompt_of(70), [*prompt_of(70), *prompt_of(60, seed=5)]
    consumer.add("warm", prefix, max_tokens=1)
    consumer.run()
    params = handed_over(producer, "p", prompt)
    consumer.add("d", prompt, params, max_tokens=3)
    consumer.run()
    (read,) = [call for call in scripted(consumer).calls if call[0] == "read"]
    assert (len(read[2]), read[3]) == (3, (2 * BLOCK_TOKENS, None))
    assert consumer.answers["d"].tokens == expected(prompt, 3)


def test_whole_prefix_hit_reads_the_last_block(pair):
    """Of a prompt that is cached completely only the last block is read, because vLLM computes the last token again."""
    producer, consumer = pair
    prompt = prompt_of(96)
    for attempt in ("first", "second"):
        params = handed_over(producer, f"p-{attempt}", prompt)
        consumer.add(f"d-{attempt}", prompt, params, max_tokens=3)
        consumer.run()
        assert consumer.answers[f"d-{attempt}"].tokens == expected(prompt, 3)
    reads = [call for call in scripted(consumer).calls if call[0] == "read"]
    last = 2 * BLOCK_TOKENS
    assert [(len(blocks), tokens) for _, _, blocks, tokens in reads] == [(3, (0, None)), (1, (last, None))]
    drain(producer, consumer)


def test_a_load_that_vllm_declines_releases_the_lease(pair):
    """A request that must compute its whole prompt (prompt logprobs) frees the producer without a read or a report."""
    producer, consumer = pair
    prompt = prompt_of(100)
    params = handed_over(producer, "p", prompt)
    request = consumer.add("d", prompt, params, max_tokens=3)
    request.skip_reading_prefix_cache = True
    drain(consumer, producer)
    assert scripted(consumer).names() == ["acquire", "release"]
    assert consumer.answers["d"].tokens == expected(prompt, 3)
    assert consumer.computed_tokens == 102
    assert producer.stats["unread_leases"] == consumer.stats["local_hits"] == 1


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_failed_load(policy):
    """A failed transfer ends in an error or in a right answer, as the policy says, and frees everything."""
    net = {}
    producer = Engine("kv_producer", name="P", endpoint=ScriptedEndpoint(net))
    consumer = Engine("kv_consumer", name="D", endpoint=ScriptedEndpoint(net), policy=policy)
    scripted(consumer).automatic = False
    prompt = prompt_of(100)
    params = handed_over(producer, "p", prompt)
    consumer.add("d", prompt, params, max_tokens=3)
    consumer.step()
    scripted(consumer).finish(params["kvxfer"]["token"], LeaseEndedError("too late"))
    consumer.run()
    if policy == "fail":
        assert consumer.answers["d"].finish_reason == "error"
        assert consumer.answers["d"].tokens == []
    else:
        assert consumer.answers["d"].tokens == expected(prompt, 3)
    assert consumer.blocks_in_use == 0
    assert consumer.stats["failed_transfers"] == {"LeaseEndedError": 1}
    consumer.add("next", prompt, max_tokens=3)
    consumer.run()
    assert consumer.answers["next"].tokens == expected(prompt, 3)


def test_read_that_cannot_even_start(pair):
    """An endpoint that refuses a read at once fails that request only."""
    producer, consumer = pair
    params = handed_over(producer, "p", prompt_of(40))
    scripted(consumer).raises["read"] = LeaseEndedError("closed")
    consumer.add("d", prompt_of(40), params)
    consumer.run()
    assert consumer.answers["d"].finish_reason == "error"
    del scripted(consumer).raises["read"]
    consumer.add("next", prompt_of(40), max_tokens=2)
    consumer.run()
    assert consumer.answers["next"].tokens == expected(prompt_of(40), 2)
    assert consumer.blocks_in_use == 0


def test_client_gone_while_loading(pair):
    """The blocks of an aborted load stay allocated until the endpoint reports that they are quiet; then they are freed once."""
    producer, consumer = pair
    scripted(consumer).automatic = False
    params = handed_over(producer, "p", prompt_of(100))
    consumer.add("d", prompt_of(100), params)
    consumer.step()
    consumer.abort("d")
    for _ in range(5):
        consumer.step()
    assert consumer.blocks_in_use == 4
    scripted(consumer).finish(params["kvxfer"]["token"], LeaseEndedError("cancelled"))
    consumer.run()
    assert consumer.blocks_in_use == 0


def test_client_gone_before_it_is_scheduled(pair):
    """A request that is aborted while it waits releases its lease."""
    producer, consumer = pair
    params = handed_over(producer, "p", prompt_of(100))
    consumer.add("d", prompt_of(100), params)
    consumer.abort("d")
    consumer.run()
    producer.run()
    assert "read" not in scripted(consumer).names()
    assert producer.stats["unread_leases"] == 1
    assert producer.blocks_in_use == consumer.blocks_in_use == 0


def test_request_rejected_by_the_front_end(pair):
    """A request that vLLM rejected (stand-in prompt, aborted at once) releases its lease."""
    producer, consumer = pair
    params = handed_over(producer, "p", prompt_of(100))
    consumer.add("d", [0], params, abort_immediately=True)
    consumer.run()
    producer.run()
    assert scripted(consumer).names() == ["release"]
    assert producer.blocks_in_use == 0
    assert "refused_params" not in consumer.stats


def test_a_failed_load_is_no_refusal(said):
    """vLLM passes the parameters of a failed load once more; they are not refused, computed or counted."""
    net = {}
    producer = Engine("kv_producer", name="P", endpoint=ScriptedEndpoint(net))
    consumer = Engine("kv_consumer", name="D", endpoint=ScriptedEndpoint(net), policy="fail")
    scripted(consumer).automatic = False
    params = handed_over(producer, "p", prompt_of(100))
    consumer.add("d", prompt_of(100), params)
    consumer.step()
    scripted(consumer).finish(params["kvxfer"]["token"], LeaseEndedError("too late"))
    consumer.run()
    calls = scripted(consumer).names()
    consumer.add("d again", [0], params, abort_immediately=True)
    consumer.run()
    assert scripted(consumer).names() == calls
    assert consumer.stats["failed_transfers"] == {"LeaseEndedError": 1}
    assert "refused_params" not in consumer.stats and not said


def test_rejected_with_parameters_that_are_none(pair, said):
    """The parameters of a request that vLLM rejected are not counted as refused, because it is not computed."""
    _, consumer = pair
    consumer.add("d", [0], {"do_remote_prefill": True}, abort_immediately=True)
    consumer.run()
    assert "refused_params" not in consumer.stats and not said


@pytest.mark.parametrize("token_id", [2**31, -(2**31) - 1])
def test_token_ids_beyond_32_bits(pair, token_id):
    """A prompt with a token id beyond 32 bits is refused by name on either side, and both engines go on."""
    producer, consumer = pair
    params = handed_over(producer, "p", prompt_of(40))
    for engine, asked in ((consumer, params), (producer, P_PARAMS)):
        engine.add("r", [*prompt_of(39), token_id], asked)
        engine.run_until_answered("r")
        engine.step()
        assert engine.stats["refused_params"] == {"bad_token_ids": 1}
        assert engine.answers["r"].tokens and "hook_errors" not in engine.stats


def test_one_engine_id_on_two_servers(said):
    """Two servers with one engine_id transfer like others, with one warning."""
    net = {}
    producer = Engine("kv_producer", name="0", endpoint=ScriptedEndpoint(net))
    consumer = Engine("kv_consumer", name="0", endpoint=ScriptedEndpoint(net))
    for number in range(2):
        params = handed_over(producer, f"p{number}", prompt_of(100 + number))
        consumer.add(f"d{number}", prompt_of(100 + number), params, max_tokens=3)
        consumer.run()
        producer.run()
        assert consumer.answers[f"d{number}"].tokens == expected(prompt_of(100 + number), 3)
    assert len(consumer.stats["transfer_bytes"]) == 2
    assert len(said) == 1 and "has the engine_id '0', as this one has: give each server its own" in said[0]


def test_prefill_client_gone(pair):
    """A prefill that is aborted, before or after it was scheduled, is not published completely and keeps no block."""
    producer, _ = pair
    producer.add("first", prompt_of(100), P_PARAMS)
    producer.abort("first")
    producer.add("second", prompt_of(3000), P_PARAMS)
    producer.step()
    producer.abort("second")
    producer.run()
    calls = scripted(producer).calls
    (first, second), revoked = ([call[1] for call in calls if call[0] == name] for name in ("announce", "revoke"))
    assert revoked == [first, second] and "publish" not in scripted(producer).names()
    assert [call[1] for call in calls if call[0] == "publish part"] == [second]
    assert producer.blocks_in_use == 0


def test_preempted_consumer_computes_the_rest_itself(pair):
    """A request that is preempted after its load is not loaded again."""
    producer, consumer = pair
    prompt = prompt_of(100)
    params = handed_over(producer, "p", prompt)
    consumer.add("d", prompt, params, max_tokens=5)
    while not consumer.answers["d"].tokens:
        consumer.step()
    consumer.scheduler.reset_prefix_cache(reset_running_requests=True)
    consumer.run()
    assert scripted(consumer).names().count("read") == 1
    assert consumer.answers["d"].tokens == expected(prompt, 5)
    assert consumer.blocks_in_use == 0


def test_preempted_prefill_has_a_new_lease(pair):
    """A preempted prefill has a new lease when it starts again, because the blocks published under the old one are gone."""
    producer, consumer = pair
    prompt = prompt_of(3000)
    producer.add("p", prompt, P_PARAMS)
    producer.step()
    producer.scheduler.reset_prefix_cache(reset_running_requests=True)
    producer.run_until_answered("p")
    params = producer.answers["p"].kv_transfer_params
    consumer.add("d", prompt, params, max_tokens=2)
    producer.step()
    consumer.run()
    producer.run()
    assert scripted(producer).names() == [
        "announce",
        "publish part",
        "announce",
        "revoke",
        "publish part",
        "publish part",
        "publish",
    ]
    calls = scripted(producer).calls
    old, new = (call[1] for call in calls if call[0] == "announce")
    assert old != new and calls[3] == ("revoke", old) and calls[-1][1] == params["kvxfer"]["token"] == new
    assert consumer.answers["d"].tokens == expected(prompt, 2)


def test_in_pull_mode_nothing_leaves_before_the_end():
    """In mode "pull" no block is published before the end, so a preempted prefill keeps its token."""
    producer = Engine("kv_producer", name="P", endpoint=ScriptedEndpoint(), mode="pull")
    producer.add("p", prompt_of(3000), P_PARAMS)
    producer.step()
    producer.scheduler.reset_prefix_cache(reset_running_requests=True)
    producer.run_until_answered("p")
    producer.step()
    assert scripted(producer).names() == ["announce", "publish"]
    producer.close()


def test_a_lease_for_another_prompt_is_never_used(pair):
    """Parameters for another prompt of the same length are refused, and the prompt is computed."""
    producer, consumer = pair
    params = handed_over(producer, "p", prompt_of(100))
    other = prompt_of(100, seed=2)
    consumer.add("d", other, params, max_tokens=3)
    consumer.run()
    assert consumer.answers["d"].tokens == expected(other, 3)
    assert consumer.stats["refused_params"] == {"other_prompt": 1}
    assert scripted(consumer).calls == []


def test_many_requests_at_once(pair):
    """32 requests of mixed lengths, more than fit at once, have the right tokens and leave no block allocated."""
    producer, consumer = pair
    prompts = [prompt_of(17 + 29 * (i % 11), seed=i) for i in range(32)]
    params = {}
    for i, prompt in enumerate(prompts):
        params[i] = handed_over(producer, f"p{i}", prompt)
        consumer.add(f"d{i}", prompt, params[i], max_tokens=4)
        consumer.step()
    consumer.run()
    producer.run()
    for i, prompt in enumerate(prompts):
        assert consumer.answers[f"d{i}"].tokens == expected(prompt, 4), i
    assert producer.blocks_in_use == consumer.blocks_in_use == 0
    assert producer.stats["released_leases"] + producer.stats.get("unread_leases", 0) == 32


@pytest.mark.parametrize(
    "hook", ["on_new_request", "get_num_new_matched_tokens", "update_state_after_alloc", "request_finished"]
)
def test_a_defect_in_a_hook_costs_no_engine(pair, monkeypatch, hook):
    """If a hook raises, the request ends, no block stays allocated, and the defect is counted."""
    producer, consumer = pair
    params = handed_over(producer, "p", prompt_of(100))

    def broken(*_args):
        raise ZeroDivisionError

    for engine in pair:
        monkeypatch.setattr(engine.scheduler.connector.scheduler_half, hook, broken)
    consumer.add("d", prompt_of(100), params, max_tokens=3)
    consumer.run()
    if hook == "update_state_after_alloc":  # the load was promised, so the policy for failed loads decides
        assert consumer.answers["d"].finish_reason == "error"
    else:
        assert consumer.answers["d"].tokens == expected(prompt_of(100), 3)
    counted = "request_finished_all_groups" if hook == "request_finished" else hook
    assert consumer.stats["hook_errors"][counted] >= 1
    producer.add("p2", prompt_of(50), P_PARAMS)
    producer.run_until_answered("p2")
    scripted(producer).end(params["kvxfer"]["token"], read=False)
    for token in list(scripted(producer).published):
        scripted(producer).end(token, read=False)
    producer.run()
    assert producer.blocks_in_use == consumer.blocks_in_use == 0


def test_a_defect_after_the_promise_fails_the_load(pair, monkeypatch):
    """A load that was promised to vLLM and cannot be ordered is reported as failed."""
    producer, consumer = pair
    params = handed_over(producer, "p", prompt_of(100))
    monkeypatch.setattr("kvxfer_vllm.loads.ReadOrder", None)
    consumer.add("d", prompt_of(100), params, max_tokens=3)
    consumer.run()
    assert consumer.answers["d"].finish_reason == "error"
    assert consumer.blocks_in_use == 0
    producer.run()
    assert producer.blocks_in_use == 0


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_inside_multi_connector(policy):
    """Inside MultiConnector the connector serves, loads, fails and counts as it does alone."""
    register()
    net = {}
    producer = Engine("kv_producer", name="P", endpoint=ScriptedEndpoint(net), multi=True)
    consumer = Engine("kv_consumer", name="D", endpoint=ScriptedEndpoint(net), multi=True, policy=policy)
    told = producer.worker.get_handshake_metadata()  # the other connector's: MultiConnector passes it to all children
    producer.scheduler.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): told})
    prompt = prompt_of(100)
    params = handed_over(producer, "p", prompt)
    consumer.add("d", prompt, params, max_tokens=3)
    drain(consumer)
    scripted(consumer).automatic = False
    lost = handed_over(producer, "p2", prompt_of(90, seed=2))
    consumer.add("d2", prompt_of(90, seed=2), lost, max_tokens=3)
    consumer.step()
    scripted(consumer).finish(lost["kvxfer"]["token"], LeaseEndedError("too late"))
    drain(consumer)
    scripted(producer).end(lost["kvxfer"]["token"], read=False)
    drain(producer)
    assert consumer.answers["d"].tokens == expected(prompt, 3)
    assert consumer.answers["d2"].tokens == ([] if policy == "fail" else expected(prompt_of(90, seed=2), 3))
    assert consumer.stats["KvxferConnector"]["failed_transfers"] == {"LeaseEndedError": 1}
    assert producer.stats["KvxferConnector"]["released_leases"] == 1

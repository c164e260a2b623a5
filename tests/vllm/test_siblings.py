# SPDX-License-Identifier: Apache-2.0
"""Requests of one client request (``n`` > 1), and others with the same lease: one load, one lease, in vLLM's real scheduler."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from kvxfer.errors import LeaseEndedError
from kvxfer_vllm.request_ids import of_other_prompt
from tests.vllm.rig import P_PARAMS, Engine, drain, expected, handed_over, prompt_of, scripted
from tests.vllm.scripted import ScriptedEndpoint

pytestmark = pytest.mark.vllm

PROMPT = prompt_of(100)
SIBLINGS = [f"{number}_cmpl-1-abcdef01" for number in range(3)]


def pair_of(**consumer):
    """A producer and a consumer whose reads copy blocks."""
    net = {}
    producer = Engine("kv_producer", name="P", endpoint=ScriptedEndpoint(net))
    return producer, Engine("kv_consumer", name="D", endpoint=ScriptedEndpoint(net), **consumer)


def add_siblings(engine, params, **options):
    """Queue a request for three answers as vLLM's front end does."""
    for name in SIBLINGS:
        engine.add(name, PROMPT, params, **options)


def test_siblings_share_one_load():
    """Three siblings with one lease wait for one load, compute less than a block each, and have the right tokens."""
    producer, consumer = pair_of()
    scripted(consumer).automatic = False
    params = handed_over(producer, "p", PROMPT)
    add_siblings(consumer, params, max_tokens=3)
    for _ in range(4):
        assert consumer.step() == 0
    scripted(consumer).finish(params["kvxfer"]["token"])
    drain(consumer, producer)
    assert [consumer.answers[name].tokens for name in SIBLINGS] == [expected(PROMPT, 3)] * 3
    assert scripted(consumer).names() == ["acquire", "read"]
    # The first computes the last token of the prompt, the others what is left after three blocks of it.
    assert consumer.computed_tokens == 3 + 2 * (100 - 96 + 2)
    assert consumer.stats["shared_loads"] == 2 and "refused_params" not in consumer.stats
    assert producer.stats["released_leases"] == 1


def test_the_same_request_again():
    """A request that is sent again when its lease was read finds the blocks in the prefix cache."""
    producer, consumer = pair_of()
    params = handed_over(producer, "p", PROMPT)
    for name in ("d", "again"):
        consumer.add(name, PROMPT, params, max_tokens=3)
        drain(consumer, producer)
        assert consumer.answers[name].tokens == expected(PROMPT, 3)
    assert scripted(consumer).names() == ["acquire", "read"]
    assert consumer.computed_tokens == 3 + 100 - 96 + 2


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_a_load_that_fails_fails_for_all(policy):
    """If the load of siblings fails, the policy for failed loads holds for each of them, and nothing stays allocated."""
    producer, consumer = pair_of(policy=policy)
    scripted(consumer).automatic = False
    params = handed_over(producer, "p", PROMPT)
    add_siblings(consumer, params, max_tokens=3)
    consumer.step()
    scripted(consumer).finish(params["kvxfer"]["token"], LeaseEndedError("too late"))
    drain(consumer)
    tokens = [] if policy == "fail" else expected(PROMPT, 3)
    assert [consumer.answers[name].tokens for name in SIBLINGS] == [tokens] * 3
    # Its parameters, sent again, name a lease that has ended.
    consumer.add("again", PROMPT, params, max_tokens=3)
    drain(consumer)
    assert consumer.answers["again"].tokens == expected(PROMPT, 3)
    assert consumer.stats["refused_params"] == {"lease_used": 1}


def test_a_sibling_takes_over():
    """If the first sibling is aborted before its load began, the next one loads."""
    producer, consumer = pair_of()
    params = handed_over(producer, "p", PROMPT)
    add_siblings(consumer, params, max_tokens=3)
    consumer.abort(SIBLINGS[0])
    drain(consumer, producer)
    assert [consumer.answers[name].tokens for name in SIBLINGS[1:]] == [expected(PROMPT, 3)] * 2
    assert scripted(consumer).names() == ["acquire", "read"]
    assert producer.stats["released_leases"] == 1


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_all_siblings_are_aborted(steps):
    """A client that leaves ends the load of its siblings, at any moment, and nothing stays allocated on either side."""
    producer, consumer = pair_of()
    params = handed_over(producer, "p", PROMPT)
    add_siblings(consumer, params, max_tokens=30)
    for _ in range(steps):
        consumer.step()
    for name in SIBLINGS:
        consumer.abort(name)
    drain(consumer, producer)
    assert "hook_errors" not in consumer.stats


def test_siblings_that_want_the_logprobs_of_the_prompt():
    """Siblings whose whole prompt vLLM computes need no load, and wait for none."""
    producer, consumer = pair_of()
    params = handed_over(producer, "p", PROMPT)
    for name in SIBLINGS:
        consumer.add(name, PROMPT, params, max_tokens=3).skip_reading_prefix_cache = True
    drain(consumer, producer)
    assert [consumer.answers[name].tokens for name in SIBLINGS] == [expected(PROMPT, 3)] * 3
    assert scripted(consumer).names() == ["acquire", "release"]


def test_without_a_prefix_cache_one_sibling_loads():
    """Without a prefix cache the first sibling loads, and the others are refused by name and compute the prompt."""
    producer, consumer = pair_of(prefix_caching=False)
    add_siblings(consumer, handed_over(producer, "p", PROMPT), max_tokens=3)
    drain(consumer, producer)
    assert [consumer.answers[name].tokens for name in SIBLINGS] == [expected(PROMPT, 3)] * 3
    assert scripted(consumer).names() == ["acquire", "read"]
    assert consumer.stats["refused_params"] == {"lease_used": 2}


def test_a_sibling_on_another_data_parallel_rank():
    """A sibling computes its prompt where the first one is on another rank, which has the lease.

    The configuration of a rank of a dense model does not tell that there are others.
    """
    producer = Engine("kv_producer", name="P", endpoint=ScriptedEndpoint())
    consumer = Engine("kv_consumer", name="D", endpoint=ScriptedEndpoint())
    params = handed_over(producer, "p", PROMPT)
    consumer.add(SIBLINGS[1], PROMPT, params, max_tokens=3)
    drain(consumer)
    assert consumer.answers[SIBLINGS[1]].tokens == expected(PROMPT, 3)
    assert consumer.stats["refused_params"] == {"lease_used": 1} and not scripted(consumer).calls


@pytest.mark.parametrize("chunk", [2048, 40])
def test_siblings_of_a_prefill_have_one_lease(chunk):
    """Three siblings of a prefill announce and publish one lease, and the last to end answers with it."""
    producer = Engine("kv_producer", name="P", endpoint=ScriptedEndpoint(), chunk=chunk)
    add_siblings(producer, P_PARAMS)
    for name in SIBLINGS:
        producer.run_until_answered(name)
    producer.step()
    names = scripted(producer).names()
    assert names.count("announce") == names.count("publish") == 1 and "revoke" not in names
    (token,) = scripted(producer).published
    assert producer.answers[SIBLINGS[-1]].kv_transfer_params["kvxfer"]["token"] == token
    assert producer.blocks_in_use == 4  # of the one that is published
    scripted(producer).end(token, read=True)
    drain(producer)
    # A sibling that comes so late that the lease has ended has none, and pins nothing.
    producer.add("3_cmpl-1-abcdef01", PROMPT, P_PARAMS)
    drain(producer)
    assert producer.answers["3_cmpl-1-abcdef01"].kv_transfer_params is None


PROMPTS = {0: prompt_of(60), 1: prompt_of(100, seed=2), 2: prompt_of(140, seed=3), 3: prompt_of(60)}
"""Prompts of one client's request. vLLM makes a request of each, and answers with the parameters of the first."""


def ids_of_prompts(name: str) -> list[str]:
    """Ids of these requests, as vLLM's front end makes them."""
    return [f"cmpl-{name}-{number}-abcdef0{number}" for number in PROMPTS]


def several_prompts(producer: Engine, consumer: Engine) -> dict[str, int]:
    """Send a request with several prompts, and check the tokens; returns the refusals of the decode server."""
    p_ids, d_ids = ids_of_prompts("p"), ids_of_prompts("d")
    params = handed_over(producer, p_ids[0], PROMPTS[0])  # its answer may come before the others arrive
    for number in (1, 2, 3):
        handed_over(producer, p_ids[number], PROMPTS[number])
    for name, prompt in zip(d_ids, PROMPTS.values(), strict=True):
        consumer.add(name, prompt, params, max_tokens=3)
    consumer.run()
    assert [consumer.answers[name].tokens for name in d_ids] == [expected(prompt, 3) for prompt in PROMPTS.values()]
    return consumer.stats.get("refused_params", {})


@pytest.mark.parametrize(
    ("first", "own", "key"),
    [
        ("cmpl-p-0-abcdef00", "cmpl-d-2-abcdef02", "cmpl-p-2"),
        ("0_cmpl-p-0-abcdef00", "1_cmpl-d-12-abcdef02", "cmpl-p-12"),
        ("cmpl-a-1-0-abcdef00", "cmpl-b-3", "cmpl-a-1-3"),
        ("cmpl-p-0-abcdef00", "cmpl-d-0-abcdef02", None),
        ("cmpl-p-1-abcdef00", "cmpl-d-1-abcdef02", None),
        ("chatcmpl-p-abcdef00", "cmpl-d-1-abcdef02", None),
        ("cmpl-p-0-abcdef00", "chatcmpl-d-1-abcdef02", None),
        ("", "cmpl-d-1", None),
    ],
)
def test_key_of_another_prompt(first, own, key):
    """The id of a completion's first prompt leads to the key of the prompt with the same number as the decode request's."""
    assert of_other_prompt(first, own) == key


def test_several_prompts_in_one_request():
    """The parameters of the first prompt lead to the leases of the others, and no lease is left; one prompt comes twice."""
    producer, consumer = pair_of()
    assert several_prompts(producer, consumer) == {}
    drain(consumer, producer)
    assert scripted(consumer).names().count("acquire") == 4
    assert producer.stats["released_leases"] == scripted(consumer).names().count("read") >= 3


@pytest.mark.parametrize("why", ["mode pull", "sent again"])
def test_several_prompts_whose_leases_are_random(why):
    """Prompts whose leases the decode server cannot derive are computed there at once."""
    net = {}
    mode = "pull" if why == "mode pull" else "auto"
    producer = Engine("kv_producer", name="P", endpoint=ScriptedEndpoint(net), mode=mode)
    consumer = Engine("kv_consumer", name="D", endpoint=ScriptedEndpoint(net))
    if why == "sent again":
        for number, prompt in PROMPTS.items():
            handed_over(producer, f"cmpl-p-{number}-00000000", prompt)
    assert several_prompts(producer, consumer) == {"other_prompt": 2}
    assert scripted(consumer).names().count("read") == 1


def test_several_prompts_of_other_weights():
    """If prefill has other weights, none of several prompts is loaded."""
    producer, consumer = pair_of()
    producer.scheduler.connector.weights_updated("2")
    assert several_prompts(producer, consumer) == {"other_weights": 4}


def test_requests_that_only_look_like_siblings():
    """Requests with the ids of siblings and other prompts have a lease each."""
    producer = Engine("kv_producer", name="P", endpoint=ScriptedEndpoint())
    for number, name in enumerate(SIBLINGS):
        handed_over(producer, name, prompt_of(100, seed=number))
    assert len(scripted(producer).published) == 3


def test_a_first_sibling_that_is_aborted():
    """If the first sibling of a prefill is aborted, the others end without a lease, and nothing stays allocated."""
    producer = Engine("kv_producer", name="P", endpoint=ScriptedEndpoint())
    add_siblings(producer, P_PARAMS)
    producer.abort(SIBLINGS[0])
    drain(producer)
    assert scripted(producer).names() == ["announce", "revoke"]
    assert [producer.answers[name].kv_transfer_params for name in SIBLINGS] == [None] * 3

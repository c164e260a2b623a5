# SPDX-License-Identifier: Apache-2.0
"""A consumer that reads after the lease has ended must not answer from blocks that have the KV of other requests by then.

vLLM's NixlConnector, with the same lease of 3 s, producer of 400 blocks and 8 other prompts in between, answered 3 of 3 prompts
wrongly with HTTP 200. Requests go to the servers directly, without the router, to control the timing.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest

LEASE_S = 3.0
POLICIES = ("fail", "recompute")
WAYS = ("pull", "push")


@pytest.fixture(scope="module")
def late_lab(started_lab):
    """The lab with a producer of 400 blocks and a lease of 3 s, on the same address as the one before."""
    lab = started_lab
    lab.heal()
    lab.replace_producer(
        replace(
            lab.prefill.settings,
            num_blocks=400,
            connector_options={**lab.prefill.settings.connector_options, "lease_seconds": LEASE_S, "mode": "push"},
            name="prefill-late",
        )
    )
    for policy in POLICIES:
        lab.consumer(policy)
    return lab


def overwrite(lab) -> None:
    """Prefill eight other prompts: about twice as many blocks as the producer has."""
    for _ in range(8):
        assert lab.prefill.ask(lab.prompt(3000), max_tokens=1).ok


def assert_all_work(lab) -> None:
    """Check that every consumer transfers, and no block is in use."""
    consumers = [lab.consumer(policy) for policy in POLICIES]
    lab.assert_no_blocks_in_use(lab.prefill, *consumers)
    for consumer in consumers:
        lab.assert_works(consumer, attempts=3)


def test_reads_after_the_lease_ended(late_lab, way):
    """Prompts that are read after their blocks were reused end in an error, or in right tokens computed locally."""
    lab = late_lab
    sent = []
    for policy, num_tokens in itertools.product(POLICIES, (2500, 600, 600)):
        prompt = lab.prompt(num_tokens)
        params, prefilled = lab.begin(way, prompt)
        assert prefilled.result().ok
        sent.append((policy, prompt, params))
    time.sleep(LEASE_S)  # the case itself: no consumer reads the blocks
    lab.assert_no_blocks_in_use(lab.prefill, timeout_s=60)
    overwrite(lab)
    for policy, prompt, params in sent:
        answer = lab.consumer(policy).ask(prompt, max_tokens=24, kv_transfer_params=params, timeout_s=lab.deadline_s)
        if policy == "recompute":
            assert answer.ok
            assert answer.tokens == lab.expect(prompt, 24)
        else:
            assert answer.status == 500, answer.body
    assert_all_work(lab)


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.03, 0.1, 0.3])
def test_consumers_frozen_at_the_end_of_their_leases(late_lab, delay_s):
    """Consumers frozen at some point of their requests until the blocks were overwritten answer rightly or with an error."""
    lab = late_lab
    begun = []
    for way, policy in itertools.product(
        WAYS, POLICIES
    ):  # pushed prompts are still computed when the consumers are asked
        prompt = lab.prompt(2500)
        begun.append((lab.consumer(policy), prompt, *lab.begin(way, prompt)))
    asked = [
        lab.threads.submit(
            consumer.ask, prompt, max_tokens=24, kv_transfer_params=params, timeout_s=lab.deadline_s + 60
        )
        for consumer, prompt, params, _ in begun
    ]
    time.sleep(delay_s)  # the case itself: somewhere in the requests
    for policy in POLICIES:
        lab.consumer(policy).freeze()
    try:
        assert all(prefilled.result().ok for *_, prefilled in begun)
        time.sleep(LEASE_S)
        lab.assert_no_blocks_in_use(lab.prefill, timeout_s=60)
        overwrite(lab)
    finally:
        for policy in POLICIES:
            lab.consumer(policy).thaw()
    for (_, prompt, *_), answer in zip(begun, [each.result() for each in asked], strict=True):
        assert answer.tokens == lab.expect(prompt, 24) if answer.ok else answer.status == 500, answer
    assert_all_work(lab)


def test_a_consumer_that_waits_in_its_queue(late_lab, way):
    """A request that waits in the queue for longer than a lease keeps the lease, and its read succeeds.

    Another prompt is tried if this machine stood still for the length of a lease, which may end it, or if the queue was empty
    before the prefill had ended.
    """
    lab = late_lab
    for _ in range(5):
        with lab.standstills() as longest:
            waited_s, read = wait_in_queue(lab, way)
        if waited_s > 1.5 * LEASE_S and (read or longest() < LEASE_S / 2):
            break
    assert waited_s > 1.5 * LEASE_S, "the queue was too short to show anything"
    assert read, f"the lease was lost, although this machine never stood still for more than {longest():.2f} s"


def wait_in_queue(lab, way) -> tuple[float, bool]:
    """Ask a busy consumer: seconds until it answers, and whether it read the KV instead of computing it."""
    consumer = lab.consumer("recompute")  # it runs one request at a time, see conftest
    before = consumer.metric("vllm:kvxfer_transfer_seconds_count")
    failed = consumer.metric("vllm:kvxfer_failed_transfers_total")
    prompt = lab.prompt(600)
    expected = lab.expect(prompt, 8)
    long_prompt = lab.prompt(50)
    busy = lab.threads.submit(consumer.ask, long_prompt, max_tokens=2500)
    assert lab.eventually(lambda: busy.done() or consumer.metric("vllm:num_requests_running") == 1), consumer.metrics()
    params, prefilled = lab.begin(way, prompt)
    begin = time.monotonic()
    answer = consumer.ask(prompt, max_tokens=8, kv_transfer_params=params)
    waited_s = time.monotonic() - begin
    assert busy.result().ok, busy.result().body
    assert prefilled.result().ok
    assert answer.tokens == expected
    read = lab.eventually(lambda: consumer.metric("vllm:kvxfer_transfer_seconds_count") == before + 1)
    lab.assert_no_blocks_in_use(lab.prefill, consumer)
    return waited_s, read and consumer.metric("vllm:kvxfer_failed_transfers_total") == failed


def test_a_producer_short_of_blocks(late_lab, front):
    """More clients than the producer has blocks for, with a short lease, get right tokens or errors; no block is lost."""
    lab = late_lab
    prompts = [lab.prompt(1500) for _ in range(12)]
    expected = [lab.expect(prompt, 8) for prompt in prompts]
    answers = lab.together((lambda prompt=prompt: front.ask(prompt, max_tokens=8)) for prompt in prompts)
    assert [answer.tokens for answer in answers if answer.ok] == [
        tokens for answer, tokens in zip(answers, expected, strict=True) if answer.ok
    ]
    assert sum(answer.ok for answer in answers) >= len(answers) // 2
    lab.assert_no_blocks_in_use(lab.prefill, lab.decode)

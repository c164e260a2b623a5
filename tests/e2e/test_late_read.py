# SPDX-License-Identifier: Apache-2.0
"""A consumer that comes too late must not answer from blocks that hold other people's KV by then.

vLLM's NixlConnector, with this very lease of 3 s, this producer of 400 blocks and 8 other prompts in between, answered 3 of
3 prompts wrongly with HTTP 200. Requests go to the servers directly, without the router, to control the timing.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

LEASE_S = 3.0
POLICIES = ("fail", "recompute")


@pytest.fixture(scope="module")
def late_lab(started_lab):
    """The laboratory with a producer of 400 blocks and a lease of 3 s, on the same address as the one before."""
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
    """Eight other prompts: about twice as many blocks as the producer has."""
    for _ in range(8):
        assert lab.prefill.ask(lab.prompt(3000), max_tokens=1).ok


@pytest.mark.parametrize("policy", POLICIES)
def test_reads_after_the_lease_ended(late_lab, way, policy):
    """Three prompts fetched after their blocks were given to others: an error, or right tokens computed locally."""
    lab = late_lab
    prompts = [lab.prompt(2500 if i == 0 else 600) for i in range(3)]
    handed = []
    for prompt in prompts:
        params, prefilled = lab.begin(way, prompt)
        assert prefilled.result().ok
        handed.append(params)
    time.sleep(LEASE_S)  # the case itself: nobody comes for the blocks
    lab.assert_no_blocks_in_use(lab.prefill, timeout_s=30)
    overwrite(lab)
    for prompt, params in zip(prompts, handed, strict=True):
        answer = lab.consumer(policy).ask(prompt, max_tokens=24, kv_transfer_params=params, timeout_s=lab.deadline_s)
        if policy == "recompute":
            assert answer.ok
            assert answer.tokens == lab.expect(prompt, 24)
        else:
            assert answer.status == 500, answer.body
    lab.assert_no_blocks_in_use(lab.prefill, lab.consumer(policy))
    lab.assert_works(lab.consumer(policy), attempts=3)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("way", "delay_s"),
    [("pull", 0.0), ("pull", 0.01), ("pull", 0.03), ("pull", 0.1), ("push", 0.0), ("push", 0.1), ("push", 0.3)],
)
def test_a_consumer_that_sleeps_through_the_end_of_its_lease(late_lab, policy, way, delay_s):
    """A consumer frozen somewhere in its request until its blocks were overwritten answers rightly or with an error."""
    lab = late_lab
    consumer = lab.consumer(policy)
    prompt = lab.prompt(3000)
    params, prefilled = lab.begin(way, prompt)
    asking = lab.threads.submit(
        consumer.ask, prompt, max_tokens=24, kv_transfer_params=params, timeout_s=lab.deadline_s + 60
    )
    time.sleep(delay_s)  # the case itself: somewhere in the request
    consumer.freeze()
    try:
        assert prefilled.result().ok
        time.sleep(LEASE_S)
        lab.assert_no_blocks_in_use(lab.prefill, timeout_s=30)
        overwrite(lab)
    finally:
        consumer.thaw()
    answer = asking.result()
    assert answer.tokens == lab.expect(prompt, 24) if answer.ok else answer.status == 500, answer
    lab.assert_no_blocks_in_use(lab.prefill, consumer)
    lab.assert_works(consumer, attempts=3)


def test_a_consumer_that_waits_in_its_queue(late_lab, way):
    """A request that waits longer than a lease for its turn keeps the lease: its read succeeds.

    A virtual machine that stands still for the length of a lease ends it too, and no process can help that: where this one
    was seen to stand still, another prompt is tried. So it is where the queue was gone before the prefill was done.
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
    """Ask a consumer that is busy: seconds until it answers, and whether it read the KV and did not compute it again."""
    consumer = lab.consumer("recompute")  # it runs one request at a time, see conftest
    before = consumer.metric("vllm:kvxfer_transfer_seconds_count")
    failed = consumer.metric("vllm:kvxfer_failed_transfers_total")
    prompt = lab.prompt(600)
    expected = lab.expect(prompt, 8)
    long_prompt = lab.prompt(50)
    busy = threading.Thread(target=lambda: consumer.ask(long_prompt, max_tokens=2500))
    busy.start()
    assert lab.eventually(lambda: consumer.metric("vllm:num_requests_running") == 1)
    params, prefilled = lab.begin(way, prompt)
    begin = time.monotonic()
    answer = consumer.ask(prompt, max_tokens=8, kv_transfer_params=params)
    waited_s = time.monotonic() - begin
    busy.join()
    assert prefilled.result().ok
    assert answer.tokens == expected
    read = lab.eventually(lambda: consumer.metric("vllm:kvxfer_transfer_seconds_count") == before + 1, 10)
    lab.assert_no_blocks_in_use(lab.prefill, consumer)
    return waited_s, read and consumer.metric("vllm:kvxfer_failed_transfers_total") == failed


def test_a_producer_short_of_blocks(late_lab, front):
    """More clients than the producer has blocks for, with a short lease: right tokens or errors, and no block lost."""
    lab = late_lab
    prompts = [lab.prompt(1500) for _ in range(12)]
    expected = [lab.expect(prompt, 8) for prompt in prompts]
    answers = lab.together((lambda prompt=prompt: front.ask(prompt, max_tokens=8)) for prompt in prompts)
    assert [answer.tokens for answer in answers if answer.ok] == [
        tokens for answer, tokens in zip(answers, expected, strict=True) if answer.ok
    ]
    assert sum(answer.ok for answer in answers) >= len(answers) // 2
    lab.assert_no_blocks_in_use(lab.prefill, lab.decode)

# SPDX-License-Identifier: Apache-2.0
"""A server that dies or freezes: every request ends in right tokens or an error in time, and the pair works again."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

POLICIES = ("fail", "recompute")


def ask_all(lab, handed, deadline_s, **options):
    """Ask each policy's consumer to go on with its prompt, at once; the answers, checked against the bar."""

    def one(policy, prompt, params):
        begin = time.monotonic()
        answer = lab.consumer(policy).ask(
            prompt, max_tokens=8, kv_transfer_params=params, timeout_s=deadline_s, **options
        )
        assert time.monotonic() - begin < deadline_s
        return answer

    answers = dict(
        zip(
            handed,
            lab.together(
                (lambda policy=policy, prompt=prompt, params=params: one(policy, prompt, params))
                for policy, (prompt, params) in handed.items()
            ),
            strict=True,
        )
    )
    for policy, answer in answers.items():
        expected = lab.expect(handed[policy][0], 8)
        assert answer.tokens == expected if answer.ok else 500 <= answer.status < 600, (policy, answer)
    return answers


def prefill_all(lab, num_tokens=700):
    """For each policy a prompt and what the producer handed out for it."""
    for policy in POLICIES:
        lab.consumer(policy)
    prompts = {policy: lab.prompt(num_tokens) for policy in POLICIES}
    return {policy: (prompt, lab.prefill.prefill(prompt).kv_transfer_params) for policy, prompt in prompts.items()}


def assert_all_work(lab, timeout_s=60.0):
    """Every consumer transfers again, and nobody holds a block."""
    consumers = [lab.consumer(policy) for policy in POLICIES]
    for consumer in consumers:
        lab.assert_works(consumer, attempts=3)
    lab.assert_no_blocks_in_use(lab.prefill, *consumers, timeout_s=timeout_s)


def test_a_producer_killed_before_the_read_and_restarted(lab):
    """Its death ends in the policy's answer; restarted on its address it is met afresh by consumers that ran on."""
    handed = prefill_all(lab)
    stale = prefill_all(lab)
    lab.prefill.kill()
    answers = ask_all(lab, handed, lab.deadline_s)
    assert not answers["fail"].ok
    assert answers["recompute"].ok
    for policy in POLICIES:
        lab.assert_no_blocks_in_use(lab.consumer(policy))
    lab.prefill.restart()
    answers = ask_all(lab, stale, lab.deadline_s)
    assert answers["recompute"].ok
    assert_all_work(lab)


def test_a_producer_killed_while_clients_are_served_and_busy_when_it_is_back(lab):
    """Clients served while it dies get right tokens or an error in time; a new one that is busy for 7 s is waited for."""
    prompts = [lab.prompt(900) for _ in range(8)]
    expected = [lab.expect(prompt, 8) for prompt in prompts]
    killer = threading.Timer(0.5, lab.prefill.kill)
    killer.start()
    answers = lab.together(
        (lambda prompt=prompt: lab.router.ask(prompt, max_tokens=8, timeout_s=lab.deadline_s)) for prompt in prompts
    )
    killer.join()
    assert all(answer.tokens == tokens for answer, tokens in zip(answers, expected, strict=True) if answer.ok)
    lab.assert_no_blocks_in_use(lab.decode)
    lab.prefill.restart()
    handed = prefill_all(lab)
    lab.prefill.freeze()
    thaw = threading.Timer(7.0, lab.prefill.thaw)
    thaw.start()
    answers = ask_all(lab, handed, lab.deadline_s)
    thaw.join()
    assert all(answer.ok for answer in answers.values())
    assert_all_work(lab)


@pytest.mark.parametrize("delay_s", [None, 0.01, 0.05])
def test_a_producer_that_freezes(lab, delay_s):
    """A producer that stops answering costs its consumers at most their deadline; when it goes on, it serves again."""
    handed = prefill_all(lab, num_tokens=3000)
    freezer = threading.Timer(delay_s or 0.0, lab.prefill.freeze)
    try:
        freezer.start()
        if delay_s is None:
            freezer.join()
        answers = ask_all(lab, handed, lab.deadline_s)
        if delay_s is None:
            assert not answers["fail"].ok
        assert answers["recompute"].ok
    finally:
        freezer.join()
        lab.prefill.thaw()
    # Leases whose consumer gave up run for their 30 s.
    assert_all_work(lab, timeout_s=90)


def test_a_consumer_killed_after_prefill(lab):
    """Blocks lent to a consumer that died are freed by the lease; the producer lives and serves the restarted one."""
    consumer = lab.consumer("recompute")
    lab.assert_works(consumer, attempts=3)
    prompts = [lab.prompt(2000) for _ in range(4)]
    handed = [lab.prefill.prefill(prompt).kv_transfer_params for prompt in prompts]
    killer = threading.Timer(0.05, consumer.kill)
    killer.start()
    for prompt, params in zip(prompts, handed, strict=True):
        with contextlib.suppress(OSError):  # it is dead, as intended
            consumer.ask(prompt, kv_transfer_params=params, timeout_s=30)
    killer.join()
    assert lab.prefill.alive
    lab.assert_works(lab.decode, attempts=3)
    # Starting the consumer again takes about as long as the leases last.
    assert_all_work(lab)

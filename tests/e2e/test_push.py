# SPDX-License-Identifier: Apache-2.0
"""What only a request can show that is sent to a prefill and a decode server at once. The rest holds for every way to send one."""

from __future__ import annotations

import pytest

MAX_TOKENS = 12


def moved_bytes(lab, ask) -> tuple[float, float]:
    """Bytes of what ``ask`` asks that were across before their prefill had ended, and all."""
    names = ("vllm:kvxfer_partial_bytes_total", "vllm:kvxfer_transfer_bytes_sum")
    before = [lab.decode.metric(name) for name in names]
    ask()
    lab.settle_metrics(lab.decode)
    early, total = (lab.decode.metric(name) - old for name, old in zip(names, before, strict=True))
    return early, total


def test_most_bytes_are_across_before_the_last_chunk(lab):
    """Of 3,000 tokens in chunks of 512 at least 80 % of the bytes have arrived before prefill has ended."""
    prompt = lab.prompt(3000)
    early, total = moved_bytes(lab, lambda: lab.send("push", prompt, max_tokens=2))
    assert total > 0
    assert early / total >= 0.8


def test_the_decode_request_comes_first(lab):
    """A decode server that waits before the prefill server was told of the request gets its blocks as they are made."""
    prompt, key = lab.prompt(3000), "decode first"

    def ask() -> None:
        params = lab.prefill.told_at_once(key)
        decoded = lab.threads.submit(lab.decode.ask, prompt, max_tokens=MAX_TOKENS, kv_transfer_params=params)
        assert lab.eventually(lambda: lab.decode.blocks_in_use() > 0)
        assert lab.prefill.prefill(prompt, transfer_id=key).ok
        assert decoded.result().tokens == lab.expect(prompt, MAX_TOKENS)

    early, total = moved_bytes(lab, ask)
    assert total > 0
    assert early / total >= 0.8


def test_the_decode_request_comes_last(lab):
    """One that was to be sent at once and comes when prefill has ended finds all blocks, and none of them was early."""
    prompt = lab.prompt(700)

    def ask() -> None:
        params, prefilled = lab.begin("push", prompt)
        assert prefilled.result().ok
        answer = lab.decode.ask(prompt, max_tokens=MAX_TOKENS, kv_transfer_params=params)
        assert answer.tokens == lab.expect(prompt, MAX_TOKENS)

    early, total = moved_bytes(lab, ask)
    assert total > 0
    assert early == 0


@pytest.mark.parametrize("share", [0.6, 1.0], ids=["partly", "wholly"])
def test_a_prefix_is_there_already(lab, share):
    """Blocks that the decode server has already are not sent, however early the others are."""
    prompt, other = lab.prompt(2560), lab.prompt(2560)
    assert lab.decode.ask(prompt[: int(len(prompt) * share)], max_tokens=1).ok
    answers = []
    _, rest = moved_bytes(lab, lambda: answers.append(lab.send("push", prompt, max_tokens=MAX_TOKENS)))
    assert answers[0].tokens == lab.expect(prompt, MAX_TOKENS)
    _, all_of_it = moved_bytes(lab, lambda: lab.send("push", other, max_tokens=1))
    assert rest <= (1.05 - share) * all_of_it  # the last token is always computed, so its block is never there
    lab.assert_no_blocks_in_use()


def test_what_a_server_refuses_reaches_the_client(lab):
    """What a server refuses comes through the proxy as it was said, and nothing hangs."""
    proxy = lab.fronts["both"]
    assert proxy.ask(lab.prompt(10), model="another", timeout_s=30).status == 404
    assert proxy.ask(lab.prompt(4200), max_tokens=4, timeout_s=30).status == 400
    lab.assert_no_blocks_in_use()

# SPDX-License-Identifier: Apache-2.0
"""Requests sent to a prefill and a decode server at once: tests that do not apply to other ways of sending."""

from __future__ import annotations

import pytest

MAX_TOKENS = 12


def moved_bytes(lab, ask) -> tuple[float, float]:
    """Bytes of the requests of ``ask`` that arrived before their prefill had ended, and all bytes."""
    names = ("vllm:kvxfer_partial_bytes_total", "vllm:kvxfer_transfer_bytes_sum")
    before = [lab.decode.metric(name) for name in names]
    ask()
    lab.refresh_metrics(lab.decode)
    partial, total = (lab.decode.metric(name) - old for name, old in zip(names, before, strict=True))
    return partial, total


def test_most_bytes_arrive_before_the_last_chunk(lab):
    """Of 3,000 tokens in chunks of 512 at least 80 % of the bytes have arrived before prefill has ended, in one of three requests."""
    shares = []
    for _ in range(3):  # a machine that stands still for half a second as decode begins has no time left to read in
        prompt = lab.prompt(3000)
        partial, total = moved_bytes(lab, lambda prompt=prompt: lab.send("push", prompt, max_tokens=2))
        assert total > 0
        shares.append(partial / total)
        if shares[-1] >= 0.8:
            return
    pytest.fail(f"of all bytes only these shares came before the end of prefill: {shares}")


def test_the_decode_request_comes_first(lab):
    """A decode request that arrives before its prefill request reads the blocks while they are computed."""
    prompt, key = lab.prompt(3000), "decode first"

    def ask() -> None:
        params = lab.prefill.rendezvous_params(key)
        decoded = lab.threads.submit(lab.decode.ask, prompt, max_tokens=MAX_TOKENS, kv_transfer_params=params)
        assert lab.eventually(lambda: lab.decode.blocks_in_use() > 0)
        assert lab.prefill.prefill(prompt, transfer_id=key).ok
        assert decoded.result().tokens == lab.expect(prompt, MAX_TOKENS)

    partial, total = moved_bytes(lab, ask)
    assert total > 0
    assert partial / total >= 0.8


def test_the_decode_request_comes_last(lab):
    """A decode request that arrives when prefill has ended reads all blocks, and none of them counts as partial."""
    prompt = lab.prompt(700)

    def ask() -> None:
        params, prefilled = lab.begin("push", prompt)
        assert prefilled.result().ok
        answer = lab.decode.ask(prompt, max_tokens=MAX_TOKENS, kv_transfer_params=params)
        assert answer.tokens == lab.expect(prompt, MAX_TOKENS)

    partial, total = moved_bytes(lab, ask)
    assert total > 0
    assert partial == 0


@pytest.mark.parametrize("share", [0.6, 1.0], ids=["partly", "wholly"])
def test_a_prefix_that_decode_has(lab, share):
    """Blocks that the decode server has are not sent."""
    prompt, other = lab.prompt(2560), lab.prompt(2560)
    assert lab.decode.ask(prompt[: int(len(prompt) * share)], max_tokens=1).ok
    answers = []
    _, rest = moved_bytes(lab, lambda: answers.append(lab.send("push", prompt, max_tokens=MAX_TOKENS)))
    assert answers[0].tokens == lab.expect(prompt, MAX_TOKENS)
    _, all_of_it = moved_bytes(lab, lambda: lab.send("push", other, max_tokens=1))
    assert rest <= (1.05 - share) * all_of_it  # the last token is always computed, so its block is read
    lab.assert_no_blocks_in_use()


def test_what_a_server_refuses_reaches_the_client(lab):
    """The proxy passes a server's refusal on unchanged."""
    proxy = lab.fronts["both"]
    assert proxy.ask(lab.prompt(10), model="another", timeout_s=30).status == 404
    assert proxy.ask(lab.prompt(4200), max_tokens=4, timeout_s=30).status == 400
    lab.assert_no_blocks_in_use()

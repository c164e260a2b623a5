# SPDX-License-Identifier: Apache-2.0
"""Prefill, transfer and decode give the same tokens as one server without a connector, for every way of sending."""

from __future__ import annotations

import json
import random

import pytest

from tools.serve.client import post
from tools.serve.model import SMALL

_BLOCK_NBYTES = 32 * SMALL.kv_nbytes_per_token


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 700, 3000])
def test_completion(lab, front, num_tokens, stream):
    """A completion has the reference's tokens, around block borders too, streamed or not."""
    prompt = lab.prompt(num_tokens)
    moved = lab.decode.metric("vllm:kvxfer_transfer_seconds_count")
    answer = front.ask(prompt, max_tokens=32, stream=stream)
    assert answer.ok, answer.body
    assert answer.tokens == lab.expect(prompt, 32)
    assert answer.finish_reason == "length"
    # Without this the test would also pass if every prompt was computed again.
    assert lab.eventually(lambda: lab.decode.metric("vllm:kvxfer_transfer_seconds_count") == moved + 1)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_chat(lab, front, stream):
    """A chat has the reference's tokens and text, streamed or not."""
    words = " ".join(lab.random.choice(["river", "bridge", "moon", "lease", "token"]) for _ in range(60))
    messages = [{"role": "user", "content": f"How far is the moon? {words}"}]
    answer = front.ask(messages, max_tokens=32, stream=stream)
    assert answer.ok, answer.body
    assert answer.tokens == lab.expect(messages, 32)
    assert answer.text == lab.reference.ask(messages, max_tokens=32).text


@pytest.mark.parametrize("shared", [32, 320, 500])
def test_prefix_that_decode_has_in_part(lab, front, shared):
    """If decode has the first blocks of a prompt, only the rest is moved, and the tokens are right."""
    prefix = lab.prompt(shared)
    assert lab.decode.ask(prefix, max_tokens=1).ok
    prompt = prefix + lab.prompt(700 - shared)
    before = lab.decode.metric("vllm:kvxfer_transfer_bytes_sum")
    answer = front.ask(prompt, max_tokens=24)
    assert answer.tokens == lab.expect(prompt, 24)
    lab.refresh_metrics(lab.decode)
    moved = lab.decode.metric("vllm:kvxfer_transfer_bytes_sum") - before
    assert 0 < moved <= (-(-700 // 32) - shared // 32) * _BLOCK_NBYTES


def test_prompt_that_decode_has(lab, front):
    """If decode has just served the same prompt, the answer is the same and prefill's blocks are freed."""
    prompt = lab.prompt(320)
    answers = [front.ask(prompt, max_tokens=24) for _ in range(3)]
    assert [answer.tokens for answer in answers] == [lab.expect(prompt, 24)] * 3
    lab.assert_no_blocks_in_use(timeout_s=60)


def test_prefix_that_prefill_has(lab, front):
    """Blocks of prefill's own prefix cache are moved like others."""
    prefix = lab.prompt(640)
    assert front.ask(prefix, max_tokens=4).tokens == lab.expect(prefix, 4)
    lab.decode.reset_prefix_cache()
    prompt = prefix + lab.prompt(50)
    assert front.ask(prompt, max_tokens=24).tokens == lab.expect(prompt, 24)


def test_32_clients_at_once(lab, front):
    """32 clients with prompts of mixed lengths, some with a common prefix, some streaming, each get the right tokens."""
    chooser = random.Random(32)
    common = lab.prompt(96)
    prompts = [
        (common if chooser.random() < 0.3 else []) + lab.prompt(chooser.choice([1, 31, 32, 33, 150, 400, 700, 1500]))
        for _ in range(32)
    ]
    expected = [lab.expect(prompt, 24) for prompt in prompts]
    answers = lab.together(
        (lambda prompt=prompt, stream=bool(i % 2): front.ask(prompt, max_tokens=24, stream=stream))
        for i, prompt in enumerate(prompts)
    )
    assert [answer.status for answer in answers] == [200] * 32
    assert [answer.tokens for answer in answers] == expected


@pytest.mark.parametrize("extra", [{"stop": ["zzz"]}, {"echo": True}, {"min_tokens": 3}], ids=str)
def test_other_options_of_a_completion(lab, front, extra):
    """Options that the prefill and decode requests do not share are answered as by the reference."""
    prompt = lab.prompt(70)
    answer = front.ask(prompt, max_tokens=8, **extra)
    assert answer.ok, answer.body
    assert answer.tokens == lab.reference.ask(prompt, max_tokens=8, **extra).tokens


def test_several_answers_to_one_request(lab, front):
    """Three answers to one request are the reference's, take one load, and no lease is left to expire."""
    prompt, options = lab.prompt(700), {"max_tokens": 12, "n": 3, "temperature": 1.0, "top_k": 1}
    names = ("vllm:kvxfer_transfer_seconds_count", "vllm:kvxfer_refused_params_total")
    before = [lab.decode.metric(name) for name in names]
    answer = front.ask(prompt, **options)
    assert answer.ok, answer.body
    lab.assert_no_blocks_in_use(timeout_s=lab.lease_s / 2)
    assert answer.tokens == lab.expect(prompt, 12) * 3
    lab.refresh_metrics(lab.decode)
    assert [lab.decode.metric(name) - old for name, old in zip(names, before, strict=True)] == [1, 0]


def test_several_prompts_in_one_request(lab, front):
    """One request with several prompts is answered as by the reference, and the KV of each is moved.

    A proxy that gives all prompts one ``transfer_id`` and passes on the parameters of the first loses the leases of the others.
    """
    prompts = [lab.prompt(40), lab.prompt(70)]
    expected = 1 if front is lab.fronts["prefill-first"] else 2
    moved = lab.decode.metric("vllm:kvxfer_transfer_seconds_count")
    answer = front.ask(prompts, max_tokens=8)
    assert answer.ok, answer.body
    assert answer.tokens == lab.reference.ask(prompts, max_tokens=8).tokens
    assert lab.eventually(lambda: lab.decode.metric("vllm:kvxfer_transfer_seconds_count") == moved + expected)


def test_weights_of_another_version(lab):
    """While prefill has another version of the weights than decode, its KV is refused by name and nothing is moved."""
    names = ("vllm:kvxfer_transfer_seconds_count", "vllm:kvxfer_refused_params_total")

    def name_weights(server, version):
        assert post(server.url, "/update_weight_version", json.dumps({"new_version": version}).encode())[0] == 200

    try:
        for updated, expected in ((lab.prefill, [0, 1]), (lab.decode, [1, 0])):
            name_weights(updated, "2")
            before = [lab.decode.metric(name) for name in names]
            prompt = lab.prompt(70)
            assert lab.send("pull", prompt, max_tokens=8).tokens == lab.expect(prompt, 8)
            lab.refresh_metrics(lab.decode)
            assert [lab.decode.metric(name) - old for name, old in zip(names, before, strict=True)] == expected
    finally:
        for server in (lab.prefill, lab.decode):
            name_weights(server, "default")


def test_a_pause_of_prefill_ends_when_its_lease_is_read(lab):
    """A pause of the prefill server waits for its lease, which can be read meanwhile, and prefill goes on after it."""
    prompt = lab.prompt(70)
    params, _ = lab.begin("pull", prompt)
    pause = lab.threads.submit(post, lab.prefill.url, "/pause?mode=keep", timeout_s=60)
    try:
        assert lab.decode.ask(prompt, kv_transfer_params=params, max_tokens=8).tokens == lab.expect(prompt, 8)
        assert pause.result()[0] == 200
    finally:
        assert post(lab.prefill.url, "/resume")[0] == 200
    lab.assert_works()


def test_a_prompt_that_leaves_no_room(lab, front):
    """A prompt longer than the model's context is refused by HTTP, and both servers go on."""
    answer = front.ask(lab.prompt(5000), max_tokens=8)
    assert 400 <= answer.status < 500
    lab.assert_works()


def test_no_block_stays_in_use(lab):
    """After these tests no server has a block in use."""
    lab.assert_no_blocks_in_use(lab.prefill, lab.decode, lab.reference)

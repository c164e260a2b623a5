# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode servers that differ in tensor parallelism and in block size: the tokens are those of one server.

All servers run in float32: in bfloat16 two tensor parallel sizes differ by rounding, and greedy tokens drift apart.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

TWO_RANKS = ("--tensor-parallel-size", "2")


@pytest.fixture(scope="module")
def unequal(started_lab):
    """The pair of the laboratory, one rank in blocks of 32, and servers unlike it that prefill and decode."""
    from kvxfer_vllm.local.pair import VllmServer, start_all

    lab = started_lab
    lab.heal()
    plain = replace(lab.prefill.settings, role="kv_both", num_blocks=300)
    settings = {
        "tp1 b64": replace(plain, name="tp1-b64", block_tokens=64),
        "tp2 b32": replace(plain, name="tp2-b32", arguments=TWO_RANKS),
        "tp2 b64": replace(plain, name="tp2-b64", block_tokens=64, arguments=TWO_RANKS),
    }
    servers = {name: VllmServer(each, lab.folder) for name, each in settings.items()}
    try:
        start_all(*servers.values(), timeout_s=480)
        yield servers | {"prefill": lab.prefill, "decode": lab.decode}
    finally:
        for name in settings:
            servers[name].kill()


PAIRS = [
    ("tp2 b32", "decode"),
    ("prefill", "tp2 b32"),
    ("tp1 b64", "decode"),
    ("prefill", "tp1 b64"),
    ("tp2 b64", "decode"),
    ("prefill", "tp2 b64"),
    ("tp2 b32", "tp1 b64"),
    ("tp1 b64", "tp2 b32"),
]


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("hit", ["no hit", "hit"])
def test_tokens_are_those_of_one_server(started_lab, unequal, source, target, hit):
    """Whatever the two sides look like, prefilled here and decoded there is the same; also where a prefix is there already."""
    lab, producer, consumer = started_lab, unequal[source], unequal[target]
    prompts = [lab.prompt(tokens) for tokens in (33, 100, 700)]
    if hit == "hit":
        for prompt in prompts:
            assert consumer.ask(prompt[: len(prompt) * 2 // 3], max_tokens=1).ok
    transfers = consumer.metric("vllm:kvxfer_transfer_seconds_count")
    failed = consumer.metric("vllm:kvxfer_failed_transfers_total")
    refused = consumer.metric("vllm:kvxfer_refused_params_total")
    for prompt in prompts:
        handed = producer.prefill(prompt)
        assert handed.ok, handed.body
        answer = consumer.ask(prompt, max_tokens=12, kv_transfer_params=handed.kv_transfer_params)
        assert answer.ok, answer.body
        assert answer.tokens == lab.expect(prompt, 12)
    # Each rank of the consumer reads for itself.
    ranks = 2 if "tp2" in target else 1
    assert lab.eventually(
        lambda: consumer.metric("vllm:kvxfer_transfer_seconds_count") == transfers + len(prompts) * ranks, 20
    )
    assert consumer.metric("vllm:kvxfer_failed_transfers_total") == failed
    assert consumer.metric("vllm:kvxfer_refused_params_total") == refused
    lab.assert_no_blocks_in_use(producer, consumer)

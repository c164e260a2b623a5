# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode servers that differ in tensor parallelism and in block size: the tokens are those of one server.

All servers run in float32: in bfloat16 two tensor parallel sizes differ by rounding, and greedy tokens drift apart.

Two ranks on a machine with two cores make vLLM slow at times: its workers wait for orders by spinning, and a worker that sleeps may
miss a wake-up and look again after 5 s only (`SHM_READER_RECHECK_INTERVAL_MS` of vLLM 0.32; steps of half a minute were seen). So
servers that a test does not use are frozen, and deadlines are long.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest

TWO_RANKS = ("--tensor-parallel-size", "2")
PROMPT_TOKENS = (33, 700)
MAX_TOKENS = 12
PATIENT = {
    "lease_seconds": 300,
    "rendezvous_timeout_seconds": 200,
    "read_timeout_seconds": 200,
    "peer_timeout_seconds": 100,
}
ANSWER_TIMEOUT_S = 300

PAIRS = [
    ("tp2 b32", "tp1 b32"),
    ("tp1 b32", "tp2 b32"),
    ("tp1 b64", "tp1 b32"),
    ("tp1 b32", "tp1 b64"),
    ("tp2 b64", "tp1 b32"),
    ("tp1 b32", "tp2 b64"),
    ("tp2 b32", "tp1 b64"),
]
HITS = ["no hit", "hit"]
WAYS = ("pull", "push")


class Unequal:
    """The servers by name, frozen while they are not used, and prompts with their right tokens."""

    def __init__(self, lab, servers) -> None:
        self.servers = servers
        prompts = {
            (pair, hit): [(way, lab.prompt(tokens)) for way in WAYS for tokens in PROMPT_TOKENS]
            for pair in PAIRS
            for hit in HITS
        }
        self.asked = {
            key: [(way, prompt, lab.expect(prompt, MAX_TOKENS)) for way, prompt in each]
            for key, each in prompts.items()
        }

    @contextlib.contextmanager
    def awake(self, *names):
        """Thaw these servers for the block."""
        found = [self.servers[name] for name in names]
        for server in found:
            server.thaw()
        try:
            for server in found:  # the first step after a pause is slow
                assert server.ask([7, 8, 9], max_tokens=1, timeout_s=ANSWER_TIMEOUT_S).ok
            yield found
        finally:
            for server in found:
                server.freeze()


@pytest.fixture(scope="module")
def unequal(started_lab):
    """Four servers that prefill and decode; the lab's own are frozen meanwhile."""
    from tools.serve.pair import VllmServer, start_all

    lab = started_lab
    lab.heal()
    secret = {"KVXFER_SECRET": "a secret of these four servers"}
    plain = replace(lab.prefill.settings, role="kv_both", num_blocks=300, connector_options=PATIENT, environment=secret)
    layers = {**PATIENT, "granularity": "layer"}
    two_ranks = (*plain.arguments, *TWO_RANKS)
    settings = {
        "tp1 b32": replace(plain, name="tp1-b32", connector_options=layers),
        "tp1 b64": replace(plain, name="tp1-b64", block_tokens=64),
        "tp2 b32": replace(plain, name="tp2-b32", arguments=two_ranks),
        "tp2 b64": replace(plain, name="tp2-b64", block_tokens=64, arguments=two_ranks, connector_options=layers),
    }
    made = Unequal(lab, {name: VllmServer(each, lab.folder) for name, each in settings.items()})
    own = [server for server in (lab.reference, lab.prefill, lab.decode, lab.recompute) if server.alive]
    for server in own:
        server.freeze()
    try:
        for server in made.servers.values():
            start_all(server, timeout_s=480)
            assert server.ask(lab.prompt(40), max_tokens=2, timeout_s=ANSWER_TIMEOUT_S).ok  # kernels are compiled
            server.freeze()
        yield made
    finally:
        for server in made.servers.values():
            server.kill()
        for server in own:
            server.thaw()


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("hit", HITS)
def test_tokens_are_those_of_one_server(started_lab, unequal, source, target, hit):
    """Tokens are those of one server for all pairs of parallelism and block size, also if decode has a prefix.

    With a request sent to both at once, the decode server knows the first rank only, and blocks are read while prefill runs; some
    producers publish layer by layer. All four servers share a secret.
    """
    asked = unequal.asked[(source, target), hit]
    with unequal.awake(source, target) as (producer, consumer):
        if hit == "hit":
            for _, prompt, _ in asked:
                part = prompt[: len(prompt) * 2 // 3]
                assert consumer.ask(part, max_tokens=1, timeout_s=ANSWER_TIMEOUT_S).ok
        transfers = consumer.metric("vllm:kvxfer_transfer_seconds_count")
        failed = consumer.metric("vllm:kvxfer_failed_transfers_total")
        refused = consumer.metric("vllm:kvxfer_refused_params_total")
        partial = producer.metric("vllm:kvxfer_partial_publishes_total")
        for way, prompt, expected in asked:
            answer = started_lab.send(
                way, prompt, consumer, producer, max_tokens=MAX_TOKENS, timeout_s=ANSWER_TIMEOUT_S
            )
            assert answer.ok, answer.body
            assert answer.tokens == expected
        # Each rank of the consumer reads for itself.
        reads = len(asked) * (2 if "tp2" in target else 1)
        assert started_lab.eventually(
            lambda: consumer.metric("vllm:kvxfer_transfer_seconds_count") == transfers + reads, 60
        )
        assert consumer.metric("vllm:kvxfer_failed_transfers_total") == failed
        assert consumer.metric("vllm:kvxfer_refused_params_total") == refused
        by_layer = producer.settings.connector_options.get("granularity") == "layer"
        assert (producer.metric("vllm:kvxfer_partial_publishes_total") > partial) == by_layer
        started_lab.assert_no_blocks_in_use(producer, consumer, timeout_s=120)

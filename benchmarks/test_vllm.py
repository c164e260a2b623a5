# SPDX-License-Identifier: Apache-2.0
"""Real vLLM servers: seconds from the decode request to its first token, beside vLLM's own NixlConnector, A B B A.

Two prefill and two decode servers run, and the pair that is not measured is frozen: NixlConnector keeps a core of each of its
processes busy also when idle, which on a small machine would slow kvxfer down. Each prompt is new to both, the producer prefills it
first, and only the decode request is timed. Then the same prompt is asked again: its KV is in the cache now, so this time is all but
the transfer.

The first benchmark sends requests to both servers at once (push), and measures the client's time to its first token.

Minutes long: ``make benchvllm``.
"""

from __future__ import annotations

import importlib.util
import os
import random
import statistics
import threading
import time
import uuid
from collections import defaultdict

import psutil
import pytest

MISSING = [name for name in ("vllm", "nixl", "transformers") if importlib.util.find_spec(name) is None]
CONNECTORS = ("KvxferConnector", "NixlConnector")
TOKENS = (500, 2000, 3500)
ROUNDS = 6
WARM_UPS = 4
CLIENT_ROUNDS = 3
ANSWER_TIMEOUT_S = 300

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


class _Pair:
    """A prefill and a decode server with one connector, frozen while they are not measured."""

    def __init__(
        self, connector: str, model, folder, *arguments: str, cores: tuple[int, ...] = (), **options: str
    ) -> None:
        from tools.serve.pair import ServerSettings, VllmServer, start_all

        # bf16 uses AMX attention, which ends with an illegal instruction if a virtual machine announces AMX and bars it.
        common = {
            "model": model,
            "connector": connector,
            "connector_options": options,
            "arguments": ("--dtype", "float16", *arguments),
        }
        self.prefill = VllmServer(ServerSettings(name=f"prefill-{connector}", role="kv_producer", **common), folder)
        self.decode = VllmServer(ServerSettings(name=f"decode-{connector}", role="kv_consumer", **common), folder)
        self.servers = (self.prefill, self.decode)
        start_all(*self.servers, timeout_s=480)
        for server, core in zip(self.servers, cores, strict=False):
            first = psutil.Process(server.pid)
            for process in (first, *first.children(recursive=True)):
                for thread in process.threads():
                    os.sched_setaffinity(thread.id, {core})

    def __enter__(self):
        for server in self.servers:
            server.thaw()
        for server in self.servers:  # the first step after a pause is slow and not measured
            assert server.ask([7, 8, 9], max_tokens=2).ok
        return self

    def __exit__(self, *_) -> None:
        for server in self.servers:
            server.reset_prefix_cache()
        for server in self.servers:
            server.freeze()

    def first_token_s(self, prompt) -> tuple[float, float]:
        """Seconds to the first token of a decode request that transfers its KV, and of one that has it in its cache."""
        prefilled = self.prefill.prefill(prompt)
        assert prefilled.kv_transfer_params, prefilled.body
        moved = self.decode.ask(prompt, max_tokens=4, stream=True, kv_transfer_params=prefilled.kv_transfer_params)
        assert moved.ok, moved.body
        here = self.decode.ask(prompt, max_tokens=4, stream=True)
        assert here.ok, here.body
        return moved.first_byte_s, here.first_byte_s

    def warm_up(self, prompt) -> None:
        """Warm up kernels, the handshake and the pages of the cache.

        Repeated if necessary: NixlConnector's first handshake gives up after 5 s, and fails the request, if the other server is
        still busy.
        """
        for tries_left in reversed(range(WARM_UPS)):
            try:
                self.first_token_s(prompt)
            except AssertionError:
                if not tries_left:
                    raise
            else:
                return

    def client_first_token_s(self, prompt, how: str) -> float:
        """Seconds from the client's request to its first token: ``how`` is "alone" (one server), "pull" or "push"."""
        name, begin = uuid.uuid4().hex, time.monotonic()
        if how == "alone":
            server, params = self.prefill, None
        elif how == "pull":
            server, params = self.decode, self.prefill.prefill(prompt, request_id=name).kv_transfer_params
        else:
            server, params = self.decode, self.prefill.rendezvous_params(name)
            prefill = threading.Thread(
                target=lambda: self.prefill.prefill(
                    prompt, transfer_id=name, request_id=name, timeout_s=ANSWER_TIMEOUT_S
                )
            )
            prefill.start()
        asked = time.monotonic()
        answer = server.ask(
            prompt, max_tokens=2, stream=True, kv_transfer_params=params, request_id=name, timeout_s=ANSWER_TIMEOUT_S
        )
        if how == "push":
            prefill.join()
        assert answer.ok, answer.body
        return asked - begin + answer.first_byte_s


@pytest.mark.parametrize(
    ("connector", "ways", "options"),
    [
        ("KvxferConnector", ("alone", "pull", "push"), {}),
        ("KvxferConnector", ("alone", "push"), {"granularity": "layer"}),
        ("NixlConnector", ("alone", "pull"), {}),
        ("NixlPushConnector", ("alone", "push"), {}),
    ],
)
def test_client(benchmark, measuring, report, tmp_path, connector, ways, options):
    """Push hides the transfer behind the prefill: the goal is 80 % of its cost in pull.

    One pair of servers at a time, because six servers do not fit a small machine. ``alone`` is the prefill server's own first
    token. The time of the decode server with its KV in the cache comes on top of it in each way; the rest is the cost of the
    transfer. Each server has a core of its own, as on a machine of its own: vLLM spins while it waits for a transfer, and a
    decode server that waits from the beginning would slow the prefill server down.
    """
    if not measuring:
        pytest.skip("minutes long, and only of use with a clock: make benchvllm")
    from tools.serve.model import KV_HEAVY, make_model

    numbers, times = random.Random(8), defaultdict(list)
    cores = sorted(os.sched_getaffinity(0))[:2]
    chunked = ("--max-num-batched-tokens", "512")
    pair = _Pair(connector, make_model(KV_HEAVY), tmp_path, *chunked, cores=tuple(cores), **options)
    try:
        with pair:
            for round_number in range(-1, CLIENT_ROUNDS):  # the first one is for kernels and first touches
                for tokens in TOKENS:
                    for way in ways if round_number % 2 else ways[::-1]:
                        prompt = [numbers.randrange(5, KV_HEAVY.vocabulary) for _ in range(tokens)]
                        seconds = pair.client_first_token_s(prompt, way)
                        if way != "alone":  # its KV is in the cache now: the time of the decode server itself
                            again = pair.decode.ask(prompt, max_tokens=2, stream=True)
                            assert again.ok, again.body
                        if round_number >= 0:
                            times[way, tokens].append(seconds)
                            if way != "alone":
                                times["here", tokens].append(again.first_byte_s)
            prompt = [numbers.randrange(5, KV_HEAVY.vocabulary) for _ in range(500)]
            benchmark.pedantic(lambda: pair.client_first_token_s(prompt, ways[-1]), rounds=1)
    finally:
        for server in pair.servers:
            server.kill()
    for tokens in TOKENS:
        medians = {way: statistics.median(times[way, tokens]) for way in ways}
        here = statistics.median(times["here", tokens])
        costs = {way: medians[way] - medians["alone"] - here for way in ways[1:]}
        benchmark.extra_info[f"{tokens} tokens"] = {way: times[way, tokens] for way in ways}
        report(
            f"The client's first token, 512 tokens a step, seconds; medians of {CLIENT_ROUNDS}",
            connector=" ".join((connector, *options.values())),
            tokens=f"{tokens:,}",
            alone=f"{medians['alone']:.3f}",
            KV_is_here=f"{here:.3f}",
            **{way: f"{medians[way]:.3f}" if way in medians else "" for way in ("pull", "push")},
            **{f"{way}_costs": f"{costs[way]:.3f}" if way in costs else "" for way in ("pull", "push")},
            hidden=f"{1 - costs['push'] / costs['pull']:.0%}" if len(costs) == 2 else "",
            goal="80%" if tokens == max(TOKENS) else "",
        )


def test_first_token(benchmark, measuring, report, tmp_path):
    """Not slower than vLLM's NixlConnector, on a model with 128 KiB of KV per token."""
    if not measuring:
        pytest.skip("minutes long, and only of use with a clock: make benchvllm")
    from tools.serve.model import KV_HEAVY, make_model

    model = make_model(KV_HEAVY)
    numbers = random.Random(7)
    pairs: dict[str, _Pair] = {}
    moved, here = defaultdict(list), defaultdict(list)
    try:
        for connector in CONNECTORS:
            pairs[connector] = _Pair(connector, model, tmp_path)
            with pairs[connector] as pair:
                for tokens in (100, *TOKENS):
                    pair.warm_up([numbers.randrange(5, KV_HEAVY.vocabulary) for _ in range(tokens)])
        begin = time.monotonic()
        for tokens in TOKENS:
            for i in range(ROUNDS):
                prompt = [numbers.randrange(5, KV_HEAVY.vocabulary) for _ in range(tokens)]
                for connector in CONNECTORS if i % 2 == 0 else CONNECTORS[::-1]:
                    with pairs[connector] as pair:
                        transfer_s, local_s = pair.first_token_s(prompt)
                    moved[connector, tokens].append(transfer_s)
                    here[connector, tokens].append(local_s)
        benchmark.extra_info["measured_s"] = time.monotonic() - begin
        with pairs["KvxferConnector"] as pair:
            benchmark.pedantic(
                lambda: pair.first_token_s([numbers.randrange(5, KV_HEAVY.vocabulary) for _ in range(500)]), rounds=1
            )
    finally:
        for pair in pairs.values():
            for server in pair.servers:
                server.kill()
    for tokens in TOKENS:
        medians = {connector: statistics.median(moved[connector, tokens]) for connector in CONNECTORS}
        held = {connector: statistics.median(here[connector, tokens]) for connector in CONNECTORS}
        ours, theirs = (medians[connector] for connector in CONNECTORS)
        rounds = {connector: moved[connector, tokens] for connector in CONNECTORS}
        benchmark.extra_info[f"{tokens} tokens"] = {"first_token_s": rounds, "already_here_s": held}
        report(
            f"First token of a decode request, seconds; medians of {ROUNDS}, A B B A",
            tokens=f"{tokens:,}",
            KV=f"{tokens * KV_HEAVY.kv_nbytes_per_token / (1 << 20):.0f} MiB",
            kvxfer=f"{ours:.3f}",
            NixlConnector=f"{theirs:.3f}",
            kvxfer_takes=f"{ours / theirs:.0%}",
            best=" / ".join(f"{min(moved[connector, tokens]):.3f}" for connector in CONNECTORS),
            worst=" / ".join(f"{max(moved[connector, tokens]):.3f}" for connector in CONNECTORS),
            KV_is_here_kvxfer=f"{held['KvxferConnector']:.3f}",
            KV_is_here_NixlConnector=f"{held['NixlConnector']:.3f}",
        )

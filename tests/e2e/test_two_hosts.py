# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode servers on two simulated hosts: two network namespaces and a wire, which is slowed, cut and healed.

KV moves over TCP, from one real address to another; the side channel has the lab's secret. The HTTP of each server is reached from
its own host only, so clients run there, too.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.process.hosts import TwoHosts, enter, why_not

WAYS = ("pull", "push")
MAX_TOKENS = 8
PATIENCE = {"peer_timeout_seconds": 8, "read_timeout_seconds": 12}
DEADLINE_S = 45.0
"""Longest answer that waits for such a deadline, on a machine whose cores are all busy."""


class Pair:
    """A producer on one host, a consumer on the other, and threads on both."""

    def __init__(self, lab, wire) -> None:
        from tools.serve.pair import VllmServer, start_all

        self.lab, self.wire = lab, wire
        self.threads = [ThreadPoolExecutor(4, initializer=enter, initargs=(end.namespace,)) for end in wire.ends]
        self.servers = []
        for end, settings in zip(wire.ends, (lab.prefill.settings, lab.decode.settings), strict=True):
            network = {"KVXFER_SIDE_CHANNEL_HOST": end.address, "UCX_NET_DEVICES": end.device, "UCX_TLS": "tcp"}
            options = {**settings.connector_options, **(PATIENCE if settings is lab.decode.settings else {})}
            name = f"{settings.name}-far"
            made = replace(settings, name=name, connector_options=options, environment=network, num_blocks=400)
            self.servers.append(VllmServer(made, lab.folder))
        started = [
            there.submit(start_all, server, timeout_s=480)
            for there, server in zip(self.threads, self.servers, strict=True)
        ]
        for each in started:
            each.result()

    def at(self, number, act, *arguments, **options):
        """Call a function on one of the two hosts; returns a future."""
        return self.threads[number].submit(act, *arguments, **options)

    def send(self, way, prompt, timeout_s=DEADLINE_S):
        """Send a request as a router that reaches both hosts does; returns the decode server's answer."""
        producer, consumer = self.servers
        if way == "push":
            key = f"{way} {time.monotonic()}"
            prefilled = self.at(0, producer.prefill, prompt, transfer_id=key)
            params = producer.rendezvous_params(key) | {"remote_host": self.wire.ends[0].address}
        else:
            prefilled = self.at(0, producer.prefill, prompt)
            params = prefilled.result().kv_transfer_params
        asked = self.at(1, consumer.ask, prompt, max_tokens=MAX_TOKENS, kv_transfer_params=params, timeout_s=timeout_s)
        assert prefilled.result().ok
        return asked.result()

    def moved(self) -> float:
        """Number of transfers that the consumer has finished."""
        return self.at(1, self.servers[1].metric, "vllm:kvxfer_transfer_seconds_count").result()

    def works(self, num_tokens=300) -> bool:
        """Whether a new prompt is served in each way by a transfer; its tokens are right whenever it is served."""
        for way in WAYS:
            before, prompt = self.moved(), self.lab.prompt(num_tokens)
            answer = self.send(way, prompt)
            assert not answer.ok or answer.tokens == self.lab.expect(prompt, MAX_TOKENS)
            if not answer.ok or not self.lab.eventually(lambda before=before: self.moved() == before + 1):
                return False
        return True

    def assert_over(self) -> None:
        """Check that both servers run and have no block in use."""
        for number, server in enumerate(self.servers):
            assert server.alive
            assert self.at(number, server.wait_no_blocks_in_use, 60.0).result() == 0

    def end(self) -> None:
        """Kill both servers."""
        for server in self.servers:
            server.kill()
        for there in self.threads:
            there.shutdown()


@pytest.fixture(scope="module")
def far(started_lab):
    """The two servers; the lab's own are frozen meanwhile, except the reference."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    lab = started_lab
    lab.heal()
    own = [server for server in (lab.prefill, lab.decode, lab.recompute) if server.alive]
    for server in own:
        server.freeze()
    wire = TwoHosts()
    pair = None
    try:
        pair = Pair(lab, wire)
        yield pair
    finally:
        if pair is not None:
            pair.end()
        wire.close()
        for server in own:
            server.thaw()


def test_tokens_are_those_of_one_server(far):
    """Tokens are right from one host to the other, in each way, and the prefill server has written all of it."""
    # More than once only if the machine stands still for longer than the deadline: then a request fails by name.
    assert far.lab.eventually(far.works, 90) and far.lab.eventually(lambda: far.works(num_tokens=1500), 90)
    far.assert_over()
    by = {by: far.at(1, far.servers[1].metric, "vllm:kvxfer_sources_total", by=by).result() for by in ("read", "write")}
    assert by["write"] >= 4 and not by["read"]


def test_over_a_slow_wire(far):
    """With a wire of 20 Mbit/s requests are slow and right."""
    far.wire.slow(20)
    try:
        assert far.works(num_tokens=1500)
    finally:
        far.wire.heal()
    far.assert_over()


@pytest.mark.parametrize("how", ["cut", "unplug"])
def test_a_wire_that_breaks_and_is_healed(far, how):
    """Requests on a broken wire end in time; after it is healed the pair transfers again and has no block in use."""
    prompts = {way: far.lab.prompt(700) for way in WAYS}
    getattr(far.wire, how)()
    try:
        for way, prompt in prompts.items():
            answer = far.send(way, prompt)
            assert answer.tokens == far.lab.expect(prompt, MAX_TOKENS) if answer.ok else 500 <= answer.status < 600
            assert not answer.ok
    finally:
        far.wire.heal()
    assert far.lab.eventually(far.works, 90)
    far.assert_over()

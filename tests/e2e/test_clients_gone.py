# SPDX-License-Identifier: Apache-2.0
"""Clients that leave in the middle of their request, at any moment."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from urllib.parse import urlsplit

import pytest

WAYS = ("pull", "push")


@contextlib.contextmanager
def leaving(url: str, body: dict):
    """Send a request, and reset the connection at the end of the block."""
    parts = urlsplit(url)
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as client:
        client.sendall(head.encode() + payload)
        yield
        # A reset, as of a process that died, not a polite end.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")


def leave_after(url: str, body: dict, delay_s: float) -> None:
    """Send a request and leave after some seconds."""
    with leaving(url, body):
        time.sleep(delay_s)


def body_of(prompt, **extra) -> dict:
    """Body of a completion request."""
    return {"model": "kvxfer", "prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True, **extra}


def test_clients_that_leave_while_they_are_served(lab):
    """30 clients of each front that leave after 0 to 300 ms leave no block in use."""
    fronts = list(lab.fronts.values()) * 30
    bodies = [body_of(lab.prompt(600), stream=bool(i % 2)) for i in range(len(fronts))]
    lab.together(
        (lambda front=front, body=body, delay_s=0.01 * (i // 3): leave_after(front.url, body, delay_s))
        for i, (front, body) in enumerate(zip(fronts, bodies, strict=True))
    )
    # A client that left between the two requests is noticed only by the end of its lease.
    lab.assert_no_blocks_in_use(timeout_s=60)
    lab.assert_works()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("order", ["both", "prefill-first"])
def test_the_proxy_tells_both_servers(lab, order, stream):
    """A client that leaves the example's proxy ends its request on both servers at once."""
    lab.refresh_metrics(lab.decode)
    running = lambda: lab.decode.metric("vllm:num_requests_running")  # noqa: E731
    assert lab.eventually(lambda: running() == 0)
    # 4,000 tokens take 10 s, and once a busy server's metrics did not show them; then another client is sent.
    for _ in range(3):
        with leaving(lab.fronts[order].url, body_of(lab.prompt(64), max_tokens=4000, stream=stream)):
            seen = lab.eventually(lambda: running() > 0)
        if seen:
            break
    assert seen
    lab.assert_no_blocks_in_use(timeout_s=8)


@pytest.mark.parametrize("delay_s", [0.0, 0.005, 0.02, 0.05, 0.1, 0.3])
def test_a_client_that_leaves_decode(lab, way, delay_s):
    """A client that leaves the decode server before, during or after the read frees the blocks of both servers."""
    prompt = lab.prompt(2000)
    params, prefilled = lab.begin(way, prompt)
    leave_after(lab.decode.url, body_of(prompt, kv_transfer_params=params), delay_s)
    assert prefilled.result().ok
    lab.assert_no_blocks_in_use(timeout_s=60)
    lab.assert_works()


def test_a_client_that_leaves_decode_while_blocks_arrive(lab):
    """A client that leaves while prefill still computes frees the blocks of both servers."""
    prompt = lab.prompt(3400)
    params, prefilled = lab.begin("push", prompt)
    with lab.stopped_after(0.15), pytest.raises(TimeoutError):
        lab.decode.ask(prompt, kv_transfer_params=params, max_tokens=400, timeout_s=1)
    assert prefilled.result().ok
    lab.assert_no_blocks_in_use()
    lab.assert_works()


def test_a_client_that_sends_no_decode_request(lab):
    """Blocks of a prefill without a decode request are freed when the lease expires, and that is counted."""
    before = lab.prefill.metric("vllm:kvxfer_expired_leases_total")
    for way in WAYS:
        _, prefilled = lab.begin(way, lab.prompt(300))
        assert prefilled.result().ok
    assert lab.prefill.blocks_in_use() > 0
    lab.assert_no_blocks_in_use(lab.prefill, timeout_s=60)
    lab.refresh_metrics(lab.prefill)
    assert lab.prefill.metric("vllm:kvxfer_expired_leases_total") == before + len(WAYS)


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_a_prefill_that_never_arrives(lab, policy):
    """A decode request whose prefill request is lost waits for the rendezvous timeout, and ends as its policy says."""
    consumer, prompt = lab.consumer(policy), lab.prompt(200)
    params = lab.prefill.rendezvous_params(f"no prefill: {policy}")
    answer = consumer.ask(prompt, max_tokens=8, kv_transfer_params=params, timeout_s=lab.deadline_s)
    assert answer.status == 500 if policy == "fail" else answer.tokens == lab.expect(prompt, 8)
    lab.assert_no_blocks_in_use(lab.prefill, consumer)


def test_a_prefill_client_that_leaves(lab):
    """A client that leaves the prefill server during its prefill leaves no block in use there."""
    for i, delay_s in enumerate((0.0, 0.02, 0.1, 0.1)):
        wish = {"do_remote_decode": True, "do_remote_prefill": False} | ({"transfer_id": "left"} if i % 2 else {})
        body = body_of(lab.prompt(3000), kv_transfer_params=wish)
        with contextlib.suppress(OSError):
            leave_after(lab.prefill.url, body | {"max_tokens": 1}, delay_s)
    lab.assert_no_blocks_in_use(lab.prefill, timeout_s=60)
    lab.assert_works()


def test_a_prefill_client_that_leaves_its_decode_request(lab):
    """A prefill that is aborted half way ends its decode request at once, with an error."""
    prompt, key = lab.prompt(3400), "the prefill is aborted"
    params = lab.prefill.rendezvous_params(key)
    decoded = lab.threads.submit(lab.decode.ask, prompt, kv_transfer_params=params, max_tokens=4)
    # On a fast machine prefill has ended before its client leaves.
    with lab.stopped_after(0.15), contextlib.suppress(TimeoutError):
        lab.prefill.prefill(prompt, transfer_id=key, timeout_s=1)
    answer = decoded.result(lab.deadline_s)
    assert answer.status == 500 or answer.tokens == lab.expect(prompt, 4)
    lab.assert_no_blocks_in_use()
    lab.assert_works()

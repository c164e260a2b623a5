# SPDX-License-Identifier: Apache-2.0
"""Clients that go away in the middle of their request, at any moment."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from urllib.parse import urlsplit

import pytest


def leave_after(url: str, body: dict, delay_s: float) -> None:
    """Send a request and close the connection after a while, whatever came by then."""
    parts = urlsplit(url)
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as client:
        client.sendall(head.encode() + payload)
        time.sleep(delay_s)
        # A reset, as of a process that died, not a polite end.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")


def body_of(prompt, **extra) -> dict:
    """The body of a completion request."""
    return {"model": "kvxfer", "prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True, **extra}


def test_clients_that_leave_the_router(lab):
    """30 clients that leave after 0 to 300 ms, in prefill, between the servers or in decode, leave nothing behind."""
    bodies = [body_of(lab.prompt(600), stream=bool(i % 2)) for i in range(30)]
    lab.together(
        (lambda body=body, delay_s=0.01 * i: leave_after(lab.router.url, body, delay_s))
        for i, body in enumerate(bodies)
    )
    # Who left between the servers is found out by the lease alone: 30 s by default.
    lab.assert_no_blocks_in_use(timeout_s=60)
    lab.assert_works()


@pytest.mark.parametrize("delay_s", [0.0, 0.005, 0.02, 0.05, 0.1, 0.3])
def test_a_client_that_leaves_decode(lab, delay_s):
    """A client of the decode server that leaves before, during or after its read frees the blocks of both sides."""
    prompt = lab.prompt(2000)
    handed = lab.prefill.prefill(prompt)
    leave_after(lab.decode.url, body_of(prompt, kv_transfer_params=handed.kv_transfer_params), delay_s)
    lab.assert_no_blocks_in_use(timeout_s=60)
    lab.assert_works()


def test_a_client_that_never_goes_to_decode(lab):
    """Blocks of a prefill that nobody fetches are freed when the lease ends, and the end is counted."""
    before = lab.prefill.metric("vllm:kvxfer_expired_leases_total")
    assert lab.prefill.prefill(lab.prompt(300)).ok
    assert lab.prefill.blocks_in_use() > 0
    lab.assert_no_blocks_in_use(lab.prefill, timeout_s=60)
    lab.settle_metrics(lab.prefill)
    assert lab.prefill.metric("vllm:kvxfer_expired_leases_total") > before


def test_a_prefill_client_that_leaves(lab):
    """A client that leaves the prefill server during its prefill leaves no block in use there."""
    for delay_s in (0.0, 0.02, 0.1):
        wish = {"do_remote_decode": True, "do_remote_prefill": False}
        body = body_of(lab.prompt(3000), kv_transfer_params=wish)
        with contextlib.suppress(OSError):
            leave_after(lab.prefill.url, body | {"max_tokens": 1}, delay_s)
    lab.assert_no_blocks_in_use(lab.prefill, timeout_s=60)
    lab.assert_works()

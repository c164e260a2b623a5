# SPDX-License-Identifier: Apache-2.0
"""Requests of MooncakeConnector's routers, as in ``mooncake_requests.json``, with a source for each."""

from __future__ import annotations

import copy
import json
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
ROUTERS = ("vllm-router", "vllm-proxy", "llm-d")


@cache
def _recorded() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("mooncake_requests.json").read_text())


def requests_of(router: str, bootstrap: str, engine_id: str, key: str) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Bodies, without the prompt, of a router's requests to prefill and decode, and whether it sends both at once.

    Args:
        router: one of `ROUTERS`.
        bootstrap: URL that the router has asked.
        engine_id: that it was told.
        key: the ``transfer_id``.
    """
    recorded = copy.deepcopy(_recorded()[router])
    prefill, decode = recorded["prefill"], recorded["decode"]
    for body in (prefill, decode):
        body["kv_transfer_params"]["transfer_id"] = key
    decode["kv_transfer_params"] |= {"remote_bootstrap_addr": bootstrap, "remote_engine_id": engine_id}
    return prefill, decode, recorded["at_once"]


def query(port: int) -> dict[str, Any]:
    """The answer of a bootstrap server, as a router reads it; it comes when the process that answers has started."""
    with urllib.request.urlopen(f"http://{HOST}:{port}/query", timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
    return found

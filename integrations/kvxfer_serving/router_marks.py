# SPDX-License-Identifier: Apache-2.0
"""Marks of vllm-router in the id of a request: the two servers that it sends the request to."""

from __future__ import annotations

import re
from typing import Any

_PREFILL, _DECODE = "___prefill_addr_", "___decode_addr_"


def producer_named_in(request_id: str) -> dict[str, Any]:
    """NixlConnector's keys for the ``engine-id@host:port`` that vllm-router writes into a request's id; empty without it."""
    _, _, rest = request_id.partition(_PREFILL)
    place, marked, _ = rest.partition(_DECODE)
    producer, _, address = place.rpartition("@")
    host, _, port = address.rpartition(":")
    if not (marked and producer and host and re.fullmatch(r"[0-9]{1,5}", port)):
        return {}
    return {"remote_engine_id": producer, "remote_host": host, "remote_port": int(port)}

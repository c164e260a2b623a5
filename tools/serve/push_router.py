# SPDX-License-Identifier: Apache-2.0
"""vllm-router in front of one pair of servers, in its mode that sends a request to both at once."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tools.serve.client import Answer, Prompt, ask, get
from tools.serve.process import ServerProcess, free_port

if TYPE_CHECKING:
    from pathlib import Path

    from tools.serve.pair import VllmServer

__all__ = ["PushRouter", "Registrar"]

_HOST = "127.0.0.1"


class PushRouter(ServerProcess):
    """vllm-router, configured for servers that register with it, as those with MoRIIOConnector do."""

    def __init__(self, folder: Path) -> None:
        self.port, self.discovery_port = free_port(), free_port()
        self.url = f"http://{_HOST}:{self.port}"
        command = [
            *(sys.executable, "-m", "vllm_router.launch_router", "--host", _HOST, "--port", str(self.port)),
            *("--vllm-pd-disaggregation", "--kv-connector", "moriio"),
            *("--vllm-discovery-address", f"{_HOST}:{self.discovery_port}"),
            *("--policy", "round_robin", "--prometheus-port", str(free_port())),
        ]
        super().__init__(
            "push-router",
            command,
            log=folder / "push-router.log",
            healthy=lambda: get(self.url, "/health", timeout_s=2.0)[0] == 200,
        )

    def ask(self, prompt: Prompt, **options: Any) -> Answer:
        """:func:`tools.serve.client.ask` through the router."""
        return ask(self.url, prompt, **options)


class Registrar(ServerProcess):
    """``python -m kvxfer_vllm.router_registration`` for one pair; healthy when the router has logged both servers."""

    def __init__(self, router: PushRouter, prefill: VllmServer, decode: VllmServer, folder: Path) -> None:
        place = f"{prefill.settings.name}@{_HOST}:{prefill.side_channel_port}"
        command = [
            *(sys.executable, "-m", "kvxfer_vllm.router_registration", "--router", f"{_HOST}:{router.discovery_port}"),
            *("--prefill", prefill.url, place, "--decode", decode.url),
        ]
        super().__init__(
            "registrar",
            command,
            log=folder / "registrar.log",
            healthy=lambda: all(f"Add {kind}" in router.log_text() for kind in ("Prefill", "Decode")),
        )

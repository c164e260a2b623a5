# SPDX-License-Identifier: Apache-2.0
"""A pair of vLLM servers on Mooncake's engine, with KvxferConnector or with vLLM's own MooncakeConnector, both with their defaults."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

from tools.serve.client import PREFILL_PARAMS, get
from tools.serve.pair import ServerSettings, VllmServer, start_all
from tools.serve.process import free_port

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["PAIRS", "KvxferPair", "MooncakePair"]

_START_S = 480.0


class KvxferPair:
    """The pair with KvxferConnector. Parameters are those of a router that sends a request to both servers with one id."""

    name = "KvxferConnector"
    required_key = "remote_host"
    options: dict[str, Any] = {"agent": "mooncake"}  # noqa: RUF012 - read only
    transfer_config: dict[str, Any] = {}  # noqa: RUF012 - read only

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder = model, folder
        self.prefill = self._server("prefill", "kv_producer")
        self.decode = self._server("decode", "kv_consumer")

    def _server(self, name: str, role: str, **environment: str) -> VllmServer:
        settings = ServerSettings(
            name=f"{self.name.removesuffix('Connector').lower()}-{name}",
            model=self._model,
            role=role,
            num_blocks=600,
            connector=self.name,
            connector_options=self.options,
            transfer_config=self.transfer_config,
            environment=environment,
        )
        return VllmServer(settings, self._folder)

    def start(self) -> None:
        """Start the servers that do not run."""
        start_all(*[server for server in (self.prefill, self.decode) if not server.alive], timeout_s=_START_S)

    def restart_router(self) -> None:
        """Ask the servers what a router asks them when it starts."""

    def failed(self) -> dict[str, float]:
        """Transfers that failed so far, by the name of their error, as far as the connector counts them."""
        try:
            samples = self.decode.metrics()
        except OSError:  # it is gone
            return {}
        return {
            each.labels["reason"]: each.value for each in samples if each.name == "vllm:kvxfer_failed_transfers_total"
        }

    def stop(self) -> None:
        """Kill both."""
        for server in (self.decode, self.prefill):
            server.kill()

    def new_id(self) -> str:
        """An id for the two requests of one prompt."""
        return f"xfer-{uuid.uuid4()}"

    def prefill_params(self, transfer_id: str) -> dict[str, Any]:
        """Parameters of a request to the prefill server."""
        return {**PREFILL_PARAMS, "transfer_id": transfer_id}

    def decode_params(self, transfer_id: str) -> dict[str, Any]:
        """Parameters of a request to the decode server."""
        return self.prefill.rendezvous_params(transfer_id)


class MooncakePair(KvxferPair):
    """The pair with MooncakeConnector; routers ask the prefill server for its engine id once, when they start."""

    name = "MooncakeConnector"
    required_key = "remote_bootstrap_addr"
    options = {"mooncake_protocol": "tcp"}  # noqa: RUF012 - read only
    transfer_config = {  # noqa: RUF012 - read only
        "kv_connector_module_path": "tests.failures.mooncake_on_cpu",
        "kv_buffer_device": "cpu",
    }

    def _server(self, name: str, role: str, **environment: str) -> VllmServer:
        if role == "kv_producer":
            self._bootstrap_port = free_port()
        port = str(self._bootstrap_port)
        here = {"VLLM_HOST_IP": "127.0.0.1", "VLLM_MOONCAKE_BOOTSTRAP_PORT": port, "MC_FORCE_TCP": "1"}
        return super()._server(name, role, **here, **environment)

    def restart_router(self) -> None:
        self._engine_id = json.loads(get(self._bootstrap, "/query")[1])["0"]["engine_id"]

    @property
    def _bootstrap(self) -> str:
        return f"http://127.0.0.1:{self._bootstrap_port}"

    def prefill_params(self, transfer_id: str) -> dict[str, Any]:
        return {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}

    def decode_params(self, transfer_id: str) -> dict[str, Any]:
        return {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "transfer_id": transfer_id,
            "remote_bootstrap_addr": self._bootstrap,
            "remote_engine_id": self._engine_id,
        }


PAIRS = (KvxferPair, MooncakePair)

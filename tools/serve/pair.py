# SPDX-License-Identifier: Apache-2.0
"""Real vLLM servers and vllm-router on this machine: a prefill server, a decode server and a router or proxy.

A server is a plain description (:class:`ServerSettings`) and a process (:class:`VllmServer`, :class:`PullRouter`);
:class:`ServerPair` is the usual three. Ports are free ones; logs are files in the given folder.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tools.serve.client import PREFILL_PARAMS, Answer, MetricSample, Prompt, ask, get, post, read_metrics
from tools.serve.process import ServerProcess, ServerStartError, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["MODEL_NAME", "SERVER_ENVIRONMENT", "PullRouter", "ServerPair", "ServerSettings", "VllmServer", "start_all"]

#: The name under which every server serves its model.
MODEL_NAME = "kvxfer"

EngineName = Literal["vllm", "transformers"]

_HOST = "127.0.0.1"
_MODULES = {"vllm": "vllm.entrypoints.openai.api_server", "transformers": "kvxfer_transformers.serve"}

#: Settings of vLLM for a machine without a GPU, and for several servers on few cores.
SERVER_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Adds POST /reset_prefix_cache, so that a test can say what a server holds.
    "VLLM_SERVER_DEV_MODE": "1",
    # Without this UCX listens on every interface. KV between processes of one host moves through shared memory (CMA) in any
    # case; this keeps UCX's sockets off the network.
    "UCX_NET_DEVICES": "lo",
}


@dataclass(frozen=True)
class ServerSettings:
    """Settings of one server, of vLLM or, with the ``engine`` ``"transformers"``, of `kvxfer_transformers.serve`.

    ``role`` is ``kv_producer``, ``kv_consumer``, ``kv_both`` or None for a server without a connector.
    ``connector_options`` go under ``kv_connector_extra_config``, ``transfer_config`` beside it.
    ``num_blocks`` is the number of KV blocks (vLLM's choice if None). ``arguments`` are appended to the command line.
    """

    name: str
    model: Path
    role: str | None = None
    connector: str = "KvxferConnector"
    connector_options: Mapping[str, Any] = field(default_factory=dict)
    transfer_config: Mapping[str, Any] = field(default_factory=dict)
    load_failure_policy: str = "fail"
    num_blocks: int | None = None
    block_tokens: int = 32
    max_model_tokens: int = 4096
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    engine: EngineName = "vllm"

    def model_dtype(self) -> str:
        """Dtype in which the model was saved; ``auto`` if the model does not say.

        By default vLLM serves a float32 model in bfloat16, in which tokens depend on how requests were batched; then equal
        tokens would prove nothing.
        """
        config = json.loads((self.model / "config.json").read_text(encoding="utf-8"))
        return str(config.get("dtype") or config.get("torch_dtype") or "auto")

    def kv_transfer_config(self) -> dict[str, Any] | None:
        """Value of ``--kv-transfer-config``; None without a connector."""
        if self.role is None:
            return None
        config: dict[str, Any] = {
            "kv_connector": self.connector,
            "kv_role": self.role,
            "kv_load_failure_policy": self.load_failure_policy,
            "engine_id": self.name,
            **self.transfer_config,
        }
        if self.connector.startswith("Nixl"):
            # vLLM's own connector assumes a GPU otherwise.
            config.setdefault("kv_buffer_device", "cpu")
        if self.connector_options:
            config["kv_connector_extra_config"] = dict(self.connector_options)
        return config


class VllmServer(ServerProcess):
    """One API server of vLLM, or one like it, with its engine, with its HTTP ``url`` and ``side_channel_port``."""

    def __init__(
        self,
        settings: ServerSettings,
        folder: Path,
        *,
        port: int | None = None,
        side_channel_port: int | None = None,
    ) -> None:
        self.settings = settings
        self.port = free_port() if port is None else port
        self.side_channel_port = free_port() if side_channel_port is None else side_channel_port
        self.url = f"http://{_HOST}:{self.port}"
        command = [
            # The `vllm` command needs metadata of a distribution named vllm, which vllm-cpu is not.
            *(sys.executable, "-m", _MODULES[settings.engine]),
            *("--host", _HOST, "--port", str(self.port)),
            *("--model", str(settings.model), "--served-model-name", MODEL_NAME, "--dtype", settings.model_dtype()),
            *("--block-size", str(settings.block_tokens), "--max-model-len", str(settings.max_model_tokens)),
            # Access logs would fill the tail of the log.
            *("--enforce-eager", "--disable-uvicorn-access-log"),
        ]
        if settings.num_blocks is not None:
            command += ["--num-gpu-blocks-override", str(settings.num_blocks)]
        transfer = settings.kv_transfer_config()
        if transfer is not None:
            command += ["--kv-transfer-config", json.dumps(transfer)]
        environment = {
            **SERVER_ENVIRONMENT,
            "KVXFER_SIDE_CHANNEL_HOST": _HOST,
            "KVXFER_SIDE_CHANNEL_PORT": str(self.side_channel_port),
            "VLLM_NIXL_SIDE_CHANNEL_HOST": _HOST,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(self.side_channel_port),
            **settings.environment,
        }
        super().__init__(
            settings.name,
            [*command, *settings.arguments],
            log=folder / f"{settings.name}.log",
            healthy=lambda: get(self.url, "/health", timeout_s=2.0)[0] == 200,
            environment=environment,
        )

    def ask(self, prompt: Prompt, **options: Any) -> Answer:
        """:func:`tools.serve.client.ask` this server directly."""
        return ask(self.url, prompt, **options)

    def prefill(self, prompt: Prompt, *, transfer_id: str | None = None, **options: Any) -> Answer:
        """Ask as vllm-router asks a prefill server: for one token, and parameters for the decode request."""
        params: dict[str, Any] = dict(PREFILL_PARAMS)
        if transfer_id is not None:
            params["transfer_id"] = transfer_id
        return ask(self.url, prompt, **{"max_tokens": 1, "kv_transfer_params": params, **options})

    def rendezvous_params(self, transfer_id: str) -> dict[str, Any]:
        """``kv_transfer_params`` of a decode request that a proxy sends together with the prefill request to this server.

        NixlPushConnector needs the sizes and ``remote_request_id``: its engine ends without them (vLLM 0.32).
        """
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.settings.name,
            "remote_host": _HOST,
            "remote_port": self.side_channel_port,
            "tp_size": 1,
            "pp_size": 1,
            "remote_request_id": transfer_id,
            "transfer_id": transfer_id,
        }

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache, so that the next prompt is computed or transferred completely."""
        post(self.url, "/reset_prefix_cache")

    def metrics(self) -> list[MetricSample]:
        """Samples of ``/metrics``.

        Raises:
            OSError: the server does not answer.
        """
        return read_metrics(self.url)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that have these labels; 0.0 if there is none."""
        return sum(
            sample.value
            for sample in self.metrics()
            if sample.name == name and all(sample.labels.get(key) == value for key, value in labels.items())
        )

    def blocks_in_use(self) -> float:
        """Number of KV blocks that requests use now; cached prefixes that no request uses do not count."""
        samples = self.metrics()
        share = sum(sample.value for sample in samples if sample.name == "vllm:kv_cache_usage_perc")
        blocks = [
            float(sample.labels["num_gpu_blocks"])
            for sample in samples
            if sample.name == "vllm:cache_config_info" and "num_gpu_blocks" in sample.labels
        ]
        return share * (blocks[0] if blocks else 1.0)

    def wait_no_blocks_in_use(self, timeout_s: float = 60.0) -> float:
        """Wait until no request uses a block; returns the number of blocks in use at the deadline, 0.0 if none."""
        deadline = time.monotonic() + timeout_s
        while (used := self.blocks_in_use()) > 0 and time.monotonic() < deadline:
            time.sleep(0.1)
        return used


class PushProxy(ServerProcess):
    """``examples/push_proxy.py`` of a source tree, in front of one prefill and one decode server."""

    def __init__(
        self, script: Path, prefill: VllmServer, decode: VllmServer, folder: Path, *, order: str = "both"
    ) -> None:
        self.port = free_port()
        self.url = f"http://{_HOST}:{self.port}"
        command = [
            *(sys.executable, str(script), "--host", _HOST, "--port", str(self.port), "--order", order),
            *("--prefill", prefill.url, "--decode", decode.url, "--engine-id", prefill.settings.name),
            *("--side-channel", f"{_HOST}:{prefill.side_channel_port}"),
        ]
        super().__init__(
            f"proxy-{order}",
            command,
            log=folder / f"proxy-{order}.log",
            healthy=lambda: get(self.url, "/health", timeout_s=2.0)[0] == 200,
        )

    def ask(self, prompt: Prompt, **options: Any) -> Answer:
        """:func:`tools.serve.client.ask` through the proxy."""
        return ask(self.url, prompt, **options)


class PullRouter(ServerProcess):
    """vllm-router in front of one prefill and one decode server, configured for NixlConnector.

    With a ``bootstrap_port`` of the prefill server it is configured for MooncakeConnector.
    """

    def __init__(
        self,
        prefill: VllmServer,
        decode: VllmServer,
        folder: Path,
        *,
        port: int | None = None,
        bootstrap_port: int | None = None,
    ) -> None:
        self.port = free_port() if port is None else port
        self.url = f"http://{_HOST}:{self.port}"
        connector, name, asked = "nixl", "router", []
        if bootstrap_port is not None:
            connector, name, asked = "mooncake", "mooncake-router", [str(bootstrap_port)]
        command = [
            *(sys.executable, "-m", "vllm_router.launch_router", "--host", _HOST, "--port", str(self.port)),
            *("--vllm-pd-disaggregation", "--prefill", prefill.url, *asked, "--decode", decode.url),
            *("--kv-connector", connector, "--policy", "round_robin", "--prometheus-port", str(free_port())),
        ]
        super().__init__(
            name,
            command,
            log=folder / f"{name}.log",
            healthy=lambda: get(self.url, "/health", timeout_s=2.0)[0] == 200,
        )

    def ask(self, prompt: Prompt, **options: Any) -> Answer:
        """:func:`tools.serve.client.ask` through the router."""
        return ask(self.url, prompt, **options)


def start_all(
    *servers: ServerProcess,
    timeout_s: float = 300.0,
    on_wait: Callable[[ServerProcess, float], None] | None = None,
) -> None:
    """Start servers side by side and wait until all are healthy; if one fails, all of them are killed.

    ``on_wait(server, seconds)`` is called several times a second with the server that is waited for.

    Raises:
        ServerStartError: one died or was not healthy in time.
    """
    begin = time.monotonic()
    try:
        for server in servers:
            server.start()
        for server in servers:
            report = None
            if on_wait is not None:
                # Bound now: the loop's variables will have moved on when it is called.
                report = _reporter(on_wait, server, begin)
            server.wait_ready(timeout_s, report)
    except BaseException:
        for server in servers:
            server.kill()
        raise


def _reporter(
    on_wait: Callable[[ServerProcess, float], None], server: ServerProcess, begin: float
) -> Callable[[float], None]:
    return lambda _: on_wait(server, time.monotonic() - begin)


class ServerPair:
    """A prefill server, a decode server and vllm-router in front of them; a context manager that ends all three.

    ``producer`` and ``consumer`` describe the two servers; :meth:`of` makes the usual ones. The router starts when both are
    healthy, because it checks them only every 30 s.
    """

    def __init__(
        self, producer: ServerSettings, consumer: ServerSettings, folder: Path, *, router_port: int | None = None
    ) -> None:
        self.prefill = VllmServer(producer, folder)
        self.decode = VllmServer(consumer, folder)
        self.router = PullRouter(self.prefill, self.decode, folder, port=router_port)

    @classmethod
    def of(
        cls,
        model: Path,
        folder: Path,
        *,
        router_port: int | None = None,
        engines: tuple[EngineName, EngineName] = ("vllm", "vllm"),
        **common: Any,
    ) -> ServerPair:
        """Make the usual pair for a model, of these engines for prefill and decode.

        ``common`` are settings of both servers (see :class:`ServerSettings`).
        """
        prefill, decode = engines
        return cls(
            ServerSettings(name="prefill", model=model, role="kv_producer", engine=prefill, **common),
            ServerSettings(name="decode", model=model, role="kv_consumer", engine=decode, **common),
            folder,
            router_port=router_port,
        )

    @property
    def url(self) -> str:
        """URL of the router, for clients."""
        return self.router.url

    @property
    def servers(self) -> tuple[ServerProcess, ...]:
        """All three, in the order in which to stop them: clients before their servers."""
        return (self.router, self.decode, self.prefill)

    def start(self, timeout_s: float = 300.0, on_wait: Callable[[ServerProcess, float], None] | None = None) -> None:
        """Start all three and wait until the router is ready.

        Raises:
            ServerStartError: one of them failed; none is left running.
        """
        try:
            start_all(self.prefill, self.decode, timeout_s=timeout_s, on_wait=on_wait)
            start_all(self.router, timeout_s=timeout_s, on_wait=on_wait)
        except BaseException:
            self.kill()
            raise

    def ask(self, prompt: Prompt, **options: Any) -> Answer:
        """:func:`tools.serve.client.ask` through the router."""
        return self.router.ask(prompt, **options)

    def stop(self, timeout_s: float = 15.0) -> None:
        """Stop all three; afterwards none of their processes is left."""
        for server in self.servers:
            with contextlib.suppress(ServerStartError, OSError):
                server.thaw()
                server.terminate()
        for server in self.servers:
            server.stop(timeout_s)

    def kill(self) -> None:
        """Kill all three at once."""
        for server in self.servers:
            server.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

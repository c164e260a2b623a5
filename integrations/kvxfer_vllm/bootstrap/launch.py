# SPDX-License-Identifier: Apache-2.0
"""The prefill server's part of ``GET /query``: one engine of a data parallel group starts the server, the others register.

As with MooncakeConnector there is one port for a prefill server: that of the first engine of the group, or, where each node has a
front end of its own (hybrid and external load balancing), of the first engine of the node.
"""

from __future__ import annotations

import errno
import logging
import socket
import subprocess
import sys
import threading
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Protocol

import msgspec

from kvxfer import addresses
from kvxfer.errors import ConfigError
from kvxfer.secret import Secret
from kvxfer_vllm.bootstrap.answer import BootstrapEntry, EngineRegistration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.config import VllmConfig

    from kvxfer_serving.options import ConnectorOptions

logger = logging.getLogger(f"vllm.{__name__}")

_RESTART_S = 1.0
_REGISTER_EVERY_S = 5.0
_FIRST_TRIES_S = 0.5
_ANSWER_S = 3.0


class Published(Protocol):
    """An engine's entry that is known to routers and decode servers until it is closed."""

    def close(self) -> None:
        """End it; may be called again."""


def publish_engine(
    vllm_config: VllmConfig, options: ConnectorOptions, host: str, side_channels: Sequence[str]
) -> Published | None:
    """Make an engine known under ``options.bootstrap_port``; None if that is not set, or if the engine does not prefill.

    Args:
        vllm_config: of this engine.
        options: of the connector.
        host: of the side channel. ``/query`` has the same one.
        side_channels: of the ranks, or of rank 0 alone.

    Raises:
        ConfigError: another process has the port, or this machine has no such address.
    """
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    port = options.bootstrap_port
    if port is None or not transfer.is_kv_producer:
        return None
    entry = BootstrapEntry.of(transfer.engine_id, side_channels, parallel.tensor_parallel_size)
    alone = parallel.local_engines_only
    rank = (parallel.data_parallel_rank_local or 0) if alone else parallel.data_parallel_index
    registration = EngineRegistration(rank, entry)
    if rank == 0:
        return BootstrapServer(host, port, registration, secret_file=options.secret_file)
    first = addresses.advertised_host(host)
    if not alone and not _is_here(parallel.data_parallel_master_ip):
        first = parallel.data_parallel_master_ip
    return BootstrapRegistrar(first, port, registration, Secret.resolve(file=options.secret_file))


class BootstrapServer:
    """The process that answers ``GET /query``, started again if it ends.

    Args:
        host: to listen on, see `kvxfer.addresses.ANY`.
        port: to listen on.
        own: entry of this engine.
        secret_file: as of `kvxfer.Secret.resolve`, by which other engines' entries are believed.

    Raises:
        ConfigError: the port is taken, or the host is none of this machine.
    """

    def __init__(self, host: str, port: int, own: EngineRegistration, *, secret_file: str | None = None) -> None:
        self._listener = _listen(host, port)
        self._start = {"fd": self._listener.fileno(), "own": own, "secret_file": secret_file}
        self._closed = threading.Event()
        self._child = self._new_child()
        logger.info("kvxfer: engine %s answers GET /query at %s port %d", own.entry.engine_id, host, port)
        self._watcher = threading.Thread(target=self._watch, name="kvxfer-bootstrap", daemon=True)
        self._watcher.start()

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._child.pid

    def close(self) -> None:
        """End the process and free the port."""
        self._closed.set()
        self._child.kill()
        self._watcher.join()
        self._listener.close()

    def _new_child(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [sys.executable, "-m", "kvxfer_vllm.bootstrap.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[self._listener.fileno()],
        )
        if child.stdin is not None:
            child.stdin.write(msgspec.json.encode(self._start) + b"\n")
            child.stdin.flush()
        return child

    def _watch(self) -> None:
        while True:
            code = self._child.wait()
            if self._child.stdin is not None:
                self._child.stdin.close()
            if self._closed.wait(_RESTART_S):
                return
            logger.warning("The process that answers GET /query has ended with %d and is started again", code)
            self._child = self._new_child()


class BootstrapRegistrar:
    """A thread that registers an engine with the server of its data parallel group, again and again: that may start later.

    Args:
        host: of the server.
        port: of the server.
        own: entry of this engine.
        secret: signs the registration.
    """

    def __init__(self, host: str, port: int, own: EngineRegistration, secret: Secret | None) -> None:
        self._place = (host, port)
        self._own = own
        self._secret = secret
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvxfer-register", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        told = None
        while True:
            refused = self._register()
            if refused and refused != told and told is not None:
                logger.warning(
                    "Engine %s cannot register at %s:%d: %s", self._own.entry.engine_id, *self._place, refused
                )
            told = refused
            if self._closed.wait(_FIRST_TRIES_S if refused else _REGISTER_EVERY_S):
                return

    def _register(self) -> str:
        """Register once; returns why it failed."""
        from kvxfer_vllm.bootstrap.server import SIGNATURE, signature  # noqa: PLC0415 - imports an HTTP server

        body = msgspec.json.encode(self._own)
        connection = HTTPConnection(*self._place, timeout=_ANSWER_S)
        try:
            connection.request("POST", "/register", body, {SIGNATURE: signature(self._secret, body)})
            answer = connection.getresponse()
            return "" if answer.status == 200 else answer.read(1000).decode(errors="replace").strip()
        except (OSError, HTTPException) as error:
            return str(error) or type(error).__name__
        finally:
            connection.close()


def _listen(host: str, port: int) -> socket.socket:
    ip = "0.0.0.0" if host == addresses.ANY else (addresses.known_ips(host) or [host])[0]  # noqa: S104 - as asked for
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        return socket.create_server((ip, port), family=family, backlog=64)
    except OSError as error:
        what = "another process has it" if error.errno == errno.EADDRINUSE else str(error)
        raise ConfigError(
            f"cannot answer GET /query at {host} port {port}: {what}; set bootstrap_port in kv_connector_extra_config "
            "(VLLM_MOONCAKE_BOOTSTRAP_PORT for MooncakeConnector) to a free port"
        ) from error


def _is_here(host: str) -> bool:
    ips = addresses.known_ips(host) or []
    return any(addresses.is_loopback(ip) for ip in ips)

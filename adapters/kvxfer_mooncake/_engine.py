# SPDX-License-Identifier: Apache-2.0
"""One engine of Mooncake: its start, its ports, its end; and the engine that makes first contacts for all agents of the process."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvxfer.agents.ports import Port, open_ports
from kvxfer.errors import ConfigError, UnavailableError
from kvxfer_mooncake._sockets import confine_to_loopback, prepare_end

if TYPE_CHECKING:
    from kvxfer_mooncake._module import MooncakeModule

_OWN_RANGE = (15_000, 17_000)
_start_lock = threading.Lock()
_contact_lock = threading.Lock()
_contact_engines: list[MooncakeEngine] = []


class MooncakeEngine:
    """One `mooncake.engine.TransferEngine`, started.

    Args:
        module: where it comes from.
        host: by which peers reach it.
        loopback_only: other machines must not reach its ports.

    Attributes:
        native: the only reference to it, None after `close`. No thread may hold a method of it: the engine ends with the last
            reference, and only its end stops its transfers.
        session: by which peers address it.
        ports: on which it listens.
        loopback_only: other machines cannot reach them.

    Raises:
        ConfigError: its ports are not those that were asked for.
        UnavailableError: it does not start.
    """

    def __init__(self, module: MooncakeModule, host: str, *, loopback_only: bool) -> None:
        with _start_lock:  # so that the ports that appear are its own
            before = open_ports()
            self.native: Any = module.engine.TransferEngine()
            status = self.native.initialize(host, "P2PHANDSHAKE", "tcp", "")
            if status != 0:
                self.native = None
                raise UnavailableError(
                    f"Mooncake's transfer engine does not start (status {status}): no port of its range is free, or it cannot use "
                    "the RDMA devices of this machine; MC_LOG_LEVEL=INFO tells more"
                )
            self.rpc_port: int = self.native.get_rpc_port()
            low, high = _range_of(module, self.rpc_port)
            # Other threads may open ports meanwhile; those are elsewhere.
            numbers = {port.number for port in open_ports() - before if low <= port.number <= high}
        self.loopback_only: bool = loopback_only and bool(numbers) and confine_to_loopback(numbers)
        self.ports: tuple[Port, ...] = tuple(sorted(port for port in open_ports() if port.number in numbers))
        self.session: str = f"[{host.strip('[]')}]:{self.rpc_port}" if ":" in host else f"{host}:{self.rpc_port}"
        if module.port_range is not None and (low, high) != module.port_range:
            self.close()
            raise ConfigError(f"Mooncake listens on {self.rpc_port}, outside port_range={module.port_range}")

    def close(self) -> None:
        """End the engine: its thread and its sockets. Afterwards none of its transfers writes anything."""
        if self.native is not None:
            prepare_end(self.rpc_port, {port.number for port in self.ports})
            self.native = None


def engine_for_contacts(module: MooncakeModule) -> MooncakeEngine:
    """The engine that asks new peers whether they answer. It lives as long as the process, and has no memory.

    The first contact of an engine with a peer holds a lock of the whole engine until the peer answers, up to 60 s. So another
    engine asks first.
    """
    with _contact_lock:
        if not _contact_engines:
            _contact_engines.append(MooncakeEngine(module, "127.0.0.1", loopback_only=True))
        return _contact_engines[0]


def _range_of(module: MooncakeModule, port: int) -> tuple[int, int]:
    """The range from which Mooncake took a port: what was asked for, or its own; all ports if it is from elsewhere."""
    for low, high in (module.port_range or _OWN_RANGE, _OWN_RANGE):
        if low <= port <= high:
            return low, high
    return 1, 65_535


def moves_by_tcp() -> bool:
    """Whether Mooncake chooses TCP here. It cannot be asked: it takes RDMA where the kernel knows an RDMA device."""
    if os.environ.get("MC_FORCE_TCP"):
        return True
    devices = Path("/sys/class/infiniband")
    return not (os.environ.get("MC_FORCE_HCA") or (devices.is_dir() and any(devices.iterdir())))

# SPDX-License-Identifier: Apache-2.0
"""The options of `MooncakeAgent`, and the settings of Mooncake's own environment with which it cannot be used."""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta

from kvxfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

ALLOWED: Final = {
    "host": "the address by which peers reach this machine, without a port",
    "window": "an integer from 1 to 512",
    "piece_nbytes": "an integer from 65536 to 1073741824",
    "max_submit_nbytes": "an integer from 65536 to 1099511627776, or null",
    "loopback_only": "true or false",
    "port_range": 'a first and a last of at least eight ports, within 1024-32767 or 61000-65535, such as "20000-20099"',
}
_PORTS: Final = ((1_024, 32_767), (61_000, 65_535))
"""Mooncake ignores a range that touches the others, those that Linux gives to outgoing connections."""
_FEWEST_PORTS: Final = 8
"""An agent listens on two ports, the engine for first contacts on two more, and a new agent on two while the old one ends."""


class MooncakeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of `MooncakeAgent`, which may come from a user's JSON."""

    host: Annotated[str, Meta(pattern=r"^[^\s/]+$")] | None
    window: Annotated[int, Meta(ge=1, le=512)]
    piece_nbytes: Annotated[int, Meta(ge=1 << 16, le=1 << 30)]
    max_submit_nbytes: Annotated[int, Meta(ge=1 << 16, le=1 << 40)] | None
    loopback_only: bool
    port_range: Annotated[str, Meta(pattern=r"^[0-9]{1,5}-[0-9]{1,5}$")] | None

    @classmethod
    def of(cls, given: Mapping[str, object]) -> MooncakeOptions:
        """Convert and check the arguments.

        Raises:
            ConfigError: an argument is unknown, of a wrong type or out of range, or the environment has a setting with which
                Mooncake cannot be used.
        """
        unknown = sorted(given.keys() - set(cls.__struct_fields__))
        if unknown:
            known = ", ".join(cls.__struct_fields__)
            raise ConfigError(f"unknown option of the mooncake agent: {', '.join(unknown)}; known are {known}")
        try:
            options = msgspec.convert(given, cls)
        except msgspec.ValidationError as error:
            name = str(error).rpartition("`$.")[2].partition("`")[0]
            raise _refused(name, given[name]) from error
        ports = options.ports
        if ports is not None and not (
            ports[1] - ports[0] >= _FEWEST_PORTS - 1
            and any(low <= ports[0] and ports[1] <= high for low, high in _PORTS)
        ):
            raise _refused("port_range", options.port_range)
        options.check_environment()
        return options

    @property
    def ports(self) -> tuple[int, int] | None:
        """``port_range`` as numbers."""
        if self.port_range is None:
            return None
        first, last = (int(port) for port in self.port_range.split("-"))
        return first, last

    def reach(self) -> tuple[str, bool]:
        """The address by which peers reach the agent, and whether other machines are to reach it not at all.

        Raises:
            ConfigError: ``host`` is not given, and this machine has no route to others.
        """
        if self.host is not None:
            return self.host, self.loopback_only and _is_loopback(self.host)
        if self.loopback_only:
            return "127.0.0.1", True
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # sends nothing: the kernel chooses an address
            except OSError as error:
                raise ConfigError(
                    "host: this machine has no route to others; give the address by which peers reach it"
                ) from error
            host: str = probe.getsockname()[0]
            return host, False

    def check_environment(self) -> None:
        """Refuse settings of Mooncake under which what this adapter declares is not true.

        Raises:
            ConfigError: names the variable.
        """
        for name, values, why in REFUSED:
            value = os.environ.get(name, "").strip()
            if value.lower() in values or (values == ANY and value):
                raise ConfigError(f"{name}={value}: {why}; unset it")
        queued = os.environ.get("MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER", "").strip()
        if queued.isdigit() and int(queued) < self.window:
            raise ConfigError(
                f"MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER={queued} is less than window={self.window}, and a queue that overflows "
                "blocks the peer for ever; give a smaller window"
            )
        given = os.environ.get("MC_MIN_RPC_PORT"), os.environ.get("MC_MAX_RPC_PORT")
        if self.ports is not None and any(given) and given != tuple(str(port) for port in self.ports):
            raise ConfigError(
                f"port_range={self.port_range} contradicts MC_MIN_RPC_PORT={given[0]} and MC_MAX_RPC_PORT={given[1]} in the "
                "environment: give one of them"
            )


ANY: Final = frozenset({"any"})
REFUSED: Final = (
    (
        "MC_TCP_PROTO",
        frozenset({"1", "v1"}),
        "Mooncake's first TCP protocol reports a WRITE as done before it is applied",
    ),
    ("MC_TCP_ENABLE_CONNECTION_POOL", frozenset({"0", "false"}), "each descriptor would open a connection of its own"),
    ("MC_SLICE_TIMEOUT", ANY, "Mooncake would report an end while it may still write"),
    ("MC_USE_TENT", ANY, "this adapter was proven with Mooncake's classic engine only"),
    ("MC_USE_TEV1", ANY, "this adapter was proven with Mooncake's classic engine only"),
)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _refused(name: str, value: object) -> ConfigError:
    return ConfigError(f"{name}={value!r:.200} must be {ALLOWED[name]}")

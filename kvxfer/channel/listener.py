# SPDX-License-Identifier: Apache-2.0
"""Listening socket of a control channel: bound to each address of its host that this machine has, at one port."""

from __future__ import annotations

import errno
import logging

import zmq

from kvxfer import addresses
from kvxfer.errors import ConfigError

_log = logging.getLogger(__name__)

_MOST_PORTS_TRIED = 20
"""Most ports to try until one is free at all addresses of a listener."""

_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.ENODEV)
"""Errors of ``bind`` for an address that this machine does not have."""


def require_secret(bind: str, ips: list[str]) -> None:
    """Raise ConfigError if other machines can reach a listener that has no secret."""
    if not all(map(addresses.is_loopback, ips)):
        raise ConfigError(
            f"{bind} can be reached from other machines, and without a secret every process that reaches it may read KV: set "
            "KVXFER_SECRET_FILE to a file that holds the same secret on all servers, or allow_unauthenticated "
            "(KVXFER_ALLOW_UNAUTHENTICATED=1) in a network where all processes are trusted"
        )


def listen(router: zmq.Socket[bytes], ips: list[str], port: int) -> tuple[list[str], int]:
    """Bind a socket to those of the addresses that this machine has, at one port; 0 takes a port that is free at all of them.

    Returns:
        the addresses that are bound, and the port.

    Raises:
        ZMQError: the port is taken at one of them, or this machine has none of them.
    """
    last = zmq.ZMQError(errno.EADDRNOTAVAIL)
    for _ in range(_MOST_PORTS_TRIED):
        bound: list[str] = []
        found = port
        for ip in ips:
            router.setsockopt(zmq.IPV6, int(addresses.is_ipv6(ip)))
            try:
                router.bind(addresses.join(ip, found))
            except zmq.ZMQError as error:
                last = error
                if error.errno in _NOT_HERE:
                    continue
                if port == 0 and bound and error.errno == errno.EADDRINUSE:
                    break  # another process has this port of this address
                raise
            bound.append(ip)
            found = int(router.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        else:
            if not bound:
                raise last
            return bound, found
        for ip in bound:
            router.unbind(addresses.join(ip, found))
    raise last


def advertised_address(bound: list[str], port: int, advertise: str | None) -> str:
    """Control address to advertise for a listener bound to these IP addresses."""
    if advertise is not None:
        return addresses.join(advertise, port)
    ip = addresses.advertised_ip(bound)
    if addresses.is_loopback(ip) and not all(map(addresses.is_loopback, bound)):
        _log.warning(
            "listening on all interfaces, but this machine has no default route: the advertised address is %s, which only "
            "processes of this machine reach; set advertise to an address that peers reach",
            ip,
        )
    return addresses.join(ip, port)

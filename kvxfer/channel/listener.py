# SPDX-License-Identifier: Apache-2.0
"""Where a control channel listens: every address of its host that this machine has, at one port; and what peers are told of it."""

from __future__ import annotations

import errno
import logging

import zmq

from kvxfer import addresses
from kvxfer.errors import ConfigError

_log = logging.getLogger(__name__)

_MOST_PORTS_TRIED = 20
"""Free ports of one address that are tried until one is free for all addresses of a listener."""

_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.ENODEV)
"""An address is not this machine's."""


def refuse_strangers(bind: str, numbers: list[str]) -> None:
    """Raise ConfigError if other machines reach one of the addresses of a listener that has no secret."""
    if not all(map(addresses.is_loopback, numbers)):
        raise ConfigError(
            f"{bind} can be reached from other machines, and without a secret whoever reaches it may ask for KV: set "
            "KVXFER_SECRET_FILE to a file that holds the same secret on all servers, or allow_unauthenticated "
            "(KVXFER_ALLOW_UNAUTHENTICATED=1) in a network where everybody may"
        )


def listen(router: zmq.Socket[bytes], numbers: list[str], port: int) -> tuple[list[str], int]:
    """Bind a socket to all of these numbers that are this machine's, at one port; 0 takes one that is free for all of them.

    Returns:
        the numbers that are bound, and the port.

    Raises:
        ZMQError: the port is taken at one of them, or none of them is this machine's.
    """
    last = zmq.ZMQError(errno.EADDRNOTAVAIL)
    for _ in range(_MOST_PORTS_TRIED):
        bound: list[str] = []
        found = port
        for number in numbers:
            router.setsockopt(zmq.IPV6, int(addresses.is_ipv6(number)))
            try:
                router.bind(addresses.join(number, found))
            except zmq.ZMQError as error:
                last = error
                if error.errno in _NOT_HERE:
                    continue
                if port == 0 and bound and error.errno == errno.EADDRINUSE:
                    break  # another process has this port of this address
                raise
            bound.append(number)
            found = int(router.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        else:
            if not bound:
                raise last
            return bound, found
        for number in bound:
            router.unbind(addresses.join(number, found))
    raise last


def told(bound: list[str], port: int, advertise: str | None) -> str:
    """The address that peers are told of a listener that is bound to these numbers."""
    if advertise is not None:
        return addresses.join(advertise, port)
    number = addresses.told(bound)
    if addresses.is_loopback(number) and not all(map(addresses.is_loopback, bound)):
        _log.warning(
            "listening on all interfaces, but this machine has no default route: peers are told %s, which only its own processes "
            "reach; set advertise to an address that peers reach",
            number,
        )
    return addresses.join(number, port)

# SPDX-License-Identifier: Apache-2.0
"""Control addresses, ``tcp://host:port``: which numeric addresses a host means, where a listener binds, what peers are told.

A *number* is a numeric address as text, such as ``127.0.0.1`` or ``fe80::1%eth0``. ZeroMQ is given numbers only: of a name it
would take one address, and resolve it on the thread that serves all connections.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from functools import lru_cache

from kvxfer.errors import ConfigError

LAST_PORT = 65_535
ANY = "*"
"""Host of a listener that takes connections to every address of this machine, of both families."""

MOST_NUMBERS = 8
"""Numbers that are taken of one name."""

_LOOPBACK = ("127.0.0.1", "::1")
_NAME = re.compile(
    r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)*\.?"
)
_LONGEST_NAME = 253
_EVERYTHING = ("", ANY, "0.0.0.0", "::")  # noqa: S104 - compared, not bound

# Documentation addresses (RFC 5737, RFC 3849): no host has them, and the default route leads to them.
_SOMEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}


@lru_cache(1024)
def parse(address: str) -> tuple[str, int]:
    """Host and port of an address that can be connected to; an IPv6 host without its brackets.

    Raises:
        ConfigError: it is not ``tcp://host:port`` with a host that can exist and a port from 1 to 65535.
    """
    host, port = _split(address)
    if port == 0:
        raise ConfigError(f"{address!r} has port 0: a port to connect to is from 1 to {LAST_PORT}")
    return checked_host(host, address), port


def parse_bind(address: str) -> tuple[str, int]:
    """Host and port to listen on: the host may be `ANY`, and port 0 means any free one.

    Raises:
        ConfigError: it is not ``tcp://host:port``.
    """
    host, port = _split(address)
    return (ANY, port) if host in ("", ANY) else (checked_host(host, address), port)


def checked_host(host: str, given: str | None = None) -> str:
    """A host without brackets, if it is a number or could be a name.

    Args:
        given: what to call it in the error.

    Raises:
        ConfigError: it is neither.
    """
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if _number(bare) is None and not (len(bare) <= _LONGEST_NAME and _NAME.fullmatch(bare)):
        raise ConfigError(
            f"{host if given is None else given!r}: {host!r} is neither a numeric address nor a host name"
        )
    return bare


def join(host: str, port: int) -> str:
    """The address of a host and a port; an IPv6 host gets the brackets that it needs there."""
    return f"tcp://[{host}]:{port}" if ":" in host and not host.startswith("[") else f"tcp://{host}:{port}"


def numbers(host: str) -> list[str] | None:
    """The numbers of a host that no name server has to be asked for: of a number, and of ``localhost``; None of another name.

    ``localhost`` means both loopback addresses, whatever the hosts file says (RFC 6761, section 6.3).
    """
    if host.rstrip(".").lower() == "localhost":
        return list(_LOOPBACK)
    number = _number(host)
    return None if number is None else [number]


def resolve(host: str) -> list[str]:
    """The numbers of a host as the system's resolver orders them, `MOST_NUMBERS` at the most. Blocks for as long as that takes.

    Raises:
        ConfigError: the name has no address, or the resolver failed.
    """
    known = numbers(host)
    if known is not None:
        return known
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the host name {host!r} cannot be resolved: {error}") from error
    ordered: dict[str, None] = {}
    for family, *_, sockaddr in found:
        if family == socket.AF_INET:
            ordered[str(sockaddr[0])] = None
        elif family == socket.AF_INET6:
            scope = f"%{sockaddr[3]}" if len(sockaddr) > 3 and sockaddr[3] else ""
            ordered[str(sockaddr[0]).partition("%")[0] + scope] = None
    if not ordered:
        raise ConfigError(f"the host name {host!r} has no IP address")
    return list(ordered)[:MOST_NUMBERS]


def is_loopback(number: str) -> bool:
    """Only processes of this machine reach it."""
    return number != ANY and ipaddress.ip_address(number.partition("%")[0]).is_loopback


def is_ipv6(number: str) -> bool:
    """It is an address of IPv6, or `ANY`."""
    return number == ANY or ":" in number


def told(bound: list[str]) -> str:
    """What peers are told of a listener that is bound to these numbers: one number, which reaches furthest; IPv4 before IPv6."""
    every = [number for number in bound if number in _EVERYTHING]
    if every:
        return own_number(ipv6=any(is_ipv6(number) for number in every))
    return min(bound, key=lambda number: (is_loopback(number), is_ipv6(number)))


def told_host(host: str) -> str:
    """What peers are told of a listener that is to be bound to ``host``: a number where the name means another machine to each.

    A name that is not ``localhost`` is told as it is: where it leads, peers find out for themselves.
    """
    if host.strip("[]") in _EVERYTHING:
        return own_number(ipv6=host != "0.0.0.0")  # noqa: S104 - compared, not bound
    known = numbers(host.strip("[]"))
    return host if known is None else told(known)


def own_number(*, ipv6: bool = True) -> str:
    """The number that this machine has on its default route, of IPv4 or else of IPv6. Nothing is sent to find it."""
    for family in (socket.AF_INET, socket.AF_INET6) if ipv6 else (socket.AF_INET,):
        with contextlib.suppress(OSError), contextlib.closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
            probe.connect((_SOMEWHERE[family], 9))
            return str(probe.getsockname()[0])
    return _LOOPBACK[0]


def _split(address: str) -> tuple[str, int]:
    scheme, _, rest = address.partition("://")
    host, colon, port = rest.rpartition(":")
    if scheme != "tcp" or not colon or not (port.isascii() and port.isdecimal()) or int(port[:6]) > LAST_PORT:
        raise ConfigError(f"a control address is tcp://host:port with a port up to {LAST_PORT}, not {address!r}")
    return host, int(port)


def _number(text: str) -> str | None:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None

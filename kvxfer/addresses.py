# SPDX-License-Identifier: Apache-2.0
"""Control addresses, ``tcp://host:port``: the IP addresses of a host, the ones to bind, the one to advertise.

An *ip* is an IP address as text, such as ``127.0.0.1`` or ``fe80::1%eth0``. ZeroMQ gets no host names: it would resolve a name
on the thread that serves all connections, and use one of its addresses.
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
"""Host of a listener that is bound to all addresses of this machine, IPv4 and IPv6."""

MOST_IPS = 8
"""Most IP addresses of one name that are used."""

_LOOPBACK = ("127.0.0.1", "::1")
_NAME = re.compile(
    r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)*\.?"
)
_LONGEST_NAME = 253
_EVERYTHING = ("", ANY, "0.0.0.0", "::")  # noqa: S104 - compared, not bound

# Addresses reserved for documentation (RFC 5737, RFC 3849): no host has them, and the default route leads to them.
_SOMEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}


@lru_cache(1024)
def parse(address: str) -> tuple[str, int]:
    """Host and port of an address to connect to; an IPv6 host without its brackets.

    Raises:
        ConfigError: the address is not ``tcp://host:port`` with a valid host and a port from 1 to 65535.
    """
    host, port = _split(address)
    if port == 0:
        raise ConfigError(f"{address!r} has port 0: a port to connect to is from 1 to {LAST_PORT}")
    return checked_host(host, address), port


def parse_bind(address: str) -> tuple[str, int]:
    """Host and port to listen on: the host may be `ANY`, and port 0 means any free port.

    Raises:
        ConfigError: the address is not ``tcp://host:port``.
    """
    host, port = _split(address)
    return (ANY, port) if host in ("", ANY) else (checked_host(host, address), port)


def checked_host(host: str, given: str | None = None) -> str:
    """Check that a host is an IP address or a valid host name, and return it without brackets.

    Args:
        given: the text to show in the error instead of ``host``.

    Raises:
        ConfigError: the host is neither.
    """
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if _ip(bare) is None and not (len(bare) <= _LONGEST_NAME and _NAME.fullmatch(bare)):
        raise ConfigError(
            f"{host if given is None else given!r}: {host!r} is neither a numeric address nor a host name"
        )
    return bare


def join(host: str, port: int) -> str:
    """Control address of a host and a port; an IPv6 host gets its brackets."""
    return f"tcp://[{host}]:{port}" if ":" in host and not host.startswith("[") else f"tcp://{host}:{port}"


def known_ips(host: str) -> list[str] | None:
    """IP addresses of a host that are known without a look-up: of an IP address and of ``localhost``; None for another name.

    ``localhost`` means both loopback addresses, whatever the hosts file says (RFC 6761, section 6.3).
    """
    if host.rstrip(".").lower() == "localhost":
        return list(_LOOPBACK)
    ip = _ip(host)
    return None if ip is None else [ip]


def resolve(host: str) -> list[str]:
    """Look up the IP addresses of a host, in the order of the system's resolver, at most `MOST_IPS`. Blocks.

    Raises:
        ConfigError: the name has no address, or the resolver failed.
    """
    known = known_ips(host)
    return look_up(host) if known is None else known


def look_up(host: str) -> list[str]:
    """Ask the system's resolver for the IP addresses of any name, ``localhost`` too; else as `resolve`. Blocks.

    Raises:
        ConfigError: the name has no address, or the resolver failed.
    """
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
    return list(ordered)[:MOST_IPS]


def is_loopback(ip: str) -> bool:
    """Whether only processes of this machine can reach the address."""
    return ip != ANY and ipaddress.ip_address(ip.partition("%")[0]).is_loopback


def is_ipv6(ip: str) -> bool:
    """Whether the address belongs to IPv6, or is `ANY`."""
    return ip == ANY or ":" in ip


def advertised_ip(bound: list[str]) -> str:
    """IP address to advertise for a listener bound to these: the one that reaches furthest; IPv4 before IPv6."""
    every = [ip for ip in bound if ip in _EVERYTHING]
    if every:
        return own_ip(ipv6=any(is_ipv6(ip) for ip in every))
    return min(bound, key=lambda ip: (is_loopback(ip), is_ipv6(ip)))


def advertised_host(host: str) -> str:
    """Host to advertise for a listener bound to ``host``: an IP address for ``localhost`` and for all interfaces.

    Any other name is advertised as it is, and peers look it up.
    """
    if host.strip("[]") in _EVERYTHING:
        return own_ip(ipv6=host != "0.0.0.0")  # noqa: S104 - compared, not bound
    known = known_ips(host.strip("[]"))
    return host if known is None else advertised_ip(known)


def own_ip(*, ipv6: bool = True) -> str:
    """IP address of this machine on its default route, IPv4 before IPv6. Sends nothing to find it."""
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


def _ip(text: str) -> str | None:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None

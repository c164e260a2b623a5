# SPDX-License-Identifier: Apache-2.0
"""Names and addresses of this machine: what ``localhost`` and its host name mean, and what peers are told."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from kvxfer import addresses
from kvxfer.agents.finding import Finding, good, note, problem
from kvxfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def names() -> Iterator[Finding]:
    """All findings about names."""
    try:
        yield from loopback(addresses.look_up("localhost"))
    except ConfigError:
        yield from loopback([])
    own = addresses.own_ip()
    yield from host_name(socket.gethostname(), addresses.resolve, own)


def loopback(ips: list[str]) -> Iterator[Finding]:
    """Findings about ``localhost``. kvxfer takes it for both loopback addresses; routers and clients ask the system.

    Args:
        ips: what the system's resolver answers, in its order.
    """
    if not ips:
        yield problem(
            "localhost",
            "has no address: routers and clients do not find servers here",
            "echo '127.0.0.1 localhost' >> /etc/hosts",
        )
    elif addresses.is_ipv6(ips[0]):
        yield note(
            "localhost",
            f"means {', '.join(ips)}: a client that tries the first address only does not find a server on 127.0.0.1",
            "use 127.0.0.1 in the addresses of routers and clients",
        )
    else:
        yield good("localhost", ", ".join(ips))


def host_name(name: str, resolve: Callable[[str], list[str]], own: str) -> Iterator[Finding]:
    """Findings about this machine's own name.

    Args:
        resolve: as `kvxfer.addresses.resolve`.
        own: IP address on the default route, which peers are told by default.
    """
    advertise = f"export KVXFER_SIDE_CHANNEL_HOST={own}"
    if addresses.is_loopback(own):
        yield note("address", "this machine has no route to others: its servers can be reached from here only")
    else:
        yield good("address", f"{own} is what peers are told by a server that listens on all addresses")
    try:
        ips = resolve(name)
    except ConfigError as error:
        yield note("host name", f"{error}: a server must not be told to peers by this name", advertise)
        return
    if all(addresses.is_loopback(ip) for ip in ips):
        yield note(
            "host name",
            f"{name} means {', '.join(ips)} here: a server that listens there is reached from this machine only",
            advertise,
        )
    else:
        yield good("host name", f"{name} means {', '.join(ips)}")

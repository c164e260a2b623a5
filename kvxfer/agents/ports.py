# SPDX-License-Identifier: Apache-2.0
"""TCP ports on which this process listens, from the kernel. For adapters whose engines open ports, and for their tests."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from pathlib import Path
from typing import NamedTuple

_LISTENING = "0A"


class Port(NamedTuple):
    """A TCP port on which this process listens.

    Attributes:
        device: the network device to which it is bound, empty for all of them.
    """

    address: str
    number: int
    device: str = ""

    @property
    def on_loopback(self) -> bool:
        """Whether only processes of this machine can connect to it."""
        return self.device == "lo" or ipaddress.ip_address(self.address).is_loopback

    def __str__(self) -> str:
        return f"[{self.address}]:{self.number}" if ":" in self.address else f"{self.address}:{self.number}"


def open_ports() -> frozenset[Port]:
    """The TCP ports on which this process listens; empty where the kernel does not tell."""
    own = _own_sockets()
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            with Path(f"/proc/thread-self/net/{table}").open(encoding="ascii") as lines:
                next(lines)
                for line in lines:
                    _, local, _, state, *rest = line.split()
                    if state != _LISTENING:
                        break  # the kernel lists listening sockets first, and there may be very many others
                    if rest[5] in own:
                        address, _, number = local.partition(":")
                        found.add(Port(_address(address), int(number, 16), _device(own[rest[5]])))
        except (OSError, StopIteration, ValueError):
            continue
    return frozenset(found)


def _own_sockets() -> dict[str, int]:
    """This process's sockets: inode -> a file descriptor."""
    try:
        descriptors = list(Path("/proc/self/fd").iterdir())
    except OSError:
        return {}
    own = {}
    for descriptor in descriptors:
        try:
            target = os.readlink(descriptor)  # noqa: PTH115 - the link's text is what counts
        except OSError:
            continue  # closed meanwhile
        if target.startswith("socket:["):
            own[target[len("socket:[") : -1]] = int(descriptor.name)
    return own


def _device(descriptor: int) -> str:
    """The network device to which a socket is bound, empty for none."""
    try:
        duplicate = os.dup(descriptor)
    except OSError:
        return ""  # closed meanwhile
    try:
        with socket.socket(fileno=duplicate) as ours:
            return ours.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0").decode()
    except OSError:
        return ""


def _address(text: str) -> str:
    """An address from its form in /proc/net: words of four bytes in this machine's byte order."""
    words = [bytes.fromhex(text[i : i + 8]) for i in range(0, len(text), 8)]
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    return str(ipaddress.ip_address(packed))

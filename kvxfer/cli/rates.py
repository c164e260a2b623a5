# SPDX-License-Identifier: Apache-2.0
"""Rates that a transfer is measured against: a plain copy in memory, and the network device of an address."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvxfer.cli.timing import fastest_s

if TYPE_CHECKING:
    from collections.abc import Iterator

_SIOCGIFADDR = 0x8915
_COPIED_NBYTES = 32 << 20


def copy_nbytes_per_s(nbytes: int = _COPIED_NBYTES) -> float:
    """Rate of a plain copy in one thread."""
    source, target = np.ones(nbytes, np.uint8), np.empty(nbytes, np.uint8)
    return nbytes / fastest_s(lambda: np.copyto(target, source))


def own_ip_towards(ip: str) -> str:
    """This machine's address from which it reaches another one. Sends nothing to find it. Raises OSError."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
        probe.connect((ip, 9))
        return str(probe.getsockname()[0])


def device_of(ip: str) -> str | None:
    """The network device that has an IP address of this machine."""
    return next((name for name, its in _device_ips() if its == ipaddress.ip_address(ip.partition("%")[0])), None)


def device_nbytes_per_s(device: str, root: Path = Path("/")) -> float:
    """Rate of a network device as its driver tells it; 0 where it does not, as of the loopback."""
    try:
        mbit = int((root / "sys/class/net" / device / "speed").read_text(encoding="ascii"))
    except (OSError, ValueError):  # a device that is down has an error instead of a speed
        return 0.0
    return max(mbit, 0) * 1e6 / 8


def _device_ips() -> Iterator[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no IPv4 address
                told = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                yield name, ipaddress.IPv4Address(told[20:24])
    with contextlib.suppress(OSError):  # without IPv6
        for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
            number, *_, name = line.split()
            yield name, ipaddress.IPv6Address(bytes.fromhex(number))

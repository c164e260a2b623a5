# SPDX-License-Identifier: Apache-2.0
"""Two hosts on one machine: network namespaces with a wire between them, which a test slows, cuts and heals.

Needs root and ``ip`` and ``tc`` of iproute2. Whatever is made here is gone when it is closed.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from kvxfer.testing import eventually

_CLONE_NEWNET, _CLONE_NEWNS = 0x40000000, 0x00020000
_MS_REC, _MS_PRIVATE, _MNT_DETACH = 1 << 14, 1 << 18, 2
_numbers = itertools.count()


@dataclass(frozen=True)
class Host:
    """One end of the wire.

    Attributes:
        namespace: of the network, by name.
        device: the only one but the loopback.
        address: of the device.
    """

    namespace: str
    device: str
    address: str


class TwoHosts:
    """A wire and what hangs on it. Its methods are called from the host's side; processes `enter` one of the ends."""

    def __init__(self) -> None:
        mark = f"{os.getpid() % 100_000}x{next(_numbers)}"
        self.ends: tuple[Host, Host] = (
            Host(f"kvxfer-{mark}-a", f"kvx{mark}a", "10.213.77.1"),
            Host(f"kvxfer-{mark}-b", f"kvx{mark}b", "10.213.77.2"),
        )
        a, b = self.ends
        try:
            for end in self.ends:
                _run("ip", "netns", "add", end.namespace)
            _run("ip", "link", "add", a.device, "netns", a.namespace, "type", "veth", "peer", "name", b.device, "netns", b.namespace)  # fmt: skip
            for end in self.ends:
                _in(end, "ip", "address", "add", f"{end.address}/24", "dev", end.device)
                _in(end, "ip", "link", "set", "lo", "up")
            self.heal()
        except BaseException:
            self.close()
            raise

    def slow(self, mbit: int) -> None:
        """Limit the wire to this rate each way; packets wait up to 0.4 s for it before they are dropped."""
        for end in self.ends:
            shape = ("tbf", "rate", f"{mbit}mbit", "burst", "64kb", "latency", "400ms")
            _in(end, "tc", "qdisc", "replace", "dev", end.device, "root", *shape)

    def cut(self) -> None:
        """Drop all packets without a notice to either side, as a broken switch does."""
        for end in self.ends:
            _in(end, "tc", "qdisc", "replace", "dev", end.device, "root", "pfifo", "limit", "0")

    def unplug(self) -> None:
        """Both ends lose their link, as their kernels see it."""
        _in(self.ends[0], "ip", "link", "set", self.ends[0].device, "down")

    def heal(self) -> None:
        """The wire is as new."""
        for end in self.ends:
            with contextlib.suppress(subprocess.CalledProcessError):  # there is nothing to take away
                _in(end, "tc", "qdisc", "del", "dev", end.device, "root")
            _in(end, "ip", "link", "set", end.device, "up")
        # The kernel says by and by that there is a carrier; before that UCX sees no device.
        eventually(
            lambda: all("state UP" in _in(end, "ip", "link", "show", end.device) for end in self.ends), interval_s=0.02
        )

    def close(self) -> None:
        """Take everything away. Processes inside have to have ended."""
        for end in self.ends:
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "del", end.namespace)


def enter(namespace: str) -> None:
    """Move this thread, and those that it starts from now on, to one end: its network, and a /sys that shows it, as UCX looks there.

    Raises:
        OSError: it cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        _checked(libc.setns(handle, _CLONE_NEWNET))
    finally:
        os.close(handle)
    _checked(libc.unshare(_CLONE_NEWNS))
    _checked(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    _checked(libc.umount2(b"/sys", _MNT_DETACH))
    _checked(libc.mount(b"kvxfer", b"/sys", b"sysfs", 0, None))


def _checked(failed: int) -> None:
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot enter a network namespace: {os.strerror(number)}")


def why_not() -> str | None:
    """The reason why this machine cannot simulate two hosts; None if it can."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root here"
    if not Path("/proc/self/ns/net").exists():
        return "no network namespaces here"
    try:
        hosts = TwoHosts()
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {' '.join(error.cmd)}: {error.stderr.strip()}"
    try:
        hosts.slow(100)
    except subprocess.CalledProcessError as error:
        return f"a wire cannot be slowed here: {' '.join(error.cmd)}: {error.stderr.strip()}"
    finally:
        hosts.close()
    return None


def _in(end: Host, tool: str, *arguments: str) -> str:
    return _run(tool, "-n", end.namespace, *arguments)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout

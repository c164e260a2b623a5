# SPDX-License-Identifier: Apache-2.0
"""Processes with a hosts file, a name server and a network of their own. Needs root; nothing of it is left when they end."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvxfer.testing import Child, ChildError

if TYPE_CHECKING:
    from collections.abc import Callable

_CLONE_NEWNET, _CLONE_NEWNS = 0x40000000, 0x00020000
_MS_BIND, _MS_REC, _MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18

SILENT_SERVER = "127.77.0.53"


def run(case: Callable[..., None], *args: Any, hosts: str, network: bool = False, timeout_s: float = 120.0) -> None:
    """Call a function in a process whose names are those of ``hosts``, and no others: a name server is asked that never answers.

    Args:
        hosts: text of the hosts file.
        network: give it a network namespace of its own, with a loopback and a device of IPv6 only.

    Raises:
        AssertionError, ChildError: it raised, or did not end.
    """
    with Child(case.__name__, _Namespaces, hosts, network) as child:
        child.call("run", case, args, timeout_s=timeout_s)
        child.close(20)
        assert child.exitcode == 0, "it did not end by itself"


def why_not(*, network: bool = False) -> str | None:
    """The reason why this machine cannot do that; None if it can."""
    if os.geteuid() != 0:
        return "mount namespaces need root here"
    if network and shutil.which("ip") is None:
        return "not installed: ip (iproute2)"
    try:
        run(_nothing, hosts="127.0.0.1 localhost\n", network=network)
    except (AssertionError, ChildError) as error:
        return f"no namespaces here: {str(error).strip().splitlines()[-1]}"
    return None


def _nothing() -> None:
    pass


class _Namespaces:
    """An object in the process, which enters the namespaces."""

    def __init__(self, hosts: str, network: bool) -> None:
        with tempfile.TemporaryDirectory() as folder:
            _enter(Path(folder), hosts, network=network)

    def run(self, case: Callable[..., None], args: Any) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
            silent.bind((SILENT_SERVER, 53))
            case(*args)


def _enter(folder: Path, hosts: str, *, network: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.unshare(_CLONE_NEWNS | (_CLONE_NEWNET if network else 0)))
    _checked(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    files = {
        "hosts": hosts,
        "resolv.conf": f"nameserver {SILENT_SERVER}\noptions timeout:30 attempts:2\n",
        "nsswitch.conf": "hosts: files dns\n",
        "host.conf": "multi on\n",
        "gai.conf": "",
    }
    for name, text in files.items():
        target = Path("/etc", name)
        (folder / name).write_text(text)
        if target.exists():
            _checked(libc.mount(bytes(folder / name), bytes(target.resolve()), None, _MS_BIND, None))
        else:
            assert name in ("gai.conf", "host.conf", "nsswitch.conf"), f"no {target} here"
    if network:
        for command in (
            "link set lo up",
            "link add kvxfer6 type veth peer name kvxfer6b",
            "link set kvxfer6b up",
            "link set kvxfer6 up",
            "-6 address add fd00:77::1/64 dev kvxfer6 nodad",
            "-6 route add default dev kvxfer6",
        ):
            subprocess.run(["ip", *command.split()], check=True, capture_output=True, timeout=20)


def _checked(failed: int) -> None:
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot enter a namespace: {os.strerror(number)}")

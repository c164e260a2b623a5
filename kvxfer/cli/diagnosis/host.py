# SPDX-License-Identifier: Apache-2.0
"""Findings about what this host allows: RDMA devices, copies between processes, limits of memory and files, NUMA, the clock."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvxfer.agents.finding import Finding, good, note, problem
from kvxfer.cli.checks import available_nbytes
from kvxfer.cli.table import size

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

_TRIAL_S = 20.0
_LEAST_SHM_NBYTES = 64 << 20
"""Size of ``/dev/shm`` in a Docker container that asks for no other."""
_SHM = "/dev/shm"  # noqa: S108 - looked at, not written
_LEAST_FILES = 4096
_CLOCK_UNSYNCHRONIZED = 5
"""``TIME_ERROR`` of adjtimex(2)."""


def host(root: Path = Path("/")) -> Iterator[Finding]:
    """All findings about this host. ``root``: of the file system, for tests."""
    devices = yield from rdma(root)
    yield from memory_lock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], devices=devices)
    yield from copies_between_processes(copy_error(), root)
    yield from shared_memory(root)
    yield from open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield from numa(root)
    yield from clock(clock_state())
    memory = available_nbytes(root)
    if memory is not None:
        yield good("memory", f"{size(memory)} available")


def rdma(root: Path) -> Generator[Finding, None, int]:
    """Findings about RDMA devices and their ports. A generator that returns the number of usable devices."""
    devices = sorted((root / "sys/class/infiniband").glob("*"))
    if not devices:
        yield note("RDMA", "no device: between hosts, bytes go over TCP")
        return 0
    if not list((root / "dev/infiniband").glob("uverbs*")):
        yield problem(
            "RDMA",
            f"the kernel has {', '.join(each.name for each in devices)}, but this process sees no /dev/infiniband/uverbs*: UCX takes TCP",
            "docker run --device /dev/infiniband ... (Kubernetes: the RDMA device plug-in's resource)",
        )
        return 0
    usable = 0
    for device in devices:
        for port in sorted((device / "ports").glob("*")):
            subject = f"RDMA {device.name}:{port.name}"
            state = _text(port / "state")
            layer = _text(port / "link_layer")
            if "ACTIVE" not in state:
                yield problem(
                    subject, f"the port is {state or 'in no known state'}", f"rdma link show {device.name}/{port.name}"
                )
                continue
            gids = [gid for gid in map(_text, (port / "gids").glob("*")) if gid.strip("0:")]
            if layer == "Ethernet" and not gids:
                yield problem(
                    subject,
                    "the port has no GID: its network device has no address",
                    f"ip address show $(ls {device}/device/net)",
                )
                continue
            usable += 1
            yield good(subject, f"active, {layer or 'link layer unknown'}, {len(gids)} GIDs")
    return usable


def memory_lock(limit: int, *, devices: int) -> Iterator[Finding]:
    """Findings about ``ulimit -l``, which RDMA devices need to be without limit: registered memory is locked."""
    shown = "without limit" if limit == resource.RLIM_INFINITY else size(limit)
    if devices and limit != resource.RLIM_INFINITY:
        yield problem("memlock", f"{shown}: an RDMA device cannot register a whole cache", "ulimit -l unlimited")
    else:
        yield good("memlock", shown)


def copies_between_processes(error: int, root: Path) -> Iterator[Finding]:
    """Findings about copies from another process's memory (CMA), by which UCX moves bytes on one host.

    Args:
        error: number of the error with which such a copy was refused; 0 if it was done.
    """
    if not error:
        yield good("CMA", "one process may copy from another one's memory")
        return
    scope = _text(root / "proc/sys/kernel/yama/ptrace_scope")
    if error == errno.EPERM and scope not in ("", "0"):
        fix = "sysctl -w kernel.yama.ptrace_scope=0"
        why = f"kernel.yama.ptrace_scope is {scope}"
    else:
        fix = "docker run --cap-add SYS_PTRACE ... (Kubernetes: securityContext.capabilities.add)"
        why = f"process_vm_readv: {os.strerror(error)}"
    yield note("CMA", f"pairs on this host use TCP, because no process may copy from another one's memory ({why})", fix)


def shared_memory(root: Path) -> Iterator[Finding]:
    """Findings about ``/dev/shm``, which the worker processes of an engine use."""
    try:
        found = os.statvfs(root / _SHM[1:])
    except OSError as error:
        yield note(_SHM, f"{error.strerror}: engines with several workers do not start", "docker run --ipc=host ...")
        return
    nbytes = found.f_frsize * found.f_blocks
    if nbytes <= _LEAST_SHM_NBYTES:
        yield note(
            _SHM, f"{size(nbytes)}, too little for an engine with several workers", "docker run --shm-size=8g ..."
        )
    else:
        yield good(_SHM, size(nbytes))


def open_files(limit: int) -> Iterator[Finding]:
    """Findings about ``ulimit -n``: each peer takes one or two, and kvxfer uses a quarter of them."""
    if 0 <= limit < _LEAST_FILES:
        yield note("open files", f"{limit}: {limit // 4} peers at once", f"ulimit -n {_LEAST_FILES * 16}")
    else:
        yield good("open files", "without limit" if limit < 0 else str(limit))


def numa(root: Path) -> Iterator[Finding]:
    """Findings about NUMA nodes: a cache far from the network device is slower to read."""
    nodes = len(list((root / "sys/devices/system/node").glob("node[0-9]*")))
    if nodes > 1:
        near = {device.name: _text(device / "device/numa_node") for device in (root / "sys/class/infiniband").glob("*")}
        where = ", ".join(f"{name} is at node {node}" for name, node in sorted(near.items()))
        yield note(
            "NUMA",
            f"{nodes} nodes{': ' + where if where else ''}; memory of another node than the network device's is slower",
            f"numactl --cpunodebind={next(iter(near.values()), 'N')} --membind={next(iter(near.values()), 'N')} COMMAND",
        )
    else:
        yield good("NUMA", "one node")


def clock(state: int) -> Iterator[Finding]:
    """Findings about the clock. Leases need none that both sides share; logs and traces of two hosts do.

    Args:
        state: as adjtimex(2) returns it; -1 where it cannot be asked.
    """
    if state == _CLOCK_UNSYNCHRONIZED:
        yield note(
            "clock", "not synchronized: transfers do not need it, logs of two hosts do", "timedatectl set-ntp true"
        )
    else:
        yield good("clock", "synchronized" if state >= 0 else "its state cannot be asked")


def clock_state() -> int:
    """State of the system's clock as adjtimex(2) returns it; -1 where it cannot be asked."""
    buffer = ctypes.create_string_buffer(512)  # struct timex; modes=0 in its first field only reads
    try:
        return int(ctypes.CDLL(None).adjtimex(buffer))
    except (OSError, AttributeError):
        return -1


_OWNER = """
import ctypes, os, sys
data = ctypes.create_string_buffer(b"kvxfer")
print(os.getpid(), ctypes.addressof(data), flush=True)
sys.stdin.read()
"""

_READER = """
import ctypes, sys
class Span(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t)]
pid, address = map(int, sys.argv[1:])
data = ctypes.create_string_buffer(6)
mine, theirs = Span(ctypes.addressof(data), 6), Span(address, 6)
libc = ctypes.CDLL(None, use_errno=True)
libc.process_vm_readv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
done = libc.process_vm_readv(pid, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0)
print(0 if done == 6 and data.raw == b"kvxfer" else ctypes.get_errno() or 5, flush=True)
"""


def copy_error() -> int:
    """Have one new process copy from the memory of another one; returns 0, or the number of the error."""
    command = [sys.executable, "-I", "-S", "-c"]
    with subprocess.Popen([*command, _OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:  # noqa: S603
        try:
            told = owner.stdout.readline().split() if owner.stdout is not None else []
            if len(told) != 2:
                return errno.ECHILD
            reader = [*command, _READER, *told]
            done = subprocess.run(reader, capture_output=True, text=True, timeout=_TRIAL_S, check=False)  # noqa: S603
            return int(done.stdout) if done.stdout.strip().isdecimal() else errno.EIO
        except subprocess.TimeoutExpired:
            return errno.ETIMEDOUT
        finally:
            owner.kill()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""

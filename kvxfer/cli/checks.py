# SPDX-License-Identifier: Apache-2.0
"""Checks before a command starts: of the agent, the available memory and the file to write."""

from __future__ import annotations

import os
from pathlib import Path

from kvxfer import registry
from kvxfer.agents.base import TransferAgent
from kvxfer.agents.capabilities import Reach
from kvxfer.cli.table import size
from kvxfer.errors import ConfigError, UnavailableError

PROCESS_NBYTES = 200 << 20
"""Memory of a process beside its cache: Python, NumPy, the transfer engine, one layer of the demo's pattern."""


def check_agent(name: str, what: str) -> None:
    """Refuse an agent that cannot work between processes.

    Args:
        name: of the agent.
        what: the command in words, such as "the demo".

    Raises:
        ConfigError: there is no such agent.
        UnavailableError: the agent cannot run here, or moves bytes only inside one process.
    """
    adapter = registry.load(name)
    if issubclass(adapter, TransferAgent) and adapter.capabilities.reach is Reach.PROCESS:
        raise UnavailableError(
            f"{name} moves bytes only inside one process, and {what} has several: choose another --agent"
        )


def check_memory(needed: int, smaller: str) -> None:
    """Refuse a command that needs more memory than is available. ``smaller``: the advice in the message. Raises UnavailableError."""
    available = available_nbytes()
    if available is not None and available < needed:
        raise UnavailableError(
            f"this needs {size(needed)} of memory and {size(available)} are available here: {smaller}"
        )


def available_nbytes(root: Path = Path("/")) -> int | None:
    """Memory that this process and its children can still allocate, by the kernel and cgroups; None if neither tells."""
    found: list[int] = []
    said = [line.split()[1] for line in _lines(root / "proc/meminfo") if line.startswith("MemAvailable:")]
    found += [int(kib) * 1024 for kib in said]
    for limit, used in (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        pair = [_lines(root / name) for name in (limit, used)]
        if all(lines and lines[0].isdecimal() for lines in pair):
            found.append(int(pair[0][0]) - int(pair[1][0]))
    return min(found) if found else None


def check_writable(path: str) -> None:
    """Refuse a file that cannot be written, without a change to it. Raises ConfigError."""
    where = Path(path)
    if where.is_dir():
        why = "it is a folder"
    elif not where.parent.is_dir():
        why = f"there is no folder {where.parent}"
    elif not os.access(where if where.exists() else where.parent, os.W_OK):
        why = "permission denied"
    else:
        return
    raise ConfigError(f"cannot write {path}: {why}")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []

# SPDX-License-Identifier: Apache-2.0
"""Agents that the tests of this folder make, here and in spawned processes: they have to be importable by name."""

from __future__ import annotations

import ctypes
from pathlib import Path

from kvxfer.memory.spans import Memory
from kvxfer_nixl import NixlAgent

ON_LOOPBACK = "NET_DEVICES=lo"
"""UCX otherwise listens on every address of the machine."""


def nixl_agent(name: str) -> NixlAgent:
    """An agent over the link that UCX chooses by itself: memory copies between two processes of one host."""
    return NixlAgent(name, backend_options={"UCX": {"engine_config": ON_LOOPBACK}})


def nixl_agent_over_tcp(name: str) -> NixlAgent:
    """An agent over TCP, as between two hosts without RDMA."""
    return NixlAgent(name, backend_options={"UCX": {"engine_config": f"{ON_LOOPBACK},TLS=tcp"}})


def nixl_agent_over_tcp_in_one_go(name: str) -> NixlAgent:
    """An agent as `nixl_agent_over_tcp`, with all bytes of a transfer handed to NIXL at once."""
    options = {"UCX": {"engine_config": f"{ON_LOOPBACK},TLS=tcp"}}
    return NixlAgent(name, backend_options=options, max_submit_nbytes=None)


def nixl_agent_over_tcp_with_patience(name: str) -> NixlAgent:
    """An agent as `nixl_agent_over_tcp`, whose close waits long enough for a read on a busy machine."""
    return NixlAgent(name, backend_options={"UCX": {"engine_config": f"{ON_LOOPBACK},TLS=tcp"}}, drain_s=30.0)


def native_threads() -> int:
    """Threads of this process, NIXL's own included."""
    return len(list(Path("/proc/self/task").iterdir()))


class PagesThatGo:
    """Host memory of whole pages that goes back to the kernel while it is registered: ``write(b"")`` does it."""

    def __init__(self, nbytes: int) -> None:
        self._libc = ctypes.CDLL(None)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        read_write, private_anonymous = 3, 0x22
        self.memory = Memory(self._libc.mmap(None, nbytes, read_write, private_anonymous, -1, 0), nbytes)

    def read(self) -> bytes:
        """All of it."""
        return ctypes.string_at(self.memory.address, self.memory.nbytes)

    def write(self, data: bytes) -> None:
        """Replace it, or give it back."""
        if data:
            ctypes.memmove(self.memory.address, data, len(data))
        else:
            self._libc.munmap(self.memory.address, self.memory.nbytes)

    def intact(self) -> bool:
        """Always True: nothing beside it is watched."""
        return True

# SPDX-License-Identifier: Apache-2.0
"""Memory that a test reads and writes without the adapter under test."""

from __future__ import annotations

import ctypes
from typing import Protocol

import numpy as np

from kvxfer.memory.spans import Memory

GUARD_NBYTES = 4096
"""Width of the guard bands on either side of a `HostSpan`: they are not registered, and no agent may touch them."""

_CANARY = 0xA5
_PERIOD_NBYTES = 1_048_573


class OracleMemory(Protocol):
    """Memory for a suite. `HostSpan` is the one for DRAM; adapters for other kinds provide their own."""

    @property
    def memory(self) -> Memory:
        """The span, as an agent registers it."""
        ...

    def read(self) -> bytes:
        """Return all of its content, by other means than the adapter."""
        ...

    def write(self, data: bytes) -> None:
        """Replace all of its content, by other means than the adapter."""
        ...

    def intact(self) -> bool:
        """Whether the memory beside it is untouched."""
        ...


class HostSpan:
    """Host memory between two guard bands.

    It owns the memory: keep it until every agent that registered it, or may still write to it, is closed.
    """

    def __init__(self, nbytes: int) -> None:
        # np.zeros would map pages lazily, and the first touch would then be inside the transfer that is measured.
        self._bytes = np.full(nbytes + 2 * GUARD_NBYTES, _CANARY, dtype=np.uint8)
        self._memory = Memory(int(self._bytes.ctypes.data) + GUARD_NBYTES, nbytes)

    @property
    def memory(self) -> Memory:
        """The span between the guard bands."""
        return self._memory

    def read(self) -> bytes:
        """The span's content."""
        return ctypes.string_at(self._memory.address, self._memory.nbytes)

    def write(self, data: bytes) -> None:
        """Replace the span's content.

        Raises:
            ValueError: ``data`` has another length.
        """
        if len(data) != self._memory.nbytes:
            raise ValueError(f"{len(data)} bytes for a span of {self._memory.nbytes}")
        ctypes.memmove(self._memory.address, data, len(data))

    def intact(self) -> bool:
        """Whether both guard bands are untouched."""
        below, above = self._bytes[:GUARD_NBYTES], self._bytes[-GUARD_NBYTES:]
        return bool((below == _CANARY).all() and (above == _CANARY).all())


def same_bytes(found: bytes | bytearray, expected: bytes | bytearray, what: str = "") -> None:
    """Assert that both are equal, and say where they differ.

    For a bare ``assert found == expected`` pytest would print a diff of all bytes where ``CI`` is set in the environment,
    which takes minutes for a few hundred KiB.

    Raises:
        AssertionError: they differ.
    """
    if found == expected:
        return
    assert len(found) == len(expected), f"{len(found)} bytes and not {len(expected)}{what and f' ({what})'}"
    different = np.flatnonzero(np.frombuffer(found, np.uint8) != np.frombuffer(expected, np.uint8))
    where = f"from offset {different[0]} to {different[-1]}"
    raise AssertionError(f"{len(different)} bytes are wrong, {where}{what and f' ({what})'}")


def noise(nbytes: int, seed: int) -> bytes:
    """Bytes that look random and are the same in every process for the same ``seed``."""
    if nbytes <= _PERIOD_NBYTES:
        return np.random.default_rng(seed).bytes(nbytes)
    # Random bytes are slow to make: large memory repeats them, with a period that is no multiple of anything.
    return (noise(_PERIOD_NBYTES, seed) * (nbytes // _PERIOD_NBYTES + 1))[:nbytes]

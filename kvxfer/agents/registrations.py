# SPDX-License-Identifier: Apache-2.0
"""The memory that an agent has registered with its engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvxfer.errors import RegistrationError
from kvxfer.memory.spans import Memory, RegionTable

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(eq=False)
class Registration:
    """Memory that peers may read and write. The caller keeps the memory alive until `TransferAgent.deregister`."""

    memory: Memory
    native: Any


class Registrations:
    """All registered regions of one agent. No two share a byte.

    Attributes:
        table: the regions, indexed by address.
    """

    def __init__(self) -> None:
        self._all: list[Registration] = []
        self.table: RegionTable = RegionTable([])

    @property
    def memories(self) -> list[Memory]:
        """The regions, in the order in which they were registered."""
        return [registration.memory for registration in self._all]

    def __contains__(self, registration: object) -> bool:
        return registration in self._all

    def add(self, memory: Memory, register: Callable[[Memory], object]) -> Registration:
        """Check a region, register it with the engine, and remember it.

        Raises:
            RegistrationError: the region is empty, impossible or overlaps another, or the engine refused it.
        """
        if memory.nbytes <= 0:
            raise RegistrationError("cannot register an empty region")
        for other in self._all:
            if memory.overlaps(other.memory):
                raise RegistrationError(f"{memory} overlaps {other.memory}, which is registered already")
        try:
            table = RegionTable([memory, *self.memories])
        except ValueError as error:
            raise RegistrationError(str(error)) from error
        registration = Registration(memory, register(memory))
        self._all.append(registration)
        self.table = table
        return registration

    def remove(self, registration: Registration) -> None:
        """Forget a region that the engine has forgotten."""
        self._all.remove(registration)
        self.table = RegionTable(self.memories)

    def clear(self) -> None:
        """Forget all regions."""
        self._all = []

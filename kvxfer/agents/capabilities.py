# SPDX-License-Identifier: Apache-2.0
"""Declarations of an adapter about its transfer engine: operations, memory, reach, limits, and how its transfers end."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvxfer.memory.spans import MemoryKind


class Op(str, Enum):
    """Direction of a transfer, seen from the agent that submits it."""

    READ = "read"
    WRITE = "write"


class Reach(str, Enum):
    """Greatest distance of a peer."""

    PROCESS = "process"
    HOST = "host"
    NETWORK = "network"


class LinkFacts(NamedTuple):
    """Facts about the connection between this agent and one peer.

    Attributes:
        fate_shared: a process that ends during its READ may take down the process that it reads from.
        cut_off_by_close: after `close` of this agent nothing that the peer's agent does lands in memory that this one had
            registered. Without it a WRITE of the peer cannot be stopped from here.
    """

    fate_shared: bool = False
    cut_off_by_close: bool = False


@dataclass(frozen=True)
class Capabilities:
    """Declarations of an adapter about its engine. They must be true: the conformance suite tests every field.

    `TransferAgent` reads ``ops``, ``kinds`` and the two limits: it refuses the rest, and splits lists. The command line reads
    ``reach``. Nothing in the core reads the other fields: it is written for an engine that promises none of them.

    Attributes:
        ops: operations that the engine carries out. The core needs READ or WRITE on each side of a read: declare both if the
            engine has both.
        kinds: memory that the engine registers.
        reach: how far away a peer may be.
        quiet_on_abandon: after `TransferAgent._abandon` the engine writes nothing more to local memory.
        remote_checked: a transfer fails if it touches memory that its owner has deregistered. Without this check it
            succeeds, and reads or writes whatever is there now.
        detects_death: a transfer to a peer whose process has died fails by itself, well before any deadline.
        max_descriptors: longest list that the engine takes in one call, None if there is no limit; longer ones are split.
        max_submit_nbytes: most bytes handed to the engine in one call, so that one long copy does not delay the others.
    """

    ops: frozenset[Op]
    kinds: frozenset[MemoryKind]
    reach: Reach
    quiet_on_abandon: bool
    remote_checked: bool
    detects_death: bool
    max_descriptors: int | None = None
    max_submit_nbytes: int | None = None

# SPDX-License-Identifier: Apache-2.0
"""The description by which one agent tells another its name, its registered regions and what its engine needs to connect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from kvxfer.errors import PeerInfoError
from kvxfer.memory.spans import Memory, RegionTable


class Description(msgspec.Struct, frozen=True):
    """An agent, as it describes itself to peers. Carries no secrets.

    Attributes:
        adapter: short name of the adapter; only agents of the same one understand ``native``.
        name: of the agent.
        regions: memory that it has registered.
        native: the adapter's own part, opaque to everything else.
    """

    adapter: str
    name: str
    regions: list[Memory]
    native: bytes


class _Named(msgspec.Struct, frozen=True):
    name: str


@dataclass(eq=False)
class AgentPeer:
    """Another agent, as this one knows it. Made by `TransferAgent.connect`; only that agent may use it.

    Attributes:
        native: the engine's handle of the peer, as the adapter's ``_connect`` returned it.
        info: the newest description that was connected.
    """

    name: str
    regions: RegionTable
    native: Any
    info: bytes
    connected: bool = True


def read_description(info: bytes) -> tuple[Description, RegionTable]:
    """Decode a peer's description, and index its regions.

    Raises:
        PeerInfoError: not a description, or its regions are impossible.
    """
    try:
        description = msgspec.msgpack.decode(info, type=Description)
        return description, RegionTable(description.regions)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise PeerInfoError(f"cannot read the description of a peer: {error}") from error


def described_name(info: bytes) -> str:
    """Name of the agent that a description belongs to; the rest is not decoded.

    Raises:
        PeerInfoError: not a description.
    """
    try:
        return msgspec.msgpack.decode(info, type=_Named).name
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise PeerInfoError(f"cannot read the description of a peer: {error}") from error

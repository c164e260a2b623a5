# SPDX-License-Identifier: Apache-2.0
"""Interface of a control channel, which the sockets and the simulator's network implement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvxfer.protocol import messages


@dataclass(frozen=True)
class Inbound:
    """A message, a frame that is no message, or the end of a connection.

    Attributes:
        source: an incoming connection (bytes), or the address of a peer (str).
        message: None if the frame could not be decoded, or the connection has ended.
        reason: the label that counts the refusal of the frame.
        why: the refusal as a sentence.
        gone: the connection has ended.
    """

    source: bytes | str
    message: messages.Message | None
    reason: str = ""
    why: str = ""
    gone: bool = False


@dataclass(frozen=True)
class Unreachable:
    """A peer that a message was sent to and that cannot be reached.

    Attributes:
        why: the reason as a sentence.
        dead: its port refuses connections; else its name cannot be resolved.
    """

    address: str
    why: str
    dead: bool = False


class Channel(Protocol):
    """Control channel of an endpoint. One thread owns it; other threads use only `wake` and the attributes.

    Attributes:
        address: the address to advertise to peers.
        loopback: only processes of this machine can connect.
    """

    address: str
    loopback: bool

    def wake(self) -> None:
        """Make `receive` return soon."""

    def send(self, address: str, message: messages.Message) -> None:
        """Queue a message to the peer at ``address``. Raises ConfigError: it cannot be connected to."""

    def reply(self, connection: bytes, message: messages.Message) -> None:
        """Queue a message on an incoming connection."""

    def disconnect(self, address: str) -> None:
        """Close the connection to a peer, if there is one."""

    def receive(self, timeout_s: float | None) -> Iterable[Inbound | Unreachable]:
        """Messages that arrive within ``timeout_s``, and peers that cannot be reached."""

    def close(self) -> None:
        """Close all connections."""

# SPDX-License-Identifier: Apache-2.0
"""The network of the simulator: messages are lost, repeated, late and overtaken, links are cut, and connections are made anew.

It carries encoded messages, as TCP would. Authentication and encryption belong to the real channel
(`kvxfer.channel.zmq_channel`) and are not simulated.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from typing import TYPE_CHECKING

from kvxfer.channel.base import Inbound
from kvxfer.errors import ConfigError
from kvxfer.protocol import messages

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.testing.sim.process import Process
    from kvxfer.testing.sim.world import World

_AGAIN_S, _TRIES = 0.5, 20
_LATE_S = 6.0
FIRST_COPIES = ("first copy lost", "second copy lost")
"""Faults of new connections: a copy between two agents, the first of which also connects them, never ends."""


class Network:
    """The links between processes.

    Attributes:
        channels: by address.
        cut: links that carry nothing, as (engine, engine): in that direction.
        silent: links that carry no bytes of KV at this moment; ``silenced``: those that were silent at any time.
        lost_first: by kind of copy, the first or the second one, pairs of processes, by name, between which it was lost.
    """

    def __init__(self, world: World) -> None:
        self.world: World = world
        self.channels: dict[str, VirtualChannel] = {}
        self.cut: set[tuple[str, str]] = set()
        self.silent: set[tuple[str, str]] = set()
        self.silenced: set[tuple[str, str]] = set()
        self.lost_first: dict[str, set[tuple[str, str]]] = {kind: set() for kind in FIRST_COPIES}

    @staticmethod
    def address(label: str) -> str:
        """Return the address at which the process with that label listens."""
        return f"tcp://{label}:1"

    def stalled(self, label: str, other: str) -> bool:
        """Whether bytes of KV cannot cross between two processes."""
        return not (self.cut | self.silent).isdisjoint([(label[0], other[0]), (other[0], label[0])])

    def reconnect(self, engine: str, other: str) -> None:
        """Make all connections between two engines anew."""
        for channel in self.channels.values():
            for address in [a for a in channel.made if {channel.process.label[0], _label(a)[0]} == {engine, other}]:
                channel.disconnect(address)

    def carry(self, source: str, target: str, message: messages.Message, deliver: Callable[[bytes], bool]) -> None:
        """Send a message from one label to another. ``deliver`` returns False where no process listens; then it may be tried again."""
        world, profile = self.world, self.world.profile
        data = messages.encode(message)
        world.digest = hash((world.digest, len(data)))
        world.seen[type(message).__name__] += 1
        request = world.requests.get(getattr(message, "token", ""), "")
        what = world.number(f"{source}>{target} {type(message).__name__} {request}".rstrip())
        chance = world.draw(what)
        if (source[0], target[0]) in self.cut:
            world.faults["message cut off"] += 1
            world.say(f"{what}{_details(message)}: cut off")
            return
        if world.strikes("message lost", what, profile.lost, chance):
            world.say(f"{what}{_details(message)}: lost")
            return
        twice = world.strikes("message repeated", what, profile.repeated, chance)
        # A socket keeps some of what it cannot send until a process listens.
        kept = _TRIES if chance.random() < 0.5 else 0
        for _ in range(2 if twice else 1):
            seconds = world.delay_s(chance, profile.delay_s)
            if world.strikes("message late", what, profile.late, chance):
                seconds = chance.uniform(_AGAIN_S, _LATE_S)
            world.say(f"{what}{_details(message)}: there in {seconds:.4f} s")
            world.after(seconds, lambda: self._arrive(deliver, data, kept))

    def _arrive(self, deliver: Callable[[bytes], bool], data: bytes, tries: int) -> None:
        if not deliver(data) and tries:
            self.world.after(_AGAIN_S, lambda: self._arrive(deliver, data, tries - 1))


class VirtualChannel:
    """`kvxfer.channel.base.Channel` through the network.

    Attributes:
        made: its own connections by address, each under a name that no other ever has.
        callers: channels that connected to it, by the name of the connection.
    """

    def __init__(self, process: Process) -> None:
        self.address: str = process.address
        self.loopback: bool = False
        self.process: Process = process
        self.callers: dict[bytes, VirtualChannel] = {}
        self.made: dict[str, bytes] = {}
        self._inbox: deque[Inbound] = deque()
        self._numbers = itertools.count()
        self._closed: Counter[str] = Counter()
        """Times that the connection to an address was closed."""
        process.network.channels[self.address] = self
        process.deaths.append(self._ended)

    def wake(self) -> None:
        """See `Channel`."""
        self.process.wake()

    def send(self, address: str, message: messages.Message) -> None:
        """See `Channel`."""
        if not address.startswith("tcp://"):
            raise ConfigError(f"cannot connect to {address!r}")
        network, closed, kept = self.process.network, self._closed[address], False

        def deliver(data: bytes) -> bool:
            nonlocal kept
            if kept and self._closed[address] > closed:
                return True  # a socket that is closed keeps nothing
            target = network.channels.get(address)
            if target is None or not target.process.alive:
                kept = True
                return not self.process.alive
            connection = self.made.setdefault(address, f"{self.process.name}#{next(self._numbers)}".encode())
            target.callers[connection] = self
            target.take(connection, data)
            return True

        network.carry(self.process.label, _label(address), message, deliver)

    def reply(self, connection: bytes, message: messages.Message) -> None:
        """See `Channel`."""
        caller = self.callers.get(connection)
        if caller is None:
            return

        def deliver(data: bytes) -> bool:
            if caller.process.alive and caller.made.get(self.address) == connection:
                caller.take(self.address, data)
            return True

        self.process.network.carry(self.process.label, caller.process.label, message, deliver)

    def disconnect(self, address: str) -> None:
        """See `Channel`."""
        self._closed[address] += 1
        connection = self.made.pop(address, None)
        target = self.process.network.channels.get(address)
        if connection is not None and target is not None and target.process.alive:
            target.gone(connection)

    def _ended(self) -> None:
        for address in list(self.made):
            self.disconnect(address)

    def receive(self, timeout_s: float | None) -> list[Inbound]:  # noqa: ARG002
        """See `Channel`."""
        arrived, self._inbox = list(self._inbox), deque()
        return arrived

    def close(self) -> None:
        """See `Channel`."""
        channels = self.process.network.channels
        if channels.get(self.address) is self:
            del channels[self.address]

    def gone(self, connection: bytes) -> None:
        """Note that a connection has ended."""
        self._inbox.append(Inbound(connection, None, gone=True))
        self.process.wake()

    def take(self, source: bytes | str, data: bytes) -> None:
        """Take a message that has arrived."""
        self._inbox.append(Inbound(source, messages.decode(data)))
        self.process.wake()


def _label(address: str) -> str:
    return address.removeprefix("tcp://").partition(":")[0]


def _details(message: messages.Message) -> str:
    """Return the details of a message that help to follow a trace."""
    if isinstance(message, messages.Grant):
        return "" if message.complete else ", more to come"
    if isinstance(message, messages.Refused):
        return f", {message.code}"
    if isinstance(message, (messages.StageChunk, messages.ChunkReady)):
        return f", chunk {message.number}"
    if isinstance(message, messages.Released):
        return "" if message.was_live else ", it had ended"
    return ""

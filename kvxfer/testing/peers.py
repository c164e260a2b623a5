# SPDX-License-Identifier: Apache-2.0
"""Peers for tests: an agent that lives in its own thread, or in its own process (spawned, never forked).

Both are driven in the same way, by calls over a pipe that run in the peer's own thread: an agent belongs to the thread
that made it. The content of a peer's memory comes from the peer itself, over the pipe and never through the adapter.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from kvxfer.testing.actor import Actor
from kvxfer.testing.child import Child
from kvxfer.testing.oracle import HostSpan
from kvxfer.testing.remote import ChildGoneError, RemoteObject, serve

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.agents.base import TransferAgent
    from kvxfer.agents.capabilities import Op
    from kvxfer.agents.flights import FlightState
    from kvxfer.memory.spans import Memory
    from kvxfer.testing.actor import Spans
    from kvxfer.testing.oracle import OracleMemory

ANSWER_TIMEOUT_S = 60.0
"""Deadline of a call. Starting a process and its transfer engine is part of it."""

_POLL_INTERVAL_S = 0.0005
_GOODBYE_S = 5.0


class RemotePeer(ABC):
    """An `Actor` that lives elsewhere. Use it from one thread."""

    name: str
    """Name of its agent."""
    remote: RemoteObject

    def call(self, method: str, *arguments: object, timeout_s: float | None = None, **named: object) -> Any:
        """Call a method of the `Actor` in the peer's thread; returns its answer, or raises what it raised.

        Raises:
            ChildGoneError: the peer has ended, or did not answer in time.
        """
        return self.remote.call("run", method, arguments, named, timeout_s=timeout_s)

    def allocate(self, nbytes: int, seed: int, *, register: bool = True) -> Memory:
        """Call `Actor.allocate`; the address is one in the peer's memory."""
        memory: Memory = self.call("allocate", nbytes, seed, register=register)
        return memory

    def register(self, memory: Memory) -> None:
        """Call `Actor.register`."""
        self.call("register", memory)

    def deregister(self, memory: Memory) -> None:
        """Call `Actor.deregister`."""
        self.call("deregister", memory)

    def content(self, memory: Memory) -> bytes:
        """Call `Actor.content`."""
        content: bytes = self.call("content", memory)
        return content

    def digest(self, memory: Memory) -> bytes:
        """Call `Actor.digest`."""
        digest: bytes = self.call("digest", memory)
        return digest

    def fill(self, memory: Memory, data: bytes) -> None:
        """Call `Actor.fill`."""
        self.call("fill", memory, data)

    def intact(self) -> bool:
        """Call `Actor.intact`."""
        return bool(self.call("intact"))

    def describe(self) -> bytes:
        """Call `Actor.describe`."""
        info: bytes = self.call("describe")
        return info

    def connect(self, info: bytes) -> str:
        """Call `Actor.connect`."""
        return str(self.call("connect", info))

    def submit(self, op: Op, peer: str, spans: Spans, timeout_s: float) -> int:
        """Call `Actor.submit`."""
        return int(self.call("submit", op, peer, spans, timeout_s))

    def outcome(self, number: int) -> tuple[FlightState, str]:
        """Call `Actor.outcome`."""
        outcome: tuple[FlightState, str] = self.call("outcome", number)
        return outcome

    def close_agent(self) -> None:
        """Call `Actor.close`; the peer itself goes on."""
        self.call("close")

    def renew(self, name: str) -> None:
        """Close the agent and make another one in the same thread; all memory is forgotten."""
        self.call("renew", name)
        self.name = name

    @abstractmethod
    def stall(self) -> None:
        """Stop all work until `resume`."""

    @abstractmethod
    def resume(self) -> None:
        """End of `stall`; harmless without one."""

    @abstractmethod
    def stop(self) -> None:
        """End the peer, in any state. Idempotent."""


class ThreadPeer(RemotePeer):
    """A peer in a thread of this process.

    Raises:
        Exception: what ``make_agent`` raised.
    """

    def __init__(
        self,
        make_agent: Callable[[str], TransferAgent],
        name: str,
        make_memory: Callable[[int], OracleMemory] = HostSpan,
    ) -> None:
        self.name: str = name
        ours, theirs = multiprocessing.Pipe()
        self.remote: RemoteObject = RemoteObject(f"peer {name}", ours, raises=(Exception,), answer_s=ANSWER_TIMEOUT_S)
        # daemon: a peer that hangs inside a transfer engine must not keep the test run from ending.
        arguments = (theirs, _PollingActor, (make_agent, name, make_memory))
        self._thread = threading.Thread(target=serve, args=arguments, name=f"peer {name}", daemon=True)
        self._thread.start()
        self.remote.ready()

    def stall(self) -> None:
        """Stop polling the agent."""
        self.call("stall")

    def resume(self) -> None:
        """Poll again."""
        self.call("resume")

    def stop(self) -> None:
        """Close the agent and end the thread. Raises the violation that the agent's last flights or its close show."""
        if self.remote.pipe.closed:
            return
        try:
            with contextlib.suppress(ChildGoneError):
                self.call("close")
        finally:
            self.remote.dismiss()
            self._thread.join(ANSWER_TIMEOUT_S)
            self.remote.pipe.close()
        assert not self._thread.is_alive(), f"{self.name} does not end: its agent's close or poll hangs"


class ProcessPeer(RemotePeer):
    """A peer in a spawned process of its own.

    Raises:
        TypeError: ``make_agent`` or ``make_memory`` is not importable by its name, so another process cannot find it.
        Exception: what ``make_agent`` raised in the process.
    """

    def __init__(
        self,
        make_agent: Callable[[str], TransferAgent],
        name: str,
        make_memory: Callable[[int], OracleMemory] = HostSpan,
    ) -> None:
        try:
            pickle.dumps((make_agent, make_memory))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(f"{make_agent} and {make_memory} have to be importable by name: {error}") from error
        self.name: str = name
        self.worn: bool = False
        """It was stalled or killed, or lost its agent: not to be used for another test."""
        self._child = Child(
            f"peer {name}",
            _PollingActor,
            make_agent,
            name,
            make_memory,
            raises=(Exception,),
            answer_s=ANSWER_TIMEOUT_S,
        )
        self.remote: RemoteObject = self._child
        try:
            self._child.ready()
        except ChildGoneError as error:
            self.stop()
            raise ChildGoneError(f"{error}: it died when it made its agent, or cannot import {make_agent}") from error
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """The process has not ended."""
        return self._child.alive

    def stall(self) -> None:
        """Stop every thread of the process (SIGSTOP); its kernel resources live on."""
        self.worn = True
        self._child.freeze()

    def peek(self, memory: Memory) -> bytes:
        """Read its memory of kind DRAM as it is at this moment, through the kernel: the process need not run for that.

        Raises:
            OSError: the process is dead, or this one may not look into it (a sandbox).
        """
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as its:  # noqa: PTH123
            its.seek(memory.address)
            return its.read(memory.nbytes)

    def resume(self) -> None:
        """End of `stall` (SIGCONT)."""
        self._child.thaw()

    def kill(self) -> None:
        """Kill the process (SIGKILL), also while it is stalled. Returns when it is dead."""
        self.worn = True
        self._child.kill()

    def stop(self) -> None:
        """End the process in order if it answers, else kill it. Raises the violation that the agent's last flights show."""
        if self.remote.pipe.closed:
            return
        self.resume()
        try:
            # One that takes longer is killed: tests of `close` look at the other side, in their own thread.
            if self.alive:
                with contextlib.suppress(ChildGoneError):
                    self.call("close", timeout_s=_GOODBYE_S)
        finally:
            self.worn = True
            self._child.close(_GOODBYE_S)


class _PollingActor:
    """The far end of a peer: an `Actor` whose agent is polled while no call is there, as an endpoint's data thread would."""

    def __init__(
        self,
        make_agent: Callable[[str], TransferAgent],
        name: str,
        make_memory: Callable[[int], OracleMemory],
    ) -> None:
        self._make_agent, self._make_memory = make_agent, make_memory
        self._stalled = self._closed = False
        self._broken: Exception | None = None
        self._actor = Actor(make_agent, name, make_memory)

    def run(self, method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> object:
        """Call a method of the actor, or of this class. A violation that `idle` found is raised here."""
        self._closed = self._closed or method == "close"
        if self._broken is not None:
            raise self._broken
        mine: dict[str, Callable[..., object]] = {"stall": self._stall, "resume": self._resume, "renew": self._renew}
        run: Callable[..., object] = mine[method] if method in mine else getattr(self._actor, method)
        return run(*arguments, **named)

    def idle(self) -> float | None:
        """Poll the agent."""
        if self._stalled or self._closed:
            return None
        try:
            self._actor.log.poll()
        except Exception as error:  # noqa: BLE001 - raised by the next call
            self._broken = self._broken or error
        return _POLL_INTERVAL_S

    def close(self) -> None:
        """End."""
        with contextlib.suppress(Exception):
            self._actor.agent.close()

    def _stall(self) -> None:
        self._stalled = True

    def _resume(self) -> None:
        self._stalled = False

    def _renew(self, name: str) -> None:
        self._actor.close()
        self._actor = Actor(self._make_agent, name, self._make_memory)
        self._closed = False

# SPDX-License-Identifier: Apache-2.0
"""Peers for tests: an agent that lives in its own thread, or in its own process (spawned, never forked).

Both are driven in the same way, by calls over a pipe that run in the peer's own thread: an agent belongs to the thread
that made it. While there is nothing to do the peer polls its agent, as an endpoint's data thread would. What a peer's
memory holds is told by the peer itself, over the pipe and never through the adapter.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from kvxfer.testing.actor import Actor
from kvxfer.testing.eventually import eventually
from kvxfer.testing.oracle import HostSpan

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from kvxfer.agents.base import TransferAgent
    from kvxfer.agents.capabilities import Op
    from kvxfer.agents.flights import FlightState
    from kvxfer.memory.spans import Memory
    from kvxfer.testing.actor import Spans
    from kvxfer.testing.oracle import OracleMemory

ANSWER_TIMEOUT_S = 60.0
"""A peer that has not answered by then is stuck. Starting a process and its transfer engine is part of it."""

_POLL_INTERVAL_S = 0.0005
_GOODBYE_S = 5.0


class PeerGoneError(AssertionError):
    """The peer's thread or process ended, or does not answer."""


class PeerRaisedError(AssertionError):
    """The peer raised something that cannot travel over a pipe; the message says what."""


class Peer(ABC):
    """An `Actor` that lives elsewhere. Use it from one thread."""

    name: str
    """Of its agent."""

    _pipe: Connection
    _calls: int = 0

    def call(self, method: str, *arguments: object, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """Run ``Actor.method(*arguments)`` in the peer's thread and return its answer, or raise what it raised.

        Raises:
            PeerGoneError: it is not there, or did not answer in time.
        """
        self._calls += 1
        number = None
        try:
            self._pipe.send((self._calls, method, arguments))
            # An answer to an earlier call, that came after its time, is passed over.
            while number != self._calls:
                if not self._pipe.poll(timeout_s):
                    raise PeerGoneError(f"{self.name} did not answer {method} within {timeout_s} s")
                number, raised, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise PeerGoneError(f"{self.name} is gone: {error!r}") from error
        if raised:
            raise answer
        return answer

    def allocate(self, nbytes: int, seed: int, *, register: bool = True) -> Memory:
        """As `Actor.allocate`; the address is one in the peer's memory."""
        memory: Memory = self.call("allocate_", nbytes, seed, register)
        return memory

    def register(self, memory: Memory) -> None:
        """As `Actor.register`."""
        self.call("register", memory)

    def deregister(self, memory: Memory) -> None:
        """As `Actor.deregister`."""
        self.call("deregister", memory)

    def content(self, memory: Memory) -> bytes:
        """As `Actor.content`."""
        content: bytes = self.call("content", memory)
        return content

    def digest(self, memory: Memory) -> bytes:
        """As `Actor.digest`."""
        digest: bytes = self.call("digest", memory)
        return digest

    def fill(self, memory: Memory, data: bytes) -> None:
        """As `Actor.fill`."""
        self.call("fill", memory, data)

    def intact(self) -> bool:
        """As `Actor.intact`."""
        return bool(self.call("intact"))

    def describe(self) -> bytes:
        """As `Actor.describe`."""
        info: bytes = self.call("describe")
        return info

    def connect(self, info: bytes) -> str:
        """As `Actor.connect`."""
        return str(self.call("connect", info))

    def submit(self, op: Op, peer: str, spans: Spans, timeout_s: float) -> int:
        """As `Actor.submit`."""
        return int(self.call("submit", op, peer, spans, timeout_s))

    def outcome(self, number: int) -> tuple[FlightState, str]:
        """As `Actor.outcome`."""
        outcome: tuple[FlightState, str] = self.call("outcome", number)
        return outcome

    def close_agent(self) -> None:
        """As `Actor.close`; the peer itself lives on."""
        self.call("close")

    @abstractmethod
    def stall(self) -> None:
        """It stops doing anything at all, until `resume`."""

    @abstractmethod
    def resume(self) -> None:
        """End of `stall`; harmless without one."""

    @abstractmethod
    def stop(self) -> None:
        """End it, whatever state it is in. Idempotent."""


class ThreadPeer(Peer):
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
        self._pipe, theirs = multiprocessing.Pipe()
        # daemon: a peer that hangs inside a transfer engine must not keep the test run from ending.
        self._thread = threading.Thread(
            target=_live, args=(theirs, make_agent, name, make_memory), name=f"peer {name}", daemon=True
        )
        self._thread.start()
        self.call("started")

    def stall(self) -> None:
        """It stops polling its agent."""
        self.call("acquire")

    def resume(self) -> None:
        """It polls again."""
        self.call("unhold")

    def stop(self) -> None:
        """Its thread closes the agent and ends. Raises what the agent's last flights or its close have to complain of."""
        if self._pipe.closed:
            return
        try:
            with contextlib.suppress(PeerGoneError):
                self.call("close")
        finally:
            with contextlib.suppress(OSError):
                self._pipe.send((0, "stop", ()))
            self._thread.join(ANSWER_TIMEOUT_S)
            self._pipe.close()
        assert not self._thread.is_alive(), f"{self.name} does not end: its agent's close or poll hangs"


class ProcessPeer(Peer):
    """A peer in a spawned process of its own.

    Raises:
        TypeError: ``make_agent`` or ``make_memory`` is not importable by its name, so another process cannot find it.
        Exception: what ``make_agent`` raised over there.
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
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(
            target=_live, args=(theirs, make_agent, name, make_memory), name=f"peer {name}", daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            self.call("started")
        except PeerGoneError as error:
            self.stop()
            raise PeerGoneError(f"{error}: it died when it made its agent, or cannot import {make_agent}") from error
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """The process has not ended."""
        return self._process.is_alive()

    def stall(self) -> None:
        """SIGSTOP: every thread of it stands still, but its kernel resources live on. Returns when it stands."""
        self.worn = True
        os.kill(self.pid, signal.SIGSTOP)
        eventually(lambda: _state_of(self.pid) in "TtZX", what=f"process {self.pid} stands still")

    def peek(self, memory: Memory) -> bytes:
        """What is in its memory of kind DRAM at this moment, told by the kernel: it need not run for that.

        Raises:
            OSError: it is dead, or this process may not look into it (a sandbox).
        """
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as its:  # noqa: PTH123
            its.seek(memory.address)
            return its.read(memory.nbytes)

    def resume(self) -> None:
        """SIGCONT."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)

    def renew(self, name: str) -> None:
        """Close the agent and make another one in the same process; all memory is forgotten."""
        self.call("renew", name)
        self.name = name

    def kill(self) -> None:
        """SIGKILL, also while it stands still. Returns when it is dead."""
        self.worn = True
        self._process.kill()
        self._process.join(ANSWER_TIMEOUT_S)

    def stop(self) -> None:
        """End it in order if it answers, else kill it. Raises what the agent's last flights have to complain of."""
        if self._pipe.closed:
            return
        self.resume()
        try:
            # One that takes longer is killed: tests of `close` look at the other side, in their own thread.
            with contextlib.suppress(PeerGoneError):
                self.call("close", timeout_s=_GOODBYE_S)
        finally:
            with contextlib.suppress(OSError):
                self._pipe.send((0, "stop", ()))
            self._process.join(_GOODBYE_S)
            self.kill()
            self._pipe.close()


def _state_of(pid: int) -> str:
    """One letter of /proc: T is stopped."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:  # noqa: PTH123
            return stat.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


class _Resident(Actor):
    """An actor that is told what to do over a pipe."""

    held = False

    def allocate_(self, nbytes: int, seed: int, register: bool) -> Memory:
        return self.allocate(nbytes, seed, register=register)

    def started(self) -> None:
        pass

    def acquire(self) -> None:
        self.held = True

    def unhold(self) -> None:
        self.held = False


def _live(
    pipe: Connection,
    make_agent: Callable[[str], TransferAgent],
    name: str,
    make_memory: Callable[[int], OracleMemory],
) -> None:
    """Body of a peer's thread or process."""
    with pipe:
        try:
            actor = _Resident(make_agent, name, make_memory)
        except Exception as error:  # noqa: BLE001 - it is raised on the other side
            with contextlib.suppress(EOFError, OSError):
                pipe.send((pipe.recv()[0], True, _portable(error)))
            return
        closed = False
        # The broken promise of a flight is told to whoever calls next, it does not end the peer in silence.
        broken: Exception | None = None
        while True:
            while not actor.held and not closed and not pipe.poll(_POLL_INTERVAL_S):
                try:
                    actor.log.poll()
                except Exception as error:  # noqa: BLE001 - see above
                    broken = broken or error
            try:
                number, method, arguments = pipe.recv()
            except (EOFError, OSError):
                break
            if method == "stop":
                break
            closed = closed or method == "close"
            try:
                if broken is not None:
                    raise broken
                if method == "renew":
                    actor.close()
                    actor, closed = _Resident(make_agent, arguments[0], make_memory), False
                    method, arguments = "started", ()
                answer: tuple[int, bool, object] = (number, False, getattr(actor, method)(*arguments))
            except Exception as error:  # noqa: BLE001 - it is raised on the other side
                answer = number, True, _portable(error)
            pipe.send(answer)
        with contextlib.suppress(Exception):
            actor.agent.close()


def _portable(error: Exception) -> Exception:
    try:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes, a moment old
    except Exception:  # noqa: BLE001 - any failure means the same
        copy = None
    return error if type(copy) is type(error) else PeerRaisedError(f"{type(error).__name__}: {error}")

# SPDX-License-Identifier: Apache-2.0
"""Agents that are wrong on purpose, each in one way. `test_suite_catches.py` runs the suite on them and expects it to fail.

White-box: what is wrong is often what the base class keeps for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import threading
import time
from dataclasses import replace
from typing import ClassVar

import msgspec

from kvxfer.agents.capabilities import Op, Reach
from kvxfer.agents.inproc import InprocAgent
from kvxfer.errors import PeerConflictError, TransferFailedError
from kvxfer.memory.spans import Descriptors
from kvxfer.testing import AgentSuite
from tests.conformance.socket_agent import SocketAgent

_MIB = 1 << 20


def _targets(op, spans):
    return (spans.local if op is Op.READ else spans.remote).tolist()


class FlipsABit(InprocAgent):
    def _submit(self, op, peer, spans, local, remote):
        super()._submit(op, peer, spans, local, remote)
        last = _targets(op, spans)[-1] + int(spans.nbytes[-1]) - 1
        ctypes.c_ubyte.from_address(last).value ^= 1


class MovesOneByteLess(InprocAgent):
    def _submit(self, op, peer, spans, local, remote):
        fewer = spans.nbytes - (spans.nbytes > 1).astype(spans.nbytes.dtype)
        super()._submit(op, peer, Descriptors(spans.local, spans.remote, fewer), local, remote)


class MovesOneByteMore(InprocAgent):
    def _submit(self, op, peer, spans, local, remote):
        super()._submit(op, peer, spans, local, remote)
        for address, nbytes in zip(_targets(op, spans), spans.nbytes.tolist(), strict=True):
            ctypes.c_ubyte.from_address(address + nbytes).value ^= 0xFF


class MovesTheFirstSpanOnly(InprocAgent):
    def _submit(self, op, peer, spans, local, remote):
        first = Descriptors(spans.local[:1], spans.remote[:1], spans.nbytes[:1])
        super()._submit(op, peer, first, local, remote)


class SwapsReadAndWrite(InprocAgent):
    def _submit(self, op, peer, spans, local, remote):
        super()._submit(Op.WRITE if op is Op.READ else Op.READ, peer, spans, local, remote)


class RemembersWhatItRead(InprocAgent):
    def _submit(self, op, peer, spans, local, remote):
        if op is Op.WRITE:
            super()._submit(op, peer, spans, local, remote)
            return
        seen = self.__dict__.setdefault("seen", {})
        key = (str(peer), tuple(spans.remote.tolist()))
        if key not in seen:
            super()._submit(op, peer, spans, local, remote)
            seen[key] = [
                ctypes.string_at(a, n) for a, n in zip(_targets(op, spans), spans.nbytes.tolist(), strict=True)
            ]
        for address, content in zip(_targets(op, spans), seen[key], strict=True):
            ctypes.memmove(address, content, len(content))


class _Delayed(InprocAgent):
    """An agent that copies in a thread, a while after submit; correct unless a subclass breaks it."""

    delay_s = 0.05

    def _submit(self, op, peer, spans, local, remote):
        def copy():
            time.sleep(self.delay_s)
            InprocAgent._submit(self, op, peer, spans, local, remote)

        thread = threading.Thread(target=copy, daemon=True)
        thread.start()
        return thread

    def _poll(self, handle):
        return not handle.is_alive()


class IsDoneTooEarly(_Delayed):
    def _poll(self, handle):
        return True


class WritesAfterClose(_Delayed):
    delay_s = 0.3

    def _abandon(self, handle):
        return False

    capabilities = replace(InprocAgent.capabilities, quiet_on_abandon=False)


class WritesAfterItGaveUp(_Delayed):
    delay_s = 0.8

    def _abandon(self, handle):
        return True


class LeavesQuarantineAlthoughQuiet(_Delayed):
    delay_s = 0.8

    def _abandon(self, handle):
        return False


class IsNeverDone(InprocAgent):
    def _poll(self, handle):
        return False


class CrashesOnGarbage(InprocAgent):
    def _connect(self, name, native):
        if native != name.encode():
            raise RuntimeError("vendor error 17")
        return name


class AcceptsGarbage(InprocAgent):
    def _connect(self, name, native):
        return name


class AcceptsATwin(SocketAgent):
    def _connect(self, name, native):
        self._known.pop(name, None)
        return super()._connect(name, native)


class NeverForgetsAPeer(InprocAgent):
    def _connect(self, name, native):
        met = self.__dict__.setdefault("met", set())
        if name in met:
            raise PeerConflictError(name)
        met.add(name)
        return super()._connect(name, native)


class RaisesOnDisconnect(InprocAgent):
    def _disconnect(self, peer):
        raise OSError("vendor error 18")


class RefusesMemoryItHadOnce(InprocAgent):
    def _register(self, memory):
        had = self.__dict__.setdefault("had", set())
        if memory in had:
            raise KeyError(memory)
        had.add(memory)
        super()._register(memory)


class EndsTwice(InprocAgent):
    def poll(self):
        ended = super().poll()
        again, self.__dict__["before"] = self.__dict__.get("before", []), ended
        return ended + again


class LosesAFlight(InprocAgent):
    def poll(self):
        return super().poll()[1:]


class LeaksAThread(InprocAgent):
    def __init__(self, name):
        super().__init__(name)
        threading.Thread(target=threading.Event().wait, daemon=True).start()


class LeaksADescriptor(InprocAgent):
    def __init__(self, name):
        super().__init__(name)
        os.dup(0)


class ListensElsewhere(InprocAgent):
    loopback_only = True

    def __init__(self, name):
        super().__init__(name)
        self.listener = socket.create_server(("0.0.0.0", 0))

    def _close(self):
        self.listener.close()
        super()._close()


class Spins(InprocAgent):
    def __init__(self, name):
        super().__init__(name)
        self.over = False
        threading.Thread(target=self.spin, daemon=True).start()

    def spin(self):
        while not self.over:
            pass

    def _close(self):
        self.over = True
        super()._close()


class SleepsInPoll(InprocAgent):
    def _progress(self):
        time.sleep(0.05)


class ChecksNothing(InprocAgent):
    """Checks nothing, and declares ``remote_checked`` all the same."""

    def _submit(self, op, peer, spans, local, remote):
        for here, there, nbytes in zip(spans.local.tolist(), spans.remote.tolist(), spans.nbytes.tolist(), strict=True):
            target, source = (here, there) if op is Op.READ else (there, here)
            ctypes.memmove(target, source, nbytes)


class ClaimsToReachOtherProcesses(InprocAgent):
    capabilities = replace(InprocAgent.capabilities, reach=Reach.HOST)


class _TooLongError(TransferFailedError):
    quiet = True


class FailsLongLists(InprocAgent):
    def _submit(self, op, peer, spans, local, remote):
        if len(spans) > 4096:
            raise _TooLongError("too many")
        super()._submit(op, peer, spans, local, remote)


class JamsWhenItIsFlooded(_Delayed):
    """Takes eight lists at a time, and after more of them nothing at all."""

    delay_s = 0.2
    running, jammed = 0, False

    def _submit(self, op, peer, spans, local, remote):
        self.running += 1
        self.jammed = self.jammed or self.running > 8
        if self.jammed:
            raise _TooLongError("the queue has overflown")
        return super()._submit(op, peer, spans, local, remote)

    def _release(self, handle):
        self.running -= 1


class AppliesLongWritesLate(InprocAgent):
    """Reports a long WRITE as done while it is on its way, so that a cell written after it gets there first."""

    def _submit(self, op, peer, spans, local, remote):
        if op is Op.READ or spans.total_nbytes < 4096:
            super()._submit(op, peer, spans, local, remote)
            return
        submit = super()._submit
        threading.Timer(0.2, submit, (op, peer, spans, local, remote)).start()


class KnowsPeersByTheirThread(InprocAgent):
    """Takes an agent for the one before it at the same address."""

    def __init__(self, name):
        super().__init__(name)
        self._address, self._first = threading.get_ident(), {}

    def _describe(self):
        return f"{self.name} {self._address}".encode()

    def _connect(self, name, native):
        told, _, address = native.decode().partition(" ")
        first = self._first.setdefault(address, told)
        return super()._connect(first, first.encode())


class WaitsForNewPeers(SocketAgent):
    """Holds up everything until a new peer has answered."""

    def _submit(self, op, peer, spans, local, remote):
        met = self.__dict__.setdefault("met", set())
        if peer.name not in met:
            met.add(peer.name)
            request = msgspec.msgpack.encode((peer.name, Op.READ, []))
            with socket.create_connection((peer.host, peer.port)) as first, contextlib.suppress(TimeoutError):
                first.settimeout(11.0)
                first.sendall(len(request).to_bytes(4, "big") + request)
                first.recv(1)
        return super()._submit(op, peer, spans, local, remote)


class ClosesWithTheInterpretersLock(InprocAgent):
    def _close(self):
        ctypes.PyDLL(None).usleep(400_000)
        super()._close()


class IsDoneBeforeTheWriteIsApplied(SocketAgent):
    """Reports its bytes as delivered when the socket has taken them."""

    def _drive(self, transfer):
        if not transfer.into and not transfer.out:
            return True
        return super()._drive(transfer) if transfer.into else self._send(transfer)

    def _send(self, transfer):
        while transfer.out:
            sent = transfer.socket.send(transfer.out[0])
            transfer.out[0] = transfer.out[0][sent:]
            if not transfer.out[0]:
                del transfer.out[0]
        return True

    def _release(self, handle):
        pass  # Closed with the agent only: a socket that is closed before its answer came takes its bytes back.

    def _close(self):
        for transfer in self._open:
            transfer.socket.close()
        super()._close()


def _suite(kind: type, **settings: object) -> type[AgentSuite]:
    return type(
        f"Test{kind.__name__}", (AgentSuite,), {"make_agent": staticmethod(kind), "__module__": __name__} | settings
    )


_IMPATIENT = {IsNeverDone, LosesAFlight}

for _kind in list(globals().values()):
    if isinstance(_kind, type) and issubclass(_kind, InprocAgent | SocketAgent) and _kind.__module__ == __name__:
        globals()[f"Test{_kind.__name__}"] = _suite(_kind, **({"patience_s": 0.5} if _kind in _IMPATIENT else {}))


class TestDeviates(AgentSuite):
    """Not broken: the reference agent with one real deviation, and one declared without need."""

    make_agent = staticmethod(FailsLongLists)
    deviations: ClassVar = {
        "test_longer_list_than_the_engine_takes[read-thread]": "takes 4,096 spans and says nothing of it",
        "test_one_span": "does in truth",
    }

# SPDX-License-Identifier: Apache-2.0
"""A small, slow and correct agent over TCP, to test the suite's processes without a transfer engine.

The side that submits drives its sockets in `poll` only, so what it gave up can write nothing: a closed socket delivers
no bytes. The other side is served by one thread for all connections, which copies under a lock after a look at what is
registered at that moment.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import selectors
import socket
import threading
from dataclasses import dataclass, field

import msgspec

from kvxfer.agents.base import TransferAgent
from kvxfer.agents.capabilities import Capabilities, Op, Reach
from kvxfer.errors import PeerConflictError, PeerInfoError, PeerLostError, TransferFailedError
from kvxfer.memory.spans import Descriptors, Memory, MemoryKind

_PIECE_NBYTES = 1 << 20
_TURN_NBYTES = 8 << 20
"""Most bytes that one poll moves, so that it stays short."""

_OK, _REFUSED = b"k", b"r"


class _Native(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    name: str
    host: str
    port: int
    check: bytes


class _Request(msgspec.Struct, array_like=True):
    owner: str
    op: Op
    spans: list[tuple[int, int]]


def _check_of(name: str, port: int) -> bytes:
    return hashlib.sha256(f"{name}:{port}".encode()).digest()[:8]


@dataclass(eq=False)
class _Transfer:
    """A transfer: bytes to send, then one byte of answer, then bytes to receive."""

    socket: socket.socket
    out: list[memoryview]
    into: list[memoryview]
    answer: bytes = b""


def _view(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


def _chunks(spans: list[tuple[int, int]]) -> list[memoryview]:
    views = []
    for address, nbytes in spans:
        views += [_view(address + at, min(_PIECE_NBYTES, nbytes - at)) for at in range(0, nbytes, _PIECE_NBYTES)]
    return views


class SocketAgent(TransferAgent):
    """An agent that moves bytes between processes over TCP."""

    adapter = "socket"
    capabilities = Capabilities(
        ops=frozenset({Op.READ, Op.WRITE}),
        kinds=frozenset({MemoryKind.DRAM}),
        reach=Reach.NETWORK,
        quiet_on_abandon=True,
        remote_checked=True,
        detects_death=True,
        max_descriptors=1000,
        max_submit_nbytes=24 << 20,
    )

    def __init__(self, name):
        super().__init__(name)
        self._server = _Server(name)
        self._known = {}
        self._open = set()

    def _register(self, memory):
        with self._server.lock:
            self._server.regions.append(memory)

    def _deregister(self, registration, memory):
        with self._server.lock:
            self._server.regions.remove(memory)

    def _describe(self):
        port = self._server.port
        return msgspec.msgpack.encode(_Native(self.name, "127.0.0.1", port, _check_of(self.name, port)))

    def _connect(self, name, native):
        try:
            told = msgspec.msgpack.decode(native, type=_Native)
        except (msgspec.DecodeError, ValueError) as error:
            raise PeerInfoError(str(error)) from error
        if told.name != name or told.check != _check_of(told.name, told.port):
            raise PeerInfoError(f"not the description of {name!r}")
        if self._known.setdefault(name, told.port) != told.port:
            raise PeerConflictError(f"two agents are called {name!r}")
        return told

    def _disconnect(self, peer):
        self._known.pop(peer.name, None)

    def _submit(self, op, peer, spans: Descriptors, local, remote):
        connection = socket.socket()
        connection.settimeout(0)
        connection.connect_ex((peer.host, peer.port))
        far = list(zip(spans.remote.tolist(), spans.nbytes.tolist(), strict=True))
        near = list(zip(spans.local.tolist(), spans.nbytes.tolist(), strict=True))
        request = msgspec.msgpack.encode(_Request(peer.name, op, far))
        head = memoryview(len(request).to_bytes(4, "big") + request)
        transfer = _Transfer(connection, [head], [])
        if op is Op.READ:
            transfer.into = _chunks(near)
        else:
            transfer.out += _chunks(near)
        self._open.add(transfer)
        return transfer

    def _poll(self, handle):
        try:
            return self._drive(handle)
        except BlockingIOError:
            return False
        except OSError as error:
            if handle.answer == _REFUSED:
                raise _RefusedError("the peer does not have this memory registered") from error
            raise _BrokenError(f"the connection broke: {error}") from error

    def _drive(self, transfer):
        moved = 0
        try:
            while transfer.out and moved < _TURN_NBYTES:
                moved += _take(transfer.out, transfer.socket.send(transfer.out[0]))
        except BlockingIOError:
            raise
        except OSError:
            # The peer may have refused what was only half sent: its reason may be waiting.
            with contextlib.suppress(OSError):
                transfer.answer = transfer.answer or transfer.socket.recv(1)
            raise
        if transfer.out:
            return False
        if not transfer.answer:
            transfer.answer = transfer.socket.recv(1)
        if transfer.answer != _OK:
            raise ConnectionResetError("no answer" if not transfer.answer else "refused")
        while transfer.into and moved < _TURN_NBYTES:
            count = transfer.socket.recv_into(transfer.into[0])
            if not count:
                raise ConnectionResetError("the peer hung up")
            moved += _take(transfer.into, count)
        return not transfer.into

    def _release(self, handle):
        handle.socket.close()
        self._open.discard(handle)

    def _abandon(self, handle):
        self._release(handle)
        return True

    def _close(self):
        for transfer in list(self._open):
            self._release(transfer)
        self._server.close()


def _take(views, count):
    views[0] = views[0][count:]
    if not views[0]:
        del views[0]
    return count


class _BrokenError(PeerLostError):
    """Always True: only `poll` receives, and it is not called again."""

    quiet = True


class _RefusedError(TransferFailedError):
    """The peer refused the transfer and moved nothing."""

    quiet = True


@dataclass(eq=False)
class _Served:
    socket: socket.socket
    inbox: bytearray = field(default_factory=bytearray)
    request: _Request | None = None
    into: list[memoryview] = field(default_factory=list)
    out: list[memoryview] = field(default_factory=list)


class _Server:
    """Server of the memory of one agent, in a thread."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lock = threading.Lock()
        self.regions: list[Memory] = []
        self.loopback_only = True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0)
        self.port = self._listener.getsockname()[1]
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._wake.send(b"x")
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._wake.close()
        self._selector.close()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    return
                if key.fileobj is self._listener:
                    with contextlib.suppress(OSError):
                        connection, _ = self._listener.accept()
                        connection.settimeout(0)
                        self._selector.register(connection, selectors.EVENT_READ, _Served(connection))
                    continue
                try:
                    self._turn(key.data)
                except BlockingIOError:
                    pass
                except OSError:
                    self._selector.unregister(key.fileobj)
                    key.fileobj.close()

    def _turn(self, served: _Served) -> None:
        if served.request is None:
            self._receive_request(served)
        if served.request is None:
            return
        with self.lock:
            # Checked again for each piece: a region may be deregistered half-way.
            if served.request.owner != self.name or not all(self._mine(*span) for span in served.request.spans):
                served.socket.send(_REFUSED)
                raise ConnectionResetError("refused")
            moved = 0
            while served.into and moved < _TURN_NBYTES:
                count = served.socket.recv_into(served.into[0])
                if not count:
                    raise ConnectionResetError("hung up")
                moved += _take(served.into, count)
            if served.into:
                return
            moved = 0
            while served.out and moved < _TURN_NBYTES:
                moved += _take(served.out, served.socket.send(served.out[0]))
            if not served.out:
                self._selector.modify(served.socket, selectors.EVENT_READ, _Served(served.socket))

    def _receive_request(self, served: _Served) -> None:
        want = 4 if len(served.inbox) < 4 else 4 + int.from_bytes(served.inbox[:4], "big")
        data = served.socket.recv(want - len(served.inbox))
        if not data:
            raise ConnectionResetError("hung up")
        served.inbox += data
        if len(served.inbox) < 4 or len(served.inbox) < 4 + int.from_bytes(served.inbox[:4], "big"):
            return
        try:
            request = msgspec.msgpack.decode(served.inbox[4:], type=_Request)
        except msgspec.DecodeError as error:
            raise ConnectionResetError("garbage") from error
        served.request, served.out = request, [memoryview(_OK)]
        if request.op is Op.READ:
            served.out += _chunks(request.spans)
            events = selectors.EVENT_WRITE
        else:
            served.into = _chunks(request.spans)
            events = selectors.EVENT_READ
        self._selector.modify(served.socket, events, served)

    def _mine(self, address: int, nbytes: int) -> bool:
        return any(m.address <= address and address + nbytes <= m.end for m in self.regions)

# SPDX-License-Identifier: Apache-2.0
"""A consumer and a producer that speak the wire as members of the fleet do, and use it to harm: ZeroMQ sockets and `kvxfer.protocol.messages`."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from kvxfer.planner.chunks import ChunkPlanner
from kvxfer.planner.plan import plan
from kvxfer.protocol import messages
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.testing import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.layout.spec import CacheSpec

SLOT_NBYTES = 8 << 20


def layout_of(spec: CacheSpec, tokens: int) -> CacheSpec:
    """The message by which a consumer with a cache like the producer's asks for the first tokens of a lease."""
    (part,) = plan([spec], spec).rank_plans
    chunk_planner = ChunkPlanner(part, "target", SLOT_NBYTES)
    first = next(chunk_planner.chunks([(0, tokens)] * len(spec.groups)))
    layout: CacheSpec = chunk_planner.layout(first).source
    return layout


def _as_bytes(message: messages.Message | bytes) -> bytes:
    return message if isinstance(message, bytes) else messages.encode(message)


class HostileConsumer:
    """One connection to a producer's control port, introduced as a consumer.

    Args:
        address: of the producer.
        heard: most messages that ZeroMQ keeps for this side; None: as many as come.
    """

    def __init__(self, address: str, *, heard: int | None = None, agent: str = "nixl") -> None:
        self.epoch = secrets.token_hex(8)
        self.name = f"hostile-{self.epoch[:4]}"
        self._agent = agent
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        if heard is not None:
            self._socket.setsockopt(zmq.RCVHWM, heard)
            self._socket.setsockopt(zmq.RCVBUF, 1 << 14)
        self._socket.connect(address)
        self.welcome = self.greet()

    def __enter__(self) -> HostileConsumer:
        return self

    def __exit__(self, *error: object) -> None:
        self._context.destroy(linger=0)

    def greet(self) -> messages.Welcome:
        """Introduce itself."""
        hello = messages.Hello(protocol=messages.PROTOCOL, name=self.name, epoch=self.epoch, rank=0, agent=self._agent)

        def welcomed() -> messages.Message | None:
            self._socket.send(messages.encode(hello))
            return self.hear(0.5, messages.Welcome)

        answer = eventually(welcomed, timeout_s=30, what="the producer answers Hello")
        assert isinstance(answer, messages.Welcome)
        return answer

    def say(self, message: messages.Message) -> None:
        """Send what is meant for the process that was met; dropped where ZeroMQ takes no more."""
        self.say_raw(messages.encode(msgspec.structs.replace(message, to=self.welcome.epoch)))

    def say_raw(self, data: bytes) -> None:
        """Send bytes."""
        with contextlib.suppress(zmq.Again):
            self._socket.send(data, zmq.NOBLOCK)

    def hear(self, timeout_s: float, kind: Any = object) -> messages.Message | None:
        """The next message of a kind; None if none comes in time."""
        until = time.monotonic() + timeout_s
        while self._socket.poll(max(0, int((until - time.monotonic()) * 1e3))):
            message = messages.decode(self._socket.recv())
            if isinstance(message, kind):
                return message
        return None

    def open(self, ref: LeaseRef) -> messages.Grant:
        """Take a lease."""

        def granted() -> messages.Message | None:
            self.say(messages.Acquire(token=ref.token))
            return self.hear(0.5, messages.Grant)

        answer = eventually(granted, timeout_s=30, what="the lease is granted")
        assert isinstance(answer, messages.Grant)
        return answer


class HostileProducer:
    """A control port whose answers to consumers a case chooses. It answers in a thread of its own.

    Args:
        welcome: how it introduces itself; asked for each Hello.
        grant: what it grants; asked for each Acquire. None: it says nothing.
        name: of the producer of its leases.

    Attributes:
        address: of the port.
        heard: how many messages came in.
    """

    def __init__(
        self,
        welcome: Callable[[], messages.Message | bytes],
        grant: Callable[[messages.Acquire], messages.Message | None],
        *,
        name: str = "hostile",
    ) -> None:
        self._welcome, self._grant = welcome, grant
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self.address = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._name = name
        self.heard = 0
        self._known: list[bytes] = []
        self._unasked: list[messages.Message | bytes] = []
        self._over = False
        self._thread = threading.Thread(target=self._run, name="hostile producer", daemon=True)
        self._thread.start()

    def __enter__(self) -> HostileProducer:
        return self

    def __exit__(self, *error: object) -> None:
        self._over = True
        self._thread.join(10)
        self._context.destroy(linger=0)

    def lease(self, num_tokens: int = 64) -> LeaseRef:
        """A reference to a lease of its own."""
        return LeaseRef.mint(producer=self._name, addresses=[self.address], num_tokens=num_tokens)

    def tell(self, message: messages.Message | bytes) -> None:
        """Send a message to each peer that has sent one."""
        self._unasked.append(message)

    def _run(self) -> None:
        while not self._over:
            while self._unasked:
                data = _as_bytes(self._unasked.pop(0))
                for connection in self._known:
                    self._socket.send_multipart([connection, data])
            if not self._socket.poll(20):
                continue
            connection, data = self._socket.recv_multipart()[:2]
            self.heard += 1
            if connection not in self._known:
                self._known.append(connection)
            try:
                message = messages.decode(data)
            except messages.WireError:
                continue
            answer: messages.Message | bytes | None = None
            if isinstance(message, messages.Hello):
                answer = self._welcome()
            elif isinstance(message, messages.Acquire):
                answer = self._grant(message)
            elif isinstance(message, messages.Renew):
                answer = messages.Renewed(ended=[])
            elif isinstance(message, messages.Release):
                answer = messages.Released(token=message.token, was_live=True)
            if answer is not None:
                self._socket.send_multipart([connection, _as_bytes(answer)])

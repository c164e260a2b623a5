# SPDX-License-Identifier: Apache-2.0
"""Both ends of the connection of ``kvxfer bench pair``: ZeroMQ, one request and one answer at a time, ended with the process.

With a secret it is encrypted, and ends that do not share the secret cannot speak (CurveZMQ: the keys are derived from the secret).
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

import zmq
from zmq.utils.monitor import recv_monitor_message

from kvxfer import addresses
from kvxfer.channel import listener
from kvxfer.cli.pairing import messages
from kvxfer.errors import ConfigError, HandshakeError, PeerLostError, PeerTimeoutError, WireError

if TYPE_CHECKING:
    from kvxfer.cli.pairing.messages import A, PairAnswer, PairRequest
    from kvxfer.secret import Secret

_HEARTBEAT_MS, _SILENCE_MS = 2_000, 20_000
"""A machine that has vanished is noticed after this silence; a process that ends is noticed at once."""
_LOOK_MS = 200
_FAREWELL_S = 1.0
_GONE_S = 1.0
"""Time after a failed transfer in which the end of the other process is noticed, which is then the reason."""


def check_reach(ips: list[str], secret: Secret | None, what: str) -> None:
    """Refuse to measure across machines without a secret, unless that is allowed. Raises ConfigError."""
    if secret is None and os.environ.get("KVXFER_ALLOW_UNAUTHENTICATED") != "1":
        listener.require_secret(what, ips)


class Caller:
    """The end that connects: asks, and waits for the answer.

    Args:
        ip: address of the listening end.
        timeout_s: for each answer.
    """

    def __init__(self, ip: str, port: int, secret: Secret | None, timeout_s: float) -> None:
        self._where = addresses.join(ip, port).removeprefix("tcp://")
        self._timeout_s = timeout_s
        self._context = zmq.Context()
        self._socket = _made(self._context, zmq.REQ)
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)  # a listening end that is started anew is in another run
        self._socket.setsockopt(zmq.IPV6, int(addresses.is_ipv6(ip)))
        if secret is not None:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, secret.listener.public)
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, secret.caller.public)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret.caller.private)
        self._monitor = self._socket.get_monitor_socket(zmq.Event.DISCONNECTED | zmq.Event.HANDSHAKE_SUCCEEDED)
        self._met = self._lost = False
        self._socket.connect(addresses.join(ip, port))

    def ask(self, request: PairRequest, kind: type[A], timeout_s: float | None = None) -> A:
        """Ask, and return the answer.

        Raises:
            HandshakeError: the other end declines, has another secret, or is no ``kvxfer bench pair``.
            PeerLostError: its process has ended.
            PeerTimeoutError: it does not answer in time.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        self._socket.send(messages.encode(request), zmq.NOBLOCK)
        while not self._socket.poll(_LOOK_MS):
            self.check()
            if time.monotonic() >= deadline:
                raise PeerTimeoutError(f"{self._where} has not answered for {timeout_s:g} s")
        try:
            answer = messages.answer(self._socket.recv_multipart())
        except WireError as error:
            raise HandshakeError(
                "other_program", f"what listens at {self._where} is no kvxfer bench pair: {error}"
            ) from None
        if isinstance(answer, messages.Declined):
            raise HandshakeError(answer.code, answer.reason)
        if not isinstance(answer, kind):
            raise HandshakeError(
                "garbage", f"{self._where} answered {type(answer).__name__} to {type(request).__name__}"
            )
        return answer

    def check(self, wait_s: float = 0.0) -> None:
        """Raise if the other end is gone, or is within ``wait_s``: HandshakeError before it was met, then PeerLostError."""
        while not self._lost and self._monitor.poll(int(wait_s * 1000)):
            event = recv_monitor_message(self._monitor)["event"]
            self._met = self._met or event == zmq.Event.HANDSHAKE_SUCCEEDED
            self._lost = event == zmq.Event.DISCONNECTED
        if self._lost and not self._met:
            raise HandshakeError("secret", f"{self._where} closed the connection: it has another secret")
        if self._lost:
            raise PeerLostError(f"the process at {self._where} ended in the middle of the run")

    def after_failure(self) -> None:
        """Raise if a transfer failed because the other end is gone."""
        self.check(_GONE_S)

    def close(self) -> None:
        """Close the connection."""
        self._socket.disable_monitor()
        self._context.destroy(linger=0)


class Host:
    """The end that listens: takes requests of one caller at a time.

    Args:
        bind: ``tcp://host:port``; port 0 takes a free one.

    Attributes:
        ips: addresses that are bound; ``*`` for all.
        port: the port.

    Raises:
        ConfigError: the address cannot be bound, or not without a secret.
    """

    def __init__(self, bind: str, secret: Secret | None) -> None:
        host, port = addresses.parse_bind(bind)
        ips = [addresses.ANY] if host == addresses.ANY else addresses.resolve(host)
        check_reach(ips, secret, bind)
        self._context = zmq.Context()
        self._socket = _made(self._context, zmq.REP)
        if secret is not None:
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret.listener.private)
        self._monitor = self._socket.get_monitor_socket(zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED)
        self._open: set[int] = set()
        """File descriptors of the connections that are open. A number is used again after its connection has ended."""
        self._caller: int | None = None
        """File descriptor of the connection whose run is under way."""
        self.ips: list[str]
        self.port: int
        try:
            self.ips, self.port = listener.listen(self._socket, ips, port)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"cannot listen on {bind}: {error}") from error

    def first(self) -> messages.Introduction:
        """Wait for a caller, and return its introduction."""
        while True:
            found = self._next(None)
            if isinstance(found, messages.Introduction):
                return found
            self.answer(messages.Declined(code="not_introduced", reason="an Introduction comes first"))
            self._caller = None

    def next(self, timeout_s: float) -> PairRequest:
        """Wait for the caller's next request.

        Raises:
            PeerLostError: its process has ended.
            PeerTimeoutError: it asks for nothing.
            WireError: it sent something else.
        """
        found = self._next(timeout_s)
        if found is None:
            raise PeerTimeoutError(f"the other end has asked for nothing for {timeout_s:g} s")
        return found

    def answer(self, answer: PairAnswer) -> None:
        """Answer the last request."""
        self._socket.send(messages.encode(answer), zmq.NOBLOCK)

    def close(self) -> None:
        """Stop listening, when the caller has closed its end or after a second: its last answer would be lost with the connection."""
        with contextlib.suppress(PeerLostError):
            deadline = time.monotonic() + _FAREWELL_S
            while self._caller is not None and time.monotonic() < deadline:
                self._check(_LOOK_MS)
        self._socket.disable_monitor()
        self._context.destroy(linger=0)

    def _next(self, timeout_s: float | None) -> PairRequest | None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while deadline is None or time.monotonic() < deadline:
            if self._socket.poll(_LOOK_MS):
                frames = self._socket.recv_multipart(copy=False)
                connection = int(frames[0].get(zmq.SRCFD))
                if self._caller not in (None, connection):
                    self.answer(messages.Declined(code="busy", reason="another run is under way there"))
                    continue
                try:
                    found = messages.request([frame.bytes for frame in frames])
                except WireError as error:
                    self.answer(messages.Declined(code="garbage", reason=str(error)))
                    if self._caller is not None:
                        raise
                    continue
                self._caller = connection
                return found
            self._check()
        return None

    def _check(self, wait_ms: int = 0) -> None:
        while self._monitor.poll(wait_ms):
            wait_ms = 0
            event = recv_monitor_message(self._monitor)
            change = self._open.add if event["event"] == zmq.Event.ACCEPTED else self._open.discard
            change(int(event["value"]))
        if self._caller is not None and self._caller not in self._open:
            raise PeerLostError("the process at the other end ended in the middle of the run")


def _made(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    made = context.socket(kind)
    made.setsockopt(zmq.LINGER, 0)
    made.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    made.setsockopt(zmq.HEARTBEAT_TIMEOUT, _SILENCE_MS)
    return made

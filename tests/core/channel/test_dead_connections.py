# SPDX-License-Identifier: Apache-2.0
"""A connection that a firewall has forgotten carries nothing, and no end of it is told: another one is opened."""

from __future__ import annotations

import selectors
import socket
import threading

import pytest

from kvxfer.addresses import parse
from kvxfer.config import Settings
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.secret import Secret
from tests.core.engine import Engine

SECRET = Secret(b"sixteen bytes at least, and here are more")
SETTINGS = Settings(peer_timeout_s=6.0)


class Firewall:
    """Forwards TCP connections to a port, until it forgets them: from then on it takes their bytes and forwards nothing."""

    def __init__(self, port):
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets = [self._listener]
        self.connections = 0
        self._forgotten = 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def forget(self):
        """Forget all connections of now."""
        self._forgotten = self.connections

    def close(self):
        self._over.set()
        self._thread.join()
        self._selector.close()
        for each in self._sockets:
            each.close()

    def _run(self):
        while not self._over.is_set():
            for key, _ in self._selector.select(0.05):
                if key.data is None:
                    self._accept()
                else:
                    self._forward(key.fileobj, *key.data)

    def _accept(self):
        near, _ = self._listener.accept()
        far = socket.create_connection(("127.0.0.1", self._port))
        self._sockets += [near, far]
        for one, other in ((near, far), (far, near)):
            self._selector.register(one, selectors.EVENT_READ, (other, self.connections))
        self.connections += 1

    def _forward(self, source, target, number):
        try:
            data = source.recv(1 << 16)
            if number >= self._forgotten:
                target.sendall(data) if data else target.shutdown(socket.SHUT_WR)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(source)


@pytest.mark.parametrize("secret", [None, SECRET], ids=["open", "with a secret"])
def test_reads_go_on_after_a_firewall_has_forgotten_a_connection(secret):
    """A read whose peer was reached over a forgotten connection ends well before the peer counts as silent; so does the next."""
    source, sink = (Engine(seed, secret=secret, settings=SETTINGS) for seed in (1, 2))
    firewall = Firewall(parse(source.endpoint.address)[1])

    def lease(block):
        ref = LeaseRef.mint(producer=source.endpoint.name, addresses=[f"tcp://127.0.0.1:{firewall.port}"])
        source.endpoint.announce(ref)
        source.endpoint.publish(ref, [block])
        return ref

    try:
        assert sink.endpoint.read(lease(1), [1], timeout_s=30).wait(30)
        firewall.forget()
        assert sink.endpoint.read(lease(2), [2], timeout_s=30).wait(30)
        assert sink.endpoint.read(lease(3), [3], timeout_s=30).wait(30)
        assert sink.blocks(1, 2, 3) == source.blocks(1, 2, 3)
    finally:
        sink.endpoint.close()
        source.endpoint.close()
        firewall.close()

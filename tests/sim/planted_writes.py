# SPDX-License-Identifier: Apache-2.0
"""Bugs to plant in what a producer writes for its consumers, as in `tests.sim.planted`. White-box, as there."""

from __future__ import annotations

from kvxfer.protocol import requested_writes
from kvxfer.protocol.actions import PackKey, WriteKey
from kvxfer.runtime import remote_flights
from tests.sim.planted import bug

_Requested = requested_writes.RequestedWrites
_Remote = remote_flights.RemoteFlights


@bug
def write_begun_twice(patch):
    """A `Write` that is repeated begins the write again."""
    write = _Requested.write

    def forgetful(self, connection, consumer, message, now):
        self._running.pop(WriteKey(consumer, message.number), None)
        self._over.pop(PackKey(message.token, consumer.rank), None)
        write(self, connection, consumer, message, now)

    patch(_Requested, "write", forgetful)


@bug
def agents_of_consumers_never_forgotten(patch):
    """The agents of consumers that are gone are kept."""
    patch(_Requested, "tick", lambda self, now: setattr(self, "_look_at", now + 1))


@bug
def writes_outlive_the_agent(patch):
    """What was asked for before a reset of the agent is waited for after it."""
    patch(_Remote, "agent_closed", lambda self: setattr(self, "_description", b""))

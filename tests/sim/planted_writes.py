# SPDX-License-Identifier: Apache-2.0
"""Bugs to plant in what a producer writes for its consumers, as in `tests.sim.planted`. White-box, as there."""

from __future__ import annotations

import itertools

from kvxfer.agents.flights import FlightState
from kvxfer.protocol import requested_writes
from kvxfer.protocol.actions import PackKey, WriteKey
from kvxfer.protocol.messages import Wrote
from kvxfer.runtime import remote_flights, writer
from tests.sim.planted import bug

_Requested = requested_writes.RequestedWrites
_Remote = remote_flights.RemoteFlights


def _nothing(*_, **__):
    """Stand in for what is left out."""


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
def late_write_begun(patch):
    """A write that the consumer knows to be over is forgotten, and begun by a `Write` that is late."""

    def forget(self, share, below):
        over = self._over.get(share, {})
        for number in [number for number in over if number < below]:
            del over[number]

    patch(_Requested, "_note_over", forget)


@bug
def writes_never_called(patch):
    """A write that waits for its turn is not called when that has come, and not sent again unasked."""
    patch(_Requested, "_call", _nothing)


@bug
def stop_answered_while_it_runs(patch):
    """A write that was stopped is said to be over while it is under way."""

    def stop(self, connection, consumer, message):
        answer = Wrote(token=message.token, number=message.number, error="stopped")
        self._connections.reply(connection, answer)

    patch(_Requested, "stop", stop)


@bug
def agents_of_consumers_never_forgotten(patch):
    """The agents of consumers that are gone are kept."""
    patch(_Requested, "tick", lambda self, now: setattr(self, "_look_at", now + 1))


@bug
def unquiet_taken_for_quiet(patch):
    """A write that failed and may land yet is taken to be over."""
    over = _Remote.over

    def trusting(self, job):
        over(self, type(job)(job.transfer, job.number, job.error, ended=job.ended, quiet=True))

    patch(_Remote, "over", trusting)


@bug
def given_up_write_is_quiet(patch):
    """A write for which nothing waits any more is taken to have stopped."""

    def give_up(self, flight, error):
        flight.error = flight.error or error
        self.stop(flight)
        flight.state = FlightState.FAILED

    patch(_Remote, "give_up", give_up)


@bug
def first_answer_is_taken_for_all(patch):
    """When one message of a move is answered, all are taken to be."""
    over = _Remote.over

    def hasty(self, job):
        flight = self._by_number.get(job.number)
        if flight is not None and not job.error:
            for number in flight.under_way - {job.number}:
                self._by_number.pop(number)
            flight.under_way = {job.number}
        over(self, job)

    patch(_Remote, "over", hasty)


@bug
def numbers_of_writes_used_again(patch):
    """After a reset of its agent a consumer numbers its writes from the beginning."""
    agent_closed = _Remote.agent_closed

    def closed(self):
        agent_closed(self)
        self._numbers = itertools.count(1)

    patch(_Remote, "agent_closed", closed)


@bug
def writes_outlive_the_agent(patch):
    """What was asked for before a reset of the agent is waited for after it."""
    patch(_Remote, "agent_closed", lambda self: setattr(self, "_description", b""))


@bug
def failed_write_is_quiet(patch):
    """A write that the engine says has failed is taken to have stopped."""
    end = writer.Writer._over

    def over(self, flight, error, *, quiet):
        end(self, flight, error, quiet=True)

    patch(writer.Writer, "_over", over)

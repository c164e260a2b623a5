# SPDX-License-Identifier: Apache-2.0
"""Peers that stall, die, restart or deregister memory: transfers end in time, and memory is as quiet as declared."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, final

import pytest

from kvxfer.agents.capabilities import Op, Reach
from kvxfer.agents.flights import FlightState
from kvxfer.errors import PeerUnknownError, RegistrationError, TransferError, TransferTimeoutError
from kvxfer.testing.agent_suite.testbed import PLACES
from kvxfer.testing.conformance import KIB, MIB
from kvxfer.testing.oracle import same_bytes
from kvxfer.testing.peers import ProcessPeer
from kvxfer.testing.waiting import eventually, stays

if TYPE_CHECKING:
    from kvxfer.agents.flights import Flight
    from kvxfer.testing.agent_suite.testbed import ConnectedPair, Testbed

_places = pytest.mark.parametrize("place", PLACES)
_ops = pytest.mark.parametrize("op", list(Op), ids=[op.value for op in Op])

_NBYTES = 32 * MIB
"""More than all socket buffers hold: a part must wait for a peer that stands still."""

_SHORT_S = 0.4
"""Deadline of a transfer that is expected to miss it."""

_SLACK_S = 15.0
"""Time that is allowed after the deadline: the machine may be busy, and an engine may copy within `submit`."""

_FIRST_S = 10.0
"""Longest time that transfers with others may take beside a first contact; an engine that waits for it takes a minute."""

_DEATH_S = 15.0
"""Longest time until an adapter with ``detects_death`` notices a dead process; the deadline is minutes away then."""


class FailureTests:
    """Failures of the peer."""

    @final
    @_ops
    def test_deadline_in_the_past(self, testbed: Testbed, op: Op) -> None:
        """A transfer whose deadline has passed when it is submitted ends at once, in a state that says what happened."""
        testbed.need_op(op)
        pair = testbed.pair("thread")
        flight = pair.wait(pair.start(op, pair.whole(), timeout_s=-1.0))
        if flight.state is FlightState.DONE:
            pair.expect(op, pair.whole())
            pair.check()
        else:
            assert isinstance(flight.error, TransferTimeoutError)

    @final
    def test_deadline_that_is_no_time(self, testbed: Testbed) -> None:
        """A transfer whose deadline is NaN does not wait for ever."""
        pair = testbed.pair("thread", 64 * KIB)
        flight = pair.wait(pair.start(testbed.any_op(), pair.whole(), timeout_s=float("nan")))
        assert flight.state is not FlightState.PENDING

    @final
    @_places
    @_ops
    def test_stalled_peer(self, testbed: Testbed, place: str, op: Op) -> None:
        """A transfer with a peer that stands still ends by its deadline: right, or failed with memory quiet, or in quarantine."""
        testbed.need_op(op)
        pair = testbed.pair(place, _NBYTES)
        pair.move(op, pair.spans((0, 0, 100)))
        _stalled_transfer_ends(pair, op)

    @final
    @_places
    def test_stalled_peer_at_the_first_transfer(self, testbed: Testbed, place: str) -> None:
        """The first transfer with a peer that stands still, which also has to connect to it, ends in the same ways."""
        pair = testbed.pair(place, _NBYTES)
        _stalled_transfer_ends(pair, testbed.any_op())

    @final
    @_places
    def test_nothing_is_written_after_close(self, testbed: Testbed, place: str) -> None:
        """After close no transfer of the agent writes to its memory, even when a stalled peer resumes."""
        testbed.need_op(Op.READ)
        pair = testbed.pair(place, _NBYTES)
        pair.move(Op.READ, pair.spans((0, 0, 100)))
        pair.peer.stall()
        flight = pair.start(Op.READ, pair.whole())
        for _ in range(20):
            pair.actor.log.poll()
        pair.actor.close()
        assert flight.finished
        before = pair.actor.content(pair.local)
        pair.peer.resume()
        _stays_quiet(pair, before)
        if flight.state is FlightState.DONE:
            pair.expect(Op.READ, pair.whole())
            pair.check()

    @final
    @_places
    def test_memory_in_flight_stays_registered(self, testbed: Testbed, place: str) -> None:
        """Memory of a pending or quarantined transfer cannot be deregistered."""
        op = testbed.any_op()
        pair = testbed.pair(place, _NBYTES)
        pair.move(op, pair.spans((0, 0, 100)))
        pair.peer.stall()
        flight = pair.start(op, pair.whole(), timeout_s=_SHORT_S)
        if flight.finished:
            pytest.skip("the transfer is over when submit returns: nothing is ever in flight here")
        with pytest.raises(RegistrationError):
            pair.actor.deregister(pair.local)
        pair.wait(flight)
        if flight.state is FlightState.QUARANTINED:
            with pytest.raises(RegistrationError):
                pair.actor.deregister(pair.local)

    @final
    @_places
    def test_others_go_on(self, testbed: Testbed, place: str) -> None:
        """Transfers with one peer go on while another one stands still."""
        op = testbed.any_op()
        pair = testbed.pair(place, _NBYTES)
        other = testbed.peer(place)
        remote = other.allocate(64 * KIB, testbed.seed())
        name = pair.actor.connect(other.describe())
        spans = [(pair.local.address, remote.address, 64 * KIB)]
        first = pair.wait(pair.actor.start(op, name, spans, testbed.patience_s))
        assert first.state is FlightState.DONE
        pair.peer.stall()
        # The last three quarters: what the other peer moves stays out of this flight's way.
        quarter = _NBYTES // 4
        pair.start(op, pair.spans((quarter, quarter, 3 * quarter)), timeout_s=testbed.patience_s)
        second = pair.wait(pair.actor.start(op, name, spans, testbed.patience_s))
        assert second.state is FlightState.DONE, second.error
        same_bytes(pair.actor.content(pair.local)[: 64 * KIB], other.content(remote))

    @final
    def test_peer_freezes_at_first_contact(self, testbed: Testbed) -> None:
        """A process that freezes before the first transfer with it holds up no transfer with another one, and works when it resumes."""
        op = testbed.any_op()
        pair, newcomer = testbed.pair("process", 64 * KIB), testbed.process()
        pair.move(op, pair.spans((0, 0, 100)))
        far, near = newcomer.allocate(64 * KIB, testbed.seed()), pair.actor.allocate(64 * KIB, testbed.seed())
        name = pair.actor.connect(newcomer.describe())
        newcomer.stall()
        begin = time.monotonic()
        stuck = pair.actor.start(op, name, [(near.address, far.address, 64 * KIB)], 5 * _SHORT_S)
        for _ in range(5):
            pair.move(op, pair.whole())
        took = time.monotonic() - begin
        assert took < _FIRST_S, f"six transfers took {took:.1f} s beside a newcomer that stands still"
        pair.wait(stuck)
        newcomer.resume()
        again = pair.wait(pair.actor.start(op, name, [(near.address, far.address, 64 * KIB)], testbed.patience_s))
        assert again.state is FlightState.DONE, again.error

    @final
    @_places
    def test_poll_does_not_block(self, testbed: Testbed, place: str) -> None:
        """Poll returns quickly, with no transfer and with a transfer that makes no progress."""
        op = testbed.any_op()
        pair = testbed.pair(place, _NBYTES)
        pair.move(op, pair.spans((0, 0, 100)))
        idle = _poll_seconds(pair)
        pair.peer.stall()
        pair.start(op, pair.whole(), timeout_s=testbed.patience_s)
        for _ in range(20):
            pair.actor.log.poll()  # all bytes that can move have moved
        stuck = _poll_seconds(pair)
        assert max(idle, stuck) < 0.02, f"a poll takes {idle:.4f} s when idle, {stuck:.4f} s when stuck"

    @final
    def test_stale_description(self, testbed: Testbed) -> None:
        """A transfer to memory that the peer deregistered fails and moves nothing, if the adapter declares ``remote_checked``."""
        _need_remote_checked(testbed)
        for place in PLACES if testbed.capabilities().reach is not Reach.PROCESS else ("thread",):
            for op in testbed.capabilities().ops:
                pair = testbed.pair(place, 64 * KIB)
                pair.move(op, pair.spans((0, 0, 100)))
                pair.peer.deregister(pair.remote)
                flight = pair.wait(pair.start(op, pair.whole()))
                assert flight.state is not FlightState.DONE, f"{op.value} of deregistered memory succeeds ({place})"
                assert isinstance(flight.error, TransferError)
                pair.check()

    @final
    def test_closed_peer(self, testbed: Testbed) -> None:
        """A transfer to an agent that was closed fails and moves nothing, if the adapter declares ``remote_checked``."""
        _need_remote_checked(testbed)
        for place in PLACES if testbed.capabilities().reach is not Reach.PROCESS else ("thread",):
            for op in testbed.capabilities().ops:
                pair = testbed.pair(place, 64 * KIB)
                pair.move(op, pair.spans((0, 0, 100)))
                pair.peer.close_agent()
                flight = pair.wait(pair.start(op, pair.whole()))
                assert flight.state is not FlightState.DONE, f"{op.value} with a closed agent succeeds ({place})"
                assert isinstance(flight.error, TransferError)
                pair.check()

    @final
    @_ops
    def test_peer_killed_before(self, testbed: Testbed, op: Op) -> None:
        """A transfer with a process that was killed ends by its deadline, much earlier with ``detects_death``."""
        testbed.need_op(op)
        pair, peer = _with_process(testbed)
        pair.move(op, pair.spans((0, 0, 100)))
        peer.kill()
        _fails_in_time(pair, op, None)

    @final
    @_ops
    def test_peer_killed_during(self, testbed: Testbed, op: Op) -> None:
        """A transfer whose peer is killed while it runs ends by its deadline, much earlier with ``detects_death``."""
        testbed.need_op(op)
        pair, peer = _with_process(testbed)
        pair.move(op, pair.spans((0, 0, 100)))
        peer.stall()
        flight = pair.start(op, pair.whole(), _deadline_s(pair))
        pair.actor.log.poll()
        peer.kill()
        _fails_in_time(pair, op, flight)

    @final
    def test_disconnect_of_the_dead(self, testbed: Testbed) -> None:
        """Disconnecting a killed peer raises nothing, fails its transfers, and leaves the agent usable for others."""
        op = testbed.any_op()
        pair, peer = _with_process(testbed)
        pair.move(op, pair.spans((0, 0, 100)))
        peer.stall()
        flight = pair.start(op, pair.whole())
        peer.kill()
        known = pair.actor.peer(pair.peer_name)
        pair.actor.agent.disconnect(known)
        pair.actor.agent.disconnect(known)
        if pair.wait(flight).state is not FlightState.DONE:
            assert flight.error is not None
        with pytest.raises(PeerUnknownError):
            pair.start(op, pair.whole())
        _connects_to_another(pair, op)

    @final
    def test_peer_returns(self, testbed: Testbed) -> None:
        """A new process in place of a dead one, under a name of its own, is connected and served."""
        op = testbed.any_op()
        pair, peer = _with_process(testbed)
        for _ in range(2):
            pair.move(op, pair.spans((0, 0, 100)))
            peer.kill()
            flight = pair.wait(pair.start(op, pair.spans((0, 0, 100)), timeout_s=1.0))
            assert flight.error is None or isinstance(flight.error, TransferError)
            pair.actor.agent.disconnect(pair.actor.peer(pair.peer_name))
            peer = pair.testbed.process()
            remote = peer.allocate(pair.remote.nbytes, testbed.seed())
            local = pair.actor.allocate(pair.local.nbytes, testbed.seed())
            pair.peer, pair.remote, pair.local = peer, remote, local
            pair.peer_name = pair.actor.connect(peer.describe())
            pair.refresh()
        pair.move(op, pair.whole())

    @final
    def test_thread_peer_dies(self, testbed: Testbed) -> None:
        """A transfer with an agent that was closed fails, where peers share a process: before its deadline with ``detects_death``."""
        caps = testbed.capabilities()
        if caps.reach is not Reach.PROCESS:
            pytest.skip("reaches other processes: the tests that kill one are the stricter ones")
        pair, op = testbed.pair("thread", 64 * KIB), testbed.any_op()
        pair.peer.close_agent()
        begin = time.monotonic()
        flight = pair.wait(pair.start(op, pair.whole(), 60.0 if caps.detects_death else 1.0))
        assert isinstance(flight.error, TransferError)
        assert time.monotonic() - begin < _DEATH_S
        pair.check()


def _stalled_transfer_ends(pair: ConnectedPair, op: Op) -> None:
    pair.peer.stall()
    begin = time.monotonic()
    flight = pair.wait(pair.start(op, pair.whole(), timeout_s=_SHORT_S))
    late = time.monotonic() - begin - _SHORT_S
    assert late < _SLACK_S, f"ended {late:.1f} s after its deadline"
    before = pair.actor.content(pair.local)
    pair.peer.resume()
    if flight.state is FlightState.DONE:
        pair.expect(op, pair.whole())
        pair.check()
        return
    assert isinstance(flight.error, TransferError), f"no transfer error: {flight.error!r}"
    if flight.state is FlightState.QUARANTINED:
        # The flight may end by itself now that the peer has resumed. If not, closing the agent ends it. Then memory is quiet.
        _poll_for(pair, 1.0)
        if not flight.finished:
            pair.actor.close()
        before = pair.actor.content(pair.local)
    assert flight.state is FlightState.FAILED
    _stays_quiet(pair, before)


def _poll_for(pair: ConnectedPair, seconds: float) -> None:
    def polled() -> bool:
        pair.actor.log.poll()
        return True

    stays(polled, for_s=seconds)


def _stays_quiet(pair: ConnectedPair, before: bytes) -> None:
    stays(lambda: pair.actor.content(pair.local) == before, for_s=0.7, what="local memory is quiet")


def _poll_seconds(pair: ConnectedPair) -> float:
    """Median of 21 polls: on a busy machine some are interrupted."""
    took = []
    for _ in range(21):
        begin = time.monotonic()
        pair.actor.log.poll()
        took.append(time.monotonic() - begin)
    return sorted(took)[10]


def _need_remote_checked(testbed: Testbed) -> None:
    if not testbed.capabilities().remote_checked:
        pytest.skip("does not declare remote_checked, so nothing is promised here")


def _with_process(testbed: Testbed) -> tuple[ConnectedPair, ProcessPeer]:
    pair = testbed.pair("process", _NBYTES)
    assert isinstance(pair.peer, ProcessPeer)
    return pair, pair.peer


def _deadline_s(pair: ConnectedPair) -> float:
    """Return a late deadline where the adapter detects death, so that only detection ends the transfer early; else a short one."""
    return 120.0 if pair.testbed.capabilities().detects_death else 2.0


def _fails_in_time(pair: ConnectedPair, op: Op, flight: Flight | None) -> None:
    begin = time.monotonic()
    if flight is None:
        flight = pair.start(op, pair.whole(), _deadline_s(pair))
    if flight.state is FlightState.DONE:
        return  # it ended before the peer did

    def ended() -> bool:
        pair.actor.log.poll()
        return flight.state is not FlightState.PENDING

    eventually(ended, timeout_s=_DEATH_S, what="the death of the peer is noticed")
    assert time.monotonic() - begin < _DEATH_S
    assert isinstance(flight.error, TransferError), f"a transfer with a dead peer ended as {flight}"
    _connects_to_another(pair, op)


def _connects_to_another(pair: ConnectedPair, op: Op) -> None:
    peer = pair.testbed.peer("process")
    remote, local = peer.allocate(64 * KIB, 71), pair.actor.allocate(64 * KIB, 72)
    name = pair.actor.connect(peer.describe())
    spans = [(local.address, remote.address, 64 * KIB)]
    flight = pair.wait(pair.actor.start(op, name, spans, pair.testbed.patience_s))
    assert flight.state is FlightState.DONE, f"after the death of one peer the agent serves no other: {flight.error!r}"
    same_bytes(pair.actor.content(local), peer.content(remote))

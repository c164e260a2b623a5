# SPDX-License-Identifier: Apache-2.0
"""Transfers of every shape: the right bytes move to the right place, and no others."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import numpy as np
import pytest

from kvxfer.agents.capabilities import Op
from kvxfer.agents.flights import FlightState
from kvxfer.memory.spans import MemoryKind
from kvxfer.testing.agent_suite.testbed import PLACES, scattered
from kvxfer.testing.conformance import KIB, MIB
from kvxfer.testing.oracle import noise, same_bytes
from kvxfer.testing.peers import ProcessPeer
from kvxfer.testing.waiting import eventually, tries

if TYPE_CHECKING:
    from kvxfer.testing.agent_suite.testbed import Testbed

_places = pytest.mark.parametrize("place", PLACES)
_ops = pytest.mark.parametrize("op", list(Op), ids=[op.value for op in Op])

_LONG_NBYTES = 48 * MIB
"""For adapters that declare no limit."""
_LONGEST_NBYTES = 512 * MIB
_MANY_SPANS = 5_000
_MOST_SPANS = 200_000

_FLOOD_SPANS = 1_024
_FLOOD_LISTS = 16

_CELL_NBYTES = 16
_TURNS = 6

_STILL_S = 0.4
"""Long enough for a transfer that needs nothing of the peer but its memory."""


class TransferTests:
    """Reads and writes."""

    @final
    @_places
    @_ops
    def test_one_span(self, testbed: Testbed, place: str, op: Op) -> None:
        """One span arrives byte for byte, and nothing outside it is touched on either side."""
        testbed.need_op(op)
        pair = testbed.pair(place)
        pair.move(op, pair.spans((3 * KIB, 70 * KIB, 64 * KIB)))

    @final
    @_places
    @_ops
    def test_whole_region(self, testbed: Testbed, place: str, op: Op) -> None:
        """A span may reach from the first to the last byte of both regions."""
        testbed.need_op(op)
        pair = testbed.pair(place)
        pair.move(op, pair.whole())

    @final
    @_places
    @_ops
    def test_odd_sizes(self, testbed: Testbed, place: str, op: Op) -> None:
        """Spans of any size at any alignment arrive, down to a single byte, also at both ends of a region."""
        testbed.need_op(op)
        pair = testbed.pair(place, 64 * KIB)
        for nbytes in (1, 2, 7, 63, 65, 4095, 4097):
            end = pair.local.nbytes - nbytes
            pair.move(op, pair.spans((0, end, nbytes)))
            pair.move(op, pair.spans((end, 0, nbytes)))
            pair.move(op, pair.spans((12_345, 23_457, nbytes)))

    @final
    @_places
    @_ops
    def test_fragmented(self, testbed: Testbed, place: str, op: Op) -> None:
        """Many spans of different sizes, scattered on both sides, arrive each at its own place."""
        testbed.need_op(op)
        pair = testbed.pair(place)
        sizes = np.random.default_rng(7).integers(1, 1500, 400).tolist()
        here = scattered(pair.local, 1500, 33, len(sizes), seed=11)
        there = scattered(pair.remote, 1500, 1, len(sizes), seed=12)
        pair.move(op, pair.spans(*zip(here, there, sizes, strict=True)))

    @final
    @_places
    @_ops
    def test_adjacent(self, testbed: Testbed, place: str, op: Op) -> None:
        """Spans that touch each other on one side or on both, in order or not, arrive as if they were apart."""
        testbed.need_op(op)
        pair = testbed.pair(place)
        run = 512
        order = np.random.default_rng(3).permutation(64).tolist()
        pair.move(op, pair.spans(*((i * run, 4096 + i * run, run) for i in range(64))))
        pair.move(op, pair.spans(*((i * run, 2 * i * run, run) for i in range(64))))
        pair.move(op, pair.spans(*((i * run, 8192 + j * run, run) for i, j in enumerate(order))))

    @final
    @_places
    @_ops
    def test_more_than_the_engine_takes_at_once(self, testbed: Testbed, place: str, op: Op) -> None:
        """A span longer than ``max_submit_nbytes`` arrives whole."""
        testbed.need_op(op)
        limit = testbed.capabilities().max_submit_nbytes or _LONG_NBYTES
        if limit > _LONGEST_NBYTES:
            pytest.skip(f"max_submit_nbytes is {limit}: too much memory for a test")
        pair = testbed.pair(place, limit + limit // 2 + 5 * KIB)
        pair.move(op, pair.spans((1 * KIB, 3 * KIB, limit + limit // 2 + 7)))

    @final
    @_places
    @_ops
    def test_longer_list_than_the_engine_takes(self, testbed: Testbed, place: str, op: Op) -> None:
        """A list of more than ``max_descriptors`` spans, none of which can be merged, arrives whole."""
        testbed.need_op(op)
        limit = testbed.capabilities().max_descriptors or _MANY_SPANS
        if limit > _MOST_SPANS:
            pytest.skip(f"max_descriptors is {limit}: too long a list for a test")
        count = 2 * limit + 3
        pair = testbed.pair(place, 16 * count + KIB)
        here = scattered(pair.local, 9, 7, count, seed=5)
        pair.move(op, pair.spans(*((at, 16 * i + 3, 9) for i, at in enumerate(here))))

    @final
    @_places
    @_ops
    def test_spans_of_many_regions(self, testbed: Testbed, place: str, op: Op) -> None:
        """One transfer may touch many registered regions of both sides, also regions that touch each other."""
        testbed.need_op(op)
        actor, peer = testbed.actor(), testbed.peer(place)
        count, nbytes = 24, 8 * KIB
        blocks = [actor.allocate(nbytes, testbed.seed()) for _ in range(count)]
        whole = peer.allocate(count * nbytes, testbed.seed(), register=False)
        parts = [type(whole)(whole.address + i * nbytes, nbytes, whole.kind, whole.device_id) for i in range(count)]
        for part in parts:
            peer.register(part)
        name = actor.connect(peer.describe())
        near, far = b"".join(actor.content(block) for block in blocks), peer.content(whole)
        spans = [(block.address, part.address, nbytes) for block, part in zip(blocks, parts, strict=True)]
        flight = actor.log.wait(actor.start(op, name, spans, testbed.patience_s), timeout_s=2 * testbed.patience_s)
        assert flight.state is FlightState.DONE
        moved = far if op is Op.READ else near
        same_bytes(b"".join(actor.content(block) for block in blocks), moved)
        same_bytes(peer.content(whole), moved)
        assert actor.intact()
        assert peer.intact()

    @final
    @_places
    @_ops
    def test_content_of_the_moment(self, testbed: Testbed, place: str, op: Op) -> None:
        """Each transfer moves the content of memory at its submission, and no content of an earlier one."""
        testbed.need_op(op)
        pair = testbed.pair(place, 64 * KIB)
        for _ in range(8):
            pair.peer.fill(pair.remote, pair.actor.content(pair.local)[::-1])
            pair.actor.fill(pair.local, bytes([testbed.seed()]) * pair.local.nbytes)
            pair.refresh()
            pair.move(op, pair.spans((100, 200, 40 * KIB)))

    @final
    @_places
    @_ops
    def test_done_means_in_place(self, testbed: Testbed, place: str, op: Op) -> None:
        """All bytes of a flight are in place at the poll that returns it as DONE, in large and in small transfers."""
        testbed.need_op(op)
        pair = testbed.pair(place, 4 * MIB)
        for step in range(1, 13):
            pair.move(op, pair.spans((step, 2 * step, (4 * MIB >> step) + step)))

    @final
    @_ops
    def test_done_means_in_place_while_the_peer_stands_still(self, testbed: Testbed, op: Op) -> None:
        """A flight that is DONE while the peer's process stands still is in place then, not still on its way."""
        testbed.need_op(op)
        pair = testbed.pair("process", 64 * KIB)
        peer = pair.peer
        assert isinstance(peer, ProcessPeer)
        if pair.remote.kind is not MemoryKind.DRAM:
            pytest.skip(f"a test cannot look into {pair.remote.kind.value} of a process that stands still")
        try:
            peer.peek(pair.remote)
        except PermissionError as error:
            pytest.skip(f"this machine lets no process look into another: {error}")
        first = pair.spans((0, 0, 100))
        assert pair.wait(pair.start(op, first)).state is FlightState.DONE
        pair.expect(op, first)
        peer.stall()
        offsets = (100, 300, 50 * KIB), (60 * KIB, 57 * KIB, 77)
        spans = pair.spans(*offsets)
        flight = pair.start(op, spans)
        for _ in tries(_STILL_S, interval_s=0.001):
            pair.actor.log.poll()
            if flight.finished:
                break
        if flight.state is FlightState.DONE:
            near, far = pair.actor.content(pair.local), peer.peek(pair.remote)
            for here, there, nbytes in offsets:
                same_bytes(far[there : there + nbytes], near[here : here + nbytes], "the peer stands still")
        peer.resume()
        assert pair.wait(flight).state is FlightState.DONE, flight.error
        pair.expect(op, spans)
        pair.check()

    @final
    @_places
    @_ops
    def test_many_flights_at_once(self, testbed: Testbed, place: str, op: Op) -> None:
        """Flights that are under way together do not mix up their bytes."""
        testbed.need_op(op)
        pair = testbed.pair(place, 2 * MIB)
        part = 64 * KIB
        lots = [pair.spans((i * part, (31 - i) * part, part // 2 + i)) for i in range(32)]
        flights = [pair.start(op, spans) for spans in lots]
        for flight, spans in zip(flights, lots, strict=True):
            assert pair.wait(flight).state is FlightState.DONE
            pair.expect(op, spans)
        pair.check()

    @final
    @_places
    def test_flood(self, testbed: Testbed, place: str) -> None:
        """Many long lists at once all arrive, and afterwards the peer is served as before: no queue of the engine overflows."""
        op = testbed.any_op()
        count = min(testbed.capabilities().max_descriptors or _FLOOD_SPANS, _FLOOD_SPANS)
        pair = testbed.pair(place, 16 * count + KIB)
        spans = pair.spans(*((16 * i + 3, 16 * i + 5, 9) for i in range(count)))
        flights = [pair.start(op, spans) for _ in range(_FLOOD_LISTS)]
        for flight in flights:
            assert pair.wait(flight).state is FlightState.DONE, flight.error
        pair.expect(op, spans)
        pair.move(op, pair.whole())

    @final
    @_places
    def test_writes_then_the_cell(self, testbed: Testbed, place: str) -> None:
        """An owner writes data and then a cell into a peer's memory: where the cell is in place the data is, and DONE means both."""
        testbed.need_op(Op.WRITE)
        pair = testbed.pair(place, 2 * MIB)
        near, far = pair.actor.allocate(_CELL_NBYTES, testbed.seed()), pair.peer.allocate(_CELL_NBYTES, testbed.seed())
        pair.actor.connect(pair.peer.describe())
        step = 64 * KIB
        data = pair.spans(*((at, at, step - 64) for at in range(0, 2 * MIB, step)))
        for turn in range(1, _TURNS + 1):
            pair.actor.fill(pair.local, noise(pair.local.nbytes, testbed.seed()))
            pair.actor.fill(near, bytes([turn]) * _CELL_NBYTES)
            pair.refresh()
            pair.expect(Op.WRITE, data)
            flight = pair.start_steps(Op.WRITE, data, [(near.address, far.address, _CELL_NBYTES)])
            while not flight.finished and pair.peer.content(far) != pair.actor.content(near):
                pair.actor.log.poll()
            if flight.state is not FlightState.FAILED:
                pair.check()
                assert pair.peer.content(far) == pair.actor.content(near), f"done in turn {turn}, and no cell"
            assert pair.wait(flight).state is FlightState.DONE, flight.error

    @final
    @_places
    def test_both_directions_at_once(self, testbed: Testbed, place: str) -> None:
        """Two agents that move bytes out of and into each other's memory at the same time both succeed."""
        op = testbed.any_op()
        pair = testbed.pair(place, 8 * MIB)
        back = pair.peer.connect(pair.actor.describe())
        half = 4 * MIB
        ours = pair.spans((0, 0, half))
        theirs = [(pair.remote.address + half, pair.local.address + half, half)]
        number = pair.peer.submit(op, back, theirs, testbed.patience_s)
        flight = pair.start(op, ours)
        assert pair.wait(flight).state is FlightState.DONE

        def arrived() -> bool:
            pair.actor.log.poll()
            return pair.peer.outcome(number)[0] is not FlightState.PENDING

        eventually(arrived, timeout_s=2 * testbed.patience_s, what="the peer's transfer ends")
        assert pair.peer.outcome(number) == (FlightState.DONE, "")
        pair.expect(op, ours)
        reverse = Op.WRITE if op is Op.READ else Op.READ
        pair.expect(reverse, pair.spans((half, half, half)))
        pair.check()

    @final
    @_places
    def test_many_peers(self, testbed: Testbed, place: str) -> None:
        """Transfers with several peers at once each reach the peer that was named."""
        op, nbytes = testbed.any_op(), 256 * KIB
        actor = testbed.actor()
        peers = [testbed.peer(place) for _ in range(3)]
        remotes = [peer.allocate(nbytes, testbed.seed()) for peer in peers]
        names = [actor.connect(peer.describe()) for peer in peers]
        locals_ = [actor.allocate(nbytes, testbed.seed()) for _ in peers]
        moved = [
            peer.content(remote) if op is Op.READ else actor.content(local)
            for peer, remote, local in zip(peers, remotes, locals_, strict=True)
        ]
        flights = [
            actor.start(op, name, [(local.address, remote.address, nbytes)], testbed.patience_s)
            for name, local, remote in zip(names, locals_, remotes, strict=True)
        ]
        for flight in reversed(flights):
            assert actor.log.wait(flight, timeout_s=2 * testbed.patience_s).state is FlightState.DONE
        for peer, remote, local, content in zip(peers, remotes, locals_, moved, strict=True):
            same_bytes(actor.content(local), content)
            same_bytes(peer.content(remote), content)

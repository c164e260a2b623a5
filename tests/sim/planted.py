# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ARG005
"""Bugs to plant: each takes one line of care out of the product. All of them must be found by the simulator.

White-box: a bug is planted where the care is taken.
"""

from __future__ import annotations

import pytest

from kvxfer import endpoint
from kvxfer.agents.flights import Flights, FlightState
from kvxfer.planner import rank_plan
from kvxfer.protocol import (
    chunk_staging,
    deferred,
    grants,
    held_lease,
    held_leases,
    lease_board,
    lease_table,
    peers,
    producer,
    staged_chunks,
)
from kvxfer.protocol.actions import Emit, EndPack
from kvxfer.protocol.transfer import LeaseExpired
from kvxfer.runtime import (
    agent_lifecycle,
    contacts,
    control_loop,
    packer,
    read,
    read_executor,
    read_requests,
    read_task,
    staging,
)
from kvxfer.runtime.read_task import Move, RunAll
from kvxfer.testing.sim import agent as virtual

_BUGS = {}


class PlantedError(Exception):
    """Raised on purpose."""


def bug(function):
    """Note a function that plants a bug, under its first sentence."""
    _BUGS[function.__name__] = function
    return function


BUGS = _BUGS


def _unchecked(source, *before):
    """A stand-in for `read.validation_read`, without the cell."""
    if before:
        yield Move(source, before)


@bug
def lease_check_left_out(patch):
    """The lease is not checked when the bytes are in place."""
    patch(read, "validation_read", _unchecked)


@bug
def lease_check_before_the_bytes(patch):
    """The lease is checked when the read begins, and not when it ends."""
    validation_read = read.validation_read

    def early(source, *before):
        if before or not (source.granted.complete and source.moved):
            yield from validation_read(source)
        yield from _unchecked(source, *before)

    patch(read, "validation_read", early)


@bug
def lease_check_beside_the_bytes(patch):
    """The cell is read while the bytes are, and not when they are in place."""
    validation_read = read.validation_read

    def both(source, *before):
        beside = iter([validation_read(source), *([_unchecked(source, *before)] if before else [])])
        yield RunAll(lambda: next(beside, None), 2)

    patch(read, "validation_read", both)


@bug
def check_is_the_token(patch):
    """The check in a lease's cell is its token, which may be published again."""
    make_readable = lease_table.LeaseTable._make_readable

    def readable(self, lease, *args, **options):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(lease_table.secrets, "token_bytes", lambda _: bytes.fromhex(lease.token))
            make_readable(self, lease, *args, **options)

    patch(lease_table.LeaseTable, "_make_readable", readable)


@bug
def abandoned_is_quiet(patch):
    """A copy that was given up is taken to have stopped."""
    patch(virtual.VirtualAgent, "_abandon", lambda self, handle: True)


@bug
def failed_is_quiet(patch):
    """A copy of which the engine says that it failed is taken to have stopped."""
    fail = Flights._fail

    def failed(self, flight, error):
        fail(self, flight, error)
        flight.state = FlightState.FAILED

    patch(Flights, "_fail", failed)


@bug
def agent_left_alive(patch):
    """The agent that was to be torn down goes on writing."""

    def close(self):
        self.agent = None
        self._peers.clear()
        self.proven.clear()

    patch(agent_lifecycle.AgentLifecycle, "close", close)


@bug
def told_before_it_is_quiet(patch):
    """The failure of a read is told at once, also with copies in flight."""
    fail = read_executor.ReadExecutor._fail

    def failed(self, task, error):
        task.pending = 0
        fail(self, task, error)

    patch(read_executor.ReadExecutor, "_fail", failed)


@bug
def quarantine_is_the_end(patch):
    """A flight in quarantine is told as if it had ended."""
    changed = read_requests.ReadRequests._changed

    def told(self, flight):
        if flight.state is FlightState.QUARANTINED:
            flight.state = FlightState.FAILED
        if flight in self._flying or self._contacts.owns(flight):
            changed(self, flight)

    patch(read_requests.ReadRequests, "_changed", told)


@bug
def copy_not_waited_for(patch):
    """The steps that follow a copy are done before its bytes are in place."""
    move = read_requests.ReadRequests._move

    def hasty(self, strand, request):
        if request.steps[-1].total_nbytes == lease_board.CELL_NBYTES:
            move(self, strand, request)
        else:
            move(self, read_task.Strand(strand.task, iter(())), request)  # which is never resumed
            self._strands.answer(strand)

    patch(read_requests.ReadRequests, "_move", hasty)


@bug
def read_deadline_dropped(patch):
    """A read whose blocks never come waits for ever."""
    patch(held_leases.HeldLeases, "_give_up", lambda self, hold, now: setattr(hold, "deadline", now + 1e9))


@bug
def staged_read_deadline_dropped(patch):
    """A read that waits for a chunk or a grant waits for ever."""
    patch(read_executor.ReadExecutor, "_give_up_late", lambda self: None)
    patch(read_executor.ReadExecutor, "due_s", lambda self: None)
    patch(held_leases.HeldLeases, "stop_read", lambda self, hold, error: None)


@bug
def lease_never_expires(patch):
    """Blocks that no consumer reads are never given back."""
    patch(lease_table.LeaseTable, "expire", lambda self, now: [])
    patch(lease_table.LeaseTable, "next_deadline", lambda self: None)


@bug
def place_kept_for_ever(patch):
    """A consumer that comes first and never again leaves a lease behind."""
    want = lease_table.LeaseTable.expect

    def wanted(self, token, now):
        known = token in self._live
        want(self, token, now)
        if not known and token in self._live:
            self._timers.cancel(token)

    patch(lease_table.LeaseTable, "expect", wanted)


@bug
def end_told_twice(patch):
    """The engine is told twice that its blocks are its own again."""
    end = producer.Producer._end

    def twice(self, event, how):
        end(self, event, how)
        end(self, event, how)

    patch(producer.Producer, "_end", twice)


@bug
def expiry_not_told(patch):
    """The engine is not told that a lease has run out."""
    do = control_loop.ControlLoop._do

    def silent(self, action):
        if not (isinstance(action, Emit) and isinstance(action.event, LeaseExpired)):
            do(self, action)

    patch(control_loop.ControlLoop, "_do", silent)


@bug
def device_not_waited_for(patch):
    """Blocks count as complete before the device has written them."""
    patch(deferred.DeferredSteps, "then", lambda self, token, after, act, now, **_: act(now))


@bug
def sealed_one_block_too_many(patch):
    """A read during prefill includes one block more than is complete."""
    sealed = rank_plan.published_interval

    def more(group, source, target, tokens):
        start, stop = sealed(group, source, target, tokens)
        return (start, stop + group.table_tokens) if 0 < stop < target.end_token else (start, stop)

    patch(rank_plan, "published_interval", more)


@bug
def moved_before_it_is_there(patch):
    """Blocks that are granted while a read is under way count as moved."""
    grant = read_task.SourceRead.grant

    def skip(self, granted):
        grant(self, granted)
        self.moved.update({group: stop for group, (_, stop) in enumerate(self.match().tokens)})

    patch(read_task.SourceRead, "grant", skip)


@bug
def chunks_not_given_back(patch):
    """Chunks that were taken keep their slot."""
    patch(packer.Packer, "end", lambda self, key, numbers: None)


@bug
def chunks_outlive_their_lease(patch):
    """The end of a lease ends no chunk."""
    patch(chunk_staging.ChunkStaging, "end_lease", lambda self, lease: None)


@bug
def one_chunk_is_taken_for_all(patch):
    """A consumer that has released one chunk counts as having released all: their slots are given to others."""
    release = chunk_staging.ChunkStaging.release

    def all_of_them(self, key, consumer, numbers):
        chunks = self._chunks.get(key)
        release(self, key, consumer, list(chunks.asked) if chunks is not None else numbers)

    patch(chunk_staging.ChunkStaging, "release", all_of_them)


@bug
def slot_lent_twice(patch):
    """A slot that was given back once is free twice."""
    give = staging.StagingArena.give

    def twice(self, address):
        index = (address - self._base) // self.slot_nbytes
        if index in self._taken:
            give(self, address)
            self._free.append(index)

    patch(staging.StagingArena, "give", twice)


@bug
def restarted_producer_not_noticed(patch):
    """Grants of a process that is gone are taken for those of the one in its place."""
    patch(held_leases.HeldLeases, "lost", lambda self, peer, now: None)
    patch(held_lease.HeldLease, "mistake", lambda self, claim: None)
    patch(read, "validation_read", _unchecked)


@bug
def peers_never_forgotten(patch):
    """Peers that are not needed any more are remembered for ever."""
    patch(peers.Peers, "tick", lambda self, now: None)
    patch(peers.Peers, "next_deadline", lambda self: None)


@bug
def settling_not_repeated(patch):
    """A lost Release is not sent again, and the lease waits for its deadline."""
    patch(held_leases.HeldLeases, "_ask_all", lambda self, hold, now: None)


@bug
def fault_in_the_control_thread(patch):
    """An internal error is survived without a trace."""
    pump = held_leases.HeldLeases.advance

    def faulty(self, hold, now):
        if len(self.by_token) > 3:
            raise PlantedError(len(self.by_token))
        pump(self, hold, now)

    patch(held_leases.HeldLeases, "advance", faulty)


@bug
def hold_never_ends(patch):
    """A lease that is held and never read is renewed for ever."""
    begin = held_leases.HeldLeases.acquire

    def for_ever(self, ref, now):
        held = begin(self, ref, now)
        if held.transfer is None and held.state is held_lease.HeldLeaseState.WAITING:
            held.deadline = now + 1e9
        return held

    patch(held_leases.HeldLeases, "acquire", for_ever)


@bug
def restarted_reads_number_anew(patch):
    """A read that is started again uses the numbers of chunks that it had asked for before."""
    patch(read_task.SourceRead, "again", lambda self, task: read_task.SourceRead(task, self.granted))


@bug
def clock_of_agents_stands(patch):
    """Copies of the transfer agent have deadlines on a clock that is not their process's."""
    new = agent_lifecycle.AgentLifecycle._new

    def made(self):
        agent = new(self)
        agent.now = lambda: 0.0
        return agent

    patch(agent_lifecycle.AgentLifecycle, "_new", made)


@bug
def clock_of_the_control_thread_is_behind(patch):
    """The control thread keeps the engine's deadlines on another clock than the one on which they were set."""

    class Behind(control_loop.ControlLoop):
        def __init__(self, channel, metrics, emit, now):
            super().__init__(channel, metrics, emit, lambda: now() - 500.0)

    patch(endpoint, "ControlLoop", Behind)


@bug
def renewals_by_the_producers_clock(patch):
    """A lease is renewed when a third of its producer's time of day has passed, and not of its length."""
    patch(held_lease.RankLease, "renew_at", lambda self, now: now + 1e5 / 3)


@bug
def one_rank_settles_for_all(patch):
    """The first rank of a consumer that has read its share gives the blocks of all back."""
    release = lease_table.LeaseTable.release

    def released(self, token, consumer, *, read):
        return release(self, token, consumer._replace(world=1), read=read)

    patch(lease_table.LeaseTable, "release", released)


@bug
def one_rank_grants_for_all(patch):
    """A grant of one rank of a producer counts as granted by all."""
    patch(
        held_lease.HeldLease,
        "readable",
        property(lambda self: any(rank_lease.grant is not None for rank_lease in self.rank_leases)),
    )


@bug
def unpacking_not_waited_for(patch):
    """Bytes count as unpacked while the device still unpacks them."""
    patch(read_requests.ReadRequests, "_copy", lambda self, strand, request: self._strands.answer(strand))


@bug
def packing_not_waited_for(patch):
    """A chunk is told to be there while the device still packs it."""
    pack = packer.Packer._pack

    def packed(self, job, slot):
        pack(self, job, slot)
        if self._running and self._running[-1][0] is job:
            self._running.pop()
            self._packed(job.key, job.number, slot, None)

    patch(packer.Packer, "_pack", packed)


@bug
def slot_given_back_while_it_is_packed(patch):
    """A chunk that is not wanted any more makes room for the next one while the device still packs it."""
    end = packer.Packer.end

    def ended(self, key, numbers):
        self._running = [
            each for each in self._running if each[0].key != key or (numbers and each[0].number not in numbers)
        ]
        end(self, key, numbers)

    patch(packer.Packer, "end", ended)


@bug
def device_failure_at_the_producer_ignored(patch):
    """Blocks that a device has failed to write are published all the same."""
    init = deferred.DeferredSteps.__init__
    patch(deferred.DeferredSteps, "__init__", lambda self, failed: init(self, lambda token, why: None))


@bug
def device_failure_at_the_consumer_ignored(patch):
    """Bytes that a device has failed to unpack count as delivered."""
    copied = read_requests.ReadRequests._copied

    def whatever(self, each):
        each.copies = []
        copied(self, each)

    patch(read_requests.ReadRequests, "_copied", whatever)


@bug
def closed_without_a_word(patch):
    """An endpoint that is closed does not tell its engine how its leases end."""
    patch(producer.Producer, "close", lambda self: None)


@bug
def overtaken_chunk_taken_for_an_old_one(patch):
    """A chunk that is asked for after the one behind it is taken for one that was here before."""
    patch(
        staged_chunks.ConsumerChunks,
        "was_released",
        lambda self, number: number < self.next_number and number not in self.asked,
    )


@bug
def part_in_flight_not_waited_for(patch):
    """Bytes that are moved in several parts count as there when the first one is; the lease check follows that."""
    advance = Flights.advance

    def first_only(self, flight):
        advance(self, flight)
        del flight._parts[1:]

    patch(Flights, "advance", first_only)


@bug
def agent_renewed_for_each_silent_contact(patch):
    """Each first contact that hangs tears the agent down, as often as there are any."""
    patch(contacts.Contacts, "may_renew", lambda self, hanging, *, busy: True)


@bug
def agent_renewed_for_all_that_is_early(patch):
    """An early move is taken for lost as soon as it is under way."""
    patch(contacts.Contacts, "hanging_early", lambda self: list(self._early.values()))


@bug
def silent_peers_stop_all_reads(patch):
    """No read from another peer begins while one peer is silent."""
    meet = contacts.Contacts.meet

    def one_after_the_other(self, strand, source):
        info = (source.op, source.granted.agent_info)
        others = [contact for known, contact in self._contacts.items() if known != info]
        if any(contact.silent for contact in others):
            others[0].waiting.append(strand)
        else:
            meet(self, strand, source)

    patch(contacts.Contacts, "meet", one_after_the_other)
    patch(read_requests.ReadRequests, "_proven", lambda self, source: False)


@bug
def cell_not_wiped(patch):
    """The check of a lease stays in its cell when the lease has ended, until the cell is another lease's."""

    def free_only(self, address):
        self._free.insert(0, self._index(address))  # to be taken last

    patch(lease_board.LeaseBoard, "wipe", free_only)


@bug
def standing_still_is_silence(patch):
    """A process that did not run takes its own pause for the silence of its peers and of its devices."""
    patch(control_loop.ControlLoop, "_judge_lateness", lambda self: None)


@bug
def first_piece_is_the_whole_grant(patch):
    """A consumer takes the first piece of a grant for all of it."""
    next_batch = grants.next_batch

    def small(blocks, have=(), nbytes=None):
        return next_batch(blocks, have, 8)._replace(more=False)

    patch(producer, "next_batch", small)


@bug
def slots_withdrawn_under_a_lease_that_stands(patch):
    """Slots of chunks that are not released yet are given to waiting consumers, while their lease stands."""
    short = chunk_staging.ChunkStaging.short_of_slots

    def withdrawn(self, share, now):
        short(self, share, now)
        for key, chunks in self._chunks._by_key.items() if share else ():
            packed = [number for number, chunk in chunks.asked.items() if isinstance(chunk.result, int)]
            self._out.extend([EndPack(key, packed)] if packed else [])

    patch(chunk_staging.ChunkStaging, "short_of_slots", withdrawn)


@bug
def one_check_for_all(patch):
    """Every lease has the same check: a cell that is another lease's by now still stands for the one before."""
    post = lease_board.LeaseBoard.post
    make_readable = lease_table.LeaseTable._make_readable

    def readable(self, lease, blocks, first_tokens, **options):
        make_readable(self, lease, blocks, first_tokens, **options)
        lease.check = b"\1" * 16

    patch(lease_board.LeaseBoard, "post", lambda self, check: post(self, b"\1" * 16))
    patch(lease_table.LeaseTable, "_make_readable", readable)

# SPDX-License-Identifier: Apache-2.0
"""Producer and consumer of the protocol, driven by the steps of an input, on a clock that it moves. Only the data thread is a model.

An input is a list of steps: ``["say", who, message]`` (``who`` is a connection of the producer, or ``"peer"`` for the consumer's
producer), ``["wait", seconds]``, ``["announce" | "offer" | "seal" | "revoke", n]`` and ``["hold" | "read" | "take" | "drop", n]``, where
``n`` is the number of a lease (``seal`` publishes some blocks, ``offer`` all of them, ``hold`` acquires, ``take`` reads with a grant that is
there, ``drop`` releases); ``["stage" | "unstage" | "write" | "stop" | "unwrite" | "done", n]`` are events of the data thread on the
oldest read, and ``["wrote", n]`` ends what it writes for consumers. In messages ``$epoch`` stands for the epoch of the receiver, ``$<n>``
for a lease's token, and ``$check<n>`` for its check.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np

from kvxfer.buffers.cache import KVCache
from kvxfer.config import Settings
from kvxfer.errors import IncompatibleError, TransferTimeoutError, WireError
from kvxfer.layout.block_table import check_tables
from kvxfer.layout.spec import encode_spec
from kvxfer.metrics import Metrics
from kvxfer.planner.costs import Costs
from kvxfer.planner.plan import plan
from kvxfer.planner.router import Router
from kvxfer.protocol import messages
from kvxfer.protocol.actions import Emit, EndWrite, Reply, SendTo, StartPack, StartRead, StartWrite, StopRead
from kvxfer.protocol.consumer import Consumer
from kvxfer.protocol.lease_board import LeaseBoard
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.protocol.lease_table import LeaseTable
from kvxfer.protocol.peer import Identity
from kvxfer.protocol.producer import Producer
from kvxfer.protocol.transfer import Transfer
from tests.core.protocol.virtual import agent_info

PEER = "tcp://peer:1"
LEASES, STEPS = 8, 60
EPOCH = "e" * 16
INFO = agent_info("c", 0, "c" * 16)
NOT_TO_BE_PACKED, NEVER_PACKED = 49, 50
"""Numbers of a chunk that cannot be packed, and of those, with all above it, that wait for a slot for ever."""


def cache() -> KVCache:
    """Two layers, a few KiB."""
    layers = {f"layer.{i}": np.zeros((16, 2, 4, 16), dtype=np.uint16) for i in range(2)}
    return KVCache.from_layers(layers, block_tokens=4)


SPEC = cache().spec


def reference(number: int) -> LeaseRef:
    """One of the leases that an input may speak of."""
    made = LeaseRef.mint(producer="peer", addresses=[PEER], num_tokens=40)
    return msgspec.structs.replace(made, token=f"{number % LEASES:032x}", rendezvous=number % LEASES == 7)


class Machine:
    """One endpoint without I/O. What it is told to do for others is done at once, if it can be done at all."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.out: list[Any] = []
        self.metrics = Metrics()
        settings = Settings()
        self.table = table = LeaseTable(settings, LeaseBoard(4, 1))
        me = Identity("me", EPOCH, "inproc", b"me", SPEC, True, 1 << 16, frozenset({"bfloat16", "float16"}))
        self.producer = Producer(me, table, settings, self.metrics, self.out)
        self.consumer = Consumer(me, settings, self.metrics, self.out, self._routes)
        self.reading: list[StartRead] = []
        self.writing: dict[Any, StartWrite] = {}
        self.ended: list[Transfer] = []
        self.transfers: list[Transfer] = []
        self.offered: list[str] = []
        self.ends: list[str] = []

    def _routes(self, peers: Any) -> list[Router | None]:
        made = plan([peer.spec for peer in peers], SPEC)
        return [Router(part, Costs(), slot_nbytes=1 << 16) if part.overlaps else None for part in made.rank_plans]

    def step(self, step: Any) -> None:
        """One of an input; what is none does nothing."""
        if not isinstance(step, list) or len(step) < 2 or not isinstance(step[0], str):
            return
        what, argument = step[0], step[1]
        if what == "say" and len(step) > 2:
            self._say(argument, step[2])
        elif what == "wait" and isinstance(argument, (int, float)):
            self.advance(min(max(float(argument), 0.0), 5000.0) if not math.isnan(argument) else 0.0)
        elif type(argument) is int:
            self._act(what, argument)
        self.perform()

    def _act(self, what: str, number: int) -> None:
        ref, blocks = reference(number), [np.array([1, 2, 3], dtype="<u4").tobytes()]
        if what == "announce":
            self.producer.announce(ref.token, "r", self.now)
        elif what == "offer":
            self.offered.append(ref.token)
            self.producer.publish(ref.token, blocks, self.now)
        elif what == "seal":
            self.producer.publish(ref.token, blocks, self.now, complete=False)
        elif what == "other":
            other = [np.array([9, 8], dtype="<u4").tobytes()]  # which does not continue the published blocks
            self.producer.publish(ref.token, other, self.now, complete=False)
        elif what == "short":
            self.producer.short_of_slots(number % 3, self.now)
        elif what == "gone":
            self.producer.disconnected(b"a", self.now)
        elif what == "still":
            self.producer.was_paused(self.now, float(number % 60))
            self.consumer.was_paused(self.now, float(number % 60))
        elif what == "unreachable":
            self.consumer.unreachable(PEER, "no such host", self.now)
        elif what == "revoke":
            self.producer.revoke(ref.token, "because")
        elif what == "hold":
            self.consumer.acquire(ref, self.now)
        elif what == "drop":
            self.consumer.release(ref, self.now)
        elif what == "wrote":
            for key in list(self.writing):
                self._written(key, "" if number % 2 else "broken", quiet=number % 3 > 0)
        elif what in ("read", "take"):
            into = check_tables(SPEC, [4, 5, 6], "target", distinct=True)
            transfer = Transfer(ref, into, None, self.now + 30.0, self.ended.append, lambda: self.now)
            self.transfers.append(transfer)
            job = self.consumer.claim(transfer) if what == "take" and self.consumer.granted(ref.token) else None
            if job is None:
                self.consumer.read(transfer, self.now)
            else:
                self.reading.append(job)
                self.consumer.read(transfer, self.now, claimed=True)
        elif self.reading:
            transfer, number = self.reading[0].transfer, number % 99
            if what == "stage":
                stage = messages.StageChunk(
                    token=transfer.ref.token, number=number, layout=encode_spec(SPEC), tokens=(0, 4)
                )
                self.consumer.stage(transfer, 0, stage, self.now)
            elif what == "unstage":
                self.consumer.unstage(transfer, 0, [number])
            elif what == "write":
                write = messages.Write(
                    token=transfer.ref.token,
                    check=bytes(16),
                    number=number,
                    agent_info=INFO,
                    steps=[bytes(24)],
                    within_s=5.0,
                )
                self.consumer.write(transfer, 0, write, self.now)
            elif what == "stop":
                self.consumer.write(transfer, 0, messages.StopWrite(token=transfer.ref.token, number=number), self.now)
            elif what == "unwrite":
                self.consumer.unwrite(transfer, 0, [number])
            elif what == "done":
                self._end(transfer, None)

    def _say(self, who: Any, message: Any) -> None:
        try:
            decoded = messages.decode(msgspec.msgpack.encode(self._filled(message)))
        except (WireError, msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError):
            if who == "peer":
                self.consumer.garbage(PEER, "no message", self.now)
            else:
                self.producer.garbage(b"c", "garbage", "no message")
            return
        if who == "peer":
            self.consumer.received(PEER, decoded, self.now)
        else:
            self.producer.received(str(who)[:8].encode("utf-8", "replace"), decoded, self.now)

    def perform(self) -> None:
        """Do what both halves ask for. Whatever they send has to be a message that the other side can read."""
        while self.out:
            action = self.out.pop(0)
            if isinstance(action, (SendTo, Reply)):
                assert messages.decode(messages.encode(action.message)) == action.message
            elif isinstance(action, StartPack) and action.number < NEVER_PACKED:
                error = IncompatibleError("chunk", "is not here") if action.number == NOT_TO_BE_PACKED else None
                packed = b"digest" if action.digest else 4096
                self.producer.packed(action.key, action.number, packed if error is None else None, error)
            elif isinstance(action, StartWrite):
                self.writing[action.key] = action
            elif isinstance(action, EndWrite):
                self._written(action.key, "given up", quiet=True)
            elif isinstance(action, StartRead):
                self.reading.append(action)
            elif isinstance(action, StopRead):
                self._end(action.transfer, action.error)
            elif isinstance(action, Emit):
                self.ends.append(action.event.token)

    def _written(self, key: Any, error: str, *, quiet: bool) -> None:
        job = self.writing.pop(key, None)
        if job is not None:
            self.producer.written(key, job.token, error, quiet=quiet)

    def _end(self, transfer: Transfer, error: Any) -> None:
        self.reading = [job for job in self.reading if job.transfer is not transfer]
        transfer.end(error)
        self.consumer.read_ended(transfer, error, self.now)

    def _filled(self, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("$check"):
            lease = self.table.get(f"{int(value[-1]) if value[-1].isdigit() else 0:032x}")
            return lease.check if lease is not None else bytes(16)
        if isinstance(value, str) and value.startswith("$"):
            return EPOCH if value == "$epoch" else f"{int(value[1:2]) if value[1:2].isdigit() else 0:032x}"
        if isinstance(value, list):
            return [self._filled(each) for each in value]
        return {key: self._filled(each) for key, each in value.items()} if isinstance(value, dict) else value

    def advance(self, seconds: float) -> None:
        """Let time pass, and all that is due happen."""
        until = self.now + seconds
        for _ in range(50_000):
            deadlines = [d for d in (self.producer.next_deadline(), self.consumer.next_deadline()) if d is not None]
            deadlines += [job.transfer.deadline for job in self.reading]
            due = min(deadlines, default=until)
            if due > until:
                break
            self.now = max(self.now, due)
            for job in [job for job in self.reading if job.transfer.deadline <= self.now]:
                self._end(job.transfer, TransferTimeoutError("too late"))
            self.producer.tick(self.now)
            self.consumer.tick(self.now)
            self.perform()
            if not deadlines:
                break
        else:
            raise AssertionError("timers spin")
        self.now = max(self.now, until)


def run(steps: Any) -> bool:
    """All steps, and then so much time that everything must have ended."""
    machine = Machine()
    for step in steps[:STEPS] if isinstance(steps, list) else []:
        machine.step(step)
    machine.producer.short_of_slots(0, machine.now)  # else it looks each moment who keeps them
    # Longer than the longest deadline: an announced lease that is never published.
    machine.advance(3 * 3600.0)
    machine.advance(3600.0)
    assert not any(machine.producer.in_use().values()), machine.producer.in_use()
    assert not any(machine.consumer.in_use().values()), machine.consumer.in_use()
    assert all(transfer.done for transfer in machine.transfers)
    assert len(machine.ended) == len(machine.transfers), "a transfer ended twice"
    assert set(machine.ends) <= set(machine.offered) and set(machine.offered) <= set(machine.ends)
    return bool(machine.ends) or any(transfer.error is None for transfer in machine.transfers)


def seeds() -> list[Any]:
    """Conversations as they should be, each with what may go wrong in it."""

    def said(message: messages.Message, **more: Any) -> Any:
        return {**msgspec.msgpack.decode(messages.encode(message)), **more}

    hello = said(messages.Hello(protocol=messages.PROTOCOL, name="c", epoch="c" * 16, rank=0, agent="inproc"))
    stage = messages.StageChunk(token="0" * 32, number=0, layout=encode_spec(SPEC), tokens=(0, 8), released=[])
    welcome = said(
        messages.Welcome(
            protocol=messages.PROTOCOL,
            name="peer",
            epoch="p" * 16,
            rank=0,
            agent="inproc",
            agent_info=agent_info("peer", 0, "p" * 16),
            spec=SPEC,
            slot_nbytes=1 << 16,
        )
    )
    write = {"type": "Write", "to": "$epoch", "token": "$1", "check": "$check1", "agent_info": INFO, "within_s": 5.0}
    write["steps"] = [np.array([64, 128, 16], dtype="<u8").tobytes()]
    grant = {
        "type": "Grant",
        "token": "$2",
        "blocks": [b"\1\0\0\0\2\0\0\0\3\0\0\0"],
        "cell": 64,
        "check": bytes(16),
        "ttl_s": 30.0,
    }
    producing = [
        ["announce", 1], ["say", "a", hello], ["say", "a", {"type": "Acquire", "to": "$epoch", "token": "$1"}], ["seal", 1], ["offer", 1],
        ["say", "a", {"type": "Renew", "to": "$epoch", "tokens": ["$1", "$2"]}],
        ["say", "a", {**said(stage), "to": "$epoch", "token": "$1"}],
        ["say", "a", {"type": "ReleaseChunks", "to": "$epoch", "token": "$1", "numbers": [0]}],
        ["say", "a", {**said(stage), "to": "$epoch", "token": "$1"}], ["wait", 10.0],
        ["say", "a", {"type": "Release", "to": "$epoch", "token": "$1", "read": True}],
    ]  # fmt: skip
    consuming = [
        ["hold", 2], ["say", "peer", welcome], ["say", "peer", {"type": "Pending", "token": "$2"}], ["say", "peer", grant], ["read", 2],
        ["say", "peer", {"type": "ChunkReady", "token": "$2", "number": 0, "address": 4096}],
        ["say", "peer", {"type": "Renewed", "ended": ["$3"]}], ["wait", 40.0],
        ["say", "peer", {"type": "Released", "token": "$2", "stood": True}],
    ]  # fmt: skip
    pressed = [
        ["announce", 6], ["say", "a", hello], ["say", "a", {"type": "Acquire", "to": "$epoch", "token": "$6"}], ["offer", 6],
        ["say", "a", {**said(stage), "to": "$epoch", "token": "$6"}],
        *(["say", "a", {**said(stage), "to": "$epoch", "token": "$6", "number": number}] for number in (3, 4, 49)),
        ["say", "a", {**said(stage), "to": "$epoch", "token": "$6", "number": 5, "digest": True}], ["announce", 5],
        ["say", "b", {**hello, "name": "d"}], ["say", "b", {"type": "Acquire", "to": "$epoch", "token": "$5"}], ["offer", 5],
        ["say", "b", {**said(stage), "to": "$epoch", "token": "$5", "number": 60}], ["short", 1], ["wait", 3.0],
        ["short", 1], ["still", 7], ["gone", 1], ["wait", 8.0], ["short", 0], ["announce", 8], ["seal", 8], ["other", 8], ["offer", 8],
        ["hold", 9], ["unreachable", 9], ["read", 9], ["still", 50], ["read", 3], ["unreachable", 3], ["wait", 20.0],
    ]  # fmt: skip
    troubled = [
        ["say", "a", {**hello, "readers": 2, "reader": 1}], ["say", "a", {"type": "Acquire", "to": "$epoch", "token": "$7", "early": True}],
        ["say", "b", hello], ["say", "b", {"type": "Acquire", "to": "$epoch", "token": "$7"}], ["announce", 7], ["offer", 7], ["offer", 7],
        ["revoke", 7], ["read", 4], ["say", "peer", {"type": "Revoked", "token": "$4", "reason": "gone"}], ["drop", 4],
        ["say", "peer", {**welcome, "epoch": "q" * 16, "agent_info": agent_info("peer", 0, "q" * 16)}], ["read", 5],
        ["say", "peer", {"type": "Refused", "code": "stale_epoch", "reason": "r", "epoch": "z"}],
        ["say", "peer", {"type": "Refused", "code": "ended_lease", "reason": "r", "epoch": "z", "token": "$5"}], ["wait", 700.0],
    ]  # fmt: skip
    sealing = [
        ["read", 7], ["say", "peer", welcome], ["say", "peer", {**grant, "token": "$7", "complete": False}],
        ["say", "peer", {"type": "Refused", "code": "staging", "reason": "r", "epoch": "z", "token": "$7"}],
        ["say", "peer", {**grant, "token": "$7", "first_tokens": [4]}], ["wait", 1.0], ["drop", 7],
    ]  # fmt: skip
    other = {**welcome, "epoch": "q" * 16, "agent_info": agent_info("peer", 0, "q" * 16)}
    restarted = [
        ["hold", 1], ["read", 2], ["hold", 3], ["hold", 4], ["say", "peer", welcome], ["say", "peer", grant], ["say", "peer", {**grant, "token": "$3"}],
        ["drop", 4], ["say", "peer", other], ["wait", 0.6], ["say", "peer", {**grant, "token": "$1"}], ["take", 1], ["done", 1],
        ["read", 3], ["say", "peer", welcome], ["wait", 1.0], ["say", "peer", {"type": "Released", "token": "$1", "stood": True}],
    ]  # fmt: skip
    staging = [
        ["read", 7], ["say", "peer", welcome], ["say", "peer", {**grant, "token": "$7", "complete": False, "blocks": [b"\1\0\0\0"]}],
        ["stage", 0], ["wait", 0.6], ["say", "peer", {"type": "ChunkReady", "token": "$7", "number": 0, "address": 4096}], ["unstage", 0],
        ["stage", 1], ["say", "peer", {**grant, "token": "$7"}], ["unstage", 1], ["done", 1], ["stage", 2],
    ]  # fmt: skip
    written = [
        ["announce", 1], ["say", "a", hello], ["say", "a", {"type": "Acquire", "to": "$epoch", "token": "$1"}], ["offer", 1],
        *(["say", "a", {**write, "number": number}] for number in (3, 4, 4)), ["wrote", 1], ["say", "a", {**write, "number": 4}],
        *(["say", "a", {"type": "AskWrite", "to": "$epoch", "token": "$1", "number": number}] for number in (3, 4, 9)),
        ["say", "a", {**write, "number": 5, "over_below": 5}], ["say", "a", {"type": "StopWrite", "to": "$epoch", "token": "$1", "number": 5}],
        ["wrote", 6], ["say", "a", {**write, "number": 5}], ["say", "a", {"type": "StopWrite", "to": "$epoch", "token": "$1", "number": 6}],
        ["say", "a", {**write, "number": 7, "check": bytes(16)}], ["say", "a", {**write, "number": 8, "agent_info": b"x"}],
        ["say", "a", {**write, "number": 9}], ["say", "a", {"type": "Release", "to": "$epoch", "token": "$1", "read": True}],
        ["say", "a", {**write, "number": 10}],
    ]  # fmt: skip
    writing = [
        ["read", 7], ["say", "peer", welcome], ["write", 9],
        ["say", "peer", {**grant, "token": "$7", "blocks": [b"\1\0\0\0"], "more": True}], ["say", "peer", {**grant, "token": "$7"}], ["write", 1], ["write", 2], ["wait", 0.6],
        *(["say", "peer", {"type": "SendWrite", "token": "$7", "number": number}] for number in (2, 2, 5)),
        ["say", "peer", {"type": "Wrote", "token": "$7", "number": 1}], ["stop", 2], ["wait", 0.6],
        ["say", "peer", {"type": "Wrote", "token": "$7", "number": 2, "error": "stopped", "quiet": False}], ["write", 3], ["unwrite", 3],
        ["done", 1], ["write", 4],
    ]  # fmt: skip
    refusals = [
        step
        for code in ("rank", "agent", "protocol", "not_introduced", "unknown_lease", "taken_lease", "of the future")
        for step in (
            ["read", 2], ["say", "peer", {"type": "Refused", "code": code, "reason": "r", "epoch": "z", "token": "$2", "rank": 0}],
            ["say", "peer", welcome], ["wait", 0.6], ["drop", 2], ["say", "peer", {"type": "Released", "token": "$2", "stood": True}],
        )
    ]  # fmt: skip
    strangers = [
        ["read", 1], ["say", "peer", {**welcome, "name": "another"}], ["wait", 1.0], ["read", 2], ["say", "peer", {**welcome, "protocol": 1}],
        ["read", 3], ["say", "peer", {**welcome, "agent": "nixl"}], ["wait", 1.0], ["say", "peer", {**welcome, "rank": 1}], ["read", 4],
        ["say", "a", {"type": "Acquire", "to": "x", "token": "$1"}], ["say", "a", {"type": "Released", "token": "$1", "stood": True}],
        ["say", "a", {**hello, "protocol": 9}], ["say", "a", {**hello, "protocol": 2, "highest": 4}], ["say", "a", {**hello, "rank": 4}], ["say", "a", {**hello, "agent": "x"}],
        ["say", "a", {**hello, "reader": 3}], ["say", "peer", hello], ["wait", 20.0], ["say", "peer", {**welcome, "spec": None}],
    ]  # fmt: skip
    return [
        producing,
        consuming,
        troubled,
        sealing,
        producing + consuming,
        restarted,
        staging,
        written,
        writing,
        refusals,
        strangers,
        pressed,
    ]

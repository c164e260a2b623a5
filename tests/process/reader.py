# SPDX-License-Identifier: Apache-2.0
"""A misbehaving consumer, in a process of its own: it sends messages of the protocol by hand, and takes no chunk that it asked for.

``python -m tests.process.reader LEASE SPEC CHUNKS``: opens the lease, asks for that many chunks of one block each, says how many
are packed once that no longer changes, and then sends nothing, or with ``--renew`` only renewals of the lease.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq

from kvxfer.layout.spec import CacheSpec, encode_spec
from kvxfer.planner.chunks import ChunkPlanner
from kvxfer.planner.plan import plan
from kvxfer.protocol import messages
from kvxfer.protocol.lease_ref import LeaseRef

QUIET_S = 0.5


class Member:
    """An authenticated consumer that sends any message."""

    def __init__(self, address: str, name: str = "member", agent: str = "inproc", reader: int = 0) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.connect(address)
        hello = messages.Hello(
            protocol=messages.PROTOCOL,
            name=name,
            epoch="e" * 16,
            rank=0,
            agent=agent,
            consumer_rank=reader,
            consumer_world=reader + 1,
        )
        self.say(hello)
        self.welcome: Any = self.hear(messages.Welcome)

    def say(self, message: messages.Message) -> None:
        self.socket.send(messages.encode(message))

    def hear(self, kind: type = object, timeout_s: float = 30.0) -> Any:
        """The next message of that kind; None if there is none in time."""
        until = time.monotonic() + timeout_s
        while (left_s := until - time.monotonic()) > 0:
            if self.socket.poll(int(left_s * 1000) + 1):
                message = messages.decode(self.socket.recv())
                if isinstance(message, kind):
                    return message
        return None

    def stage(self, token: str, number: int, layout: CacheSpec, tokens: tuple[int, int], **more: Any) -> None:
        """Ask for a chunk."""
        fields = {"to": self.welcome.epoch, "token": token, "number": number, "tokens": tokens}
        self.say(messages.StageChunk(**fields, layout=encode_spec(layout), **more))


def main(ref: str, spec: str, chunks: str, *options: str) -> None:
    lease = LeaseRef.from_json(ref)
    mine = msgspec.json.decode(Path(spec).read_bytes(), type=CacheSpec)
    member = Member(lease.addresses[0], name=f"reader-{lease.token[:4]}")
    member.say(messages.Acquire(to=member.welcome.epoch, token=lease.token))
    member.hear(messages.Grant)
    part = plan([member.welcome.spec], mine).rank_plans[0]
    chunk_planner = ChunkPlanner(part, "target", member.welcome.slot_nbytes)
    block = member.welcome.spec.groups[0].table_tokens
    for number in range(int(chunks)):
        tokens = (number * block, (number + 1) * block)
        chunk = next(iter(chunk_planner.chunks([tokens] * len(mine.groups))))
        member.stage(lease.token, number, chunk_planner.layout(chunk).source, chunk.tokens)
    packed = 0
    while member.hear(messages.ChunkReady, QUIET_S) is not None:
        packed += 1
    print(packed, flush=True)  # noqa: T201
    while True:
        if "--renew" in options:
            member.say(messages.Renew(to=member.welcome.epoch, tokens=[lease.token]))
        time.sleep(0.2)


if __name__ == "__main__":
    main(*sys.argv[1:])

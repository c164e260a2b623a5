# SPDX-License-Identifier: Apache-2.0
"""Records what two endpoints of this version say to each other, for the tests of later versions.

python -m tests.core.protocol.recording    write recorded/protocol_N.json, N the highest version that is spoken here

To be run before the number of the protocol is raised. `test_versions` plays each half of the recording to the other half of today.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from kvxfer.protocol import messages
from tests.core.protocol.virtual import Node, World

FOLDER = Path(__file__).parent / "recorded"
PRODUCER, CONSUMER = "producer", "consumer"


class _Recorder(World):
    """A world that notes each message which arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[dict[str, str]] = []

    def deliver(self, index: int = 0) -> None:
        """Note the message, then deliver it."""
        parcel = self.network[index]
        said = type(messages.decode(parcel.data)).__name__
        heard = {"by": self.nodes[parcel.sender].name, "message": said, "bytes": parcel.data.hex()}
        if heard not in self.heard:  # repeated questions, and their answers
            self.heard.append(heard)
        super().deliver(index)


def recorded() -> dict[str, Any]:
    """A partial lease that is read in place, a lease that is read in chunks, one that is held and then revoked, and an unknown one."""
    world = _Recorder()
    producer, consumer = world.node(PRODUCER), world.node(CONSUMER)
    direct = producer.announce()
    transfers = [consumer.read(direct, 1, 2, 3)]
    producer.publish(direct, 3, complete=False)
    world.advance(0.2)
    producer.publish(direct, 3, 5, 7)
    world.advance(1)
    packed = producer.lease(2, 4, 6)
    transfers.append(consumer.read(packed, 4, 5, 6, packed=True))
    world.advance(1)
    assert all(transfer.done and transfer.error is None for transfer in transfers)
    held = producer.lease(1)
    consumer.acquire(held)
    world.advance(12)
    producer.revoke(held)
    world.advance(1)
    unknown = producer.mint()
    refused = consumer.read(unknown, 1)
    world.advance(1)
    assert refused.error is not None
    return {
        "protocol": messages.PROTOCOL,
        "producer": _who(producer),
        "consumer": _who(consumer),
        "tokens": {"direct": direct.token, "packed": packed.token, "held": held.token, "unknown": unknown.token},
        "talk": world.heard,
        "schema": msgspec.json.schema(messages.Message),
    }


def _who(node: Node) -> dict[str, str]:
    return {"name": node.name, "address": node.address, "epoch": node.epoch, "agent": node.agent}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"protocol_{messages.PROTOCOL}.json"
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in recorded().items()]
    path.write_text("{\n" + ",\n".join(lines).replace('}, {"by"', '},\n  {"by"') + "\n}\n")
    print(path)

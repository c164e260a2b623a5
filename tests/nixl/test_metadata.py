# SPDX-License-Identifier: Apache-2.0
"""NIXL's metadata, whose lengths NIXL trusts: malformed metadata, or that of another agent, does not reach NIXL.

White-box: the reader of NIXL's own format is asked as well.
"""

from __future__ import annotations

import struct
import time
from random import Random

import msgspec
import numpy as np
import pytest

from kvxfer.agents.capabilities import Op
from kvxfer.agents.flights import FlightState
from kvxfer.errors import PeerInfoError
from kvxfer.memory.spans import Descriptors, Memory
from kvxfer.testing import eventually
from kvxfer_nixl._metadata import agent_name
from tests.nixl.agents import nixl_agent


@pytest.fixture
def agents():
    """Make agents with 64 KiB of memory each."""
    made = []

    def make(name):
        agent, memory = nixl_agent(name), np.full(1 << 16, len(made) + 1, np.uint8)
        agent.register(Memory(memory.ctypes.data, memory.nbytes))
        made.append((agent, memory))
        return agent, memory

    yield make
    for agent, _ in made:
        agent.close()


def metadata_of(agent):
    return msgspec.msgpack.decode(msgspec.msgpack.decode(agent.describe())["native"])["metadata"]


def with_metadata(info, metadata):
    """A description with other NIXL metadata in it."""
    outer = msgspec.msgpack.decode(info)
    native = {**msgspec.msgpack.decode(outer["native"]), "metadata": metadata}
    return msgspec.msgpack.encode({**outer, "native": msgspec.msgpack.encode(native)})


def fields(metadata):
    """Where each field's tag begins, its value begins and ends."""
    at, found = len(b"nixlSerDes|"), []
    while at < len(metadata):
        for tag in (b"Agent", b"Conns", b"nixlSecElms", b"bknd", b"nixlDList", b"t", b"c", b"n", b""):
            begin = at + len(tag) + 8
            if metadata.startswith(tag, at) and begin <= len(metadata):
                (length,) = struct.unpack_from("<Q", metadata, at + len(tag))
                if metadata[begin + length : begin + length + 1] == b"|":
                    found.append((at, begin, begin + length))
                    at = begin + length + 1
                    break
        else:
            raise AssertionError(f"no field at {at}")
    return found


def read_from(agent, memory, peer, address):
    """The first byte there."""
    flight = agent.submit(
        Op.READ, peer, Descriptors.of(memory.ctypes.data, address, 64), deadline=time.monotonic() + 20
    )
    eventually(lambda: agent.poll() or flight.finished, what="the read ends")
    assert flight.state is FlightState.DONE, flight.error
    return memory[0]


def test_real_metadata_is_well_formed(agents):
    """The metadata of this NIXL is read to its end, and has the name of the agent that wrote it (white-box: it knows the frame)."""
    agent, _ = agents("metadata/0/e/1")
    assert agent._knows_frame
    assert agent_name(metadata_of(agent)) == "metadata/0/e/1"


def test_malformed_metadata_is_refused(agents):
    """Cut anywhere, with any length or count changed, or with bytes behind its end, it is refused with a named error, and no process crashes."""
    here, memory = agents("metadata-here/0/e/1")
    there, content = agents("metadata-there/0/e/1")
    good, random = metadata_of(there), Random(0)
    bad = [good[:end] for end in range(0, len(good) - 1, 3)] + [good + b"|", good + good]
    for at, begin, end in fields(good):
        lengths = {0, 1, (end - begin) + 1, 1 << 31, (1 << 64) - 1} - {end - begin}
        bad += [good[: begin - 8] + struct.pack("<Q", length) + good[begin:] for length in lengths]
        bad.append(good[:at] + b"?" + good[at + 1 :])
        if end - begin == 8:  # a count
            (count,) = struct.unpack_from("<Q", good, begin)
            numbers = (count + 1, 1 << 20, 1 << 63, random.getrandbits(64))
            bad += [good[:begin] + struct.pack("<Q", number) + good[end:] for number in numbers]
    for data in bad:
        with pytest.raises(PeerInfoError):
            here.connect(with_metadata(there.describe(), data))
    assert read_from(here, memory, here.connect(there.describe()), content.ctypes.data) == 2


def test_metadata_of_another_agent_harms_nobody(agents):
    """A description with another agent's metadata is refused, and that other agent stays connected."""
    here, memory = agents("metadata-reader/0/e/1")
    honest, content = agents("metadata-honest/0/e/1")
    liar, _ = agents("metadata-liar/0/e/1")
    peer = here.connect(honest.describe())
    assert read_from(here, memory, peer, content.ctypes.data) == 2
    with pytest.raises(PeerInfoError, match="metadata-honest"):
        here.connect(with_metadata(liar.describe(), metadata_of(honest)))
    memory[:] = 0
    assert read_from(here, memory, peer, content.ctypes.data) == 2

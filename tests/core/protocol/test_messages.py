# SPDX-License-Identifier: Apache-2.0
"""Messages: what one end encodes the other decodes, and nothing else comes through."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer.errors import WireError
from kvxfer.layout.spec import encode_spec
from kvxfer.protocol import messages
from tests.core.protocol.virtual import small_cache

TOKEN = "ab" * 16
SPEC = small_cache().spec
MESSAGES = [
    messages.Hello(protocol=messages.PROTOCOL, name="n", epoch="e", rank=3, agent="nixl"),
    messages.Welcome(
        protocol=messages.PROTOCOL, name="n", epoch="e", rank=0, agent="nixl", agent_info=b"\0\xff", spec=SPEC
    ),
    messages.Acquire(to="e", token=TOKEN),
    messages.Pending(token=TOKEN),
    messages.Grant(token=TOKEN, blocks=[b"\1\0\0\0", b""], cell=(1 << 63) - 1, check=bytes(16), ttl_s=0.5),
    messages.Renew(to="e", tokens=[TOKEN] * 4096),
    messages.Renewed(ended=[TOKEN]),
    messages.Release(to="e", token=TOKEN, read=True),
    messages.Released(token=TOKEN, was_live=False),
    messages.Revoked(token=TOKEN, reason="because"),
    messages.Refused(code="garbage", reason="because", epoch="e"),
    messages.StageChunk(
        to="e",
        token=TOKEN,
        number=(1 << 31) - 1,
        layout=encode_spec(SPEC),
        tokens=(3, 1 << 40),
        released=[0, 7],
    ),
    messages.ChunkReady(token=TOKEN, number=0, address=(1 << 63) - 1),
    messages.ReleaseChunks(to="e", token=TOKEN, numbers=[0, 7]),
    messages.Hello(
        protocol=messages.PROTOCOL, name="n", epoch="e", rank=0, agent="nixl", consumer_rank=1023, consumer_world=1024
    ),
    messages.Grant(token=TOKEN, blocks=[b"", b""], first_tokens=[0, 1 << 40], cell=0, check=bytes(16), ttl_s=30.0),
    messages.Welcome(
        protocol=messages.PROTOCOL,
        name="n",
        epoch="e",
        rank=0,
        agent="nixl",
        agent_info=b"",
        spec=SPEC,
        addressable=False,
        slot_nbytes=1 << 40,
    ),
    messages.Write(
        to="e",
        token=TOKEN,
        check=bytes(16),
        number=(1 << 62) - 1,
        agent_info=b"\xff",
        steps=[bytes(24), bytes(48)],
        within_s=0.5,
        over_below=7,
    ),
    messages.AskWrite(to="e", token=TOKEN, number=0),
    messages.SendWrite(token=TOKEN, number=(1 << 62) - 1),
    messages.StopWrite(to="e", token=TOKEN, number=0),
    messages.Wrote(token=TOKEN, number=0, error="because", quiet=False),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_there_and_back(message):
    """Every message survives the wire unchanged."""
    assert messages.decode(messages.encode(message)) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_every_truncation_is_refused(message):
    """A message cut anywhere is no message."""
    data = messages.encode(message)
    for length in range(0, len(data), max(1, len(data) // 200)):
        with pytest.raises(WireError):
            messages.decode(data[:length])


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_unknown_fields_are_the_future(message):
    """A newer peer may add fields."""
    fields = msgspec.msgpack.decode(messages.encode(message))
    assert messages.decode(msgspec.msgpack.encode({**fields, "from_the_future": [1, {"x": None}]})) == message


BOMBS = {
    "deep arrays": b"\x91" * 100_000,
    "deep maps": b"\x81\xa1a" * 50_000,
    "an array of four thousand million": b"\xdd\xff\xff\xff\xff",
    "a map of four thousand million": b"\xdf\xff\xff\xff\xff",
    "a string of 4 GiB": b"\xdb\xff\xff\xff\xff",
    "a huge claim inside a message": b"\x82\xa4type\xa5Renew\xa6tokens\xdd\xff\xff\xff\xff",
    "too many tokens": msgspec.msgpack.encode({"type": "Renew", "tokens": [TOKEN] * 4097}),
    "an extension": b"\xc7\x03\x05abc",
    "nothing": b"",
    "an integer": b"\x01",
    "text": b"GET / HTTP/1.1\r\n",
    "no type": msgspec.msgpack.encode({"token": TOKEN}),
    "another type": msgspec.msgpack.encode({"type": "Bye"}),
    "something after it": messages.encode(MESSAGES[2]) + b"\x00",
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused(data):
    """Bytes made to hurt a decoder end as one named error, and quickly."""
    with pytest.raises(WireError):
        messages.decode(data)


def _changed(message, **fields):
    return msgspec.msgpack.encode({**msgspec.msgpack.decode(messages.encode(message)), **fields})


@pytest.mark.parametrize(
    ("number", "fields"),
    [
        (4, {"ttl_s": math.inf}), (4, {"ttl_s": math.nan}), (4, {"ttl_s": 0.0}), (4, {"ttl_s": -1.0}), (4, {"ttl_s": 1e300}),
        (4, {"cell": -1}), (4, {"cell": 1 << 63}), (4, {"cell": "x"}), (4, {"blocks": [1, 2]}), (4, {"blocks": [b""] * 1025}),
        (2, {"token": "x" * 32}), (2, {"token": TOKEN + "\n"}), (2, {"token": TOKEN * 2}), (2, {"to": "e" * 33}), (2, {"token": None}),
        (0, {"rank": -1}), (0, {"rank": 1 << 20}), (0, {"name": "n" * 257}), (0, {"protocol": "1"}), (0, {"agent": 7}),
        (1, {"spec": {}}), (1, {"spec": None}), (1, {"agent_info": "text"}),
        (11, {"number": -1}), (11, {"number": 1 << 31}), (11, {"layout": {}}), (11, {"layout": None}), (11, {"tokens": [1]}),
        (11, {"tokens": [-1, 4]}), (11, {"tokens": [0, (1 << 40) + 1]}), (11, {"tokens": [0, 1, 2]}), (11, {"tokens": 7}), (11, {"token": "x"}),
        (12, {"address": -1}), (12, {"address": 1 << 63}), (12, {"number": "1"}), (13, {"numbers": [0] * 1025}), (13, {"numbers": ["0"]}),
        (14, {"consumer_rank": -1}), (14, {"consumer_rank": 1024}), (14, {"consumer_world": 0}), (14, {"consumer_world": 1025}),
        (15, {"first_tokens": [-1]}), (15, {"first_tokens": [(1 << 40) + 1]}), (15, {"first_tokens": [0] * 1025}),
        (16, {"addressable": 1}), (16, {"slot_nbytes": -1}), (16, {"slot_nbytes": (1 << 40) + 1}),
        (10, {"reason": "x" * 1025}), (10, {"code": "x" * 65}), (9, {"reason": None}), (7, {"read": 1}),
    ],
)  # fmt: skip
def test_absurd_values_are_refused(number, fields):
    """A value outside its field's range is refused at the border, before anything is done with it."""
    with pytest.raises(WireError):
        _read(_changed(MESSAGES[number], **fields))


@pytest.mark.parametrize(("number", "field"), [(1, "spec"), (11, "layout")])
def test_a_contradictory_spec_is_refused(number, field):
    """A cache description that contradicts itself, a peer's or a chunk's, ends as the same named error."""
    spec = msgspec.to_builtins(SPEC)
    spec["dtype"] = "complex128"
    with pytest.raises(WireError, match="complex128"):
        _read(_changed(MESSAGES[number], **{field: spec}))


def _read(data):
    """All of it: the description of a chunk too."""
    message = messages.decode(data)
    if isinstance(message, messages.StageChunk):
        messages.layout_of(message)


def test_a_description_of_a_chunk_is_bounded():
    """What takes more bytes than that of any chunk is refused before it is decoded."""
    stage = msgspec.structs.replace(MESSAGES[11], layout=msgspec.Raw(bytes(messages.MAX_CHUNK_LAYOUT_NBYTES + 1)))
    with pytest.raises(WireError, match="262145 bytes"):
        messages.layout_of(stage)


def test_a_peer_without_the_new_fields_is_understood():
    """What was added has defaults: one rank that reads, tokens from the first on, a cache with addresses and no chunks."""
    assert (MESSAGES[0].consumer_rank, MESSAGES[0].consumer_world) == (0, 1) and MESSAGES[4].first_tokens == []
    assert (MESSAGES[1].addressable, MESSAGES[1].slot_nbytes) == (True, 0)
    for message, added in ((MESSAGES[0], {"consumer_rank", "consumer_world"}), (MESSAGES[4], {"first_tokens"})):
        assert not added & msgspec.msgpack.decode(messages.encode(message)).keys()


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data):
    """No byte string does anything but decode or raise WireError."""
    try:
        messages.decode(data)
    except WireError as error:
        assert str(error)


@given(st.sampled_from(MESSAGES), st.integers(0, 500), st.integers(0, 255))
def test_flipped_bytes_are_refused_or_another_message(message, position, value):
    """A message with one byte changed decodes to some message or raises WireError."""
    data = bytearray(messages.encode(message))
    data[position % len(data)] = value
    try:
        decoded = messages.decode(bytes(data))
    except WireError:
        return
    assert isinstance(decoded, tuple(type(m) for m in MESSAGES))

# SPDX-License-Identifier: Apache-2.0
"""Every message that two endpoints exchange: msgspec structs, one msgpack map per message. docs/protocol.md has them as a table.

A message names the epoch of the process it is meant for in ``to`` (empty in `Hello`, by which epochs are learnt), so one meant
for a process that has been restarted since is refused by name. Unknown fields are ignored and new ones have defaults. What
changes the meaning of a message raises the version (`kvxfer.protocol.versions`). Bytes of KV never travel here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any

import msgspec

from kvxfer.config import MAX_S
from kvxfer.errors import WireError, shown
from kvxfer.layout.block_table import MAX_TOKENS
from kvxfer.layout.checks import MAX_RANKS
from kvxfer.layout.spec import CacheSpec
from kvxfer.protocol.versions import SPOKEN, ProtocolVersions

PROTOCOL = SPOKEN.highest
"""Highest version of the protocol that is spoken here."""

MAX_TOKENS_PER_RENEW = 4096

MAX_NAME = 256
MAX_ADDRESS = 256

MAX_CHUNK_LAYOUT_NBYTES = 1 << 18
"""Longest layout of one chunk: a thousand layers with a scale for each of 16 heads."""

Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
Epoch = Annotated[str, msgspec.Meta(max_length=32)]
# \Z and not $, which would let a line break through.
Token = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
TokenIndex = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
Reason = Annotated[str, msgspec.Meta(max_length=1024)]


Address = Annotated[str, msgspec.Meta(max_length=MAX_ADDRESS, pattern=r"^tcp://[^\s/;]+:[0-9]{1,5}\Z")]


class _Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, kw_only=True):
    to: Epoch = ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Fields as people and logs may see them: lease tokens are cut short."""
        return [(name, _shown(name, getattr(self, name))) for name in self.__struct_fields__]


def _shown(name: str, value: Any) -> Any:
    if name == "token" and value:
        return shown(value)
    return [shown(token) for token in value] if name in ("tokens", "ended") and isinstance(value, list) else value


class Hello(_Message, frozen=True, kw_only=True):
    """Introduce a consumer; first on every connection, and again after a refusal."""

    protocol: int
    """Lowest version of the protocol that the consumer speaks."""
    name: Name
    epoch: Epoch
    rank: Annotated[int, msgspec.Meta(ge=0, lt=1 << 20)]
    """Rank of the producer that is meant."""
    agent: Name
    """Adapter by which the consumer moves bytes."""
    consumer_rank: Annotated[int, msgspec.Meta(ge=0, lt=MAX_RANKS)] = 0
    """Rank of the consumer. All ranks of an engine have one name."""
    consumer_world: Annotated[int, msgspec.Meta(gt=0, le=MAX_RANKS)] = 1
    """Number of ranks of the consumer. Each of them releases a lease for itself."""
    highest: int = 0
    """Highest version of the protocol that the consumer speaks; 0, as before version 3: no other than ``protocol``."""

    @property
    def spoken(self) -> ProtocolVersions:
        """Versions that the consumer speaks."""
        return ProtocolVersions(self.protocol, self.highest or self.protocol)


class Welcome(_Message, frozen=True, kw_only=True):
    """Answer `Hello`: introduce the producer, its cache, and how its transfer agent is reached."""

    protocol: int
    """Version of the protocol that both sides speak from now on: the highest that both know."""
    name: Name
    epoch: Epoch
    rank: int
    agent: Name
    agent_info: bytes
    spec: CacheSpec
    addressable: bool = True
    """The cache's memory can be read in place."""
    slot_nbytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)] = 0
    """Largest chunk that can be staged; 0 if none can."""
    casts: Annotated[list[Name], msgspec.Meta(max_length=64)] = []
    """Dtypes that the cache's devices can turn into each other when they pack."""
    addresses: Annotated[list[Address], msgspec.Meta(max_length=MAX_RANKS)] = []
    """Control addresses of the producer's ranks, in rank order, if this rank was told of them."""
    writes: bool = False
    """The producer can move the bytes itself (`Write`)."""


_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 32)]


class Acquire(_Message, frozen=True, kw_only=True):
    """Ask for the blocks of a lease. Idempotent, repeated until all blocks are granted."""

    token: Token
    rendezvous: bool = False
    """The producer may not know the lease yet, and keeps a place for the consumer until it is announced."""
    have: Annotated[list[_Count], msgspec.Meta(max_length=1024)] = []
    """Number of block ids that the consumer has already, per cache group: those that come after them are to be granted."""
    check: Annotated[bytes, msgspec.Meta(max_length=16)] = b""
    """Check of the grant to which ``have`` refers."""


class Pending(_Message, frozen=True, kw_only=True):
    """Answer `Acquire`: no block is complete yet; a `Grant` follows when some are. Also: ask for this chunk again later."""

    token: Token


class Grant(_Message, frozen=True, kw_only=True):
    """Grant blocks of a lease, asked or as soon as they are complete: for ``ttl_s`` from now, or from the last `Renew`."""

    token: Token
    blocks: Annotated[list[bytes], msgspec.Meta(max_length=1024)]
    """Block ids per cache group, in token order, as little-endian uint32; or those that fit into a message (`kvxfer.protocol.grants`)."""
    cell: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    """Address of the lease's cell on the producer's lease board."""
    check: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    """Content of the cell as long as these blocks are leased. No other lease has it, even one with the same token."""
    first_tokens: Annotated[list[TokenIndex], msgspec.Meta(max_length=1024)] = []
    """First token that the first block holds for the request, per cache group; empty where all begin with the first token."""
    complete: bool = True
    """These are all blocks of the lease. Otherwise further grants follow, each of which repeats what came before."""
    ttl_s: Annotated[float, msgspec.Meta(gt=0, le=MAX_S)]
    skip: Annotated[list[_Count], msgspec.Meta(max_length=1024)] = []
    """Number of block ids that come before these, per cache group; empty: none."""
    runs: Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=1024)]], msgspec.Meta(max_length=1024)] = []
    """Groups whose ids are given as runs: pairs of the first id and a length, each little-endian uint32."""
    more: bool = False
    """More block ids are readable. The consumer asks for them by an `Acquire` that says what it has (`Acquire.have`)."""


class Renew(_Message, frozen=True, kw_only=True):
    """Extend leases: the consumer still waits for them or reads them."""

    tokens: Annotated[list[Token], msgspec.Meta(max_length=MAX_TOKENS_PER_RENEW)]


class Renewed(_Message, frozen=True, kw_only=True):
    """Answer `Renew`: all of them are extended but those that have ended."""

    ended: Annotated[list[Token], msgspec.Meta(max_length=MAX_TOKENS_PER_RENEW)]


WriteNumber = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
_Numbers = Annotated[list[int], msgspec.Meta(max_length=1024)]


class StageChunk(_Message, frozen=True, kw_only=True):
    """Have part of a lease's KV packed into a chunk in the staging arena. Idempotent, repeated until answered."""

    token: Token
    number: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    """Number of the chunk among those of this lease and consumer; never used again for another."""
    layout: msgspec.Raw
    """Layout of the chunk, a `CacheSpec`: a cache of one group in blocks 0, 1, ..., at addresses that count from the
    chunk's begin. Decoded by `layout_of`, once it is known that the consumer may ask for the chunk."""
    tokens: tuple[TokenIndex, TokenIndex]
    """First token, and first after the last; the chunk's first block is the one in which the first token lies."""
    released: _Numbers = []
    """Chunks that the consumer has read, as in `ReleaseChunks`: their slots may serve for this one."""
    digest: bool = False
    """Only the chunk's digest is wanted, and not the chunk."""


class ChunkReady(_Message, frozen=True, kw_only=True):
    """Answer `StageChunk`: the chunk is packed, and stays until `ReleaseChunks` or the end of the lease."""

    token: Token
    number: int
    address: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    digest: Annotated[bytes, msgspec.Meta(max_length=64)] = b""
    """The digest, if that was asked for; the chunk is kept nowhere then, and ``address`` means nothing."""


class ReleaseChunks(_Message, frozen=True, kw_only=True):
    """Give back chunks that the consumer has read. Not answered: if it is lost, the lease's end gives them back."""

    token: Token
    numbers: _Numbers


class Write(_Message, frozen=True, kw_only=True):
    """Have the producer write part of a lease's KV into the consumer's memory. Begun once; sent again if it is asked for."""

    token: Token
    check: Annotated[bytes, msgspec.Meta(max_length=16)]
    """Check of the grant: of blocks that were published anew under the token nothing is written."""
    number: WriteNumber
    """Number of the write among all that this consumer asks for; never used again for another."""
    agent_info: bytes
    """Description of the consumer's transfer agent. A newer agent of the same consumer is a newer generation of its memory."""
    steps: Annotated[list[bytes], msgspec.Meta(min_length=1, max_length=8)]
    """Spans to write, see `kvxfer.protocol.write_steps`; each step begins when the one before is in place."""
    within_s: Annotated[float, msgspec.Meta(gt=0, le=MAX_S)]
    """Time after which the consumer does not want it any more."""
    over_below: WriteNumber = 0
    """Writes of this lease with smaller numbers are over for the consumer: they are never begun, nor asked for again."""


class AskWrite(_Message, frozen=True, kw_only=True):
    """Ask what became of a `Write`, without its spans. Begins nothing, and is repeated until the write is answered."""

    token: Token
    number: WriteNumber


class SendWrite(_Message, frozen=True, kw_only=True):
    """Ask for a `Write`: it did not arrive, or had to wait and its turn has come. Unasked, or the answer to `AskWrite`."""

    token: Token
    number: WriteNumber


class StopWrite(_Message, frozen=True, kw_only=True):
    """Have no more written of a `Write` than is on its way. Idempotent, repeated until the write is answered."""

    token: Token
    number: WriteNumber


class Wrote(_Message, frozen=True, kw_only=True):
    """Answer `Write` and `StopWrite`: the write is over."""

    token: Token
    number: WriteNumber
    error: Reason = ""
    """Why not all was written; empty: all is in place."""
    ended: bool = False
    """The lease has ended: that is why."""
    quiet: bool = True
    """Nothing of it will be written any more."""


class Release(_Message, frozen=True, kw_only=True):
    """Give back a lease: the consumer's rank will not touch the blocks any more. Idempotent, repeated until answered."""

    token: Token
    read: bool
    """The bytes were read. Otherwise they were not needed, or reading them failed."""


class Released(_Message, frozen=True, kw_only=True):
    """Answer `Release`."""

    token: Token
    was_live: bool
    """The lease had not ended otherwise before."""


class Revoked(_Message, frozen=True, kw_only=True):
    """Tell a consumer, unasked, that a lease has ended."""

    token: Token
    reason: Reason


REFUSAL_CODES = frozenset(
    {"garbage", "protocol", "stale_epoch", "not_introduced", "rank", "agent", "incompatible", "identity"}
    | {"unknown_lease", "ended_lease", "taken_lease", "staging"}
)
"""Values of `Refused.code` that a producer of this version sends."""


class Refused(_Message, frozen=True, kw_only=True):
    """Answer anything that cannot be served, with the reason. ``epoch`` is the producer's, for a consumer that knows another."""

    code: Annotated[str, msgspec.Meta(max_length=64)]
    """One of `REFUSAL_CODES`."""
    reason: Reason
    epoch: Epoch
    token: Annotated[str, msgspec.Meta(max_length=32)] = ""
    """Token of the lease concerned, if any."""
    rank: Annotated[int, msgspec.Meta(ge=0, lt=1 << 20)] | None = None
    """Rank of this producer, if another one was meant."""


OF_CONSUMERS = (Hello, Acquire, Renew, StageChunk, ReleaseChunks, Write, AskWrite, StopWrite, Release)
"""Messages that consumers send."""
OF_PRODUCERS = (Welcome, Pending, Grant, Renewed, ChunkReady, SendWrite, Wrote, Released, Revoked, Refused)
"""Messages that producers send."""

Message = (
    Hello
    | Welcome
    | Acquire
    | Pending
    | Grant
    | Renew
    | Renewed
    | StageChunk
    | ChunkReady
    | ReleaseChunks
    | Write
    | AskWrite
    | SendWrite
    | StopWrite
    | Wrote
    | Release
    | Released
    | Revoked
    | Refused
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)
_spec_decoder = msgspec.msgpack.Decoder(CacheSpec)


@lru_cache(maxsize=64)
def _decode_layout(data: bytes) -> CacheSpec:
    return _spec_decoder.decode(data)


def layout_of(stage: StageChunk) -> CacheSpec:
    """Layout of the chunk that a consumer asks for.

    Raises:
        WireError: it is not the layout of a cache, or takes more bytes than that of any chunk.
    """
    data = bytes(stage.layout)
    if len(data) > MAX_CHUNK_LAYOUT_NBYTES:
        raise WireError(f"the description of a chunk has {len(data)} bytes, more than {MAX_CHUNK_LAYOUT_NBYTES}")
    try:
        return _decode_layout(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise WireError(f"not the description of a chunk: {error}") from error


def encode(message: Message) -> bytes:
    """Encode one message."""
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """Decode one message from a peer that need not mean well.

    Raises:
        WireError: the bytes are not a well-formed message of this protocol.
    """
    try:
        message: Message = _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise WireError(f"not a message: {error}") from error
    return message

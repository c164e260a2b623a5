# SPDX-License-Identifier: Apache-2.0
"""Every message that two endpoints exchange, and nothing else: msgspec structs, one msgpack map per message.

A message names the epoch of the process it is meant for in ``to`` (empty in `Hello`, which is how epochs are learnt),
so one meant for a process that has been restarted since is refused by name. Unknown fields are ignored and new ones have defaults:
two versions of kvxfer that share `PROTOCOL` can talk. Bytes of KV never travel here.

::

    consumer                         producer
    Hello      ->                    who I am, which rank I want, how I move bytes
               <- Welcome            who I am, my cache, how my agent is reached
    Acquire       ->                    I hold this lease's token
               <- Pending | Grant    no block is complete | these are, this is the lease's cell; again when there are more
    Renew      ->                    I still wait for these
               <- Renewed            these of them have ended
    StageChunk      ->                    pack these tokens of it into a chunk
               <- ChunkReady             the chunk lies there | its digest is this
    ReleaseChunks    ->                    these chunks were taken
    Release     ->                    I am done with it, its blocks are yours
               <- Released            it stood / it had ended before
               <- Revoked            (unasked) it ended
               <- Refused            the answer to anything that cannot be served, with a reason
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any

import msgspec

from kvxfer.config import MAX_S
from kvxfer.errors import WireError, shown
from kvxfer.layout.block_table import MAX_TOKENS
from kvxfer.layout.spec import MAX_RANKS, CacheSpec

PROTOCOL = 2
"""Raised when a message changes its meaning. A peer with another one is refused at the handshake."""

MAX_TOKENS_PER_RENEW = 4096

MAX_NAME = 256
MAX_ADDRESS = 256

MAX_CHUNK_LAYOUT_NBYTES = 1 << 18
"""Of the description of one chunk: a thousand layers with a scale for each of 16 heads."""

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
        """Fields as people and logs may see them: tokens of leases are cut short."""
        return [(name, _shown(name, getattr(self, name))) for name in self.__struct_fields__]


def _shown(name: str, value: Any) -> Any:
    if name == "token" and value:
        return shown(value)
    return [shown(token) for token in value] if name in ("tokens", "ended") and isinstance(value, list) else value


class Hello(_Message, frozen=True, kw_only=True):
    """Consumer to producer, first on every connection and again after a refusal."""

    protocol: int
    name: Name
    epoch: Epoch
    rank: Annotated[int, msgspec.Meta(ge=0, lt=1 << 20)]
    """Rank of the producer that the consumer means to talk to."""
    agent: Name
    """Adapter by which the consumer moves bytes."""
    consumer_rank: Annotated[int, msgspec.Meta(ge=0, lt=MAX_RANKS)] = 0
    """Which of the consumer's ranks this is; all ranks of an engine have one name."""
    consumer_world: Annotated[int, msgspec.Meta(gt=0, le=MAX_RANKS)] = 1
    """How many ranks the consumer has: each settles a lease for itself."""


class Welcome(_Message, frozen=True, kw_only=True):
    """The producer's answer to `Hello`."""

    protocol: int
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
    """Where the producer's ranks listen, in rank order, if this one was told."""


_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 32)]


class Acquire(_Message, frozen=True, kw_only=True):
    """May I have the blocks of this lease? Idempotent."""

    token: Token
    rendezvous: bool = False
    """Its producer may not know it yet, and keeps me a place until it does."""
    have: Annotated[list[_Count], msgspec.Meta(max_length=1024)] = []
    """Per cache group, how many of its block ids I have: grant what comes after them."""
    check: Annotated[bytes, msgspec.Meta(max_length=16)] = b""
    """Of the offering that those are of."""


class Pending(_Message, frozen=True, kw_only=True):
    """The lease is known, or waited for, and no block is ready; a `Grant` follows when some are."""

    token: Token


class Grant(_Message, frozen=True, kw_only=True):
    """The blocks are readable: if they are all, until ``ttl_s`` from now, or from the last `Renew`."""

    token: Token
    blocks: Annotated[list[bytes], msgspec.Meta(max_length=1024)]
    """Per cache group the block ids, in token order, as little-endian uint32; or those that fit into a message (`kvxfer.protocol.grants`)."""
    cell: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    """Address of the lease's cell on the producer's board."""
    check: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    """What stands in the cell as long as these blocks are leased: of this offering only, also where its token comes again."""
    first_tokens: Annotated[list[TokenIndex], msgspec.Meta(max_length=1024)] = []
    """Per cache group the token with which the first block begins; empty where all begin with the first."""
    complete: bool = True
    """There will be no more. Otherwise further grants follow, each of which repeats what came before."""
    ttl_s: Annotated[float, msgspec.Meta(gt=0, le=MAX_S)]
    skip: Annotated[list[_Count], msgspec.Meta(max_length=1024)] = []
    """Per cache group, how many block ids come before these; empty: none."""
    runs: Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=1024)]], msgspec.Meta(max_length=1024)] = []
    """Groups whose ids are given as runs: pairs of the first id and a length, each little-endian uint32."""
    more: bool = False
    """More of these blocks follow, to be asked for by an `Acquire` that says what is there (`Acquire.have`)."""


class Renew(_Message, frozen=True, kw_only=True):
    """These leases are still waited for."""

    tokens: Annotated[list[Token], msgspec.Meta(max_length=MAX_TOKENS_PER_RENEW)]


class Renewed(_Message, frozen=True, kw_only=True):
    """Answer to `Renew`: all stand but these."""

    ended: Annotated[list[Token], msgspec.Meta(max_length=MAX_TOKENS_PER_RENEW)]


_Numbers = Annotated[list[int], msgspec.Meta(max_length=1024)]


class StageChunk(_Message, frozen=True, kw_only=True):
    """Pack part of a lease's KV into a chunk of the staging arena. Idempotent: asked again until answered."""

    token: Token
    number: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    """Of this chunk, among those of this lease and reader; never used again for another."""
    layout: msgspec.Raw
    """What the chunk looks like, a `CacheSpec`: a cache of one group in blocks 0, 1, ..., at addresses that count from the
    chunk's begin. Decoded by `layout_of` when it is known that the sender may ask for it."""
    tokens: tuple[TokenIndex, TokenIndex]
    """First token, and first after the last; the chunk's first block is the one in which the first token lies."""
    released: _Numbers = []
    """As in `ReleaseChunks`: most chunks make room for the next one."""
    digest: bool = False
    """The chunk itself is not wanted, only its digest."""


class ChunkReady(_Message, frozen=True, kw_only=True):
    """The chunk is packed, and stays until `ReleaseChunks` or the end of the lease."""

    token: Token
    number: int
    address: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    digest: Annotated[bytes, msgspec.Meta(max_length=64)] = b""
    """If that was asked for; then the chunk lies nowhere, and ``address`` means nothing."""


class ReleaseChunks(_Message, frozen=True, kw_only=True):
    """These chunks were taken, their memory is yours. Not answered: what is lost is made up for by the lease's end."""

    token: Token
    numbers: _Numbers


class Release(_Message, frozen=True, kw_only=True):
    """The consumer will not touch the blocks any more. Idempotent, repeated until answered."""

    token: Token
    read: bool
    """The bytes were read (else they were not needed, or reading failed)."""


class Released(_Message, frozen=True, kw_only=True):
    """Answer to `Release`."""

    token: Token
    was_live: bool
    """The lease had not ended otherwise before."""


class Revoked(_Message, frozen=True, kw_only=True):
    """The producer ended a lease by itself."""

    token: Token
    reason: Reason


REFUSAL_CODES = frozenset(
    {"garbage", "protocol", "stale_epoch", "not_introduced", "rank", "agent", "incompatible", "identity"}
    | {"unknown_lease", "ended_lease", "taken_lease", "staging"}
)
"""Of `Refused`: what a producer of this version says."""


class Refused(_Message, frozen=True, kw_only=True):
    """Something cannot be served. ``epoch`` is the refuser's, so that a stale peer learns whom to meet."""

    code: Annotated[str, msgspec.Meta(max_length=64)]
    """``garbage`` | ``protocol`` | ``stale_epoch`` | ``not_introduced`` | ``rank`` | ``agent`` | ``incompatible``
    | ``unknown_lease`` | ``ended_lease`` | ``taken_lease`` | ``staging``."""
    reason: Reason
    epoch: Epoch
    token: Annotated[str, msgspec.Meta(max_length=32)] = ""
    """The lease concerned, if any."""
    rank: Annotated[int, msgspec.Meta(ge=0, lt=1 << 20)] | None = None
    """The refuser's, if another one was meant."""


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
    | Release
    | Released
    | Revoked
    | Refused
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)
_spec_decoder = msgspec.msgpack.Decoder(CacheSpec)


def encode_spec(layout: CacheSpec) -> msgspec.Raw:
    """What a chunk looks like, as `StageChunk` carries it."""
    return msgspec.Raw(msgspec.msgpack.encode(layout))


@lru_cache(maxsize=64)
def _decode_layout(data: bytes) -> CacheSpec:
    return _spec_decoder.decode(data)


def layout_of(stage: StageChunk) -> CacheSpec:
    """What a chunk looks like that somebody asks for.

    Raises:
        WireError: it is no cache, or takes more bytes than that of any chunk.
    """
    data = bytes(stage.layout)
    if len(data) > MAX_CHUNK_LAYOUT_NBYTES:
        raise WireError(f"the description of a chunk has {len(data)} bytes, more than {MAX_CHUNK_LAYOUT_NBYTES}")
    try:
        return _decode_layout(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise WireError(f"not the description of a chunk: {error}") from error


def encode(message: Message) -> bytes:
    """One message as bytes."""
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """Bytes from anybody as a message.

    Raises:
        WireError: anything else than a well-formed message of this protocol, with the reason.
    """
    try:
        message: Message = _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise WireError(f"not a message: {error}") from error
    return message

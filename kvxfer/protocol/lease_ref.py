# SPDX-License-Identifier: Apache-2.0
"""References to leases: a producer hands one out for a request, and who has it may read the request's KV. It names no blocks."""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from kvxfer import addresses
from kvxfer.errors import ConfigError, LeaseRefError, shown
from kvxfer.layout.checks import MAX_RANKS
from kvxfer.protocol.messages import Address, Name, Token

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvxfer.secret import Secret

REF_VERSION = 1


class LeaseRef(msgspec.Struct, frozen=True, kw_only=True):
    """Reference to a lease, which travels with a request from producer to consumer, by way of routers and clients.

    It names no blocks and no addresses in memory. The token is unguessable, and any peer that has it may read the request's
    KV, so it belongs only where the request's text may be too.

    Attributes:
        token: 128 random bits as hex.
        producer: name of the producer's endpoint (for vLLM the engine id).
        addresses: control addresses of the producer's ranks, ``tcp://host:port``, in rank order; or of the first rank only,
            if that one was told of the others (`Endpoint.join`).
        request: the producer's name for the request, for logs.
        num_tokens: tokens whose KV the lease covers.
        digest: of what the KV depends on (prompt, adapters, images); made and compared by the engine, may be empty.
        rendezvous: made by `for_rendezvous`, so that its producer may come to know it after its consumer.
    """

    v: int = REF_VERSION
    token: Token
    producer: Annotated[Name, msgspec.Meta(min_length=1)]
    addresses: Annotated[tuple[Address, ...], msgspec.Meta(min_length=1, max_length=MAX_RANKS)]
    request: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    num_tokens: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)] = 0
    digest: Annotated[str, msgspec.Meta(max_length=128)] = ""
    rendezvous: bool = False

    @classmethod
    def mint(
        cls, *, producer: str, addresses: Sequence[str], request: str = "", num_tokens: int = 0, digest: str = ""
    ) -> LeaseRef:
        """Make a reference with a fresh token. Any process of the producer may mint; `Endpoint.announce` makes it known.

        Raises:
            LeaseRefError: a field is out of range.
        """
        token = secrets.token_hex(16)
        fields = {"producer": producer, "addresses": list(addresses), "request": request[:1024]}
        return cls.from_obj({**fields, "v": REF_VERSION, "token": token, "num_tokens": num_tokens, "digest": digest})

    @classmethod
    def for_rendezvous(
        cls,
        key: str,
        *,
        producer: str,
        addresses: Sequence[str],
        request: str = "",
        num_tokens: int = 0,
        digest: str = "",
        secret: Secret | None = None,
    ) -> LeaseRef:
        """Make the reference of a request that is sent to producer and consumer at once, as each of them makes it.

        Args:
            key: what only these two were told of the request, such as a router's transfer id. Without a secret, any peer that
                knows it and all of the following may read the request's KV.
            producer: name of the producer, as both know it.
            addresses: see `LeaseRef`; the two sides may differ in them.
            request: see `LeaseRef`; the two sides may differ in it.
            num_tokens: number of tokens, as both know it.
            digest: of the prompt, as both know it; that of another prompt is another lease.
            secret: of both sides; who has it can make the token, and no other can.

        Raises:
            LeaseRefError: a field is out of range.
        """
        try:
            known = msgspec.json.encode([key, producer, num_tokens, digest])
        except ValueError as error:  # as in `from_obj`
            raise LeaseRefError(f"a rendezvous cannot be made: {error}") from error
        if secret is not None:
            token = secret.digest(known).hex()
        else:
            token = hashlib.blake2b(known, digest_size=16, person=b"kvxfer-lease").hexdigest()
        fields = {"producer": producer, "addresses": list(addresses), "request": request[:1024], "rendezvous": True}
        return cls.from_obj({**fields, "v": REF_VERSION, "token": token, "num_tokens": num_tokens, "digest": digest})

    @classmethod
    def from_obj(cls, obj: object) -> LeaseRef:
        """Read what `to_obj` made and any client may have changed.

        Raises:
            LeaseRefError: it is malformed, or of a version that this kvxfer does not know.
        """
        try:
            ref = msgspec.convert(obj, cls)
            msgspec.json.encode(ref)  # half of a surrogate pair passes the conversion, and no message can carry it
            for address in ref.addresses:
                addresses.parse(address)
        except (msgspec.ValidationError, ConfigError, ValueError, RecursionError) as error:
            raise LeaseRefError(f"malformed lease: {error}") from error
        if ref.v != REF_VERSION:
            raise LeaseRefError(f"lease of version {ref.v}; this kvxfer knows {REF_VERSION}")
        return ref

    @classmethod
    def from_json(cls, text: str | bytes) -> LeaseRef:
        """Read the JSON text of `to_json`. Raises LeaseRefError."""
        try:
            obj = msgspec.json.decode(text)
        except (msgspec.DecodeError, ValueError, RecursionError, TypeError) as error:
            raise LeaseRefError(f"a lease is not JSON: {error}") from error
        return cls.from_obj(obj)

    def __repr__(self) -> str:
        # Logs show it, and who reads logs is not to read KV.
        return f"<LeaseRef {shown(self.token)} of {self.producer!r}, request {self.request!r}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("token", shown(self.token)), ("producer", self.producer), ("request", self.request)]

    def to_obj(self) -> dict[str, Any]:
        """Convert to plain JSON types."""
        obj: dict[str, Any] = msgspec.to_builtins(self)
        return obj

    def to_json(self) -> str:
        """Convert to JSON text."""
        return msgspec.json.encode(self).decode()

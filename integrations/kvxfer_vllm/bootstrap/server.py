# SPDX-License-Identifier: Apache-2.0
"""``python -m kvxfer_vllm.bootstrap.server``: the process that answers ``GET /query``; `kvxfer_vllm.bootstrap.launch` starts it.

It ends when its standard input does, so with the engine. Routers send no credentials, so ``/query`` asks for none, and tells
nothing that is a secret: a lease cannot be made of it. ``/register`` is for the engines of the same data parallel group: it takes
messages that were signed with the fleet's secret; without a secret, those of this machine only.
"""

from __future__ import annotations

import hmac
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING, cast

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvxfer import addresses
from kvxfer.secret import Secret
from kvxfer_vllm.bootstrap.answer import MAX_NBYTES, BootstrapEntry, EngineRegistration

if TYPE_CHECKING:
    import asyncio

    from starlette.requests import Request

SIGNATURE = "x-kvxfer-signature"
"""Header of a registration."""

MOST_CONNECTIONS = 64
"""Most connections at once; more are answered 503."""

CONNECTION_S = 5.0
"""Longest life of a connection, whatever comes over it."""


class ServerStart(msgspec.Struct, frozen=True):
    """First line of the standard input: the listening socket, the entry of the engine that has started this process, the secret."""

    fd: int
    own: EngineRegistration
    secret_file: str | None = None


def signature(secret: Secret | None, body: bytes) -> str:
    """Signature of a registration; empty without a secret."""
    return secret.digest(b"kvxfer bootstrap registration\n" + body).hex() if secret is not None else ""


def application(own: EngineRegistration, secret: Secret | None) -> Starlette:
    """Make the application that answers for the engines that are registered, first of all ``own``."""
    entries: dict[str, BootstrapEntry] = {str(own.dp_rank): own.entry}

    async def query(_: Request) -> Response:
        return Response(msgspec.json.encode(entries), media_type="application/json")

    async def register(request: Request) -> Response:
        at, *_ = request.scope["server"]
        here = request.client is not None and (request.client.host == at or addresses.is_loopback(request.client.host))
        if secret is None and not here:
            return PlainTextResponse("engines of other machines can register with a secret only\n", 403)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_NBYTES:
                return PlainTextResponse("the registration is too long\n", 413)
        if not hmac.compare_digest(request.headers.get(SIGNATURE, "").encode(), signature(secret, body).encode()):
            return PlainTextResponse("the registration was not signed with this server's secret\n", 403)
        try:
            registration = msgspec.json.decode(body, type=EngineRegistration)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return PlainTextResponse(f"{error}\n", 400)
        entries[str(registration.dp_rank)] = registration.entry
        return PlainTextResponse("ok\n")

    return Starlette(routes=[Route("/query", query), Route("/register", register, methods=["POST"])])


class BriefConnection(H11Protocol):
    """A connection that is closed after `CONNECTION_S`, so that none that says nothing keeps others out."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin the connection's time."""
        super().connection_made(transport)
        self.loop.call_later(CONNECTION_S, transport.abort)


def main() -> None:
    """Serve until the standard input ends."""
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=ServerStart)
    threading.Thread(target=_end_with_engine, daemon=True).start()
    secret = Secret.resolve(file=start.secret_file)
    config = uvicorn.Config(
        application(start.own, secret),
        http=cast("type[asyncio.Protocol]", BriefConnection),
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        h11_max_incomplete_event_size=1 << 14,
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=start.fd)])


def _end_with_engine() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()

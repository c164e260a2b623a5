# SPDX-License-Identifier: Apache-2.0
"""HTTP application: OpenAI's completions and chats, models, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from kvxfer_transformers.serve import bodies
from kvxfer_transformers.serve.answers import AnswerShape
from kvxfer_transformers.serve.engine import Wanted
from kvxfer_transformers.serve.errors import RequestError, UnknownModelError
from kvxfer_transformers.serve.prometheus import page

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from kvxfer_transformers.serve.engine import ServedEngine

logger = logging.getLogger(__name__)
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def _json(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def _event(content: object) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def make_app(engine: ServedEngine) -> Starlette:
    """Make the application of an engine; the engine ends with it."""

    async def completions(request: Request) -> Any:
        return await _generate(request, engine, chat=False)

    async def chat(request: Request) -> Any:
        return await _generate(request, engine, chat=True)

    async def models(_: Request) -> Response:
        entries = [
            {"id": name, "object": "model", "created": 0, "owned_by": "kvxfer", "max_model_len": engine.max_tokens}
            for name in engine.names
        ]
        return _json({"object": "list", "data": entries})

    async def health(_: Request) -> Response:
        return Response(status_code=200 if engine.is_alive else 503)

    def metrics(_: Request) -> Response:  # on a thread of its own
        return PlainTextResponse(page(engine.manager), media_type="text/plain; version=0.0.4")

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.stop)

    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
            Route("/metrics", metrics),
        ],
        lifespan=lifespan,
    )


async def _generate(request: Request, engine: ServedEngine, *, chat: bool) -> Any:
    try:
        body = bodies.parse(await request.body(), bodies.ChatBody if chat else bodies.CompletionBody)
        if body.model is not None and body.model not in engine.names:
            raise UnknownModelError(
                f"the model {body.model[:200]!r} is not served, only {', '.join(engine.names)}", "model"
            )
        body.check_min_tokens()
        asked = request.headers.get("x-request-id") or body.request_id or ""
        named = asked if _ID.fullmatch(asked) else secrets.token_hex(16)
        shape = AnswerShape(
            chat=chat,
            id=f"{'chatcmpl' if chat else 'cmpl'}-{named}",
            model=body.model or engine.names[0],
            token_ids=bool(body.return_token_ids),
            usage=body.stream_options is not None and body.stream_options.include_usage,
        )
        if chat:
            tokens = await engine.chat_tokens(body.plain_messages())
            limit = body.max_completion_tokens or body.max_tokens
        else:
            special = body.add_special_tokens is not False
            tokens = await engine.prompt_tokens(body.one_prompt(), add_special_tokens=special)
            limit = body.max_tokens
        wanted = Wanted(
            id=shape.id,
            tokens=tokens,
            max_tokens=engine.room_for(tokens, limit, chat=chat),
            stops=body.stops,
            include_stop=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
            ignore_eos=bool(body.ignore_eos),
            stream=bool(body.stream),
            kv_transfer_params=body.kv_transfer_params,
        )
    except RequestError as error:
        return _json(error.as_json(), error.status)
    except ClientDisconnect:
        return Response(status_code=499)
    return _Reply(engine, wanted, shape)


class _Reply:
    """Answer to one request, as ASGI has it. A client that goes ends the request."""

    def __init__(self, engine: ServedEngine, wanted: Wanted, shape: AnswerShape) -> None:
        self._engine = engine
        self._wanted = wanted
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, or notice that the client has gone."""
        answering = asyncio.ensure_future(
            self._stream(scope, receive, send) if self._wanted.stream else self._whole(scope, receive, send)
        )
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
        if not answering.cancelled():
            answering.result()
        else:
            logger.info("Request %s: its client has gone", self._wanted.id)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._engine.answer(self._wanted)) as answer:
                parts = [part async for part in answer]
            response = _json(self._shape.whole(self._wanted.tokens, parts))
        except RequestError as error:
            response = _json(error.as_json(), error.status)
        await response(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events. The status is sent with the first part, so that a request that fails before it has its error's."""
        shape, prompt, number = self._shape, self._wanted.tokens, 0
        started = False
        try:
            async with contextlib.aclosing(self._engine.answer(self._wanted)) as answer:
                async for part in answer:
                    events = _event(shape.part(part, prompt, first=not started))
                    number += len(part.tokens)
                    if part.finish_reason is not None:
                        events += (_event(shape.last(prompt, number)) if shape.usage else b"") + b"data: [DONE]\n\n"
                    if not started:
                        headers = [
                            (b"content-type", b"text/event-stream; charset=utf-8"),
                            (b"cache-control", b"no-cache"),
                        ]
                        await send({"type": "http.response.start", "status": 200, "headers": headers})
                        started = True
                    await send({"type": "http.response.body", "body": events, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except RequestError as error:
            if not started:
                await _json(error.as_json(), error.status)(scope, receive, send)
            else:
                await send({"type": "http.response.body", "body": _event(error.as_json()) + b"data: [DONE]\n\n"})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

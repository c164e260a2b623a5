# SPDX-License-Identifier: Apache-2.0
"""The decode server's part of ``GET /query``: asks a prefill server for the side channel of an engine, off the engine's thread.

A router asks once, and goes on naming an engine that has ended since. So this side asks again for each request, but for those
within a second of each other: no prefill server starts as fast, so an answer is never that of an earlier process.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, Any

from kvxfer_serving.mooncake_params import BootstrapRequest, named_by_bootstrap
from kvxfer_serving.refusals import RefusalReason, RefusedParams
from kvxfer_vllm.bootstrap.answer import MAX_NBYTES, WrongAnswerError, engine_in

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(f"vllm.{__name__}")

QUERY_S = 5.0
"""Longest time of a query, the look-up of the name included; then the request is computed locally."""

_FRESH_S = 1.0
_MOST_QUERIES = 128
"""Most addresses that are asked at once. Requests that name further ones are computed locally."""


class BootstrapLookups:
    """Requests whose prefill server is being asked for. All methods run on the engine's thread; only ``wait_s`` makes one wait."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[Request, BootstrapRequest, Future[bytes]]] = {}
        self._queries: dict[str, tuple[float, Future[bytes]]] = {}
        """Time of the query and its answer, by address."""
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin(self, request: Request, asked: BootstrapRequest) -> None:
        """Ask for the prefill server of a request."""
        self._waiting[request.request_id] = (request, asked, self._query(asked.url))

    def waits(self, request_id: str) -> bool:
        """Whether a request waits for an answer."""
        return request_id in self._waiting

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended."""
        self._waiting.pop(request_id, None)

    def clear(self) -> None:
        """Forget all requests: they are computed."""
        self._waiting.clear()

    def answered(self, wait_s: float = 0.0) -> list[tuple[Request, dict[str, Any] | RefusedParams]]:
        """Take the requests that were answered since the last call; wait up to ``wait_s`` for the first one if some wait.

        Returns:
            Each with NixlConnector's parameters, which name the prefill server, or the reason for which there are none.
        """
        if not self._waiting:
            return []
        if wait_s:
            wait([query for _, _, query in self._waiting.values()], wait_s, return_when=FIRST_COMPLETED)
        done = [found for found in self._waiting.values() if found[2].done()]
        for request, _, _ in done:
            del self._waiting[request.request_id]
        return [(request, _params_of(request, asked, query)) for request, asked, query in done]

    def _query(self, url: str) -> Future[bytes]:
        now = time.monotonic()
        self._queries = {
            each: (began, query)
            for each, (began, query) in self._queries.items()
            if now - began < _FRESH_S or not query.done()
        }
        if url in self._queries:
            return self._queries[url][1]
        if len(self._queries) >= _MOST_QUERIES:
            refused: Future[bytes] = Future()
            refused.set_exception(WrongAnswerError(f"{_MOST_QUERIES} other servers are being asked"))
            return refused
        query = asyncio.run_coroutine_threadsafe(_ask(url), self._running_loop())
        self._queries[url] = (now, query)
        return query

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """Event loop of the thread that asks, started when it is first needed."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="kvxfer-lookup", daemon=True).start()
        return self._loop


def _params_of(request: Request, asked: BootstrapRequest, query: Future[bytes]) -> dict[str, Any] | RefusedParams:
    try:
        engine_id, address = engine_in(query.result(), asked.engine_id)
    except Exception as error:  # noqa: BLE001 - whatever a network or an unauthenticated server can cause
        why = str(error) or type(error).__name__
        return RefusedParams(RefusalReason.NO_PRODUCER, f"{asked.url}/query: {why:.300}")
    return named_by_bootstrap(request.kv_transfer_params or {}, engine_id, address)


async def _ask(url: str) -> bytes:
    """Ask for the answer of a bootstrap server, with a limit on its time and size."""
    import aiohttp  # noqa: PLC0415 - of no use to a server that is never asked to

    limit = aiohttp.ClientTimeout(total=QUERY_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=limit) as session,
            session.get(f"{url}/query", allow_redirects=False) as answer,
        ):
            if answer.status != 200:
                raise WrongAnswerError(f"status {answer.status}")
            body = b""
            async for part in answer.content.iter_any():
                body += part
                if len(body) > MAX_NBYTES:
                    raise WrongAnswerError(f"the answer has more than {MAX_NBYTES} bytes")
            return body
    except TimeoutError:
        raise WrongAnswerError(f"no answer within {QUERY_S:g} s") from None

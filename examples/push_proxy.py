# SPDX-License-Identifier: Apache-2.0
"""A proxy that sends a request to a prefill and a decode server at once, so that its KV moves while it is computed.

For experiments, not for production: one pair of servers, no retries, no health checks, no authentication. It shows the work of
a router: name the prefill server to the decode server, give both the same ``transfer_id``, and send to both at once.

    python examples/push_proxy.py --prefill http://127.0.0.1:8100 --engine-id prefill-0 --side-channel 127.0.0.1:5600 \
        --decode http://127.0.0.1:8200 --port 8000

``--engine-id`` is the ``engine_id`` in the ``--kv-transfer-config`` of the prefill server (``"engine_id":"prefill-0"``), and
``--side-channel`` its ``KVXFER_SIDE_CHANNEL_HOST`` and ``_PORT``. ``--order prefill-first`` sends to one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import uuid
from typing import TYPE_CHECKING

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
NOT_FOR_PREFILL = ("stream_options", "min_tokens")


class Proxy:
    """One pair of servers."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.session: ClientSession | None = None

    async def run(self, _: web.Application) -> AsyncIterator[None]:
        """Keep one session open as long as the application runs."""
        async with ClientSession(timeout=ClientTimeout(total=None, sock_connect=10)) as self.session:
            yield

    async def health(self, _: web.Request) -> web.Response:
        """Answer whether both servers are healthy."""
        for url in (self.options.prefill, self.options.decode):
            try:
                async with self.session.get(f"{url}/health", timeout=ClientTimeout(total=5)) as answer:
                    healthy = answer.status == 200
            except (ClientError, asyncio.TimeoutError):
                healthy = False
            if not healthy:
                return web.Response(status=503, text=f"{url} is not healthy\n")
        return web.Response(text="ok\n")

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Have a request prefilled and decoded, and stream the answer of the decode server."""
        try:
            body = await request.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return failed(400, "the body is no JSON object")
        headers = {"X-Request-Id": request.headers.get("X-Request-Id", uuid.uuid4().hex)}
        if "Authorization" in request.headers:
            headers["Authorization"] = request.headers["Authorization"]
        key = {"transfer_id": uuid.uuid4().hex}
        first = {k: v for k, v in body.items() if k not in NOT_FOR_PREFILL}
        first |= {"stream": False, "max_tokens": 1, "kv_transfer_params": PREFILL | key}
        if "max_completion_tokens" in first:
            first["max_completion_tokens"] = 1
        prefill = asyncio.ensure_future(self.prefill(request.path, first, headers))
        try:
            if self.options.order == "both":
                host, _, port = self.options.side_channel.rpartition(":")
                params = {"do_remote_prefill": True, "do_remote_decode": False, **key}
                params |= {"remote_engine_id": self.options.engine_id, "remote_host": host, "remote_port": int(port)}
            else:
                status, text = await prefill
                if status != 200:
                    return web.Response(status=status, text=text, content_type="application/json")
                params = json.loads(text).get("kv_transfer_params")
            return await self.decode(request, body | {"kv_transfer_params": params}, headers, prefill)
        except (ClientError, asyncio.TimeoutError) as error:
            return failed(502, f"a server cannot be reached: {error}")
        finally:
            prefill.cancel()  # the client has disconnected, or the answer is complete
            with contextlib.suppress(asyncio.CancelledError, ClientError, asyncio.TimeoutError):
                await prefill

    async def prefill(self, path: str, body: dict, headers: dict[str, str]) -> tuple[int, str]:
        """Ask the prefill server; returns the status and the text of its answer."""
        async with self.session.post(self.options.prefill + path, json=body, headers=headers) as answer:
            return answer.status, await answer.text()

    async def decode(
        self, request: web.Request, body: dict, headers: dict[str, str], prefill: asyncio.Future
    ) -> web.StreamResponse:
        """Ask the decode server and forward its answer; a refusal of the prefill server ends both requests."""
        asking = asyncio.ensure_future(
            self.session.post(self.options.decode + request.path, json=body, headers=headers)
        )
        answer: ClientResponse | None = None
        try:
            await asyncio.wait({asking, prefill}, return_when=asyncio.FIRST_COMPLETED)
            if prefill.done() and prefill.result()[0] != 200:
                status, text = prefill.result()
                return web.Response(status=status, text=text, content_type="application/json")
            answer = await asking
            given = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.headers["Content-Type"]})
            await given.prepare(request)
            async for chunk in answer.content.iter_any():
                await given.write(chunk)
            await given.write_eof()
            return given
        finally:
            asking.cancel()
            if answer is not None:
                answer.close()


def failed(status: int, why: str) -> web.Response:
    """Error response as OpenAI's clients expect it."""
    return web.json_response({"error": {"message": why, "type": "proxy_error", "code": status}}, status=status)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="Send requests to a prefill and a decode server. For trying out only.")
    parser.add_argument("--prefill", required=True, metavar="URL")
    parser.add_argument("--decode", required=True, metavar="URL")
    parser.add_argument("--engine-id", required=True, help="of the prefill server")
    parser.add_argument("--side-channel", required=True, metavar="HOST:PORT", help="of the prefill server")
    parser.add_argument("--order", choices=("both", "prefill-first"), default="both")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    proxy = Proxy(options)
    app = web.Application(client_max_size=64 << 20)
    app.cleanup_ctx.append(proxy.run)
    app.router.add_get("/health", proxy.health)
    for path in ("/v1/completions", "/v1/chat/completions"):
        app.router.add_post(path, proxy.generate)
    # With handler_cancellation a disconnect of the client cancels the handler, which aborts the request at both servers.
    web.run_app(app, host=options.host, port=options.port, print=None, handler_cancellation=True)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""A small client of OpenAI-compatible servers: answers with their tokens, and Prometheus metrics as numbers.

Standard library only. Calls block; each has its own connection, so any thread may make any call.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from urllib.parse import urlsplit

__all__ = ["PREFILL_PARAMS", "Answer", "MetricSample", "Prompt", "ask", "get", "post", "read_metrics"]

#: What vllm-router sends to a prefill server as ``kv_transfer_params``.
PREFILL_PARAMS: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}

#: A completion's prompt (text or token ids), or the messages of a chat.
Prompt: TypeAlias = "str | Sequence[int] | Sequence[Mapping[str, Any]]"


@dataclass(frozen=True)
class Answer:
    """Answer to one request.

    ``tokens`` are the generated token ids, ``text`` their text. ``first_byte_s`` is the time from sending to the first byte of
    the answer's body, in seconds: of a streamed answer the first token. ``kv_transfer_params`` are those of the answer.
    ``broken``: the connection ended, or an error came, in the middle of the answer. ``body`` is the raw answer.
    """

    status: int
    body: str
    tokens: tuple[int, ...] = ()
    text: str = ""
    finish_reason: str | None = None
    kv_transfer_params: dict[str, Any] | None = None
    broken: bool = False
    first_byte_s: float = 0.0
    prompt_tokens: tuple[int, ...] = field(default=(), repr=False)

    @property
    def ok(self) -> bool:
        """Whether a complete answer arrived."""
        return self.status == 200 and not self.broken


def ask(
    url: str,
    prompt: Prompt,
    *,
    max_tokens: int = 16,
    stream: bool = False,
    kv_transfer_params: Any = None,
    timeout_s: float = 180.0,
    **extra: Any,
) -> Answer:
    """Ask a server or router for a greedy answer: a completion, or a chat where ``prompt`` is a list of messages.

    ``extra`` goes into the request's body (``ignore_eos=True``, ``seed=...``). The answer has exactly ``max_tokens``
    tokens unless ``ignore_eos=False`` is given.

    Raises:
        OSError: no connection, or no answer within ``timeout_s``.
        http.client.HTTPException: the answer is no HTTP.
    """
    chat = not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)
    body: dict[str, Any] = {
        "model": extra.pop("model", "kvxfer"),
        ("messages" if chat else "prompt"): prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": stream,
        **extra,
    }
    if kv_transfer_params is not None:
        body["kv_transfer_params"] = kv_transfer_params
    path = "/v1/chat/completions" if chat else "/v1/completions"
    reply = _exchange("POST", url, path, json.dumps(body).encode(), timeout_s)
    if reply.status != 200:
        return Answer(reply.status, reply.text, broken=reply.broken, first_byte_s=reply.first_byte_s)
    if stream:
        chunks = _events(reply.text)
        cut = "data: [DONE]" not in reply.text
    else:
        chunks = [] if reply.broken else [json.loads(reply.text)]
        cut = reply.broken
    return _assemble(reply, chunks, broken=cut)


def _events(text: str) -> list[dict[str, Any]]:
    events = (line[len("data: ") :] for line in text.splitlines() if line.startswith("data: "))
    chunks = []
    for event in events:
        if event != "[DONE]":
            with contextlib.suppress(ValueError):
                chunks.append(json.loads(event))
    return chunks


def _assemble(reply: _Reply, chunks: list[dict[str, Any]], *, broken: bool) -> Answer:
    tokens: list[int] = []
    prompt_tokens: list[int] = []
    text = ""
    finish_reason = params = None
    for chunk in chunks:
        if "error" in chunk:
            # A stream that fails after its headers reports it in an event, because HTTP 200 has been sent.
            broken = True
        params = chunk.get("kv_transfer_params") or params
        prompt_tokens = chunk.get("prompt_token_ids") or prompt_tokens
        for choice in chunk.get("choices", ()):
            part = choice.get("delta") or choice.get("message") or choice
            text += part.get("text") or part.get("content") or ""
            tokens += choice.get("token_ids") or ()
            prompt_tokens = choice.get("prompt_token_ids") or prompt_tokens
            finish_reason = choice.get("finish_reason") or finish_reason
    return Answer(
        reply.status,
        reply.text,
        tuple(tokens),
        text,
        finish_reason,
        params,
        broken,
        reply.first_byte_s,
        tuple(prompt_tokens),
    )


def get(url: str, path: str, timeout_s: float = 10.0) -> tuple[int, str]:
    """Status and body of a GET.

    Raises:
        OSError: no connection, or no answer within ``timeout_s``.
        http.client.HTTPException: the answer is no HTTP.
    """
    reply = _exchange("GET", url, path, None, timeout_s)
    return reply.status, reply.text


def post(url: str, path: str, body: bytes = b"", timeout_s: float = 30.0) -> tuple[int, str]:
    """Status and body of a POST of JSON bytes, sent as they are.

    Raises:
        OSError: no connection, or no answer within ``timeout_s``.
        http.client.HTTPException: the answer is no HTTP.
    """
    reply = _exchange("POST", url, path, body, timeout_s)
    return reply.status, reply.text


@dataclass(frozen=True)
class _Reply:
    status: int
    text: str
    broken: bool
    first_byte_s: float


def _exchange(method: str, url: str, path: str, body: bytes | None, timeout_s: float) -> _Reply:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=timeout_s)
    begin = time.monotonic()
    first_byte_s = 0.0
    broken = False
    received = bytearray()
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            try:
                while piece := response.read1(1 << 16):
                    first_byte_s = first_byte_s or time.monotonic() - begin
                    received += piece
                # read1() returns the same for an early end; the number of missing bytes tells them apart.
                broken = bool(response.length)
            except (http.client.IncompleteRead, ConnectionError):
                broken = True
            except TimeoutError as late:
                raise TimeoutError(f"{url}{path}: the answer stalled for {timeout_s:.0f} s") from late
        return _Reply(response.status, received.decode("utf-8", "replace"), broken, first_byte_s)
    finally:
        connection.close()


@dataclass(frozen=True)
class MetricSample:
    """One line of a Prometheus page."""

    name: str
    labels: Mapping[str, str]
    value: float


_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def read_metrics(url: str, timeout_s: float = 10.0) -> list[MetricSample]:
    """Samples of a server's ``/metrics`` page.

    Raises:
        OSError: no connection, no answer within ``timeout_s``, or a status other than 200.
        http.client.HTTPException: the answer is no HTTP.
    """
    status, text = get(url, "/metrics", timeout_s)
    if status != 200:
        raise ConnectionError(f"{url}/metrics answered {status}")
    samples = []
    for line in text.splitlines():
        found = _SAMPLE.match(line)
        if found:
            name, labels, value = found.groups()
            samples.append(MetricSample(name, dict(_LABEL.findall(labels or "")), float(value)))
    return samples

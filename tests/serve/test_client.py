# SPDX-License-Identifier: Apache-2.0
"""The small HTTP client of the servers, against a simulated server."""

from __future__ import annotations

import http.server
import json
import threading

import pytest

from tools.serve.client import ask, read_metrics

_METRICS = """# HELP vllm:x Something.
# TYPE vllm:x counter
vllm:x_total{engine="0",reason="a \\"quoted\\" one"} 2.0
vllm:x_total{engine="0",reason="b"} 3e+01
vllm:plain 0.5
"""


class _Stand(http.server.BaseHTTPRequestHandler):
    answer = b""
    seen = None

    def do_GET(self):
        self._send(_METRICS.encode())

    def do_POST(self):
        type(self).seen = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(type(self).answer)

    def _send(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + (body == b"cut")))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def url():
    """URL of a simulated server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Stand) as stand:
        thread = threading.Thread(target=stand.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{stand.server_port}"
        stand.shutdown()
        thread.join()


def test_a_whole_answer(url):
    """Tokens, text and parameters of an answer in one piece are read."""
    _Stand.answer = json.dumps(
        {
            "choices": [{"text": "ab", "token_ids": [1, 2], "finish_reason": "length"}],
            "kv_transfer_params": {"a": 1},
        }
    ).encode()
    answer = ask(url, [5, 6], kv_transfer_params={"b": 2}, seed=3)
    assert (answer.tokens, answer.text, answer.finish_reason, answer.ok) == ((1, 2), "ab", "length", True)
    assert answer.kv_transfer_params == {"a": 1}
    assert _Stand.seen["prompt"] == [5, 6] and _Stand.seen["seed"] == 3
    assert _Stand.seen["kv_transfer_params"] == {"b": 2}


def test_a_streamed_chat(url):
    """Tokens and text of a stream are put together."""
    chunks = [{"choices": [{"delta": {"content": text}, "token_ids": [i]}]} for i, text in enumerate("xyz")]
    _Stand.answer = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"
    answer = ask(url, [{"role": "user", "content": "hi"}], stream=True)
    assert (answer.tokens, answer.text, answer.ok) == ((0, 1, 2), "xyz", True)
    assert "messages" in _Stand.seen and answer.first_byte_s > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_answer_is_not_ok(url, stream):
    """An answer whose connection ends early, or whose stream reports an error, is not ok."""
    _Stand.answer = b'data: {"error": {"message": "no"}}\n\ndata: [DONE]\n\n' if stream else b"cut"
    answer = ask(url, "hi", stream=stream)
    assert answer.status == 200 and not answer.ok


def test_metrics(url):
    """A Prometheus page becomes samples with labels."""
    samples = read_metrics(url)
    assert [(s.name, s.value) for s in samples] == [("vllm:x_total", 2.0), ("vllm:x_total", 30.0), ("vllm:plain", 0.5)]
    assert samples[0].labels == {"engine": "0", "reason": 'a \\"quoted\\" one'}

# SPDX-License-Identifier: Apache-2.0
"""``python -m kvxfer_vllm.router_registration`` with a simulated discovery socket of vllm-router: registered servers."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading

import msgspec
import pytest
import zmq

from kvxfer_vllm.router_registration import main


class _Health(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self):
        self.send_response(self.server.status if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    stand = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Health)
    stand.status = 200
    thread = threading.Thread(target=stand.serve_forever)
    thread.start()
    yield stand
    stand.shutdown()
    thread.join()
    stand.server_close()


@pytest.fixture
def discovery():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind("tcp://127.0.0.1:*")
        yield socket


def heard(discovery, timeout_s):
    """Receive the next registration; None if there is none."""
    return msgspec.msgpack.decode(discovery.recv_multipart()[1]) if discovery.poll(timeout_s * 1000) else None


def test_healthy_servers_are_registered_again_and_again(server, discovery):
    """A healthy server is registered again and again; an unhealthy or missing one is not."""
    address = f"127.0.0.1:{server.server_port}"
    router = discovery.last_endpoint.decode().removeprefix("tcp://")
    command = [sys.executable, "-m", "kvxfer_vllm.router_registration", "--router", router]
    command += ["--prefill", f"http://{address}", "prefill-0@127.0.0.1:5600", "--decode", "http://127.0.0.1:1/"]
    told = {"type": "P", "http_address": address, "zmq_address": "prefill-0@127.0.0.1:5600", "transfer_mode": "WRITE"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert heard(discovery, 30) == told
            assert heard(discovery, 20) == told
            server.status = 503
            while heard(discovery, 3) is not None:
                pass
            server.status = 200
            assert heard(discovery, 20) == told
        finally:
            process.terminate()
        said = process.stdout.read().splitlines()
    assert said == [f"{address} is healthy", f"{address} is not healthy", f"{address} is healthy"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "name a server"),
        (["--decode", "https://a:1"], "is not like http://host:port"),
        (["--decode", "http://a:1/v1"], "is not like http://host:port"),
        (["--prefill", "http://a:1", "127.0.0.1:5600"], "is not like engine-id@host:port"),
        (["--prefill", "http://a:1", "an engine@127.0.0.1:5600"], "is not like engine-id@host:port"),
    ],
)
def test_what_it_refuses(arguments, complaint, capsys):
    """An invalid argument is named, and the exit status is 2."""
    with pytest.raises(SystemExit) as ended:
        main(["--router", "127.0.0.1:1", *arguments])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err

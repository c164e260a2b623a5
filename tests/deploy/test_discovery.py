# SPDX-License-Identifier: Apache-2.0
"""vllm-router, with the manifest's options, finds servers by their labels at a simulated Kubernetes API."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import sys
import threading
from urllib.parse import parse_qs, urlsplit

import pytest

from kvxfer.testing import eventually
from tests.deploy.test_manifests import resource
from tools.serve.client import ask, get
from tools.serve.process import ServerProcess, free_port

pytest.importorskip("vllm_router", reason="vllm-router is not installed")
pytest.importorskip("yaml", reason="PyYAML is not installed")

ADDRESSES = {"prefill": "127.0.0.2", "decode": "127.0.0.3"}
LEASE = {"do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": "p", "kvxfer": {"token": "t"}}


class Quiet(http.server.BaseHTTPRequestHandler):
    """A handler that answers JSON and logs nothing."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body, status=200):
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


def pod(role):
    """A pod that is ready, with the labels of the manifest."""
    template = resource("Deployment", role)["spec"]["template"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{role}-0",
            "namespace": "kvxfer",
            "resourceVersion": "1",
            "uid": role,
            "labels": template["metadata"]["labels"],
        },
        "spec": {"containers": [{"name": "vllm"}]},
        "status": {
            "phase": "Running",
            "podIP": ADDRESSES[role],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def kubernetes(ending, ended):
    """Handler of the API: a list of the pods, and a watch that tells in time that the decode server's is ending."""

    class Api(Quiet):
        def do_GET(self):
            url = urlsplit(self.path)
            if "pods" not in url.path:
                self.answer({"kind": "Status", "status": "Failure", "code": 404}, 404)
            elif parse_qs(url.query).get("watch") == ["true"]:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                ending.wait(60)
                changed = pod("decode")
                changed["metadata"] |= {"deletionTimestamp": "2026-01-01T00:00:00Z", "resourceVersion": "2"}
                line = json.dumps({"type": "MODIFIED", "object": changed}).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                ended.wait(60)
                self.close_connection = True
            else:
                pods = [pod(role) for role in ADDRESSES]
                self.answer(
                    {"apiVersion": "v1", "kind": "PodList", "metadata": {"resourceVersion": "1"}, "items": pods}
                )

    return Api


def server(role, asked):
    """Handler of a server: it notes the parameters of each request, and the prefill server answers with others."""

    class Server(Quiet):
        def do_GET(self):
            self.answer({"object": "list", "data": [{"id": "kvxfer"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((role, body.get("kv_transfer_params")))
            choice = {"index": 0, "text": "x", "finish_reason": "length", "token_ids": [7], "prompt_token_ids": [1]}
            params = LEASE if role == "prefill" else None
            self.answer({"id": "1", "object": "text_completion", "choices": [choice], "kv_transfer_params": params})

    return Server


def free_everywhere():
    """A port that is free at both addresses."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for address in ADDRESSES.values():
                stack.enter_context(socket.socket()).bind((address, port))
            return port


@pytest.fixture
def serve():
    """Start HTTP servers, and end them."""
    running = []

    def start(address, handler):
        made = http.server.ThreadingHTTPServer(address, handler)
        made.daemon_threads = True
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        running.append((made, thread))
        return made.server_address[1]

    yield start
    for made, thread in running:
        made.shutdown()
        made.server_close()
        thread.join()


def test_the_router_finds_prefill_and_decode_by_labels(serve, tmp_path):
    """A request goes to the pod labelled prefill, then with its parameters to the one labelled decode, and to none that is ending."""
    asked, port, ending, ended = [], free_everywhere(), threading.Event(), threading.Event()
    for role, address in ADDRESSES.items():
        serve((address, port), server(role, asked))
    api = serve(("127.0.0.1", 0), kubernetes(ending, ended))
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{api}"}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [context],
        "current-context": "c",
    }
    (tmp_path / "config").write_text(json.dumps(config))
    (container,) = resource("Deployment", "vllm-router")["spec"]["template"]["spec"]["containers"]
    mine = free_port()
    changed = {
        "--host": "127.0.0.1",
        "--port": str(mine),
        "--prometheus-host": "127.0.0.1",
        "--prometheus-port": str(free_port()),
        "--service-discovery-port": str(port),
    }
    arguments = [f"{name}={changed.get(name, value)}" if value else name for name, _, value in
                 (word.partition("=") for word in container["args"])]  # fmt: skip
    url = f"http://127.0.0.1:{mine}"
    router = ServerProcess(
        "router",
        [sys.executable, "-m", "vllm_router.launch_router", *arguments],
        log=tmp_path / "router.log",
        healthy=lambda: get(url, container["livenessProbe"]["httpGet"]["path"], timeout_s=2.0)[0] == 200,
        environment={"KUBECONFIG": str(tmp_path / "config")},
    )
    try:
        router.start()
        router.wait_ready(60)
        eventually(lambda: ask(url, [1], max_tokens=1, timeout_s=10).ok, timeout_s=30, interval_s=0.3)
        assert get(url, container["readinessProbe"]["httpGet"]["path"])[0] == 200
        del asked[:]
        assert ask(url, [1], max_tokens=1).ok
        found = list(asked)
        ending.set()
        eventually(lambda: ask(url, [1], max_tokens=1).status == 503, interval_s=0.1)
    finally:
        ending.set()
        ended.set()
        router.kill()
    assert [role for role, _ in found] == ["prefill", "decode"], router.log_text()
    assert found[0][1]["do_remote_decode"] and found[1][1]["kvxfer"] == LEASE["kvxfer"]

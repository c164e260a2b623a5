# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus scrapes a real pair of servers: silence while they are healthy, and alerts by the faults they are for."""

from __future__ import annotations

import shutil
import threading
import time

import pytest

from kvxfer.secret import Secret
from kvxfer.testing import eventually
from tools.serve.model import make_model
from tools.serve.pair import ServerSettings, VllmServer, start_all

for name in ("nixl_cu13", "starlette", "transformers", "uvicorn", "yaml", "zmq"):
    pytest.importorskip(name, reason=f"{name} is not installed")
if shutil.which("prometheus") is None:
    pytest.skip("Prometheus is not installed", allow_module_level=True)

SECRET = "a secret of the test: 0123456789abcdef"
OTHER_SECRET = "another secret: 0123456789abcdefghijkl"
FACTOR = 1 / 50
"""Five minutes are six seconds."""
LEASE_S = 4.0
SETTINGS = {
    "block_tokens": 16,
    "num_blocks": 80,
    "max_model_tokens": 512,
    "engine": "transformers",
    "environment": {"KVXFER_SECRET": SECRET},
    "connector_options": {"lease_seconds": LEASE_S, "peer_timeout_seconds": 3.0, "read_timeout_seconds": 10.0},
}


def prompt_of(number: int, tokens: int = 40) -> list[int]:
    """A prompt that begins like no other one."""
    return [3 + number % 200, 3 + number // 200, *range(10, 8 + tokens)]


class Fleet:
    """A prefill server, a decode server, one that serves another model, and the Prometheus that scrapes them."""

    def __init__(self, folder) -> None:
        model = make_model()
        other = {**SETTINGS["connector_options"], "model_fingerprint": "another model"}
        self.prefill, self.decode, self.stranger = self.servers = [
            VllmServer(
                ServerSettings(name=name, model=model, role=role, **{**SETTINGS, "connector_options": options}), folder
            )
            for name, role, options in (
                ("prefill", "kv_producer", SETTINGS["connector_options"]),
                ("decode", "kv_consumer", SETTINGS["connector_options"]),
                ("another", "kv_consumer", other),
            )
        ]
        from tools.monitor.prometheus import Prometheus

        targets = {server.name: f"127.0.0.1:{server.port}" for server in self.servers}
        self.prometheus = Prometheus(targets, folder / "prometheus", factor=FACTOR)
        self._asked = 0

    def prompt(self, tokens: int = 40) -> list[int]:
        self._asked += 1
        return prompt_of(self._asked, tokens)

    def prefilled(self, prompt):
        """Parameters for the decode server."""
        return self.prefill.prefill(prompt).kv_transfer_params

    def transfer(self, server=None):
        """One request through both servers."""
        prompt = self.prompt()
        return (server or self.decode).ask(prompt, max_tokens=2, kv_transfer_params=self.prefilled(prompt))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    made = Fleet(tmp_path_factory.mktemp("alerts"))
    try:
        start_all(*made.servers)
        eventually(lambda: made.transfer().ok)
        start_all(made.prometheus)
        yield made
    finally:
        for server in (made.prometheus, *made.servers):
            server.kill()


def knock(port: int, secret: Secret, message: bytes = b"") -> None:
    """Connect to a side channel with a secret, and send messages that are none."""
    import zmq

    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.curve_serverkey, sock.linger = secret.listener.public, 0
        sock.curve_publickey, sock.curve_secretkey = secret.caller
        sock.connect(f"tcp://127.0.0.1:{port}")
        for _ in range(30):
            sock.send(message)
        sock.poll(500)  # until it is answered or refused


@pytest.mark.timeout(300)
def test_alerts_fire_by_their_faults_only(fleet):
    """No alert fires while transfers succeed; then each of seven faults fires its alert, whose texts are whole."""
    prometheus, decode = fleet.prometheus, fleet.decode
    eventually(prometheus.scrapes_all, timeout_s=60)
    seen = {}

    def fire(*names, provoke):
        """Provoke faults again and again until their alerts fire."""

        def look():
            provoke()
            seen.update({alert.name: alert for alert in prometheus.alerts() if alert.state == "firing"})
            return seen.keys() >= set(names)

        eventually(look, timeout_s=60, interval_s=0.3, what=f"{names}")

    end = time.monotonic() + 7.0  # longer than five minutes of the rules
    eventually(lambda: fleet.transfer().ok and time.monotonic() > end, timeout_s=60, interval_s=0.3)
    assert decode.metric("kvxfer_transfer_seconds_count") >= 10
    assert prometheus.has_fired() == set()

    fleets, others = Secret(SECRET.encode()), Secret(OTHER_SECRET.encode())

    def provoke():
        knock(fleet.prefill.side_channel_port, others)
        knock(fleet.prefill.side_channel_port, fleets, b"no message of kvxfer")
        assert not fleet.transfer(fleet.stranger).ok
        assert decode.ask(fleet.prompt(), max_tokens=1, kv_transfer_params=fleet.prefilled(fleet.prompt())).ok

    fire(
        "KvxferSecretsDiffer",
        "KvxferMessagesRefused",
        "KvxferServersDiffer",
        "KvxferParametersRefused",
        provoke=provoke,
    )

    # Three of these prompts fill the cache of the prefill server.
    prompts = [fleet.prompt(tokens=400) for _ in range(9)]
    askers = [threading.Thread(target=fleet.prefilled, args=(prompt,), daemon=True) for prompt in prompts]
    for asker in askers:
        asker.start()
    fire("KvxferLeasesExpire", "KvxferLeasesFillTheCache", provoke=lambda: None)
    for asker in askers:
        asker.join(60)

    orphans = [(prompt, fleet.prefilled(prompt)) for prompt in (fleet.prompt() for _ in range(8))]
    fleet.prefill.kill()

    def ask_for_an_orphan():
        prompt, params = orphans[0]
        orphans.append(orphans.pop(0))
        assert not decode.ask(prompt, max_tokens=1, kv_transfer_params=params).ok

    fire("KvxferPeersUnreachable", provoke=ask_for_an_orphan)
    for alert in seen.values():
        assert "<" not in "".join(alert.annotations.values()), alert  # where a template fails
        assert alert.annotations["cure"]

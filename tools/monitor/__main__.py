# SPDX-License-Identifier: Apache-2.0
"""``python -m tools.monitor``: a pair of servers under load and a real Prometheus with the project's rules; no alert may fire.

With ``--draw FILE`` the prefill server stands still for a while afterwards, between prefill and decode of some requests, which must
be an alert, and the panels of the dashboard are drawn from the whole run.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from tools.monitor.drawing import draw
from tools.monitor.prometheus import Prometheus
from tools.serve.model import make_model
from tools.serve.pair import ServerPair, start_all

_STANDSTILL_S = 100.0
_RECOVERY_S = 20.0
_CONNECTOR = {"peer_timeout_seconds": 3.0}


class Load:
    """Requests of several clients through the router, until it is stopped."""

    def __init__(self, pair: ServerPair, clients: int) -> None:
        self.answered = self.failed = 0
        self._pair = pair
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(number,), daemon=True) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        chosen = random.Random(number)
        while not self._stop.is_set():
            prompt = [chosen.randrange(3, 200) for _ in range(chosen.randrange(50, 600))]
            try:
                ok = self._pair.ask(prompt, max_tokens=8).ok
            except OSError:
                ok = False
            with self._lock:
                self.answered += ok
                self.failed += not ok
            self._stop.wait(chosen.uniform(0.2, 1.0))

    def stop(self) -> None:
        """End all clients."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.monitor", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of health (default: 10)")
    parser.add_argument("--engine", choices=["vllm", "transformers"], default="vllm", help="of both servers")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--draw", type=Path, help="let the prefill server stand still at the end, and draw the panels")
    options = parser.parse_args(arguments)
    if shutil.which("prometheus") is None:
        sys.stdout.write("This needs Prometheus (Debian: apt-get install prometheus).\n")
        return 2
    folder = Path(tempfile.mkdtemp(prefix="kvxfer-monitor-"))
    pair = ServerPair.of(make_model(), folder, engine=options.engine, num_blocks=400, connector_options=_CONNECTOR)
    servers = {server.settings.name: f"127.0.0.1:{server.port}" for server in (pair.prefill, pair.decode)}
    prometheus = Prometheus(servers, folder / "prometheus")
    with pair:
        pair.ask([5] * 40, max_tokens=2)
        try:
            start_all(prometheus)
            return _run(pair, prometheus, options, {address: name for name, address in servers.items()})
        finally:
            prometheus.kill()


def _run(pair: ServerPair, prometheus: Prometheus, options: argparse.Namespace, names: dict[str, str]) -> int:
    began_s = time.time()
    load = Load(pair, options.clients)
    try:
        while time.time() < began_s + 60 * options.minutes:
            time.sleep(5.0)
        fired, moved = prometheus.has_fired(), pair.decode.metric(_COUNT[options.engine])
        _say(f"{options.minutes:g} minutes, {load.answered} answers, {load.failed} failures, {moved:.0f} transfers")
        _say(f"alerts that fired: {', '.join(sorted(fired)) or 'none'}")
        status = int(bool(fired) or not moved)
        if options.draw:
            _stand_still(pair)
            more = prometheus.has_fired() - fired
            _say(f"with a prefill server that stands still: {', '.join(sorted(more)) or 'none'}")
            status |= int(not more)
            draw(prometheus, began_s, time.time(), options.draw, names)
    finally:
        load.stop()
    return status


def _stand_still(pair: ServerPair) -> None:
    """Stop the prefill server after it has answered some requests, which go to the decode server meanwhile."""
    prompts = [[3 + number, *range(20, 150)] for number in range(30)]
    params = [pair.prefill.prefill(prompt).kv_transfer_params for prompt in prompts]
    pair.prefill.freeze()
    until = time.monotonic() + _STANDSTILL_S
    for prompt, each in zip(prompts, params, strict=True):
        pair.decode.ask(prompt, max_tokens=2, kv_transfer_params=each)
        if time.monotonic() > until:
            break
    pair.prefill.thaw()
    time.sleep(_RECOVERY_S)


_COUNT = {"vllm": "vllm:kvxfer_transfer_seconds_count", "transformers": "kvxfer_transfer_seconds_count"}


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

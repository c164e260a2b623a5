# SPDX-License-Identifier: Apache-2.0
"""Real vLLM servers for the end-to-end tests, started once per session, and again after a test that ended one.

Starting a vLLM server costs half a minute of both cores of a small machine, so there are few: a *reference* without a
connector, one producer, and two consumers, one for each ``kv_load_failure_policy``. Tests are sorted so that those that
restart the producer with other settings come last.

A request reaches both servers in one of several ways, and every way is tested. Tests with a router take the fixture ``front``:
vllm-router, or the example's proxy in either order of dispatch. Tests that talk to the servers themselves take ``way``: "pull",
one server after the other, or "push", both at once.

The servers have a secret from a file; those of test_unequal_pairs have another one from the environment; those that
`make serve` starts, in test_serve, have none.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import os
import random
import re
import threading
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_NEEDED = ("vllm", "vllm_router", "nixl", "transformers")
_MISSING = [name for name in _NEEDED if importlib.util.find_spec(name) is None]

if not _MISSING:
    from kvxfer.secret import Secret
    from kvxfer.testing.waiting import tries
    from tools.serve.client import Answer  # noqa: TC001 - as its neighbours, only where vLLM is
    from tools.serve.model import SMALL, make_model
    from tools.serve.pair import PullRouter, PushProxy, ServerSettings, VllmServer, start_all
    from tools.serve.process import free_port

# Order: tests of a pair that has just started, then tests that kill and restart servers, then those with another producer.
_ORDER = (
    "test_first_request",
    "test_same_tokens",
    "test_unequal_pairs",
    "test_hybrid",
    "test_states",
    "test_mooncake",
    "test_two_hosts",
    "test_malformed_params",
    "test_side_channel",
    "test_push",
    "test_routers",
    "test_mooncake_routers",
    "test_clients_gone",
    "test_lost_peers",
    "test_late_read",
    "test_two_engines",
    "test_serve",
)
_TEST_TIMEOUT_S = 600
_TELLING = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|Traceback|Error\b")
"""Lines of a server's log that say why a test has failed."""

# Below the defaults, so that tests of deadlines do not take minutes; all other options have their defaults.
PEER_TIMEOUT_S = 12.0
READ_TIMEOUT_S = 20.0
RENDEZVOUS_S = 6.0
LEASE_S = 15.0
# Longest answer that waits for such a deadline, on a machine whose cores are all busy.
DEADLINE_S = READ_TIMEOUT_S + 30.0

# Prompts of a few thousand tokens are computed in several steps, and published in as many parts.
CHUNK_TOKENS = 512
_CHUNKED = ("--max-num-batched-tokens", str(CHUNK_TOKENS), "--enable-chunked-prefill")

PROXY = _HERE.parents[1] / "examples" / "push_proxy.py"
PROXY_ORDERS = ("both", "prefill-first")
FRONTS = ("router", *PROXY_ORDERS)
WAYS = ("pull", "push")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of the tests in this folder."""
    config.addinivalue_line("markers", "e2e: needs real vLLM servers and vllm-router; minutes on a small machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark and sort the tests of this folder, and skip them with the reason where something is missing."""
    here = [item for item in items if item.path.parent == _HERE]
    for item in here:
        item.add_marker(pytest.mark.e2e)
        item.add_marker(pytest.mark.timeout(_TEST_TIMEOUT_S))
        if _MISSING:
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(_MISSING)}"))
    here.sort(key=lambda item: _ORDER.index(item.path.stem) if item.path.stem in _ORDER else -1)
    rest = [item for item in items if item.path.parent != _HERE]
    items[:] = [*rest, *here]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Add to the report of a failed test what the servers have logged of transfers: the logs go with the machine."""
    report = yield
    lab = getattr(item, "funcargs", {}).get("started_lab")
    if report.failed and lab is not None:
        for log in sorted(lab.folder.glob("*.log")):
            said = [line[:500] for line in log.read_text(errors="replace").splitlines() if _TELLING.search(line)]
            report.sections.append((f"last warnings of {log.stem}", "\n".join(said[-20:])))
    return report


class Lab:
    """The servers, and questions to them."""

    def __init__(self, model, folder) -> None:
        self.model = model
        self.folder = folder
        self.random = random.Random(2026)
        secret_file = folder / "secret"
        secret_file.touch(mode=0o600)
        secret_file.write_bytes(os.urandom(32).hex().encode())
        self.secret = Secret.resolve(file=str(secret_file))
        known = {"secret_file": str(secret_file)}
        self.bootstrap_port = free_port()
        waits = {"rendezvous_timeout_seconds": RENDEZVOUS_S, "lease_seconds": LEASE_S}
        self.reference = VllmServer(ServerSettings(name="reference", model=model, num_blocks=2000), folder)
        producer = ServerSettings(
            name="prefill",
            model=model,
            role="kv_producer",
            num_blocks=2000,
            connector_options={**known, **waits, "bootstrap_port": self.bootstrap_port},
            arguments=_CHUNKED,
        )
        patience = {**known, "peer_timeout_seconds": PEER_TIMEOUT_S, "read_timeout_seconds": READ_TIMEOUT_S}
        consumer = ServerSettings(
            name="decode-fail", model=model, role="kv_consumer", num_blocks=2000, connector_options=patience
        )
        # One request at a time, so that a test can make the next one wait.
        one_by_one = replace(
            consumer,
            name="decode-recompute",
            load_failure_policy="recompute",
            connector_options={**patience, "mode": "push"},
            arguments=("--max-num-seqs", "1"),
        )
        self.prefill = VllmServer(producer, folder)
        self.decode = VllmServer(consumer, folder)
        self.recompute = VllmServer(one_by_one, folder)
        self.fronts = self._new_fronts()
        self._mooncake = PullRouter(self.prefill, self.decode, folder, bootstrap_port=self.bootstrap_port)
        self.threads = ThreadPoolExecutor(64)
        self.first_answer: Answer | None = None
        self.first_expected: Answer | None = None
        self.eventually = eventually
        self.deadline_s = DEADLINE_S
        self.lease_s = LEASE_S
        self.peer_timeout_s = PEER_TIMEOUT_S
        self._tokens: dict[tuple[object, int], tuple[int, ...]] = {}

    def facing(self, reference: VllmServer, prefill: VllmServer, decode: VllmServer) -> Lab:
        """The same questions, to other servers."""
        other = copy.copy(self)
        other.reference, other.prefill, other.decode = reference, prefill, decode
        return other

    # ---------------------------------------------------------------------------------------------------- life

    def _new_fronts(self) -> dict[str, PullRouter | PushProxy]:
        proxies = {
            order: PushProxy(PROXY, self.prefill, self.decode, self.folder, order=order) for order in PROXY_ORDERS
        }
        return {"router": PullRouter(self.prefill, self.decode, self.folder), **proxies}

    def start(self) -> None:
        """Start the reference, one pair and its fronts, and send the first request through the cold pair."""
        start_all(self.reference, self.prefill, self.decode, timeout_s=480)
        start_all(*self.fronts.values())
        # UCX rarely loses a connection that is being made (docs/nixl.md): then the request fails at its deadline, by name.
        for _ in range(2):
            prompt = self.prompt(200)
            self.first_answer = self.fronts["router"].ask(prompt, max_tokens=16, timeout_s=300)
            self.first_expected = self.reference.ask(prompt, max_tokens=16)
            if self.first_answer.ok:
                break

    def heal(self) -> None:
        """Start the servers that are not running."""
        down = [server for server in (self.reference, self.prefill, self.decode) if not server.alive]
        start_all(*down, timeout_s=480)
        start_all(*[front for front in self.fronts.values() if not front.alive])

    def mooncake_router(self) -> PullRouter:
        """vllm-router as for MooncakeConnector. It asks the producer for its engine id when it is first needed, and then never."""
        if not self._mooncake.alive:
            start_all(self._mooncake)
        return self._mooncake

    def consumer(self, policy: str) -> VllmServer:
        """The consumer with this ``kv_load_failure_policy``, running."""
        server = {"fail": self.decode, "recompute": self.recompute}[policy]
        if not server.alive:
            start_all(server, timeout_s=480)
        return server

    def replace_producer(self, settings: ServerSettings) -> None:
        """End the producer and start another one, with other settings, on its address."""
        self.prefill.kill()
        self.prefill = VllmServer(
            settings, self.folder, port=self.prefill.port, side_channel_port=self.prefill.side_channel_port
        )
        start_all(self.prefill, timeout_s=480)
        # Proxies name the producer, and the router may take it for ended for a while.
        for front in self.fronts.values():
            front.kill()
        self.fronts = self._new_fronts()
        self.heal()

    @contextlib.contextmanager
    def stopped_after(self, seconds: float):
        """Freeze the producer after some seconds, until the end of the block."""
        timer = threading.Timer(seconds, self.prefill.freeze)
        timer.start()
        try:
            yield
        finally:
            timer.join()
            self.prefill.thaw()

    def stop(self) -> None:
        """Kill every server."""
        for server in (
            *self.fronts.values(),
            self._mooncake,
            self.decode,
            self.recompute,
            self.prefill,
            self.reference,
        ):
            server.kill()
        self.threads.shutdown()

    # ----------------------------------------------------------------------------------------------- questions

    def prompt(self, num_tokens: int) -> list[int]:
        """A new random prompt, as token ids."""
        # The first ids are the special tokens.
        return [self.random.randrange(5, SMALL.vocabulary) for _ in range(num_tokens)]

    def expect(self, prompt, max_tokens: int = 16) -> tuple[int, ...]:
        """Right tokens: those of one server without a connector."""
        key = (repr(prompt), max_tokens)
        if key not in self._tokens:
            answer = self.reference.ask(prompt, max_tokens=max_tokens)
            assert answer.ok, answer.body
            self._tokens[key] = answer.tokens
        return self._tokens[key]

    def begin(self, way: str, prompt, producer: VllmServer | None = None, **options) -> tuple[dict, Future]:
        """Send a prefill request: parameters for the decode request, and the prefill's answer.

        Pull waits for the answer, which has the parameters. Push returns at once.
        """
        producer = producer or self.prefill
        if way == "push":
            key = uuid.uuid4().hex
            answer = self.threads.submit(producer.prefill, prompt, transfer_id=key, **options)
            return producer.rendezvous_params(key), answer
        answer = Future()
        answer.set_result(producer.prefill(prompt, **options))
        assert answer.result().ok and answer.result().kv_transfer_params, answer.result().body
        return answer.result().kv_transfer_params, answer

    def send(
        self, way: str, prompt, consumer: VllmServer | None = None, producer: VllmServer | None = None, **options
    ) -> Answer:
        """Send both requests, as a router does."""
        params, prefilled = self.begin(way, prompt, producer, timeout_s=options.get("timeout_s", 180.0))
        answer = (consumer or self.decode).ask(prompt, kv_transfer_params=params, **options)
        assert prefilled.result().ok, prefilled.result().body
        return answer

    def assert_works(self, consumer: VllmServer | None = None, num_tokens: int = 100, *, attempts: int = 1) -> None:
        """Check that the pair serves a new prompt in each way, and by a transfer, not by computing it.

        Args:
            consumer: of the pair; by default the one behind the fronts.
            num_tokens: of the prompt.
            attempts: most prompts. More than one if a lease is as short as a busy machine's pauses, or right after a process
                was killed. Each answer has the right tokens or is an error.
        """
        consumer = consumer or self.decode
        for way in reversed(WAYS):  # after a restart the first contact is a push
            before = consumer.metric("vllm:kvxfer_transfer_seconds_count")
            for attempt in range(1, attempts + 1):
                prompt = self.prompt(num_tokens)
                answer = self.send(way, prompt, consumer, max_tokens=8)
                assert answer.ok or attempt < attempts, answer.body
                assert answer.tokens == self.expect(prompt, 8) or not answer.ok
                moved = functools.partial(consumer.metric, "vllm:kvxfer_transfer_seconds_count")
                if eventually(lambda moved=moved, before=before: moved() > before):
                    break
            else:
                pytest.fail(f"nothing was transferred ({way})")

    def assert_no_blocks_in_use(self, *servers: VllmServer, timeout_s: float = 60.0) -> None:
        for server in servers or (self.prefill, self.decode):
            assert server.wait_no_blocks_in_use(timeout_s) == 0, f"{server.name} still holds KV blocks"

    def refresh_metrics(self, server: VllmServer) -> None:
        """Make a server's engine take a step, because counters appear with the next step."""
        assert server.ask([7, 8, 9], max_tokens=1).ok

    @contextlib.contextmanager
    def standstills(self):
        """Yield a function that returns the longest time since then in which one processor did not run this process, in seconds.

        A thread on each processor measures it. Virtual processors are paused one by one; if the paused one runs a thread with
        the interpreter's lock, a whole server stands still, and a thread on another processor would not notice.
        """
        gaps, over = [0.0], threading.Event()

        def watch(processor: int) -> None:
            os.sched_setaffinity(0, {processor})  # of this thread
            before = time.monotonic()
            while not over.wait(0.02):
                now = time.monotonic()
                gaps.append(now - before)
                before = now
            gaps.append(time.monotonic() - before)

        watchers = [threading.Thread(target=watch, args=(each,), daemon=True) for each in os.sched_getaffinity(0)]
        for watcher in watchers:
            watcher.start()
        try:
            yield lambda: max(gaps)
        finally:
            over.set()
            for watcher in watchers:
                watcher.join()

    def together(self, calls) -> list:
        """Run calls at once, each in a thread; results in order."""
        calls = list(calls)
        with ThreadPoolExecutor(len(calls)) as pool:
            return [future.result() for future in [pool.submit(call) for call in calls]]


def eventually(condition, timeout_s: float = 30.0) -> bool:
    """Whether a condition comes true within a time."""
    return any(condition() for _ in tries(timeout_s, interval_s=0.05))


@pytest.fixture(scope="session")
def _bare_environment():
    """Remove KVXFER_* and VLLM_* from the environment, so that servers run with the defaults."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("KVXFER_", "VLLM_")):
                patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def started_lab(_bare_environment, tmp_path_factory):
    """The lab, started once; its servers end with the session."""
    folder = tmp_path_factory.mktemp("servers")
    lab = Lab(make_model(SMALL, tmp_path_factory.mktemp("models")), folder)
    try:
        lab.start()
        yield lab
    finally:
        lab.stop()


@pytest.fixture
def lab(started_lab):
    """The lab with the reference, the producer, the consumer with policy "fail" and the fronts running."""
    started_lab.heal()
    return started_lab


@pytest.fixture(params=FRONTS)
def front(request, lab):
    """Address for clients: vllm-router, or the proxy that sends a request to both servers at once or to prefill first."""
    return lab.fronts[request.param]


@pytest.fixture(params=WAYS)
def way(request) -> str:
    """Way in which a request is sent to the two servers, see `Lab.begin`."""
    return request.param

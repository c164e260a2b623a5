# SPDX-License-Identifier: Apache-2.0
"""Requests that are sent to a prefill and a decode server at once: through the example's proxy and by hand, with real vLLM.

The prefill server of these tests computes 512 tokens a step, so that prompts of a few thousand tokens leave in several pieces.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

PROXY = Path(__file__).parents[2] / "examples" / "push_proxy.py"
MAX_TOKENS = 12


class Push:
    """A prefill server that works in chunks, the laboratory's decode server, and proxies for both orders of dispatch."""

    def __init__(self, lab) -> None:
        from kvxfer_vllm.local.pair import PushProxy, VllmServer, start_all

        self.lab, self._start = lab, start_all
        arguments = ("--max-num-batched-tokens", "512", "--enable-chunked-prefill")
        self.prefill = VllmServer(
            replace(lab.prefill.settings, name="prefill-chunked", arguments=arguments), lab.folder
        )
        self._make_server = lambda: VllmServer(
            self.prefill.settings,
            lab.folder,
            port=self.prefill.port,
            side_channel_port=self.prefill.side_channel_port,
        )
        self.proxies = {
            order: PushProxy(PROXY, self.prefill, lab.decode, lab.folder, order=order)
            for order in ("both", "prefill-first")
        }
        start_all(self.prefill, timeout_s=480)
        start_all(*self.proxies.values())

    @property
    def decode(self):
        return self.lab.decode

    def heal(self) -> None:
        """Start the prefill server again if it is gone."""
        self.lab.heal()
        if not self.prefill.alive:
            self.prefill = self._make_server()
            self._start(self.prefill, timeout_s=480)

    def at_once(self, prompt, **options):
        return self.lab.at_once(self.prefill, self.decode, prompt, uuid.uuid4().hex, **options)

    def alone(self, prompt, **options):
        """The decode server's half of a request of which the prefill server is never told."""
        return self.decode.ask(prompt, kv_transfer_params=self.prefill.told_at_once(uuid.uuid4().hex), **options)

    def early_share(self, ask) -> float:
        """Share of the bytes of what ``ask`` asks that were across before their prefill had ended."""
        names = ("vllm:kvxfer_early_bytes_total", "vllm:kvxfer_transfer_bytes_sum")
        before = [self.decode.metric(name) for name in names]
        ask()
        self.lab.settle_metrics(self.decode)
        early, all_ = (self.decode.metric(name) - old for name, old in zip(names, before, strict=True))
        assert all_ > 0
        return early / all_

    @contextlib.contextmanager
    def stopped_after(self, seconds: float):
        """The prefill server stands still from then on, until the end of the block: whatever is asked meanwhile is half done."""
        timer = threading.Timer(seconds, self.prefill.freeze)
        timer.start()
        try:
            yield
        finally:
            timer.join()
            self.prefill.thaw()

    def assert_quiet(self) -> None:
        self.lab.assert_no_blocks_in_use(self.prefill, self.decode)


@pytest.fixture(scope="module")
def started_push(started_lab):
    started_lab.heal()
    push = Push(started_lab)
    yield push
    for server in (*push.proxies.values(), push.prefill):
        server.kill()


@pytest.fixture
def push(started_push):
    started_push.heal()
    return started_push


@pytest.mark.parametrize("order", ["both", "prefill-first"])
@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 700, 3000])
def test_same_tokens(push, order, num_tokens):
    """Through a proxy, in either order of dispatch: the tokens of one server, and by a transfer."""
    prompt = push.lab.prompt(num_tokens)
    transfers = push.decode.metric("vllm:kvxfer_transfer_seconds_count")
    answer = push.proxies[order].ask(prompt, max_tokens=MAX_TOKENS)
    assert answer.ok, answer.body
    assert answer.tokens == push.lab.expect(prompt, MAX_TOKENS)
    assert push.lab.eventually(lambda: push.decode.metric("vllm:kvxfer_transfer_seconds_count") == transfers + 1, 20)
    push.assert_quiet()


def test_most_bytes_are_across_before_the_last_chunk(push):
    """Of 3,000 tokens in chunks of 512 at least 80 % of the bytes have arrived before prefill has ended."""
    prompt = push.lab.prompt(3000)
    assert push.early_share(lambda: push.at_once(prompt, max_tokens=2)) >= 0.8


@pytest.mark.parametrize("share", [0.6, 1.0], ids=["partly", "wholly"])
def test_a_prefix_is_there_already(push, share):
    """Blocks that the decode server has already are not sent, however early the others are."""
    prompt = push.lab.prompt(640)
    assert push.decode.ask(prompt[: int(640 * share)], max_tokens=1).ok
    bytes_before = push.decode.metric("vllm:kvxfer_transfer_bytes_sum")
    answer = push.at_once(prompt, max_tokens=MAX_TOKENS)
    assert answer.ok and answer.tokens == push.lab.expect(prompt, MAX_TOKENS)
    push.lab.settle_metrics(push.decode)
    moved = push.decode.metric("vllm:kvxfer_transfer_bytes_sum") - bytes_before
    full = push.decode.metric("vllm:kvxfer_transfer_bytes_sum")
    push.at_once(push.lab.prompt(640), max_tokens=1)
    push.lab.settle_metrics(push.decode)
    assert moved < 0.7 * (push.decode.metric("vllm:kvxfer_transfer_bytes_sum") - full)
    push.assert_quiet()


@pytest.mark.parametrize("order", ["both", "prefill-first"])
def test_many_clients_at_once(push, order):
    """Streams, chats and completions of all lengths, at once: each has its own tokens."""
    proxy = push.proxies[order]
    prompts = [push.lab.prompt(n) for n in (1, 33, 64, 200, 500, 700, 900, 1300)] * 2
    prompts = [[*prompt, 5 + i] for i, prompt in enumerate(prompts)]
    expected = [push.lab.expect(prompt, MAX_TOKENS) for prompt in prompts]
    answers = push.lab.together(
        [
            lambda p=prompt, i=i: proxy.ask(p, max_tokens=MAX_TOKENS, stream=i % 2 == 0)
            for i, prompt in enumerate(prompts)
        ]
    )
    assert [answer.tokens for answer in answers] == expected
    chat = [{"role": "user", "content": "a b c"}]
    assert proxy.ask(chat, max_tokens=5).tokens == push.lab.reference.ask(chat, max_tokens=5).tokens
    push.assert_quiet()


def test_a_proxy_without_servers(push):
    """What a server refuses reaches the client as it was said, and nothing hangs."""
    proxy = push.proxies["both"]
    assert proxy.ask(push.lab.prompt(10), model="another", timeout_s=30).status == 404
    assert proxy.ask(push.lab.prompt(4200), max_tokens=4, timeout_s=30).status == 400
    push.assert_quiet()


@pytest.mark.parametrize(
    "changes",
    [
        {"remote_engine_id": "somebody-else"},
        {"remote_port": 9},
        {"remote_host": "no.such.host.invalid"},
        {"transfer_id": 7},
        {"remote_engine_id": ["x"]},
        {"transfer_id": "x" * 100_000},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_wrong_parameters(push, changes):
    """What does not name the prefill server costs its own request an error, or nothing; the servers live and serve the next."""
    prompt = push.lab.prompt(200)
    params = push.prefill.told_at_once("t") | changes
    answer = push.decode.ask(prompt, kv_transfer_params=params, max_tokens=4, timeout_s=push.lab.deadline_s)
    assert answer.status == 500 or answer.tokens == push.lab.expect(prompt, 4)
    again = push.lab.prompt(200)
    assert push.at_once(again, max_tokens=4).tokens == push.lab.expect(again, 4)
    push.assert_quiet()


def test_a_prefill_that_never_comes(push):
    """A decode request whose prefill request got lost ends in an error when its place was kept for long enough."""
    answer = push.alone(push.lab.prompt(200), max_tokens=4, timeout_s=90)
    assert answer.status == 500
    push.assert_quiet()


def test_a_client_that_leaves_while_blocks_arrive(push):
    """A decode request that is aborted half way gives the blocks back on both sides, and the next one is served."""
    prompt, key = push.lab.prompt(3400), uuid.uuid4().hex
    prefilled = []
    prefill = threading.Thread(target=lambda: prefilled.append(push.prefill.prefill(prompt, transfer_id=key)))
    prefill.start()
    with push.stopped_after(0.15), pytest.raises(TimeoutError):
        push.decode.ask(prompt, kv_transfer_params=push.prefill.told_at_once(key), max_tokens=400, timeout_s=1)
    prefill.join(120)
    assert prefilled[0].ok
    push.assert_quiet()
    again = push.lab.prompt(300)
    answer = push.at_once(again, max_tokens=4)
    assert answer.ok, answer.body
    assert answer.tokens == push.lab.expect(again, 4)


def test_the_prefill_client_leaves(push):
    """A prefill that is aborted half way ends its decode request at once, in an error."""
    prompt, key = push.lab.prompt(3400), uuid.uuid4().hex
    decoded = []
    decode = threading.Thread(
        target=lambda: decoded.append(
            push.decode.ask(prompt, kv_transfer_params=push.prefill.told_at_once(key), max_tokens=4)
        )
    )
    decode.start()
    # On a fast machine prefill has ended before its client leaves.
    with push.stopped_after(0.15), contextlib.suppress(TimeoutError):
        push.prefill.prefill(prompt, transfer_id=key, timeout_s=1)
    decode.join(push.lab.deadline_s)
    assert not decode.is_alive()
    assert decoded[0].status == 500 or decoded[0].tokens == push.lab.expect(prompt, 4)
    push.assert_quiet()


@pytest.mark.parametrize("how", ["frozen", "killed"])
def test_the_prefill_server_goes(push, how):
    """A prefill server that stops in the middle costs its requests an error within the deadline, and is met afresh afterwards."""
    prompt, key = push.lab.prompt(3400), uuid.uuid4().hex
    answers = []

    def prefill() -> None:
        try:
            answers.append(push.prefill.prefill(prompt, transfer_id=key, timeout_s=60))
        except OSError as error:
            answers.append(error)

    asking = threading.Thread(target=prefill)
    asking.start()
    decoding = threading.Thread(
        target=lambda: answers.append(
            push.decode.ask(
                prompt, kv_transfer_params=push.prefill.told_at_once(key), max_tokens=4, timeout_s=push.lab.deadline_s
            )
        )
    )
    decoding.start()
    threading.Event().wait(0.5)  # a moment in the middle of prefill, whichever
    if how == "killed":
        push.prefill.kill()
    else:
        push.prefill.freeze()
    decoding.join(push.lab.deadline_s)
    assert not decoding.is_alive()
    if how == "frozen":
        push.prefill.thaw()
    asking.join(120)
    for answer in answers:
        right = getattr(answer, "tokens", ()) == push.lab.expect(prompt, 4)
        assert isinstance(answer, OSError) or answer.status in (200, 500)
        assert right or isinstance(answer, OSError) or answer.status == 500 or len(answer.tokens) == 1
    push.lab.assert_no_blocks_in_use(push.decode)
    push.heal()
    # As in pull: the first contact after a process was killed may fail once.
    for attempt in range(3):
        again = push.lab.prompt(300)
        answer = push.at_once(again, max_tokens=4)
        assert answer.ok or (answer.status == 500 and attempt < 2), answer.body
        if answer.ok:
            assert answer.tokens == push.lab.expect(again, 4)
            break
    push.assert_quiet()

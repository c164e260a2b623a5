# SPDX-License-Identifier: Apache-2.0
"""vllm-router with real servers, in the one mode in which it sends a request to both servers at once."""

from __future__ import annotations

import pytest

MAX_TOKENS = 12


class Routed:
    """The lab's producer and consumer, registered with a vllm-router."""

    def __init__(self, lab) -> None:
        from tools.serve.pair import start_all
        from tools.serve.push_router import PushRouter, Registrar

        self.lab = lab
        self.router = PushRouter(lab.folder)
        self.registrar = Registrar(self.router, lab.prefill, lab.decode, lab.folder)
        # The router is healthy only when it knows both.
        start_all(self.router, self.registrar, timeout_s=60)

    def count(self, name: str) -> float:
        """A metric of the consumer."""
        self.lab.refresh_metrics(self.lab.decode)
        return self.lab.decode.metric(f"vllm:kvxfer_{name}")

    def stop(self) -> None:
        self.registrar.kill()
        self.router.kill()


@pytest.fixture(scope="module")
def started_routed(started_lab):
    started_lab.heal()
    routed = Routed(started_lab)
    yield routed
    routed.stop()


@pytest.fixture
def routed(started_routed, lab):
    return started_routed


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("num_tokens", [1, 33, 700, 3000])
def test_same_tokens(routed, num_tokens, stream):
    """Tokens are those of one server, by a transfer, streamed or not."""
    prompt = routed.lab.prompt(num_tokens)
    transfers = routed.count("transfer_seconds_count")
    answer = routed.router.ask(prompt, max_tokens=MAX_TOKENS, stream=stream)
    assert answer.ok, answer.body
    assert answer.tokens == routed.lab.expect(prompt, MAX_TOKENS)
    assert routed.count("transfer_seconds_count") == transfers + 1
    routed.lab.assert_no_blocks_in_use()


def test_it_asks_both_at_once(routed):
    """Blocks of a prompt that is computed in several steps arrive before the last step."""
    partial = routed.count("partial_bytes_total")
    # Prefill takes a third of a second; on a busy machine the decode server may be later than that once.
    for _ in range(3):
        assert routed.router.ask(routed.lab.prompt(3500), max_tokens=2).ok
        if routed.count("partial_bytes_total") > partial:
            return
    pytest.fail("no byte arrived before prefill had ended")


def test_many_clients_at_once(routed):
    """Streams and completions of all lengths, and a chat, at once have their own tokens each."""
    prompts = [routed.lab.prompt(n) for n in (1, 33, 64, 200, 500, 700, 900, 1300)]
    chat = [{"role": "user", "content": "a b c"}]
    expected = [routed.lab.expect(prompt, MAX_TOKENS) for prompt in (*prompts, chat)]
    answers = routed.lab.together(
        [
            lambda p=prompt, i=i: routed.router.ask(p, max_tokens=MAX_TOKENS, stream=i % 2 == 0)
            for i, prompt in enumerate((*prompts, chat))
        ]
    )
    assert [answer.tokens for answer in answers] == expected
    routed.lab.assert_no_blocks_in_use()


def test_a_client_that_leaves(routed):
    """The router tells both servers of a client that leaves, and neither keeps a block."""
    with pytest.raises(TimeoutError):
        routed.router.ask(routed.lab.prompt(3500), max_tokens=500, timeout_s=0.5)
    routed.lab.assert_no_blocks_in_use()


def test_what_the_servers_refuse(routed):
    """A prompt that is too long is refused with the server's own message, and the next request is served."""
    answer = routed.router.ask(routed.lab.prompt(4200), max_tokens=4, timeout_s=60)
    assert answer.status == 400 and "maximum context length" in answer.body
    prompt = routed.lab.prompt(100)
    assert routed.router.ask(prompt, max_tokens=4).tokens == routed.lab.expect(prompt, 4)


def test_a_server_that_is_not_healthy_is_forgotten(routed):
    """The router answers 503 while one server does not answer, and serves again afterwards."""
    prompt = routed.lab.prompt(50)
    routed.lab.decode.freeze()
    try:
        assert routed.lab.eventually(lambda: "Remove Decode" in routed.router.log_text())
        assert routed.router.ask(prompt, max_tokens=4, timeout_s=30).status == 503
    finally:
        routed.lab.decode.thaw()
    assert routed.lab.eventually(lambda: routed.router.ask(prompt, max_tokens=4).ok)
    assert routed.router.ask(prompt, max_tokens=4).tokens == routed.lab.expect(prompt, 4)

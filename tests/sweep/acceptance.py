# SPDX-License-Identifier: Apache-2.0
"""Mean number of tokens that a step of speculative decoding yields: of a pair, and of one server asked the same."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from tests.sweep.judge import send, total

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.sweep.rows import Row
    from tools.serve.client import Answer
    from tools.serve.pair import VllmServer

__all__ = ["tokens_of_a_step", "tokens_of_a_step_of_pair"]

_ACCEPTED_AND_STEPS = ("vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_drafts_total")
_LENGTHS = (130, 410, 1000)
_ANSWER_TOKENS = 192
_LEAST_TOKEN = 5


def tokens_of_a_step(row: Row, server: VllmServer) -> float:
    """Of one server."""

    def ask(prompt: list[int], num_tokens: int) -> Answer:
        return server.ask(prompt, max_tokens=num_tokens, **dict(row.request))

    return _tokens_of_a_step(row, ask, server)


def tokens_of_a_step_of_pair(row: Row, prefill: VllmServer, decode: VllmServer) -> float:
    """Of the decode server of a pair."""

    def ask(prompt: list[int], num_tokens: int) -> Answer:
        return send(row, "pull", prefill, decode, prompt, num_tokens)

    return _tokens_of_a_step(row, ask, decode, prefill)


def _tokens_of_a_step(
    row: Row, ask: Callable[[list[int], int], Answer], drafting: VllmServer, *others: VllmServer
) -> float:
    """Tokens of a step with a guess.

    vLLM fills the first step after a load up with empty guesses and counts them as a rejected guess, although no draft was made
    (`Scheduler.schedule`, "Pad new decode requests"). What it counts in answers of one token are these.
    """
    chooser = random.Random(row.recipe.name)
    prompts = [[chooser.randrange(_LEAST_TOKEN, row.recipe.vocabulary) for _ in range(length)] for length in _LENGTHS]
    counted = []
    for num_tokens in (1, _ANSWER_TOKENS):
        before = _accepted_and_steps(drafting)
        for prompt in prompts:
            for server in (drafting, *others):
                server.reset_prefix_cache()
            answer = ask(prompt, num_tokens)
            if not answer.ok:
                raise ConnectionError(f"HTTP {answer.status}")
        counted.append([now - then for now, then in zip(_accepted_and_steps(drafting), before, strict=True)])
    (_, empty), (accepted, steps) = counted
    return 1 + accepted / max(steps - empty, 1.0)


def _accepted_and_steps(server: VllmServer) -> list[float]:
    # Counters of a step may appear with the next one; this request has no guess.
    server.ask([7, 8, 9], max_tokens=1)
    return total(server, *_ACCEPTED_AND_STEPS)

# SPDX-License-Identifier: Apache-2.0
"""Requests of a row, sent through a pair of servers, and what their answers say about the connector."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.sweep.images import as_sent
from tools.serve.client import Answer

if TYPE_CHECKING:
    from tests.sweep.rows import Row
    from tools.serve.pair import VllmServer

__all__ = ["Case", "Outcome", "Question", "cases_of", "conclude", "judge", "send", "total"]

Question = Callable[[str, Sequence[int]], "tuple[int, ...] | None"]
"""Right tokens of a prompt in the case of this name; None: any."""

_TIMEOUT_S = 60.0
_FREE_S = 45.0
_SPECIAL_TOKENS = 5
_BYTES = ("vllm:kvxfer_transfer_bytes_sum", "vllm:nixl_bytes_transferred_sum")
_DEFECTS = ("vllm:kvxfer_internal_errors_total", "vllm:kvxfer_hook_errors_total")
_LONGEST = 1500
# Chunks of Llama 4 are as long.
_WINDOW = 128
_MOST_WORDS = 40
_MOST_WRONG = 2
_HANDSHAKES = 3


@dataclass(frozen=True)
class Case:
    """Prompts that are sent at once. ``held``: tokens of the prompt's beginning that decode has in its prefix cache."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    held: int = 0
    alone: bool = True


@dataclass
class Outcome:
    """What a connector did with a row.

    Attributes:
        verdict: ``served``, ``refused``, ``wrong``, ``fails``, or ``unserved`` if a server without a connector fails, too.
        why: one sentence, unless it was served.
        answers, right: number of answers, and of those with the right tokens.
        as_one_server, compared: number of cases with the tokens of one server, where those do not decide, of so many.
        nbytes: of the prompts that were sent one at a time.
        growth_nbytes: for each further token of the longest prompt.
        step_tokens: mean number of tokens that a step with a guess yields, of the pair and of one server.
        preemptions: of the prefill server and the decode server.
        left: blocks that were in use at the end.
        wrong_cases: cases whose answers were not right, or moved nothing.
        tokens: of each right answer, by case and prompt.
    """

    verdict: str = "served"
    why: str = ""
    answers: int = 0
    right: int = 0
    as_one_server: int = 0
    compared: int = 0
    nbytes: int = 0
    growth_nbytes: float = 0.0
    step_tokens: tuple[float, float] = (0.0, 0.0)
    preemptions: tuple[int, int] = (0, 0)
    left: float = 0.0
    wrong_cases: list[str] = field(default_factory=list)
    tokens: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Fields as JSON has them, without the tokens."""
        return {name: value for name, value in asdict(self).items() if name != "tokens"}


def cases_of(row: Row, *, quick: bool = False) -> list[Case]:
    """Prompts around the borders of blocks and windows, a prefix that decode has, the same prompt again, and several at once."""
    chooser = random.Random(row.recipe.name)

    def prompt(num_tokens: int) -> tuple[int, ...]:
        return tuple(chooser.randrange(_SPECIAL_TOKENS, row.recipe.vocabulary) for _ in range(num_tokens))

    if row.crowd:
        # Short beside their answers, so that those who were admitted together do not fit together at their ends.
        return [Case("crowd", tuple(prompt(60 + 17 * i) for i in range(row.crowd)), alone=False)]
    window = row.recipe.window_tokens or _WINDOW
    lengths = {window + 31} if quick else {1, 95, 96, 97, window - 1, window, window + 1, window + 31}
    lengths |= {_several_windows(row), _LONGEST}
    cases = [Case(f"{length} tokens", (prompt(length),)) for length in sorted(lengths)]
    long = prompt(700)
    cases.append(Case("prefix held by decode", (long,), held=300))
    cases.append(Case("same prompt again", (long,), alone=False))
    if not (quick or row.peer_decides):  # tokens that depend on how a prompt was computed depend on the batch, too
        common = prompt(100)
        several = tuple(
            (common if i % 2 else ()) + prompt(length) for i, length in enumerate((5, 40, 130, 260, 410, 33))
        )
        cases.append(Case("six at once", several, alone=False))
    return cases


def _several_windows(row: Row) -> int:
    return 5 * (row.recipe.window_tokens or _WINDOW) + 3


def judge(
    row: Row, cases: list[Case], prefill: VllmServer, decode: VllmServer, right: Question, *, push: bool
) -> Outcome:
    """Send the cases in each way that the connector has, and compare; the servers run.

    Stops at the first failures if no answer was right, and when a server has ended.
    """
    outcome = Outcome()
    trial = _Trial(row, prefill, decode, right, outcome)
    try:
        trial.warm_up(cases[0])
        preempted = trial.preemptions()
        grown: list[tuple[int, int]] = []
        for way, case in ((way, case) for way in (("pull", "push") if push else ("pull",)) for case in cases):
            if len(outcome.wrong_cases) >= _MOST_WRONG and not outcome.right:
                break
            moved = trial.run(way, case)
            if case.alone and way == "pull":
                outcome.nbytes += moved
                if not case.held:
                    grown.append((len(case.prompts[0]), moved))
        outcome.growth_nbytes = _growth(grown)
        before, now = preempted, trial.preemptions()
        outcome.preemptions = (now[0] - before[0], now[1] - before[1])
        outcome.left = sum(server.wait_no_blocks_in_use(_FREE_S) for server in (prefill, decode))
        defects = sum(sum(total(server, *_DEFECTS)) for server in (prefill, decode))
    except OSError as error:
        outcome.wrong_cases.append(f"{trial.doing}: {' '.join(str(error).split()[:12])}")
        defects = 0
    conclude(row, outcome, defects)
    return outcome


class _Trial:
    """Cases of a row, sent through one pair; ``doing`` says which one."""

    def __init__(self, row: Row, prefill: VllmServer, decode: VllmServer, right: Question, outcome: Outcome) -> None:
        self._row, self._prefill, self._decode = row, prefill, decode
        self._right, self._outcome = right, outcome
        self.doing = "the first request"

    def warm_up(self, case: Case) -> None:
        """Send one prompt until it is answered, because on a busy machine the first handshake may be late."""
        for _ in range(_HANDSHAKES):
            if send(self._row, "pull", self._prefill, self._decode, case.prompts[0]).ok:
                break

    def run(self, way: str, case: Case) -> int:
        """Send the prompts of a case; returns the bytes that were moved."""
        self.doing = f"{way}, {case.name}"
        prefill, decode, row = self._prefill, self._decode, self._row
        if case.alone:
            prefill.reset_prefix_cache()
            decode.reset_prefix_cache()
        if case.held:
            _check(decode.ask(as_sent(row, case.prompts[0][: case.held]), max_tokens=1, timeout_s=_TIMEOUT_S))
        before = _moved(decode)
        busy = [[*prompt[:150]] for prompt in case.prompts[: row.busy_prefill]]
        with ThreadPoolExecutor(len(case.prompts) + len(busy)) as pool:
            own = [pool.submit(prefill.ask, prompt, max_tokens=400, timeout_s=_TIMEOUT_S) for prompt in busy]
            answers = list(pool.map(partial(send, row, way, prefill, decode), case.prompts))
            for each in own:
                _check(each.result())
        for prompt, answer in zip(case.prompts, answers, strict=True):
            self._compare(case, prompt, answer)
        moved = int(_moved(decode) - before)
        if case.alone and len(case.prompts[0]) > row.decode.block_tokens and not moved:
            self._outcome.wrong_cases.append(f"{self.doing}: nothing moved")
        return moved

    def _compare(self, case: Case, prompt: tuple[int, ...], answer: Answer) -> None:
        self._outcome.answers += 1
        if answer.ok and self._right(case.name, prompt) in {None, answer.tokens}:
            self._outcome.right += 1
            self._outcome.tokens[case.name, prompt] = answer.tokens
        else:
            got = "other tokens" if answer.ok else f"HTTP {answer.status}"
            if not answer.status:
                raise TimeoutError(f"no answer in {_TIMEOUT_S:.0f} s")
            self._outcome.wrong_cases.append(f"{self.doing}: {got}")

    def preemptions(self) -> tuple[int, int]:
        """Preemptions so far, of both servers."""
        names = ("vllm:num_preemptions_total",)
        return int(total(self._prefill, *names)[0]), int(total(self._decode, *names)[0])


def send(
    row: Row, way: str, prefill: VllmServer, decode: VllmServer, prompt: Sequence[int], num_tokens: int = 0
) -> Answer:
    """Send both requests of a prompt as a router does: one after the other (pull), or at once (push).

    ``num_tokens``: length of the answer, if it is not the row's.
    """
    request: dict[str, Any] = {"timeout_s": _TIMEOUT_S, **dict(row.request)}
    sent = as_sent(row, prompt)
    ask = partial(decode.ask, sent, max_tokens=num_tokens or row.num_answer_tokens, **request)
    try:
        if way == "push":
            key = uuid.uuid4().hex
            with ThreadPoolExecutor(1) as pool:
                prefilled = pool.submit(prefill.prefill, sent, transfer_id=key, **request)
                answer = ask(kv_transfer_params=prefill.rendezvous_params(key))
                first = prefilled.result()
            return answer if first.ok else first
        first = prefill.prefill(sent, **request)
        return ask(kv_transfer_params=first.kv_transfer_params) if first.ok else first
    except OSError as error:
        return Answer(0, str(error), broken=True)


def conclude(row: Row, outcome: Outcome, defects: float) -> None:
    """Give the verdict on what was counted."""
    if outcome.wrong_cases:
        others = any("other tokens" in each for each in outcome.wrong_cases)
        outcome.verdict = "wrong" if others else "fails"
        outcome.why = "; ".join(outcome.wrong_cases[:3])
    elif defects:
        outcome.verdict, outcome.why = "fails", f"{defects:.0f} internal errors"
    elif outcome.left:
        outcome.verdict, outcome.why = "fails", f"{outcome.left:.0f} blocks are still in use after {_FREE_S:.0f} s"
    elif row.crowd and not outcome.preemptions[0 if row.busy_prefill else 1]:
        outcome.verdict, outcome.why = "fails", "nothing was preempted"
    elif row.growing_nbytes is not None and outcome.growth_nbytes > row.growing_nbytes + _slack_nbytes(row):
        outcome.why = (
            f"{outcome.growth_nbytes:.0f} bytes for each token of a long prompt instead of {row.growing_nbytes}"
        )


def _slack_nbytes(row: Row) -> float:
    """Bytes that the border of a block or chunk may add to each of the tokens by which the two longest prompts differ."""
    tokens = row.decode.block_tokens if row.recipe.window_tokens else _WINDOW
    return tokens * row.recipe.kv_nbytes_per_token / (_LONGEST - _several_windows(row))


def _growth(grown: list[tuple[int, int]]) -> float:
    """Bytes of each token between the two longest prompts."""
    if len(grown) < 2:
        return 0.0
    (short, few), (long, many) = sorted(grown)[-2:]
    return (many - few) / (long - short)


def _check(answer: Answer) -> None:
    if not answer.ok:
        raise ConnectionError(f"HTTP {answer.status}")


def _moved(decode: VllmServer) -> float:
    # Counters of a connector appear with the next step.
    _check(decode.ask([7, 8, 9], max_tokens=1, timeout_s=_TIMEOUT_S))
    return sum(total(decode, *_BYTES))


def total(server: VllmServer, *names: str) -> list[float]:
    """Sum of the samples of each of these metrics."""
    samples = server.metrics()
    return [sum(sample.value for sample in samples if sample.name == name) for name in names]

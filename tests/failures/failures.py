# SPDX-License-Identifier: Apache-2.0
"""The same failures to a pair with KvxferConnector and to one with vLLM's own MooncakeConnector, on real servers of this machine.

``make failures`` prints a table of what a client gets; ``--write-docs`` puts it into docs/mooncake.md, where cells that were not run
stay as they are. Ends with 1 if KvxferConnector gave wrong tokens, no answer, or lost an engine.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.failures.pairs import PAIRS, KvxferPair
from tools.serve.model import SMALL, make_model
from tools.serve.pair import ServerSettings, VllmServer, start_all

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BEGIN, END = "<!-- made by `make failures`; do not edit -->", "<!-- end of what `make failures` made -->"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "mooncake.md"

BOUND_S = 60.0
"""Time that a client waits for its answer."""
_FREE_S = 10.0
_PROMPT_TOKENS = 300
_ANSWER_TOKENS = 8


@dataclass
class Trial:
    """A pair, and what was seen of it."""

    pair: KvxferPair
    reference: VllmServer
    random: random.Random
    bad: bool = False

    def prompt(self, num_tokens: int = _PROMPT_TOKENS) -> list[int]:
        """A new prompt."""
        return [self.random.randrange(5, SMALL.vocabulary) for _ in range(num_tokens)]

    def prefilled(self, prompt: Sequence[int], transfer_id: str | None = None) -> str:
        """Have a prompt prefilled; returns the id."""
        transfer_id = transfer_id or self.pair.new_id()
        params = self.pair.prefill_params(transfer_id)
        answer = self.pair.prefill.ask(prompt, max_tokens=1, kv_transfer_params=params, timeout_s=BOUND_S)
        if not answer.ok:
            raise ConnectionError(f"prefill: HTTP {answer.status} {answer.body:.200}")
        return transfer_id

    def ask(self, prompt: Sequence[int], params: Any, server: VllmServer | None = None) -> str:
        """Ask the decode server, or another one; returns what a client gets."""
        failed = self.pair.failed()
        begin = time.monotonic()
        try:
            answer = (server or self.pair.decode).ask(
                prompt, max_tokens=_ANSWER_TOKENS, kv_transfer_params=params, timeout_s=BOUND_S
            )
        except OSError as error:
            if not isinstance(error, TimeoutError):
                return "connection lost"
            self.bad = True
            return f"**no answer in {BOUND_S:.0f} s**"
        took = f"in {time.monotonic() - begin:.1f} s"
        if not answer.ok:
            now = self.pair.failed()
            names = [name for name, number in now.items() if number > failed.get(name, 0)]
            return f"HTTP {answer.status} {took}" + "".join(f" (`{name}`)" for name in names)
        expected = self.reference.ask(prompt, max_tokens=_ANSWER_TOKENS)
        if answer.tokens == expected.tokens:
            return f"right tokens {took}"
        self.bad = True
        return f"**wrong tokens, HTTP {answer.status}**"

    def aftermath(self) -> str:
        """What is left: engines that ended, blocks in use, and whether a new request is served."""
        dead = [server for server in (self.pair.prefill, self.pair.decode) if not _lives(server)]
        if dead:
            self.bad = True
            names = " and ".join(server.settings.name.split("-")[1] for server in dead)
            for server in dead:
                server.kill()
            return f"; **the engine of {names} is gone**"
        left = {server.settings.name.split("-")[1]: server.wait_no_blocks_in_use(_FREE_S) for server in self.servers}
        said = "".join(f"; {name} still holds {count:.0f} blocks" for name, count in left.items() if count)
        prompt = self.prompt(100)
        try:
            served = self.ask(prompt, self.pair.decode_params(self.prefilled(prompt)))
        except OSError as error:
            served = str(error)
        return said if served.startswith("right") else f"{said}; the next request: {served}"

    @property
    def servers(self) -> tuple[VllmServer, VllmServer]:
        return self.pair.prefill, self.pair.decode


def _lives(server: VllmServer) -> bool:
    """The server's engine lives: a server whose engine has died ends, or says so to each request."""
    time.sleep(1)
    try:
        return server.alive and server.ask([7, 8, 9], max_tokens=1, timeout_s=BOUND_S).ok
    except OSError:
        return False


# -- cases: each returns what the client got --------------------------------------------------------------------------


def nothing_fails(trial: Trial) -> str:
    prompt = trial.prompt()
    return trial.ask(prompt, trial.pair.decode_params(trial.prefilled(prompt)))


def prefill_freezes(trial: Trial) -> str:
    prompt = trial.prompt()
    params = trial.pair.decode_params(trial.prefilled(prompt))
    trial.pair.prefill.freeze()
    try:
        return trial.ask(prompt, params)
    finally:
        trial.pair.prefill.thaw()


def prefill_is_killed(trial: Trial) -> str:
    prompt = trial.prompt()
    params = trial.pair.decode_params(trial.prefilled(prompt))
    trial.pair.prefill.kill()
    try:
        return trial.ask(prompt, params)
    finally:
        trial.pair.start()
        trial.pair.restart_router()


def prefill_is_restarted(trial: Trial) -> str:
    """A new request, with what a router that ran on knows."""
    trial.pair.prefill.kill()
    trial.pair.start()
    prompt = trial.prompt()
    return trial.ask(prompt, trial.pair.decode_params(trial.prefilled(prompt)))


def key_is_missing(trial: Trial) -> str:
    prompt = trial.prompt()
    params = trial.pair.decode_params(trial.prefilled(prompt))
    del params[trial.pair.required_key]
    return trial.ask(prompt, params)


def nobody_prefills(trial: Trial) -> str:
    return trial.ask(trial.prompt(), trial.pair.decode_params(trial.pair.new_id()))


def value_is_malformed(trial: Trial) -> str:
    prompt = trial.prompt()
    params = trial.pair.decode_params(trial.prefilled(prompt))
    return trial.ask(prompt, {**params, "remote_engine_id": ["a"]})


def role_is_wrong(trial: Trial) -> str:
    return trial.ask(trial.prompt(), trial.pair.decode_params(trial.pair.new_id()), trial.pair.prefill)


def prompt_is_another(trial: Trial) -> str:
    transfer_id = trial.prefilled(trial.prompt())
    return trial.ask(trial.prompt(), trial.pair.decode_params(transfer_id))


def client_leaves(trial: Trial) -> str:
    """The client leaves while its request waits for a prefill that never comes."""
    prompt, params = trial.prompt(), trial.pair.decode_params(trial.pair.new_id())
    decode = trial.pair.decode

    def leave() -> None:
        try:
            decode.ask(prompt, max_tokens=1, kv_transfer_params=params, timeout_s=2)
        except OSError:
            pass

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    begin = time.monotonic()
    if decode.wait_no_blocks_in_use(BOUND_S):
        trial.bad = True
        return f"**its blocks are in use {BOUND_S:.0f} s later**"
    return f"its blocks are free after {time.monotonic() - begin:.1f} s"


CASES: dict[str, Callable[[Trial], str]] = {
    "nothing fails": nothing_fails,
    "prefill freezes before decode reads": prefill_freezes,
    "prefill is killed before decode reads": prefill_is_killed,
    "prefill is restarted; the router knows the old one": prefill_is_restarted,
    "a parameter is missing": key_is_missing,
    "no prefill comes": nobody_prefills,
    "the client leaves while decode waits for prefill": client_leaves,
    "another prompt under the same id": prompt_is_another,
    '`"remote_engine_id": ["a"]`': value_is_malformed,
    "parameters for decode sent to prefill": role_is_wrong,
}


def run(trial: Trial, case: str) -> str:
    """Try one case; returns its cell of the table."""
    if not all(server.alive for server in trial.servers):
        trial.pair.start()
        trial.pair.restart_router()
        nothing_fails(trial)  # the servers have met
    try:
        outcome = CASES[case](trial)
    except OSError as error:
        trial.bad, outcome = True, f"**{error}**"
    after = trial.aftermath()
    if "**" in outcome + after:
        # What it left would be in the way of the next case.
        trial.pair.stop()
    return outcome + after


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all; 1 if KvxferConnector failed in a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="cases whose name begins so; may be given again")
    parser.add_argument("--connector", choices=[kind.name for kind in PAIRS], action="append", help="default: both")
    parser.add_argument("--logs", type=Path, default=None, help="folder for the logs (default: a new temporary one)")
    parser.add_argument("--write-docs", action="store_true", help="write the table of docs/mooncake.md")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if not options.only or case.startswith(tuple(options.only))]
    logs = options.logs or Path(tempfile.mkdtemp(prefix="kvxfer-failures-"))
    _say(f"{len(cases)} cases; logs: {logs}")
    model = make_model(SMALL)
    reference = VllmServer(ServerSettings(name="reference", model=model, num_blocks=600), logs)
    rows: dict[str, dict[str, str]] = {case: {} for case in cases}
    bad: list[str] = []
    try:
        start_all(reference, timeout_s=480)
        for kind in [kind for kind in PAIRS if not options.connector or kind.name in options.connector]:
            trial = Trial(kind(model, logs), reference, random.Random(2026))
            try:
                for case in cases:
                    rows[case][kind.name] = run(trial, case)
                    _say(f"{kind.name:18} {case}: {rows[case][kind.name]}")
                if kind is KvxferPair and trial.bad:
                    bad.append(kind.name)
            finally:
                trial.pair.stop()
    finally:
        reference.kill()
    written = _rows_of(DOCS.read_text(encoding="utf-8"))
    for case, cells in rows.items():
        rows[case] = {**written.get(case, {}), **cells}
    lines = ["| failure | " + " | ".join(kind.name for kind in PAIRS) + " |", "|---" * (1 + len(PAIRS)) + "|"]
    lines += [
        f"| {case} | " + " | ".join(cells.get(kind.name, "not run") for kind in PAIRS) + " |"
        for case, cells in {**{case: written[case] for case in CASES if case in written}, **rows}.items()
    ]
    _say("\n".join(lines))
    if options.write_docs:
        text = DOCS.read_text(encoding="utf-8")
        old = text.split(BEGIN)[1].split(END)[0]
        DOCS.write_text(text.replace(old, "\n\n" + "\n".join(lines) + "\n\n"), encoding="utf-8")
    return int(bool(bad))


def _rows_of(text: str) -> dict[str, dict[str, str]]:
    """Cells of the table that the page has, by case and connector."""
    lines = [line for line in text.split(BEGIN)[1].split(END, maxsplit=1)[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
    return {case: dict(zip([kind.name for kind in PAIRS], found, strict=True)) for case, *found in cells}


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

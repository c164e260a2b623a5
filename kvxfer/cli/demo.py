# SPDX-License-Identifier: Apache-2.0
"""``kvxfer demo``: a producer and a consumer process move the KV cache of requests; every byte is checked."""

from __future__ import annotations

import json
import os
import platform
import statistics
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvxfer.cli import own_version
from kvxfer.cli.checks import PROCESS_NBYTES, check_agent, check_memory
from kvxfer.cli.parties import DemoConsumer, DemoProducer, Geometry, Outcome
from kvxfer.cli.table import add_format, size, table
from kvxfer.cli.terminal import Progress, paint
from kvxfer.errors import ConfigError, UnavailableError
from kvxfer.testing.child import Child

if TYPE_CHECKING:
    import argparse

MODELS = {
    "llama-3-8b": Geometry(layers=32, heads=8, head_dim=128),
    "llama-3-70b": Geometry(layers=80, heads=8, head_dim=128),
    "tiny": Geometry(layers=4, heads=2, head_dim=32),
}


@dataclass(frozen=True)
class DemoRequest:
    """Request of the demo: blocks of the producer, and blocks of the consumer for all but the first ``skip`` of them."""

    name: str
    source: list[int]
    target: list[int]
    skip: int = 0


@dataclass(frozen=True)
class Row:
    """Results of one request over all rounds: medians of times, sums of wrong bytes.

    Attributes:
        lease: end of the lease by the producer's event, in one word.
        share: bandwidth as a fraction of that of a plain memcpy of as many bytes just before each read.
    """

    request: str
    tokens: int
    nbytes: int
    runs: int
    descriptors: int
    seconds: float
    gb_per_s: float
    share: float
    lease: str
    wrong_nbytes: int
    checked_nbytes: int
    error: str

    @property
    def good(self) -> bool:
        """Whether the request was moved and every byte is right."""
        return not self.error and not self.wrong_nbytes and self.lease == "released"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--agent", default="nixl", help="transfer agent (see: kvxfer agents); default %(default)s")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a request; default %(default)s")
    parser.add_argument(
        "--model", choices=sorted(MODELS), default="llama-3-8b", help="model whose cache is moved; default %(default)s"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="number of times that each request is moved; default %(default)s"
    )
    add_format(parser)


def run(options: argparse.Namespace) -> int:
    """Run the demo; returns 0 if every byte is right and the late read was discarded.

    Raises:
        KvxferError: the demo cannot run here, or a process failed.
    """
    geometry = MODELS[options.model]
    if options.tokens < 2 * geometry.block_tokens or options.rounds < 1:
        raise ConfigError(f"--tokens is at least {2 * geometry.block_tokens} and --rounds at least 1")
    check_agent(options.agent, "the demo")
    wanted = -(-options.tokens // geometry.block_tokens)
    blocks = wanted + max(4, wanted // 4)
    needed = (2 * blocks + wanted) * geometry.block_nbytes + 2 * PROCESS_NBYTES
    check_memory(needed, "take fewer --tokens")
    requests = _requests(wanted, blocks)
    progress = Progress(steps=3 + len(requests) * options.rounds)
    with ExitStack() as stack:
        with progress.step(f"two processes fill a cache of {size(blocks * geometry.block_nbytes)} each"):
            raises = (ConfigError, UnavailableError)  # errors of the question, not of the process
            producer = stack.enter_context(
                Child("producer", DemoProducer, geometry, blocks, options.agent, raises=raises)
            )
            most_nbytes = wanted * geometry.block_nbytes
            consumer = stack.enter_context(
                Child("consumer", DemoConsumer, geometry, blocks, options.agent, most_nbytes, raises=raises)
            )
            producer.ready()
            consumer.ready()
        demo = _Demo(producer, consumer, progress)
        with progress.step("the processes meet"):
            warm = demo.move(DemoRequest("first contact", [0], [0]))[0]
        rows = [demo.rounds(request, options.rounds, options.tokens, geometry) for request in requests]
        with progress.step("a read after its lease has ended"):
            late, ended = demo.move_late(requests[0])
        found: dict[str, Any] = {
            "host": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "version": own_version(),
            "model": options.model,
            **asdict(geometry),
            "dtype": "bfloat16",
            "blocks": blocks,
            "cache_nbytes": blocks * geometry.block_nbytes,
            "needed_nbytes": needed,
            "pids": {"producer": producer.pid, "consumer": consumer.pid},
            "agent": options.agent,
            "via": warm.via,
            "route": "direct",
            "rounds": options.rounds,
            "requests": [asdict(row) for row in rows],
            "late_read": {"lease": ended, "error": late.error, "foreign_nbytes": late.foreign_nbytes},
        }
    found["good"] = not warm.error and all(row.good for row in rows) and late.error.startswith("LeaseEndedError")
    print(json.dumps(found, indent=2) if options.format == "json" else _readable(found, rows))
    return 0 if found["good"] else 1


def _requests(wanted: int, blocks: int) -> list[DemoRequest]:
    """Requests with contiguous and fragmented blocks, and one of which the consumer has a prefix already."""
    random = np.random.default_rng(7)
    fragmented = [random.permutation(blocks)[:wanted].tolist() for _ in range(2)]
    return [
        DemoRequest("contiguous blocks", list(range(wanted)), list(range(blocks - wanted, blocks))),
        DemoRequest("fragmented blocks", fragmented[0], fragmented[1]),
        DemoRequest(
            "prefix is present",
            list(range(wanted)),
            list(range(wanted - wanted // 2))[: wanted - wanted // 2],
            wanted // 2,
        ),
    ]


class _Demo:
    def __init__(self, producer: Child, consumer: Child, progress: Progress) -> None:
        self._producer, self._consumer, self._progress = producer, consumer, progress
        self._spec = producer.call("spec")

    def move(self, request: DemoRequest) -> tuple[Outcome, str]:
        """Lease, acquire and read a request once; returns the outcome and how the lease ended."""
        text = self._producer.call("lease", request.name, request.source)
        self._consumer.call("acquire", text)
        outcome: Outcome = self._consumer.call("read", self._spec, request.source, request.target, request.skip)
        return outcome, self._producer.call("end", text)

    def rounds(self, request: DemoRequest, number: int, tokens: int, geometry: Geometry) -> Row:
        """Move one request several times, and summarise."""
        done: list[tuple[Outcome, str]] = []
        for i in range(number):
            with self._progress.step(f"{request.name}, round {i + 1} of {number}: move, then check every byte"):
                done.append(self.move(request))
        outcomes = [outcome for outcome, _ in done]
        errors = [outcome.error for outcome in outcomes if outcome.error]
        last = outcomes[-1]
        seconds = statistics.median(outcome.seconds for outcome in outcomes)
        return Row(
            request=request.name,
            tokens=min(tokens, len(request.target) * geometry.block_tokens),
            nbytes=last.nbytes,
            runs=last.runs,
            descriptors=last.descriptors,
            seconds=seconds,
            gb_per_s=last.nbytes / seconds / 1e9 if seconds else 0.0,
            share=statistics.median(outcome.copy_s for outcome in outcomes) / seconds if seconds else 0.0,
            lease=done[-1][1],
            wrong_nbytes=sum(outcome.wrong_nbytes for outcome in outcomes),
            checked_nbytes=sum(outcome.checked_nbytes for outcome in outcomes),
            error=errors[0] if errors else "",
        )

    def move_late(self, request: DemoRequest) -> tuple[Outcome, str]:
        """Read while the lease ends: the consumer is frozen, and meanwhile the blocks go to another request.

        Where the copy is over before this process can freeze it, the consumer freezes before it reads instead.
        """
        for copying in (True, False):
            text = self._producer.call("lease", "late", request.source)
            self._consumer.call("acquire", text)
            if copying:
                self._consumer.call("begin", request.target)
            self._consumer.freeze()
            try:
                ended = self._producer.call("take_back", text, request.source)
                if not copying:
                    self._consumer.ask("begin", request.target)
            finally:
                self._consumer.thaw()
            if not copying:
                self._consumer.answer()
            outcome: Outcome = self._consumer.call("finish", request.source, request.target)
            self._producer.call("refill", request.source)
            if outcome.error or outcome.wrong_nbytes:
                break  # otherwise the read had ended, with the right bytes, before the lease did
        return outcome, ended


def _readable(found: dict[str, Any], rows: list[Row]) -> str:
    pids, late = found["pids"], found["late_read"]
    model = f"{found['model']}: {found['layers']} layers, {found['heads']} KV heads, head_dim {found['head_dim']}"
    cache = f"{found['blocks']} blocks of {found['block_tokens']} tokens, {size(found['cache_nbytes'])} in each process"
    lines = [
        "",
        f"kvxfer {found['version']} on {found['host']}",
        f"  cache     {model}, {found['dtype']}; {cache}",
        f"  between   producer, process {pids['producer']} -> consumer, process {pids['consumer']}",
        f"  moved by  {found['agent']} ({found['via']}), route {found['route']}; medians of {found['rounds']} round(s)",
        "",
    ]
    header = (
        "request",
        "tokens",
        "moved",
        "runs",
        "merged",
        "time",
        "GB/s",
        "of memcpy",
        "lease",
        "bytes checked",
        "wrong",
    )
    cells = [
        (
            row.request,
            f"{row.tokens:,}",
            size(row.nbytes),
            f"{row.runs:,}",
            f"{row.descriptors:,}",
            f"{row.seconds * 1e3:.1f} ms",
            f"{row.gb_per_s:.1f}",
            f"{row.share:.0%}",
            row.lease,
            f"{row.checked_nbytes:,}",
            f"{row.wrong_nbytes:,}" if not row.error else row.error,
        )
        for row in rows
    ]
    lines += [table(header, cells), ""]
    if late["error"].startswith("LeaseEndedError"):
        came = f"after {size(late['foreign_nbytes'])} of the other request's KV had arrived"
        what = f"was thrown away {came if late['foreign_nbytes'] else 'before a byte had moved'}:"
        what += f"\n  {late['error']}"
    else:
        what = f"was NOT thrown away: {late['error'] or 'it was taken for good'}"
    lines += [
        "  Then the consumer was frozen, its lease was ended and the blocks were given to another request; and it went on",
        f"  reading all the same. What it read {what}",
        "",
        paint("  Every byte is right: those that moved, and all that had to stay as they were.", "good")
        if found["good"]
        else paint("  FAILED: see above.", "bad"),
    ]
    return "\n".join(lines)

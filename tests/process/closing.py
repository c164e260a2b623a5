# SPDX-License-Identifier: Apache-2.0
"""A process that closes its endpoint in an awkward moment: ``python -m tests.process.closing CASE``. Prints what it saw."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

from kvxfer import Endpoint, KVCache
from kvxfer.agents.inproc import InprocAgent
from kvxfer.errors import KvxferError

ended = threading.Event()


class SlowToClose(InprocAgent):
    """An agent whose end takes a while, as that of one that still copies does."""

    def _close(self) -> None:
        time.sleep(1.0)
        super()._close()
        ended.set()


def endpoint(agent=SlowToClose) -> Endpoint:
    """One with a small cache of its own."""
    layers = {f"layer.{i}": np.zeros((64, 2, 4, 16), np.uint16) for i in range(2)}
    return Endpoint(KVCache.from_layers(layers, block_tokens=4), agent)


def say(*words: object) -> None:
    """Print a line for the test."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def signalled_in_close() -> None:
    """A handler closes while the main thread closes, as a SIGTERM handler and a ``with`` do."""
    one = endpoint()

    def handler(*_: object) -> None:
        one.close()
        say("handler", ended.is_set())

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    one.close()
    say("main", ended.is_set())
    one.close()


def interrupted_in_close() -> None:
    """Ctrl-C in close: the next one waits all the same, however often that happens."""
    one = endpoint()

    def handler(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, handler)
    for _ in range(3):
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            one.close()
            say("too early")
        except KeyboardInterrupt:
            say("interrupted", ended.is_set())
    one.close()
    say("main", ended.is_set())


def many_threads() -> None:
    """Several threads close at once: each returns when all has ended."""
    one, saw = endpoint(), []

    def close() -> None:
        one.close()
        saw.append(ended.is_set())

    threads = [threading.Thread(target=close) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    say("threads", len(saw), all(saw))


def signalled_in_calls() -> None:
    """A handler closes while the main thread is somewhere in a call of the endpoint."""
    for round_ in range(20):
        source, sink = endpoint("inproc"), endpoint("inproc")

        def handler(*_: object, source=source, sink=sink) -> None:
            sink.close()
            source.close()

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.01 + 0.003 * round_)
        until = time.monotonic() + 0.15
        transfers = []
        while time.monotonic() < until:
            ref = source.lease([1, 2])
            sink.acquire(ref)
            into = [2 * (len(transfers) % 16), 2 * (len(transfers) % 16) + 1]
            if len(transfers) >= 16:
                with contextlib.suppress(KvxferError):  # its blocks are its own until then
                    transfers[-16].wait(30)
            transfers.append(sink.read(ref, into))
            source.poll()
            sink.poll()
        signal.setitimer(signal.ITIMER_REAL, 0)
        handler()
        assert all(transfer.done for transfer in transfers)
    say("rounds", 20)


def forgotten() -> None:
    """Endpoints without a reference leave no thread and no file behind, also where reads were under way."""

    def state() -> tuple[int, int]:
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    def use() -> None:
        source, sink = endpoint("inproc"), endpoint("inproc")
        assert sink.read(source.lease([1]), [2]).wait(20)
        unended.append(sink.read(source.announce(), [3]))

    unended: list = []
    use()
    gc.collect()
    until = time.monotonic() + 30
    while state()[0] > 1 and time.monotonic() < until:
        time.sleep(0.01)
    before = state()
    for _ in range(10):
        use()
    gc.collect()
    while state() != before and time.monotonic() < until:
        time.sleep(0.01)
    say("left", state()[0] - before[0], state()[1] - before[1], all(each.done for each in unended))


def exit_without_close() -> None:
    """The interpreter ends with a read under way and an endpoint that was not closed."""
    source, sink = endpoint("inproc"), endpoint("inproc")
    kept.extend([source, sink, sink.read(source.announce(), [3])])
    say("exits")


def forked_without_close() -> None:
    """A child that was forked closes what its parent has: at once, and the parent goes on."""
    source, sink = endpoint("inproc"), endpoint("inproc")
    child = os.fork()
    if not child:
        began = time.monotonic()
        source.close()
        sink.close()
        os._exit(int(time.monotonic() - began > 5))
    status = os.waitpid(child, 0)[1]
    say("child", status, sink.read(source.lease([1]), [2]).wait(20))
    source.close()
    sink.close()


def few_files() -> None:
    """However few files the process may open: made, or refused by name, and nothing stays."""
    threads, seen = threading.active_count(), set()
    for limit in range(4, 64, 2):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 4096))
        try:
            endpoint("inproc").close()
            seen.add("made")
        except KvxferError as error:
            seen.add(type(error).__name__)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))
    say(*sorted(seen), threading.active_count() - threads)
    endpoint("inproc").close()


def no_more_threads() -> None:
    """An endpoint whose first or second thread cannot start is refused by name, and nothing is left behind."""
    start = threading.Thread.start
    for number in range(2):
        started = []

        def refuse(thread, number=number, started=started):
            if len(started) >= number:
                raise RuntimeError("can't start new thread")
            started.append(thread)
            start(thread)

        gc.collect()
        before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
        threading.Thread.start = refuse
        try:
            endpoint("inproc")
        except KvxferError as error:
            say(type(error).__name__)
        threading.Thread.start = start
        until = time.monotonic() + 20
        while time.monotonic() < until:
            gc.collect()
            after = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
            if after == before:
                break
            time.sleep(0.05)
        say(after[0] - before[0], after[1] - before[1])


kept: list = []

if __name__ == "__main__":
    globals()[sys.argv[1]]()

# SPDX-License-Identifier: Apache-2.0
"""Waiting in tests: for a condition and with a deadline, instead of for a fixed time."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

# Most seconds that one try counts for. Virtual machines stand still for half a minute (seen: 41 s), and the try right
# after that is the first one.
_TRY_S = 1.0


def tries(timeout_s: float, *, interval_s: float) -> Iterator[None]:
    """Yield once for each try until ``timeout_s`` are over, with a pause in between; at least once.

    A machine that stands still meanwhile uses up one second of it, however long it stood: there are always many tries.
    """
    left_s = timeout_s
    while True:
        begin = time.monotonic()
        yield
        if left_s <= 0:
            return
        time.sleep(interval_s)
        left_s -= min(time.monotonic() - begin, interval_s + _TRY_S)


def eventually(condition: Callable[[], T], *, timeout_s: float = 30.0, interval_s: float = 0.002, what: str = "") -> T:
    """Call ``condition`` until it answers something true, and return that answer.

    Args:
        condition: cheap, and harmless to repeat; an exception that it raises ends the wait.
        timeout_s: after this long without a true answer the test fails, see :func:`tries`.
        interval_s: pause between two calls.
        what: for the message, e.g. "the peer's memory changed".

    Raises:
        AssertionError: it stayed false.
    """
    for _ in tries(timeout_s, interval_s=interval_s):
        answer = condition()
        if answer:
            return answer
    raise AssertionError(f"still not so after {timeout_s} s: {what or condition}")


def stays(condition: Callable[[], object], *, for_s: float = 0.5, interval_s: float = 0.01, what: str = "") -> None:
    """Call ``condition`` for ``for_s`` seconds: it has to be true each time.

    A test that something never happens has to watch for a while; keep ``for_s`` short, because it always passes in full.

    Raises:
        AssertionError: it became false.
    """
    begin = time.monotonic()
    while True:
        elapsed = time.monotonic() - begin
        if not condition():
            raise AssertionError(f"no longer so after {elapsed:.3f} s: {what or condition}")
        if elapsed >= for_s:
            return
        time.sleep(interval_s)


def longest_pause_s(action: Callable[[], object]) -> float:
    """Longest time for which another thread does not run while ``action`` does: it holds the interpreter's lock."""
    gaps, over = [0.0], threading.Event()

    def tick() -> None:
        while not over.is_set():
            begin = time.monotonic()
            time.sleep(0.001)
            gaps.append(time.monotonic() - begin)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        action()
    finally:
        over.set()
        thread.join()
    return max(gaps)

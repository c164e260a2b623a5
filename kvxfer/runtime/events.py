# SPDX-License-Identifier: Apache-2.0
"""Events of an endpoint, from when they happen until its engine polls for them."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import deque
from typing import TYPE_CHECKING

from kvxfer.protocol.transfer import Done, Event, Failed

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.metrics import Metrics
    from kvxfer.protocol.transfer import Transfer
    from kvxfer.runtime.target_blocks import TargetBlocks

_log = logging.getLogger(__name__)

_PATIENCE_S = 0.5

MOST_UNPOLLED = 4096
"""Ends of transfers that are kept for an engine that has never polled."""


class Events:
    """Queue of events for an engine. Any thread.

    From the first poll on, everything is kept until it is polled. An engine that only waits for its transfers never polls: so
    before the first poll the ends of transfers, which the transfers tell too, are kept for the newest `MOST_UNPOLLED` only.
    Ends of leases are told nowhere else, and are always kept.

    Args:
        metrics: of the endpoint.
        on_event: called after each event; an error of its is logged.
    """

    def __init__(self, metrics: Metrics, on_event: Callable[[], object] | None = None) -> None:
        self._metrics = metrics
        self._on_event = on_event
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._lock = threading.Lock()
        """No thread waits for it for long: a signal handler that interrupts the thread that has it may wait for one that needs it."""
        self._unpolled: dict[int, Event] | None = {}
        """Events before the first poll, by number; None after it."""
        self._late: deque[Event] = deque()
        self._ends: deque[int] = deque()
        """Numbers of the ends of transfers among them."""
        self._next = 0
        self._dropped = False

    @property
    def unpolled(self) -> int:
        """Events that `poll` would return."""
        return self._queue.qsize() + len(self._late) + len(self._unpolled or ())

    def put(self, event: Event) -> None:
        """Add an event."""
        if self._unpolled is None:
            self._queue.put(event)
        else:
            self._late.append(event)
            self._sort_in(first_poll=False)
        if self._on_event is not None:
            try:
                self._on_event()
            except Exception:  # noqa: BLE001 - the engine's; this thread has others to serve
                _log.exception("on_event, which is to wake the engine, has raised")

    def _sort_in(self, *, first_poll: bool) -> None:
        """Put what came in where it belongs. What comes in meanwhile, and finds the lock taken, waits for the next one."""
        while self._late or (first_poll and self._unpolled is not None):
            if not self._lock.acquire(timeout=_PATIENCE_S):
                return
            try:
                with contextlib.suppress(IndexError):
                    while True:
                        event = self._late.popleft()
                        if self._unpolled is None:
                            self._queue.put(event)
                        else:
                            self._keep(event, self._unpolled)
                if first_poll and self._unpolled is not None:
                    for event in self._unpolled.values():
                        self._queue.put(event)
                    self._unpolled = None
                    self._ends.clear()
            finally:
                self._lock.release()

    def poll(self, timeout_s: float) -> list[Event]:
        """Take what there is; waits up to ``timeout_s`` for the first."""
        self._sort_in(first_poll=True)
        events: list[Event] = []
        try:
            if timeout_s > 0:
                events.append(self._queue.get(timeout=timeout_s))
            while True:
                events.append(self._queue.get_nowait())
        except queue.Empty:
            return events

    def _keep(self, event: Event, unpolled: dict[int, Event]) -> None:
        number, self._next = self._next, self._next + 1
        unpolled[number] = event
        if not isinstance(event, (Done, Failed)):
            return
        self._ends.append(number)
        if len(self._ends) > MOST_UNPOLLED:
            del unpolled[self._ends.popleft()]
            if not self._dropped:
                self._dropped = True
                _log.warning(
                    "more than %d transfers have ended and poll() was never called: the oldest Done and Failed events are "
                    "dropped; call poll() once at the start to keep all (wait() and await tell the same)",
                    MOST_UNPOLLED,
                )
            self._metrics.count("kvxfer_events_dropped_total")


class TransferEnds:
    """Frees the blocks of transfers that end, counts them, and tells the engine. Has no reference to the endpoint."""

    def __init__(self, metrics: Metrics, events: Events, targets: TargetBlocks) -> None:
        self._metrics = metrics
        self._events = events
        self._targets = targets

    def __call__(self, transfer: Transfer) -> None:
        """Take the end of a transfer. Any thread."""
        self._targets.give_back(transfer.into)
        error, metrics = transfer.error, self._metrics
        metrics.count("kvxfer_transfers_total", outcome="done" if error is None else type(error).__name__)
        if error is None:
            metrics.count("kvxfer_bytes_total", transfer.nbytes)
            if transfer.partial_nbytes:
                metrics.count("kvxfer_partial_bytes_total", transfer.partial_nbytes)
            metrics.observe("kvxfer_transfer_seconds", transfer.seconds)
            metrics.observe("kvxfer_transfer_nbytes", transfer.nbytes)
            metrics.observe("kvxfer_descriptors", transfer.descriptors)
            self._events.put(Done(transfer))
        else:
            self._events.put(Failed(transfer, error))

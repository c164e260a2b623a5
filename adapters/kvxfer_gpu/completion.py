# SPDX-License-Identifier: Apache-2.0
"""Completion of work on a GPU, by an event."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, ClassVar

from kvxfer.errors import TransferFailedError

if TYPE_CHECKING:
    from collections.abc import Callable

_LONGEST_NAP_S = 1e-3


class EventCompletion:
    """A `kvxfer.buffers.base.Completion` of all work that was put on a stream before an event was recorded there.

    For an engine that tells kvxfer when its blocks are written: ``endpoint.publish(ref, blocks, after=[EventCompletion(event)], complete=False)``.

    Args:
        event: recorded; a ``torch.cuda.Event`` or anything else with ``query()`` and ``synchronize()``.
        finish: last step on the host, before the completion is done. Called once, by the first thread that asks.
    """

    answers_at_once: ClassVar[bool] = True
    """See `kvxfer.buffers.base.Completion`."""

    def __init__(self, event: Any, finish: Callable[[], object] | None = None) -> None:
        self._event = event
        self._finish = finish
        self._lock = threading.Lock()
        self._ended = False
        self._error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether the work has ended; its bytes are in place unless `wait` raises."""
        if self._ended:
            return True
        with self._lock:
            try:
                if not self._ended and self._event.query():
                    self._end()
            except Exception as error:  # noqa: BLE001 - an error of a vendor, of any type; wait raises it
                self._error, self._ended = error, True
        return self._ended

    def wait(self, timeout_s: float | None = None) -> bool:
        """See `kvxfer.buffers.base.Completion`. Raises TransferFailedError: the GPU failed."""
        if timeout_s is None and not self._ended:
            with self._lock:
                try:
                    if not self._ended:
                        self._event.synchronize()
                        self._end()
                except Exception as error:  # noqa: BLE001 - as above
                    self._error, self._ended = error, True
        deadline = time.monotonic() + (timeout_s or 0.0)
        while not self.done and time.monotonic() < deadline:
            time.sleep(min(_LONGEST_NAP_S, max(0.0, deadline - time.monotonic())))
        if self._error is not None:
            raise TransferFailedError(f"the GPU failed: {self._error}") from self._error
        return self._ended

    def _end(self) -> None:
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()
        self._ended = True

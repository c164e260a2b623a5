# SPDX-License-Identifier: Apache-2.0
"""Faults of kvxfer itself: each is counted and becomes an `InternalError`; its trace is logged at most once a second per kind."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from kvxfer.errors import InternalError, KvxferError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.metrics import Metrics

_log = logging.getLogger(__name__)

_EVERY_S = 1.0
_MOST_KINDS = 256


class Defects:
    """Faults that one thread has caught. Used by that thread.

    Args:
        metrics: counted in ``kvxfer_internal_errors_total``.
        where: name of the thread, for messages and as a label.
    """

    def __init__(self, metrics: Metrics, where: str) -> None:
        self._metrics = metrics
        self._where = where
        self._kinds: dict[tuple[type, object, int], tuple[float, int]] = {}
        """Time at which the trace of a kind may be logged again, and number of its faults since the last trace."""

    def caught(self, error: BaseException) -> InternalError:
        """Count and log a fault, and return the error for the transfers or leases that it affects."""
        self._metrics.count("kvxfer_internal_errors_total", where=self._where)
        now, kind = time.monotonic(), _kind(error)
        again_at, unsaid = self._kinds.get(kind, (0.0, 0))
        if now >= again_at:
            if len(self._kinds) >= _MOST_KINDS:
                self._kinds.clear()
            self._kinds[kind] = (now + _EVERY_S, 0)
            more = f" ({unsaid} more of this kind since the last trace)" if unsaid else ""
            _log.error("fault in the %s thread, which continues%s", self._where, more, exc_info=error)
        else:
            self._kinds[kind] = (again_at, unsaid + 1)
        named = InternalError(f"a fault of kvxfer in its {self._where} thread: {type(error).__name__}: {error}")
        named.__cause__ = error
        return named

    def named(self, error: Exception) -> KvxferError:
        """Name an error for the transfers that it ends: one of kvxfer's keeps its name, and everything else is a fault of kvxfer."""
        return error if isinstance(error, KvxferError) else self.caught(error)

    def guarded(self, step: Callable[[], object]) -> bool:
        """Run one step of the thread, which goes on if that raises; returns whether the step returned something true."""
        try:
            return bool(step())
        except BaseException as error:  # noqa: BLE001 - logged with its trace; the thread goes on
            self.caught(error)
            return False


def _kind(error: BaseException) -> tuple[type, object, int]:
    """Class of an error and the line that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (type(error), None, 0) if trace is None else (type(error), trace.tb_frame.f_code, trace.tb_lineno)

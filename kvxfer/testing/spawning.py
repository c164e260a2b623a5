# SPDX-License-Identifier: Apache-2.0
"""The start of a child process whose end is its parent's business alone."""

from __future__ import annotations

import signal
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess


def start_uninterruptible(process: BaseProcess) -> None:
    """Start a spawned process that ctrl-C does not reach, from its first moment on. For the thread that may block signals."""
    # A spawned process inherits blocked signals. The resource tracker, which is started with the first process, would unblock
    # them, so it has to run before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

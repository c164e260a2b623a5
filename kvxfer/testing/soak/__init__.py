# SPDX-License-Identifier: Apache-2.0
"""A long run: engines in real processes over a real transfer agent, under churn, with every delivered byte checked.

Two engines prefill and two decode, with caches of different layouts, by pull and by push; they are killed, frozen and restarted,
requests are aborted and leases expire. What must hold is in `Churn`: right bytes, each end told once and in time, nothing in
use when nothing is asked for, and memory, files and threads that do not grow, as the operating system counts them.

``run(seconds)`` returns a `SoakReport`, or raises `SoakError`::

    from kvxfer.testing.soak import run

    report = run(300.0, agent="nixl")
"""

from kvxfer.testing.soak.churn import SoakError, run
from kvxfer.testing.soak.report import SoakReport

__all__ = ["SoakError", "SoakReport", "run"]

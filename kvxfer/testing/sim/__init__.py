# SPDX-License-Identifier: Apache-2.0
"""A simulator: real endpoints in one process, on one virtual clock, moving real bytes through a world in which things go wrong.

The protocol is not imitated: each process holds a real `kvxfer.Endpoint`, given another clock, another control channel
and turns instead of threads (`kvxfer.runtime.environment`), and a transfer agent that copies real memory when the world says so. Simulated
are the world (messages that are lost, repeated, delayed and overtaken; copies that are late, torn, lost or go on after
they were given up; devices that end late or fail; processes that crash, freeze and come back; clocks that drift, jump and
stand) and the engines that use the endpoints, of one rank or several, with caches of any layout.

The same seed makes the same run. ``run(seed)`` returns a `SimulationReport`, or raises `SimulationError` that says the seed, what was
violated, and what happened before. `shrink` finds a small part of the run that still violates it::

    from kvxfer.testing.sim import PROFILES, run

    report = run(17, PROFILES["all"])
"""

from kvxfer.testing.sim.shrink import Shrunk, shrink
from kvxfer.testing.sim.story import PROFILES, SimulationError, SimulationReport, run
from kvxfer.testing.sim.world import Profile

__all__ = ["PROFILES", "Profile", "Shrunk", "SimulationError", "SimulationReport", "run", "shrink"]

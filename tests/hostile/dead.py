# SPDX-License-Identifier: Apache-2.0
"""Consumers that die, or stand still, in the middle of a packed read: how long the next packed read of another one takes.

``python -m tests.hostile.dead --trials 20 --dead 2 --stop``. The producer has its default settings: 8 slots, leases of 30 s.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from kvxfer.testing import eventually
from tests.hostile.hostile import Member
from tests.process.child import LARGE, EngineProcess

NUM_BLOCKS = 128
"""Blocks of a read: 64 MiB, more than all slots together."""


def _end_in_a_read(producer: Any, reader: Any, stop: bool) -> None:
    """Kill or stop a consumer that reads without a pause."""
    blocks = list(range(NUM_BLOCKS))
    reader.ask("read_on", [producer.lease(blocks) for _ in range(40)], blocks)
    eventually(lambda: producer.slots_taken() > 0, interval_s=0.0, timeout_s=20.0, what="a chunk is packed for it")
    if stop:
        reader.freeze()
    else:
        reader.kill()


def next_read_s(dead: int, *, stop: bool = False) -> tuple[str, float, int]:
    """Outcome and seconds of the first packed read after ``dead`` consumers were killed or stopped in theirs, and their slots."""
    blocks = list(range(NUM_BLOCKS))
    children = [EngineProcess(1 + number, LARGE, Member, route="source_packed") for number in range(2 + dead)]
    producer, honest, *lost = children
    try:
        for child in children:
            child.ready()
        # Each has met the producer before: connecting is not what is measured.
        for child in (honest, *lost):
            assert child.read_and_wait(producer.lease(blocks[:2]), blocks[:2], 20.0)[0] == "done"
        for child in lost:
            _end_in_a_read(producer, child, stop)
        taken = producer.slots_taken()
        outcome, took_s = honest.read_and_wait(producer.lease(blocks), blocks, 30.0)
        if outcome == "done":
            assert honest.holds_blocks_of(producer.seed, blocks, blocks), "wrong bytes"
        return outcome, took_s, taken
    finally:
        for child in children:
            child.close()


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--dead", type=int, default=3, help="consumers that die in each (%(default)s)")
    parser.add_argument("--stop", action="store_true", help="they are stopped instead of killed")
    parser.add_argument("--bound", type=float, default=3.0, help="seconds that the next read may take (%(default)g)")
    options = parser.parse_args()
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")
    told = [next_read_s(options.dead, stop=options.stop) for _ in range(options.trials)]
    beyond = [each for each in told if each[0] != "done" or each[1] > options.bound]
    took = sorted(seconds for _, seconds, _ in told)
    slots = sorted(taken for *_, taken in told)
    print(
        f"{options.dead} {'stopped' if options.stop else 'killed'} in a packed read, {len(told)} trials: the next packed read took "
        f"{took[len(took) // 2]:.2f} s (median), {took[-1]:.2f} s at most; they had {slots[0]} to {slots[-1]} slots of 8; {len(beyond)} failed or took more than {options.bound:g} s"
    )
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())

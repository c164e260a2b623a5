# SPDX-License-Identifier: Apache-2.0
"""Engines that end, freeze or are cut off in mid-transfer over UCX's TCP, again and again: who lives, and what is right.

``python -m tests.process.tcp`` (`make tcp`): a line for each kind of end, on one host and between two network namespaces, where the
producer writes and, fewer times, where the consumer reads. ``--by write --how kill --ends consumer --place one --trials 30``. A
trial counts if the transfer was under way at its fault, after its first bytes had arrived.

With WRITE it fails if a process ends that nobody killed, a byte is wrong, a read of another pair fails, or something stays in use. With
READ it shows how often processes die.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvxfer.testing import ChildGoneError, eventually
from tests.process.child import LARGE, EngineProcess
from tests.process.hosts import TwoHosts, why_not

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

HOW = ("kill", "close", "freeze", "cut")
ENDS = ("consumer", "producer")
PLACES = ("one", "two")
TRIALS = {"kill": 100, "close": 100, "freeze": 30, "cut": 30}
TRIALS_OF_READ = {"kill": 20, "close": 20, "freeze": 10, "cut": 15}

SETTINGS = {"lease_s": 8.0, "peer_timeout_s": 3.0, "quarantine_s": 0.2, "contact_timeout_s": 2.0}
SECRET = b"what two hosts know and no other does"
TIMEOUT_S = {"kill": 10.0, "close": 10.0, "freeze": 3.0, "cut": 4.0}
"""Deadline of the read in whose middle it happens."""
PATIENT_S = 40.0
"""Deadline of reads that have to be done: this machine may be busy."""
MARGIN_S = 15.0
"""Extra time, for a reset of the agent and a busy machine, after the deadline of a read."""
SLOW_MBIT = 1000
"""Of the wire between two hosts, so that a transfer takes a while."""
LATE_BYTES_S = 0.2
MINE, OTHERS, WARM, AFTER = list(range(120)), list(range(120, 240)), [240, 241], [242, 243]
"""Blocks of the read that is disturbed, 60 MiB, of the one beside it, and of short ones before and after."""
OVER_BY_NAME = {
    "PeerLostError", "PeerTimeoutError", "TransferTimeoutError", "TransferFailedError", "LeaseEndedError", "LeaseUnknownError", "HandshakeError", "ClosedError",
}  # fmt: skip
PRODUCERS_OWN = ("leases", "lease_cells", "writes", "packing")
CONSUMERS_OWN = ("reads", "flights", "target_blocks", "scratch_cells")


@dataclass
class Tally:
    """Results of the trials of one kind.

    Attributes:
        counted: trials whose transfer was under way at the fault; ``over`` it was in the others.
        deaths: trials in which a process ended that nobody killed, by its role.
        wrong: what else must not be, in words.
        outcomes: ends of the disturbed reads.
    """

    counted: int = 0
    over: int = 0
    deaths: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        ends = ", ".join(f"{name} {number}" for name, number in self.outcomes.most_common())
        deaths = ", ".join(f"{name} {number}" for name, number in self.deaths.most_common())
        return f"{self.counted} trials, deaths: {deaths or 'none'}; wrong: {len(self.wrong)}; ends of the read: {ends}"


class Fleet:
    """A pair of engines of which one meets its end, and a third that goes on with the survivor of both.

    Args:
        ends: ``consumer`` or ``producer``, the one that ends.
        by: setting ``move_by`` of all consumers.
        two: two hosts. The survivor is on one, the others are on the other, but for a third that is near while the wire is cut.
    """

    def __init__(self, ends: str, by: str, *, two: bool, seed: int = 1) -> None:
        self._ends, self._by = ends, by
        self._how = ""
        self._chance = random.Random(seed)
        self._numbers = itertools.count(1)
        self.wire = TwoHosts() if two else None
        self._engines: dict[str, EngineProcess] = {}
        self._killed: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self._engines.values():
            engine.dismiss()
        for engine in self._engines.values():
            engine.close()
        if self.wire is not None:
            self.wire.close()

    def engine(self, role: str) -> EngineProcess:
        """The ``survivor``, a third (``far`` or ``near``) or the one that is ``ending``: started if there is none that lives."""
        if role not in self._engines or not self._engines[role].alive:
            if role in self._engines:
                self._engines.pop(role).close()
                self._killed.discard(role)
            options: dict[str, Any] = {"ucx": "TLS=tcp", "settings": {**SETTINGS, "move_by": self._by}}
            if self.wire is not None:
                end = self.wire.ends[role in ("ending", "far")]
                options |= {"namespace": end.namespace, "device": end.device, "bind": f"tcp://{end.address}:0"}
                options["secret"] = SECRET
            self._engines[role] = EngineProcess(next(self._numbers), LARGE, **options)
        return self._engines[role]

    def run(self, how: str, trials: int, told: Callable[[str], None] = lambda _: None) -> Tally:
        """Have so many end in that way in mid-transfer, or try four times as often."""
        self._how, tally = how, Tally()
        for number in range(4 * trials + 6):
            if tally.counted >= trials:
                break
            self._guarded(tally, f"trial {number}", lambda: self._trial(tally))
            if number % 10 == 9:
                told(f"  {number + 1}: {tally}")
        self._guarded(tally, "the end", self._nothing_in_use)
        if tally.counted < trials:
            tally.wrong.append(f"only {tally.counted} of {trials} trials were in mid-transfer")
        return tally

    def _guarded(self, tally: Tally, what: str, call: Callable[[], None]) -> None:
        error: Exception | None = None
        try:
            call()
        except (AssertionError, ChildGoneError) as caught:
            error = caught
        if self.wire is not None:
            self.wire.heal()
        time.sleep(0.05 if error is not None else 0.0)  # a process that aborts takes a moment
        dead = [role for role, each in self._engines.items() if not each.alive and role not in self._killed]
        for role in dead:
            tally.deaths[f"{role} {self._engines[role].exitcode}"] += 1
            self._engines.pop(role).close()
        if error is not None and not dead:
            tally.wrong.append(f"{what}: {type(error).__name__}: {error}")
            for engine in self._engines.values():
                engine.close()
            self._engines.clear()

    def _trial(self, tally: Tally) -> None:
        near = "near" if self._how == "cut" else "far"
        survivor, third, ending = (self.engine(role) for role in ("survivor", near, "ending"))
        producer, consumer = (survivor, ending) if self._ends == "consumer" else (ending, survivor)
        other = (survivor, third) if self._ends == "consumer" else (third, survivor)
        _, other_consumer = other
        consumer.paint(MINE)
        other_consumer.paint(OTHERS)
        for pair, target in (((producer, consumer), WARM), (other, AFTER)):
            _serves(*pair, target, "before")
        if self.wire is not None:
            self.wire.slow(SLOW_MBIT)
        beside = other_consumer.read(other[0].lease(MINE), OTHERS, PATIENT_S)
        number = consumer.read(producer.lease(MINE), MINE, TIMEOUT_S[self._how])
        if not consumer.arrives(number, MINE, self._chance.uniform(0.0, 0.02)):
            tally.over += 1
            outcomes = [consumer.outcome(number, PATIENT_S), other_consumer.outcome(beside, PATIENT_S)]
            # On a busy machine the deadline of the first may have passed.
            assert outcomes in (["done", "done"], ["TransferTimeoutError", "done"]), f"without a fault: {outcomes}"
            return
        tally.counted += 1
        self._fault(ending)
        # Others go on meanwhile.
        outcome = other_consumer.outcome(beside, PATIENT_S + MARGIN_S)
        assert outcome == "done", f"the read beside it ended with {outcome}: {other_consumer.why(beside)}"
        assert other_consumer.holds_blocks_of(other[0].seed, MINE, OTHERS), "wrong bytes of the read beside it"
        _serves(*other, AFTER, "of others, meanwhile")
        if self._how in ("freeze", "cut"):
            time.sleep(self._chance.uniform(0.0, 1.5 * TIMEOUT_S[self._how]))
        painted = consumer is survivor and self._ended(tally, producer, consumer, number)
        self._mend(ending)
        if consumer is ending and consumer.alive:
            painted = self._ended(tally, producer, consumer, number)
        if ending.alive:
            eventually(
                lambda: _outcome(producer, consumer, WARM)[0] == "done", timeout_s=60.0, what="the pair works again"
            )
        if painted:
            time.sleep(LATE_BYTES_S)
            assert consumer.is_painted(MINE), "bytes came after the read had ended"

    def _fault(self, ending: EngineProcess) -> None:
        if self._how == "kill":
            ending.kill()
            self._killed.add("ending")
            self.engine("ending")  # the next one takes a second to start
        elif self._how == "close":
            ending.restart()
        elif self._how == "freeze":
            ending.freeze()
        elif self.wire is not None:
            self.wire.cut()

    def _mend(self, ending: EngineProcess) -> None:
        if self._how == "freeze":
            ending.thaw()
        elif self.wire is not None:
            self.wire.heal()

    def _ended(self, tally: Tally, producer: EngineProcess, consumer: EngineProcess, number: int) -> bool:
        """See that a disturbed read ends in time, right or by name; True if its blocks are painted now."""
        outcome = consumer.outcome(number, TIMEOUT_S[self._how] + MARGIN_S)
        tally.outcomes[outcome] += 1
        if outcome == "done":
            assert consumer.holds_blocks_of(producer.seed, MINE, MINE), "wrong bytes"
            return False
        assert outcome in OVER_BY_NAME, outcome
        consumer.paint(MINE)
        return True

    def _nothing_in_use(self) -> None:
        for role, engine in self._engines.items():
            if engine.alive:
                eventually(
                    lambda engine=engine: not engine.in_use(*PRODUCERS_OWN, *CONSUMERS_OWN),
                    timeout_s=2 * SETTINGS["lease_s"] + MARGIN_S,
                    what=f"nothing of the {role} is in use, which is {engine.in_use(*PRODUCERS_OWN, *CONSUMERS_OWN)}",
                )


def _outcome(producer: EngineProcess, consumer: EngineProcess, target: list[int]) -> tuple[str, float]:
    begin = time.monotonic()
    number = consumer.read(producer.lease([1, 2]), target, PATIENT_S)
    outcome = consumer.outcome(number, PATIENT_S + MARGIN_S)
    assert outcome != "done" or consumer.holds_blocks_of(producer.seed, [1, 2], target), "wrong bytes"
    if outcome not in ("done", "running"):
        outcome = f"{outcome} ({consumer.why(number)})"
    if outcome == "running":
        in_use = [each.call("in_use", *PRODUCERS_OWN, *CONSUMERS_OWN, "contacts") for each in (producer, consumer)]
        raise AssertionError(f"a short read has no end; in use at the producer and the consumer: {in_use}")
    return outcome, time.monotonic() - begin


def _serves(producer: EngineProcess, consumer: EngineProcess, target: list[int], what: str) -> None:
    outcome, took_s = _outcome(producer, consumer, target)
    assert outcome == "done", f"a short read {what} ended with {outcome} after {took_s:.1f} s"


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--by", action="append", choices=("write", "read", "auto"))
    parser.add_argument("--how", action="append", choices=HOW)
    parser.add_argument("--ends", action="append", choices=ENDS)
    parser.add_argument("--place", action="append", choices=PLACES)
    parser.add_argument("--trials", type=int, help="of each kind (100 and 30; fewer with READ)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")
    failed = False
    kinds = itertools.product(
        options.by or ("write", "read"), options.how or HOW, options.place or PLACES, options.ends or ENDS
    )
    for by, how, place, ends in kinds:
        reason = why_not() if place == "two" else "one host has no wire to cut" if how == "cut" else None
        what = f"{by:5} {how:6} {ends:8} on {place} host{'s' if place == 'two' else ' '}"
        if reason is not None:
            if how != "cut" or place == "two":
                print(f"{what}: left out: {reason}", flush=True)
            continue
        begun = time.monotonic()
        with Fleet(ends, by, two=place == "two", seed=options.seed) as fleet:
            trials = options.trials or (TRIALS_OF_READ if by == "read" else TRIALS)[how]
            tally = fleet.run(how, trials, lambda text: print(text, file=sys.stderr, flush=True))
        print(f"{what}: {tally} ({time.monotonic() - begun:.0f} s)", flush=True)
        for wrong in tally.wrong:
            print(f"    {wrong}", flush=True)
        failed |= by != "read" and bool(tally.wrong or tally.deaths)
    return int(failed)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())

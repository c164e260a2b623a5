# SPDX-License-Identifier: Apache-2.0
"""The simulator: its runs violate nothing, the same seed is the same run, and it finds planted bugs."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import traceback
from collections import Counter
from itertools import pairwise

import pytest

from kvxfer.cli import main
from kvxfer.testing.sim import PROFILES, Profile, SimulationError, run, shrink
from kvxfer.testing.sim.network import Network
from kvxfer.testing.sim.process import Process
from kvxfer.testing.sim.world import World
from tests.sim import planted, planted_writes
from tests.sim.planted import BUGS

SEEDS = 12
"""Seeds of each profile, beside those below; `make sim` runs thousands."""

SEEDS_WRITTEN = 2

FOUND_HERE = {
    "a chunk whose question was overtaken was never packed": ("calm", 0),
    "an agent that was replaced while a read went on was never forgotten": ("all", 55),
    "a producer refused to write to an agent that it had forgotten": ("stuck-written", 193),
    "writes that hung on an agent that was closed held up those to the next one": ("late-written", 1),
    "a read whose lease had ended failed by another name when its producer writes": ("calm-written", 109),
}
"""Bugs that the simulator found in kvxfer, with a seed that did; docs/simulator.md describes each."""

FOUND_BY = {
    "lease_check_left_out": ("all", 6, "wrong bytes"),
    "lease_check_before_the_bytes": ("all", 18, "wrong bytes"),
    "lease_check_beside_the_bytes": ("all", 185, "wrong bytes"),
    "check_is_the_token": ("slow", 34, "wrong bytes"),
    "abandoned_is_quiet": ("stuck", 6, "free block written"),
    "failed_is_quiet": ("crashy", 5, "free block written"),
    "agent_left_alive": ("crashy", 5, "free block written"),
    "told_before_it_is_quiet": ("stuck", 11, "free block written"),
    "quarantine_is_the_end": ("crashy", 1, "free block written"),
    "copy_not_waited_for": ("calm", 0, "wrong bytes"),
    "read_deadline_dropped": ("calm", 3, "left behind"),
    "staged_read_deadline_dropped": ("calm", 1, "read without end"),
    "lease_never_expires": ("calm", 9, "left behind"),
    "place_kept_for_ever": ("crashy", 7, "left behind"),
    "end_told_twice": ("calm", 0, "told in vain"),
    "expiry_not_told": ("calm", 0, "left behind"),
    "device_not_waited_for": ("calm", 1, "wrong bytes"),
    "sealed_one_block_too_many": ("calm", 0, "fault survived"),
    "moved_before_it_is_there": ("calm", 0, "wrong bytes"),
    "chunks_not_given_back": ("calm", 11, "left behind"),
    "chunks_outlive_their_lease": ("calm", 1, "left behind"),
    "one_chunk_is_taken_for_all": ("calm", 0, "wrong bytes"),
    "slot_lent_twice": ("calm", 2, "wrong bytes"),
    "restarted_producer_not_noticed": ("crashy", 45, "wrong bytes"),
    "peers_never_forgotten": ("calm", 0, "left behind"),
    "settling_not_repeated": ("lossy", 2, "left behind"),
    "fault_in_the_control_thread": ("calm", 1, "fault survived"),
    "hold_never_ends": ("calm", 3, "left behind"),
    "restarted_reads_number_anew": ("stuck", 55, "wrong bytes"),
    "clock_of_agents_stands": ("stuck", 1, "read without end"),
    "clock_of_the_control_thread_is_behind": ("clocks", 1, "read without end"),
    "renewals_by_the_producers_clock": ("calm", 1, "failed for nothing"),
    "one_rank_settles_for_all": ("calm", 0, "failed for nothing"),
    "one_rank_grants_for_all": ("calm", 0, "wrong bytes"),
    "unpacking_not_waited_for": ("calm", 0, "wrong bytes"),
    "packing_not_waited_for": ("calm", 0, "wrong bytes"),
    "slot_given_back_while_it_is_packed": ("slow", 20, "wrong bytes"),
    "device_failure_at_the_producer_ignored": ("stuck", 10, "wrong bytes"),
    "device_failure_at_the_consumer_ignored": ("stuck", 3, "wrong bytes"),
    "closed_without_a_word": ("crashy", 0, "left behind"),
    "overtaken_chunk_taken_for_an_old_one": ("calm", 0, "failed for nothing"),
    "agent_renewed_for_each_silent_contact": ("silent", 1, "torn down too often"),
    "agent_renewed_for_all_that_is_early": ("calm", 0, "torn down too often"),
    "silent_peers_stop_all_reads": ("silent", 59, "failed for nothing"),
    "part_in_flight_not_waited_for": ("calm", 1, "wrong bytes"),
    "cell_not_wiped": ("all", 6, "wrong bytes"),
    "standing_still_is_silence": ("clocks", 4, "free block written"),
    "first_piece_is_the_whole_grant": ("calm", 0, "failed for nothing"),
    "slots_withdrawn_under_a_lease_that_stands": ("slow", 4, "wrong bytes"),
    "one_check_for_all": ("slow", 13, "wrong bytes"),
    "write_begun_twice": ("lossy-written", 81, "free block written"),
    "writes_outlive_the_agent": ("stuck-written", 0, "fault survived"),
    "agents_of_consumers_never_forgotten": ("calm-written", 0, "left behind"),
    "first_answer_is_taken_for_all": ("calm-written", 3, "wrong bytes"),
    "given_up_write_is_quiet": ("stuck-written", 10, "free block written"),
    "failed_write_is_quiet": ("crashy-written", 1, "free block written"),
    "unquiet_taken_for_quiet": ("crashy-written", 1, "free block written"),
    "numbers_of_writes_used_again": ("stuck-written", 1, "failed for nothing"),
    "late_write_begun": ("late-written", 13, "free block written"),
    "writes_never_called": ("calm-written", 23, "failed for nothing"),
    "stop_answered_while_it_runs": ("stuck-written", 12, "free block written"),
}
"""Profile and seed by which each planted bug is found, and as what."""
PLANTED_IN = (planted.__file__, planted_writes.__file__)


@pytest.mark.parametrize("name", [name for name in PROFILES if name.endswith("-written")])
def test_whatever_is_written(name):
    """The same holds for engines whose blocks are written by their producers, by every route."""
    seen = Counter()
    for seed in range(SEEDS_WRITTEN):
        seen += run(seed, PROFILES[name]).seen
    assert all(seen[kind] > SEEDS_WRITTEN for kind in ("Write", "Wrote", "StageChunk", "packs", "unpacks"))


@pytest.mark.parametrize("name", [name for name in PROFILES if not name.endswith("-written")])
def test_whatever_goes_wrong(name):
    """No wrong bytes, no block reused while it may be touched, each end told once and in time, nothing left behind."""
    faults, ends, seen = Counter(), Counter(), Counter()
    for seed in range(SEEDS):
        report = run(seed, PROFILES[name])
        faults += report.faults
        ends += report.ends
        seen += report.seen
    profile = PROFILES[name]
    wanted = {
        "message lost": profile.lost,
        "message repeated": profile.repeated,
        "copy lost": profile.copy_lost,
        "copy late": profile.copy_late,
        "copy broken": profile.copy_broken,
        "copy refused": profile.copy_refused,
        "withdrawn memory read": profile.unguarded,
        "owner dies with its reader": profile.coupled,
        "agent not made": profile.unmade,
        "device failed": profile.device_failed,
        "crash": profile.crashes,
        "close": profile.closes,
        "freeze": profile.freezes,
        "cut": profile.cuts,
        "reconnect": profile.reconnects,
        "first copy lost": profile.first_lost,
        "second copy lost": profile.first_lost,
        "silence": profile.silences,
        "clock jump": profile.jumps,
    }
    # A fault that never happens proves nothing, and neither does a route that is never taken.
    assert {kind for kind, share in wanted.items() if share} <= faults.keys()
    assert ends["Done"] > SEEDS and ends["LeaseReleased"] > SEEDS and ends["Failed"] > SEEDS
    assert all(seen[kind] > SEEDS for kind in ("StageChunk", "packs", "unpacks", "converts", "partial bytes"))


@pytest.mark.parametrize("what", FOUND_HERE)
def test_what_it_found(what):
    """The seeds that once found something find it no more."""
    profile, seed = FOUND_HERE[what]
    run(seed, PROFILES[profile])


def test_the_same_seed_is_the_same_run():
    """A seed is the same run to the message, also in another process, whose strings hash differently."""
    code = (
        "from kvxfer.testing.sim import *; r = run(3, PROFILES['all']); print(r.digest, r.nbytes, sum(r.ends.values()))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    here = run(3, PROFILES["all"])
    assert told == {f"{here.digest} {here.nbytes} {sum(here.ends.values())}\n"}
    assert run(4, PROFILES["all"]).digest != here.digest


@pytest.fixture
def own_faults():
    """An error in the planted code itself, and not in the code that it breaks, is no finding."""
    faults = []

    class Listener(logging.Handler):
        def emit(self, record):
            error = record.exc_info[1] if record.exc_info else None
            if error is not None and traceback.extract_tb(error.__traceback__)[-1].filename in PLANTED_IN:
                faults.append(error)

    listener = Listener()
    logging.getLogger("kvxfer").addHandler(listener)
    yield faults
    logging.getLogger("kvxfer").removeHandler(listener)


@pytest.mark.parametrize("name", BUGS)
def test_teeth(name, monkeypatch, own_faults):
    """Each bug that is planted is found for what it does, by the seed that stands here: not because it does not fit in any more."""
    profile, seed, finding = FOUND_BY[name]
    BUGS[name](monkeypatch.setattr)
    with pytest.raises(SimulationError, match=rf"^seed {seed}, [0-9.]+ s: {finding}: "):
        run(seed, PROFILES[profile])
    assert [str(fault) for fault in own_faults if not isinstance(fault, planted.PlantedError)] == []


def test_less_of_it():
    """A run from which things are left out has none of them, and the rest as before; with nothing left nothing happens."""
    whole = run(1, PROFILES["stuck"])
    without = {name for name in whole.happened if not re.match(r"copy|r7\b|device|agent|cut", name)}
    part = run(1, PROFILES["stuck"], only=without)
    assert set(part.happened) <= without
    assert not part.faults.keys() & {"copy broken", "copy late", "copy lost", "copy refused", "device failed", "cut"}
    nothing = run(1, PROFILES["stuck"], only=set())
    assert (nothing.requests, nothing.ends, nothing.faults, nothing.happened) == (0, Counter(), Counter(), [])


def test_shrinking(monkeypatch):
    """A finding shrinks to a request or two that show the same violation, by a trace that is the same each time."""
    BUGS["end_told_twice"](monkeypatch.setattr)
    with pytest.raises(SimulationError) as caught:
        run(0, PROFILES["calm"])
    found = caught.value
    shrunk = [shrink(found, PROFILES["calm"], most_runs=100) for _ in range(2)]
    small = shrunk[0].error
    assert len(found.happened) > 50 and len(small.happened) <= 3 and len(small.trace) < 40
    assert small.finding == found.finding and small.trace == shrunk[1].error.trace
    with pytest.raises(SimulationError) as caught:
        run(0, PROFILES["calm"], only=set(small.happened))
    assert caught.value.trace == small.trace


def test_shrinking_is_bounded(monkeypatch):
    """Shrinking stops after the given number of runs, with its result so far."""
    BUGS["end_told_twice"](monkeypatch.setattr)
    with pytest.raises(SimulationError) as caught:
        run(0, PROFILES["calm"])
    told = []
    shrunk = shrink(caught.value, PROFILES["calm"], most_runs=3, tell=told.append)
    assert shrunk.runs == len(told) == 3 and shrunk.error.finding == caught.value.finding


def test_clocks():
    """Clocks run as they like, jump and stand, but never go back; no two processes have the same one."""
    world = World(1, Profile(drift=0.1))
    one, other = (Process(Network(world), label, 1) for label in ("a0", "b0"))
    assert abs(one.now() - other.now()) > 1
    steps = [
        lambda: world.run(world.now + 10),
        lambda: one.freeze(clock_stands=False),
        lambda: world.run(world.now + 10),
        one.thaw,
        lambda: one.freeze(clock_stands=True),
        lambda: world.run(world.now + 10),
        one.thaw,
        lambda: one.jump(5.0),
    ]
    shown = [one.now()]
    for step in steps:
        step()
        shown.append(one.now())
    passed = [after - before for before, after in pairwise(shown)]
    assert 9 <= passed[0] <= 11 and passed[2] == pytest.approx(passed[0]) and passed[7] == pytest.approx(5.0)
    assert passed[1] == passed[3] == passed[4] == passed[5] == passed[6] == 0.0


def test_the_command(capsys):
    """`kvxfer sim` runs seeds and sums up; what it cannot run is said by name."""
    assert main(["sim", "--seeds", "2", "--profile", "lossy"]) == 0
    told = capsys.readouterr().out
    assert "lossy" in told and "message lost" in told and "wrong bytes 0" in told
    assert main(["sim", "--profile", "nice"]) == 2
    assert "unknown profile 'nice'; known are calm" in capsys.readouterr().err
    assert main(["sim", "--seeds", "0"]) == 2
    assert main(["sim", "--shrink", "-1"]) == 2


def test_the_command_finds(monkeypatch, capsys):
    """A violation is told with the little that is needed for it, what happens then, and the command that shows it again."""
    BUGS["end_told_twice"](monkeypatch.setattr)
    assert main(["sim", "--seeds", "3", "--profile", "calm"]) == 1
    told = capsys.readouterr().out
    assert "which it does not wait for" in told and "faults and events" in told
    assert "again: kvxfer sim --profile calm --seeds 1 --from" in told
    assert main(["sim", "--seeds", "3", "--profile", "calm", "--shrink", "0"]) == 1
    assert "smaller after" not in capsys.readouterr().out

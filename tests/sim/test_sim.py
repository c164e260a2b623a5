# SPDX-License-Identifier: Apache-2.0
"""The simulator: what it runs must hold, the same seed is the same run, and it finds what is broken on purpose."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from kvxfer.cli import main
from kvxfer.testing.sim import PROFILES, SimulationError, run
from tests.sim.planted import BUGS

SEEDS = 20
"""Of each profile, beside those below; `make sim` runs thousands."""

FOUND_BY = {
    "failed_is_quiet": ("crashy", 3),
    "agent_left_alive": ("all", 8),
    "told_before_it_is_quiet": ("stuck", 36),
    "copy_not_waited_for": ("calm", 0),
    "read_deadline_dropped": ("crashy", 6),
    "staged_read_deadline_dropped": ("calm", 0),
    "lease_never_expires": ("calm", 0),
    "place_kept_for_ever": ("crashy", 1),
    "end_told_twice": ("calm", 0),
    "expiry_not_told": ("crashy", 0),
    "device_not_waited_for": ("calm", 0),
    "sealed_one_block_too_many": ("lossy", 3),
    "moved_before_it_is_there": ("calm", 0),
    "chunks_not_given_back": ("calm", 0),
    "chunks_outlive_their_lease": ("lossy", 0),
    "chunk_told_before_it_is_packed": ("slow", 0),
    "peers_never_forgotten": ("calm", 0),
    "settling_not_repeated": ("lossy", 3),
    "fault_in_the_control_thread": ("lossy", 0),
    "hold_never_ends": ("crashy", 6),
    "fence_left_out": ("stuck", 11),
    "fence_before_the_bytes": ("slow", 17),
    "abandoned_is_quiet": ("stuck", 5),
    "quarantine_is_the_end": ("stuck", 0),
    "slot_lent_twice": ("slow", 0),
    "restarted_producer_not_noticed": ("stuck", 11),
    "restarted_reads_number_anew": ("stuck", 10),
}


@pytest.fixture(autouse=True)
def _quiet():
    """What happens to simulated processes is no news."""
    logging.getLogger("kvxfer").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("kvxfer").setLevel(logging.NOTSET)


@pytest.mark.parametrize("name", PROFILES)
def test_whatever_goes_wrong(name):
    """No wrong bytes, no block reused while it may be touched, each end told once and in time, nothing left behind."""
    faults, ends = Counter(), Counter()
    for seed in range(SEEDS):
        report = run(seed, PROFILES[name])
        faults += report.faults
        ends += report.ends
    profile = PROFILES[name]
    wanted = {
        "message lost": profile.lost,
        "message repeated": profile.repeated,
        "copy lost": profile.copy_lost,
        "copy late": profile.copy_late,
        "copy broken": profile.copy_broken,
        "crash": profile.crashes,
        "freeze": profile.freezes,
        "cut": profile.cuts,
    }
    assert {
        kind for kind, share in wanted.items() if share
    } <= faults.keys()  # a fault that never happens proves nothing
    assert ends["Done"] > SEEDS and ends["LeaseSettled"] > SEEDS and ends["Failed"] > SEEDS


def test_the_same_seed_is_the_same_run():
    """To the message: also in another process, whose strings hash differently."""
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


@pytest.mark.parametrize("name", BUGS)
def test_teeth(name, monkeypatch):
    """Each bug that is planted is found, by the seed that stands here."""
    profile, seed = FOUND_BY[name]
    BUGS[name](monkeypatch.setattr)
    with pytest.raises((SimulationError, RuntimeError)) as caught:
        run(seed, PROFILES[profile])
    if caught.type is SimulationError:
        assert re.match(rf"seed {seed}, [0-9.]+ s: ", str(caught.value))


def test_the_command(capsys):
    """`kvxfer sim` runs seeds and sums up; what it cannot run is said by name."""
    assert main(["sim", "--seeds", "2", "--profile", "lossy"]) == 0
    told = capsys.readouterr().out
    assert "lossy" in told and "message lost" in told and "wrong bytes 0" in told
    assert main(["sim", "--profile", "nice"]) == 2
    assert "unknown profile 'nice'; known are calm" in capsys.readouterr().err
    assert main(["sim", "--seeds", "0"]) == 2


def test_the_command_finds(monkeypatch, capsys):
    """A violation is told with what happened before it, and with the command that shows it again."""
    BUGS["end_told_twice"](monkeypatch.setattr)
    assert main(["sim", "--seeds", "3", "--profile", "calm"]) == 1
    told = capsys.readouterr().out
    assert "which it does not wait for" in told and "again: kvxfer sim --profile calm --seeds 1 --from" in told

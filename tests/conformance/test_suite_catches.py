# SPDX-License-Identifier: Apache-2.0
"""The suites are tested: each broken adapter must fail the test that is meant to catch it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from kvxfer.agents.inproc import InprocAgent
from kvxfer.testing import AgentSuite

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]

# The first test of each kind runs pytest with all broken adapters of that kind.
pytestmark = pytest.mark.timeout(300)

BROKEN_AGENTS = [
    ("FlipsABit", "test_one_span[read-thread]"),
    ("FlipsABit", "test_one_span[write-thread]"),
    ("MovesOneByteLess", "test_one_span[read-thread]"),
    ("MovesOneByteLess", "test_adjacent[write-thread]"),
    ("MovesOneByteMore", "test_one_span[read-thread]"),
    ("MovesOneByteMore", "test_whole_region[read-thread]"),
    ("MovesOneByteMore", "test_whole_region[write-thread]"),
    ("MovesTheFirstSpanOnly", "test_fragmented[read-thread]"),
    ("SwapsReadAndWrite", "test_one_span[read-thread]"),
    ("RemembersWhatItRead", "test_content_of_the_moment[read-thread]"),
    ("IsDoneTooEarly", "test_done_means_in_place[read-thread]"),
    ("IsDoneTooEarly", "test_done_means_in_place[write-thread]"),
    ("IsDoneBeforeTheWriteIsApplied", "test_done_means_in_place_while_the_peer_stands_still[write]"),
    ("WritesAfterClose", "test_nothing_is_written_after_close[thread]"),
    ("WritesAfterItGaveUp", "test_stalled_peer[read-thread]"),
    ("LeavesQuarantineAlthoughQuiet", "test_stalled_peer[read-thread]"),
    ("IsNeverDone", "test_one_span[read-thread]"),
    ("CrashesOnGarbage", "test_garbage_native_description[noise]"),
    ("AcceptsGarbage", "test_garbage_native_description[half]"),
    ("AcceptsGarbage", "test_mismatched_description"),
    ("AcceptsATwin", "test_two_peers_of_one_name[thread]"),
    ("NeverForgetsAPeer", "test_disconnect[thread]"),
    ("RaisesOnDisconnect", "test_disconnect[thread]"),
    ("RefusesMemoryItHadOnce", "test_register_again"),
    ("EndsTwice", "test_every_flight_ends_exactly_once"),
    ("EndsTwice", "test_base_class_is_in_charge"),
    ("LosesAFlight", "test_every_flight_ends_exactly_once"),
    ("LeaksAThread", "test_nothing_is_left_behind"),
    ("LeaksADescriptor", "test_nothing_is_left_behind"),
    ("ListensElsewhere", "test_ports_are_where_it_says"),
    ("Spins", "test_idle_agent_is_cheap"),
    ("SleepsInPoll", "test_poll_does_not_block[thread]"),
    ("ChecksNothing", "test_stale_description"),
    ("ChecksNothing", "test_closed_peer"),
    ("JamsWhenItIsFlooded", "test_flood[thread]"),
    ("AppliesLongWritesLate", "test_writes_then_the_cell[thread]"),
    ("KnowsPeersByTheirThread", "test_successor_at_the_same_address[thread]"),
    ("WaitsForNewPeers", "test_peer_freezes_at_first_contact"),
    ("ClosesWithTheInterpretersLock", "test_close_lets_other_threads_run"),
    ("ClaimsToReachOtherProcesses", "test_one_span[read-process]"),
    ("FailsLongLists", "test_longer_list_than_the_engine_takes[read-thread]"),
]

BROKEN_BUFFERS = [
    ("SortsTheBlocks", "test_pack[1-mixed]"),
    ("SortsTheBlocks", "test_orders[24-LBHNC-LBNHC]"),
    ("LosesTheLastByte", "test_unpack[1-grid]"),
    ("FillsTheGaps", "test_unpack[1-shifted grid]"),
    ("FillsTheGaps", "test_parts_of_blocks[LBNHC-LHBNC]"),
    ("FillsTheGapsOfItsOutput", "test_pack[1-grid]"),
    ("FillsTheGapsOfItsOutput", "test_interleaved"),
    ("PacksBeyondItsOutput", "test_pack[1-one]"),
    ("MixesUpStrides", "test_orders[512-LBHNC-LBNHC]"),
    ("MixesUpStrides", "test_parts_of_blocks[BLNHC-LBHNC]"),
    ("RunsForwardsOnly", "test_loops_run_backwards"),
    ("KnowsOneBaseOnly", "test_several_bases"),
    ("SpoilsItsSource", "test_unpack[1-bytes]"),
    ("IgnoresTheFactor", "test_cast[bfloat16-float32-0.37]"),
    ("IgnoresTheFactor", "test_cast_between_orders[float32-float8_e4m3fn-LBHNC-LBNHC]"),
    ("RoundsTowardsZero", "test_cast[float32-bfloat16-1.0]"),
    ("SaturatesNothing", "test_cast[float32-float8_e4m3fn-1.0]"),
    ("IsACopy", "test_content_of_the_moment"),
    ("IsACopy", "test_span_is_the_content"),
    ("MovesAround", "test_describes_itself"),
    ("TellsAnotherAddress", "test_moves_with_an_agent"),
    ("ForgetsItsOwner", "test_keeps_its_memory_alive"),
    ("IsDoneTooEarly", "test_pack[1-long]"),
    ("ChecksNothing", "test_copies_outside[source-ends-behind-pack]"),
    ("ChecksNothing", "test_copies_outside[one-block-behind-pack]"),
    ("ChecksNothing", "test_base_class_is_in_charge"),
]

GOOD_BUFFERS = [
    ("NotBrokenOnlySlow", "test_several_copies_at_once", "passed"),
    ("NotBrokenOnlySlow", "test_pack[1-mixed]", "passed"),
    ("NotBrokenButCastsNothing", "test_cast[bfloat16-float32-1.0]", "skipped"),
    ("NotBrokenButCastsNothing", "test_undeclared_casts_are_refused", "passed"),
]

DEVIATIONS = [
    ("Deviates", "test_longer_list_than_the_engine_takes[read-thread]", "skipped"),  # as JUnit calls an xfail
    ("Deviates", "test_one_span[read-thread]", "failure"),
    ("Deviates", "test_one_span[write-process]", "skipped"),
    ("Deviates", "test_whole_region[read-thread]", "passed"),
]


def _verdicts(tmp_path_factory, module, cases):
    """Run these tests in a process of their own; (class, test) -> passed, failure, error or skipped, and why."""
    report = tmp_path_factory.mktemp("catches") / "report.xml"
    nodes = [f"{_HERE / module}::Test{name}::{test}" for name, test in cases]
    run = subprocess.run(
        # A broken adapter leaves threads and sockets behind. Their errors must not fail the next test, nor replace the
        # verdict of the suite on this one.
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:threadexception",
         "-p", "no:unraisableexception", f"--junitxml={report}", *nodes],
        cwd=_ROOT, capture_output=True, text=True, timeout=280, check=False,
        # Where CI is set, pytest prints whole differences: a suite that compared bytes by `assert` took minutes to fail.
        env={**os.environ, "CI": "true"},
    )  # fmt: skip
    assert report.exists(), run.stdout + run.stderr
    told = {}
    for case in ET.parse(report).iter("testcase"):
        # A test that fails in its teardown as well appears twice.
        key = case.get("classname").rpartition(".")[2].removeprefix("Test"), case.get("name")
        told.setdefault(key, {}).update({child.tag: child.get("message", "") for child in case})
    ranks = ("failure", "error", "skipped")
    return {key: (next((rank for rank in ranks if rank in why), "passed"), why) for key, why in told.items()}


@pytest.fixture(scope="module")
def agent_verdicts(tmp_path_factory):
    """Verdicts of the suite on the broken agents."""
    cases = BROKEN_AGENTS + [case[:2] for case in DEVIATIONS]
    return _verdicts(tmp_path_factory, "broken_agents.py", cases)


@pytest.fixture(scope="module")
def buffer_verdicts(tmp_path_factory):
    """Verdicts of the suite on the broken buffers."""
    cases = BROKEN_BUFFERS + [case[:2] for case in GOOD_BUFFERS]
    return _verdicts(tmp_path_factory, "broken_buffers.py", cases)


@pytest.mark.parametrize("case", BROKEN_AGENTS, ids=lambda case: f"{case[0]}-{case[1]}")
def test_broken_agent_fails(agent_verdicts, case):
    """An agent that is wrong in this way fails this test of AgentSuite."""
    assert agent_verdicts[case][0] == "failure", agent_verdicts[case]


@pytest.mark.parametrize("case", BROKEN_BUFFERS, ids=lambda case: f"{case[0]}-{case[1]}")
def test_broken_buffer_fails(buffer_verdicts, case):
    """A buffer that is wrong in this way fails this test of BufferSuite."""
    assert buffer_verdicts[case][0] == "failure", buffer_verdicts[case]


@pytest.mark.parametrize(("name", "test", "verdict"), GOOD_BUFFERS)
def test_a_buffer_may_be_slow_and_need_not_cast(buffer_verdicts, name, test, verdict):
    """A device whose copies end some time after they were started passes, and casts that it does not declare are skipped."""
    assert buffer_verdicts[name, test][0] == verdict, buffer_verdicts[name, test]


@pytest.mark.parametrize(("name", "test", "verdict"), DEVIATIONS)
def test_deviations_are_strict(agent_verdicts, name, test, verdict):
    """A declared deviation is an expected failure with its reason, and a failure once the test passes."""
    found, told = agent_verdicts[name, test]
    assert found == verdict, told
    if test == "test_one_span[read-thread]":
        assert "does in truth" in told["failure"]


def test_suite_cannot_be_weakened():
    """Overriding a part of the suite, in the class or through a mix-in, is refused when the class is made."""
    with pytest.raises(TypeError, match="test_one_span"):
        type("TestHollow", (AgentSuite,), {"test_one_span": lambda _: None, "__module__": __name__})
    mixin = type("Mixin", (), {"testbed": None, "__module__": __name__})
    with pytest.raises(TypeError, match="testbed"):
        type("TestHollow", (mixin, AgentSuite), {"make_agent": InprocAgent, "__module__": __name__})


@pytest.mark.parametrize(
    "deviations", [{"test_that_is_not_there": "why not"}, {"testbed": "no test"}, {"test_one_span": " "}]
)
def test_deviations_are_checked(deviations):
    """A deviation that names no test of the suite, or gives no reason, is refused when the class is made."""
    with pytest.raises(TypeError, match="deviations"):
        type("TestDeviant", (AgentSuite,), {"deviations": deviations, "__module__": __name__})


def test_suite_can_be_extended():
    """A subclass may add tests of its own and set what is meant to be set."""
    own = {"make_agent": staticmethod(InprocAgent), "patience_s": 5.0, "test_mine": lambda _: None}
    assert type("TestMine", (AgentSuite,), {**own, "__module__": __name__}).patience_s == 5.0

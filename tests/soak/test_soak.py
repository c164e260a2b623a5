# SPDX-License-Identifier: Apache-2.0
"""The long run, cut short for CI, and that it finds what it is there to find. `make soak` runs it for an hour."""

from __future__ import annotations

import faulthandler
import json

import numpy as np
import pytest

from kvxfer.cli import main
from kvxfer.testing.soak import SoakError, run
from kvxfer.testing.soak.memory import CONTENT, HEADS, LAYERS, Blocks, content
from kvxfer.testing.soak.report import Usage
from kvxfer_nixl import NixlAgent

SECONDS = 150.0
"""Of churn; five calm moments come on top."""
LOOPBACK = {"backend_options": {"UCX": {"engine_config": "NET_DEVICES=lo"}}}

_reason = NixlAgent.why_unavailable()
needs_nixl = pytest.mark.skipif(_reason is not None, reason=str(_reason))


@needs_nixl
@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 2 + 240)
def test_churn():
    """Two engines prefill for two others over NIXL while processes die, freeze and restart: right bytes, nothing left, nothing grows."""
    faulthandler.cancel_dump_traceback_later()  # pytest's, for tests that hang
    report = run(SECONDS, agent_options=LOOPBACK, seed=7, calm_every_s=SECONDS / 5)
    assert report.wrong_nbytes == report.leaked == 0
    assert report.faults.keys() == {"kill", "freeze", "restart", "abort"}  # a fault that never happens proves nothing
    assert report.decoded["done"] > SECONDS / 2 and report.prefilled["expired"] and report.prefilled["revoked"]
    assert min(report.ways["pull"], report.ways["push"]) > SECONDS / 4


@needs_nixl
def test_the_command(capsys):
    """`kvxfer soak` sums up what happened."""
    assert main(["soak", "--minutes", "0.1", "--agent-options", json.dumps(LOOPBACK), "--seed", "3"]) == 0
    told = capsys.readouterr().out
    assert "each byte checked" in told and "wrong: 0, leaked: 0" in told and "calm moments" in told


@pytest.mark.parametrize(
    ("arguments", "why"),
    [(["--minutes", "0"], "--minutes"), (["--agent-options", "["], "no JSON"), (["--agent-options", "[]"], "object")],
)
def test_what_cannot_be_run(capsys, arguments, why):
    """Wrong usage is said by name, before any process starts."""
    assert main(["soak", *arguments]) == 2
    assert why in capsys.readouterr().err


@needs_nixl
def test_options_that_the_agent_does_not_know_are_wrong_usage(capsys):
    """What a process of the soak finds wrong in its options is said as if it had been found here."""
    assert main(["soak", "--minutes", "0.01", "--agent-options", '{"frobs": 1}']) == 2
    told = capsys.readouterr()
    assert told.out == "" and "unknown option of the nixl agent: frobs" in told.err


def test_a_soak_that_moved_nothing_has_failed(capsys):
    """A fabric that carries no byte passes no test: one line, exit code 1."""
    with pytest.raises(SoakError, match=r"^not one byte was moved in 0\.1 s") as failed:
        run(0.1, agent="inproc", seed=1, calm_every_s=0.1)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("order", ["LBHN", "BLNH", "HLNB"])
def test_the_oracle_sees_one_wrong_byte(order):
    """Whatever the order in memory, one element that is not the request's counts, and none outside the tokens asked for."""
    blocks = Blocks(order, 16, 160)
    taken = blocks.take(3)
    blocks.write(taken, seed=5)
    assert blocks.wrong(taken, 5, 0, 48) == 0 == blocks.wrong(taken[1:], 5, 20, 48)
    assert blocks.wrong(taken, 6, 0, 48) > 48 * LAYERS * HEADS * CONTENT
    layer = blocks.layers["layers.3"]
    layer[taken[1], 1, 2, 7] ^= 1
    assert blocks.wrong(taken, 5, 0, 48) == 2 == blocks.wrong(taken[1:], 5, 18, 19)
    assert blocks.wrong(taken, 5, 0, 18) == 0 == blocks.wrong(taken[1:], 5, 19, 48)


def test_the_oracle_sees_a_write_to_a_free_block():
    """A block that nobody has must hold what its last owner left."""
    blocks = Blocks("LBHN", 16, 160)
    taken = blocks.take(4)
    assert blocks.touched() == []
    blocks.give(taken[:2])
    assert blocks.touched() == [] and blocks.num_free == 8
    blocks.layers["layers.0"][taken[0], 0, 0, 0] ^= 1
    assert blocks.touched() == [taken[0]]


def test_every_token_is_another():
    """No two tokens, layers, heads or requests hold the same: bytes in the wrong place are wrong bytes."""
    held = np.concatenate([content(seed, 0, 64).reshape(-1, CONTENT) for seed in (1, 2)])
    assert len(np.unique(held, axis=0)) == len(held)


@pytest.mark.parametrize(
    ("first", "last", "losses", "grown"),
    [
        (Usage(100 << 20, 40, 8), Usage(110 << 20, 60, 8), 10, ""),
        (Usage(100 << 20, 40, 8), Usage(100 << 20, 40, 9), 10, "threads"),
        (Usage(100 << 20, 40, 8), Usage(100 << 20, 61, 8), 10, "files"),
        (Usage(100 << 20, 40, 8), Usage(133 << 20, 40, 8), 10, "MiB"),
    ],
)
def test_what_flat_means(first, last, losses, grown):
    """No thread more, no file more than UCX is known to leave open, and memory within the allocator's play."""
    assert (grown in last.grown(first, losses)) if grown else not last.grown(first, losses)

# SPDX-License-Identifier: Apache-2.0
"""`kvxfer bench calibrate`: two real processes, small reads; what it writes is what endpoints load."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from kvxfer import registry
from kvxfer.cli import main
from kvxfer.cli.calibrate import fit
from kvxfer.planner.costs import Costs

needs_nixl = pytest.mark.skipif(
    registry.why_unavailable("nixl") is not None, reason=str(registry.why_unavailable("nixl"))
)


@needs_nixl
def test_what_is_measured_can_be_loaded(tmp_path, capsys, monkeypatch):
    """The file holds positive constants, the same as are printed, and KVXFER_COSTS makes endpoints use it."""
    out = tmp_path / "costs.json"
    assert main(["bench", "calibrate", "--mib", "4", "--repeats", "1", "--out", str(out), "--format", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    monkeypatch.setenv("KVXFER_COSTS", str(out))
    costs = Costs.load()
    assert asdict(costs) == printed["costs"] and all(value > 0 for value in asdict(costs).values())
    made = {sample["what"] for sample in printed["samples"]}
    assert made >= {"one block", "one run a token and head"}
    # Over a link on which a writer could not be stopped none is tried.
    assert ("one run a layer, written" in made) is (costs.write_gain != 1.0)


@pytest.mark.parametrize("arguments", [["--mib", "0"], ["--repeats", "0"], ["--agent", "nosuch"]])
def test_what_makes_no_sense_is_refused(arguments, capsys):
    """A wrong option is one sentence and exit code 2."""
    assert main(["bench", "calibrate", "--out", "-", *arguments]) != 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"descriptor_s": 0}', '{"descriptor_s": "x"}', '{"nosuch": 1}', '{"run_s": NaN}', "[" * 9999],
)
def test_a_file_that_holds_no_costs_is_refused_by_name(tmp_path, text):
    """Whatever else lies in the file is one ConfigError."""
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"cost"):
        Costs.load(path)


def test_the_fit_finds_the_constants():
    """Times made of known constants give these constants back."""
    facts = np.array([[1, 4, 1 << 18], [1, 4, 1 << 26], [1, 1024, 1 << 26], [1, 4096, 1 << 20]])
    start, each, byte = fit(facts, facts @ np.array([3e-4, 2e-6, 1.5e-10]))
    assert (start, each, byte) == (pytest.approx(3e-4), pytest.approx(2e-6), pytest.approx(1.5e-10))

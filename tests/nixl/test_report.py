# SPDX-License-Identifier: Apache-2.0
"""`python -m kvxfer_nixl`, and the crash that only shows when a process ends.

White-box: private modules of the adapter say which names there are and whether there is InfiniBand.
"""

from __future__ import annotations

import os

from kvxfer_nixl import _ibverbs, _module
from kvxfer_nixl.__main__ import main
from tests.conftest import ROOT


def test_report_says_which_module_and_what_starts(capsys):
    """The report names the module, every other candidate with its reason, and every backend with its outcome."""
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "-> " in printed
    assert "yes UCX" in printed
    assert " no GDS" in printed
    assert all(name in printed for name in _module.NAMES)


def test_every_plug_in_is_documented():
    """The table in docs/nixl.md has a row for each plug-in that this NIXL lists."""
    bindings = _module.find().bindings
    listed = bindings.nixlAgent("documented", bindings.nixlAgentConfig()).getAvailPlugins()
    table = (ROOT / "docs" / "nixl.md").read_text().partition("## Backends")[2]
    rows = {
        name for line in table.splitlines() if line.startswith("| ") for name in line.split("|")[1].strip().split(", ")
    }
    assert set(listed) <= rows


def test_exit_crash_is_foreseen_and_avoided(monkeypatch, tmp_path, run_python):
    """Beside the system's libefa UCX starts without InfiniBand, and os.environ is as before; UCX_MODULES is respected."""
    (tmp_path / "libefa.so.1").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.delenv("UCX_MODULES", raising=False)
    module = _module.find()
    monkeypatch.setattr(_ibverbs, "has_hca", lambda: True)
    assert _ibverbs.exit_crash_risk(module) is None
    monkeypatch.setattr(_ibverbs, "has_hca", lambda: False)
    risk = _ibverbs.exit_crash_risk(module)
    assert risk is not None
    assert "UCX_MODULES=^ib" in risk
    with _ibverbs.without_exit_crash(module):
        assert os.environ["UCX_MODULES"] == "^ib"
    assert "UCX_MODULES" not in os.environ
    monkeypatch.setenv("UCX_MODULES", "all")
    assert _ibverbs.exit_crash_risk(module) is None


def test_idle_pair_costs_next_to_nothing(run_python):
    """Two connected agents that do nothing cost well under 0.05 of a core (NIXL's own default: a whole core each)."""
    share = run_python("""
import resource, time
from kvxfer_nixl import NixlAgent
agents = [NixlAgent(f"idle-{i}", backend_options={"UCX": {"engine_config": "NET_DEVICES=lo"}}) for i in range(2)]
agents[0].connect(agents[1].describe())
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
before = cpu()
time.sleep(3)
print((cpu() - before) / 3)
for agent in agents:
    agent.close()
""").stdout
    assert float(share) < 0.05

# SPDX-License-Identifier: Apache-2.0
"""NIXL in `kvxfer doctor`, and the crash that only shows when a process ends.

White-box: private modules of the adapter say which names there are and whether there is InfiniBand.
"""

from __future__ import annotations

import os

from kvxfer.agents.finding import State
from kvxfer_nixl import NixlAgent, _examination, _ibverbs, _module, _trial
from tests.conftest import ROOT


def test_the_doctor_says_which_module_and_what_starts():
    """It names the module, every candidate with its reason, each backend that reaches another agent, and UCX's ports."""
    found = list(NixlAgent.examine())
    told = {each.subject: each for each in found}
    assert all(name in told["NIXL module"].text for name in _module.NAMES)
    assert told["NIXL UCX"].state is State.GOOD and "dram" in told["NIXL UCX"].text
    assert told["NIXL LIBFABRIC"].text and "NIXL POSIX" not in told and told["NIXL link"].text
    near, far = (each.text for each in found if each.subject == "NIXL ports")
    assert "control address on loopback UCX listens on 127.0.0.1:" in near and "other machines reach it" not in near
    assert "control address elsewhere" in far


def test_a_backend_that_does_not_start_or_crashes():
    """Without UCX nothing moves, which is a problem; another backend is a note, as is one whose process ends by a signal."""
    (found,) = _examination.started("UCX", _trial.BackendTrial(error="no device"))
    assert found.state is State.PROBLEM and found.text == "no device"
    (found,) = _examination.started("LIBFABRIC", _trial.BackendTrial(error="no library"))
    assert found.state is State.NOTE
    (found,) = _examination.started("UCX", _trial.BackendTrial(kinds=("dram",), status=-11))
    assert found.state is State.NOTE and "signal 11" in found.text


def test_a_host_on_which_ucx_is_told_to_take_tcp(monkeypatch):
    """UCX_TLS=tcp ties two fates on one host, and the advice is to unset it."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    (found,) = _examination.link_on_host(_examination.Surroundings.here({"UCX": {}}))
    assert found.state is State.NOTE and found.fix == "unset UCX_TLS"


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

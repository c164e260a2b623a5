# SPDX-License-Identifier: Apache-2.0
"""Adapters by name: third-party packages are found as this project's are, and a broken one breaks no other."""

from __future__ import annotations

import sys
import types
from contextlib import closing
from importlib.metadata import EntryPoint

import pytest

from kvxfer import registry
from kvxfer.agents.inproc import InprocAgent
from kvxfer.errors import ConfigError, UnavailableError


class Fine(InprocAgent):
    pass


class Missing(InprocAgent):
    @classmethod
    def why_unavailable(cls):
        return "pip install something"


class Shaky(InprocAgent):
    @classmethod
    def why_unavailable(cls):
        raise OSError("cannot even ask")


@pytest.fixture
def installed(monkeypatch):
    """Say which entry points there are."""
    module = types.ModuleType("third_party_package")
    module.Fine, module.Missing, module.Shaky, module.number = Fine, Missing, Shaky, 5
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def install(**points):
        made = [EntryPoint(n, v, "kvxfer.agents") for n, values in points.items() for v in values.split()]
        monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in made if p.group == group])

    return install


def test_what_ships_is_found():
    """The in-process agent is known, with or without installed metadata."""
    assert "inproc" in registry.names() and registry.load("inproc") is InprocAgent
    assert registry.why_unavailable("inproc") is None


def test_third_party_packages_are_found(installed):
    """Another package's adapter loads as ours do."""
    installed(fine="third_party_package:Fine")
    assert registry.names("agents") == ["fine", "inproc"]
    assert registry.load("fine") is Fine


@pytest.mark.parametrize(
    ("point", "why"),
    [
        ("no_such_package:Agent", "no_such_package"), ("third_party_package:Nothing", "Nothing"),
        ("third_party_package:number", "not a class"), ("third_party_package:Missing", "pip install something"),
        ("third_party_package:Shaky", "cannot even ask"),
    ],
)  # fmt: skip
def test_a_broken_one_breaks_only_itself(installed, point, why):
    """Any fault of a plug-in is returned by why_unavailable, and the other plug-ins load."""
    installed(broken=point, fine="third_party_package:Fine")
    assert why in registry.why_unavailable("broken")
    with pytest.raises(UnavailableError):
        registry.load("broken")
    assert registry.load("fine") is Fine and registry.why_unavailable("fine") is None
    assert registry.names() == ["broken", "fine", "inproc"]


def test_a_name_claimed_twice(installed):
    """Two packages that claim one name are an error that names both; also if one of them is ours."""
    installed(same="third_party_package:Fine third_party_package:Missing", inproc="third_party_package:Fine")
    for name in ("same", "inproc"):
        with pytest.raises(ConfigError, match="claim"):
            registry.load(name)


def test_installed_twice_is_not_claimed_twice(installed):
    """The same entry seen twice, as with an editable install beside a wheel, is one."""
    installed(same="third_party_package:Fine third_party_package:Fine", inproc="kvxfer.agents.inproc:InprocAgent")
    assert registry.load("same") is Fine and registry.load("inproc") is InprocAgent


def test_no_such_adapter(installed):
    """An unknown name is refused with the names there are."""
    installed()
    with pytest.raises(ConfigError, match="inproc"):
        registry.load("nothing")
    assert "nothing" in registry.why_unavailable("nothing")


def _open_or_not(name, *, loopback_only=None):
    agent = InprocAgent(name)
    agent.told = loopback_only
    return agent


def _named_only(name):
    return _open_or_not(name)


@pytest.mark.parametrize("loopback", [True, False])
def test_agents_are_told_whether_to_stay_on_loopback(loopback):
    """A callable with the argument loopback_only gets it; one without is called without it."""
    make = registry.agent_maker(_open_or_not, {}, "told/0/e", loopback=loopback)
    with closing(make()) as first, closing(make()) as second:
        assert (first.told, second.told) == (loopback, loopback)
        assert (first.name, second.name) == ("told/0/e/1", "told/0/e/2")
    with closing(registry.agent_maker(_named_only, {}, "untold/0/e", loopback=loopback)()) as agent:
        assert agent.told is None


def test_an_agent_bears_the_name_that_it_was_given():
    """A callable that makes an agent of another name is refused by name at the start: peers would refuse it later."""
    make = registry.agent_maker(lambda _: InprocAgent("my own choice"), {}, "mine/0/e", loopback=True)
    with pytest.raises(ConfigError, match="my own choice"):
        make()
    InprocAgent("my own choice").close()  # the refused one was closed

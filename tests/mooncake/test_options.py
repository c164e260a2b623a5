# SPDX-License-Identifier: Apache-2.0
"""A mistake in the options, or a setting of Mooncake's own that does harm, is one clear error at the start."""

from __future__ import annotations

import ctypes
import importlib.util

import pytest

from kvxfer.errors import ConfigError
from kvxfer_mooncake import MooncakeAgent


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"hosts": "10.0.0.1"}, "hosts"),
        ({"host": ""}, "host"),
        ({"host": "tcp://10.0.0.1"}, "host"),
        ({"window": 0}, "window"),
        ({"window": 1024}, "window"),
        ({"window": "32"}, "window"),
        ({"piece_nbytes": 1}, "piece_nbytes"),
        ({"max_submit_nbytes": -1}, "max_submit_nbytes"),
        ({"loopback_only": "no"}, "loopback_only"),
        ({"port_range": "20000"}, "port_range"),
        ({"port_range": "20000-20003"}, "port_range"),
        ({"port_range": "20099-20000"}, "port_range"),
        ({"port_range": "40000-40099"}, "port_range"),
        ({"port_range": "65530-65540"}, "port_range"),
    ],
)
def test_bad_option_is_named(options, named):
    """Unknown names, wrong types, values out of range and ports that Mooncake would ignore are refused by name."""
    with pytest.raises(ConfigError, match=named):
        MooncakeAgent("options", **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MC_TCP_PROTO", "1"),
        ("MC_TCP_ENABLE_CONNECTION_POOL", "0"),
        ("MC_SLICE_TIMEOUT", "5"),
        ("MC_USE_TENT", "1"),
        ("MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER", "64"),
    ],
)
def test_bad_setting_of_mooncake_is_named(monkeypatch, name, value):
    """A variable of Mooncake's with which the agent would not be what it declares is refused by name."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name):
        MooncakeAgent("options")


def test_two_port_ranges_are_refused(monkeypatch):
    """A range that contradicts the environment is refused."""
    monkeypatch.setenv("MC_MIN_RPC_PORT", "20000")
    monkeypatch.setenv("MC_MAX_RPC_PORT", "20099")
    with pytest.raises(ConfigError, match="MC_MIN_RPC_PORT=20000"):
        MooncakeAgent("options", port_range="21000-21099")


def test_port_range_of_a_second_agent_is_refused():
    """Mooncake reads its range once in a process, so another one for a later agent is refused instead of ignored."""
    MooncakeAgent("first").close()
    with pytest.raises(ConfigError, match="too late"):
        MooncakeAgent("second", port_range="20000-20099")


def test_environment_is_restored(run_python):
    """What is set for Mooncake's import is not left in the environment of the process, nor taken from it."""
    program = """
import os
before = dict(os.environ)
from kvxfer_mooncake import MooncakeAgent
agent = MooncakeAgent("environment", port_range="20000-20099")
print("ports", all(20000 <= port.number <= 20099 for port in agent.ports), "same", dict(os.environ) == before)
agent.close()
"""
    done = run_python(program, check=False)
    assert "ports True same True" in done.stdout, done.stdout + done.stderr


def test_missing_library_is_named_with_its_package(monkeypatch):
    """Without a library of the system the reason names Debian's package, and warns of its recommends."""
    real = ctypes.CDLL

    def without(name, *arguments):
        if name == "libibverbs.so.1":
            raise OSError("cannot open shared object file")
        return real(name, *arguments)

    monkeypatch.setattr(ctypes, "CDLL", without)
    reason = MooncakeAgent.why_unavailable()
    assert "apt-get install --no-install-recommends libibverbs1" in reason


def test_missing_wheel_is_named(monkeypatch):
    """Without Mooncake the reason names the extra to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "kvxfer[mooncake]" in MooncakeAgent.why_unavailable()


def test_capabilities_follow_the_options():
    """Another limit for parts is declared by the agent, not by its class."""
    agent = MooncakeAgent("options", max_submit_nbytes=1 << 20)
    try:
        assert agent.capabilities.max_submit_nbytes == 1 << 20
        assert MooncakeAgent.capabilities.max_submit_nbytes == 64 << 20
    finally:
        agent.close()


def test_question_imports_nothing(run_python):
    """Asking whether the adapter can run does not import Mooncake, which would fix its settings."""
    program = "from kvxfer_mooncake import MooncakeAgent; MooncakeAgent.why_unavailable(); import sys; print('mooncake' in sys.modules)"
    assert run_python(program).stdout.strip() == "False"

# SPDX-License-Identifier: Apache-2.0
"""Options of ``python -m tools.serve``: what moves the KV. No server is started."""

from __future__ import annotations

import pytest

from tools.serve import __main__ as serve
from tools.serve.pair import ServerPair
from tools.serve.process import ServerStartError


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Pairs that the command made, each of which fails to start (white-box: what the command asks the machine)."""
    pairs = []

    class Pair(ServerPair):
        def start(self, *args, **options):
            pairs.append(self)
            raise ServerStartError("it is not started here")

    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    monkeypatch.setattr(serve, "_NEEDED", {})
    monkeypatch.setattr(serve, "_stop_on_signals", lambda _: None)
    monkeypatch.setattr(serve, "make_model", lambda _: tmp_path)
    monkeypatch.setattr(serve, "ServerPair", Pair)
    return pairs


@pytest.mark.parametrize("agent", [None, "nixl", "mooncake"])
def test_agent_reaches_both_servers(monkeypatch, made, tmp_path, agent):
    """Both servers get the agent that was named, or none, so that they take their default."""
    monkeypatch.setattr(serve, "why_unavailable", lambda _: None)
    assert serve.main(["--logs", str(tmp_path), *(["--agent", agent] if agent else [])]) == 1
    (pair,) = made
    for server in (pair.prefill, pair.decode):
        extra = server.settings.kv_transfer_config().get("kv_connector_extra_config", {})
        assert extra.get("agent") == agent


def test_agent_that_is_not_installed(monkeypatch, made, capsys):
    """An agent that cannot be had here is refused with the reason before anything is started."""
    monkeypatch.setattr(serve, "why_unavailable", lambda name: f"{name}: install this")
    assert serve.main(["--agent", "mooncake"]) == 2
    assert "mooncake: install this" in capsys.readouterr().out
    assert made == []


def test_agent_of_another_connector(capsys):
    """`--agent` with a connector that has no choice is refused."""
    with pytest.raises(SystemExit):
        serve.main(["--agent", "mooncake", "--connector", "NixlConnector"])
    assert "--agent is for KvxferConnector" in capsys.readouterr().err


MODULES = {"vllm": "vllm.entrypoints.openai.api_server", "transformers": "kvxfer_transformers.serve"}


@pytest.mark.parametrize("engine", ["vllm", "transformers", "vllm,transformers", "transformers,vllm"])
def test_engines_of_the_servers(made, tmp_path, engine):
    """`--engine` is the engine of both servers, or of prefill and of decode."""
    assert serve.main(["--logs", str(tmp_path), "--engine", engine]) == 1
    (pair,) = made
    engines = engine.split(",")
    assert [each.command[2] for each in (pair.prefill, pair.decode)] == [MODULES[engines[0]], MODULES[engines[-1]]]
    assert [each.settings.role for each in (pair.prefill, pair.decode)] == ["kv_producer", "kv_consumer"]


@pytest.mark.parametrize("engine", ["", "vlm", "vllm,", "vllm,transformers,vllm"])
def test_what_names_no_engines(capsys, engine):
    """Anything but one engine or two is refused, and what there is is named."""
    with pytest.raises(SystemExit):
        serve.main(["--engine", engine])
    assert f"{engine!r} names neither one engine nor two: there are transformers and vllm" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["transformers", "vllm,transformers", "transformers,vllm"])
def test_an_engine_without_the_connector(capsys, engine):
    """A connector of vLLM's own with another engine, on either side, is refused."""
    with pytest.raises(SystemExit):
        serve.main(["--engine", engine, "--connector", "NixlConnector"])
    assert "NixlConnector is for vLLM only" in capsys.readouterr().err

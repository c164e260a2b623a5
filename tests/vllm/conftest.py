# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the connector's tests, which use vLLM's own classes and no server."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings

import pytest

from kvxfer import registry

# As in tests/xla: JAX reads these when it is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

if importlib.util.find_spec("vllm") is not None:
    # Importing vLLM and torch warns of their own deprecations, which would fail the tests.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("vllm.v1.core.sched.scheduler")


@pytest.fixture(params=["inproc", "nixl"])
def agent(request):
    """Each transfer engine that is available."""
    reason = registry.why_unavailable(request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def engines(monkeypatch):
    """Makes engines, each with an endpoint on a free port, and closes them."""
    from tests.vllm.rig import Engine

    monkeypatch.setenv("KVXFER_SIDE_CHANNEL_HOST", "127.0.0.1")
    monkeypatch.setenv("KVXFER_SIDE_CHANNEL_PORT", "0")
    made = []

    def start(role, name, *, make=Engine, **options):
        engine = make(role, name=name, **options)
        made.append(engine)
        engine.start()
        return engine

    yield start
    for engine in made:
        engine.close()

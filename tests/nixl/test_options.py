# SPDX-License-Identifier: Apache-2.0
"""A mistake in the options is one clear error at the start."""

from __future__ import annotations

import threading

import pytest

from kvxfer.errors import ConfigError, KvxferError, UnavailableError, UnsupportedError
from kvxfer.memory.spans import MemoryKind
from kvxfer.testing import eventually
from kvxfer_nixl import NixlAgent
from tests.nixl.agents import native_threads, nixl_agent


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"backend": ["UCX"]}, "backend"),
        ({"backends": "UCX"}, "backends"),
        ({"backends": []}, "backends"),
        ({"backends": ["UCX", "UCX"]}, "backends"),
        ({"backends": [7]}, "backends"),
        ({"backend_options": ["num_workers"]}, "backend_options"),
        ({"backend_options": {"LIBFABRIC": {}}}, "LIBFABRIC"),
        ({"backend_options": {"UCX": {"num_workers": 2}}}, "UCX"),
        ({"backend_options": {"UCX": {"num_wokers": "2"}}}, "num_wokers"),
        ({"backend_options": {"UCX": {"ucx_error_handling_mode": "maybe"}}}, "ucx_error_handling_mode"),
        ({"module": "mooncake"}, "mooncake"),
        ({"progress_delay_us": 0}, "progress_delay_us"),
        ({"progress_delay_us": "1000"}, "progress_delay_us"),
        ({"max_submit_nbytes": -1}, "max_submit_nbytes"),
        ({"drain_s": float("nan")}, "drain_s"),
        ({"backends": ["POSIX"]}, "POSIX"),
    ],
)
def test_bad_option_is_named(options, named):
    """Unknown names, wrong types and values out of range are refused by a ConfigError that names the option."""
    with pytest.raises(ConfigError, match=named):
        NixlAgent("options", **options)


def test_unknown_backend_is_refused():
    """A backend that this NIXL does not have is refused with the list of those it has."""
    with pytest.raises(UnavailableError, match="UCX"):
        NixlAgent("options", backends=["TELEPATHY"])


def test_listed_backend_that_does_not_start_is_refused():
    """A listed backend that cannot start is refused with the reason, and leaves no thread behind (white-box: NIXL's own list)."""
    agent = nixl_agent("options-list")
    listed = agent._agent.getAvailPlugins()
    agent.close()
    before = native_threads()
    for backend in ("GPUNETIO", "GDS"):
        if backend in listed:
            with pytest.raises(KvxferError, match=f"{backend} does not start here"):
                NixlAgent("options", backends=["UCX", backend])
    eventually(lambda: native_threads() == before, what="the refused agent's threads end")


def test_capabilities_follow_the_options():
    """Without error handling a death goes unnoticed, and the agent declares it."""
    agent = NixlAgent(
        "options", backend_options={"UCX": {"ucx_error_handling_mode": "none"}}, max_submit_nbytes=1 << 20
    )
    try:
        assert not agent.capabilities.detects_death
        assert agent.capabilities.max_submit_nbytes == 1 << 20
        assert MemoryKind.DRAM in agent.capabilities.kinds
        assert NixlAgent.capabilities.detects_death
    finally:
        agent.close()


def test_another_thread_is_refused():
    """NIXL agents race between threads; ours belongs to the one that made it."""
    agent = nixl_agent("options-thread")
    raised: list[BaseException] = []

    def use() -> None:
        try:
            agent.poll()
        except UnsupportedError as error:
            raised.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    agent.close()
    assert len(raised) == 1

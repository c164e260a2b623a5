# SPDX-License-Identifier: Apache-2.0
"""A configuration written for NixlConnector means the same here, or ends the start with what to write instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from vllm import envs
from vllm.distributed.kv_transfer.kv_connector.v1 import nixl

from kvxfer.errors import ConfigError
from kvxfer_serving.options import NIXL_OPTIONS, VARIABLES, ConnectorOptions

SOURCES = sorted(Path(nixl.__file__).parent.glob("*.py"))
READ_BY_VLLM = {
    name
    for path in SOURCES
    for name in re.findall(r"get_from_extra_config\(\s*\"(\w+)\"", path.read_text())
}  # fmt: skip


def test_list_is_that_of_vllm():
    """Every option and every variable that vLLM's NixlConnector reads is in the list."""
    assert {"kv_lease_duration", "backends", "num_threads"} <= READ_BY_VLLM
    assert READ_BY_VLLM <= NIXL_OPTIONS
    assert {name for name in envs.environment_variables if name.startswith("VLLM_NIXL_")} <= set(VARIABLES)


@pytest.mark.parametrize("value", [30, True, False, "x", ["UCX"], None])
@pytest.mark.parametrize("name", sorted(READ_BY_VLLM | NIXL_OPTIONS))
def test_taken_or_refused_by_name(name, value):
    """Whatever the value of such an option, it is taken or ends the start with a sentence that names it, and none is unknown."""
    try:
        options = ConnectorOptions.parse({name: value})
    except ConfigError as error:
        assert re.search(
            rf"{name}'? (is NixlConnector's option(, and can only be (true|false) here)?: \w|must be a)", str(error)
        )
    else:
        assert options == ConnectorOptions() or value in (30, ["UCX"])


def test_times_and_threads_keep_their_meaning():
    """Options that are taken reach the endpoint and the transfer engine under kvxfer's names."""
    theirs = {"kv_lease_duration": 60, "engine_ttl": 3600.0, "num_threads": 4, "enforce_handshake_compat": True}
    options = ConnectorOptions.parse(theirs | {"bidirectional_kv_xfer": False, "backends": ["UCX"]})
    settings = options.for_endpoint({})
    assert (settings.lease_s, settings.idle_peer_s) == (60, 3600)
    assert options.for_agent() == {"backend_options": {"UCX": {"num_threads": "4"}}, "backends": ["UCX"]}


def test_threads_join_the_other_options_of_ucx():
    """``num_threads`` stands beside options of UCX that are given by themselves."""
    given = {"port_range": "40000-40099", "backend_options": {"UCX": {"device_list": "eth0"}}}
    options = ConnectorOptions.parse({"num_threads": 2, "agent_options": given})
    ucx = {"device_list": "eth0", "num_threads": "2"}
    assert options.for_agent() == {"port_range": "40000-40099", "backend_options": {"UCX": ucx}}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"kv_lease_duration": 30, "lease_seconds": 40},
            "'kv_lease_duration' is NixlConnector's name of 'lease_seconds'",
        ),
        ({"kv_lease_duration": 0}, "kv_lease_duration must be a number of seconds above 0"),
        ({"engine_ttl": 0}, "engine_ttl must be a number of seconds above 0"),
        ({"enforce_handshake_compat": False}, "can only be true here: leave it out: versions of vLLM may differ"),
        ({"bidirectional_kv_xfer": True}, "can only be false here: give both servers kv_role kv_both"),
        ({"decoder_kv_blocks_ttl": 480}, "use lease_seconds on the decode server"),
        ({"push_registration_timeout": 480}, "use rendezvous_timeout_seconds on the prefill server"),
        ({"num_threads": 4, "agent": "mooncake"}, "num_threads is for NIXL's backend UCX"),
        ({"num_threads": 4, "backends": ["LIBFABRIC"]}, "num_threads is for NIXL's backend UCX"),
        ({"num_threads": 4, "backends": 7}, "backends must be a list of strings"),
        ({"num_threads": 4, "agent_options": {"backend_options": {"UCX": {"num_threads": "2"}}}}, "give one of them"),
    ],
)
def test_refusals_say_what_to_write(extra, message):
    """A value that has no meaning here, and two that contradict each other, are refused with what to write."""
    with pytest.raises(ConfigError, match="kv_connector_extra_config: .*" + message):
        ConnectorOptions.parse(extra)


def test_abort_timeout_of_an_older_vllm():
    """``VLLM_NIXL_ABORT_REQUEST_TIMEOUT`` is the default of the lease; kvxfer's own names come before it."""
    theirs = {"VLLM_NIXL_ABORT_REQUEST_TIMEOUT": "480"}
    assert ConnectorOptions().for_endpoint(theirs).lease_s == 480
    assert ConnectorOptions().for_endpoint(theirs | {"KVXFER_LEASE_S": "7"}).lease_s == 7
    assert ConnectorOptions.parse({"kv_lease_duration": 60}).for_endpoint(theirs).lease_s == 60
    with pytest.raises(ConfigError, match="VLLM_NIXL_ABORT_REQUEST_TIMEOUT must be a whole number of seconds above 0"):
        ConnectorOptions().for_endpoint({"VLLM_NIXL_ABORT_REQUEST_TIMEOUT": "-1"})

# SPDX-License-Identifier: Apache-2.0
"""kv_transfer_params: every input of a client is followed or refused by name; none raises."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.v1.request import RequestStatus

from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer_serving.refusals import RefusalReason, RefusedParams
from kvxfer_serving.transfer_params import ConsumerRequest, ProducerRequest, RendezvousRequest, Role, parse, response
from tests.vllm.rig import P_PARAMS, Engine, drain, expected, prompt_of, scripted
from tests.vllm.scripted import ScriptedEndpoint

pytestmark = pytest.mark.vllm

PRODUCER = Role(engine_id="P", is_producer=True, is_consumer=False)
CONSUMER = Role(engine_id="D", is_producer=False, is_consumer=True)
BOTH = Role(engine_id="B", is_producer=True, is_consumer=True)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def good(**changes):
    """Parameters of a producer's answer with changes; ... removes a key."""
    lease = LeaseRef.mint(producer="P", addresses=["tcp://127.0.0.1:5600"], request="p", num_tokens=40, digest="d")
    params = response(lease, [[4, 9]], host="127.0.0.1", port=5600, tp_size=1) | changes
    return {key: value for key, value in params.items() if value is not ...}


def lease(**changes):
    """A lease as JSON with changes."""
    return good()["kvxfer"] | changes


def both(**changes):
    """Parameters that a proxy sends to a decode server at the time of the prefill request, with changes; ... removes a key."""
    params = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": "P",
        "remote_host": "127.0.0.1",
        "remote_port": 5600,
        "tp_size": 1,
        "pp_size": 1,
        "transfer_id": "t-1",
    } | changes
    return {key: value for key, value in params.items() if value is not ...}


MALFORMED = {
    "string": ("do_remote_prefill", RefusalReason.NOT_AN_OBJECT),
    "list": ([1], RefusalReason.NOT_AN_OBJECT),
    "number": (7, RefusalReason.NOT_AN_OBJECT),
    "flag of text": ({"do_remote_prefill": "yes"}, RefusalReason.BAD_FLAG),
    "flag of a number": ({"do_remote_decode": 1}, RefusalReason.BAD_FLAG),
    "flag of a list": ({"do_remote_decode": [True]}, RefusalReason.BAD_FLAG),
    "both flags": (good(do_remote_decode=True), RefusalReason.BOTH_FLAGS),
    "the flag alone": ({"do_remote_prefill": True}, RefusalReason.NO_LEASE),
    "plain NixlConnector": (good(kvxfer=...), RefusalReason.NO_LEASE),
    "lease is null": (good(kvxfer=None), RefusalReason.NO_LEASE),
    "lease is text": (good(kvxfer="{}"), RefusalReason.BAD_LEASE),
    "lease is empty": (good(kvxfer={}), RefusalReason.BAD_LEASE),
    "lease without a version": (good(kvxfer={k: v for k, v in lease().items() if k != "v"}), RefusalReason.BAD_LEASE),
    "lease of another version": (good(kvxfer=lease(v=2)), RefusalReason.BAD_LEASE),
    "short token": (good(kvxfer=lease(token="ab")), RefusalReason.BAD_LEASE),
    "token of a number": (good(kvxfer=lease(token=5)), RefusalReason.BAD_LEASE),
    "no address": (good(kvxfer=lease(addresses=[])), RefusalReason.BAD_LEASE),
    "address of a file": (good(kvxfer=lease(addresses=["ipc:///tmp/x"])), RefusalReason.BAD_LEASE),
    "address of a number": (good(kvxfer=lease(addresses=[1])), RefusalReason.BAD_LEASE),
    "address with half a character": (good(kvxfer=lease(addresses=["tcp://a\ud800:1"])), RefusalReason.BAD_LEASE),
    "negative tokens": (good(kvxfer=lease(num_tokens=-1)), RefusalReason.BAD_LEASE),
    "absurd tokens": (good(kvxfer=lease(num_tokens=10**30)), RefusalReason.BAD_LEASE),
    "engine id missing": (good(remote_engine_id=...), RefusalReason.MISSING_KEY),
    "request id null": (good(remote_request_id=None), RefusalReason.MISSING_KEY),
    "host missing": (good(remote_host=...), RefusalReason.MISSING_KEY),
    "port missing": (good(remote_port=...), RefusalReason.MISSING_KEY),
    "tp size missing": (good(tp_size=...), RefusalReason.MISSING_KEY),
    "port of text": (good(remote_port="5600"), RefusalReason.BAD_TYPE),
    "port of a boolean": (good(remote_port=True), RefusalReason.BAD_TYPE),
    "port out of range": (good(remote_port=70000), RefusalReason.BAD_TYPE),
    "host of a list": (good(remote_host=["a"]), RefusalReason.BAD_TYPE),
    "tp size of text": (good(tp_size="1"), RefusalReason.BAD_TYPE),
    "no tp size": (good(tp_size=0), RefusalReason.CONTRADICTION),
    "absurd tp size": (good(tp_size=10**9), RefusalReason.CONTRADICTION),
    "other tp size": (
        good(tp_size=3, kvxfer=lease(addresses=["tcp://a:1", "tcp://b:2"])),
        RefusalReason.CONTRADICTION,
    ),
    "more addresses than ranks": (
        good(kvxfer=lease(addresses=["tcp://a:1", "tcp://b:2"])),
        RefusalReason.CONTRADICTION,
    ),
    "pipeline of text": (good(pp_size="2"), RefusalReason.BAD_TYPE),
    "no pipeline": (good(pp_size=0), RefusalReason.BAD_TYPE),
    "pipeline of a boolean": (good(pp_size=True), RefusalReason.BAD_TYPE),
    "absurd pipeline": (good(pp_size=1024, tp_size=1024), RefusalReason.CONTRADICTION),
    "more addresses than one stage": (
        good(pp_size=3, kvxfer=lease(addresses=["tcp://a:1", "tcp://b:2"])),
        RefusalReason.CONTRADICTION,
    ),
    "context parallel": (good(dcp_size="x"), RefusalReason.BAD_TYPE),
    "push": (good(transfer_mode="push"), RefusalReason.OTHER_MODE),
    "mode of a list": (good(transfer_mode=[]), RefusalReason.OTHER_MODE),
    "another engine's id": (good(remote_engine_id="Q"), RefusalReason.CONTRADICTION),
    "another request's id": (good(remote_request_id="q"), RefusalReason.CONTRADICTION),
    "other number of tokens": (good(remote_num_tokens=41), RefusalReason.CONTRADICTION),
    "number of tokens of text": (good(remote_num_tokens="40"), RefusalReason.CONTRADICTION),
    "no blocks": (good(remote_block_ids=...), RefusalReason.BAD_BLOCKS),
    "blocks of text": (good(remote_block_ids="12"), RefusalReason.BAD_BLOCKS),
    "blocks not grouped": (good(remote_block_ids=[1, 2]), RefusalReason.BAD_BLOCKS),
    "empty blocks": (good(remote_block_ids=[[]]), RefusalReason.BAD_BLOCKS),
    "two groups": (good(remote_block_ids=[[1], [2]]), RefusalReason.BAD_BLOCKS),
    "no block in any group": (good(remote_block_ids=[[], []]), RefusalReason.BAD_BLOCKS),
    "absurdly many groups": (good(remote_block_ids=[[1]] * 1000), RefusalReason.BAD_BLOCKS),
    "negative block": (good(remote_block_ids=[[-1, 2]]), RefusalReason.BAD_BLOCKS),
    "absurd block": (good(remote_block_ids=[[2**40]]), RefusalReason.BAD_BLOCKS),
    "block of text": (good(remote_block_ids=[["a"]]), RefusalReason.BAD_BLOCKS),
    "block of a boolean": (good(remote_block_ids=[[True]]), RefusalReason.BAD_BLOCKS),
    "huge list": (good(remote_block_ids=[list(range(1_000_000))]), RefusalReason.BAD_BLOCKS),
    "do_remote_decode at a consumer": (P_PARAMS, RefusalReason.NOT_A_PRODUCER),
    "to both, engine id of a number": (both(remote_engine_id=7), RefusalReason.BAD_TYPE),
    "to both, engine id without end": (both(remote_engine_id="P" * 10_000), RefusalReason.BAD_TYPE),
    "to both, host missing": (both(remote_host=...), RefusalReason.MISSING_KEY),
    "to both, host of a list": (both(remote_host=["a"]), RefusalReason.BAD_TYPE),
    "to both, host with a path": (both(remote_host="a/b"), RefusalReason.BAD_TYPE),
    "to both, host with two lines": (both(remote_host="a\nb"), RefusalReason.BAD_TYPE),
    "to both, port null": (both(remote_port=None), RefusalReason.MISSING_KEY),
    "to both, port of a boolean": (both(remote_port=True), RefusalReason.BAD_TYPE),
    "to both, port out of range": (both(remote_port=0), RefusalReason.BAD_TYPE),
    "to both, pipeline of a list": (both(pp_size=[2]), RefusalReason.BAD_TYPE),
    "to both, transfer id of a number": (both(transfer_id=5), RefusalReason.BAD_TYPE),
    "to both, empty transfer id": (both(transfer_id=""), RefusalReason.BAD_TYPE),
    "to both, transfer id without end": (both(transfer_id="x" * 100_000), RefusalReason.BAD_TYPE),
    "to both, half a character as transfer id": (both(transfer_id="t\ud800"), RefusalReason.BAD_TYPE),
    "to both, half a character as engine id": (both(remote_engine_id="P\ud800"), RefusalReason.BAD_TYPE),
    "to both, half a character as host": (both(remote_host="a\ud800"), RefusalReason.BAD_TYPE),
    "to both, with blocks": (both(remote_block_ids=[[1]]), RefusalReason.NO_LEASE),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name):
    """Each malformed input has its own reason."""
    params, reason = MALFORMED[name]
    refused = parse(params, CONSUMER)
    assert isinstance(refused, RefusedParams)
    assert refused.reason is reason, refused.detail


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer", "kv_both"])
def test_malformed_through_the_scheduler(name, role):
    """vLLM's real scheduler computes each malformed request locally and counts it, and the engine serves the next one."""
    engine = Engine(role, name="D", endpoint=ScriptedEndpoint())
    engine.add("bad", prompt_of(40), MALFORMED[name][0], max_tokens=3)
    for step in range(60):  # a server of role kv_both publishes, too
        engine.step()
        if step == 10:
            for token in list(scripted(engine).published):
                scripted(engine).end(token, read=False)
        if not engine.scheduler.has_requests():
            break
    assert engine.answers["bad"].tokens == expected(prompt_of(40), 3)
    accepted = role != "kv_consumer" and MALFORMED[name][0] is P_PARAMS
    assert sum(engine.stats.get("refused_params", {}).values()) == (0 if accepted else 1)
    assert "hook_errors" not in engine.stats
    engine.add("next", prompt_of(50), max_tokens=3)
    drain(engine)
    assert engine.answers["next"].tokens == expected(prompt_of(50), 3)


@given(params=json_values, role=st.sampled_from([PRODUCER, CONSUMER, BOTH]))
def test_any_json(params, role):
    """No JSON value raises, and none is taken for a lease unless a producer made it."""
    assert not isinstance(parse(params, role), ConsumerRequest)


@given(key=st.sampled_from(sorted(good())), value=json_values)
def test_any_json_under_any_key(key, value):
    """No value of any key raises."""
    parse(good(**{key: value}), CONSUMER)


@given(key=st.sampled_from(sorted(both())), value=json_values)
def test_any_json_sent_to_both(key, value):
    """No value of any key raises, on either side."""
    for role in (CONSUMER, PRODUCER, BOTH):
        parse(both(**{key: value}), role)
        parse(P_PARAMS | {key: value}, role)


@given(key=st.sampled_from(sorted(lease())), value=json_values)
def test_any_json_inside_the_lease(key, value):
    """No value of any field of the lease raises."""
    parse(good(kvxfer=lease(**{key: value})), CONSUMER)


def test_nothing_asked():
    """No parameters, empty ones, unknown keys and flags that are false or null ask for nothing."""
    for params in (None, {}, {"x": 1}, {"do_remote_prefill": False, "do_remote_decode": None}):
        assert parse(params, CONSUMER) is None


def test_good_ones():
    """A router's parameters for a producer, and the producer's answer, are understood."""
    assert parse(P_PARAMS, PRODUCER) == ProducerRequest()
    assert parse(P_PARAMS | {"transfer_id": "t-1"}, PRODUCER) == ProducerRequest("t-1")
    assert parse(both(), CONSUMER) == RendezvousRequest("P", "tcp://127.0.0.1:5600", "t-1")
    assert parse(both(transfer_id=None, remote_request_id="p", remote_block_ids=None), CONSUMER).key == ""
    assert parse(both(remote_host="::1"), CONSUMER).address == "tcp://[::1]:5600"
    params = good(remote_blocks_expiry_time=12.5, remote_prefill_cached_tokens=3, unknown={"a": 1})
    assert parse(params, CONSUMER) == ConsumerRequest(LeaseRef.from_obj(params["kvxfer"]))


def at_once_by_vllm_router(**changes):
    """Parameters that vllm-router sends to a decode server in its MoRI-IO mode, with changes."""
    keys = dict.fromkeys(("remote_engine_id", "remote_block_ids"))
    return {"do_remote_prefill": True, "do_remote_decode": False, **keys, "transfer_id": "tx-1"} | changes


def routed_id(place):
    """A request's id made by vLLM from vllm-router's, which names the addresses of both servers."""
    return f"cmpl-___prefill_addr_{place}___decode_addr_-_{'0' * 32}-0-1a2b3c4d"


@pytest.mark.parametrize(
    ("place", "producer", "address"),
    [
        ("P@127.0.0.1:5600", "P", "tcp://127.0.0.1:5600"),
        ("P@::1:5600", "P", "tcp://[::1]:5600"),
        ("a@b@host.example:1", "a@b", "tcp://host.example:1"),
    ],
)
def test_a_prefill_server_named_by_vllm_router(place, producer, address):
    """The request's id names the prefill server if the parameters do not; otherwise it is ignored."""
    assert parse(at_once_by_vllm_router(), CONSUMER, routed_id(place)) == RendezvousRequest(producer, address, "tx-1")
    assert parse(both(), CONSUMER, routed_id("Q@127.0.0.9:1")) == RendezvousRequest("P", "tcp://127.0.0.1:5600", "t-1")
    params = good(transfer_id="tx-1")
    assert parse(params, CONSUMER, routed_id("Q@127.0.0.9:1")) == ConsumerRequest(LeaseRef.from_obj(params["kvxfer"]))


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("127.0.0.1:8100", RefusalReason.NO_LEASE),  # the router's --kv-connector nixl
        ("host:127.0.0.1,handshake:6301,notify:61005", RefusalReason.NO_LEASE),  # MoRIIOConnector
        ("", RefusalReason.NO_LEASE),
        ("@127.0.0.1:5600", RefusalReason.NO_LEASE),
        ("P@:5600", RefusalReason.NO_LEASE),
        ("P@127.0.0.1:", RefusalReason.NO_LEASE),
        ("P@127.0.0.1:" + "9" * 10_000, RefusalReason.NO_LEASE),
        ("P@127.0.0.1:99999", RefusalReason.BAD_TYPE),
        ("P@a/b:1", RefusalReason.BAD_TYPE),
        ("P" * 100_000 + "@127.0.0.1:5600", RefusalReason.BAD_TYPE),
        ("@:" * 100_000, RefusalReason.NO_LEASE),
    ],
)
def test_a_request_id_that_names_no_prefill_server(place, reason):
    """An invalid engine id or side channel in the request's id is refused by name."""
    assert parse(at_once_by_vllm_router(), CONSUMER, routed_id(place)).reason is reason


OWN = Role(engine_id="P", is_producer=True, is_consumer=True, addresses=("tcp://127.0.0.1:5600",))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_server_that_is_named_to_itself(host):
    """A request whose prefill server is this server is refused by name."""
    assert parse(good(), OWN).reason is RefusalReason.OWN_ENGINE
    assert parse(both(remote_host=host), OWN).reason is RefusalReason.OWN_ENGINE
    unknown = Role(engine_id="P", is_producer=True, is_consumer=True)
    assert parse(both(remote_host=host), unknown).reason is RefusalReason.OWN_ENGINE


@pytest.mark.parametrize(
    "other",
    [
        Role(engine_id="P", is_producer=False, is_consumer=True),
        Role(engine_id="P", is_producer=True, is_consumer=True, addresses=("tcp://10.0.0.9:5600",)),
        Role(engine_id="P", is_producer=True, is_consumer=True, addresses=("tcp://127.0.0.1:5601",)),
    ],
)
def test_one_engine_id_on_two_servers(other):
    """Requests between two servers with the same engine_id are served."""
    params = good(remote_host="10.0.0.1", kvxfer=lease(addresses=["tcp://10.0.0.1:5600"]))
    assert isinstance(parse(params, other), ConsumerRequest)
    assert isinstance(parse(both(remote_host="10.0.0.1"), other), RendezvousRequest)


@given(request_id=st.text() | st.text().map(routed_id))
def test_any_request_id(request_id):
    """No request's id raises."""
    parse(at_once_by_vllm_router(), CONSUMER, request_id)


def test_every_key_of_nixl_connector():
    """The response has exactly the keys of vLLM's own NixlConnector, with values of the same types, and the lease."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler

    stub = SimpleNamespace(
        is_bidirectional_kv_xfer_enabled=False,
        _kv_lease_duration=30,
        _reqs_need_send={},
        engine_id="P",
        side_channel_host="127.0.0.1",
        side_channel_port=5600,
        transfer_tp_size=1,
        vllm_config=SimpleNamespace(
            parallel_config=SimpleNamespace(decode_context_parallel_size=1, pipeline_parallel_size=1)
        ),
        _TRANSFER_MODE=NixlPullConnectorScheduler._TRANSFER_MODE,
        _stop_heartbeat=lambda _: None,
        _registration_generation=0,
        get_exchange_clipped_blocks=lambda blocks: blocks,
    )
    request = SimpleNamespace(
        request_id="p", status=RequestStatus.FINISHED_LENGTH_CAPPED, kv_transfer_params=P_PARAMS, num_computed_tokens=40
    )
    keeps, theirs = NixlPullConnectorScheduler.request_finished(stub, request, ([4, 9],))
    ours = good()
    assert keeps
    theirs.setdefault("remote_registration_generation", 0)  # since vLLM 0.33
    assert set(ours) == {*theirs, "kvxfer", "kvxfer_versions"} and ours["kvxfer_versions"].startswith("kvxfer-")
    theirs["remote_block_ids"] = list(theirs["remote_block_ids"])
    assert {key: value for key, value in ours.items() if not key.startswith("kvxfer")} == theirs

# SPDX-License-Identifier: Apache-2.0
"""What goes wrong between two engines of transformers: a named error or right tokens, and nothing left in use on either side."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest

from kvxfer import addresses
from kvxfer.errors import ConfigError
from kvxfer.testing import eventually
from kvxfer_transformers import seams
from kvxfer_transformers.batching import TransferOptions
from kvxfer_transformers.paged_cache import fitting_page
from tests.transformers.rig import NEW_TOKENS, SOON, Engine, prompt

TOKENS = prompt(50)


@pytest.fixture(scope="module")
def prefill():
    engine = Engine(settings=SOON)
    yield engine
    engine.check_idle()
    engine.close()


@pytest.fixture(scope="module", params=["fail", "recompute"])
def decode(request):
    engine = Engine(settings=SOON, kv_load_failure_policy=request.param)
    yield engine
    engine.check_idle()
    engine.close()


@pytest.fixture(scope="module")
def right(prefill):
    return prefill.generate(TOKENS)


@pytest.fixture(scope="module")
def params(prefill):
    """Parameters that no engine follows."""
    return prefill.prefill(TOKENS)


def rendezvous(prefill, key):
    """Parameters of a request that both engines are sent."""
    host, port = addresses.parse(prefill.manager.endpoint.address)
    there = {"remote_engine_id": prefill.manager.name, "remote_host": host, "remote_port": port}
    return {"do_remote_prefill": True, "transfer_id": key, **there}


def check_failed_or_computed(decode, output, right, error):
    """The request has ended as the engine's policy says."""
    if decode.manager.transfer.kv_load_failure_policy == "fail":
        assert output.status.name == "FAILED"
        assert output.error.startswith(error), output.error
    else:
        assert (output.error, output.generated_tokens) == (None, right)


def test_a_lease_that_has_ended(prefill, decode, right):
    """A lease that expired before its request came fails it by name, or its prompt is computed."""
    params = prefill.prefill(TOKENS)
    eventually(lambda: prefill.manager.endpoint.in_use()["leases"])
    eventually(lambda: not prefill.manager.endpoint.in_use()["leases"])
    output = decode.result(decode.add(TOKENS, params))
    check_failed_or_computed(decode, output, right, "Lease")


def test_a_producer_that_is_not_there(decode, right):
    """A lease of an engine that has stopped fails its request by name, or its prompt is computed."""
    gone = Engine(settings=SOON)
    params = gone.prefill(TOKENS)
    gone.close()
    output = decode.result(decode.add(TOKENS, params))
    check_failed_or_computed(decode, output, right, "Peer")


def test_a_prefill_that_is_aborted_while_it_is_read(prefill, decode):
    """A consumer that has read the first blocks of a prefill that is then aborted ends as its policy says."""
    key = decode.manager.name
    tokens = prompt(1900, len(decode.manager.transfer.kv_load_failure_policy))  # not in any prefix cache
    asked = decode.add(tokens, rendezvous(prefill, key))
    prefilled = prefill.add(tokens, {"do_remote_decode": True, "transfer_id": key})
    eventually(lambda: decode.manager.endpoint.in_use()["read_nbytes"])
    prefill.manager.cancel_request(prefilled)
    check_failed_or_computed(decode, decode.result(asked), prefill.generate(tokens), "Lease")


def test_a_prefill_that_is_preempted_while_it_is_read():
    """A prefill whose blocks transformers takes away ends its early read by name, and is finished later under a new lease."""
    prefill, decode = Engine(num_blocks=12), Engine(settings=SOON)
    other = prefill.add(prompt(70, 4), max_new_tokens=40)
    tokens = prompt(120, 5)
    early = decode.add(tokens, rendezvous(prefill, "taken"))
    params = prefill.prefill(tokens, transfer_id="taken")
    assert decode.result(early).error.startswith("Lease")
    assert decode.generate(tokens, params) == decode.generate(tokens)
    assert len(prefill.result(other).generated_tokens) == 40
    for engine in (prefill, decode):
        engine.check_idle()
        engine.close()


def test_clients_that_go(prefill, decode):
    """Requests that are aborted before, while and after they are read leave nothing; nor does a prefill that is aborted."""
    waits = decode.add(TOKENS, rendezvous(prefill, f"{decode.manager.name} gone"))
    eventually(lambda: decode.manager.endpoint.in_use()["target_blocks"])
    at_once = decode.add(TOKENS, prefill.prefill(TOKENS))
    later = decode.add(TOKENS, prefill.prefill(TOKENS), max_new_tokens=1000)
    for request in (waits, at_once, later):
        decode.manager.cancel_request(request)
    prefilled = prefill.add(prompt(1500), {"do_remote_decode": True})
    prefill.manager.cancel_request(prefilled)
    prefill.add(prompt(20), {"do_remote_decode": True})  # no client fetches its KV


MALFORMED = {
    "not_an_object": str,
    "bad_lease": lambda p: p["kvxfer"].update(token="x") or p,
    "no_lease": lambda p: p.pop("kvxfer") and p,
    "contradiction": lambda p: p.update(remote_request_id="other") or p,
    "bad_blocks": lambda p: p.update(remote_block_ids=[[-1]]) or p,
    "missing_key": lambda p: p.pop("remote_host") and p,
    "other_mode": lambda p: p.update(kvxfer=None, transfer_id="t", remote_bootstrap_addr="http://127.0.0.1:1") or p,
}


@pytest.mark.parametrize("reason", MALFORMED)
def test_malformed_references(params, decode, right, reason):
    """Parameters that make no sense are counted by their reason, and the prompt is computed."""
    assert decode.generate(TOKENS, MALFORMED[reason](copy.deepcopy(params))) == right
    assert decode.manager.refused_params[reason] == 1


def test_a_lease_of_another_prompt_or_of_another_request(prefill, decode, right):
    """A lease is followed for its prompt only, and once."""
    params = prefill.prefill(prompt(50, 3))
    assert decode.generate(TOKENS, params) == right
    assert decode.manager.refused_params["other_prompt"] == 1
    params = prefill.prefill(TOKENS)
    assert [decode.generate(TOKENS, params) for _ in range(2)] == [right, right]
    assert decode.manager.refused_params["lease_used"] == 1


def test_a_cache_full_of_leases():
    """Where leases have all blocks, requests wait for their end; what is larger than the cache fails by name; the loop goes on."""
    engine, decode = Engine(num_blocks=8, settings=SOON), Engine(num_blocks=8)
    params = [engine.prefill(prompt(40, seed)) for seed in range(2)]
    waits = engine.add(prompt(40, 5))
    assert engine.result(waits).error is None
    output = engine.result(engine.add(prompt(200), {"do_remote_decode": True}))
    assert "larger than the whole cache" in output.error
    assert engine.manager.is_running()
    # All at once into a cache that has room for two of them.
    params = [engine.prefill(prompt(40, 9)), engine.prefill(prompt(40, 10))]
    asked = [decode.add(prompt(40, seed), its) for seed, its in zip((9, 10), params, strict=True)]
    assert [decode.result(each).error for each in asked] == [None, None]
    # Half of the cache has prefixes that no request uses.
    large = prompt(100, 11)
    assert decode.generate(large, engine.prefill(large)) == engine.generate(large)
    for each in (engine, decode):
        each.check_idle()
        each.close()


def test_a_stop_that_flushes_waits_for_leases(prefill):
    """An engine that is told to stop lets others read what it has leased; then its endpoint is closed."""
    engine = Engine()
    params = engine.prefill(TOKENS)
    endpoint = engine.manager.endpoint
    engine.manager.stop(block=False, keep_for_next_session=True)
    eventually(lambda: endpoint.in_use()["leases"] == 1)
    assert len(prefill.generate(TOKENS, params)) == NEW_TOKENS
    eventually(lambda: not engine.manager.is_running())
    assert engine.manager.endpoint is None


@pytest.mark.parametrize("version", ["5.18.0", "5.20.1", "4.57.0", "unknown"])
def test_other_versions_are_refused(version):
    """A version of transformers that was not tried is refused by its name, before any model is loaded."""
    with pytest.raises(ConfigError, match=f"transformers {version}"):
        seams.check(version)


@pytest.mark.parametrize(("window", "page"), [(64, 64), (128, 128), (2047, 89), (4096, 256), (2053, 256), (None, 256)])
def test_the_page_that_fits_into_a_window(window, page):
    """By default a window is a whole number of pages, unless its length is a prime number."""
    types = ["sliding_attention" if window else "full_attention", "full_attention"]
    config = SimpleNamespace(layer_types=types, sliding_window=window)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    assert fitting_page(model, 256) == page


def test_what_is_not_supported_is_refused_at_start_up(monkeypatch):
    """Each configuration that is not served is refused with what to do instead; a missing name of transformers by that name."""
    with pytest.raises(ConfigError, match="set page_size to a divisor"):
        Engine("windows", page_size=48)
    with pytest.raises(ConfigError, match="kv_load_failure_policy must be fail or recompute"):
        TransferOptions(kv_load_failure_policy="retry")
    monkeypatch.setitem(seams.CLASSES, "Scheduler", ("schedule_everything",))
    with pytest.raises(ConfigError, match=r"relies on Scheduler\.schedule_everything"):
        Engine()

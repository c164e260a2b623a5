# SPDX-License-Identifier: Apache-2.0
"""A typed program that uses the whole public API. It is never run: mypy --strict checks it.

Authors of engines see these types; a change here that is not an addition breaks their builds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import kvxfer
from kvxfer import registry


def describe_a_cache() -> kvxfer.KVCache:
    """Make a cache from an engine's arrays; peers see only its spec."""
    layers: dict[str, np.ndarray[Any, Any]] = {f"layers.{i}": np.zeros((64, 8, 16, 256), np.float16) for i in range(4)}
    cache = kvxfer.KVCache.from_layers(layers, heads_total=32, head_start=8, fingerprint="model", rank=1, world=4)
    spec: kvxfer.CacheSpec = cache.spec
    groups: tuple[kvxfer.CacheGroup, ...] = spec.groups
    regions: tuple[kvxfer.CacheRegion, ...] = groups[0].regions
    order: kvxfer.KVLayout | None = regions[0].layout
    buffers: list[kvxfer.DeviceBuffer] = [kvxfer.HostBuffer(*layers.values())]
    memory: kvxfer.Memory | None = buffers[0].memory
    host: bool = memory is not None and memory.kind is kvxfer.MemoryKind.DRAM
    print(order, kvxfer.KVLayout.parse("HND"), host)
    return cache


def ask_a_plan(sources: list[kvxfer.KVCache], target: kvxfer.KVCache) -> kvxfer.Descriptors:
    """Plan which bytes go where, without a peer and without a device."""
    made: kvxfer.TransferPlan = kvxfer.plan([source.spec for source in sources], target.spec, convert=False)
    shards: tuple[kvxfer.CacheSpec, ...] = made.sources
    spans: kvxfer.Descriptors = made.rank_plans[0].bind([1, 2, 3], np.array([7, 8, 9]))
    table = kvxfer.BlockTable([4, 5], first_token=32)
    rest: kvxfer.Descriptors = kvxfer.plan(shards[0], target.spec).rank_plans[0].bind([1, 2, 3, 4], table, (40, None))
    total: int = spans.total_nbytes + rest.total_nbytes
    print(total, len(spans))
    return spans


def prefill(endpoint: kvxfer.Endpoint) -> str:
    """Producer: announce leases, publish their blocks, revoke one."""
    ref: kvxfer.LeaseRef = endpoint.announce(request="req-7", num_tokens=700, digest="")
    endpoint.publish(ref, [4, 5, 6])
    window = kvxfer.BlockTable(np.arange(2), first_token=512)
    endpoint.publish(endpoint.announce(), [[1, 2, 3], window])
    other: kvxfer.LeaseRef = endpoint.lease(np.arange(8), request="req-8")
    endpoint.revoke(other)
    travelling: str = ref.to_json()
    return travelling


async def decode(endpoint: kvxfer.Endpoint, text: str) -> int:
    """Consumer: acquire a lease, read it, release it; wait, poll or await."""
    ref = kvxfer.LeaseRef.from_json(text)
    endpoint.acquire(ref)
    transfer: kvxfer.Transfer = endpoint.read(ref, into=[0, 1], tokens=(16, None), timeout_s=5.0)
    if transfer.wait(timeout_s=0.0) and transfer.done:
        error: kvxfer.KvxferError | None = transfer.error
        print(error)
    await transfer
    endpoint.release(ref)
    return transfer.nbytes


def engine_loop(endpoint: kvxfer.Endpoint) -> Iterator[str]:
    """Each transfer and each lease ends in exactly one event; the union is closed, so that a type checker sees missing cases."""
    event: kvxfer.Event
    for event in endpoint.poll(timeout_s=0.1):
        if isinstance(event, kvxfer.Done):
            yield event.transfer.ref.request
        elif isinstance(event, kvxfer.Failed):
            retryable: bool = event.error.retryable
            yield f"{event.transfer.ref.request} {retryable}"
        elif isinstance(event, (kvxfer.LeaseReleased, kvxfer.LeaseExpired, kvxfer.LeaseRevoked)):
            yield f"{event.token} {event.request}"


@contextmanager
def an_endpoint(cache: kvxfer.KVCache) -> Iterator[kvxfer.Endpoint]:
    """Agents by name, or made by a callable; settings explicit or from the environment."""
    settings: kvxfer.Settings = kvxfer.Settings.resolve(lease_s=10.0)
    with kvxfer.Endpoint(cache=cache, agent="nixl", bind="tcp://127.0.0.1:0", name="a", settings=settings) as endpoint:
        address: str = endpoint.address
        sent: float = endpoint.metrics.value("kvxfer_bytes_total")
        seconds: float = endpoint.metrics.histograms()["kvxfer_transfer_seconds"].total
        print(address, endpoint.name, endpoint.epoch, sent, seconds)
        yield endpoint


def an_endpoint_that_converts(cache: kvxfer.KVCache) -> kvxfer.Endpoint:
    """Routes are chosen by measured costs, or given; elements may be converted."""
    costs: kvxfer.Costs = kvxfer.Costs.load()
    costs.save("costs.json")
    routes: list[kvxfer.Route] = list(kvxfer.Route)
    print(routes, costs.wire_s(1, 4096))
    return kvxfer.Endpoint(
        cache, "inproc", convert=True, costs=kvxfer.Costs(descriptor_s=1e-6), route=kvxfer.Route.BOTH
    )


def list_agents() -> dict[str, str | None]:
    """Installed adapters, with the reason if one cannot be used here."""
    return {name: registry.why_unavailable(name, "agents") for name in registry.names("agents")}


def an_agent_of_ones_own(name: str) -> kvxfer.TransferAgent:
    """Third-party adapters are classes like those of this project."""
    loaded: type = registry.load("inproc", "agents")
    agent = loaded(name)
    if not isinstance(agent, kvxfer.TransferAgent):
        raise TypeError(name)
    capabilities: kvxfer.Capabilities = agent.capabilities
    print(capabilities)
    return agent

# SPDX-License-Identifier: Apache-2.0
"""``kv_transfer_params`` of a request. No engine, no I/O, no state.

Parameters come from clients, so malformed input becomes a `RefusedParams` with a named reason, never an exception. The keys
are those of NixlConnector (pull and push), so that its routers and proxies work unchanged, and two of kvxfer: ``kvxfer``
holds the lease as a JSON object, ``kvxfer_versions`` is for routers. vllm-router sends a request to both servers at once in its MoRI-IO mode only; there it
names the prefill server in the request's id (`kvxfer_serving.router_marks`). MooncakeConnector's routers name an HTTP address that knows the
prefill server; its answer turns their keys into NixlConnector's (`kvxfer_serving.mooncake_params`).

These parameters do not decide which bytes move: the producer's grant does. Parameters that contradict themselves are refused
nevertheless, because they come from a broken or malicious client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from kvxfer import addresses
from kvxfer.errors import LeaseRefError
from kvxfer.layout.checks import MAX_RANKS
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.protocol.versions import SPOKEN
from kvxfer_serving.key_checks import check_blocks, check_keys, check_sizes, check_transfer_id
from kvxfer_serving.mooncake_params import BootstrapRequest, bootstrap_request
from kvxfer_serving.options import tcp_address
from kvxfer_serving.refusals import RefusalReason, RefusedParams
from kvxfer_serving.router_marks import producer_named_in

LEASE_KEY = "kvxfer"
VERSIONS_KEY = "kvxfer_versions"
"""Versions of the protocol that the prefill server speaks, in one word for routers: see `ProtocolVersions.label`."""

# NixlConnector's keys that name a prefill server, and those that a consumer must find beside the lease, with their types.
_PLACE: dict[str, type] = {"remote_engine_id": str, "remote_host": str, "remote_port": int}
_REQUIRED: dict[str, type] = {**_PLACE, "remote_request_id": str, "tp_size": int}


@dataclass(frozen=True)
class ProducerRequest:
    """A request to be prefilled here for another server (``do_remote_decode``).

    ``key`` is the ``transfer_id`` that the other server was sent, too; empty if there is none.
    """

    key: str = ""


@dataclass(frozen=True)
class ConsumerRequest:
    """A request whose KV another server has under ``lease`` (``do_remote_prefill``)."""

    lease: LeaseRef


@dataclass(frozen=True)
class RendezvousRequest:
    """A request that both servers were sent at once: another server prefills it now, or will (push).

    Attributes:
        producer: engine id of the prefill server.
        address: side channel of the prefill server.
        key: as in `ProducerRequest`.
    """

    producer: str
    address: str
    key: str = ""


@dataclass(frozen=True)
class TurnRequest:
    """A request of a conversation: its prompt begins with KV that another server has, and another server goes on with it.

    Attributes:
        producer: what is to be done for the other server.
        consumer: of the KV that comes here, or the reason for which it is computed.
    """

    producer: ProducerRequest
    consumer: ConsumerRequest | RefusedParams


@dataclass(frozen=True)
class Role:
    """Facts about this server that parameters are judged by.

    Attributes:
        engine_id: of this server.
        is_producer, is_consumer: from its ``kv_role``.
        push: whether requests may be sent to both servers at once.
        max_groups: most cache groups that a prefill server of this model may have: one where all layers are alike.
        addresses: side channels of this server that are known so far.
    """

    engine_id: str
    is_producer: bool
    is_consumer: bool
    push: bool = True
    max_groups: int = 1
    addresses: tuple[str, ...] = ()

    def has_made(self, lease: LeaseRef) -> bool:
        """Whether a lease is of this server, and not of another one with the same engine_id."""
        if lease.producer != self.engine_id or not self.is_producer:
            return False
        return not self.addresses or any(_same_place(a, own) for a in lease.addresses for own in self.addresses)


Asked: TypeAlias = (
    ProducerRequest | ConsumerRequest | RendezvousRequest | BootstrapRequest | TurnRequest | RefusedParams
)


def parse(params: object, role: Role, request_id: str = "") -> Asked | None:
    """Read a request's parameters; None if they ask for nothing. No input raises.

    ``request_id`` may name the prefill server if the parameters have a ``transfer_id`` and no ``remote_engine_id``.
    """
    if params is None:
        return None
    if not isinstance(params, Mapping):
        return RefusedParams(RefusalReason.NOT_AN_OBJECT, f"kv_transfer_params is a {type(params).__name__}")
    flags = {name: params.get(name) for name in ("do_remote_prefill", "do_remote_decode")}
    for name, value in flags.items():
        if value is not None and not isinstance(value, bool):
            return RefusedParams(RefusalReason.BAD_FLAG, f"{name} is a {type(value).__name__}")
    prefill, decode = flags.values()
    if decode and role.is_producer and role.is_consumer and params.get(LEASE_KEY) is not None:
        made = _with_key(params, ProducerRequest)
        return TurnRequest(made, _consumer_request(params, role)) if isinstance(made, ProducerRequest) else made
    if prefill and decode:
        return RefusedParams(RefusalReason.BOTH_FLAGS, "do_remote_prefill and do_remote_decode are both set")
    if decode:
        if not role.is_producer:
            return RefusedParams(RefusalReason.NOT_A_PRODUCER, "do_remote_decode was sent to a consumer")
        return _with_key(params, ProducerRequest)
    if prefill:
        if not role.is_consumer:
            return RefusedParams(RefusalReason.NOT_A_CONSUMER, "do_remote_prefill was sent to a producer")
        no_lease = params.get(LEASE_KEY) is None
        if no_lease and params.get("remote_bootstrap_addr") is not None:
            return bootstrap_request(params, push=role.push)
        if no_lease and params.get("transfer_id") is not None and params.get("remote_engine_id") is None:
            params = {**params, **producer_named_in(request_id)}
        named = no_lease and params.get("remote_engine_id") is not None
        # A prefill server that has blocks to name would have sent a lease.
        if named and params.get("remote_block_ids") is None:
            return _rendezvous_request(params, role)
        return _consumer_request(params, role)
    return None


def _with_key(
    params: Mapping[str, Any], make: Callable[[str], ProducerRequest | RendezvousRequest]
) -> ProducerRequest | RendezvousRequest | RefusedParams:
    """Make a request with the ``transfer_id`` of the parameters as its key."""
    return check_transfer_id(params) or make(params.get("transfer_id") or "")


def _rendezvous_request(params: Mapping[str, Any], role: Role) -> ProducerRequest | RendezvousRequest | RefusedParams:
    """Read parameters that name a prefill server but no lease, as NixlPushConnector's proxies send them to both servers."""
    if not role.push:
        return RefusedParams(
            RefusalReason.OTHER_MODE, "the request was sent to both servers at once; mode is 'pull' here"
        )
    wrong = check_keys(params, _PLACE) or check_sizes(params)
    if wrong is not None:
        return wrong
    producer, address = params["remote_engine_id"], tcp_address(params["remote_host"], params["remote_port"])
    try:
        lease = LeaseRef.for_rendezvous("", producer=producer, addresses=[address])
    except LeaseRefError as error:
        return RefusedParams(RefusalReason.BAD_TYPE, f"no prefill server can be there: {error}")
    if role.has_made(lease):
        return RefusedParams(RefusalReason.OWN_ENGINE, "the prefill server is this engine")
    return _with_key(params, lambda key: RendezvousRequest(producer, address, key))


def _consumer_request(params: Mapping[str, Any], role: Role) -> ConsumerRequest | RefusedParams:
    """Read parameters that hold a lease."""
    if LEASE_KEY not in params or params[LEASE_KEY] is None:
        return RefusedParams(
            RefusalReason.NO_LEASE, f"there is no key {LEASE_KEY!r}: did the prefill server run kvxfer?"
        )
    try:
        lease = LeaseRef.from_obj(params[LEASE_KEY])
    except LeaseRefError as error:
        return RefusedParams(RefusalReason.BAD_LEASE, str(error))
    if "v" not in params[LEASE_KEY]:
        return RefusedParams(RefusalReason.BAD_LEASE, "the lease has no version")
    if not all(address.startswith("tcp://") for address in lease.addresses):
        return RefusedParams(RefusalReason.BAD_LEASE, "an address of the lease is not tcp://")
    wrong = check_keys(params, _REQUIRED)
    if wrong is not None:
        return wrong
    wrong = check_sizes(params)
    if wrong is not None:
        return wrong
    size = params["tp_size"] * params.get("pp_size", 1)
    if not 0 < size <= MAX_RANKS or len(lease.addresses) not in (1, size):  # the first rank knows the others
        ranks = f"tp_size and pp_size make {size} ranks, the lease names {len(lease.addresses)}"
        return RefusedParams(RefusalReason.CONTRADICTION, ranks)
    if params.get("transfer_mode", "pull") != "pull":
        return RefusedParams(RefusalReason.OTHER_MODE, "transfer_mode is not 'pull'")
    if role.has_made(lease):
        return RefusedParams(RefusalReason.OWN_ENGINE, "the lease was made by this engine")
    if params["remote_engine_id"] != lease.producer or params["remote_request_id"] != lease.request:
        return RefusedParams(RefusalReason.CONTRADICTION, "remote_engine_id or remote_request_id is not the lease's")
    if params.get("remote_num_tokens", lease.num_tokens) != lease.num_tokens:
        return RefusedParams(RefusalReason.CONTRADICTION, "remote_num_tokens is not the lease's")
    return check_blocks(params.get("remote_block_ids"), lease, role.max_groups) or ConsumerRequest(lease)


def _same_place(address: str, own: str) -> bool:
    """Whether an address leads to this server, as far as that can be known without looking names up."""
    host, port = addresses.parse(address)
    own_host, own_port = addresses.parse(own)
    numbers, own_numbers = addresses.known_ips(host) or [], addresses.known_ips(own_host) or []
    here = host == own_host or any(number in own_numbers or addresses.is_loopback(number) for number in numbers)
    return port == own_port and here


def response(
    lease: LeaseRef, block_ids: Sequence[Sequence[int]], *, host: str, port: int, tp_size: int, pp_size: int = 1
) -> dict[str, Any]:
    """Make the parameters that the producer answers with: all keys of NixlConnector's pull response, and kvxfer's own.

    Args:
        lease: of the request.
        block_ids: by cache group.
        host, port: side channel of rank 0.
        tp_size, pp_size: tensor and pipeline parallel size of this server.
    """
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [list(ids) for ids in block_ids],
        "remote_engine_id": lease.producer,
        "remote_request_id": lease.request,
        "remote_host": host,
        "remote_port": port,
        "tp_size": tp_size,
        "dcp_size": 1,
        "pp_size": pp_size,
        "remote_num_tokens": lease.num_tokens,
        "remote_blocks_expiry_time": None,
        "transfer_mode": "pull",
        "remote_registration_generation": 0,  # since vLLM 0.33
        # A consumer that receives this need not wait for an announcement.
        LEASE_KEY: msgspec.structs.replace(lease, rendezvous=False).to_obj(),
        VERSIONS_KEY: SPOKEN.label,
    }

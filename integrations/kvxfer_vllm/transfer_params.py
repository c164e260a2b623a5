# SPDX-License-Identifier: Apache-2.0
"""``kv_transfer_params`` of a request, and the digest that ties a lease to its prompt. Pure: no vLLM, no I/O, no state.

Parameters come from clients, so every malformed input becomes a :class:`RefusedParams` with a named reason, never an exception.
The keys are NixlConnector's (of pull and push), so that its routers and proxies need no change, plus one key of ours, ``kvxfer``,
which holds the lease as a JSON object. vllm-router sends to both servers at once in its MoRI-IO mode only, and names the prefill
server in the request's id there, by what `kvxfer_vllm.router_registration` has registered it as. Nothing that is read from any of these
decides which bytes move: the producer's grant says so. They are checked because parameters that contradict themselves deserve no
trust.
"""

from __future__ import annotations

import array
import enum
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from kvxfer import addresses
from kvxfer.errors import LeaseRefError
from kvxfer.layout.spec import MAX_RANKS
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer_vllm.options import tcp_address

LEASE_KEY = "kvxfer"
_MAX_BLOCK_ID = 2**31 - 1
_MAX_KEY = 256
_PREFILL, _DECODE = "___prefill_addr_", "___decode_addr_"  # vllm-router's marks in a request's id
_RANDOM_SUFFIX = re.compile(r"-[0-9a-f]{8}\Z", re.IGNORECASE)

# NixlConnector's keys that a consumer must find beside the lease, with the types they may have.
_REQUIRED: dict[str, type] = {
    "remote_engine_id": str,
    "remote_request_id": str,
    "remote_host": str,
    "remote_port": int,
    "tp_size": int,
}


class RefusalReason(str, enum.Enum):
    """One word per reason. The request is computed locally, as if it had come without parameters."""

    NOT_AN_OBJECT = "not_an_object"
    """``kv_transfer_params`` is not a JSON object."""
    BAD_FLAG = "bad_flag"
    """``do_remote_prefill`` or ``do_remote_decode`` is neither a boolean nor null."""
    BOTH_FLAGS = "both_flags"
    """Both flags are set: a request cannot be prefilled elsewhere and for elsewhere at once in pull mode."""
    NOT_A_PRODUCER = "not_a_producer"
    """``do_remote_decode`` on a server whose ``kv_role`` is ``kv_consumer``."""
    NOT_A_CONSUMER = "not_a_consumer"
    """``do_remote_prefill`` on a server whose ``kv_role`` is ``kv_producer``."""
    NO_LEASE = "no_lease"
    """The key ``kvxfer`` is missing: the producer was not kvxfer, or the client made the parameters up."""
    BAD_LEASE = "bad_lease"
    """The key ``kvxfer`` does not hold a lease."""
    MISSING_KEY = "missing_key"
    """One of NixlConnector's keys is missing."""
    BAD_TYPE = "bad_type"
    """One of NixlConnector's keys has a wrong type or an impossible value."""
    BAD_BLOCKS = "bad_blocks"
    """``remote_block_ids`` is no list of block ids, or has more of them than the prompt has tokens."""
    CONTRADICTION = "contradiction"
    """The lease and NixlConnector's keys speak of different engines, requests, ranks or token counts."""
    OTHER_MODE = "other_mode"
    """The request was sent to both servers at once, or its producer pushes, and this server has ``"mode": "pull"``."""
    OWN_ENGINE = "own_engine"
    """The lease is this server's own, or the prefill server that is named is this one."""
    OTHER_PROMPT = "other_prompt"
    """The lease is for another prompt than the one that came with it."""
    LEASE_USED = "lease_used"
    """Another request on this server has, or had, the same lease (``n`` > 1, several prompts in one call, a replay)."""
    NO_TOKEN_IDS = "no_token_ids"  # noqa: S105 - no password
    """The prompt has no token ids (embeddings) or can still grow (streaming input)."""
    BAD_TOKEN_IDS = "bad_token_ids"  # noqa: S105 - no password
    """A token id of the prompt needs more than 32 bits, or is no whole number."""


@dataclass(frozen=True)
class RefusedParams:
    """Compute locally, and count ``reason``; ``detail`` is one sentence for the log and holds no prompt."""

    reason: RefusalReason
    detail: str


@dataclass(frozen=True)
class ProducerRequest:
    """The request is to be prefilled here for another server (``do_remote_decode``).

    ``key`` is what the other server was told of it too (``transfer_id``); empty if nothing was said.
    """

    key: str = ""


@dataclass(frozen=True)
class ConsumerRequest:
    """The prompt's KV lies elsewhere under ``lease`` (``do_remote_prefill``)."""

    lease: LeaseRef


@dataclass(frozen=True)
class RendezvousRequest:
    """The prompt is prefilled elsewhere at this moment, or will be: both servers were sent it at once (push).

    Attributes:
        owner, address: name and side channel of the prefill server.
        key: see `ProducerRequest`.
    """

    owner: str
    address: str
    key: str = ""


@dataclass(frozen=True)
class Role:
    """What parameters are judged against.

    Attributes:
        engine_id: of this server.
        is_producer, is_consumer: from vLLM's ``kv_role``.
        push: requests may be sent to both servers at once.
        max_groups: cache groups that a prefill server of this model may have: one where all layers are alike.
        addresses: side channels of this server, as far as they are known.
    """

    engine_id: str
    is_producer: bool
    is_consumer: bool
    push: bool = True
    max_groups: int = 1
    addresses: tuple[str, ...] = ()

    def made(self, lease: LeaseRef) -> bool:
        """A lease is of this server itself, and not only of one that was given the same engine_id."""
        if lease.producer != self.engine_id or not self.is_producer:
            return False
        return not self.addresses or any(_same_place(a, own) for a in lease.addresses for own in self.addresses)


def parse(
    params: object, role: Role, request_id: str = ""
) -> ProducerRequest | ConsumerRequest | RendezvousRequest | RefusedParams | None:
    """What a request asks for; None means nothing at all. Never raises on any input.

    ``request_id`` may name the prefill server, where the parameters have a ``transfer_id`` and name none.
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
    if prefill and decode:
        return RefusedParams(RefusalReason.BOTH_FLAGS, "do_remote_prefill and do_remote_decode are both set")
    if decode:
        if not role.is_producer:
            return RefusedParams(RefusalReason.NOT_A_PRODUCER, "do_remote_decode was sent to a consumer")
        return _key(params, ProducerRequest)
    if prefill:
        if not role.is_consumer:
            return RefusedParams(RefusalReason.NOT_A_CONSUMER, "do_remote_prefill was sent to a producer")
        no_lease = params.get(LEASE_KEY) is None
        if no_lease and params.get("transfer_id") is not None and params.get("remote_engine_id") is None:
            params = {**params, **_named_in(request_id)}
        told_at_once = no_lease and params.get("remote_engine_id") is not None
        # A prefill server that has blocks to name would have given a lease.
        if told_at_once and params.get("remote_block_ids") is None:
            return _meet(params, role)
        return _fetch(params, role)
    return None


def _key(
    params: Mapping[str, Any], make: Callable[[str], ProducerRequest | RendezvousRequest]
) -> ProducerRequest | RendezvousRequest | RefusedParams:
    key = params.get("transfer_id")
    if key is None:
        return make("")
    if not isinstance(key, str) or not 0 < len(key) <= _MAX_KEY or not key.isprintable():
        return RefusedParams(
            RefusalReason.BAD_TYPE, f"transfer_id is no string of 1 to {_MAX_KEY} printable characters"
        )
    return make(key)


def _named_in(request_id: str) -> dict[str, Any]:
    """NixlConnector's keys for the ``engine-id@host:port`` that vllm-router has put into a request's id; none if it has not."""
    _, _, rest = request_id.partition(_PREFILL)
    place, marked, _ = rest.partition(_DECODE)
    owner, _, address = place.rpartition("@")
    host, _, port = address.rpartition(":")
    if not (marked and owner and host and re.fullmatch(r"[0-9]{1,5}", port)):
        return {}
    return {"remote_engine_id": owner, "remote_host": host, "remote_port": int(port)}


def _meet(params: Mapping[str, Any], role: Role) -> ProducerRequest | RendezvousRequest | RefusedParams:
    """Without a lease, but with a prefill server: as NixlPushConnector's proxies send it to both servers at once."""
    if not role.push:
        return RefusedParams(
            RefusalReason.OTHER_MODE, "the request was sent to both servers at once; mode is 'pull' here"
        )
    wrong = _checked_keys(params, ("remote_engine_id", "remote_host", "remote_port")) or _checked_sizes(params)
    if wrong is not None:
        return wrong
    owner, address = params["remote_engine_id"], tcp_address(params["remote_host"], params["remote_port"])
    try:
        lease = LeaseRef.for_rendezvous("", producer=owner, addresses=[address])
    except LeaseRefError as error:
        return RefusedParams(RefusalReason.BAD_TYPE, f"no prefill server can be there: {error}")
    if role.made(lease):
        return RefusedParams(RefusalReason.OWN_ENGINE, "the prefill server is this engine")
    return _key(params, lambda key: RendezvousRequest(owner, address, key))


def _fetch(params: Mapping[str, Any], role: Role) -> ConsumerRequest | RefusedParams:
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
    wrong = _checked_keys(params, _REQUIRED)
    if wrong is not None:
        return wrong
    size = params["tp_size"]
    if not 0 < size <= MAX_RANKS or len(lease.addresses) not in (1, size):  # the first rank knows the others
        ranks = f"tp_size is {size}, the lease names {len(lease.addresses)} ranks"
        return RefusedParams(RefusalReason.CONTRADICTION, ranks)
    wrong = _checked_sizes(params)
    if wrong is not None:
        return wrong
    if params.get("transfer_mode", "pull") != "pull":
        return RefusedParams(RefusalReason.OTHER_MODE, "transfer_mode is not 'pull'")
    if role.made(lease):
        return RefusedParams(RefusalReason.OWN_ENGINE, "the lease was made by this engine")
    if params["remote_engine_id"] != lease.producer or params["remote_request_id"] != lease.request:
        return RefusedParams(RefusalReason.CONTRADICTION, "remote_engine_id or remote_request_id is not the lease's")
    if params.get("remote_num_tokens", lease.num_tokens) != lease.num_tokens:
        return RefusedParams(RefusalReason.CONTRADICTION, "remote_num_tokens is not the lease's")
    return _checked_blocks(params.get("remote_block_ids"), lease, role.max_groups) or ConsumerRequest(lease)


def _same_place(address: str, own: str) -> bool:
    """An address leads to this server, as far as can be told without asking for names."""
    host, port = addresses.parse(address)
    own_host, own_port = addresses.parse(own)
    numbers, own_numbers = addresses.known_ips(host) or [], addresses.known_ips(own_host) or []
    here = host == own_host or any(number in own_numbers or addresses.is_loopback(number) for number in numbers)
    return port == own_port and here


def _checked_keys(params: Mapping[str, Any], names: Iterable[str]) -> RefusedParams | None:
    """NixlConnector's keys are there, of their types, and the port is one."""
    for name in names:
        value = params.get(name)
        if value is None:
            return RefusedParams(RefusalReason.MISSING_KEY, f"{name} is missing")
        if not isinstance(value, _REQUIRED[name]) or isinstance(value, bool):
            return RefusedParams(RefusalReason.BAD_TYPE, f"{name} is a {type(value).__name__}")
    return (
        None if 0 < params["remote_port"] < 2**16 else RefusedParams(RefusalReason.BAD_TYPE, "remote_port is no port")
    )


def _checked_sizes(params: Mapping[str, Any]) -> RefusedParams | None:
    """Of parallelism that is not supported there is none."""
    for name in ("pp_size", "dcp_size"):
        if params.get(name, 1) != 1:
            return RefusedParams(RefusalReason.BAD_TYPE, f"{name} is not 1")
    return None


def _checked_blocks(groups: object, lease: LeaseRef, most: int) -> RefusedParams | None:
    """A block holds at least one token, which bounds the work spent on lists of any length."""
    if not isinstance(groups, (list, tuple)) or not 0 < len(groups) <= most:
        return RefusedParams(
            RefusalReason.BAD_BLOCKS, f"remote_block_ids is not a list of block ids for each of 1 to {most} groups"
        )
    if not any(groups):
        return RefusedParams(RefusalReason.BAD_BLOCKS, "remote_block_ids names no block")
    for blocks in groups:
        if not isinstance(blocks, (list, tuple)):
            return RefusedParams(RefusalReason.BAD_BLOCKS, "a group of remote_block_ids is no list of block ids")
        if len(blocks) > lease.num_tokens:
            return RefusedParams(RefusalReason.BAD_BLOCKS, f"{len(blocks)} block ids for {lease.num_tokens} tokens")
        if not all(type(block) is int and 0 <= block <= _MAX_BLOCK_ID for block in blocks):
            return RefusedParams(RefusalReason.BAD_BLOCKS, "remote_block_ids holds something that is no block id")
    return None


def response(
    lease: LeaseRef, block_ids: Sequence[Sequence[int]], *, host: str, port: int, tp_size: int
) -> dict[str, Any]:
    """What the producer answers: every key of NixlConnector's pull response, with its types, and the lease.

    Args:
        block_ids: by cache group.
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
        "pp_size": 1,
        "remote_num_tokens": lease.num_tokens,
        "remote_blocks_expiry_time": None,
        "transfer_mode": "pull",
        # Who gets this is told of a lease that is known here.
        LEASE_KEY: msgspec.structs.replace(lease, rendezvous=False).to_obj(),
    }


class TokenIdError(ValueError):
    """A prompt has something for a token id that cannot be one."""


def shared_name(request_id: str) -> str:
    """What two servers call a request that came with one ``X-Request-Id``: vLLM adds eight random hex digits on each."""
    return _RANDOM_SUFFIX.sub("", request_id)


def prompt_digest(
    token_ids: Sequence[int],
    *,
    mm_items: Sequence[tuple[str, int]] = (),
    lora: str | None = None,
    cache_salt: str | None = None,
) -> str:
    """32 hex digits that are equal on both sides exactly if the KV of the two prompts means the same.

    Args:
        token_ids: of the whole prompt, each within 32 bits.
        mm_items: content hash and position in the prompt of each image, sound, ...; their tokens are placeholders.
        lora: name of the LoRA adapter.
        cache_salt: what keeps one tenant's prefix cache from another's.

    Raises:
        TokenIdError: a token id is no whole number, or needs more than 32 bits.
    """
    # One list holds what is not tokens, in a form in which no two different values look alike.
    context = repr((len(token_ids), list(mm_items), lora, cache_salt)).encode()
    digest = hashlib.blake2b(context, digest_size=16)
    try:
        digest.update(array.array("i", token_ids).tobytes())
    except (OverflowError, TypeError) as error:
        raise TokenIdError(f"a token id of the prompt is no whole number of 32 bits: {error}") from error
    return digest.hexdigest()

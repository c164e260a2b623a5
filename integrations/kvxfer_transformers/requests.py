# SPDX-License-Identifier: Apache-2.0
"""Transfers that a request's ``kv_transfer_params`` ask for. The parameters are those of every engine, with the same refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvxfer import addresses
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer_serving.mooncake_params import BootstrapRequest
from kvxfer_serving.prompt_digests import TokenIdError, judge_lease, prompt_digest, refused
from kvxfer_serving.refusals import RefusalReason, RefusedParams
from kvxfer_serving.transfer_params import (
    ConsumerRequest,
    ProducerRequest,
    RendezvousRequest,
    Role,
    TurnRequest,
    parse,
    response,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvxfer.secret import Secret


@dataclass(frozen=True)
class TransferWish:
    """Transfers that a request asks for.

    Attributes:
        read: lease of the prompt's KV at another engine.
        refused: reason for which there is no ``read`` although the parameters name one.
        shares: the KV is for another engine.
        key: what both engines were told of the request, if they were told at once.
        num_tokens: of the prompt, without those that a lease does not have.
        digest: of these.
    """

    read: LeaseRef | None = None
    refused: RefusedParams | None = None
    shares: bool = False
    key: str = ""
    num_tokens: int = 0
    digest: str = ""

    def lease(self, request_id: str, name: str, address: str, secret: Secret | None) -> LeaseRef:
        """Make the lease under which the KV of this request is shared.

        Args:
            request_id: of the request.
            name, address: of this engine's endpoint.
            secret: of all engines.
        """
        known: dict[str, Any] = {"request": request_id, "num_tokens": self.num_tokens, "digest": self.digest}
        if self.key:
            return LeaseRef.for_rendezvous(self.key, producer=name, addresses=[address], secret=secret, **known)
        return LeaseRef.mint(producer=name, addresses=[address], **known)


def wish_of(
    params: object, tokens: Sequence[int], role: Role, secret: Secret | None, *, left_to_decode: int = 0
) -> TransferWish | None:
    """Read the parameters of a request; None if they ask for nothing. No input raises.

    Args:
        params: ``kv_transfer_params``.
        tokens: of the prompt.
        role: of this engine.
        secret: of all engines.
        left_to_decode: see `kvxfer_transformers.paged_cache.left_to_decode`.
    """
    asked = parse(params, role)
    if asked is None:
        return None
    if isinstance(asked, BootstrapRequest):
        why = "MooncakeConnector's keys are for vLLM; name the other engine by remote_host and remote_port"
        asked = RefusedParams(RefusalReason.OTHER_MODE, why)
    if isinstance(asked, RefusedParams):
        return TransferWish(refused=asked)
    try:
        num_tokens = len(tokens) - left_to_decode if len(tokens) > left_to_decode else len(tokens)
        digest = prompt_digest(tokens[:num_tokens])
        part = asked.consumer if isinstance(asked, TurnRequest) else asked
        read = _read(part, tokens, num_tokens, digest, secret)
    except TokenIdError as error:
        return TransferWish(refused=RefusedParams(RefusalReason.BAD_TOKEN_IDS, str(error)))
    lease, refused = (read, None) if isinstance(read, LeaseRef) else (None, read)
    producer = asked.producer if isinstance(asked, TurnRequest) else asked
    if isinstance(producer, ProducerRequest):
        return TransferWish(lease, refused, shares=True, key=producer.key, num_tokens=num_tokens, digest=digest)
    return TransferWish(lease, refused)


def _read(
    asked: ProducerRequest | ConsumerRequest | RendezvousRequest | RefusedParams,
    tokens: Sequence[int],
    num_tokens: int,
    digest: str,
    secret: Secret | None,
) -> LeaseRef | RefusedParams | None:
    """Lease that a request is to read; None if it is to read none."""
    if isinstance(asked, RefusedParams):
        return asked
    if isinstance(asked, ConsumerRequest):
        lease = asked.lease
        reason = judge_lease(lease, len(tokens), lambda num_tokens: prompt_digest(tokens[:num_tokens]))
        return lease if reason is None else refused(reason)
    if isinstance(asked, RendezvousRequest):
        if not asked.key:
            return RefusedParams(
                RefusalReason.MISSING_KEY, "transfer_id is missing, by which both engines find each other"
            )
        return LeaseRef.for_rendezvous(
            asked.key,
            producer=asked.producer,
            addresses=[asked.address],
            num_tokens=num_tokens,
            digest=digest,
            secret=secret,
        )
    return None


def answer(lease: LeaseRef, block_ids: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Make the ``kv_transfer_params`` that the other engine is sent."""
    host, port = addresses.parse(lease.addresses[0])
    return response(lease, block_ids, host=host, port=port, tp_size=1)

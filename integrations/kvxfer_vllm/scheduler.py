# SPDX-License-Identifier: Apache-2.0
"""The half of the connector that lives with vLLM's scheduler: translates its calls into orders for the workers.

It does no I/O and knows no vendor. Producer: announces a lease when a request arrives, seals the blocks of each step that
computes some of it, and offers all when it has finished. The token is one that the consumer can make for itself where the
request was sent to both at once, unless that may not be (pull), or was used before. Consumer: has the lease held from the
moment the request arrives, and read when blocks are allocated.

Per request a consumer is in one of two states, *waiting* (never allocated) or *loading* (vLLM waits until a worker reports
it); vLLM calls `update_state_after_alloc` again after a load and after a preemption, which then means nothing.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from kvxfer.errors import ConfigError
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer_vllm.metadata import KvxferHandshake, KvxferMetadata, Offer, Read, Seal
from kvxfer_vllm.options import tcp_address
from kvxfer_vllm.stats import KvxferStats
from kvxfer_vllm.transfer_params import (
    ConsumerRequest,
    ProducerRequest,
    RefusalReason,
    RefusedParams,
    RendezvousRequest,
    Role,
    TokenIdError,
    parse,
    prompt_digest,
    response,
    shared_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from kvxfer.secret import Secret
    from kvxfer_vllm.groups import GroupTable, HeldBlocks

logger = logging.getLogger(f"vllm.{__name__}")

_LEASES_REMEMBERED = 65_536
_DELIVERED = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


@dataclass
class _Fetching:
    lease: LeaseRef
    loading: bool = False
    """A worker was told to load, and vLLM waits for its report."""


@dataclass
class _Serving:
    """A prefill for another server.

    Attributes:
        blocks: all that vLLM has given it so far, by cache group.
        sealed: how many of them were sealed.
    """

    lease: LeaseRef
    blocks: list[list[int]]
    sealed: list[int]

    @classmethod
    def of(cls, lease: LeaseRef, num_groups: int) -> _Serving:
        """A prefill that has no blocks yet."""
        return cls(lease, [[] for _ in range(num_groups)], [0] * num_groups)


class KvxferScheduler:
    """One engine's requests, as far as they are transferred.

    All methods run on the engine's thread and none of them waits for anything. They may raise only on a defect of their
    own or of vLLM; the facade survives that through `survive`.

    Args:
        role: what kv_transfer_params are judged against.
        tp_size: tensor parallel size of this server.
        tables: how the block tables of each cache group are to be read.
        backoff_tokens: last tokens of a prompt that prefill leaves to decode, see `kvxfer_vllm.groups`.
        host, port: of the side channel of rank 0, for NixlConnector's keys; port 0 until `set_addresses`.
        secret: of all servers, if they have one: nobody else can tell the token of a request that was sent to both.
    """

    def __init__(
        self,
        role: Role,
        *,
        tp_size: int,
        tables: Sequence[GroupTable],
        backoff_tokens: int = 0,
        host: str,
        port: int,
        secret: Secret | None = None,
    ) -> None:
        self._role = role
        self._secret = secret
        self._tp_size = tp_size
        self._tables = tables
        self._backoff_tokens = backoff_tokens
        self._host = host
        self._port = port
        self._addresses: tuple[str, ...] = ()
        if port:
            self._listens_at((tcp_address(host, port),))
        self._serving: dict[str, _Serving] = {}
        self._tokens_made: OrderedDict[str, None] = OrderedDict()
        self._fetching: dict[str, _Fetching] = {}
        self._leases_used: OrderedDict[str, None] = OrderedDict()
        self._namesake_told = False
        self._step = KvxferMetadata()
        self.stats = KvxferStats()

    def set_addresses(self, handshakes: Mapping[int, object]) -> None:
        """Learn where the workers listen; called once, at start-up, by rank.

        Rank 0 knows the others, so its address is enough. With a fixed port that one is known beforehand, for
        MultiConnector, which hands out the payload of one connector only, and for workers that tell nothing (on TPUs).

        Raises:
            ConfigError: rank 0 did not tell its address, which is not known either.
        """
        found = {rank: told.address for rank, told in handshakes.items() if isinstance(told, KvxferHandshake)}
        ranks = range(self._tp_size)
        if 0 in found:
            self._listens_at(tuple(found[rank] for rank in (ranks if sorted(found) == list(ranks) else (0,))))
            self._port = int(self._addresses[0].rpartition(":")[2])
        elif not self._addresses:
            raise ConfigError(
                "KvxferConnector was not told the address of rank 0, as inside MultiConnector and on TPUs; "
                "there the side channel needs a fixed port (KVXFER_SIDE_CHANNEL_PORT, not 0)"
            )

    # ------------------------------------------------------------------------------------------------ vLLM's hooks

    def on_new_request(self, request: Request) -> None:
        """Judge a request's parameters once; a consumer's lease is held from here on."""
        asked = parse(request.kv_transfer_params, self._role, request.request_id)
        lease: LeaseRef | None = None
        try:
            if asked is not None and not isinstance(asked, RefusedParams):
                asked = self._judge_prompt(request, asked)
            if isinstance(asked, ProducerRequest):
                lease = self._lease(request, asked.key)
        except TokenIdError as error:
            asked = RefusedParams(RefusalReason.BAD_TOKEN_IDS, str(error))
        if isinstance(asked, RefusedParams):
            if not _aborted_already(request):  # else vLLM has rejected it, and it is not computed at all
                self.stats.count("refused_params", label=asked.reason.value)
                logger.warning(
                    "Request %s: kv_transfer_params refused (%s: %s); it is computed locally.",
                    request.request_id,
                    asked.reason.value,
                    asked.detail,
                )
            if asked.reason is RefusalReason.NOT_AN_OBJECT:
                # vLLM 0.32 calls .get() on it right after this hook, and its engine would not survive that.
                request.kv_transfer_params = None
        elif lease is not None:
            self._leave_to_decode(request)
            self._serving[request.request_id] = _Serving.of(lease, len(self._tables))
            self._step.announce.append(lease)
        elif isinstance(asked, ConsumerRequest):
            self._warn_of_namesake(asked.lease)
            self._fetching[request.request_id] = _Fetching(asked.lease)
            _remember(self._leases_used, asked.lease.token)
            if not _aborted_already(request):
                self._step.hold.append(asked.lease)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens that can be loaded beyond those found locally, and whether that takes more than this step."""
        fetching = self._fetching.get(request.request_id)
        if fetching is None or fetching.loading:
            return 0, False
        missing = fetching.lease.num_tokens - num_computed_tokens
        return (missing, True) if missing > 0 else (0, False)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """A request was scheduled: start a consumer's load or drop its lease."""
        request_id = request.request_id
        fetching = self._fetching.get(request_id)
        if fetching is None or fetching.loading:
            return
        if num_external_tokens == 0:
            # All of it is here already, or another connector of a MultiConnector loads it.
            del self._fetching[request_id]
            self._step.drop.append(fetching.lease)
            self.stats.count("local_hits")
            return
        num_tokens = fetching.lease.num_tokens
        first_token = num_tokens - num_external_tokens
        target = self._blocks(blocks.get_block_ids(), first_token, num_tokens)
        if target is None:
            raise RuntimeError(f"too few blocks were allocated for {num_tokens} tokens")
        self._step.read.append(Read(request_id, fetching.lease, target, first_token))
        fetching.loading = True

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KvxferMetadata:
        """This step's orders; afterwards there are none."""
        try:
            self._seal_step(scheduler_output)
        except Exception:
            # An exception here would end the engine. What is not sealed is offered at the end.
            self.stats.count("hook_errors", label="build_connector_meta")
            logger.exception("Cannot tell which blocks of this step will be complete")
        step, self._step = self._step, KvxferMetadata()
        step.idle = scheduler_output.total_num_scheduled_tokens == 0
        return step

    def loads_over(self, request_ids: Iterable[str]) -> None:
        """Workers reported that these requests' loads ended, well or not."""
        for request_id in request_ids:
            self._fetching.pop(request_id, None)

    def request_finished(
        self, request: Request, block_ids: Sequence[Sequence[int]]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request is over. True: its blocks, of each cache group, stay until a worker reports it as sent."""
        request_id = request.request_id
        fetching = self._fetching.pop(request_id, None)
        if fetching is not None and fetching.loading:
            self._step.cancel.append(request_id)
        elif fetching is not None:
            self._step.drop.append(fetching.lease)
        serving = self._serving.pop(request_id, None)
        if serving is None:
            return False, None
        lease = serving.lease
        offered = self._blocks(block_ids, 0, lease.num_tokens)
        if request.status not in _DELIVERED or request.num_computed_tokens < lease.num_tokens or offered is None:
            self._step.withdraw.append(lease)
            return False, None
        answer = response(
            lease, [blocks.ids for blocks in offered], host=self._host, port=self._port, tp_size=self._tp_size
        )
        self._step.offer.append(Offer(request_id, lease, offered))
        return True, answer

    def survive(self, hook: str, request_id: str, *, parked: bool) -> None:
        """A hook raised: let the request be computed locally, and let nothing wait for what will not come.

        Args:
            hook: name of vLLM's hook, for the metric.
            request_id: whose request it was.
            parked: vLLM now waits until a worker reports the load, which is therefore made to fail.
        """
        self.stats.count("hook_errors", label=hook)
        fetching = self._fetching.pop(request_id, None)
        if fetching is not None and not fetching.loading:
            self._step.drop.append(fetching.lease)
            if parked:
                self._step.fail.append(request_id)
        serving = self._serving.pop(request_id, None)
        if serving is not None:
            self._step.withdraw.append(serving.lease)

    # ------------------------------------------------------------------------------------------------------ inside

    def _lease(self, request: Request, key: str) -> LeaseRef:
        """The lease of a request that is to be prefilled here."""
        lease = self._shared(request, key, producer=self._role.engine_id, addresses=self._addresses)
        if not self._role.push or lease.token in self._tokens_made:
            return _with_another_token(lease)
        _remember(self._tokens_made, lease.token)
        return lease

    def _shared(self, request: Request, key: str, *, producer: str, addresses: Sequence[str]) -> LeaseRef:
        """The lease of a request that both servers were sent, as both make it."""
        return LeaseRef.for_rendezvous(
            key or shared_name(request.request_id),
            producer=producer,
            addresses=addresses,
            request=request.request_id,
            num_tokens=self._num_tokens(request.num_prompt_tokens),
            digest=_digest(request),
            secret=self._secret,
        )

    def _num_tokens(self, num_prompt_tokens: int) -> int:
        """Tokens of a prompt that prefill computes for decode."""
        backoff = self._backoff_tokens
        return num_prompt_tokens - backoff if num_prompt_tokens > backoff else num_prompt_tokens

    def _leave_to_decode(self, request: Request) -> None:
        """Cut off the prompt's tokens that decode computes, as NixlConnector does where it has to (vLLM 0.32)."""
        left = request.num_prompt_tokens - self._num_tokens(request.num_prompt_tokens)
        # Who asked for the logprobs of the prompt is given all of them, and decode loads nothing.
        if not left or request.get_skip_reading_prefix_cache():
            return
        del request.prompt_token_ids[-left:]
        del request._all_token_ids[-left:]  # noqa: SLF001 - vLLM has no other way
        request.num_prompt_tokens -= left
        request.max_tokens = 1

    def _blocks(self, tables: Sequence[Sequence[int]], first_token: int, num_tokens: int) -> list[HeldBlocks] | None:
        """Of each cache group the blocks from one token to another; None if one has not all that are needed."""
        pairs = zip(self._tables, tables, strict=True)
        found = [table.blocks(ids, first_token, num_tokens) for table, ids in pairs]
        return None if None in found else [blocks for blocks in found if blocks is not None]

    def _seal_step(self, output: SchedulerOutput) -> None:
        """Which blocks of which prefills will be complete when this step has been computed."""
        if not self._serving or not self._role.push:
            return
        for new in output.scheduled_new_reqs:
            self._seal(new.req_id, new.block_ids, new.num_computed_tokens, output, afresh=True)
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            blocks, resumed = cached.new_block_ids[i], request_id in cached.resumed_req_ids
            self._seal(request_id, blocks or (), cached.num_computed_tokens[i], output, afresh=resumed)

    def _seal(
        self,
        request_id: str,
        blocks: Sequence[Sequence[int]],
        num_computed: int,
        output: SchedulerOutput,
        *,
        afresh: bool,
    ) -> None:
        serving = self._serving.get(request_id)
        if serving is None:
            return
        if afresh:
            lease = serving.lease
            if any(serving.sealed):
                # It was preempted: what was sealed is other requests' by now, and whoever has read it must not go on.
                self._step.withdraw.append(lease)
                lease = _with_another_token(lease)
                self._step.announce.append(lease)
            serving = self._serving[request_id] = _Serving.of(lease, len(self._tables))
        for held, new in zip(serving.blocks, blocks, strict=False):
            held.extend(new)
        num_tokens = min(num_computed + output.num_scheduled_tokens.get(request_id, 0), serving.lease.num_tokens)
        # Of what a window drops nothing is complete before the end.
        complete = [
            0 if table.is_local else min(num_tokens // table.block_tokens, len(held))
            for table, held in zip(self._tables, serving.blocks, strict=True)
        ]
        if any(now > before for now, before in zip(complete, serving.sealed, strict=True)):
            sealed = [held[:number] for held, number in zip(serving.blocks, complete, strict=True)]
            self._step.seal.append(Seal(serving.lease, sealed, serving.sealed))
            serving.sealed = complete

    def _listens_at(self, addresses: tuple[str, ...]) -> None:
        self._addresses = addresses
        self._role = replace(self._role, addresses=addresses)

    def _warn_of_namesake(self, lease: LeaseRef) -> None:
        """Say once that two servers have one engine_id: transfers work, but routers, logs and metrics cannot tell them apart."""
        if lease.producer == self._role.engine_id and not self._namesake_told:
            self._namesake_told = True
            logger.warning(
                'The server at %s has the engine_id %r, as this one has: give each server its own ("engine_id" in '
                "--kv-transfer-config).",
                lease.addresses[0],
                lease.producer,
            )

    def _judge_prompt(
        self, request: Request, asked: ProducerRequest | ConsumerRequest | RendezvousRequest
    ) -> ProducerRequest | ConsumerRequest | RefusedParams:
        """What only the request itself, and the other requests, can tell about its parameters."""
        if request.prompt_token_ids is None or request.prompt_embeds is not None or request.resumable:
            return RefusedParams(RefusalReason.NO_TOKEN_IDS, "the prompt is not a fixed list of token ids")
        if isinstance(asked, ProducerRequest):
            return asked
        if isinstance(asked, RendezvousRequest):
            asked = ConsumerRequest(self._shared(request, asked.key, producer=asked.owner, addresses=[asked.address]))
        if asked.lease.token in self._leases_used:
            # A lease is read once, and the second request would lose by trying; computing, it may find the first's blocks.
            return RefusedParams(RefusalReason.LEASE_USED, "another request on this server has, or had, the same lease")
        # A request that vLLM aborts at once only brings a lease to be dropped; its prompt is a stand-in.
        if not _aborted_already(request) and (
            asked.lease.num_tokens != self._num_tokens(request.num_prompt_tokens)
            or asked.lease.digest != _digest(request)
        ):
            return RefusedParams(RefusalReason.OTHER_PROMPT, "the lease is for another prompt")
        return asked


def _with_another_token(lease: LeaseRef) -> LeaseRef:
    """A lease of the same KV that only its producer can make."""
    return LeaseRef.mint(
        producer=lease.producer,
        addresses=lease.addresses,
        request=lease.request,
        num_tokens=lease.num_tokens,
        digest=lease.digest,
    )


def _remember(tokens: OrderedDict[str, None], token: str) -> None:
    tokens[token] = None
    if len(tokens) > _LEASES_REMEMBERED:
        tokens.popitem(last=False)


def _aborted_already(request: Request) -> bool:
    return bool(getattr(request, "abort_immediately", False))


def _digest(request: Request) -> str:
    return prompt_digest(
        request.prompt_token_ids or (),
        mm_items=[(item.identifier, item.mm_position.offset) for item in request.mm_features],
        lora=request.lora_request.lora_name if request.lora_request else None,
        cache_salt=request.cache_salt,
    )

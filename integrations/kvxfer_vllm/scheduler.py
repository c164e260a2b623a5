# SPDX-License-Identifier: Apache-2.0
"""The half of the connector in vLLM's scheduler: turns the calls of vLLM into orders for the workers.

It does no I/O and imports no vendor but vLLM. As a producer it announces a lease when a request arrives, publishes the
blocks that each step of the prefill completes, and publishes all of them when the prefill has finished. The consumer can
derive the token where both servers were sent the request at once; in mode "pull", and where the derived token was used
before, the token is random. As a consumer it has the lease acquired when the request arrives, and read when vLLM has
allocated blocks.

A consumer's request is either *waiting* (vLLM has allocated nothing) or *loading* (vLLM waits for a worker's report). vLLM
calls `update_state_after_alloc` again after a load and after a preemption; those calls are ignored.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from kvxfer.errors import ConfigError
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer_vllm.groups import blocks_in_each
from kvxfer_vllm.metadata import KvxferHandshake, KvxferMetadata, PublishOrder, ReadOrder
from kvxfer_vllm.options import tcp_address
from kvxfer_vllm.prefills import Prefills, with_new_token
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
    rendezvous_key,
    response,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from kvxfer.secret import Secret
    from kvxfer_vllm.groups import GroupTable

logger = logging.getLogger(f"vllm.{__name__}")

_TOKENS_REMEMBERED = 65_536
_SUCCEEDED = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


@dataclass
class _Load:
    """A consumer's request; ``loading`` is False while it waits."""

    lease: LeaseRef
    loading: bool = False


class KvxferScheduler:
    """The transferred requests of one engine.

    All methods run on the engine's thread, and none of them waits. They raise only on a defect of kvxfer or of vLLM;
    `KvxferConnector` then calls `survive`.

    Args:
        role: judges kv_transfer_params.
        tp_size: tensor parallel size of this server.
        tables: rules of the block tables, by cache group.
        backoff_tokens: last tokens of a prompt that prefill leaves to decode, see `kvxfer_vllm.groups.backoff_tokens`.
        host: of the side channel of rank 0, for NixlConnector's keys.
        port: of the side channel of rank 0; 0 until `set_addresses`.
        secret: of all servers, if they have one. Without it no other process can derive the token of a request that both
            servers were sent.
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
        self.stats = KvxferStats()
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
        self._prefills = Prefills(tables)
        self._loads: dict[str, _Load] = {}
        self._tokens_made: OrderedDict[str, None] = OrderedDict()
        self._tokens_used: OrderedDict[str, None] = OrderedDict()
        self._warned_of_namesake = False
        self._step = KvxferMetadata()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Side channels of this server in rank order, or that of rank 0 alone; empty until they are known."""
        return self._addresses

    def set_addresses(self, handshakes: Mapping[int, object]) -> None:
        """Take the addresses of the workers, by rank; called once, at start-up.

        Rank 0 knows the other ranks, so its address is enough. With a fixed port it is known beforehand: MultiConnector
        passes on the payload of one connector only, and workers on TPUs report nothing.

        Raises:
            ConfigError: rank 0 did not report its address, and it is not known beforehand.
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
        """Judge a request's parameters, once; announce a producer's lease, acquire a consumer's."""
        asked = parse(request.kv_transfer_params, self._role, request.request_id)
        lease: LeaseRef | None = None
        try:
            if asked is not None and not isinstance(asked, RefusedParams):
                asked = self._judge_prompt(request, asked)
            if isinstance(asked, ProducerRequest):
                lease = self._new_lease(request, asked.key)
        except TokenIdError as error:
            asked = RefusedParams(RefusalReason.BAD_TOKEN_IDS, str(error))
        if isinstance(asked, RefusedParams):
            self._refuse(request, asked)
        elif lease is not None:
            self._leave_to_decode(request)
            self._prefills.begin(request.request_id, lease)
            self._step.announce.append(lease)
        elif isinstance(asked, ConsumerRequest):
            self._warn_of_namesake(asked.lease)
            self._loads[request.request_id] = _Load(asked.lease)
            _remember(self._tokens_used, asked.lease.token)
            if not _aborted_already(request):
                self._step.acquire.append(asked.lease)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens that can be loaded beyond those found locally, and whether that takes more than this step."""
        load = self._loads.get(request.request_id)
        if load is None or load.loading:
            return 0, False
        missing = load.lease.num_tokens - num_computed_tokens
        return (missing, True) if missing > 0 else (0, False)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Order a consumer's load, or release its lease, now that vLLM has allocated blocks."""
        request_id = request.request_id
        load = self._loads.get(request_id)
        if load is None or load.loading:
            return
        if num_external_tokens == 0:
            # The whole prompt is here already, or another connector of a MultiConnector loads it.
            del self._loads[request_id]
            self._step.release.append(load.lease)
            self.stats.count("local_hits")
            return
        num_tokens = load.lease.num_tokens
        first_token = num_tokens - num_external_tokens
        target = blocks_in_each(self._tables, blocks.get_block_ids(), first_token, num_tokens)
        if target is None:
            raise RuntimeError(f"too few blocks were allocated for {num_tokens} tokens")
        self._step.read.append(ReadOrder(request_id, load.lease, target, first_token))
        load.loading = True

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KvxferMetadata:
        """Return this step's orders and begin to collect those of the next one."""
        if self._role.push:
            try:
                self._prefills.scheduled(scheduler_output, self._step)
            except Exception:
                # An exception here would end the engine. The blocks are published when the prefill has finished.
                self.stats.count("hook_errors", label="build_connector_meta")
                logger.exception("Cannot tell which blocks of this step will be complete")
        step, self._step = self._step, KvxferMetadata()
        step.idle = scheduler_output.total_num_scheduled_tokens == 0
        return step

    def loads_ended(self, request_ids: Iterable[str]) -> None:
        """Forget the loads that workers reported as finished or failed."""
        for request_id in request_ids:
            self._loads.pop(request_id, None)

    def request_finished(
        self, request: Request, block_ids: Sequence[Sequence[int]]
    ) -> tuple[bool, dict[str, Any] | None]:
        """End a request. True: its blocks, by cache group, stay allocated until a worker reports it as sent."""
        request_id = request.request_id
        load = self._loads.pop(request_id, None)
        if load is not None and load.loading:
            self._step.cancel.append(request_id)
        elif load is not None:
            self._step.release.append(load.lease)
        lease = self._prefills.end(request_id)
        if lease is None:
            return False, None
        published = blocks_in_each(self._tables, block_ids, 0, lease.num_tokens)
        if request.status not in _SUCCEEDED or request.num_computed_tokens < lease.num_tokens or published is None:
            self._step.revoke.append(lease)
            return False, None
        ids = [blocks.ids for blocks in published]
        answer = response(lease, ids, host=self._host, port=self._port, tp_size=self._tp_size)
        self._step.publish.append(PublishOrder(request_id, lease, published))
        return True, answer

    def survive(self, hook: str, request_id: str, *, parked: bool) -> None:
        """Count a hook that raised, give up the request's lease, and let vLLM compute the request locally.

        Args:
            hook: name of vLLM's hook, for the metric.
            request_id: of the request that the hook was called for.
            parked: vLLM now waits for a worker to report the load, so the load is reported as failed.
        """
        self.stats.count("hook_errors", label=hook)
        load = self._loads.pop(request_id, None)
        if load is not None and not load.loading:
            self._step.release.append(load.lease)
            if parked:
                self._step.fail.append(request_id)
        lease = self._prefills.end(request_id)
        if lease is not None:
            self._step.revoke.append(lease)

    # ------------------------------------------------------------------------------------------------------ leases

    def _new_lease(self, request: Request, key: str) -> LeaseRef:
        """Make the lease of a request that is to be prefilled here."""
        lease = self._rendezvous(request, key, producer=self._role.engine_id, addresses=self._addresses)
        if not self._role.push or lease.token in self._tokens_made:
            return with_new_token(lease)
        _remember(self._tokens_made, lease.token)
        return lease

    def _rendezvous(self, request: Request, key: str, *, producer: str, addresses: Sequence[str]) -> LeaseRef:
        """Derive the lease of a request that both servers were sent; both derive the same."""
        return LeaseRef.for_rendezvous(
            key or rendezvous_key(request.request_id),
            producer=producer,
            addresses=addresses,
            request=request.request_id,
            num_tokens=self._tokens_to_transfer(request.num_prompt_tokens),
            digest=_digest(request),
            secret=self._secret,
        )

    def _listens_at(self, addresses: tuple[str, ...]) -> None:
        self._addresses = addresses
        self._role = replace(self._role, addresses=addresses)

    # ----------------------------------------------------------------------------------------------------- prompts

    def _judge_prompt(
        self, request: Request, asked: ProducerRequest | ConsumerRequest | RendezvousRequest
    ) -> ProducerRequest | ConsumerRequest | RefusedParams:
        """Judge the parameters by the request's prompt and by the leases of other requests."""
        if request.prompt_token_ids is None or request.prompt_embeds is not None or request.resumable:
            return RefusedParams(RefusalReason.NO_TOKEN_IDS, "the prompt is not a fixed list of token ids")
        if isinstance(asked, ProducerRequest):
            return asked
        if isinstance(asked, RendezvousRequest):
            lease = self._rendezvous(request, asked.key, producer=asked.producer, addresses=[asked.address])
            asked = ConsumerRequest(lease)
        if asked.lease.token in self._tokens_used:
            # A lease is read once. The second request may find the first one's blocks in the prefix cache.
            return RefusedParams(RefusalReason.LEASE_USED, "another request on this server has, or had, the same lease")
        # The prompt of a request that vLLM aborts at once is a stand-in; only its lease has to be released.
        if not _aborted_already(request) and (
            asked.lease.num_tokens != self._tokens_to_transfer(request.num_prompt_tokens)
            or asked.lease.digest != _digest(request)
        ):
            return RefusedParams(RefusalReason.OTHER_PROMPT, "the lease is for another prompt")
        return asked

    def _refuse(self, request: Request, refused: RefusedParams) -> None:
        """Count and log parameters that are not followed."""
        if not _aborted_already(request):  # else vLLM has rejected the request and does not compute it
            self.stats.count("refused_params", label=refused.reason.value)
            logger.warning(
                "Request %s: kv_transfer_params refused (%s: %s); it is computed locally.",
                request.request_id,
                refused.reason.value,
                refused.detail,
            )
        if refused.reason is RefusalReason.NOT_AN_OBJECT:
            # vLLM 0.32 calls .get() on it right after this hook, which would end its engine.
            request.kv_transfer_params = None

    def _tokens_to_transfer(self, num_prompt_tokens: int) -> int:
        """Number of a prompt's tokens that prefill computes for decode."""
        backoff = self._backoff_tokens
        return num_prompt_tokens - backoff if num_prompt_tokens > backoff else num_prompt_tokens

    def _leave_to_decode(self, request: Request) -> None:
        """Cut off the tokens of the prompt that decode computes, as NixlConnector does (vLLM 0.32)."""
        left = request.num_prompt_tokens - self._tokens_to_transfer(request.num_prompt_tokens)
        # A client that asked for the logprobs of the prompt gets all of them, and decode loads nothing.
        if not left or request.get_skip_reading_prefix_cache():
            return
        del request.prompt_token_ids[-left:]
        del request._all_token_ids[-left:]  # noqa: SLF001 - vLLM has no other way
        request.num_prompt_tokens -= left
        request.max_tokens = 1

    def _warn_of_namesake(self, lease: LeaseRef) -> None:
        """Warn once that two servers have one engine_id: transfers work, but routers, logs and metrics confuse the two."""
        if lease.producer == self._role.engine_id and not self._warned_of_namesake:
            self._warned_of_namesake = True
            logger.warning(
                'The server at %s has the engine_id %r, as this one has: give each server its own ("engine_id" in '
                "--kv-transfer-config).",
                lease.addresses[0],
                lease.producer,
            )


def _remember(tokens: OrderedDict[str, None], token: str) -> None:
    tokens[token] = None
    if len(tokens) > _TOKENS_REMEMBERED:
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

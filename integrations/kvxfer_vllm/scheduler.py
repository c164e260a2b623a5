# SPDX-License-Identifier: Apache-2.0
"""The half of the connector in vLLM's scheduler: turns the calls of vLLM into orders for the workers.

It does no I/O and imports no vendor but vLLM. As a producer it announces a lease when a request arrives, publishes the
blocks that each step of the prefill completes, and publishes all of them when the prefill has finished. The consumer can
derive the token where both servers were sent the request at once; in mode "pull", and where the derived token was used
before, the token is random. As a consumer it has the lease acquired when the request arrives, and read when vLLM has
allocated blocks.

`kvxfer_vllm.prefills` knows what a producer has under way, `kvxfer_vllm.loads` what a consumer has.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from msgspec import structs
from vllm.v1.request import RequestStatus

from kvxfer.errors import ConfigError
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer_serving.mooncake_params import BootstrapRequest
from kvxfer_serving.options import tcp_address
from kvxfer_serving.prompt_digests import TokenIdError, judge, judge_lease, refused
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
from kvxfer_vllm.arrivals import Arrivals
from kvxfer_vllm.bootstrap.lookup import BootstrapLookups
from kvxfer_vllm.groups import blocks_in_each
from kvxfer_vllm.loads import Loads
from kvxfer_vllm.metadata import IDLE_WAIT_S, KvxferHandshake, KvxferMetadata, PublishOrder, Traced
from kvxfer_vllm.prefills import Prefills, with_new_token
from kvxfer_vllm.prompts import PromptIdentity
from kvxfer_vllm.request_ids import of_other_prompt, rendezvous_key, sibling_of
from kvxfer_vllm.seams import fail_request
from kvxfer_vllm.stats import KvxferStats
from kvxfer_vllm.windows import LoadReport, PartialWindows

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from kvxfer.secret import Secret
    from kvxfer_serving.transfer_params import Asked
    from kvxfer_vllm.groups import GroupTable

logger = logging.getLogger(f"vllm.{__name__}")

_TOKENS_REMEMBERED = 65_536
_WEIGHTS_OF_CHECKPOINT = "default"  # vLLM's name of them
_SUCCEEDED = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


class KvxferScheduler:
    """The transferred requests of one engine.

    All methods run on the engine's thread, and none of them waits. They raise only on a defect of kvxfer or of vLLM;
    `KvxferConnector` then calls `survive`.

    Args:
        role: judges kv_transfer_params.
        tp_size: tensor parallel size of this server.
        pp_size: number of its pipeline stages.
        tables: rules of the block tables, by cache group.
        backoff_tokens: last tokens of a prompt that prefill leaves to decode, see `kvxfer_vllm.groups.backoff_tokens`.
        host: of the side channel of rank 0, for NixlConnector's keys.
        port: of the side channel of rank 0; 0 until `set_addresses`.
        secret: of all servers, if they have one. Without it no other process can derive the token of a request that both
            servers were sent.
        share: the prefix cache is on, so requests with the same lease can share a load.
        prompts: identities of this server's prompts.
        turns: the KV of an answer can be read by the next turn's prefill.
        recomputes: a request whose load has failed is computed here, see `Arrivals`.
        workers_report: workers tell where the windows of loads begin (`kvxfer_vllm.windows`).
    """

    def __init__(
        self,
        role: Role,
        *,
        tp_size: int,
        pp_size: int = 1,
        tables: Sequence[GroupTable],
        backoff_tokens: int = 0,
        host: str,
        port: int,
        secret: Secret | None = None,
        share: bool = False,
        prompts: PromptIdentity | None = None,
        turns: bool = True,
        recomputes: bool = False,
        workers_report: bool = True,
    ) -> None:
        self.stats = KvxferStats()
        self._arrivals = Arrivals(self.stats, role, recomputes=recomputes)
        self._role = role
        self._secret = secret
        self._sizes = {"tp_size": tp_size, "pp_size": pp_size}
        self._tables = tables
        self._backoff_tokens = backoff_tokens
        self._host = host
        self._port = port
        self._addresses: tuple[str, ...] = ()
        if port:
            self._listens_at((tcp_address(host, port),))
        self._prefills = Prefills(tables)
        self.windows = PartialWindows(tables, share=share, told=workers_report)
        self._loads = Loads(tables, self.stats, self._arrivals, self.windows, share=share)
        self._lookups = BootstrapLookups()
        self._prompts = prompts or PromptIdentity()
        self._turns = turns
        self._tokens_made: OrderedDict[str, None] = OrderedDict()
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
        ranks = range(prod(self._sizes.values()))
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
        if asked is not None:
            self._arrivals.asked()
        elif not _aborted_already(request):
            self._arrivals.plain()
        self._begin(request, asked)

    def _begin(self, request: Request, asked: Asked | None) -> None:
        """Begin what a request's parameters ask for, or ask for the prefill server first."""
        if isinstance(asked, BootstrapRequest):
            if not _aborted_already(request):
                self._lookups.begin(request, asked)
            return
        try:
            if isinstance(asked, TurnRequest):
                self._begin_turn(request, asked.producer)
                asked = asked.consumer
            if asked is not None and not isinstance(asked, RefusedParams):
                asked = self._judge_prompt(request, asked)
            if isinstance(asked, ProducerRequest):
                self._begin_prefill(request, asked.key)
        except TokenIdError as error:
            asked = RefusedParams(RefusalReason.BAD_TOKEN_IDS, str(error))
            self._end_prefill(request.request_id)
        if isinstance(asked, RefusedParams):
            self._refuse(request, asked)
        elif isinstance(asked, ConsumerRequest):
            self._warn_of_namesake(asked.lease)
            self._loads.begin(request.request_id, asked.lease, self._step, acquire=not _aborted_already(request))

    def _take_lookups(self, wait_s: float = 0.0) -> None:
        """Begin the requests whose prefill server has become known. Never raises."""
        for request, found in self._lookups.answered(wait_s):
            try:
                self._begin(request, found if isinstance(found, RefusedParams) else parse(found, self._role))
            except Exception:
                logger.exception("Defect, met by request %s, whose prefill server was asked for", request.request_id)
                self.survive("on_new_request", request.request_id, parked=False)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See `Loads.missing`; None also while the prefill server is being asked for."""
        self._take_lookups()
        if self._lookups.waits(request.request_id):
            return None, False
        return self._loads.missing(request.request_id, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """See `Loads.allocated`."""
        loaded = self._loads.allocated(
            request.request_id, blocks.get_block_ids(), num_external_tokens, self._step, Traced.of(request)
        )
        if loaded is not None:
            self.windows.begin(request, loaded)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KvxferMetadata:
        """Return this step's orders and begin to collect those of the next one."""
        if self._role.push:
            try:
                self._prefills.scheduled(scheduler_output, self._step)
            except Exception:
                # An exception here would end the engine. The blocks are published when the prefill has finished.
                self.stats.count("hook_errors", label="build_connector_meta")
                logger.exception("Cannot tell which blocks of this step will be complete")
        idle = scheduler_output.total_num_scheduled_tokens == 0
        self._take_lookups(IDLE_WAIT_S if idle else 0.0)
        step, self._step = self._step, KvxferMetadata()
        step.idle = idle
        return step

    def reported(
        self, loaded: Collection[str], failed: Collection[str], sent: Iterable[str], report: object = None
    ) -> None:
        """Take the reports of the workers: loads that ended, those of them that failed, and prefills whose lease has ended."""
        if isinstance(report, LoadReport):
            self.windows.report(report.begins)
        for request_id in loaded:
            self.windows.ended(request_id, failed=request_id in failed)
        self._loads.ended(loaded, failed, self._step)
        self._prefills.leases_ended(sent)

    def reset_cache(self) -> None:
        """End leases and loads of KV that was computed so far, as after an update of the weights."""
        self._lookups.clear()
        self._loads.reset(self._step)
        self._step.reset = True

    def weights_updated(self, version: str) -> None:
        """Take the version of the weights from now on. Nothing crosses: leases and loads end, running prefills have none."""
        version = "" if version == _WEIGHTS_OF_CHECKPOINT else version
        if version != self._prompts.weights:
            self._prompts.weights = version
            self._step.revoke += self._prefills.end_all()
            self.reset_cache()

    def request_finished(
        self, request: Request, block_ids: Sequence[Sequence[int]]
    ) -> tuple[bool, dict[str, Any] | None]:
        """End a request. True: its blocks, by cache group, stay allocated until a worker reports it as sent."""
        try:
            return self._finish(request, block_ids)
        finally:
            self.windows.forget(request.request_id)

    def _finish(self, request: Request, block_ids: Sequence[Sequence[int]]) -> tuple[bool, dict[str, Any] | None]:
        request_id = request.request_id
        self._lookups.forget(request_id)
        self._loads.finish(request_id, self._step)
        lease = self._prefills.end(request_id)
        if lease is None:
            return False, self._prefills.answer_of_sibling(request_id) if request.status in _SUCCEEDED else None
        if not lease.num_tokens:
            # The last token of an answer is not computed; with asynchronous scheduling vLLM may count it nevertheless.
            num_tokens = min(request.num_computed_tokens, request.num_tokens - 1)
            lease = structs.replace(lease, num_tokens=num_tokens, digest=self._prompts.digest(request, num_tokens))
        published = blocks_in_each(self._tables, block_ids, 0, lease.num_tokens)
        if published is not None:
            published = self.windows.published(request_id, published)
        computed = request.num_computed_tokens
        # A state that has taken in more tokens than the lease names is no state of those.
        beyond = computed > lease.num_tokens and any(table.holds_states for table in self._tables)
        if request.status not in _SUCCEEDED or computed < lease.num_tokens or beyond or published is None:
            self._step.revoke.append(lease)
            return False, None
        ids = [blocks.ids for blocks in published]
        answer = response(lease, ids, host=self._host, port=self._port, **self._sizes)
        self._step.publish.append(PublishOrder(request_id, lease, published, Traced.of(request)))
        self._prefills.answered(request_id, answer)
        return True, answer

    def survive(self, hook: str, request_id: str, *, parked: bool) -> None:
        """Count a hook that raised, give up the request's lease, and let vLLM compute the request locally.

        Args:
            hook: name of vLLM's hook, for the metric.
            request_id: of the request that the hook was called for.
            parked: vLLM now waits for a worker to report the load, so the load is reported as failed.
        """
        self.stats.count("hook_errors", label=hook)
        self._lookups.forget(request_id)
        self._loads.give_up(request_id, self._step, parked=parked)
        self._end_prefill(request_id)

    # ------------------------------------------------------------------------------------------------------ leases

    def _begin_prefill(self, request: Request, key: str) -> None:
        """Begin a prefill: announce its lease, unless it is a sibling's."""
        digest = self._digest(request)
        self._arrivals.served()
        if not self._prefills.joins(request.request_id, digest):
            lease = self._new_lease(request, key, digest)
            self._prefills.begin(request.request_id, lease)
            self._step.announce.append(lease)
        self._leave_to_decode(request)

    def _end_prefill(self, request_id: str) -> None:
        """End a prefill, or a turn, without a result."""
        lease = self._prefills.end(request_id)
        if lease is not None:
            self._step.revoke.append(lease)

    def _begin_turn(self, request: Request, asked: ProducerRequest) -> None:
        """Begin a turn of a conversation: a prefill (of one token), or an answer whose KV the next turn's prefill reads."""
        if request.resumable:
            return
        if request.max_tokens == 1:
            self._begin_prefill(request, asked.key)
        elif self._turns and request.prompt_embeds is None and sibling_of(request.request_id)[1] == request.request_id:
            lease = LeaseRef.mint(producer=self._role.engine_id, addresses=self._addresses, request=request.request_id)
            self._prefills.begin(request.request_id, lease, answer=True)
            self._step.announce.append(lease)

    def _new_lease(self, request: Request, key: str, digest: str) -> LeaseRef:
        """Make the lease of a request that is to be prefilled here."""
        lease = self._rendezvous(request, key, digest, producer=self._role.engine_id, addresses=self._addresses)
        if not self._role.push or lease.token in self._tokens_made:
            return with_new_token(lease)
        _remember(self._tokens_made, lease.token)
        return lease

    def _rendezvous(
        self, request: Request, key: str, digest: str, *, producer: str, addresses: Sequence[str]
    ) -> LeaseRef:
        """Derive the lease of a request that both servers were sent; both derive the same."""
        return LeaseRef.for_rendezvous(
            key or rendezvous_key(request.request_id),
            producer=producer,
            addresses=addresses,
            request=request.request_id,
            num_tokens=self._tokens_to_transfer(request.num_prompt_tokens),
            digest=digest,
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
        if request.resumable:
            return RefusedParams(RefusalReason.NO_TOKEN_IDS, "the prompt can still grow")
        if isinstance(asked, ProducerRequest):
            return asked
        derived = isinstance(asked, RendezvousRequest)  # from this very prompt, so the lease is for it
        if isinstance(asked, RendezvousRequest):
            digest = self._digest(request)
            lease = self._rendezvous(request, asked.key, digest, producer=asked.producer, addresses=[asked.address])
            asked = ConsumerRequest(lease)
        # The prompt of a request that vLLM aborts at once is a stand-in; only its lease has to be released.
        found = asked.lease if derived or _aborted_already(request) else self._lease_for(request, asked.lease)
        if isinstance(found, RefusedParams):
            return found
        token = found.token
        if self._loads.knows(token) and (_aborted_already(request) or not self._loads.can_share(token)):
            return RefusedParams(RefusalReason.LEASE_USED, "another request on this server has, or had, the same lease")
        if sibling_of(request.request_id)[0] > 0 and not self._loads.knows(token):
            # vLLM sends the first sibling first, so it is on another data parallel rank. A lease belongs to the rank that
            # acquires it first. (The configuration of a rank need not tell that there are others: vLLM hides them from dense
            # models.)
            return RefusedParams(RefusalReason.LEASE_USED, "a sibling of the request has the lease on another rank")
        return ConsumerRequest(found)

    def _lease_for(self, request: Request, lease: LeaseRef) -> LeaseRef | RefusedParams:
        """Return a lease if it is for a prompt or the first tokens of it, or the lease of this prompt that it leads to."""
        most = self._tokens_to_transfer(request.num_prompt_tokens)
        reason = judge_lease(lease, most, lambda num_tokens: self._prompts.digest(request, num_tokens))
        if reason is RefusalReason.NO_MEDIA and not self._loads.knows(lease.token):
            self._step.release.append(lease)
        if reason in (None, RefusalReason.OTHER_PROMPT):
            lease, reason = self._of_other_prompt(request, lease) or (lease, reason)
        return lease if reason is None else refused(reason)

    def _of_other_prompt(self, request: Request, first: LeaseRef) -> tuple[LeaseRef, None] | None:
        """Derive the lease of a prompt from that of the first prompt of the client's request, if its producer derives leases."""
        key = of_other_prompt(first.request, request.request_id)
        if key is None:
            return None
        digest = self._digest(request)
        place: dict[str, Any] = {"producer": first.producer, "addresses": first.addresses}
        known: dict[str, Any] = {"num_tokens": first.num_tokens, "digest": first.digest, "secret": self._secret}
        derives = LeaseRef.for_rendezvous(rendezvous_key(first.request), **place, **known).token == first.token
        if not derives or judge(first.digest, digest) not in (None, RefusalReason.OTHER_PROMPT):
            return None
        return self._rendezvous(request, key, digest, **place), None

    def _refuse(self, request: Request, refused: RefusedParams) -> None:
        """Count and log parameters that are not followed."""
        if not _aborted_already(request):  # else vLLM has rejected the request and does not compute it
            fails = refused.reason is RefusalReason.NO_MEDIA
            if fails:  # placeholders alone give wrong tokens
                fail_request(request, refused.detail)
            self.stats.count("refused_params", label=refused.reason.value)
            if not fails:
                self._arrivals.local(refused.reason.value)
            logger.warning(
                "Request %s: kv_transfer_params refused (%s: %s); it %s.",
                request.request_id,
                refused.reason.value,
                refused.detail,
                "fails" if fails else "is computed locally",
            )
        if refused.reason is RefusalReason.NOT_AN_OBJECT:
            # vLLM 0.32 calls .get() on it right after this hook, which would end its engine.
            request.kv_transfer_params = None

    def _digest(self, request: Request) -> str:
        """Digest of the tokens of a prompt that prefill computes for decode."""
        return self._prompts.digest(request, self._tokens_to_transfer(request.num_prompt_tokens))

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
        if request.prompt_token_ids is not None:
            del request.prompt_token_ids[-left:]
        if request.prompt_embeds is not None:
            request.prompt_embeds = request.prompt_embeds[:-left]
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

# SPDX-License-Identifier: Apache-2.0
"""Schedulers of transformers that know of requests whose KV another engine has, and of blocks that others read.

They are registered in transformers' table of schedulers, by the names ``kvxfer_fifo`` and ``kvxfer_prefill_first``. All methods
run on the engine's thread, and none waits for the network: the manager calls `clear_cancelled_requests` and `schedule_batch` in
each turn of its loop.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import (
    SCHEDULER_MAPPING,
    FIFOScheduler,
    PrefillFirstScheduler,
    Scheduler,
)

from kvxfer.errors import ConfigError
from kvxfer.protocol.transfer import Done, Failed
from kvxfer_transformers import seams

if TYPE_CHECKING:
    from kvxfer_transformers.exchange import Exchange
    from kvxfer_transformers.loads import LoadEnd

logger = logging.getLogger(__name__)


class LeaseScheduling(Scheduler):
    """Part of a scheduler that loads what other engines have, and shares what they ask for."""

    exchange: Exchange | None = None

    def attach(self, exchange: Exchange | None) -> None:
        """Connect the scheduler of a new batch processor with the endpoint; None disconnects it."""
        seams.check_made(self, "Scheduler")
        self.exchange = exchange
        self._cancelled: set[str] = set()

    def add_waiting_request(self, state: Any) -> None:
        """Add a request. One whose KV another engine has waits outside of the queue, until it was read.

        Raises:
            ValueError: another request has its id, or it is larger than the cache. It fails by that.
        """
        if self.exchange is not None and self.exchange.admit(state):
            self.waiting_requests[state.request_id] = state
        else:
            super().add_waiting_request(state)

    def set_request_cancellation(self, request_id: str) -> None:
        """Note that a client has gone."""
        super().set_request_cancellation(request_id)
        self._cancelled.add(request_id)

    def clear_cancelled_requests(self) -> Any:
        """Take the events of kvxfer, and forget the requests whose clients have gone."""
        if self.exchange is not None:
            for request_id in self._cancelled:
                self.exchange.cancelled(request_id)
            for event in self.exchange.endpoint.poll():
                if isinstance(event, (Done, Failed)):
                    self._loads_ended(self.exchange.prompts.ended(event))
                else:
                    self.exchange.prefills.lease_ended(event.token)
        self._cancelled.clear()
        return super().clear_cancelled_requests()

    def has_pending_requests(self) -> bool:
        """Whether there is work, or another engine reads: a manager that flushes waits for that, too."""
        return bool(super().has_pending_requests() or (self.exchange is not None and self.exchange.holds_blocks))

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        """Publish what the last step has filled, start reads for which there is room, and schedule a step.

        Where nothing fits because kvxfer has the blocks, there is no step until it gives some back. Without that transformers would
        end its loop.
        """
        exchange = self.exchange
        if exchange is None:
            return super().schedule_batch(token_budget, cache_budget)
        for state in self.active_requests.values():
            exchange.prefills.publish_full_blocks(state)
        if exchange.prompts.any_waits:
            in_margin = self.cache.compute_free_capacity() >= self.safety_margin
            self._loads_ended(exchange.prompts.start(in_margin=in_margin, engine_idle=not self.active_requests))
        scheduled = super().schedule_batch(token_budget, cache_budget)
        if scheduled[0] is None and exchange.holds_blocks:
            return [], *scheduled[1:]
        return scheduled

    def finish_request(self, request_id: str) -> None:
        """Free the blocks of a request, unless another engine is to read them first."""
        if self.exchange is not None:
            self.exchange.finished(request_id, self.active_requests.get(request_id))
        super().finish_request(request_id)

    def _loads_ended(self, ends: list[LoadEnd]) -> None:
        """Let requests run whose KV is here, or is computed here after all; or have them fail."""
        for end in ends:
            request_id = end.state.request_id
            if self.waiting_requests.get(request_id) is not end.state:
                continue
            if end.loaded:
                # As after a match in the prefix cache.
                del self.waiting_requests[request_id]
                self.active_requests[request_id] = end.state
                end.state.status = RequestStatus.PREFILLING
            elif end.error is None or (self.exchange is not None and self.exchange.recomputes):
                self.waiting_requests_order.appendleft(request_id)
            elif self.exchange is not None:
                del self.waiting_requests[request_id]
                self.exchange.fail(end.state, end.error)


class LeaseFIFOScheduler(LeaseScheduling, FIFOScheduler):
    """transformers' ``fifo`` with leases."""


class LeasePrefillFirstScheduler(LeaseScheduling, PrefillFirstScheduler):
    """transformers' ``prefill_first`` with leases."""


_SCHEDULERS = {"fifo": LeaseFIFOScheduler, "prefill_first": LeasePrefillFirstScheduler}


def register(scheduler_type: str) -> str:
    """Register the scheduler with leases in transformers' table, and return its name there.

    Raises:
        ConfigError: there is none of this type.
    """
    if scheduler_type.removeprefix("kvxfer_") not in _SCHEDULERS:
        raise ConfigError(f"scheduler_type must be one of {', '.join(_SCHEDULERS)}, not {scheduler_type!r}")
    name = f"kvxfer_{scheduler_type.removeprefix('kvxfer_')}"
    SCHEDULER_MAPPING[name] = _SCHEDULERS[scheduler_type.removeprefix("kvxfer_")]
    return name

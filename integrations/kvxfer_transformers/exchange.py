# SPDX-License-Identifier: Apache-2.0
"""One engine's transfers: its endpoint, the requests that others have the KV of, and those whose KV others will read."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from transformers.generation.continuous_batching.requests import RequestStatus

from kvxfer_serving.refusals import RefusalReason, RefusedParams
from kvxfer_transformers.loads import LeasedPrompts
from kvxfer_transformers.prefills import SharedPrefills
from kvxfer_transformers.requests import answer

if TYPE_CHECKING:
    from collections import Counter

    from kvxfer.endpoint import Endpoint
    from kvxfer.errors import KvxferError
    from kvxfer.secret import Secret
    from kvxfer_transformers.outputs import LeaseOutputRouter
    from kvxfer_transformers.paged_cache import PagedCacheView

logger = logging.getLogger(__name__)


class Exchange:
    """Transfers of one life of an engine's loop. The scheduler calls it, on the engine's thread.

    Args:
        endpoint: of this engine.
        view: of its cache.
        outputs: where requests fail, and where the parameters of prefills are handed out.
        refused: counts parameters that were not followed, by reason.
        recomputes: a request whose KV cannot be read is computed here; else it fails.
        secret: of all engines.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        view: PagedCacheView,
        outputs: LeaseOutputRouter,
        refused: Counter[str],
        *,
        recomputes: bool,
        secret: Secret | None,
    ) -> None:
        self.endpoint = endpoint
        self.recomputes = recomputes
        self.prompts = LeasedPrompts(endpoint, view)
        self.prefills = SharedPrefills(endpoint, view)
        self._view = view
        self._outputs = outputs
        self._refused = refused
        self._secret = secret

    @property
    def holds_blocks(self) -> bool:
        """Whether kvxfer has blocks that it will give back."""
        return self.prompts.hold_blocks or self.prefills.hold_blocks

    def admit(self, state: Any) -> bool:
        """Begin the transfers that a new request asks for; whether it waits for its KV.

        Raises:
            ValueError: another request has its id, or it is larger than the cache.
        """
        wish = self._outputs.wishes.pop(state.request_id, None)
        if wish is None:
            return False
        request_id, tokens = state.request_id, state.initial_tokens
        if self.prompts.knows(request_id) or self.prefills.knows(request_id):
            raise ValueError(f"a request with the id {request_id!r} is under way")
        if not self._view.fits(len(tokens) + 1):
            raise ValueError(f"a prompt of {len(tokens)} tokens is larger than the whole cache")
        refused = wish.refused
        if wish.read is not None and not self.prompts.claim(wish.read):
            refused = RefusedParams(RefusalReason.LEASE_USED, "another request has, or had, this lease")
        if refused is not None:
            self._refused[refused.reason.value] += 1
            logger.warning(
                "Request %s: its kv_transfer_params are not followed (%s): %s",
                request_id,
                refused.reason.value,
                refused.detail,
            )
        if wish.shares:
            lease = wish.lease(request_id, self.endpoint.name, self.endpoint.address, self._secret)
            self.prefills.begin(request_id, lease)
        if wish.read is None or refused is not None:
            return False
        self.prompts.begin(state, wish.read)
        return True

    def cancelled(self, request_id: str) -> None:
        """End the transfers of a request whose client has gone."""
        self.prompts.cancel(request_id)
        self.prefills.cancel(request_id)

    def finished(self, request_id: str, state: Any) -> None:
        """Share the blocks of a request that has ended, if it was for another engine."""
        if not self.prefills.knows(request_id):
            return
        if not self._view.has(request_id):
            self.prefills.preempted(request_id)
        elif state is None or state.status != RequestStatus.FINISHED:
            self.prefills.cancel(request_id)
        else:
            self._share(request_id, state)

    def _share(self, request_id: str, state: Any) -> None:
        shared = self.prefills.finish(request_id, state)
        if shared is not None:
            lease, tables = shared
            self._outputs.answers[request_id] = answer(lease, [list(table.ids) for table in tables])

    def fail(self, state: Any, error: KvxferError) -> None:
        """Have a request fail by a named error."""
        self._outputs.fail_and_deliver(state, RuntimeError(f"{type(error).__name__}: {error}"))

    def close(self) -> None:
        """End all transfers, after the engine's loop has ended. Consumers of leased blocks are told."""
        self.endpoint.close()
        self.prompts.forget_all()
        self.prefills.forget_all()
        self._outputs.wishes.clear()

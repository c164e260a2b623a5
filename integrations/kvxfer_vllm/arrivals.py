# SPDX-License-Identifier: Apache-2.0
"""Requests by what became of the transfer that they were to have, and a warning where a fault of the router is likely.

A request that is computed locally has right tokens, so a pair that never transfers anything looks healthy from outside. One warning
is given for each kind of fault, when many requests in turn show it; it is given again if it comes back, at most once an hour.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from kvxfer_serving.refusals import RefusalReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer_serving.transfer_params import Role
    from kvxfer_vllm.stats import KvxferStats

logger = logging.getLogger(f"vllm.{__name__}")

PLAIN_IN_TURN: Final = 100
LOCAL_IN_TURN: Final = 20
"""Requests in turn after which a warning is given."""
_AGAIN_S = 3600.0

FAILED_TRANSFER: Final = "failed_transfer"
CACHES_DROPPED: Final = "caches_dropped"
LOCAL_REASONS: Final = (
    *(reason.value for reason in RefusalReason if reason is not RefusalReason.NO_MEDIA),
    FAILED_TRANSFER,
    CACHES_DROPPED,
)
"""Reasons for which a request that asked for a transfer is computed locally: of its parameters, a failed transfer with the policy
``recompute``, or a reset of the engine's caches."""

_LIKELY = {
    RefusalReason.NO_LEASE.value: "the prefill server runs another connector, or the proxy drops the key kvxfer",
    RefusalReason.NOT_A_CONSUMER.value: "the router's lists of prefill and decode servers are swapped, or kv_role is wrong",
    RefusalReason.NOT_A_PRODUCER.value: "the router's lists of prefill and decode servers are swapped, or kv_role is wrong",
    RefusalReason.OWN_ENGINE.value: "the router sends both halves of a request to this server",
    RefusalReason.OTHER_PROMPT.value: "the two servers get different prompts, or have different tokenizers or models",
    RefusalReason.OTHER_WEIGHTS.value: "only one of the two servers has the new weights",
    RefusalReason.OTHER_MODE.value: 'the router sends requests to both servers at once, and "mode" is pull here',
    RefusalReason.NO_PRODUCER.value: "remote_bootstrap_addr leads to no prefill server with kvxfer",
    FAILED_TRANSFER: "the logged errors of the transfers say why; kvxfer doctor --peer HOST:PORT tries the link",
}


class Arrivals:
    """Requests of one engine. All methods run on the engine's thread.

    Args:
        stats: where they are counted.
        role: of this server, for the warning.
        recomputes: a request whose transfer has failed is computed locally (``kv_load_failure_policy`` is ``recompute``).
        now: the clock.
    """

    def __init__(
        self, stats: KvxferStats, role: Role, *, recomputes: bool, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._stats = stats
        self._server = {(True, False): "prefill ", (False, True): "decode "}.get(
            (role.is_producer, role.is_consumer), ""
        )
        self._recomputes = recomputes
        self._now = now
        self._plain_in_turn = 0
        self._local_in_turn: Counter[str] = Counter()
        self._quiet_until = dict.fromkeys(("plain", "local"), float("-inf"))

    def plain(self) -> None:
        """Count a request whose parameters ask for nothing."""
        self._stats.count("plain_requests")
        self._plain_in_turn += 1
        if self._plain_in_turn == PLAIN_IN_TURN and self._may_warn("plain"):
            logger.warning(
                "%d requests in turn came to this %sserver and none had kv_transfer_params that ask for a transfer: the router sends "
                "plain requests; check its --kv-connector and its lists of prefill and decode servers",
                PLAIN_IN_TURN,
                self._server,
            )

    def asked(self) -> None:
        """Take a request whose parameters ask for a transfer."""
        self._plain_in_turn = 0

    def served(self) -> None:
        """Take a request whose transfer goes as it was asked for."""
        self._local_in_turn.clear()

    def transfer_failed(self) -> None:
        """Count a request whose transfer has failed, if it is computed now."""
        if self._recomputes:
            self.local(FAILED_TRANSFER)

    def local(self, reason: str) -> None:
        """Count a request that asked for a transfer and is computed locally."""
        self._stats.count("local_requests", label=reason)
        self._local_in_turn[reason] += 1
        if self._local_in_turn.total() == LOCAL_IN_TURN and self._may_warn("local"):
            (most, number), *_ = self._local_in_turn.most_common()
            logger.warning(
                "%d requests in turn asked this %sserver for a transfer and all were computed locally (%s: %d)%s",
                LOCAL_IN_TURN,
                self._server,
                most,
                number,
                f": {_LIKELY[most]}" if most in _LIKELY else "",
            )

    def _may_warn(self, kind: str) -> bool:
        """Whether a warning of this kind is due; then it is given."""
        now = self._now()
        if now < self._quiet_until[kind]:
            return False
        self._quiet_until[kind] = now + _AGAIN_S
        return True

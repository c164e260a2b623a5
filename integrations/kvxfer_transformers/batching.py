# SPDX-License-Identifier: Apache-2.0
"""`KvxferBatchingManager`: transformers' manager of continuous batching as producer and consumer of kvxfer."""

from __future__ import annotations

import copy
import logging
import secrets
import socket
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from kvxfer import registry
from kvxfer.endpoint import Endpoint
from kvxfer.errors import ConfigError
from kvxfer.layout.checks import MAX_GROUPS
from kvxfer.secret import Secret
from kvxfer_serving.transfer_params import Role
from kvxfer_transformers import scheduler, seams
from kvxfer_transformers.exchange import Exchange
from kvxfer_transformers.fingerprint import model_fingerprint
from kvxfer_transformers.outputs import LeaseOutputRouter
from kvxfer_transformers.paged_cache import PagedCacheView, fitting_page, left_to_decode
from kvxfer_transformers.requests import wish_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvxfer.buffers.cache import BufferMaker
    from kvxfer.config import Settings
    from kvxfer.registry import AgentChoice

logger = logging.getLogger(__name__)

Policy = Literal["fail", "recompute"]
_BUFFERS = {"cpu": "host", "cuda": "cuda"}


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """Options of an engine's transfers; those without a description are `Endpoint`'s.

    Attributes:
        role: ``kv_producer`` follows no lease, ``kv_consumer`` makes none. As vLLM's ``kv_role``.
        kv_load_failure_policy: ``"fail"``: a request whose KV cannot be read fails by the error's name. ``"recompute"``: its prompt is
            computed here. As vLLM's option.
        model_fingerprint: replaces what is computed of the model's configuration and weights, for engines that are told the same.
    """

    agent: AgentChoice = "nixl"
    agent_options: Mapping[str, Any] = field(default_factory=dict)
    bind: str = "tcp://127.0.0.1:0"
    advertise: str | None = None
    name: str | None = None
    settings: Settings | None = None
    secret: Secret | None = None
    allow_unauthenticated: bool | None = None
    verify: bool = False
    convert: bool = False
    role: Literal["kv_both", "kv_producer", "kv_consumer"] = "kv_both"
    kv_load_failure_policy: Policy = "fail"
    model_fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.kv_load_failure_policy not in ("fail", "recompute"):
            raise ConfigError(f"kv_load_failure_policy must be fail or recompute, not {self.kv_load_failure_policy!r}")


class KvxferBatchingManager(ContinuousBatchingManager):
    """Manager of continuous batching whose requests may continue what another engine has computed, and the other way round.

    It is used as transformers' own. `add_request` takes ``kv_transfer_params`` beside the rest: ``{"do_remote_decode": True}`` prefills
    a prompt, with one token, for another engine; the output's ``kv_transfer_params`` then go with the prompt to `add_request` of that
    engine. A request that was prefilled elsewhere skips the tokens whose KV is read.

    Args:
        model: of transformers.
        generation_config: by default the model's.
        continuous_batching_config: as for transformers; asynchronous batching is off. By default pages fit into the model's window.
        workload_hints: as for transformers.
        transfer: options of the transfers.

    Attributes:
        refused_params: number of ``kv_transfer_params`` that were not followed, by the reasons of `kvxfer_serving.transfer_params`.

    Raises:
        ConfigError: a configuration that is not supported; the message says what, and what would be.
    """

    def __init__(
        self,
        model: Any,
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        workload_hints: Any = None,
        *,
        transfer: TransferOptions | None = None,
    ) -> None:
        seams.check()
        config = copy.copy(continuous_batching_config)
        if config is None:
            config = ContinuousBatchingConfig()
            config.page_size = fitting_page(model, config.page_size)
        if config.use_async_batching:
            # A request that has ended may be in the step under way, which writes to its blocks.
            raise ConfigError(
                "kvxfer_transformers does not support asynchronous batching yet: leave use_async_batching out"
            )
        config.use_async_batching = False
        config.scheduler_type = scheduler.register(config.scheduler_type)
        if model.device.type not in _BUFFERS:
            raise ConfigError(
                f"kvxfer_transformers does not support the device {model.device.type!r}, only {', '.join(_BUFFERS)}"
            )
        super().__init__(model, generation_config or model.generation_config, config, workload_hints)
        seams.check_made(self, "ContinuousBatchingManager")
        if self.distributed_helper.tp_size > 1:
            raise ConfigError(
                "kvxfer_transformers does not support tensor parallelism yet: use one process for each model"
            )
        self._left_to_decode = left_to_decode(model)
        self.batch_processor: Any
        self.output_router = LeaseOutputRouter()
        seams.check_made(self.output_router, "OutputRouter")
        self.transfer = transfer or TransferOptions()
        self.name = self.transfer.name or f"{socket.gethostname()}-{secrets.token_hex(6)}"
        self._secret = self.transfer.secret or Secret.resolve()
        self.refused_params: Counter[str] = Counter()
        self._exchange: Exchange | None = None
        self._view: PagedCacheView | None = None

    @property
    def endpoint(self) -> Endpoint | None:
        """This engine's endpoint, from `start` until the loop has ended."""
        return self._exchange.endpoint if self._exchange is not None else None

    def fits(self, num_tokens: int) -> bool:
        """Whether the whole cache could hold a request of so many tokens, prompt and answer. From `start` on; any thread."""
        return self._view is None or self._view.fits(num_tokens)

    def cache_use(self) -> float:
        """Share of the cache that requests and leases have. Any thread."""
        return 0.0 if self._view is None else self._view.used_share()

    def start(self) -> None:
        """Start the engine's thread. Raises ConfigError or another error of kvxfer if the cache cannot be shared."""
        if not self.is_running() and self.batch_processor is None:
            self.batch_processor = self._create_batch_processor()
        super().start()

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        *more: Any,
        kv_transfer_params: Any = None,
        **rest: Any,
    ) -> str | None:
        """Add a request, as transformers' method, with ``kv_transfer_params``.

        Parameters that cannot be followed are counted and logged, and the request is computed as if it had come without.
        """
        role = Role(
            self.name,
            is_producer=self.transfer.role != "kv_consumer",
            is_consumer=self.transfer.role != "kv_producer",
            max_groups=MAX_GROUPS,
            addresses=self._addresses(),
        )
        wish = wish_of(kv_transfer_params, input_ids, role, self._secret, left_to_decode=self._left_to_decode)
        if wish is not None:
            request_id = request_id if request_id is not None else f"kvxfer-{secrets.token_hex(8)}"
            if wish.shares and self.num_return_sequences > 1:
                raise ConfigError("a prefill for another engine has one answer: set num_return_sequences to 1")
            if wish.shares:
                more, rest = more[1:], {**rest, "max_new_tokens": 1}
            self.output_router.wishes[request_id] = wish
        added: str | None = super().add_request(input_ids, request_id, *more, **rest)
        if added is None and request_id is not None:
            self.output_router.wishes.pop(request_id, None)
        return added

    def _addresses(self) -> tuple[str, ...]:
        return (self._exchange.endpoint.address,) if self._exchange is not None else ()

    def _create_batch_processor(self) -> Any:
        """Make transformers' batch processor and its cache, and start the endpoint on the cache."""
        processor = super()._create_batch_processor()
        if self._exchange is None:
            view = self._view = PagedCacheView(processor.cache)
            options = self.transfer
            fingerprint = model_fingerprint(self.model, options.model_fingerprint)
            device = "rocm" if torch.version.hip is not None else self.model.device.type
            buffers = cast("BufferMaker", registry.load(_BUFFERS.get(device, device), "buffers"))
            endpoint = Endpoint(
                view.describe(fingerprint, buffers),
                options.agent,
                bind=options.bind,
                name=self.name,
                agent_options=options.agent_options,
                advertise=options.advertise,
                settings=options.settings,
                convert=options.convert,
                verify=options.verify,
                secret=self._secret,
                allow_unauthenticated=options.allow_unauthenticated,
                on_event=self._wake_up_loop.set,
            )
            recomputes = options.kv_load_failure_policy == "recompute"
            self._exchange = Exchange(
                endpoint, view, self.output_router, self.refused_params, recomputes=recomputes, secret=self._secret
            )
        processor.scheduler.attach(self._exchange)
        return processor

    def _run_generation_loop(self) -> None:
        """Run the engine's loop; its transfers end with it."""
        try:
            super()._run_generation_loop()
        finally:
            exchange, self._exchange = self._exchange, None
            if exchange is not None:
                exchange.close()

# SPDX-License-Identifier: Apache-2.0
"""Two things that vLLM (0.31 to 0.33) has no connector's hook for: to fail one request, and to learn of new weights."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output.request import StructuredOutputRequest

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(f"vllm.{__name__}")


def fail_request(request: Request, reason: str) -> None:
    """Have vLLM answer a request that waits with an error, whatever its policy for failed loads is.

    vLLM fails single requests for a grammar that cannot be compiled, so the request waits for such a one.
    """
    wanted = StructuredOutputRequest(StructuredOutputsParams(json_object=True))
    wanted._grammar = ValueError(reason)  # noqa: SLF001 - vLLM sets it by way of a future
    request.structured_output_request = wanted
    request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR


def watch_weights() -> None:
    """Have each engine of this process tell its connectors which version its weights get; may be called again.

    vLLM tells no connector of an update. The version is what a trainer gives with ``/finish_weight_update`` or
    ``/update_weight_version``. A connector is told by its method ``weights_updated``, on the engine's thread.
    """
    from vllm.v1.engine.core import EngineCore  # noqa: PLC0415 - imports this connector's caller

    original = getattr(EngineCore, "set_weight_version", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def set_weight_version(self: EngineCore, weight_version: str) -> None:
        original(self, weight_version)
        connector: Any = self.scheduler.get_kv_connector()
        for each in (connector, *getattr(connector, "sub_connectors", ())):
            if hasattr(each, "weights_updated"):
                each.weights_updated(weight_version)

    EngineCore.set_weight_version = set_weight_version

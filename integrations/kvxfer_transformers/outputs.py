# SPDX-License-Identifier: Apache-2.0
"""Outputs of requests that were prefilled for another engine: they carry the ``kv_transfer_params`` for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput

if TYPE_CHECKING:
    from kvxfer_transformers.requests import TransferWish


@dataclass
class LeasedOutput(GenerationOutput):
    """Output of a finished prefill; ``kv_transfer_params`` go with the request to the engine that continues it."""

    kv_transfer_params: dict[str, Any] | None = None


class LeaseOutputRouter(OutputRouter):
    """transformers' router of outputs, which adds the parameters of finished prefills.

    Attributes:
        answers: parameters by request id, from the end of a prefill until its output is delivered.
        wishes: what requests ask for, by id, until they are admitted or refused.
        drop_unclaimed: an output that no handler is registered for is dropped. Else it waits in the queue of the manager.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[str, dict[str, Any]] = {}
        self.wishes: dict[str, TransferWish] = {}
        self.drop_unclaimed = False

    def deliver(self, output: Any) -> None:
        """Deliver one output."""
        self.wishes.pop(output.request_id, None)  # of a request that transformers has refused
        if self._is_claimed(output):
            super().deliver(self._with_answer(output))

    def deliver_batch(self, outputs: list[Any]) -> None:
        """Deliver the outputs of a step."""
        super().deliver_batch([self._with_answer(output) for output in outputs if self._is_claimed(output)])

    def forget(self, request_id: str) -> None:
        """Remove the handler of a request, whose further outputs no client waits for."""
        with self._lock:
            self.result_handlers.pop(request_id, None)

    def _is_claimed(self, output: Any) -> bool:
        if not self.drop_unclaimed or output.request_id in self.result_handlers:
            return True
        self.answers.pop(output.request_id, None)
        return False

    def _with_answer(self, output: Any) -> Any:
        answer = self.answers.pop(output.request_id, None)
        return output if answer is None else LeasedOutput(**vars(output), kv_transfer_params=answer)

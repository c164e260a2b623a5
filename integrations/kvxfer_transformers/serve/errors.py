# SPDX-License-Identifier: Apache-2.0
"""Errors that a client is told, with the HTTP status of each."""

from __future__ import annotations

from kvxfer.errors import KvxferError


class RequestError(KvxferError):
    """Request that has no answer.

    Cure: See the errors below it.

    Attributes:
        status: of HTTP.
        kind: ``type`` in the answer, as vLLM names it.
        field: that the error is about.
    """

    status = 500
    kind = "InternalServerError"

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def as_json(self) -> dict[str, object]:
        """Body of the answer."""
        error = {"message": str(self), "type": self.kind, "param": self.field, "code": self.status}
        return {"error": error}


class BadRequestError(RequestError):
    """Request that is wrong, or asks for what is not supported.

    Cure: Correct the request: the answer names the field.
    """

    status, kind = 400, "BadRequestError"


class UnknownModelError(RequestError):
    """Request for a model that is not served.

    Cure: Ask for a name that ``GET /v1/models`` lists.
    """

    status, kind = 404, "NotFoundError"


class GenerationFailedError(RequestError):
    """Request that the engine has failed, such as one whose KV could not be read.

    Cure: The server's log names the error of the transfer; ``kv_load_failure_policy`` recompute computes the prompt.
    """


class EngineEndedError(RequestError):
    """Engine that has ended, or is about to.

    Cure: Send the request to another server, and restart this one.
    """

    status, kind = 503, "ServiceUnavailableError"

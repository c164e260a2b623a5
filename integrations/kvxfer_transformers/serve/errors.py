# SPDX-License-Identifier: Apache-2.0
"""Errors that a client is told, with the HTTP status of each."""

from __future__ import annotations

from kvxfer.errors import KvxferError


class RequestError(KvxferError):
    """Request that has no answer.

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
    """Request that is wrong, or asks for what is not supported."""

    status, kind = 400, "BadRequestError"


class UnknownModelError(RequestError):
    """Request for a model that is not served."""

    status, kind = 404, "NotFoundError"


class GenerationFailedError(RequestError):
    """Request that the engine has failed, such as one whose KV could not be read."""


class EngineEndedError(RequestError):
    """Engine that has ended, or is about to."""

    status, kind = 503, "ServiceUnavailableError"

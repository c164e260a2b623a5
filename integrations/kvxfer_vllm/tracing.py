# SPDX-License-Identifier: Apache-2.0
"""OpenTelemetry spans of transfers, as parts of the request's trace in vLLM.

vLLM hands a request's ``traceparent`` on where it exports traces (``--otlp-traces-endpoint``); without it nothing here is called.
Spans are made when a transfer or a lease has ended, of the times that the endpoint noted.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from kvxfer.protocol.transfer import LeaseExpired, LeaseRevoked

if TYPE_CHECKING:
    from kvxfer.protocol.transfer import Transfer
    from kvxfer_vllm.endpoint_group import LeaseEvent
    from kvxfer_vllm.metadata import Traced

logger = logging.getLogger(f"vllm.{__name__}")


class Spans:
    """Spans of one worker.

    Args:
        tracer: of OpenTelemetry.
    """

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer

    @classmethod
    def of(cls, vllm_config: Any) -> Spans | None:
        """Make spans that go where vLLM's go; None if vLLM exports none, or a package is missing."""
        endpoint = getattr(getattr(vllm_config, "observability_config", None), "otlp_traces_endpoint", None)
        if not endpoint:
            return None
        try:
            from vllm.tracing import init_tracer  # noqa: PLC0415 - only where traces are exported

            tracer = init_tracer("kvxfer", endpoint)
        except Exception as error:  # noqa: BLE001 - a vendor's; a server works without traces
            logger.warning("kvxfer exports no spans: %s; pip install 'kvxfer[otel]'", error)
            return None
        return cls(tracer) if tracer is not None else None

    def loaded(self, request_id: str, traced: Traced, transfer: Transfer) -> None:
        """Export the spans of one rank's read: the whole, and its steps inside it."""
        since, times = time.time() - time.monotonic(), transfer.times
        end = times.ended or times.started + transfer.seconds
        attributes: dict[str, Any] = {
            "kvxfer.request": request_id,
            "kvxfer.producer": transfer.ref.producer,
            "kvxfer.peer": transfer.ref.addresses[0].removeprefix("tcp://"),
            "kvxfer.bytes": transfer.nbytes,
            "kvxfer.via": transfer.via,
            "kvxfer.route": transfer.route,
        }
        whole = self._start("kvxfer.load", self._context(traced), since + times.started, attributes)
        error = transfer.error
        self._fail(whole, None if error is None else f"{type(error).__name__}: {error}")
        inside = self._inside(whole)
        steps = ("kvxfer.announce", "kvxfer.first_byte", "kvxfer.last_byte", "kvxfer.lease_check")
        for name, start, stop in zip(
            steps, times, (*times[1:-1], end if transfer.error is None else 0.0), strict=False
        ):
            if start and stop:
                self._start(name, inside, since + start, {}).end(_ns(since + stop))
        whole.end(_ns(since + end))

    def leased(self, request_id: str, traced: Traced, event: LeaseEvent) -> None:
        """Export the span of a lease: from the arrival of its request to its end."""
        if isinstance(event, LeaseExpired):
            end = "expired"
        elif isinstance(event, LeaseRevoked):
            end = "revoked"
        else:
            end = "read" if event.read else "unread"
        span = self._start(
            "kvxfer.lease",
            self._context(traced),
            traced.arrived,
            {"kvxfer.request": request_id, "kvxfer.lease_end": end},
        )
        self._fail(span, "no consumer read its KV in time" if end == "expired" else None)
        span.end()

    def _context(self, traced: Traced) -> Any:
        from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415 - only where traces are exported
            TraceContextTextMapPropagator,
        )

        return TraceContextTextMapPropagator().extract(traced.headers)

    def _inside(self, span: Any) -> Any:
        from opentelemetry.trace import set_span_in_context  # noqa: PLC0415 - only where traces are exported

        return set_span_in_context(span)

    def _start(self, name: str, context: Any, at: float, attributes: dict[str, Any]) -> Any:
        return self._tracer.start_span(name, context=context, start_time=_ns(at), attributes=attributes)

    def _fail(self, span: Any, reason: str | None) -> None:
        from opentelemetry.trace import Status, StatusCode  # noqa: PLC0415 - only where traces are exported

        if reason:
            span.set_status(Status(StatusCode.ERROR, reason))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)

# SPDX-License-Identifier: Apache-2.0
"""Spans of transfers are part of the request's trace, reach an OTLP receiver, and are none without a trace."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvxfer_vllm.tracing import Spans
from tests.vllm.rig import drain, handed_over, prompt_of, vllm_config

pytestmark = pytest.mark.vllm

TRACE = "0af7651916cd43dd8448eb211c80319c"
HEADERS = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
STEPS = ["kvxfer.announce", "kvxfer.first_byte", "kvxfer.last_byte", "kvxfer.lease_check"]

RECEIVER = """
import http.server, sys
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        told = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        for resource in told.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    print(self.path, span.trace_id.hex(), span.name, flush=True)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_): ...

server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def _handed_over(producer, consumer, headers):
    """Move one request from one engine to the other, with these headers."""
    prompt = prompt_of(100)
    params = handed_over(producer, "p", prompt, trace_headers=headers)
    consumer.add("d", prompt, params, max_tokens=2, trace_headers=headers)
    consumer.run()
    drain(producer, consumer)


def _spans(exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Spans(provider.get_tracer("kvxfer"))


@pytest.mark.parametrize("headers", [HEADERS, None], ids=["traced", "untraced"])
def test_spans_join_the_requests_trace(engines, headers):
    """A load has a span with its steps one after the other inside, and a lease has one, all in the client's trace; none without one."""
    producer, consumer = (engines(role, n, agent="inproc") for role, n in (("kv_producer", "P"), ("kv_consumer", "D")))
    exporters = InMemorySpanExporter(), InMemorySpanExporter()
    for engine, exporter in zip((producer, consumer), exporters, strict=True):
        engine.kvxfer.worker_half.spans = _spans(exporter)
    _handed_over(producer, consumer, headers)
    leases, loads = (exporter.get_finished_spans() for exporter in exporters)
    if headers is None:
        assert leases == loads == ()
        return
    assert [(span.name, span.attributes["kvxfer.lease_end"]) for span in leases] == [("kvxfer.lease", "read")]
    assert [span.name for span in loads] == [*STEPS, "kvxfer.load"]
    *steps, whole = loads
    assert {format(span.context.trace_id, "032x") for span in (*leases, *loads)} == {TRACE}
    assert format(whole.parent.span_id, "016x") == "b7ad6b7169203331"
    assert all(step.parent.span_id == whole.context.span_id for step in steps)
    bounds = [steps[0].start_time, *(step.end_time for step in steps)]
    assert bounds == sorted(bounds) and [step.start_time for step in steps] == bounds[:-1]
    assert abs(whole.start_time - bounds[0]) < 1e6 and abs(whole.end_time - bounds[-1]) < 1e6
    assert whole.attributes["kvxfer.bytes"] == consumer.stats["transfer_bytes"][0]
    assert leases[0].start_time <= whole.start_time


def test_an_otlp_receiver_gets_them(engines):
    """Another process that receives OTLP gets the spans of a load and of its lease."""
    receiver = subprocess.Popen([sys.executable, "-c", RECEIVER], stdout=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{int(receiver.stdout.readline())}/v1/traces"
        producer, consumer = (
            engines(role, n, agent="inproc") for role, n in (("kv_producer", "P"), ("kv_consumer", "D"))
        )
        for engine in (producer, consumer):
            engine.kvxfer.worker_half.spans = _spans(OTLPSpanExporter(endpoint=url))
        _handed_over(producer, consumer, HEADERS)
        got = sorted(receiver.stdout.readline().split() for _ in range(len(STEPS) + 2))
        assert got == sorted(["/v1/traces", TRACE, name] for name in (*STEPS, "kvxfer.load", "kvxfer.lease"))
    finally:
        receiver.kill()
        receiver.wait()
        receiver.stdout.close()


def test_vllms_endpoint_turns_them_on(monkeypatch):
    """Without --otlp-traces-endpoint nothing is made, and with it the spans go to that endpoint."""
    asked = []
    monkeypatch.setattr("vllm.tracing.init_tracer", lambda name, endpoint: asked.append((name, endpoint)) or object())
    config = vllm_config()
    assert Spans.of(config) is None and asked == []
    config.observability_config.otlp_traces_endpoint = "grpc://collector:4317"
    assert Spans.of(config) is not None
    assert asked == [("kvxfer", "grpc://collector:4317")]

"""Traces by OpenTelemetry's protocol (OTLP). Ray Serve makes the spans of requests and of calls between deployments.

In: OpenTelemetry's environment variables, such as OTEL_EXPORTER_OTLP_ENDPOINT. Out: the exporter that
RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH=serve.tracing:otlp names, and attributes of the span of a chat. Without that
variable there are no traces. Needs the extra `traces`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from prefill_router.errors import InputError

INSTALL = "pip install 'prefill-router[traces]'"


def otlp() -> list[SpanProcessor]:
    """The span processors of a replica. Raises InputError if the exporter is not installed."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise InputError(
            f"RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH: traces need OpenTelemetry's exporter; {INSTALL}"
        ) from None
    return [BatchSpanProcessor(OTLPSpanExporter())]


def note(router: Mapping[str, Any], tokens: tuple[int, int] | None = None) -> None:
    """Adds what a chat's reply says about the router, and the reported tokens, to the span of the request."""
    span = trace.get_current_span()
    if not span.is_recording():
        return
    names = ("decision_id", "reason", "confidence", "novelty", "cost_usd", "lambda", "checkpoint", "overhead_ms")
    found = {f"router.{name}": router[name] for name in names} | {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": router["requested"],
        "gen_ai.response.model": router["served"],
        "router.fallbacks": len(router["fallbacks"]),
    }
    if tokens is not None:
        found |= {"gen_ai.usage.input_tokens": tokens[0], "gen_ai.usage.output_tokens": tokens[1]}
    span.set_attributes({name: value for name, value in found.items() if value is not None})

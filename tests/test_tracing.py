"""Traces of a running server, which an OTLP receiver gets."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from serve_application import save_checkpoints
from stub_upstream import stub_upstream

from jobs.demo import run_server
from serve.tracing import note

pytestmark = pytest.mark.ray
ATTRIBUTES = {
    "gen_ai.request.model": "auto",
    "gen_ai.response.model": "cheap",
    "gen_ai.usage.input_tokens": 10,
    "router.reason": "score",
}


@pytest.fixture
def received() -> Iterator[tuple[str, list[Any]]]:
    """The URL of an OTLP receiver, and the spans that it has got."""
    spans: list[Any] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", spans
    server.shutdown()


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def test_a_chat_is_one_trace_with_its_decision(
    minilm: str, received: tuple[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, spans = received
    save_checkpoints(tmp_path, minilm)
    for name, value in {
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "serve.tracing:otlp",
        "RAY_SERVE_TRACING_SAMPLING_RATIO": "1",
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }.items():
        monkeypatch.setenv(name, value)
    with stub_upstream() as stub:
        options = {"gateway": {"endpoints": {"cheap": {"base_url": stub.url}}}}
        (tmp_path / "serve.yaml").write_text(yaml.safe_dump(options))
        with run_server(str(tmp_path / "cheap"), "--config", str(tmp_path / "serve.yaml")) as server:
            for stream in (False, True):
                body = {"model": "auto", "messages": [{"role": "user", "content": "What is 2 + 2?"}], "stream": stream}
                assert httpx.post(f"{server}/v1/chat/completions", json=body, timeout=60).status_code == 200
    chats = [span for span in spans if attributes(span).items() >= ATTRIBUTES.items()]
    assert len(chats) == 2
    for chat in chats:
        names = " ".join(span.name for span in spans if span.trace_id == chat.trace_id)
        assert "Encoder" in names, names
        assert "Router" in names


def test_without_a_trace_nothing_is_noted() -> None:
    note(json.loads('{"fallbacks": []}'))  # no field is read

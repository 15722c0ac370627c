"""A server that answers as a vLLM server with pooled states does, for tests that need no vLLM."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from prefill_router.prefill.vllm.wire import encode_states

COLUMNS = ("last_L2", "last_L3", "mean_L2", "mean_L3")
HIDDEN = 48
WHO = {"weights_digest": "d" * 64, "dtype": "float32"}


class Served(ThreadingHTTPServer):
    """Answers with states that are all the prompt's first token; what it does otherwise, tests set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.columns, self.who, self.fail, self.models = COLUMNS, WHO, {}, {"tiny": 200}
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.busy = self.breaks = 0
        self.short = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Served

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": name, "max_model_len": n} for name, n in self.server.models.items()]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.add(self.headers["Authorization"])
        prompt = body["prompt"]
        if self.server.breaks:
            self.server.breaks -= 1
            self.close_connection = True  # without an answer
        elif self.server.busy:
            self.server.busy -= 1
            self.reply(503, {"error": "busy"})
        elif prompt[0] in self.server.fail:
            self.reply(self.server.fail[prompt[0]], {"error": "no such token"})
        else:
            if self.server.columns == ("error",):
                answer = {"error": "states cannot be pooled: because"} | {"encoder": self.server.who}
                return self.reply(200, {"kv_transfer_params": {"prefill_states": answer}})
            states = np.full((len(self.server.columns), HIDDEN), prompt[0], dtype=np.float32)
            answer = encode_states(len(prompt) - self.server.short, self.server.columns, states)
            self.reply(
                200,
                {
                    "kv_transfer_params": {
                        "prefill_states": answer | ({"encoder": self.server.who} if self.server.who else {})
                    }
                }
                if self.server.columns
                else {},
            )

    def reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def states_server() -> Iterator[Served]:
    """Runs until the block ends; `shutdown` and `server_close` end it earlier."""
    server = Served()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()

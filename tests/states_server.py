"""A fake of a vLLM server with prefill states, for tests without vLLM."""

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
ENCODER = {"weights_digest": "d" * 64, "dtype": "float32"}


class StatesServer(ThreadingHTTPServer):
    """Returns states whose components all equal the prompt's first token id. Tests set failures through its fields.

    `fail`: status code by first token; `n_busy`, `n_broken`: next requests that get a 503 or a closed connection;
    `drop_token`: report one token too few.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.columns, self.encoder, self.fail, self.models = COLUMNS, ENCODER, {}, {"tiny": 200}
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.n_busy = self.n_broken = 0
        self.drop_token = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: StatesServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": name, "max_model_len": n} for name, n in self.server.models.items()]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.keys.add(self.headers["Authorization"])
        prompt = body["prompt"]
        if self.server.n_broken:
            self.server.n_broken -= 1
            self.close_connection = True  # without a response
        elif self.server.n_busy:
            self.server.n_busy -= 1
            self.reply(503, {"error": "busy"})
        elif prompt[0] in self.server.fail:
            self.reply(self.server.fail[prompt[0]], {"error": "no such token"})
        else:
            if self.server.columns == ("error",):
                response = {"error": "states cannot be pooled: because"} | {"encoder": self.server.encoder}
                return self.reply(200, {"kv_transfer_params": {"prefill_states": response}})
            states = np.full((len(self.server.columns), HIDDEN), prompt[0], dtype=np.float32)
            response = encode_states(len(prompt) - self.server.drop_token, self.server.columns, states)
            self.reply(
                200,
                {
                    "kv_transfer_params": {
                        "prefill_states": response | ({"encoder": self.server.encoder} if self.server.encoder else {})
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
def states_server() -> Iterator[StatesServer]:
    """Runs the server during the `with` block; `shutdown` and `server_close` stop it earlier."""
    server = StatesServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()

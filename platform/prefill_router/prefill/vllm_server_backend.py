"""The engine backend: pooled prefill states from a vLLM server that is itself a member of the pool.

In: a table of (query_id, prompt). Out: a table of `activations_schema`, in the same order. Each prompt is one request
of one token to the server (vllm/server.py), which answers with the states of its prefill. If the prompt then goes to
that model to be answered, its keys and values are in the server's prefix cache: the states have cost next to nothing.
The server says whose weights it runs, so that only tokenizer and configuration are read here. Knows nothing of vLLM
beyond its HTTP interface.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
from jaxtyping import Float

from prefill_router.errors import InputError, UnavailableError
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import parse_column, states_table
from prefill_router.prefill.loading import TOKENIZER_FILES, base_class, columns, identify, locate, read_config
from prefill_router.prefill.tokens import PromptTokenizer
from prefill_router.prefill.vllm.wire import ASKED, read_answer

PAUSES = (0.2, 1.0, 5.0, None)  # seconds before a request is made again
# The connection could not be made, or broke: asking again does no harm. Not so a request that takes too long.
BROKEN = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
START = "start one with `python -m prefill_router.prefill.vllm.server MODEL --port PORT`"


class VLLMServerEncoder:
    """A `PrefillEncoder`. Asks the server who it is on construction.

    Raises UnavailableError for a server that is not there, InputError for one that serves another model or precision,
    or does not pool the columns asked for, and as the other backends for the model's files.
    """

    def __init__(self, config: EncoderConfig) -> None:
        folder = locate(config, TOKENIZER_FILES)
        model_config = read_config(folder)
        text = model_config.get_text_config()
        architecture = base_class(model_config)
        self.columns = columns(config, text.num_hidden_layers)
        self._tokenizer = PromptTokenizer(folder, config, getattr(text, "max_position_embeddings", None))
        self._config, self._dtype = config.vllm_server, config.dtype
        key = os.environ.get(config.vllm_server.api_key_env) if config.vllm_server.api_key_env else None
        if config.vllm_server.api_key_env and not key:
            raise InputError(f"vllm_server.api_key_env: {config.vllm_server.api_key_env} is not set in the environment")
        self._client = httpx.Client(
            base_url=config.vllm_server.base_url.rstrip("/"),
            timeout=config.vllm_server.timeout_s,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=config.vllm_server.concurrency, keepalive_expiry=2),
        )  # before the server closes it, after 5 s
        self._model = self._find_model()
        self._encoder = self._identify()
        self.loaded = f"served as {self._model} at {config.vllm_server.base_url}"
        self.info = identify(
            config,
            folder,
            text,
            self._tokenizer,
            architecture=architecture,
            attention="causal",
            digest=self._encoder["weights_digest"],
            backend="vllm_server",
        )

    def __call__(self, prompts: pa.Table) -> pa.Table:
        """See `PrefillEncoder`. A prompt that the server refuses has its reason in `error`; raises UnavailableError
        when the server cannot be reached any more or fails, RuntimeError when its answers do not fit."""
        tokens = self._tokenizer(prompts.column("prompt").to_pylist())
        with ThreadPoolExecutor(self._config.concurrency) as threads:
            answers = list(threads.map(self._read, (one.ids for one in tokens if one.error is None)))
        return states_table(prompts, tokens, answers, self.columns, self.info)

    def bare_seconds(self, prompts: pa.Table) -> float | None:
        """Not known: the engine runs nothing but whole requests."""
        return None

    def close(self) -> None:
        """Closes the connections; the server goes on."""
        self._client.close()

    def _read(self, ids: list[int]) -> Float[np.ndarray, "columns hidden"] | str:
        """The pooled states of a prompt, or why there are none."""
        reply = self._ask(ids)
        if reply.status_code in (400, 413, 422):
            self._check_server()  # is it the prompt, or would it refuse any?
            return f"the server refuses the prompt: {_message(reply)}"
        params = _checked(reply).json().get("kv_transfer_params")
        states = read_answer(params, len(ids), self.columns)
        if params[ASKED].get("encoder") != self._encoder:
            raise self._changed()
        return states

    def _check_server(self) -> None:
        """Raises RuntimeError when the server is not what it was when it was first asked."""
        try:
            same = (self._find_model(), self._identify()) == (self._model, self._encoder)
        except InputError as error:
            raise RuntimeError(str(error)) from None
        if not same:
            raise self._changed()

    def _changed(self) -> RuntimeError:
        return RuntimeError(
            f"engine.base_url: {self._config.base_url} runs other weights than when it was first "
            "asked; load the encoder again"
        )

    def _ask(self, ids: list[int]) -> httpx.Response:
        # Of min_p and the like a model's own defaults might be used, which vLLM refuses where states are read.
        return self._request(
            "POST",
            "completions",
            {
                "model": self._model,
                "prompt": ids,
                "max_tokens": 1,
                "min_p": 0,
                "temperature": 0,
                "kv_transfer_params": {ASKED: True},
            },
        )

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """The server's reply. Where the connection fails, or the server is busy, it is tried again for some seconds."""
        for pause in PAUSES:
            try:
                reply = self._client.request(method, path, json=body)
                if reply.status_code not in (429, 502, 503) or pause is None:
                    return reply
            except httpx.HTTPError as error:
                if pause is None or not isinstance(error, BROKEN):
                    raise UnavailableError(
                        f"engine.base_url: {self._config.base_url} does not answer ({error!r})"
                    ) from None
            time.sleep(pause)
        raise AssertionError("not reached")

    def _find_model(self) -> str:
        where = f"engine.base_url: {self._config.base_url}"
        try:
            reply = self._client.get("models")
        except httpx.HTTPError as error:
            raise UnavailableError(f"{where}: no server answers there ({error}); {START}") from None
        if reply.status_code in (401, 403):
            raise InputError(
                f"vllm_server.api_key_env: the server at {self._config.base_url} wants a key, or another "
                "one; name the environment variable that holds it"
            )
        if reply.is_server_error:
            raise UnavailableError(f"{where}: the server there fails ({reply.status_code}: {_message(reply)})")
        try:  # adapters on the model have no length
            served = {
                str(model["id"]): int(model["max_model_len"])
                for model in _checked(reply).json()["data"]
                if model["max_model_len"] is not None
            }
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: no vLLM server answers there ({error}); {START}") from None
        wanted = self._config.served_model or (next(iter(served)) if len(served) == 1 else None)
        if wanted not in served:
            raise InputError(
                f"engine.served_model: got {self._config.served_model!r}, the server at "
                f"{self._config.base_url} serves {', '.join(served)}"
            )
        if self._tokenizer.max_length >= served[wanted]:  # room for one token of an answer
            raise InputError(
                f"max_length: got {self._tokenizer.max_length}, the server takes prompts of "
                f"{served[wanted] - 1} tokens at most; start it with --max-model-len "
                f"{self._tokenizer.max_length + 1}, or prefill and train with a max_length of that or less"
            )
        return wanted

    def _identify(self) -> dict[str, str]:
        """Whose states the server hands out, by a prompt of one token."""
        where = f"engine.base_url: {self._config.base_url}"
        reply = self._ask([self._tokenizer.pad_id])
        if reply.is_server_error:
            raise UnavailableError(f"{where}: the server fails ({reply.status_code}: {_message(reply)})")
        if reply.is_error:
            raise InputError(f"{where}: the server refuses to hand out states ({reply.status_code}: {_message(reply)})")
        params = reply.json().get("kv_transfer_params") or {}
        encoder = params.get(ASKED, {}).get("encoder")
        if encoder is None:
            raise InputError(f"{where}: the server hands out no prefill states; {START}")
        if "error" in params[ASKED]:
            raise InputError(f"{where}: {params[ASKED]['error']}")
        try:
            read_answer(params, 1, self.columns)
        except RuntimeError as error:
            raise InputError(
                f"layers: {error}; start the server with --layers '{_layers(self.columns)}' or more"
            ) from None
        if encoder["dtype"] != self._dtype:
            raise InputError(
                f"dtype: the server runs in {encoder['dtype']}, asked for is {self._dtype}; set dtype to "
                f"{encoder['dtype']}, or start it with --dtype {self._dtype}"
            )
        return dict(encoder)


def _checked(reply: httpx.Response) -> httpx.Response:
    if reply.is_error:
        kind = UnavailableError if reply.is_server_error or reply.status_code == 429 else RuntimeError
        raise kind(f"{reply.request.url} answered {reply.status_code}: {_message(reply)}")
    return reply


def _message(reply: httpx.Response) -> str:
    return " ".join(reply.text.split())[:200]


def _layers(columns: Sequence[str]) -> list[int]:
    return sorted({parse_column(column)[1] for column in columns})

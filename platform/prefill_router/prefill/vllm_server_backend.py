"""The vLLM-server backend: pooled prefill states from a running vLLM server, usually one of the pool's models.

In: a table (query_id, prompt). Out: a table of `activations_schema`, in the same order. Each prompt is one request to
the server (vllm/server.py) that generates one token and returns the pooled states of the prefill. If the router then
chooses that model, the prompt's keys and values are in the server's prefix cache, so that the states cost almost
nothing. The server reports the digest of its weights; only the tokenizer and the configuration are loaded here. Uses
vLLM through HTTP only.
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
from prefill_router.prefill.loading import base_class, columns, identify, read_config
from prefill_router.prefill.locating import TOKENIZER_FILES, locate
from prefill_router.prefill.tokens import PromptTokenizer
from prefill_router.prefill.vllm.wire import STATES_KEY, decode_states

RETRY_PAUSES_S = (0.2, 1.0, 5.0, None)  # seconds between attempts; None: the last attempt
# Failed and broken connections are retried. Timeouts are not: the server may still be working on the request.
RETRIABLE = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
START_HINT = "start one with `python -m prefill_router.prefill.vllm.server MODEL --port PORT`"


class VLLMServerEncoder:
    """A `PrefillEncoder`. The constructor requests the server's models and the identity of its weights.

    Raises UnavailableError if the server cannot be reached or fails. Raises InputError if it serves another model or
    dtype or does not pool the configured columns, and if the local tokenizer or configuration is invalid.
    """

    def __init__(self, config: EncoderConfig) -> None:
        folder = locate(config, TOKENIZER_FILES)
        model_config = read_config(folder)
        text = model_config.get_text_config()
        architecture = base_class(model_config)
        self.columns = columns(config, text.num_hidden_layers)
        positions = getattr(text, "max_position_embeddings", None)
        self._tokenizer = PromptTokenizer(folder, config, positions, text.vocab_size)
        self._config, self._dtype = config.vllm_server, config.dtype
        key = os.environ.get(config.vllm_server.api_key_env) if config.vllm_server.api_key_env else None
        if config.vllm_server.api_key_env and not key:
            raise InputError(
                f"vllm_server.api_key_env: {config.vllm_server.api_key_env} is not set in the environment; "
                "set it to the server's API key"
            )
        self._client = httpx.Client(
            base_url=config.vllm_server.base_url.rstrip("/"),
            timeout=config.vllm_server.timeout_s,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # vLLM closes idle connections after 5 s; the client closes them earlier.
            limits=httpx.Limits(max_connections=config.vllm_server.concurrency, keepalive_expiry=2),
        )
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
        """See `PrefillEncoder`. If the server refuses a prompt, `error` holds its message.

        Raises UnavailableError if the server cannot be reached or fails, RuntimeError if a response does not match its
        request or the server's weights have changed.
        """
        tokens = self._tokenizer(prompts.column("prompt").to_pylist())
        with ThreadPoolExecutor(self._config.concurrency) as threads:
            responses = list(threads.map(self._encode, (one.ids for one in tokens if one.error is None)))
        return states_table(prompts, tokens, responses, self.columns, self.info)

    def bare_seconds(self, prompts: pa.Table) -> float | None:
        """Always None: a vLLM server cannot run the forward pass without scheduling and sampling."""
        return None

    def close(self) -> None:
        """Closes the connections; the server keeps running."""
        self._client.close()

    def _encode(self, ids: list[int]) -> Float[np.ndarray, "columns hidden"] | str:
        """The pooled states of a prompt, or the server's message if it refuses the prompt."""
        reply = self._request_states(ids)
        if reply.status_code in (400, 413, 422):
            self._check_server()  # raises an error if the server would refuse every prompt
            return f"the server refuses the prompt: {_message(reply)}"
        params = _checked(reply).json().get("kv_transfer_params")
        states = decode_states(params, len(ids), self.columns)
        if params[STATES_KEY].get("encoder") != self._encoder:
            raise self._changed()
        return states

    def _check_server(self) -> None:
        """Raises RuntimeError if the server's model or weights differ from those at construction."""
        try:
            same = (self._find_model(), self._identify()) == (self._model, self._encoder)
        except InputError as error:
            raise RuntimeError(str(error)) from None
        if not same:
            raise self._changed()

    def _changed(self) -> RuntimeError:
        return RuntimeError(
            f"vllm_server.base_url: {self._config.base_url} runs other weights than when the encoder was loaded; "
            "load the encoder again"
        )

    def _request_states(self, ids: list[int]) -> httpx.Response:
        """Sends a prompt of token ids and returns the server's reply."""
        # Explicit min_p and temperature override the model's generation defaults, which vLLM may refuse with states.
        return self._request(
            "POST",
            "completions",
            {
                "model": self._model,
                "prompt": ids,
                "max_tokens": 1,
                "min_p": 0,
                "temperature": 0,
                "kv_transfer_params": {STATES_KEY: True},
            },
        )

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """The server's reply, after retries for some seconds if the connection fails or the server is busy.

        Raises UnavailableError if the server still cannot be reached, and for a timeout.
        """
        for pause in RETRY_PAUSES_S:
            try:
                reply = self._client.request(method, path, json=body)
                if reply.status_code not in (429, 502, 503) or pause is None:
                    return reply
            except httpx.HTTPError as error:
                if pause is None or not isinstance(error, RETRIABLE):
                    raise UnavailableError(
                        f"vllm_server.base_url: {self._config.base_url} does not answer ({error!r}); check the server "
                        "or start it again"
                    ) from None
            time.sleep(pause)
        raise AssertionError("not reached")

    def _find_model(self) -> str:
        """Name of the model on the server. Raises InputError if it does not serve the configured model or length."""
        address = f"vllm_server.base_url: {self._config.base_url}"
        try:
            reply = self._client.get("models")
        except httpx.HTTPError as error:
            raise UnavailableError(f"{address}: no server answers ({error}); {START_HINT}") from None
        if reply.status_code in (401, 403):
            raise InputError(
                f"vllm_server.api_key_env: got {self._config.api_key_env!r}, but the server at {self._config.base_url} "
                "needs another API key; name the environment variable that holds it"
            )
        if reply.is_server_error:
            raise UnavailableError(
                f"{address}: the server fails ({reply.status_code}: {_message(reply)}); check its log"
            )
        try:  # LoRA adapters have no max_model_len
            served = {
                str(model["id"]): int(model["max_model_len"])
                for model in _checked(reply).json()["data"]
                if model["max_model_len"] is not None
            }
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{address}: not a vLLM server ({error}); {START_HINT}") from None
        wanted = self._config.served_model or (next(iter(served)) if len(served) == 1 else None)
        if wanted not in served:
            raise InputError(
                f"vllm_server.served_model: got {self._config.served_model!r}, the server at "
                f"{self._config.base_url} serves {', '.join(served)}; set one of these"
            )
        if self._tokenizer.max_length >= served[wanted]:  # the request generates one token
            raise InputError(
                f"max_length: got {self._tokenizer.max_length}, the server takes prompts of "
                f"{served[wanted] - 1} tokens at most; start it with --max-model-len "
                f"{self._tokenizer.max_length + 1}, or prefill and train with max_length {served[wanted] - 1} or less"
            )
        return wanted

    def _identify(self) -> dict[str, str]:
        """Weights digest and dtype of the server's encoder, from a request of one token.

        Raises InputError if the server returns no states, does not pool the configured columns or runs in another
        dtype.
        """
        address = f"vllm_server.base_url: {self._config.base_url}"
        reply = self._request_states([self._tokenizer.pad_id])
        if reply.is_server_error:
            raise UnavailableError(
                f"{address}: the server fails ({reply.status_code}: {_message(reply)}); check its log"
            )
        if reply.is_error:
            raise InputError(
                f"{address}: the server refuses requests for states ({reply.status_code}: {_message(reply)}); "
                f"{START_HINT}"
            )
        params = reply.json().get("kv_transfer_params") or {}
        encoder = params.get(STATES_KEY, {}).get("encoder")
        if encoder is None:
            raise InputError(f"{address}: the server returns no prefill states; {START_HINT}")
        if "error" in params[STATES_KEY]:
            raise InputError(f"{address}: {params[STATES_KEY]['error']}")
        try:
            decode_states(params, 1, self.columns)
        except RuntimeError as error:
            raise InputError(
                f"layers: {error}; start the server with --layers '{_layers(self.columns)}' or more"
            ) from None
        if encoder["dtype"] != self._dtype:
            raise InputError(
                f"dtype: got {self._dtype}, but the server runs in {encoder['dtype']}; set dtype to "
                f"{encoder['dtype']}, or start the server with --dtype {self._dtype}"
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

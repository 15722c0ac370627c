"""The vLLM backend: pooled prefill states of a causal language model from a vLLM engine in separate processes.

In: a table (query_id, prompt). Out: a table of `activations_schema`, in the same order; the states equal those of the
transformers backend up to rounding. The engine batches prompts by tokens and prefills long prompts in chunks. Its
workers pool the states (connector.py, or worker.py with hooks) and return them with the responses. Transformer blocks
above the highest configured layer are not loaded. A crashed engine is restarted. Independent of files and clusters.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float

from prefill_router.errors import InputError
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import LoadedWeights, parse_column, states_table
from prefill_router.prefill.loading import (
    base_class,
    columns,
    identify,
    lower_weights,
    read_config,
    weight_files,
    weights_digest,
)
from prefill_router.prefill.locating import locate
from prefill_router.prefill.tokens import PromptTokenizer
from prefill_router.prefill.vllm.extraction_methods import (
    ExtractionMethod,
    allowed_methods,
    engine_arguments,
    require_vllm,
    set_environment,
    shared_memory_files,
    socket_folder,
    unlink_orphans,
)
from prefill_router.prefill.vllm.wire import decode_states

MAX_CRASHES = 16  # consecutive engine crashes; bisecting a batch of some thousand prompts takes fewer
MAX_STARTS = 3  # attempts to restart the engine
START_LOCK = threading.Lock()
LOG_LOCATION = "this process's log (under Ray: logs/worker-*.err in /tmp/ray/session_latest)"
logger = logging.getLogger(__name__)


class VLLMEncoder:
    """A `PrefillEncoder`. The constructor starts a vLLM engine. Calls are not thread-safe.

    Raises InputError if vLLM is not installed or does not start with the model, if the model does not exist, is not a
    causal language model or has no safetensors weights, or if the layers or max_length are invalid.
    """

    def __init__(self, config: EncoderConfig) -> None:
        self._cpu_cache_gib = config.vllm.cpu_cache_gib
        self._orphans: set[Path] = set()
        version = require_vllm(self._cpu_cache_gib)
        folder = locate(config)
        model_config = read_config(folder)
        text = model_config.get_text_config()
        architecture = base_class(model_config)
        self.columns = columns(config, text.num_hidden_layers)
        digest = weights_digest(folder, config)
        positions = getattr(text, "max_position_embeddings", None)
        self._tokenizer = PromptTokenizer(folder, config, positions, text.vocab_size)
        layers = sorted({parse_column(column)[1] for column in self.columns})
        method, reason, blocks = self._start_supported(config, folder, model_config, layers)
        # Counted from the files, because vLLM's parameters do not show all loaded weights.
        n_layers = text.num_hidden_layers
        shapes = [
            file.get_slice(name).get_shape()
            for file, name in lower_weights(folder, blocks if blocks < n_layers else None)
        ]
        self.loaded = LoadedWeights(
            blocks,
            n_layers,
            sum(map(math.prod, shapes)) * getattr(torch, config.dtype).itemsize,
            sum(path.stat().st_size for path in weight_files(folder)),
            reason,
        )
        self.info = identify(
            config,
            folder,
            text,
            self._tokenizer,
            architecture=architecture,
            attention="causal",
            digest=digest,
            backend=f"vllm {version}, {method}",
        )

    def __call__(self, prompts: pa.Table) -> pa.Table:
        """See `PrefillEncoder`."""
        tokens = self._tokenizer(prompts.column("prompt").to_pylist())
        responses = self._encode([one.ids for one in tokens if one.error is None])
        return states_table(prompts, tokens, responses, self.columns, self.info)

    def bare_seconds(self, prompts: pa.Table) -> float | None:
        """Always None: vLLM cannot run the forward pass without scheduling and sampling."""
        return None

    def close(self) -> None:
        """See `PrefillEncoder`. Stops the engine's processes. Garbage collection of the encoder does the same."""
        self._llm.llm_engine.engine_core.shutdown()

    def __del__(self) -> None:
        if sys.is_finalizing():
            return  # a new thread would never finish; vLLM stops its processes at exit
        with suppress(Exception):  # the constructor may have failed
            # In a thread, because shutdown takes seconds and this may run in an event loop.
            threading.Thread(target=self._llm.llm_engine.engine_core.shutdown).start()

    def _start_supported(
        self, config: EncoderConfig, folder: Path, model_config: Any, layers: list[int]
    ) -> tuple[ExtractionMethod, str, int]:
        """Starts the engine with the first extraction method that works; returns (method, reason, loaded blocks).

        Tries the supported methods with the lower blocks, then the preferred method with all blocks. `reason` is as in
        `allowed_methods`. Raises InputError if every attempt fails.
        """
        n_layers = model_config.get_text_config().num_hidden_layers
        # Multimodal models are loaded in full: the override would not apply to their language model alone.
        blocks = max(layers[-1], 1) if model_config.get_text_config() is model_config else n_layers
        methods = allowed_methods(model_config, layers)
        candidates = [(method, reason, blocks) for method, reason in methods]
        # The preferred method is tried twice: a failure may be temporary, and the other methods are slower.
        candidates = [candidates[0], *candidates]
        if blocks < n_layers:
            candidates.append((*methods[0], n_layers))
        first: Exception | None = None
        for method, reason, loaded in candidates:
            self._hooked = method == "hooks"
            self._arguments = engine_arguments(
                config, folder, model_config, method, self.columns, loaded, self._tokenizer.max_length
            )
            try:
                self._start()
                self._preflight()
            except Exception as error:  # noqa: BLE001  vLLM raises many types
                first = first or error
                self._stop()
                logger.warning(
                    "%s: extraction method %s with %d of %d blocks failed: %s", folder, method, loaded, n_layers, error
                )
                continue
            if reason:
                logger.warning("%s: extraction method %s is used: %s", config.model, method, reason)
            return method, reason, loaded
        raise InputError(
            f"model: vLLM does not start with {folder} ({' '.join(str(first).split())[:200]}); vLLM's error is in "
            f"{LOG_LOCATION}. If memory is short, change encoder.vllm.gpu_memory_utilization or "
            "encoder.vllm.cpu_cache_gib, choose fewer layers or lower max_length; otherwise use backend: transformers"
        ) from first

    def _stop(self) -> None:
        """Stops the engine, running, crashed or partly started, to free its memory."""
        with suppress(Exception):
            self.close()

    def _restart(self) -> None:
        """Stops the engine and starts another, with up to MAX_STARTS attempts."""
        for attempt in range(MAX_STARTS):
            self._stop()
            try:
                return self._start()
            except Exception as error:
                if attempt == MAX_STARTS - 1:
                    raise
                logger.warning("the engine failed to restart: %s", error)

    def _start(self) -> None:
        from vllm import LLM

        before = shared_memory_files()
        try:
            with START_LOCK, socket_folder():  # vLLM reads its settings from the environment of this process
                set_environment(self._cpu_cache_gib)
                self._llm = LLM(**self._arguments)
                self._llm.collective_rpc("prefill_states_unlink")
        finally:
            self._orphans |= shared_memory_files() - before
        unlink_orphans(self._orphans)
        if self._hooked:
            self._llm.collective_rpc("prefill_states_hook", args=(list(self.columns),))

    def _preflight(self) -> None:
        """Encodes one token. Raises an error if the architecture starts but fails in the forward pass."""
        (response,) = self._request_states([[self._tokenizer.pad_id]])
        if isinstance(response, str):
            raise RuntimeError(response)

    def _encode(self, ids: list[list[int]]) -> list[Float[np.ndarray, "columns hidden"] | str]:
        """The pooled states of every prompt, or an error message.

        After a crash the engine is restarted and the same prompts are sent once more, because the crash may not be
        their fault. After a second crash they are bisected until the prompt that crashes the engine is found. Raises
        RuntimeError after more than MAX_CRASHES consecutive crashes.
        """
        responses: list[Float[np.ndarray, "columns hidden"] | str] = [""] * len(ids)
        batches = [(range(len(ids)), 0)]  # rows, and crashes on these rows
        crashes = 0
        while batches:
            batch, crashed = batches.pop()
            try:
                for row, response in zip(batch, self._request_states([ids[row] for row in batch]), strict=True):
                    responses[row] = response
                crashes = 0
                continue
            except Exception as error:
                if not self._is_dead(error):
                    raise
                crashes += 1
                if crashes > MAX_CRASHES:
                    raise RuntimeError(
                        f"vLLM's engine crashed {crashes} times in a row on {len(ids)} prompts; its error is in "
                        f"{LOG_LOCATION}"
                    ) from error
                logger.warning("vLLM's engine crashed on %d prompts and is restarted", len(batch))
            self._restart()
            middle = len(batch) // 2
            if crashed == 0:
                batches.append((batch, 1))
            elif len(batch) == 1:
                responses[batch[0]] = "vLLM's engine crashes on this prompt"
            else:
                batches += [(batch[:middle], 1), (batch[middle:], 1)]
        return responses

    def _is_dead(self, error: Exception) -> bool:
        """Whether the engine has crashed. A socket closed during a wait raises another error than EngineDeadError."""
        from vllm.v1.engine.exceptions import EngineDeadError

        core: Any = self._llm.llm_engine.engine_core
        return isinstance(error, EngineDeadError) or bool(core.resources.engine_dead)

    def _request_states(self, ids: list[list[int]]) -> list[Float[np.ndarray, "columns hidden"] | str]:
        """The engine's response to every prompt: its pooled states, or the error message for a refused prompt."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        prompts: list[Any] = [{"prompt_token_ids": row} for row in ids]
        try:
            outputs = self._llm.generate(
                prompts, SamplingParams(max_tokens=1, temperature=0, detokenize=False), use_tqdm=False
            )
        except (ValueError, VLLMClientError) as error:  # vLLM refuses the batch because of one prompt
            if len(ids) > 1:
                return [response for row in ids for response in self._request_states([row])]
            return [f"vLLM refuses the prompt: {' '.join(str(error).split())[:200]}"]
        if self._hooked:
            return self._take_hooked(ids)
        return [
            decode_states(output.kv_transfer_params, len(row), self.columns)
            for output, row in zip(outputs, ids, strict=True)
        ]

    def _take_hooked(self, ids: list[list[int]]) -> list[Float[np.ndarray, "columns hidden"] | str]:
        """The states that the hooks in the worker pooled for these prompts."""
        from prefill_router.prefill.vllm.worker import prompt_key

        pooled = self._llm.collective_rpc("prefill_states_take")[0]
        states = [pooled.get(prompt_key(row)) for row in ids]
        if any(one is None for one in states):
            raise RuntimeError("vLLM's engine did not prefill a prompt in one step")
        return [np.frombuffer(one, dtype=np.float32).reshape(len(self.columns), -1) for one in states]

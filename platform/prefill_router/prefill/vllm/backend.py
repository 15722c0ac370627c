"""The vLLM backend: a causal language model's pooled prefill states, read by vLLM's engine in processes of its own.

In: a table of (query_id, prompt). Out: a table of `activations_schema`, in the same order, with the numbers of the
transformers backend up to rounding. The engine batches prompts itself, by tokens, and prefills long ones in pieces;
states are pooled in its workers (connector.py, or worker.py by hooks) and come back in its answers. Blocks above the
highest layer read are not loaded. An engine that dies is started again. Knows nothing of files or
clusters.
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
from prefill_router.prefill.encoder import Loaded, parse_column, states_table
from prefill_router.prefill.loading import (
    base_class,
    columns,
    identify,
    locate,
    lower_weights,
    read_config,
    weight_files,
    weights_digest,
)
from prefill_router.prefill.tokens import PromptTokenizer, Tokens
from prefill_router.prefill.vllm.extraction_methods import (
    ExtractionMethod,
    allowed_methods,
    engine_arguments,
    require_vllm,
    set_environment,
    shared_names,
    sockets,
    unlink_strays,
)
from prefill_router.prefill.vllm.wire import read_answer

DEATHS = 16  # of the engine on end, with nothing read in between: one bad prompt among some thousands takes so many
STARTS = 3  # attempts to bring up an engine that ran before
STARTING = threading.Lock()
WHERE = "stands in this process's log (under Ray logs/worker-*.err of its session, /tmp/ray/session_latest)"
logger = logging.getLogger(__name__)


class VLLMEncoder:
    """A `PrefillEncoder`. Starts an engine on construction; a call is not thread-safe.

    Raises InputError for a model that is not there, is no causal language model, has no safetensors weights, or cannot
    take the configured layers or length, and where vLLM is not installed.
    """

    def __init__(self, config: EncoderConfig) -> None:
        self._cpu_cache_gib = config.vllm.cpu_cache_gib
        self._strays: set[Path] = set()
        version = require_vllm(self._cpu_cache_gib)
        folder = locate(config)
        model_config = read_config(folder)
        text = model_config.get_text_config()
        architecture = base_class(model_config)
        self.columns = columns(config, text.num_hidden_layers)
        digest = weights_digest(folder, config)
        self._tokenizer = PromptTokenizer(folder, config, getattr(text, "max_position_embeddings", None))
        self._vocabulary: int = text.vocab_size
        layers = sorted({parse_column(column)[1] for column in self.columns})
        way, why, blocks = self._start_first(config, folder, model_config, layers)
        # By the files: what vLLM makes of the weights is not all to be seen in its parameters.
        n_layers = text.num_hidden_layers
        shapes = [
            file.get_slice(name).get_shape()
            for file, name in lower_weights(folder, blocks if blocks < n_layers else None)
        ]
        self.loaded = Loaded(
            blocks,
            n_layers,
            sum(map(math.prod, shapes)) * getattr(torch, config.dtype).itemsize,
            sum(path.stat().st_size for path in weight_files(folder)),
            why,
        )
        self.info = identify(
            config,
            folder,
            text,
            self._tokenizer,
            architecture=architecture,
            attention="causal",
            digest=digest,
            backend=f"vllm {version}, {way}",
        )

    def __call__(self, prompts: pa.Table) -> pa.Table:
        """See `PrefillEncoder`."""
        tokens = [self._check(one) for one in self._tokenizer(prompts.column("prompt").to_pylist())]
        answers = self._read([one.ids for one in tokens if one.error is None])
        return states_table(prompts, tokens, answers, self.columns, self.info)

    def bare_seconds(self, prompts: pa.Table) -> float | None:
        """Not known: the engine runs nothing but whole requests."""
        return None

    def close(self) -> None:
        """See `PrefillEncoder`. Stops the engine's processes, which hold the model; so does forgetting the encoder."""
        self._llm.llm_engine.engine_core.shutdown()

    def __del__(self) -> None:
        if sys.is_finalizing():
            return  # starting a thread would wait for ever; vLLM stops its processes at exit by itself
        with suppress(Exception):  # an encoder that was never whole
            # In a thread: it takes seconds, and an event loop may be what has let go of the encoder.
            threading.Thread(target=self._llm.llm_engine.engine_core.shutdown).start()

    def _check(self, tokens: Tokens) -> Tokens:
        """vLLM refuses a whole batch for a token that the model does not have."""
        highest = max(tokens.ids, default=0)
        if highest < self._vocabulary:
            return tokens
        return Tokens([], tokens.n_tokens, f"token {highest} is outside the model's vocabulary of {self._vocabulary}")

    def _start_first(
        self, config: EncoderConfig, folder: Path, model_config: Any, layers: list[int]
    ) -> tuple[ExtractionMethod, str, int]:
        """Starts the engine by the first way that works, with the lower blocks; or, by the first one, with all. Returns
        the way, why not an earlier one, and how many blocks. Raises InputError when none works."""
        n_layers = model_config.get_text_config().num_hidden_layers
        # Of a model with other parts beside its language model vLLM is not told to cut one.
        blocks = max(layers[-1], 1) if model_config.get_text_config() is model_config else n_layers
        ways = allowed_methods(model_config, layers)
        candidates = [(way, why, blocks) for way, why in ways]
        # The first one twice: what failed may have been the moment, and the others are slower.
        candidates = [candidates[0], *candidates]
        if blocks < n_layers:
            candidates.append((*ways[0], n_layers))
        first: Exception | None = None
        for way, why, loaded in candidates:
            self._hooked = way == "hooks"
            self._arguments = engine_arguments(
                config, folder, model_config, way, self.columns, loaded, self._tokenizer.max_length
            )
            try:
                self._start()
                self._preflight()
            except Exception as error:  # noqa: BLE001  vLLM raises what it likes
                first = first or error
                self._stop()
                logger.warning(
                    "%s: cannot be read by way of %s with %d of %d blocks: %s", folder, way, loaded, n_layers, error
                )
                continue
            if why:
                logger.warning("%s: states are read by way of %s: %s", config.model, way, why)
            return way, why, loaded
        raise InputError(
            f"model: vLLM does not start with {folder} ({' '.join(str(first).split())[:200]}); its own "
            f"error {WHERE}. If memory is short: encoder.vllm.gpu_memory_utilization or "
            "encoder.vllm.cpu_cache_gib, fewer layers, or a lower max_length; else backend: transformers"
        ) from first

    def _stop(self) -> None:
        """Stops what there is of an engine, dead or alive: the next one needs its memory."""
        with suppress(Exception):
            self.close()

    def _restart(self) -> None:
        """What kills an engine may kill the next one while it starts."""
        for attempt in range(STARTS):
            self._stop()
            try:
                return self._start()
            except Exception as error:
                if attempt == STARTS - 1:
                    raise
                logger.warning("the engine did not start again: %s", error)

    def _start(self) -> None:
        from vllm import LLM

        there = shared_names()
        try:
            with STARTING, sockets():  # one at a time: what vLLM reads from the environment is this process's
                set_environment(self._cpu_cache_gib)
                self._llm = LLM(**self._arguments)
                self._llm.collective_rpc("prefill_states_unlink")
        finally:
            self._strays |= shared_names() - there
        unlink_strays(self._strays)
        if self._hooked:
            self._llm.collective_rpc("prefill_states_hook", args=(list(self.columns),))

    def _preflight(self) -> None:
        """An architecture may start and fail at its first token."""
        (answer,) = self._ask([[self._tokenizer.pad_id]])
        if isinstance(answer, str):  # refused
            raise RuntimeError(answer)

    def _read(self, ids: list[list[int]]) -> list[Float[np.ndarray, "columns hidden"] | str]:
        """Of every prompt its pooled states, or why it has none.

        An engine that dies is started again and asked again: it may have been killed. If it dies over the same prompts
        once more, they are halved until the one is found that it dies over. Raises RuntimeError when it dies too often
        without having read anything in between.
        """
        answers: list[Float[np.ndarray, "columns hidden"] | str] = [""] * len(ids)
        parts = [(range(len(ids)), 0)]  # with how often the engine has died over them
        deaths = 0
        while parts:
            part, died = parts.pop()
            try:
                for row, answer in zip(part, self._ask([ids[row] for row in part]), strict=True):
                    answers[row] = answer
                deaths = 0
                continue
            except Exception as error:
                if not self._is_dead(error):
                    raise
                deaths += 1
                if deaths > DEATHS:
                    raise RuntimeError(
                        f"the engine died {deaths} times on end over {len(ids)} prompts; its own error {WHERE}"
                    ) from error
                logger.warning("the engine died over %d prompts; it is started again", len(part))
            self._restart()
            middle = len(part) // 2
            if died == 0:
                parts.append((part, 1))
            elif len(part) == 1:
                answers[part[0]] = "vLLM's engine dies over this prompt"
            else:
                parts += [(part[:middle], 1), (part[middle:], 1)]
        return answers

    def _is_dead(self, error: Exception) -> bool:
        """A socket that is closed while it is waited on raises an error of its own."""
        from vllm.v1.engine.exceptions import EngineDeadError

        core: Any = self._llm.llm_engine.engine_core
        return isinstance(error, EngineDeadError) or bool(core.resources.engine_dead)

    def _ask(self, ids: list[list[int]]) -> list[Float[np.ndarray, "columns hidden"] | str]:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        prompts: list[Any] = [{"prompt_token_ids": row} for row in ids]
        try:
            outputs = self._llm.generate(
                prompts, SamplingParams(max_tokens=1, temperature=0, detokenize=False), use_tqdm=False
            )
        except (ValueError, VLLMClientError) as error:  # one of them is refused, and with it all
            if len(ids) > 1:
                return [answer for row in ids for answer in self._ask([row])]
            return [f"vLLM refuses the prompt: {' '.join(str(error).split())[:200]}"]
        if self._hooked:
            return self._take(ids)
        return [
            read_answer(output.kv_transfer_params, len(row), self.columns)
            for output, row in zip(outputs, ids, strict=True)
        ]

    def _take(self, ids: list[list[int]]) -> list[Float[np.ndarray, "columns hidden"] | str]:
        from prefill_router.prefill.vllm.worker import prompt_key

        pooled = self._llm.collective_rpc("prefill_states_take")[0]
        read = [pooled.get(prompt_key(row)) for row in ids]
        if any(one is None for one in read):
            raise RuntimeError("the engine did not read a prompt in one piece")
        return [np.frombuffer(one, dtype=np.float32).reshape(len(self.columns), -1) for one in read]

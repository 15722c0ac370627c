"""The vLLM backend: a causal language model's pooled prefill states, read by vLLM's engine in processes of its own.

In: a table of (query_id, prompt). Out: a table of `activations_schema`, in the same order, with the numbers of the
transformers backend up to rounding. The engine batches prompts itself, by tokens, and prefills long ones in pieces;
states are pooled in its workers (connector.py, or worker.py by hooks) and come back in its answers. Blocks above the
highest layer read are not loaded. An engine that dies is started again. Knows nothing of files or
clusters.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from prefill_router.errors import InputError
from prefill_router.prefill.encoder import EncoderConfig, Loaded, answers_table, parse_column
from prefill_router.prefill.loading import (
    base_class,
    columns,
    identify,
    locate,
    read_config,
    weight_files,
    weights_digest,
)
from prefill_router.prefill.tokens import PromptTokenizer, Tokens
from prefill_router.prefill.vllm.answers import read_answer
from prefill_router.prefill.vllm.ways import choose_way, engine_arguments, require_vllm, sockets

DEATHS = 16  # of the engine in one call: enough to find one bad prompt among some thousands
logger = logging.getLogger(__name__)


class VLLMEncoder:
    """A `PrefillEncoder`. Starts an engine on construction; a call is not thread-safe.

    Raises InputError for a model that is not there, is no causal language model, has no safetensors weights, or cannot
    take the configured layers or length, and where vLLM is not installed.
    """

    def __init__(self, config: EncoderConfig) -> None:
        version = require_vllm(config.vllm.cpu_cache_gib)
        folder = locate(config)
        model_config = read_config(folder)
        text = model_config.get_text_config()
        architecture = base_class(model_config)
        self.columns = columns(config, text.num_hidden_layers)
        digest = weights_digest(folder, config)
        self._tokenizer = PromptTokenizer(folder, config, getattr(text, "max_position_embeddings", None))
        self._vocabulary: int = text.vocab_size
        layers = sorted({parse_column(column)[1] for column in self.columns})
        way, why = choose_way(model_config, layers)
        self._hooked = way == "hooks"
        n_layers = text.num_hidden_layers
        # Of a model with other parts beside its language model vLLM is not told to cut one.
        blocks = max(layers[-1], 1) if text is model_config else n_layers

        def arguments(blocks: int) -> dict[str, Any]:
            return engine_arguments(config, folder, model_config, way, self.columns, blocks,
                                    self._tokenizer.max_length)

        self._arguments = arguments(blocks)
        try:
            self._start()
            self._try_out()
        except Exception as error:
            if blocks == n_layers:
                raise _not_started(folder, error) from error
            logger.warning("%s: does not start with %d of its %d blocks (%s); loading all", folder, blocks, n_layers,
                           error)
            blocks, self._arguments = n_layers, arguments(n_layers)
            try:
                self._start()
                self._try_out()
            except Exception as error_too:
                raise _not_started(folder, error_too) from error_too
        self.loaded = Loaded(blocks, n_layers, sum(self._llm.collective_rpc("prefill_states_weights")),
                             sum(path.stat().st_size for path in weight_files(folder)))
        self.info = identify(config, folder, text, self._tokenizer, architecture=architecture, attention="causal",
                             digest=digest, backend=f"vllm {version}, {way}")
        if why:
            logger.warning("%s: states are read by way of %s: %s", config.model, way, why)

    def __call__(self, prompts: pa.Table) -> pa.Table:
        """See `PrefillEncoder`."""
        tokens = [self._check(one) for one in self._tokenizer(prompts.column("prompt").to_pylist())]
        answers = self._read([one.ids for one in tokens if one.error is None])
        return answers_table(prompts, tokens, answers, self.columns, self.info)

    def bare_seconds(self, prompts: pa.Table) -> float | None:
        """Not known: the engine runs nothing but whole requests."""
        return None

    def close(self) -> None:
        """See `PrefillEncoder`. Stops the engine's processes, which hold the model; so does forgetting the encoder."""
        self._llm.llm_engine.engine_core.shutdown()

    def __del__(self) -> None:
        with suppress(Exception):  # an encoder that was never whole, or an interpreter that is going down
            self.close()

    def _check(self, tokens: Tokens) -> Tokens:
        """vLLM refuses a whole batch for a token that the model does not have."""
        highest = max(tokens.ids, default=0)
        if highest < self._vocabulary:
            return tokens
        return Tokens([], tokens.n_tokens, f"token {highest} is outside the model's vocabulary of {self._vocabulary}")

    def _start(self) -> None:
        from vllm import LLM

        with sockets():
            self._llm = LLM(**self._arguments)
            self._llm.collective_rpc("prefill_states_unlink")
        if self._hooked:
            self._llm.collective_rpc("prefill_states_hook", args=(list(self.columns),))

    def _try_out(self) -> None:
        """An architecture may start and fail at its first token."""
        answer, = self._ask([[self._tokenizer.pad_id]])
        if isinstance(answer, str):
            raise RuntimeError(answer)

    def _read(self, ids: list[list[int]]) -> list[Float[np.ndarray, "columns hidden"] | str]:
        """Of every prompt its pooled states, or why it has none.

        An engine that dies is started again and asked again: it may have been killed. If it dies over the same prompts
        once more, they are halved until the one is found that it dies over. Raises RuntimeError after too many deaths.
        """
        answers: list[Float[np.ndarray, "columns hidden"] | str] = [""] * len(ids)
        deaths, parts = 0, [range(len(ids))]
        while parts:
            part = parts.pop()
            try:
                for row, answer in zip(part, self._ask([ids[row] for row in part]), strict=True):
                    answers[row] = answer
            except Exception as error:
                if not self._is_dead(error):
                    raise
                deaths += 1
                if deaths > DEATHS:
                    raise RuntimeError(f"the engine died {deaths} times over {len(ids)} prompts; its own error stands "
                                       "above this in the log") from error
                logger.warning("the engine died over %d prompts; it is started again", len(part))
                self._start()
                if deaths == 1:
                    parts.append(part)
                elif len(part) == 1:
                    answers[part[0]] = "vLLM's engine dies over this prompt"
                else:
                    parts += [part[:len(part) // 2], part[len(part) // 2:]]
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
            outputs = self._llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0, detokenize=False),
                                         use_tqdm=False)
        except (ValueError, VLLMClientError) as error:  # one of them is refused, and with it all
            if len(ids) > 1:
                return [answer for row in ids for answer in self._ask([row])]
            return [f"vLLM refuses the prompt: {' '.join(str(error).split())[:200]}"]
        if self._hooked:
            return self._take(ids)
        return [read_answer(output.kv_transfer_params, len(row), self.columns)
                for output, row in zip(outputs, ids, strict=True)]

    def _take(self, ids: list[list[int]]) -> list[Float[np.ndarray, "columns hidden"] | str]:
        from prefill_router.prefill.vllm.worker import prompt_key

        pooled = self._llm.collective_rpc("prefill_states_take")[0]
        read = [pooled.get(prompt_key(row)) for row in ids]
        return ["the engine did not read the prompt in one piece" if one is None else
                np.frombuffer(one, dtype=np.float32).reshape(len(self.columns), -1) for one in read]


def _not_started(folder: Path, error: Exception) -> InputError:
    return InputError(f"model: vLLM does not start with {folder} ({' '.join(str(error).split())[:200]}); its own error "
                      "stands above this, backend: transformers may take the model")

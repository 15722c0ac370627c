"""KV connector inside vLLM's engine: pools a prompt's hidden states in the worker and returns them with the response.

vLLM's speculator `extract_hidden_states` writes the hidden states of the configured layers to a cache separate from the
KV cache. In the step that ends a prompt's prefill, this connector pools the cached states on the device and returns
them as `kv_transfer_params` of the finished request. Nothing is written to disk, and only [columns, hidden] leaves the
device. It uses vLLM's interface for the transfer of keys and values, but transfers none.

`kv_connector_extra_config`: `columns`, the activations columns to pool; `on_request` (default false), pool only for
requests with `kv_transfer_params` {"prefill_states": true}; `identify` (default false), add the weights digest and
dtype of the encoder to every response. wire.py defines the format of responses. Pooling catches all exceptions, because
an exception here would stop the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import ExampleHiddenStatesConnector

from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import parse_column
from prefill_router.prefill.loading import weights_digest
from prefill_router.prefill.locating import locate
from prefill_router.prefill.vllm.wire import STATES_KEY, encode_states

# Responses from the workers by request id, in the scheduler's process.
_arrived: dict[str, dict[str, Any]] = {}
_roles: set[KVConnectorRole] = set()  # roles of the connectors in this process


@dataclass
class _Prompt:
    """A prompt in prefill: its length, and its blocks in the cache of hidden states."""

    n_tokens: int
    blocks: list[int]
    ended: bool = False


@dataclass
class _Ended(KVConnectorMetadata):
    """Metadata from the scheduler to the workers: the prompts whose prefill ends in this step."""

    prompts: dict[str, _Prompt] = field(default_factory=dict)


@dataclass
class _Pooled(KVConnectorWorkerMetadata):
    """Metadata from a worker in another process to the scheduler. Only the first rank sends responses."""

    responses: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Unpickled in the scheduler's process before it finishes the step's requests, which need the responses:
        # vLLM calls `update_connector_output` only after it has finished them.
        self.responses = state["responses"]
        _arrived.update(self.responses)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> _Pooled:
        """Keeps one rank's metadata; `__setstate__` has stored the responses already."""
        return self


def check_states(config: Any) -> None:
    """Raises ValueError if options of the engine (`VllmConfig`) change the states of the weights on disk."""
    model = config.model_config
    quantized = bool(getattr(model.hf_config, "quantization_config", None))  # in the files, not by an option
    permitted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "quantization": (model.quantization, (model.quantization if quantized else None,)),
        "kv-cache-dtype": (config.cache_config.cache_dtype, ("auto", str(model.dtype).removeprefix("torch."))),
        "enable-lora": (config.lora_config, (None,)),
        "hf-config-path": (model.hf_config_path, (None,)),
        "load-format": (config.load_config.load_format, ("auto", "safetensors")),
        "hf-overrides": (model.hf_overrides, ({}, {"architectures": ["TransformersForCausalLM"]})),
    }
    for option, (value, allowed) in permitted.items():
        if value not in allowed:
            raise ValueError(f"{option}: got {value}, which changes the states of these weights; leave the option out")


class PrefillStatesConnector(KVConnectorBase_V1, SupportsHMA):
    """One instance runs in the scheduler, one in every worker; see the module's docstring."""

    prefer_cross_layer_blocks = False

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        config: Any = vllm_config
        extra = config.kv_transfer_config.get_from_extra_config
        self._columns = tuple(extra("columns", ()))
        self._on_request = bool(extra("on_request", False))
        speculator = config.speculative_config.draft_model_config.hf_config
        self._layers = list(speculator.eagle_aux_hidden_state_layer_ids)
        self._group = ExampleHiddenStatesConnector._find_cache_kv_group_id(kv_cache_config)
        self._block_size = ExampleHiddenStatesConnector._get_cache_block_size(vllm_config, kv_cache_config, self._group)
        self._encoder: dict[str, str] | None = None
        _roles.add(role)
        if role == KVConnectorRole.SCHEDULER and extra("identify", False):
            check_states(config)
            model = EncoderConfig(model=config.model_config.model, revision=config.model_config.revision)
            self._encoder = {
                "weights_digest": weights_digest(locate(model), model),
                "dtype": str(config.model_config.dtype).removeprefix("torch."),
            }
        self._running: dict[str, _Prompt] = {}
        self._cache = torch.empty(0)
        self._first_rank = True
        self._pooled = _Pooled()

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """The layout that vLLM's example connector requires; this connector indexes the cache in the same way."""
        layout: str | None = ExampleHiddenStatesConnector.get_required_kvcache_layout(vllm_config)
        return layout

    # In the worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Finds the cache of hidden states, [blocks, layers, tokens per block, hidden]."""
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
        from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer

        (name,) = get_layers_from_vllm_config(self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches))
        self._cache = kv_caches[name]
        self._first_rank = get_tensor_model_parallel_rank() == 0
        if tuple(self._cache.shape[1:3]) != (len(self._layers), self._block_size):
            raise ValueError(
                f"the cache of hidden states has shape {tuple(self._cache.shape)}, expected are "
                f"{len(self._layers)} layers and blocks of {self._block_size} tokens; use vLLM 0.32"
            )

    def build_connector_worker_meta(self) -> _Pooled:
        """Returns an empty object before the speculator runs; `wait_for_save` fills it, and vLLM sends it after."""
        self._pooled = _Pooled()
        return self._pooled

    @torch.no_grad()
    def wait_for_save(self) -> None:
        """Pools the ended prompts. vLLM calls it after the speculator and before it returns the step's output."""
        ended = self._get_connector_metadata() if self.has_connector_metadata() else None
        if not self._first_rank or not isinstance(ended, _Ended):
            return
        responses = _arrived if KVConnectorRole.SCHEDULER in _roles else self._pooled.responses
        for request, prompt in ended.prompts.items():
            try:
                responses[request] = encode_states(prompt.n_tokens, self._columns, self._pool(prompt))
            except Exception as error:  # noqa: BLE001  an exception would stop the engine
                responses[request] = {"error": f"states cannot be pooled: {error!r}"}

    def _pool(self, prompt: _Prompt) -> Float[np.ndarray, "columns hidden"]:
        if len(prompt.blocks) * self._block_size < prompt.n_tokens:
            raise ValueError(f"{len(prompt.blocks)} blocks of {self._block_size} tokens for {prompt.n_tokens} tokens")
        blocks = torch.tensor(prompt.blocks, device=self._cache.device)
        pooled = []
        for column in self._columns:  # one at a time, because all layers together may exceed the free memory
            pooling, layer = parse_column(column)
            states = self._cache[blocks, self._layers.index(layer)].flatten(0, 1)[: prompt.n_tokens]  # [tokens, hidden]
            pooled.append(states[-1].float() if pooling == "last" else states.mean(dim=0, dtype=torch.float32))
        array: np.ndarray = torch.stack(pooled).cpu().numpy()
        return array

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    # In the scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """There are no external keys or values."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """There are no external keys or values."""

    def build_connector_meta(self, scheduler_output: Any) -> _Ended:
        """Updates the cache blocks of running prompts and returns the prompts whose prefill ends in this step."""
        ended = _Ended()
        for aborted in [request for request in _arrived if request not in self._running]:
            del _arrived[aborted]  # the response came after the request was aborted
        for new in scheduler_output.scheduled_new_reqs:
            extra = getattr(new.sampling_params, "extra_args", None) or {}
            requested = (extra.get("kv_transfer_params") or {}).get(STATES_KEY, False)
            if new.prompt_token_ids and (requested or not self._on_request):
                self._running[new.req_id] = _Prompt(len(new.prompt_token_ids), list(new.block_ids[self._group]))
                self._follow(new.req_id, new.num_computed_tokens, scheduler_output, ended)
        cached = scheduler_output.scheduled_cached_reqs
        for at, request in enumerate(cached.req_ids):
            prompt, blocks = self._running.get(request), cached.new_block_ids[at]
            if prompt is not None and not prompt.ended:
                if blocks is not None:
                    resumed = request in cached.resumed_req_ids  # after preemption all blocks are new
                    prompt.blocks = [*([] if resumed else prompt.blocks), *blocks[self._group]]
                self._follow(request, cached.num_computed_tokens[at], scheduler_output, ended)
        return ended

    def _follow(self, request: str, computed: int, scheduler_output: Any, ended: _Ended) -> None:
        prompt = self._running[request]
        if computed + scheduler_output.num_scheduled_tokens.get(request, 0) >= prompt.n_tokens:
            prompt.ended = True
            ended.prompts[request] = prompt

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Returns (False: the blocks may be freed now, `kv_transfer_params` with the pooled states or None)."""
        response = _arrived.pop(request.request_id, None)
        if self._running.pop(request.request_id, None) is None or response is None:
            return False, None  # no states were requested, or the request was aborted during prefill
        return False, {STATES_KEY: response | ({"encoder": self._encoder} if self._encoder else {})}

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """`request_finished` for a model with several KV cache groups."""
        return self.request_finished(request, [])

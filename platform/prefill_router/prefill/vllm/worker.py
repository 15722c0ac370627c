"""What is added to vLLM's workers: a loader that reads the lower blocks' weights only, an end with the process that
started them, and hooks on the blocks.

Named as `worker_extension_cls`, this module is imported in every worker before the model is loaded. Hooks are for
architectures that vLLM's speculator cannot read from: every prompt must then be prefilled in one piece, in eager mode.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import os
import signal
import threading
from collections.abc import Generator, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import parse_column
from prefill_router.prefill.loading import find_blocks, locate, lower_weights

LOADER = "prefill_router"


@register_model_loader(LOADER)
class EncoderLoader(DefaultModelLoader):
    """Passes over the weights of blocks that the model, cut by `hf_overrides`, does not have, without reading them.

    `model_loader_extra_config`: `blocks`, or None to read all; `owner`, the pid of the process that the worker is to
    end with. vLLM makes the loader early in a worker's life, so that it is the place for that.
    """

    def __init__(self, load_config: Any) -> None:
        ours = load_config.model_loader_extra_config
        usual = copy.copy(load_config)  # the engine's, by which others are made too
        usual.model_loader_extra_config = {}
        super().__init__(usual)
        self._blocks: int | None = ours["blocks"]
        if ours["owner"] != os.getpid():
            threading.Thread(target=_end_with, args=(ours["owner"],), daemon=True).start()

    def _get_weights_iterator(
        self, source: DefaultModelLoader.Source
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        folder = locate(EncoderConfig(model=source.model_or_path, revision=source.revision))
        for file, name in lower_weights(folder, self._blocks):
            yield source.prefix + name, file.get_tensor(name)


def _end_with(owner: int) -> None:
    """Killed outright, the owner stops nothing: its engine would run on without anybody to ask it."""
    with suppress(psutil.NoSuchProcess):
        psutil.Process(owner).wait()
    os.kill(os.getpid(), signal.SIGTERM)  # the worker's own way to stop; the engine follows


def prompt_key(ids: Sequence[int]) -> str:
    """Recognises a prompt by its tokens."""
    return hashlib.sha256(np.asarray(ids, dtype=np.int64).tobytes()).hexdigest()


class PrefillStatesWorker:
    """Methods for `collective_rpc`; their names are vLLM's workers' too, hence the prefix."""

    model_runner: Any
    distributed_init_method: str

    def prefill_states_unlink(self) -> None:
        """Takes the names of what the engine's processes share, now that they have found each other. It lasts while
        they hold it, and nothing is left of it then, however they end."""
        held = [line[line.find("/") :] for line in Path("/proc/self/maps").read_text().splitlines()]
        store = self.distributed_init_method.removeprefix("file://")
        for path in {path for path in held if path.startswith("/dev/shm/psm_")} | {store}:
            with suppress(FileNotFoundError):  # another rank was first; or the store is no file
                os.unlink(path)
                if path != store:
                    resource_tracker.unregister(f"/{Path(path).name}", "shared_memory")

    def prefill_states_hook(self, columns: Sequence[str]) -> None:
        """Taps the layers that the columns read."""
        model = self.model_runner.get_model()
        blocks = find_blocks(model, self.model_runner.model_config.get_total_num_hidden_layers())
        self._prefill_columns = [parse_column(column) for column in columns]
        self._prefill_pooled: dict[str, np.ndarray] = {}
        self._prefill_states: dict[int, torch.Tensor] = {}
        self._prefill_step: tuple[torch.Tensor, torch.Tensor] | None = None
        model.register_forward_pre_hook(self._prefill_begin, with_kwargs=True)
        model.register_forward_hook(self._prefill_end)
        for layer in {layer for _, layer in self._prefill_columns}:
            if layer:
                blocks[layer - 1].register_forward_hook(
                    lambda _, __, output, layer=layer: self._prefill_keep(layer, *_parts(output))
                )
            else:
                blocks[0].register_forward_pre_hook(
                    lambda block, args, kwargs: self._prefill_keep(0, _argument(block, args, kwargs, "hidden_states")),
                    with_kwargs=True,
                )

    def prefill_states_take(self) -> dict[str, bytes]:
        """The pooled states, float32 [columns, hidden], by `prompt_key`, of the prompts read since the last call."""
        pooled, self._prefill_pooled = self._prefill_pooled, {}
        return {key: array.tobytes() for key, array in pooled.items()}

    def _prefill_begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._prefill_states.clear()
        self._prefill_step = (_argument(model, args, kwargs, "input_ids"), _argument(model, args, kwargs, "positions"))

    def _prefill_keep(self, layer: int, states: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        # vLLM's blocks leave the sum with the residual to the next one, and later ones may overwrite both.
        self._prefill_states[layer] = states.clone() if residual is None else states + residual

    @torch.no_grad()
    def _prefill_end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        assert self._prefill_step is not None
        ids, positions = self._prefill_step
        if ids is None or positions.dim() != 1:
            return  # a run to measure memory
        starts = (positions == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
            pooled = []
            for pooling, layer in self._prefill_columns:
                states = self._prefill_states[layer].reshape(-1, self._prefill_states[layer].shape[-1])[start:end]
                pooled.append(states[-1].float() if pooling == "last" else states.mean(dim=0, dtype=torch.float32))
            self._prefill_pooled[prompt_key(ids[start:end].tolist())] = torch.stack(pooled).cpu().numpy()


def _parts(output: Any) -> tuple[torch.Tensor, ...]:
    return tuple(output[:2]) if isinstance(output, tuple) else (output,)


def _argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """A forward pass's argument, however it was given."""
    if name in kwargs:
        return kwargs[name]
    names = list(inspect.signature(module.forward).parameters)
    return args[names.index(name)] if name in names[: len(args)] else None

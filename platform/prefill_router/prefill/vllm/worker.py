"""Extensions of vLLM's workers: a loader for the lower blocks, termination with the parent process, and forward hooks.

vLLM imports this module in every worker before it loads the model, because `worker_extension_cls` names a class of it.
Hooks serve architectures that vLLM's speculator does not support; every prompt must then be prefilled in one step and
in eager mode.
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
from prefill_router.prefill.loading import find_blocks, lower_weights
from prefill_router.prefill.locating import locate

LOADER = "prefill_router"


@register_model_loader(LOADER)
class EncoderLoader(DefaultModelLoader):
    """Loads the weights of the first `blocks` transformer blocks and skips those of the later blocks.

    `model_loader_extra_config` holds `blocks` (None loads all) and `owner`, the pid of the process that started the
    engine. When the owner ends, the worker ends too. The constructor starts the thread that watches the owner, because
    vLLM constructs the loader before anything else of ours runs in the worker.
    """

    def __init__(self, load_config: Any) -> None:
        extra = load_config.model_loader_extra_config
        plain = copy.copy(load_config)  # the engine shares the original with other loaders
        plain.model_loader_extra_config = {}
        super().__init__(plain)
        self._blocks: int | None = extra["blocks"]
        if extra["owner"] != os.getpid():
            threading.Thread(target=_end_with, args=(extra["owner"],), daemon=True).start()

    def _get_weights_iterator(
        self, source: DefaultModelLoader.Source
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        folder = locate(EncoderConfig(model=source.model_or_path, revision=source.revision))
        for file, name in lower_weights(folder, self._blocks):
            yield source.prefix + name, file.get_tensor(name)


def _end_with(owner: int) -> None:
    """Waits for the end of process `owner`, then terminates this worker. A killed owner cannot stop its engine."""
    with suppress(psutil.NoSuchProcess):
        psutil.Process(owner).wait()
    os.kill(os.getpid(), signal.SIGTERM)  # the worker shuts down, and the engine with it


def prompt_key(ids: Sequence[int]) -> str:
    """sha256 of a prompt's tokens."""
    return hashlib.sha256(np.asarray(ids, dtype=np.int64).tobytes()).hexdigest()


class PrefillStatesWorker:
    """Methods for `collective_rpc`. vLLM mixes them into its worker class, so that their names have a prefix."""

    model_runner: Any
    distributed_init_method: str

    def prefill_states_unlink(self) -> None:
        """Deletes the files of the engine's shared memory after all its processes have opened it.

        The processes keep using the memory, and no file is left behind when they are killed.
        """
        mapped = [line[line.find("/") :] for line in Path("/proc/self/maps").read_text().splitlines()]
        store = self.distributed_init_method.removeprefix("file://")
        for path in {path for path in mapped if path.startswith("/dev/shm/psm_")} | {store}:
            with suppress(FileNotFoundError):  # another rank has deleted it, or the store is not a file
                os.unlink(path)
                if path != store:
                    resource_tracker.unregister(f"/{Path(path).name}", "shared_memory")

    def prefill_states_hook(self, columns: Sequence[str]) -> None:
        """Registers forward hooks for the layers of `columns`."""
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
        """Pooled states of the prompts since the last call, as float32 bytes [columns, hidden], by `prompt_key`."""
        pooled, self._prefill_pooled = self._prefill_pooled, {}
        return {key: array.tobytes() for key, array in pooled.items()}

    def _prefill_begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._prefill_states.clear()
        self._prefill_step = (_argument(model, args, kwargs, "input_ids"), _argument(model, args, kwargs, "positions"))

    def _prefill_keep(self, layer: int, states: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        # vLLM's blocks return the residual separately, and later blocks may overwrite both tensors.
        self._prefill_states[layer] = states.clone() if residual is None else states + residual

    @torch.no_grad()
    def _prefill_end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        assert self._prefill_step is not None
        ids, positions = self._prefill_step
        if ids is None or positions.dim() != 1:
            return  # vLLM's memory profiling
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
    """The argument `name` of a forward call, given by position or by keyword; None if it is not given."""
    if name in kwargs:
        return kwargs[name]
    names = list(inspect.signature(module.forward).parameters)
    return args[names.index(name)] if name in names[: len(args)] else None

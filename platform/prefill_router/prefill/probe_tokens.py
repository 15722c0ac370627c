"""Probe tokens: learnt tokens after the prompt whose states predict which models answer it (IntroLM, arXiv 2601.03511).

The encoder's weights are frozen. An adapter has the input embeddings of k probe tokens and low-rank matrices A and B of
linear maps of the transformer blocks, W x + B A x (Hu et al. 2022, LoRA). With `positions: suffix` the matrices apply
at the probe tokens only: the prompt's keys and values are those of the encoder without adapter, and a prefix cache can
be reused. An adapter is a folder with `adapter.safetensors` and `adapter.json`. This module does not train adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache

from prefill_router.errors import InputError
from prefill_router.files import sha256_file, write_atomically, write_json
from prefill_router.prefill.adapter import MANIFEST, WEIGHTS, AdapterManifest, Positions, require_adapter
from prefill_router.prefill.encoder import EncoderInfo

Maps = Literal["feed_forward", "all"]
NEEDED = ("inputs_embeds", "position_ids", "past_key_values")  # arguments of the model's forward pass


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a batch of right-padded prompts, and their mask [batch, tokens] (1: token, 0: padding)."""

    keys_values: tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor

    def cache(self) -> DynamicCache:
        """A new cache with these keys and values. Adding to it leaves the prefix as it is."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.keys_values):
            cache.update(keys, values, layer)
        return cache


class ProbeTokens:
    """The parameters of an adapter in float32, and their effect on the transformer blocks.

    `parameters` holds `embeddings` [k, hidden] and for each adapted linear map `NAME.down` [rank, inputs] (A) and
    `NAME.up` [outputs, rank] (B); NAME is the index of the block and the module's path in it.
    """

    def __init__(self, parameters: Mapping[str, Tensor], positions: Positions) -> None:
        self.parameters = {name: nn.Parameter(value.float()) for name, value in parameters.items()}
        self.positions = positions
        self._active = False

    @property
    def count(self) -> int:
        """k, the number of probe tokens."""
        return len(self.parameters["embeddings"])

    def attach(self, blocks: nn.ModuleList) -> None:
        """Moves the parameters to the device of the blocks and adds hooks, which act within `active` only.

        Matrices of blocks beyond the loaded ones are left out. Raises InputError for a linear map that does not exist.
        """
        device = next(blocks.parameters()).device
        for parameter in self.parameters.values():
            parameter.data = parameter.data.to(device)
        for name in self.adapted_maps:
            index, _, path = name.partition(".")
            if int(index) >= len(blocks):
                continue
            try:
                module = blocks[int(index)].get_submodule(path)
            except AttributeError:
                raise InputError(f"adapter: the encoder's block {index} has no linear map {path!r}") from None
            down, up = self.parameters[f"{name}.down"], self.parameters[f"{name}.up"]
            module.register_forward_hook(lambda _, args, output, down=down, up=up: self._add(args[0], output, down, up))

    @property
    def adapted_maps(self) -> list[str]:
        """Names of the adapted linear maps."""
        return [name.removesuffix(".down") for name in self.parameters if name.endswith(".down")]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the block, the low-rank matrices apply to all positions of a forward pass."""
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def inputs(self, mask: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Arguments of the probe tokens' forward pass after the prompts of `mask` [batch, tokens]."""
        batch, count = len(mask), self.count
        offsets = torch.arange(count, device=mask.device)
        return {
            "inputs_embeds": self.parameters["embeddings"].to(dtype).expand(batch, -1, -1),
            "attention_mask": torch.cat([mask, mask.new_ones(batch, count)], dim=1),
            "position_ids": mask.sum(dim=1, keepdim=True) + offsets,
        }

    def _add(self, inputs: Tensor, output: Tensor, down: Tensor, up: Tensor) -> Tensor | None:
        if not self._active:
            return None
        return output + (inputs @ down.T.to(inputs.dtype)) @ up.T.to(inputs.dtype)


def new_probe_tokens(
    embeddings: Float[Tensor, "tokens hidden"],
    blocks: nn.ModuleList,
    rank: int,
    maps: Maps,
    positions: Positions,
    seed: int,
) -> ProbeTokens:
    """Untrained probe tokens: these embeddings, random A and B = 0, so that W x + B A x = W x.

    Raises InputError if a block has no linear map of the kind `maps`.
    """
    parameters = {"embeddings": embeddings.detach().clone()}
    generator = torch.Generator().manual_seed(seed)
    for index, block in enumerate(blocks) if rank else ():
        found = list(_linear_maps(block, maps))
        if not found:
            raise InputError(
                f"maps: got {maps!r}, but block {index} ({type(block).__name__}) has no linear map of this kind; "
                "allowed are dense models, or rank 0"
            )
        for path, n_in, n_out in found:
            bound = n_in**-0.5
            down = torch.rand(rank, n_in, generator=generator) * 2 * bound - bound
            parameters[f"{index}.{path}.down"], parameters[f"{index}.{path}.up"] = down, torch.zeros(n_out, rank)
    return ProbeTokens(parameters, positions)


def _linear_maps(block: nn.Module, maps: Maps) -> Iterator[tuple[str, int, int]]:
    """(path, inputs, outputs) of the block's linear maps; `feed_forward` leaves out those of the attention."""
    for path, module in block.named_modules():
        if maps == "feed_forward" and ("attn" in path.lower() or "attention" in path.lower()):
            continue
        if isinstance(module, nn.Linear):
            yield path, module.in_features, module.out_features
        elif type(module).__name__ == "Conv1D":  # of GPT-2, with transposed weights
            yield path, *module.weight.shape


def require_suffix(model: nn.Module, text: Any, attention: str, longest: int) -> None:
    """Raises InputError unless probe tokens can follow a prompt.

    The model must be causal, and every block must attend to all earlier tokens of `longest` tokens, the maximum of
    prompt and probe tokens.
    """
    kinds = sorted({kind for kind in getattr(text, "layer_types", None) or () if kind != "full_attention"})
    accepted = inspect.signature(model.forward).parameters
    window = None if getattr(text, "layer_types", None) else getattr(text, "sliding_window", None)
    reason = None
    if attention != "causal":
        reason = f"its attention is {attention}, so that later tokens would change the prompt's states"
    elif kinds:
        reason = f"it has blocks of the kind {', '.join(kinds)}"
    elif window is not None and window < longest:
        reason = f"its sliding window of {window} tokens is shorter than prompt and probe tokens, {longest} tokens"
    elif any(name not in accepted for name in NEEDED):
        reason = f"it takes no {', '.join(name for name in NEEDED if name not in accepted)}"
    if reason:
        raise InputError(
            f"adapter: {type(model).__name__} cannot have probe tokens: {reason}; use a causal language model with "
            "full attention in every block"
        )


def save_adapter(
    folder: Path, tokens: ProbeTokens, head: Mapping[str, Tensor], manifest: Mapping[str, Any]
) -> AdapterManifest:
    """Writes an adapter folder. `head` are arrays of the training's prediction head, which encoders do not use.

    `manifest` has the fields of `AdapterManifest` except those of the tokens and of the weights file.
    """
    arrays = {name: value.detach().cpu().contiguous() for name, value in tokens.parameters.items()}
    arrays |= {f"head.{name}": value.detach().cpu().contiguous() for name, value in head.items()}
    (folder / MANIFEST).unlink(missing_ok=True)  # until both files are written there is no adapter
    write_atomically(folder / WEIGHTS, lambda temporary: save_file(arrays, temporary))
    ranks = [len(value) for name, value in tokens.parameters.items() if name.endswith(".down")]
    made = AdapterManifest(
        **manifest,
        tokens=tokens.count,
        rank=ranks[0] if ranks else 0,
        positions=tokens.positions,
        weights_digest=sha256_file(folder / WEIGHTS),
    )
    write_json(folder / MANIFEST, made.model_dump(mode="json"))
    return made


def load_adapter(folder: Path | str, base: EncoderInfo) -> ProbeTokens:
    """The adapter of the encoder `base`.

    Raises InputError for a folder without an adapter, damaged weights, or an adapter of another encoder.
    """
    manifest = require_adapter(folder, base)
    weights = Path(folder).expanduser() / WEIGHTS
    try:
        arrays = load_file(weights)
    except SafetensorError as error:
        raise InputError(f"adapter: {weights} cannot be read ({error}); copy the folder again") from None
    parameters = {name: value for name, value in arrays.items() if not name.startswith("head.")}
    return ProbeTokens(parameters, manifest.positions)

"""Loading an encoder's model: its configuration, shape, weights digest and lower blocks.

In: the model's folder (locating.py). Out: its transformers config, shape, digest and module. Invalid input raises
InputError. Independent of hidden states and their pooling.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from prefill_router.errors import InputError
from prefill_router.files import read_json, sha256_file, sha256_strings
from prefill_router.prefill.bundled import BUNDLED, check_weights
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import EncoderInfo, LoadedWeights, column_name, resolve_layers
from prefill_router.prefill.gguf import source_digest
from prefill_router.prefill.locating import locate
from prefill_router.prefill.quiet import quiet
from prefill_router.prefill.tokens import PromptTokenizer, require_no_code

FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")  # of weights, as safetensors names them
BLOCK = re.compile(r"\.(\d+)\.")  # the first number in a weight's name is the index of its block
# Errors of model classes that reject a configuration with fewer blocks. Damaged files raise some of them too; loading
# the full model then raises the error again.
LOWER_BLOCKS_ERRORS = (InputError, RuntimeError, ValueError, LookupError, StrictDataclassError)


@dataclass(frozen=True)
class EncoderShape:
    """Number of transformer blocks, hidden size and activations columns of an encoder, from its config file."""

    n_layers: int
    hidden_size: int
    columns: tuple[str, ...]

    @property
    def block_parameters(self) -> float:
        """Approximate number of parameters in the blocks: 12 hidden_size^2 per block of a standard transformer."""
        return 12.0 * self.n_layers * self.hidden_size**2


def describe(config: EncoderConfig) -> EncoderShape:
    """The shape of the configured encoder; reads no weights. Raises InputError as `locate` and `read_config` do."""
    text = read_config(locate(config, ["*.json"])).get_text_config()
    return EncoderShape(text.num_hidden_layers, text.hidden_size, columns(config, text.num_hidden_layers))


def columns(config: EncoderConfig, n_layers: int) -> tuple[str, ...]:
    """The configured activations columns, ordered by pooling, then layer. Raises InputError for an invalid layer."""
    layers = resolve_layers(config.layers, n_layers)
    return tuple(column_name(pooling, layer) for pooling in dict.fromkeys(config.poolings) for layer in layers)


def read_config(folder: Path) -> Any:
    """The transformers config. Raises InputError unless the model is a causal LM or a bidirectional text encoder."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        require_no_code(folder, "config.json")
        raise InputError(
            f"model: the installed transformers does not support {folder}/config.json "
            f"({' '.join(str(error).split())[:200]}); use another model or another version of transformers"
        ) from None
    if config.is_encoder_decoder:
        raise InputError(
            f"model: {folder} is an encoder-decoder ({config.model_type}); allowed are causal language "
            "models and bidirectional encoders"
        )
    text = config.get_text_config()
    if type(config) not in MODEL_MAPPING or not all(
        hasattr(text, name) for name in ("num_hidden_layers", "hidden_size", "vocab_size")
    ):
        raise InputError(
            f"model: {folder} is not a text model ({config.model_type}); allowed are causal language models "
            "and bidirectional encoders"
        )
    return config


def load_lower_blocks(folder: Path, config: Any, dtype: torch.dtype, highest: int) -> tuple[nn.Module, LoadedWeights]:
    """Loads the lowest `highest` transformer blocks of a model, at least one; weights of higher blocks are not read.

    The states of layers 0 to `highest` equal those of the full model bit for bit. If the model class rejects a
    configuration with fewer blocks, the full model is loaded and the higher blocks are freed. Raises InputError as
    `load_model` does.
    """
    n_layers, blocks = config.get_text_config().num_hidden_layers, max(highest, 1)
    model: nn.Module | None = None
    if blocks < n_layers:
        with suppress(*LOWER_BLOCKS_ERRORS):  # loading the full model raises the errors of damaged files again
            model = load_model(folder, _lower_blocks_config(config, blocks), dtype)
    if model is None:
        model = load_model(folder, config, dtype)
        del find_blocks(model, n_layers)[blocks:]
    total_bytes = sum(path.stat().st_size for path in weight_files(folder))
    loaded = sum(parameter.nbytes for parameter in {id(one): one for one in model.parameters()}.values())
    return model, LoadedWeights(blocks, n_layers, loaded, total_bytes)


def lower_blocks_fields(config: Any, blocks: int) -> dict[str, Any]:
    """Fields of the text configuration to override so that the model has `blocks` blocks; per-layer lists included."""
    text = config.get_text_config()
    n_layers = text.num_hidden_layers
    per_layer = {
        name: value[:blocks]
        for name, value in vars(text).items()
        if "layer" in name and isinstance(value, list | tuple) and len(value) == n_layers
    }
    return per_layer | {"num_hidden_layers": blocks}


def _lower_blocks_config(config: Any, blocks: int) -> Any:
    """A copy of the configuration with `blocks` blocks."""
    changed = copy.deepcopy(config)
    for name, value in lower_blocks_fields(config, blocks).items():
        setattr(changed.get_text_config(), name, value)
    return changed


def identify(
    config: EncoderConfig,
    folder: Path,
    text: Any,
    tokenizer: PromptTokenizer,
    *,
    architecture: str,
    attention: Literal["causal", "bidirectional"],
    digest: str,
    backend: str,
) -> EncoderInfo:
    """The identity of an encoder, from its files, its tokenizer and its backend's properties."""
    return EncoderInfo(
        model=config.model,
        revision=folder.name if folder.parent.name == "snapshots" else None,
        architecture=architecture,
        weights_digest=digest,
        tokenizer_digest=tokenizer.digest,
        attention=attention,
        last_token="last real token" if attention == "causal" else "first token ([CLS])",
        n_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        max_length=tokenizer.max_length,
        truncation_side=config.truncation_side,
        template=tokenizer.template,
        template_date=tokenizer.template_date,
        dtype=config.dtype,
        states_dtype=config.states_dtype,
        backend=backend,
    )


def base_class(config: Any) -> str:
    """Name of the transformers class of the model without its head.

    Raises InputError unless the model is a causal language model, and for rotary positions that vLLM computes
    differently.
    """
    text = config.get_text_config()
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(text, "is_decoder", False)
    if (
        masked
        or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        or getattr(text, "is_causal", True) is False
        or getattr(text, "use_bidirectional_attention", None) in (True, "all")
    ):
        raise InputError(
            f"backend: vLLM supports causal language models only, the model is a {config.model_type}; "
            "use backend: transformers"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    if (kind := rope.get("rope_type")) in ("longrope", "dynamic"):
        raise InputError(
            f"backend: the rotary positions ({kind}) of this {config.model_type} depend on the prompt's length in "
            "transformers but on the maximum length in vLLM, so that states would differ; use backend: transformers"
        )
    return str(_base_class(config).__name__)


def _base_class(config: Any) -> Any:
    kinds: Any = MODEL_MAPPING[type(config)]
    return kinds[0] if isinstance(kinds, list | tuple) else kinds


def load_model(folder: Path, config: Any, dtype: torch.dtype) -> nn.Module:
    """The base model in eval mode, without head and pooler. Raises InputError if weights are damaged or missing."""
    kind = _base_class(config)
    options = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind).parameters else {}
    return _load(AutoModel, folder, config, dtype, options)


def load_language_model(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    """The model with its language-model head, in eval mode.

    Raises InputError as `load_model` does, and for a model without a language-model head.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"model: {folder} has no language-model head ({config.model_type}); allowed are causal language models"
        )
    return _load(AutoModelForCausalLM, folder, config, dtype, {})


def _load(auto: Any, folder: Path, config: Any, dtype: torch.dtype, options: dict[str, Any]) -> nn.Module:
    config.use_cache = False
    quantisation = getattr(config, "quantization_config", None)
    reason = None
    with quiet():
        try:
            model, report = auto.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
        except (AttributeError, KeyError, TypeError) as error:
            if not quantisation:
                raise
            reason = f"its configuration is incomplete: {' '.join(str(error).split())[:160]}"
    # transformers would initialise missing weights at random
    missing = [] if reason else sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if quantisation and (reason or missing):
        raise InputError(
            f"model: {folder} is quantised ({_method(quantisation)}) and cannot be loaded "
            f"({reason or f'{missing[0]} is missing'}); use the original weights, which are not quantised"
        )
    if reason:
        raise InputError(f"model: {folder} cannot be loaded ({reason}); download or save it again")
    if missing:
        raise InputError(
            f"model: {folder} lacks {len(missing)} weights, {missing[0]} among them; "
            "use a complete checkpoint of this architecture"
        )
    if not quantisation or _method(quantisation) not in AUTO_QUANTIZER_MAPPING:
        _require_float_weights(folder)  # transformers would cast them as numbers
    return model.eval()


def _require_float_weights(folder: Path) -> None:
    """Raises InputError if a weight is stored as integers or in 8 bits. Reads the types only."""
    for file, name in lower_weights(folder, None):
        dtype = file.get_slice(name).get_dtype()
        if name.endswith("weight") and dtype not in FLOAT_DTYPES:
            raise InputError(
                f"model: {folder}: {name} has dtype {dtype}, and no quantisation method that transformers supports "
                f"is configured; allowed are {', '.join(FLOAT_DTYPES)}; use the original weights, which are not "
                "quantised"
            )


def _method(quantisation: Any) -> str:
    """Name of the quantisation method, from the configuration's mapping or transformers' object."""
    found = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
    return str(getattr(found.get("quant_method"), "value", found.get("quant_method")))


def find_blocks(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The transformer blocks: the module list of length `n_layers` with the most parameters.

    Raises InputError if the model has no such list.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == n_layers]
    if not lists:
        raise InputError(
            f"model: {type(model).__name__} has no module list of {n_layers} transformer blocks; allowed are "
            "models with one module per layer"
        )
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def embedding_rows(model: nn.Module, text: Any) -> int:
    """Number of rows of the model's token embedding table."""
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(table.num_embeddings) if isinstance(table, nn.Embedding) else int(text.vocab_size)


def max_positions(model: nn.Module, text: Any) -> int | None:
    """Maximum number of tokens by the model's positions; None if unlimited.

    A position table with a padding index (RoBERTa) starts after that index.
    """
    positions = getattr(text, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            used = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - used
    return positions


def find_device(name: str) -> torch.device:
    """The torch device `name`; `auto` is cuda if available, else cpu. Raises InputError for an unavailable device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device: got {name!r}, allowed are auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: got {name!r}, but no CUDA device is available; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device: got {name!r}, but {torch.cuda.device_count()} CUDA devices are visible, numbered from 0; "
            "use cuda (Ray makes only the actor's own GPUs visible)"
        )
    return device


def weight_files(folder: Path) -> list[Path]:
    """The model's safetensors file, or its shards in name order. Raises InputError if one is missing."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"model: {folder} has no {missing[0]}; only safetensors are read, never pickle: load the "
            "model once with transformers and save it with save_pretrained"
        )
    return [folder / name for name in names]


def lower_weights(folder: Path, blocks: int | None) -> Iterator[tuple[Any, str]]:
    """Yields (open weight file, weight name) of all weights below block `blocks`; None: of all weights.

    Reads the names only, no weights.
    """
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  the file is not a mapping
                block = BLOCK.search(name)
                if blocks is None or block is None or int(block[1]) < blocks:
                    yield file, name


def weights_digest(folder: Path, config: EncoderConfig) -> str:
    """sha256 of the safetensors file, or of the digests of its shards in name order; one pass over the files.

    For a dequantised folder: sha256 of the GGUF file, if the folder's files are unchanged. Raises InputError if a file
    is missing, if a dequantised folder in the cache is damaged, or if a bundled encoder's weights are not the official
    ones.
    """
    if source := source_digest(folder):
        return source
    digests = [sha256_file(path) for path in weight_files(folder)]
    if config.model in BUNDLED:
        check_weights(config.model, digests[0])
    return digests[0] if len(digests) == 1 else sha256_strings(digests)

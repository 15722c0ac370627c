"""Finding and loading a model for the transformers backend, and what is known of it before its weights are read.

In: an `EncoderConfig` that names a folder, a hub id or the bundled encoder. Out: the folder, its config, its shape,
its digest, the model. Whatever a user can get wrong ends in an InputError here. Knows nothing of hidden states.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
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
from transformers.utils import logging as hf_logging

from prefill_router.errors import InputError
from prefill_router.files import read_json, sha256_file, sha256_strings
from prefill_router.prefill.bundled import check_weights, minilm_folder
from prefill_router.prefill.config import MINILM, EncoderConfig
from prefill_router.prefill.encoder import EncoderInfo, Loaded, column_name, resolve_layers
from prefill_router.prefill.tokens import PromptTokenizer

BLOCK = re.compile(r"\.(\d+)\.")  # in a weight's name, the first number is its block's
# What a model's classes may say to a configuration that was cut; of a damaged file too, which the whole meets again.
CANNOT_BE_CUT = (InputError, RuntimeError, ValueError, LookupError, StrictDataclassError)
TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # and the configuration
WANTED_FILES = [*TOKENIZER_FILES, "*.safetensors"]


@dataclass(frozen=True)
class EncoderShape:
    """What a model's config file tells before any weight is read."""

    n_layers: int
    hidden_size: int
    columns: tuple[str, ...]

    @property
    def block_parameters(self) -> float:
        """Roughly: 12 hidden^2 per block of a plain transformer."""
        return 12.0 * self.n_layers * self.hidden_size**2


def describe(config: EncoderConfig) -> EncoderShape:
    """The shape of the configured encoder, without its weights. Raises InputError as `TransformersEncoder` does."""
    text = read_config(locate(config, ["*.json"])).get_text_config()
    return EncoderShape(text.num_hidden_layers, text.hidden_size, columns(config, text.num_hidden_layers))


def columns(config: EncoderConfig, n_layers: int) -> tuple[str, ...]:
    """The activations columns asked for, by pooling, then layer. Raises InputError for a layer outside 0..n_layers."""
    layers = resolve_layers(config.layers, n_layers)
    return tuple(column_name(pooling, layer) for pooling in dict.fromkeys(config.poolings) for layer in layers)


def locate(config: EncoderConfig, wanted: list[str] | None = None) -> Path:
    """The model's folder: packaged, a path, or the hub's snapshot (from the cache where the hub is out of reach)."""
    model = config.model
    if model == MINILM:
        return minilm_folder()
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"model: {folder} is not a model folder: it has no config.json")
        return folder
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise InputError(f"model: {model}: no such folder; allowed are a model folder, a hub id or {MINILM!r}")
    try:
        return Path(snapshot_download(model, revision=config.revision, allow_patterns=wanted or WANTED_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"model: {model!r} is no folder here, and the hub did not give it "
            f"({' '.join(str(error).split())[:200]}); allowed are a model folder, a hub id or "
            f"{MINILM!r}"
        ) from None


def read_config(folder: Path) -> Any:
    """The transformers config. Raises InputError unless it is a causal LM's or a bidirectional text encoder's."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model: {folder}/config.json is not a model this transformers knows ({' '.join(str(error).split())[:200]})"
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
            f"model: {folder} is no text model ({config.model_type}); allowed are causal language models "
            "and bidirectional encoders"
        )
    return config


def load_lower_blocks(folder: Path, config: Any, dtype: torch.dtype, highest: int) -> tuple[nn.Module, Loaded]:
    """As `load_model`, but only the blocks below layer `highest` (at least one): no weight of another is read.

    The states up to that layer are those of the whole model, bit for bit. A model whose configuration cannot be cut is
    loaded whole, and the blocks above are freed.
    """
    n_layers, blocks = config.get_text_config().num_hidden_layers, max(highest, 1)
    model: nn.Module | None = None
    if blocks < n_layers:
        with suppress(*CANNOT_BE_CUT):  # raised again by loading the whole, where the whole is at fault
            model = load_model(folder, _cut(config, blocks), dtype)
    if model is None:
        model = load_model(folder, config, dtype)
        del find_blocks(model, n_layers)[blocks:]
    of_bytes = sum(path.stat().st_size for path in weight_files(folder))
    loaded = sum(parameter.nbytes for parameter in {id(one): one for one in model.parameters()}.values())
    return model, Loaded(blocks, n_layers, loaded, of_bytes)


def cut(config: Any, blocks: int) -> dict[str, Any]:
    """The fields of a text configuration that change when it has so many blocks: what it lists by layer is cut too."""
    text = config.get_text_config()
    n_layers = text.num_hidden_layers
    listed = {
        name: value[:blocks]
        for name, value in vars(text).items()
        if "layer" in name and isinstance(value, list | tuple) and len(value) == n_layers
    }
    return listed | {"num_hidden_layers": blocks}


def _cut(config: Any, blocks: int) -> Any:
    """The configuration with so many blocks."""
    less = copy.deepcopy(config)
    for name, value in cut(config, blocks).items():
        setattr(less.get_text_config(), name, value)
    return less


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
    """The identity of an encoder, from its files, its tokenizer, and what its backend knows of it."""
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
        dtype=config.dtype,
        states_dtype=config.states_dtype,
        backend=backend,
    )


def base_class(config: Any) -> str:
    """The name of the transformers class of the model without its head. Raises InputError unless the model is a causal
    language model: the first token's state must not know of the last."""
    text = config.get_text_config()
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(text, "is_decoder", False)
    if (
        masked
        or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        or getattr(text, "is_causal", True) is False
        or getattr(text, "use_bidirectional_attention", None) in (True, "all")
    ):
        raise InputError(
            f"backend: vLLM reads the states of causal language models only, this is a {config.model_type}"
            "; use backend: transformers"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    if (kind := rope.get("rope_type")) in ("longrope", "dynamic"):
        raise InputError(
            f"backend: this {config.model_type}'s positions ({kind}) depend on the prompt's length in "
            "transformers and on the longest allowed in vLLM: its states would differ; use backend: "
            "transformers"
        )
    return str(_base_class(config).__name__)


def _base_class(config: Any) -> Any:
    kinds: Any = MODEL_MAPPING[type(config)]
    return kinds[0] if isinstance(kinds, list | tuple) else kinds


def load_model(folder: Path, config: Any, dtype: torch.dtype) -> nn.Module:
    """The base model in eval mode, without head and pooler. Raises InputError when weights are damaged or missing."""
    kind = _base_class(config)
    options = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind).parameters else {}
    return _load(AutoModel, folder, config, dtype, options)


def load_language_model(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    """The model with the head that predicts the next token, in eval mode. Raises InputError as `load_model` does, and
    for a model that has no such head."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"model: {folder} predicts no next token ({config.model_type}); allowed are causal language models"
        )
    return _load(AutoModelForCausalLM, folder, config, dtype, {})


def _load(auto: Any, folder: Path, config: Any, dtype: torch.dtype, options: dict[str, Any]) -> nn.Module:
    config.use_cache = False
    with _quiet():
        try:
            model, report = auto.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"model: {folder} cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:  # transformers would go on with random numbers
        raise InputError(
            f"model: {folder} lacks {len(missing)} weights, {missing[0]} among them; "
            "is it a complete checkpoint of this architecture?"
        )
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def find_blocks(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The model's blocks: of the module lists of that length, the one with the most parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == n_layers]
    if not lists:
        raise InputError(
            f"model: {type(model).__name__} has no list of {n_layers} blocks to read from; allowed are "
            "models with one module per layer"
        )
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def max_positions(model: nn.Module, text: Any) -> int | None:
    """Tokens that the model has positions for. Tables with a padding index (RoBERTa) start counting after it."""
    positions = getattr(text, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            used = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - used
    return positions


def find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device: got {name!r}, allowed are auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: got {name!r}, but no CUDA device is here; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device: got {name!r}, here are {torch.cuda.device_count()} CUDA devices, counted from 0; "
            "use cuda (Ray shows an encoder those that are its own)"
        )
    return device


def weight_files(folder: Path) -> list[Path]:
    """The model's safetensors file, or its shards in name order. Raises InputError where there are none."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"model: {folder} has no {missing[0]}; only safetensors are read (never pickle): load the "
            "model once with transformers and save it with save_pretrained"
        )
    return [folder / name for name in names]


def lower_weights(folder: Path, blocks: int | None) -> Iterator[tuple[Any, str]]:
    """The open weight file and the name of every weight that a text model of so many blocks has; None: of all. Reads
    none of them."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                block = BLOCK.search(name)
                if blocks is None or block is None or int(block[1]) < blocks:
                    yield file, name


def weights_digest(folder: Path, config: EncoderConfig) -> str:
    """sha256 of the safetensors file, or over the digests of its shards in name order; one pass over the files.

    Raises InputError where there are none, and for a bundled encoder that is not the official one.
    """
    digests = [sha256_file(path) for path in weight_files(folder)]
    if config.model == MINILM:
        check_weights(folder, digests[0])
    return digests[0] if len(digests) == 1 else sha256_strings(digests)

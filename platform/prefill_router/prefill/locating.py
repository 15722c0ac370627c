"""Locating an encoder's model: a bundled package, a folder, a GGUF file, or a model on the hub.

In: an `EncoderConfig`. Out: the model's folder on this machine. Invalid input raises InputError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from prefill_router.errors import InputError
from prefill_router.prefill.bundled import BUNDLED, bundled_weights, check_weights
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.gguf import SUFFIX, dequantise, gguf_digest, is_cached, is_gguf

TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # includes config.json
MODEL_FILES = [*TOKENIZER_FILES, "*.safetensors"]


def locate(config: EncoderConfig, patterns: list[str] | None = None) -> Path:
    """Folder of the model: a bundled package, a local path, a hub snapshot, or the dequantised copy of a GGUF file.

    `patterns` limits the files that are downloaded. Without access to the hub the cached snapshot is used. Raises
    InputError if there is no such model, or if a bundled encoder's weights are not the official ones.
    """
    model = config.model
    if model in BUNDLED:
        path = bundled_weights(model)
        if not is_gguf(path.name):
            return path.parent
        check_weights(model, gguf_digest(path))
        return dequantise(path)
    folder = Path(model).expanduser()
    if is_gguf(model) and not folder.is_dir() and not _is_hub_id(model):
        return dequantise(_gguf_file(config))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            files = ", ".join([path.name for path in sorted(folder.iterdir()) if is_gguf(path.name)][:3])
            hint = f"; for a GGUF encoder give the file ({files})" if files else ""
            raise InputError(f"model: {folder} is not a model folder: it has no config.json{hint}")
        return folder
    _refuse_path(model)
    with _hub_errors(model):
        return Path(snapshot_download(model, revision=config.revision, allow_patterns=patterns or MODEL_FILES))


def absence(config: EncoderConfig) -> str | None:
    """What `locate` would do first, such as a download; None if the model is on this machine. Writes nothing.

    Raises InputError as `locate` does for a bundled encoder or a path that does not exist.
    """
    model, folder = config.model, Path(config.model).expanduser()
    if model in BUNDLED or (is_gguf(model) and folder.is_file()):
        path = bundled_weights(model) if model in BUNDLED else folder
        return f"{path.name} is dequantised into a cache first" if is_gguf(path.name) and not is_cached(path) else None
    if folder.is_dir():
        return None
    _refuse_path(model)
    if not is_gguf(model):
        with suppress(LocalEntryNotFoundError, HFValidationError):
            snapshot_download(model, revision=config.revision, allow_patterns=MODEL_FILES, local_files_only=True)
            return None
    return f"{model} is downloaded from the hub first"


def _gguf_file(config: EncoderConfig) -> Path:
    """The configured GGUF file: a local path, or OWNER/NAME/FILE.gguf on the hub."""
    path = Path(config.model).expanduser()
    if path.is_file():
        return path
    owner, _, rest = config.model.partition("/")
    name, _, file = rest.partition("/")
    if not file or path.is_absolute() or config.model.startswith((".", "~")):
        raise InputError(
            f"model: {config.model}: no such file; allowed are the path of a {SUFFIX} file, or OWNER/NAME/FILE{SUFFIX} "
            "for a file on the hub"
        )
    with _hub_errors(config.model):
        return Path(hf_hub_download(f"{owner}/{name}", file, revision=config.revision))


def _is_hub_id(model: str) -> bool:
    """Whether a name that ends in .gguf can only be a model on the hub: OWNER/NAME, and no such file exists."""
    path = Path(model).expanduser()
    return model.count("/") == 1 and not path.is_file() and not path.is_absolute() and not model.startswith((".", "~"))


def _refuse_path(model: str) -> None:
    """Raises InputError for a name that can only be a local path."""
    if Path(model).expanduser().is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise InputError(f"model: {model}: no such folder; allowed are {_allowed()}")


@contextmanager
def _hub_errors(model: str) -> Iterator[None]:
    """Reports a failed download as InputError."""
    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"model: {model!r} is not a local path and cannot be downloaded from the hub "
            f"({' '.join(str(error).split())[:200]}); allowed are {_allowed()}"
        ) from None


def _allowed() -> str:
    return f"a model folder, a {SUFFIX} file, a hub id or {', '.join(map(repr, BUNDLED))}"

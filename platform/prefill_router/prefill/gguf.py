"""GGUF encoders: a GGUF file is dequantised once, into a model folder that every backend reads.

In: a GGUF file. Out: a folder with safetensors weights in float32, config.json and tokenizer, in
`$XDG_CACHE_HOME/prefill-router/gguf/DIGEST`, with the digest of the GGUF file. The identity of the encoder is this
digest, not that of the dequantised weights. Independent of encoder configurations.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prefill_router.errors import InputError
from prefill_router.files import cache_folder, read_json, sha256_file, write_json
from prefill_router.prefill.quiet import quiet
from prefill_router.prefill.special_tokens import add_special_tokens

SUFFIX = ".gguf"
SOURCE = "gguf.json"  # of a dequantised folder: name and sha256 of the GGUF file
FIELDS = (
    "general.architecture",
    "split.count",
    "tokenizer.ggml.model",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
)
LOAD_ERRORS = (OSError, ValueError, RuntimeError, LookupError, AttributeError, TypeError, NotImplementedError)


def gguf_digest(path: Path) -> str:
    """sha256 of a GGUF file. Repeated calls for an unchanged file read it once."""
    found = path.stat()
    return _digest(path, found.st_size, found.st_mtime_ns)


@lru_cache
def _digest(path: Path, size: int, changed: int) -> str:
    return sha256_file(path)


def source_digest(folder: Path) -> str | None:
    """sha256 of the GGUF file that `folder` was dequantised from; None for any other model folder."""
    path = folder / SOURCE
    return str(read_json(path)["sha256"]) if path.is_file() else None


def dequantise(path: Path) -> Path:
    """The model folder with the dequantised weights of the GGUF file `path`; made on the first call for its content.

    Weights are dequantised to float32. The tokenizer adds the first (BOS) and last (EOS) token that the file asks for,
    also if transformers leaves them out. Concurrent calls are safe. Raises InputError if the file is not a GGUF file of
    a causal language model that the installed transformers supports, or if the cache cannot be written.
    """
    digest = gguf_digest(path)
    cache = cache_folder() / "gguf"
    folder = cache / digest[:16]
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=cache))
    except OSError as error:
        raise InputError(
            f"{cache}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder that can"
        ) from None
    try:
        _convert(path, scratch)
        write_json(scratch / SOURCE, {"file": path.name, "sha256": digest})
        scratch.chmod(0o755)
        os.replace(scratch, folder)
    except OSError:
        if not folder.is_dir():  # another process may have made it at the same time
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert(path: Path, folder: Path) -> None:
    fields = read_fields(path)
    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, **options)
        with quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    except LOAD_ERRORS as error:
        raise InputError(
            f"model: {path} ({fields.get('general.architecture', 'unknown architecture')}) cannot be read by the "
            f"installed transformers ({' '.join(str(error).split())[:200]}); use another file, or the model's "
            "safetensors folder"
        ) from None
    _add_special_tokens(tokenizer, fields)
    # transformers does not save a model that it loaded from GGUF: its configuration says that it is quantised.
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    with torch.device("meta"):
        plain: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    with quiet():
        plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_fields(path: Path) -> dict[str, Any]:
    """The metadata `FIELDS` of a GGUF file. Raises InputError if it is no GGUF file, or one of several parts."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError(f"model: {path} needs the package gguf; run `pip install gguf`") from None
    try:
        found = GGUFReader(path).fields
        fields = {name: found[name].contents() for name in FIELDS if name in found}
    except (OSError, ValueError, LookupError) as error:
        raise InputError(
            f"model: {path} is not a GGUF file, or damaged ({' '.join(str(error).split())[:160]}); download it again"
        ) from None
    if fields.get("split.count", 1) > 1:
        raise InputError(f"model: {path} is one of several parts; merge them into one file (llama-gguf-split --merge)")
    return fields


def _add_special_tokens(tokenizer: Any, fields: dict[str, Any]) -> None:
    """Makes the tokenizer add BOS and EOS as the file's flags say.

    A file without the BOS flag has the default of its tokenizer kind: true for SentencePiece ("llama").
    """
    sentencepiece = fields.get("tokenizer.ggml.model") == "llama"
    wanted = {
        "bos": bool(fields.get("tokenizer.ggml.add_bos_token", sentencepiece)),
        "eos": bool(fields.get("tokenizer.ggml.add_eos_token", False)),
    }
    ids = tokenizer("a")["input_ids"]
    first, last = ids[:1] == [tokenizer.bos_token_id], ids[-1:] == [tokenizer.eos_token_id]
    add_special_tokens(
        tokenizer,
        tokenizer.bos_token if wanted["bos"] and not first else None,
        tokenizer.eos_token if wanted["eos"] and not last else None,
    )

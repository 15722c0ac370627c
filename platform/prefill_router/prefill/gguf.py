"""GGUF encoders: a GGUF file is dequantised once, into a model folder that every backend reads.

In: a GGUF file. Out: a folder with safetensors weights in float32, config.json and tokenizer, in
`$XDG_CACHE_HOME/prefill-router/gguf/DIGEST-CONVERSION`, with the digest of the GGUF file and those of the folder's own
files. The identity of the encoder is the digest of the GGUF file, not that of the dequantised weights. Independent of
encoder configurations.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prefill_router.errors import InputError
from prefill_router.files import DAMAGED, cache_folder, read_json, replace_folder, sha256_file, write_json
from prefill_router.prefill.quiet import quiet
from prefill_router.prefill.special_tokens import add_special_tokens

SUFFIX = ".gguf"
CONVERSION = 1  # raise it whenever the conversion of the same file gives other files
RECORD = "gguf.json"  # of a dequantised folder: the GGUF file, and size and sha256 of the files made from it
CONVERTING = ".converting-"  # prefixes of temporary folders
LEFTOVER_S = 24 * 3600  # a temporary folder of this age belongs to an interrupted conversion
FIELDS = (
    "general.architecture",
    "split.count",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
)
# Kinds of BPE tokenizers whose BOS flag is true in llama.cpp if the file does not set it.
BOS_BY_DEFAULT = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano")
)
ROPE_FACTORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")  # tensors that transformers does not read
ROPE_SCALES = ("rope.scaling.factor", "rope.scale_linear")  # fields that transformers does not read
READ_ROPE_SCALES = frozenset(("gpt-oss",))  # architectures for which it does
LOAD_ERRORS = (OSError, ValueError, RuntimeError, LookupError, AttributeError, TypeError)
logger = logging.getLogger(__name__)


def is_gguf(name: str) -> bool:
    """Whether a file has the suffix of GGUF files, in upper or lower case."""
    return name.lower().endswith(SUFFIX)


def gguf_digest(path: Path) -> str:
    """sha256 of a GGUF file. Repeated calls for an unchanged file read it once."""
    found = path.stat()
    return _digest(path, found.st_size, found.st_mtime_ns)


@lru_cache
def _digest(path: Path, size: int, changed: int) -> str:
    return sha256_file(path)


def source_digest(folder: Path) -> str | None:
    """sha256 of the GGUF file that `folder` was dequantised from; None for any other model folder.

    A folder whose files differ from those of the conversion is another model: None. Raises InputError if it is in the
    cache, because its files are then damaged.
    """
    record = _record(folder)
    if record is None:
        return None
    for name, made in record["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != made["bytes"] or gguf_digest(path) != made["sha256"]:
            if folder.resolve().parent == _cache().resolve():
                raise InputError(
                    f"model: {folder} is damaged: {name} is not the file that was made from {record['file']}; "
                    "delete the folder, the next command makes it from the GGUF file"
                )
            return None
    return str(record["sha256"])


def dequantise(path: Path) -> Path:
    """The model folder with the dequantised weights of the GGUF file `path`; made on the first call for its content.

    Weights are dequantised to float32. The tokenizer adds the first (BOS) and last (EOS) token that the file asks for,
    also if transformers leaves them out. Files next to `path` are not read. A folder that lacks a file, or has one of
    another size, is replaced. Concurrent calls are safe. Raises InputError if the file is not a complete GGUF file of a
    causal language model that the installed transformers supports, or if the cache cannot be written.
    """
    digest, cache = gguf_digest(path), _cache()
    folder = cache / f"{digest[:16]}-{CONVERSION}"
    if _is_intact(folder, digest):
        return folder
    scratch = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(cache)
        scratch = Path(tempfile.mkdtemp(prefix=CONVERTING, dir=cache))
        made = scratch / "model"
        made.mkdir()
        _convert(path, _linked(path, scratch / "source"), made)
        _write_record(made, path.name, digest)
        replace_folder(made, folder, lambda: _is_intact(folder, digest))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
        raise InputError(
            f"{cache}: cannot be written ({reason}); make it writable and free disk space, or set XDG_CACHE_HOME to "
            "another folder"
        ) from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def is_cached(path: Path) -> bool:
    """Whether `dequantise` would find a folder for this file. Writes nothing."""
    digest = gguf_digest(path)
    return _is_intact(_cache() / f"{digest[:16]}-{CONVERSION}", digest)


def _cache() -> Path:
    return cache_folder() / "gguf"


def _record(folder: Path) -> dict[str, Any] | None:
    """Content of the folder's gguf.json; None if there is none, or one without the digests of the files."""
    try:
        record = read_json(folder / RECORD)
        digests = [one["sha256"] for one in record["files"].values() if one["bytes"] >= 0]
        return record if digests and record["sha256"] and record["file"] else None
    except (InputError, LookupError, TypeError, AttributeError):
        return None


def _is_intact(folder: Path, digest: str) -> bool:
    """Whether `folder` was made from the GGUF file with this digest, and every file has its size. Reads no weights."""
    record = _record(folder)
    if record is None or record["sha256"] != digest:
        return False
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    return all(sizes.get(name) == made["bytes"] for name, made in record["files"].items())


def _write_record(folder: Path, name: str, digest: str) -> None:
    """Writes gguf.json, and gives every file the permissions of a new file."""
    made = sorted(path for path in folder.iterdir() if path.is_file())
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in made}
    write_json(folder / RECORD, {"file": name, "sha256": digest, "conversion": CONVERSION, "files": files})
    mode = (folder / RECORD).stat().st_mode & 0o777
    for path in made:
        path.chmod(mode)  # safetensors writes files that only their owner can read


def _remove_leftovers(cache: Path) -> None:
    for prefix in (CONVERTING, DAMAGED):
        for folder in cache.glob(f"{prefix}*"):
            with suppress(OSError):
                if time.time() - folder.stat().st_mtime > LEFTOVER_S:
                    shutil.rmtree(folder, ignore_errors=True)


def _linked(path: Path, folder: Path) -> Path:
    """The GGUF file alone in a new folder: transformers prefers tokenizer files next to it to its own tokenizer."""
    folder.mkdir()
    link = folder / f"model{SUFFIX}"
    for make in (Path.symlink_to, Path.hardlink_to):
        with suppress(OSError):
            make(link, path.resolve())
            return link
    shutil.copyfile(path, link)
    return link


def _convert(path: Path, link: Path, folder: Path) -> None:
    """Writes the model of the GGUF file `path` to `folder`; `link` is the file in a folder without other files."""
    fields = read_fields(path)
    options: dict[str, Any] = {"gguf_file": link.name, "local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(link.parent, **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                link.parent, dtype=torch.float32, output_loading_info=True, **options
            )
    except LOAD_ERRORS as error:
        raise InputError(
            f"model: {path} ({fields.get('general.architecture', 'unknown architecture')}) cannot be read by the "
            f"installed transformers ({' '.join(str(error).split())[:200]}); use another file, or the model's "
            "safetensors folder"
        ) from None
    model, report = loaded
    if missing := sorted(report["missing_keys"]):  # transformers initialises missing weights at random
        raise InputError(
            f"model: {path} lacks {len(missing)} weights, {missing[0]} among them; use a complete file of this "
            "architecture, or the model's safetensors folder"
        )
    _add_special_tokens(tokenizer, fields, path)
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
    """The metadata `FIELDS` of a GGUF file.

    Raises InputError if it is no GGUF file, one of several parts, or scales its rotary positions in a way that
    transformers ignores.
    """
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise InputError(f"model: {path} needs the package gguf; run `pip install gguf`") from None
    try:
        reader = GGUFReader(path)
        fields = {name: reader.fields[name].contents() for name in FIELDS if name in reader.fields}
        scaled = [
            tensor.name
            for tensor in reader.tensors
            if tensor.name.startswith(ROPE_FACTORS) and np.any(dequantize(tensor.data, tensor.tensor_type) != 1)
        ]
        architecture = fields.get("general.architecture")
        if architecture not in READ_ROPE_SCALES:
            scales = [f"{architecture}.{name}" for name in ROPE_SCALES if f"{architecture}.{name}" in reader.fields]
            # llama.cpp reads a factor of 0 as no scaling
            scaled += [name for name in scales if reader.fields[name].contents() not in (0, 1)]
    except (OSError, ValueError, LookupError) as error:
        raise InputError(
            f"model: {path} is not a GGUF file, or damaged ({' '.join(str(error).split())[:160]}); download it again"
        ) from None
    if fields.get("split.count", 1) > 1:
        raise InputError(f"model: {path} is one of several parts; merge them into one file (llama-gguf-split --merge)")
    if scaled:
        raise InputError(
            f"model: {path} scales its rotary positions ({scaled[0]}), which transformers ignores in GGUF files; use "
            "the model's safetensors folder"
        )
    return fields


def _add_special_tokens(tokenizer: Any, fields: dict[str, Any], path: Path) -> None:
    """Makes the tokenizer add BOS and EOS as the file's flags say. Logs a warning if the file has no such token.

    A file without the BOS flag has llama.cpp's default for its tokenizer: true for SentencePiece ("llama") and for some
    kinds of BPE.
    """
    default = fields.get("tokenizer.ggml.model") == "llama" or fields.get("tokenizer.ggml.pre") in BOS_BY_DEFAULT
    wanted = {
        "bos": bool(fields.get("tokenizer.ggml.add_bos_token", default)),
        "eos": bool(fields.get("tokenizer.ggml.add_eos_token", False)),
    }
    names = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
    for name in wanted:
        if wanted[name] and names[name] is None:
            logger.warning(
                "%s: its tokenizer should add a token of the kind %s, but the file has none; use a file with a "
                "complete tokenizer",
                path,
                name.upper(),
            )
    ids = tokenizer("a")["input_ids"]
    first, last = ids[:1] == [tokenizer.bos_token_id], ids[-1:] == [tokenizer.eos_token_id]
    add_special_tokens(
        tokenizer,
        names["bos"] if wanted["bos"] and not first else None,
        names["eos"] if wanted["eos"] and not last else None,
    )

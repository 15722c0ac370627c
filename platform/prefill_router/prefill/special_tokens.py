"""BOS and EOS tokens: makes a tokenizer add those that its configuration declares.

transformers ignores `add_bos_token` and `add_eos_token` of tokenizer_config.json if the folder has a tokenizer.json.
In: a loaded fast tokenizer and its folder. Out: the tokenizer with a changed post-processor, and warnings. Independent
of truncation and of models' weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import processors

from prefill_router.files import read_json

GEMMA = "gemma"  # beginning of the model_type of all Gemma models


def obey_special_token_flags(tokenizer: Any, folder: Path, vocabulary: int, rendered: str | None) -> list[str]:
    """Makes `tokenizer` add BOS and EOS if tokenizer_config.json says so, and returns warnings.

    A flag that is true is obeyed, because the model was trained with that token and its states are poor without it; the
    changed post-processor is part of the tokenizer's digest, and tokenizers that agree with their flags keep their
    digest. A flag that is false or missing changes nothing. `vocabulary` is the number of rows of the embedding table.
    `rendered` is a prompt in the chat template, None without a template; a template sets all special tokens, and the
    tokenizer is not changed.

    Warnings, of one line each: a declared token does not exist or has no embedding; a chat template does not start with
    a declared BOS token; a Gemma model has no BOS token, and no flag that is true.
    """
    flags = _flags(folder)
    gemma = _is_gemma(folder)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if rendered is not None:
        if (flags["bos"] or gemma) and bos is not None and not rendered.startswith(bos):
            return [
                f"{folder}: the chat template does not start with the BOS token {bos!r} that the model expects; add "
                "{{ bos_token }} to the template"
            ]
        return []
    lacks = _lacking(tokenizer)
    missing = [name for name in ("bos", "eos") if flags[name] and lacks[name]]
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    usable = [name for name in missing if ids[name] is not None and ids[name] < vocabulary]
    add_special_tokens(tokenizer, bos if "bos" in usable else None, eos if "eos" in usable else None)
    warnings = [
        f"{folder}: tokenizer_config.json sets add_{name}_token, but "
        f"{'the tokenizer has no such token' if ids[name] is None else 'the model has no embedding of the token'}; "
        "use the tokenizer and configuration of one model"
        for name in missing
        if name not in usable
    ]
    if gemma and lacks["bos"] and not flags["bos"]:
        warnings.append(
            f"{folder}: Gemma models expect a BOS token before every prompt, and the tokenizer adds none; set "
            "add_bos_token to true in tokenizer_config.json and repeat prefill"
        )
    return warnings


def add_special_tokens(tokenizer: Any, bos: str | None, eos: str | None) -> None:
    """Makes the fast `tokenizer` put `bos` before and `eos` after every text, outside the tokens that it adds already.

    None adds no token.
    """
    if bos is None and eos is None:
        return
    head, tail = _added_tokens(tokenizer)
    tokens = [token for token in (bos, *head, *tail, eos) if token is not None]
    template = processors.TemplateProcessing(
        single=[*([bos] if bos else []), *head, "$A", *tail, *([eos] if eos else [])],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys(tokens)],
    )
    backend = tokenizer.backend_tokenizer
    before = backend.post_processor
    # A sequence ignores a template that follows one with tokens.
    keep = before is not None and not head and not tail
    backend.post_processor = processors.Sequence([before, template]) if keep else template


def _added_tokens(tokenizer: Any) -> tuple[list[str], list[str]]:
    """The tokens that the tokenizer adds before and after every text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((n for n in range(len(full) - len(bare) + 1) if full[n : n + len(bare)] == bare), 0)
    names = tokenizer.convert_ids_to_tokens(full)
    return names[:start], names[start + len(bare) :]


def _lacking(tokenizer: Any) -> dict[str, bool]:
    """Whether the tokenizer adds no BOS token before a text, and no EOS token after it."""
    ids = tokenizer("a")["input_ids"]
    return {"bos": ids[:1] != [tokenizer.bos_token_id], "eos": ids[-1:] != [tokenizer.eos_token_id]}


def _flags(folder: Path) -> dict[str, bool]:
    settings = _settings(folder / "tokenizer_config.json")
    return {name: settings.get(f"add_{name}_token") is True for name in ("bos", "eos")}


def _is_gemma(folder: Path) -> bool:
    return str(_settings(folder / "config.json").get("model_type", "")).startswith(GEMMA)


def _settings(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else None
    return found if isinstance(found, dict) else {}

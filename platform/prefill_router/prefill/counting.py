"""Counts of tokens by the tokenizer of an encoder, for texts whose counts nobody recorded. No model is loaded."""

from __future__ import annotations

from collections.abc import Callable

from transformers import AutoTokenizer

from prefill_router.errors import InputError
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.locating import locate


def token_counter(model: str) -> Callable[[str], int]:
    """A function that counts the tokens of a text, without special tokens, with the tokenizer of `model`.

    `model` is as `EncoderConfig.model`. Raises InputError if there is no such encoder or it has no tokenizer.
    """
    folder = locate(EncoderConfig(model=model))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"tokenizer: no tokenizer in {folder} ({' '.join(str(error).split())[:200]})") from None
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

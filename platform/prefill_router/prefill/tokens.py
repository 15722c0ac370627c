"""Prompts to token ids: chat template, truncation with its counts, and batches of similar length.

In: prompts, invalid ones included. Out: one `Tokens` per prompt, for any backend. Truncation removes tokens of the
prompt only: special tokens ([CLS] .. [SEP]) and the surrounding chat template are kept. Independent of models.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from jinja2 import TemplateError
from transformers import AutoTokenizer

from prefill_router.errors import InputError
from prefill_router.files import read_json
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import Tokens, utf8_bytes
from prefill_router.prefill.special_tokens import obey_special_token_flags

DEFAULT_LIMIT = 8192  # tokens, if max_length is None
UNLIMITED = 10**9  # tokenizers without a limit report 1e30
TEMPLATE_TODAY = datetime(2024, 7, 26)  # today in every chat template: the default date of Llama 3's template
RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")  # the functions of a template that are not deterministic
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError)
logger = logging.getLogger(__name__)


class _Encoded(NamedTuple):
    """All token ids of a text, and the counts of unknown tokens as in `Tokens`."""

    ids: list[int]
    n_unknown: int
    n_unknown_bytes: int


class PromptTokenizer:
    """A fast tokenizer with the configured template and truncation.

    It adds the BOS and EOS tokens that tokenizer_config.json declares; warnings of them are logged.
    `positions` is the model's maximum number of tokens; None: unlimited. `vocabulary` is the number of rows of its
    embedding table: a prompt with a token beyond them has an `error`. `template_date` is the date that the chat
    template prints as today; None: it prints none. Raises InputError for a tokenizer that is missing, slow or without
    the configured chat template, for a template that cannot be rendered or is random, and for a max_length above the
    model's limit or too small for any token of the prompt.
    """

    def __init__(self, folder: Path, config: EncoderConfig, positions: int | None, vocabulary: int) -> None:
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            require_no_code(folder, "tokenizer_config.json")
            raise InputError(
                f"model: no tokenizer in {folder} ({' '.join(str(error).split())[:200]}); save one with the model"
            ) from None
        if not self._tokenizer.is_fast:
            raise InputError(f"model: {folder} has no tokenizer.json (a fast tokenizer); save one with the model")
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        self.template_date: str | None = None
        self.template = self._template_text() if config.chat_template else None
        rendered = self._render("a") if self.template else None
        for warning in obey_special_token_flags(self._tokenizer, folder, vocabulary, rendered):
            logger.warning("model: %s", warning)
        self.digest = hashlib.sha256(backend.to_str().encode()).hexdigest()
        self._vocabulary = vocabulary
        pad = self._tokenizer.pad_token_id
        self.pad_id: int = 0 if pad is None or pad >= vocabulary else pad  # padding is masked: any embedding serves
        bos = self._tokenizer.bos_token_id
        # For callers that prepend it to a text. None if the tokenizer has none or adds it itself, or the model has no
        # embedding of it.
        self.bos_id: int | None = None
        if bos is not None and bos < vocabulary and self._tokenizer("a")["input_ids"][:1] != [bos]:
            self.bos_id = bos
        self._unknown_id = _unknown_id(backend)
        self._side = config.truncation_side
        limits = [n for n in (self._tokenizer.model_max_length, positions) if n is not None and n < UNLIMITED]
        self.max_length = _max_length(config.max_length, int(min(limits)) if limits else None)
        self._head, self._tail = self._ends("a") if self.template else self._special_ends()
        if self._head + self._tail >= self.max_length:
            raise InputError(
                f"max_length: {self.max_length} leaves no room for the prompt: "
                f"{'the chat template' if self.template else 'special tokens'} take "
                f"{self._head + self._tail} tokens; set a larger max_length"
            )

    def __call__(self, prompts: Sequence[object]) -> list[Tokens]:
        """The prompts' tokens, in order.

        A prompt has an `error` if it is null, blank, no string or without tokens, if the chat template refuses it, or
        if the model has no embedding of one of its tokens.
        """
        errors = [_unreadable(prompt) for prompt in prompts]
        texts: list[str] = []
        for row, prompt in enumerate(prompts):
            if errors[row] is None:
                try:
                    texts.append(self._text(str(prompt)))
                except TEMPLATE_ERRORS as error:
                    errors[row] = f"the chat template refuses the prompt: {' '.join(str(error).split())[:200]}"
        encoded = iter(self._encode(texts))
        return [
            self._tokens(prompt, next(encoded)) if error is None else Tokens([], 0, error)
            for prompt, error in zip(prompts, errors, strict=True)
        ]

    def bare_ids(self, text: str) -> list[int]:
        """Token ids of a text without special tokens, template and truncation."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _tokens(self, prompt: object, encoded: _Encoded) -> Tokens:
        tokens = self._truncated(prompt, encoded.ids)
        # Compared on the host: on a GPU such a token ends the process.
        if (highest := max(tokens.ids, default=0)) >= self._vocabulary:
            text = self._tokenizer.convert_ids_to_tokens(highest)
            tokens = Tokens(
                [],
                tokens.n_tokens,
                f"token {text!r} (id {highest}) is beyond the {self._vocabulary} rows of the model's embedding table",
            )
        return replace(tokens, n_unknown=encoded.n_unknown, n_unknown_bytes=encoded.n_unknown_bytes)

    def _truncated(self, prompt: object, ids: list[int]) -> Tokens:
        if len(ids) <= (0 if self.template else self._head + self._tail):
            return Tokens([], len(ids), "the tokenizer returns no token for this prompt")
        if len(ids) <= self.max_length:
            return Tokens(ids, len(ids))
        head, tail = self._ends(str(prompt)) if self.template else (self._head, self._tail)
        room = self.max_length - head - tail
        if room <= 0:  # the template's length depends on the prompt
            return Tokens(
                [],
                len(ids),
                f"the chat template takes {head + tail} tokens, max_length is {self.max_length}",
            )
        body = ids[head : len(ids) - tail]
        first = {"left": 0, "middle": room // 2, "right": room}[self._side]  # kept tokens at the prompt's beginning
        kept = [*body[:first], *body[len(body) - (room - first) :]]
        return Tokens([*ids[:head], *kept, *ids[len(ids) - tail :]], len(ids))

    def _encode(self, texts: list[str]) -> list[_Encoded]:
        if not texts:
            return []
        # The rendered template contains its special tokens.
        batch = self._tokenizer(
            texts, add_special_tokens=self.template is None, verbose=False, return_attention_mask=False
        )
        return [
            _Encoded(ids, *self._count_unknown(text, ids, encoding))
            for text, ids, encoding in zip(texts, batch["input_ids"], batch.encodings, strict=True)
        ]

    def _count_unknown(self, text: str, ids: list[int], encoding: Any) -> tuple[int, int]:
        """Number of unknown tokens, and the UTF-8 bytes of the text that they replace."""
        if self._unknown_id is None or self._unknown_id not in ids:
            return 0, 0
        spans = [span for token, span in zip(ids, encoding.offsets, strict=True) if token == self._unknown_id]
        return len(spans), sum(utf8_bytes(text[start:end]) for start, end in spans)

    def _text(self, prompt: str) -> str:
        return prompt if self.template is None else self._render(prompt)

    def _render(self, prompt: str) -> str:
        turn = [{"role": "user", "content": prompt}]
        return self._tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, strftime_now=self._strftime_now
        )

    def _strftime_now(self, form: str) -> str:
        """Replaces the clock of chat templates, so that a prompt has the same tokens every day."""
        self.template_date = TEMPLATE_TODAY.date().isoformat()
        return TEMPLATE_TODAY.strftime(form)

    def _template_text(self) -> str:
        """Text of the chat template. Sets `template_date`."""
        template = self._tokenizer.chat_template
        if not template:
            raise InputError(
                "chat_template: got true, but the tokenizer has no chat template; set it to false, "
                "or use a model whose tokenizer has one"
            )
        text: str = self._tokenizer.get_chat_template()
        wrong = "is random, so that a prompt would have other states each time" if RANDOM.search(text) else None
        try:
            self._render("a")
        except TEMPLATE_ERRORS as error:
            wrong = f"cannot be rendered ({' '.join(str(error).split())[:200]})"
        if wrong:
            raise InputError(
                f"chat_template: the tokenizer's template {wrong}; set chat_template to false, or correct the template"
            )
        return text

    def _ends(self, prompt: str) -> tuple[int, int]:
        """Numbers of template tokens before and after the prompt's tokens."""
        text = self._text(prompt)
        content = prompt.strip()  # many templates strip; the stripped text occurs in the result in both cases
        start = text.find(content)
        if start < 0:
            return 0, 0
        offsets = self._tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        first, last = start, start + len(content)
        return sum(end <= first for _, end in offsets), sum(begin >= last for begin, _ in offsets)

    def _special_ends(self) -> tuple[int, int]:
        """Numbers of special tokens that the tokenizer adds before and after every prompt."""
        bare = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self._tokenizer("a")["input_ids"]
        for head in range(len(full) - len(bare) + 1):
            if full[head : head + len(bare)] == bare:
                return head, len(full) - head - len(bare)
        return 0, 0


def token_batches(lengths: Int[np.ndarray, " rows"], budget: int) -> Iterator[Int[np.ndarray, " batch"]]:
    """Row numbers in batches of similar length, longest first.

    Rows times longest length is at most `budget` tokens, except for a batch of one long row.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, budget // int(lengths[order[start]]))
        yield order[start : start + rows]
        start += rows


def require_no_code(folder: Path, file: str) -> None:
    """Raises InputError if `file` of a model's folder asks for code of the model's repository."""
    path = folder / file
    settings = read_json(path) if path.is_file() else None
    if isinstance(settings, dict) and "auto_map" in settings:
        raise InputError(
            f"model: {folder} needs code of its own repository (auto_map in {file}), which is never run; use a model "
            "that the installed transformers supports"
        )


def _unknown_id(backend: Any) -> int | None:
    """Id of the token that replaces text outside the vocabulary; None if the tokenizer has none (byte-level BPE)."""
    model = json.loads(backend.to_str())["model"]
    if model.get("unk_id") is not None:  # Unigram
        return int(model["unk_id"])
    token = model.get("unk_token")
    return None if token is None else backend.token_to_id(token)


def _unreadable(prompt: object) -> str | None:
    if prompt is None:
        return "prompt is null"
    if not isinstance(prompt, str):
        return f"prompt is not a string but {type(prompt).__name__}"
    return None if prompt.strip() else "prompt is empty"


def _max_length(wanted: int | None, limit: int | None) -> int:
    if wanted is None:
        return min(limit or DEFAULT_LIMIT, DEFAULT_LIMIT)
    if limit is not None and wanted > limit:
        raise InputError(f"max_length: got {wanted}, the model takes {limit} tokens at most; set {limit} or less")
    return wanted

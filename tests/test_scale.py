"""Reading and projecting in parts gives the same as at once; the simulated encoder of the benchmarks."""

from __future__ import annotations

import errno
import io
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from benchmarks.simulated import SimulatedEncoder, Simulation, simulated_prompts, write_prompts
from prefill_router import text_columns
from prefill_router.errors import InputError, UnavailableError
from prefill_router.files import prompt_digest, sha256_strings
from prefill_router.prefill import dataset, shards
from prefill_router.prefill.dataset import Activations, read_activations, read_batches
from prefill_router.prefill.prompts import on_disk, read_prompts
from prefill_router.prefill.sample_check import sample_prompts
from prefill_router.prefill.shards import PARQUET, finish, input_digest, open_dataset, pending_prompts
from prefill_router.signals import projection
from prefill_router.signals.novelty import Spread
from prefill_router.signals.projection import Moments, fit_projection

SIMULATION = Simulation(tokens_per_s=math.inf, hidden=8, layers=2)
PROMPTS = simulated_prompts(50, 5.0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Activations:
    """A finished dataset of 50 rows in shards of 12."""
    folder, encode = tmp_path_factory.mktemp("activations") / "data", SimulatedEncoder(SIMULATION)
    open_dataset(folder, SIMULATION.header, PROMPTS)
    for start in range(0, 50, 12):
        pq.write_table(encode(PROMPTS.slice(start, 12)), folder / f"{start:02d}.parquet", **PARQUET)
    finish(folder, SIMULATION.header)
    return read_activations(folder)


@pytest.mark.parametrize("batch", [5, 12, 8192])
def test_states_read_in_batches_are_those_of_the_files(
    batch: int, written: Activations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "BATCH_ROWS", batch)
    table = ds.dataset(written.folder, format="parquet", exclude_invalid_files=True).to_table().sort_by("query_id")
    rows = np.array([49, 3, 3, 12, 0, 47, 11, 24])
    ids, texts = (PROMPTS.column(name).to_pylist() for name in ("query_id", "prompt"))
    found = written.states("mean_L2", [ids[row] for row in rows], [prompt_digest(texts[row]) for row in rows])
    expected = np.array(table.column("mean_L2").to_pylist(), dtype=np.float32)[rows]
    np.testing.assert_array_equal(found, expected)


def test_a_column_is_read_in_small_batches(written: Activations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "BATCH_ROWS", 5)
    batches = list(read_batches(written.folder, written.manifest.shards, "mean_L1", written._schema))
    assert sum(map(len, batches)) == 50
    assert max(map(len, batches)) <= 5


def test_projection_and_distance_in_blocks_are_those_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    states = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    fitted = fit_projection(Moments.of(states, states.mean(axis=0)), 3)
    z, distance = fitted(states), Spread.of(states, fitted).distance(states, fitted)
    monkeypatch.setattr(projection, "BLOCK", 7)
    np.testing.assert_allclose(fitted(states), z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(Spread.of(states, fitted).distance(states, fitted), distance, rtol=1e-5)
    assert fitted(states[:0]).shape == (0, 3)


def test_simulated_prompts_are_the_same_in_blocks_and_valid(tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.parquet", 30, 5.0)
    read = read_prompts(tmp_path / "prompts.parquet")
    assert read.equals(simulated_prompts(30, 5.0))
    assert len(set(read.column("query_id").to_pylist())) == 30


def test_a_prompts_file_is_read_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(text_columns, "SMALL_PART_BYTES", 64)
    monkeypatch.setattr(text_columns, "PART_ROWS", 3)
    ids, texts = ["a", "b", "a", "c", "d", "b", "e", "f", "a"], ["x", None, "x", "y", "ü", None, "", "z", "x"]
    pq.write_table(pa.table({"query_id": ids, "prompt": texts}), tmp_path / "p.parquet", row_group_size=4)
    first = [0, 1, 3, 4, 6, 7]
    assert read_prompts(tmp_path / "p.parquet").to_pylist() == [
        {"query_id": ids[row], "prompt": texts[row]} for row in first
    ]
    for row, other in ((5, "text"), (8, None), (8, "text")):
        changed = [*texts[:row], other, *texts[row + 1 :]]
        pq.write_table(pa.table({"query_id": ids, "prompt": changed}), tmp_path / "p.parquet", row_group_size=4)
        with pytest.raises(InputError, match=f"row {row}: query_id '{ids[row]}' has two different prompts"):
            read_prompts(tmp_path / "p.parquet")
    for bad, message in ((None, "row 7: null is not allowed"), (b"\xff", "row 7: the text is not UTF-8")):
        wrong = [one.encode() for one in ids[:7]] + [bad, b"a"]
        table = pa.table({"query_id": pa.array(wrong, pa.binary()), "prompt": texts})
        pq.write_table(table, tmp_path / "p.parquet", row_group_size=4)
        with pytest.raises(InputError, match=f"column 'query_id', {message}"):
            read_prompts(tmp_path / "p.parquet")


def test_the_text_of_prompts_is_not_in_memory(tmp_path: Path) -> None:
    ids, texts = [f"q{row}" for row in range(4000)], [f"{row:05}" * 1000 for row in range(4000)]  # 20 MB
    pq.write_table(pa.table({"query_id": ids, "prompt": texts}), tmp_path / "p.parquet")
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    prompts = read_prompts(tmp_path / "p.parquet")
    digests = [prompt_digest(text) for text in texts[:2000]]
    pending = pending_prompts(prompts, pa.table({"query_id": ids[:2000], "prompt_digest": digests}), tmp_path)
    sample = sample_prompts(pending, 4)
    assert pool.bytes_allocated() - before < 2**20
    assert pending.column("prompt").to_pylist() == texts[2000:]
    assert sample.num_rows == 4


def test_a_full_disk_for_temporary_files_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with pytest.raises(UnavailableError, match=f"{tempfile.gettempdir()}: the disk is full"):
        on_disk([PROMPTS], PROMPTS.schema)


def test_the_simulated_encoder_takes_the_time_of_its_tokens(tmp_path: Path) -> None:
    tokens = sum(text.count("token ") for text in PROMPTS.column("prompt").to_pylist())
    config = SIMULATION.model_copy(update={"tokens_per_s": tokens / 0.2, "times": tmp_path})
    rows = SimulatedEncoder(config)(PROMPTS)
    began, ended = map(float, next(tmp_path.iterdir()).read_text().split())
    assert ended - began >= 0.2
    assert rows.column("query_id").equals(PROMPTS.column("query_id"))
    assert sum(rows.column("n_tokens").to_pylist()) == tokens


def test_the_digest_of_the_input_is_that_of_sorted_python_strings() -> None:
    ids = ["b", "a", "é", "z\U0001f600", "zz", "\ue000x", "\U00010000x", ""]
    digests = ["1", None, "3", "4", "5", "6", "7", "8"]
    index = pa.table({"query_id": pa.chunked_array([ids[:3], ids[3:]]), "prompt_digest": digests})
    pairs = sorted(f"{query}\x1f{digest}" for query, digest in zip(ids, digests, strict=True))
    assert input_digest(index) == sha256_strings(pairs)


def test_a_changed_prompt_is_found_in_every_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shards, "BLOCK", 7)
    ids, texts = (PROMPTS.column(name).to_pylist() for name in ("query_id", "prompt"))
    stored = pa.table({"query_id": ids[:40], "prompt_digest": [prompt_digest(text) for text in texts[:40]]})
    assert pending_prompts(PROMPTS, stored, tmp_path).column("query_id").to_pylist() == ids[40:]
    texts[33] = "another"
    with pytest.raises(InputError, match=f"query_id '{ids[33]}' was encoded from another prompt"):
        pending_prompts(pa.table({"query_id": ids, "prompt": texts}), stored, tmp_path)

"""Reading and projecting in parts gives the same as at once; the simulated encoder of the benchmarks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from benchmarks.simulated import SimulatedEncoder, Simulation, simulated_prompts, write_prompts
from prefill_router.errors import InputError
from prefill_router.files import prompt_digest, sha256_strings
from prefill_router.prefill import dataset, shards
from prefill_router.prefill.dataset import Activations, read_activations, read_batches
from prefill_router.prefill.shards import PARQUET, finish, input_digest, open_dataset, pending_prompts, read_prompts
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

"""The activations dataset: round trips, resumption, and refusal of data that does not match."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from builders import make_outcomes
from tiny_models import prompts, save_model

from prefill_router.errors import InputError
from prefill_router.files import prompt_digest
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.dataset import MANIFEST, PARTIAL, Activations, as_float32, read_activations
from prefill_router.prefill.prompts import read_prompts
from prefill_router.prefill.sample_check import sample_prompts
from prefill_router.prefill.shard_counter import ShardCounter
from prefill_router.prefill.shards import (
    PARQUET,
    ActivationsHeader,
    estimate_bytes,
    finish,
    is_complete,
    open_dataset,
    rows_of_shard,
)
from prefill_router.prefill.transformers_backend import TransformersEncoder
from prefill_router.signals.join import join

TEXTS: list[str | None] = [*prompts(20), None]
IDS = [f"q{row}" for row in range(len(TEXTS))]
GOOD = IDS[:20]
DIGESTS = [prompt_digest(text) for text in prompts(20)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("gpt2", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def encoder(model: Path) -> TransformersEncoder:
    return TransformersEncoder(EncoderConfig(model=str(model)))


def table(ids: list[str] = IDS, texts: list[str | None] = TEXTS) -> pa.Table:
    return pa.table({"query_id": ids, "prompt": pa.array(texts, pa.string())})


def header_of(encoder: TransformersEncoder) -> ActivationsHeader:
    return ActivationsHeader(encoder=encoder.info, columns=encoder.columns, config={"encoder": {}})


def write(folder: Path, encoder: TransformersEncoder, rows: pa.Table, rows_per_shard: int = 8) -> Activations:
    """Writes a dataset as the job does, but in reverse, so that row order differs from the input."""
    opened = open_dataset(folder, header_of(encoder), rows)
    for start in reversed(range(0, opened.pending.num_rows, rows_per_shard)):
        shard = encoder(opened.pending.slice(start, rows_per_shard))
        pq.write_table(shard, folder / f"{start:03}-{shard.num_rows}.parquet", **PARQUET)
    finish(folder, header_of(encoder))
    return read_activations(folder)


@pytest.fixture
def written(tmp_path: Path, encoder: TransformersEncoder) -> Activations:
    return write(tmp_path / "activations", encoder, table())


def test_every_finite_float16_value_is_converted_exactly() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)][:, None]
    np.testing.assert_array_equal(as_float32(halves).view(np.uint32), halves.astype(np.float32).view(np.uint32))
    singles = np.float32([[0.1, -1e30]])
    np.testing.assert_array_equal(as_float32(singles), singles)


def test_states_of_some_queries_equal_these_rows_of_all_states(written: Activations) -> None:
    outcomes = dataclasses.replace(
        make_outcomes(n=20)[0], query_ids=np.array(GOOD, dtype=object), prompts=np.array(prompts(20), dtype=object)
    )
    signals = join(outcomes, [written])
    rows = np.array([7, 3, 19])
    for key in signals.layer_keys:
        np.testing.assert_array_equal(signals.states(key, rows), signals.states(key)[rows])


def test_states_are_returned_in_the_order_of_the_queries(written: Activations, encoder: TransformersEncoder) -> None:
    order = np.random.default_rng(0).permutation(20)
    ids, digests = [GOOD[row] for row in order], [DIGESTS[row] for row in order]
    direct = encoder(table())
    for column in encoder.columns:
        states = written.states(column, np.asarray(ids, dtype=object), digests)
        want = np.asarray([direct.column(column)[int(row)].as_py() for row in order], dtype=np.float32)
        assert states.dtype == np.float32
        np.testing.assert_allclose(states, want, rtol=2e-3, atol=2e-3 * np.abs(want).max())
    np.testing.assert_array_equal(written.n_tokens(ids), [direct.column("n_tokens")[int(row)].as_py() for row in order])


def test_a_row_with_an_error_does_not_shift_the_others(tmp_path: Path, encoder: TransformersEncoder) -> None:
    texts = [None, *prompts(3), "", *prompts(2, seed=5)]
    ids = [f"r{row}" for row in range(7)]
    mixed = write(tmp_path / "mixed", encoder, table(ids, texts), rows_per_shard=3)
    clean = write(tmp_path / "clean", encoder, table([ids[1], ids[6]], [texts[1], texts[6]]))
    digests = [prompt_digest(str(texts[row])) for row in (1, 6)]
    np.testing.assert_allclose(
        mixed.states("last_L3", ["r1", "r6"], digests),
        clean.states("last_L3", ["r1", "r6"], digests),
        rtol=2e-3,
        atol=2e-3,
    )


def test_plain_pyarrow_opens_the_folder(written: Activations, encoder: TransformersEncoder) -> None:
    opened = ds.dataset(written.folder, format="parquet", exclude_invalid_files=True)
    assert opened.count_rows() == 21
    assert opened.schema.equals(encoder(table()).schema)
    column = opened.to_table(columns=["last_L2"], filter=ds.field("query_id") == "q3").column("last_L2")
    assert column.type == pa.list_(pa.float16(), 48)
    assert column.null_count == 0


def test_rows_equal_the_output_of_the_encoder(written: Activations, encoder: TransformersEncoder) -> None:
    rows = written.rows(["q20", "q4"])
    assert rows.schema.equals(encoder(table()).schema)
    assert rows.column("error").to_pylist() == ["prompt is null", None]
    assert written.errors().to_pylist() == [{"query_id": "q20", "error": "prompt is null"}]


def test_queries_columns_and_prompts_that_do_not_match_are_refused(written: Activations) -> None:
    with pytest.raises(InputError, match=r"no column 'last_L9'; allowed are last_L2, last_L3, mean_L2, mean_L3"):
        written.states("last_L9", GOOD, DIGESTS)
    with pytest.raises(InputError, match=r"query_id 'zz' has no activations \(1 of 2 have none\)"):
        written.states("last_L2", ["q1", "zz"], DIGESTS[:2])
    with pytest.raises(InputError, match="query_id 'q1' was encoded from another prompt"):
        written.states("last_L2", ["q0", "q1"], [DIGESTS[0], prompt_digest("other")])
    with pytest.raises(InputError, match="query_id 'q20' has no states: prompt is null"):
        written.states("last_L2", ["q0", "q20"], [DIGESTS[0], prompt_digest("")])


def test_the_manifest_counts_and_the_digest_ignores_order_and_shards(
    tmp_path: Path, written: Activations, encoder: TransformersEncoder
) -> None:
    counts = written.manifest.counts
    assert (counts.rows, counts.errors, counts.truncated_rows, counts.duplicates_after_truncation) == (21, 1, 0, 0)
    assert counts.bytes == sum(path.stat().st_size for path in written.folder.glob("*.parquet"))
    assert written.manifest.versions["pyarrow"] == pa.__version__
    order = list(reversed(range(21)))
    reordered = write(tmp_path / "reordered", encoder, table([IDS[i] for i in order], [TEXTS[i] for i in order]), 21)
    fewer = write(tmp_path / "fewer", encoder, table(IDS[:20], TEXTS[:20]))
    assert reordered.digest == written.digest != fewer.digest


def test_prompts_made_equal_by_truncation_are_counted(tmp_path: Path, model: Path) -> None:
    reader = TransformersEncoder(EncoderConfig(model=str(model), max_length=4, layers=(1,)))
    end = " ba do gi ta ba do gi ta"
    result = write(tmp_path / "cut", reader, table(["a", "b", "c"], [f"ka{end}", f"lo{end}", "mi"]))
    assert result.manifest.counts.truncated_rows == 2
    assert result.manifest.counts.duplicates_after_truncation == 2
    assert result.manifest.counts.dropped_tokens == sum(result.n_tokens(["a", "b"])) - 8


def test_resuming_returns_missing_prompts_and_deletes_damaged_shards(
    tmp_path: Path, encoder: TransformersEncoder
) -> None:
    folder = tmp_path / "a"
    opened = open_dataset(folder, header_of(encoder), table())
    assert (opened.n_present, opened.pending.num_rows) == (0, 21)
    with pytest.raises(InputError, match="this prefill is unfinished; run the same command again"):
        read_activations(folder)
    pq.write_table(encoder(opened.pending.slice(0, 6)), folder / "one.parquet")
    pq.write_table(encoder(opened.pending.slice(6, 6)), folder / "two.parquet")
    whole = (folder / "two.parquet").read_bytes()
    (folder / "two.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "three.parquet").write_bytes(b"")
    resumed = open_dataset(folder, header_of(encoder), table())
    assert (resumed.n_present, resumed.removed_shards) == (6, ("three.parquet", "two.parquet"))
    assert resumed.pending.column("query_id").to_pylist() == IDS[6:]
    assert [path.name for path in folder.glob("*.parquet")] == ["one.parquet"]


def test_a_row_written_twice_is_kept_once(tmp_path: Path, encoder: TransformersEncoder) -> None:
    folder = tmp_path / "a"
    open_dataset(folder, header_of(encoder), table())
    for name, start, rows in (("a", 0, 12), ("b", 8, 13), ("c", 2, 4)):
        pq.write_table(encoder(table().slice(start, rows)), folder / f"{name}.parquet")
    assert finish(folder, header_of(encoder)).shards == ("a.parquet", "b.parquet")
    result = read_activations(folder)
    assert sorted(result.rows(IDS).column("query_id").to_pylist()) == sorted(IDS)
    assert result.manifest.counts.rows == 21


def test_another_encoder_column_dtype_or_prompt_changes_nothing(
    tmp_path: Path, written: Activations, model: Path
) -> None:
    before = {path.name: path.read_bytes() for path in written.folder.iterdir()}

    def reopen(rows: pa.Table | None = None, **options: object) -> None:
        other = TransformersEncoder(EncoderConfig(**{"model": str(model), **options}))
        open_dataset(written.folder, header_of(other), table() if rows is None else rows)

    with pytest.raises(InputError, match="states of another encoder: max_length was 256, is now 9; choose another"):
        reopen(max_length=9)
    with pytest.raises(InputError, match="architecture was 'GPT2Model', is now 'LlamaModel'"):
        reopen(model=str(save_model("llama", tmp_path / "llama")))
    with pytest.raises(InputError, match="holds the columns last_L2, last_L3, mean_L2, mean_L3, requested are last_L1"):
        reopen(layers=(1,))
    with pytest.raises(InputError, match="holds float16 states, requested are float32"):
        reopen(states_dtype="float32")
    with pytest.raises(InputError, match="query_id 'q2' was encoded from another prompt than the input has now"):
        reopen(table(["q2"], ["something else"]))
    assert before == {path.name: path.read_bytes() for path in written.folder.iterdir()}


def test_new_rows_of_the_input_are_added(written: Activations, encoder: TransformersEncoder) -> None:
    more = table([*IDS, "new"], [*TEXTS, "ba do gi"])
    assert is_complete(written.folder, table())
    assert not is_complete(written.folder, more)
    opened = open_dataset(written.folder, header_of(encoder), more)
    assert opened.pending.column("query_id").to_pylist() == ["new"]
    pq.write_table(encoder(opened.pending), written.folder / "more.parquet")
    finish(written.folder, header_of(encoder))
    assert read_activations(written.folder).manifest.counts.rows == 22
    assert is_complete(written.folder, more)
    assert not (written.folder / PARTIAL).exists()


def test_a_folder_with_other_files_is_refused(tmp_path: Path, encoder: TransformersEncoder) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="the folder is not empty and holds no activations dataset"):
        open_dataset(tmp_path, header_of(encoder), table())
    with pytest.raises(InputError, match="no activations dataset here"):
        read_activations(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_dataset_is_refused(written: Activations) -> None:
    shard = written.folder / written.manifest.shards[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:100])
    with pytest.raises(InputError, match=f"{shard.name} cannot be read"):
        read_activations(written.folder).states("last_L2", GOOD, DIGESTS)
    shard.unlink()
    with pytest.raises(InputError, match=f"shard {shard.name} is missing"):
        read_activations(written.folder)
    shard.write_bytes(data)
    manifest = written.folder / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(InputError, match="format_version: Input should be 1"):
        read_activations(written.folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ({"query_id": ["a"]}, "column 'prompt' is missing"),
        ({"query_id": pa.array([], pa.string()), "prompt": pa.array([], pa.string())}, "the table has no rows"),
        ({"query_id": ["a", None], "prompt": ["x", "y"]}, "column 'query_id', row 1: null is not allowed"),
        ({"query_id": [1], "prompt": ["x"]}, "column 'query_id' must hold strings, it holds int64"),
        ({"query_id": ["a", "b", "a"], "prompt": ["x", "y", "z"]}, "row 2: query_id 'a' has two different"),
    ],
)
def test_a_prompts_file_is_checked_by_row_and_column(
    content: dict[str, object] | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        pq.write_table(pa.table(content), tmp_path / "p.parquet")
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / "p.parquet")


def test_a_prompts_file_may_repeat_rows_and_encode_strings_as_dictionaries(tmp_path: Path) -> None:
    pq.write_table(
        pa.table(
            {
                "query_id": pa.array(["b", "a", "b"]).dictionary_encode(),
                "prompt": pa.array(["x", None, "x"]).dictionary_encode(),
            }
        ),
        tmp_path / "p.parquet",
    )
    assert read_prompts(tmp_path / "p.parquet").to_pylist() == [
        {"query_id": "b", "prompt": "x"},
        {"query_id": "a", "prompt": None},
    ]
    (tmp_path / "p.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_prompts(tmp_path / "p.parquet")


def test_estimated_bytes_are_close_to_the_written_bytes(tmp_path: Path, model: Path) -> None:
    reader = TransformersEncoder(EncoderConfig(model=str(model), layers="all", states_dtype="float32"))
    texts = prompts(300)
    result = write(tmp_path / "a", reader, table([f"q{i}" for i in range(300)], texts), 300)
    assert estimate_bytes(300, 8, 48, "float32") == pytest.approx(result.manifest.counts.bytes, rel=0.05)


def test_the_sample_has_the_mean_length_of_all_prompts() -> None:
    texts = prompts(1000)
    chosen = sample_prompts(table([str(i) for i in range(1000)], texts), 64).column("prompt").to_pylist()
    assert len(set(chosen)) == 64
    assert np.mean([len(t) for t in chosen]) == pytest.approx(np.mean([len(t) for t in texts]), rel=0.02)
    assert sample_prompts(table(["a"], [None]), 64).num_rows == 1


def test_a_shard_takes_half_a_minute_within_bounds() -> None:
    assert [rows_of_shard(seconds) for seconds in (0.0, 0.001, 0.1, 0.25, 10.0)] == [1024, 1024, 300, 120, 64]


def test_new_shards_are_counted_once_and_truncated_tokens_are_not(
    tmp_path: Path, encoder: TransformersEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = encoder(table([*IDS, "bad"], [*TEXTS, None]))
    cut = rows.set_column(rows.column_names.index("n_dropped"), "n_dropped", pa.array([1] * 12 + [0] * 10, pa.int32()))
    pq.write_table(rows, tmp_path / "before.parquet")
    counter = ShardCounter(tmp_path, 0.0)
    counter.update(1.0)
    assert (counter.rows, counter.tokens, counter.tokens_per_s(1.0)) == (0, 0, None)
    pq.write_table(rows, tmp_path / "first.parquet")
    whole = (tmp_path / "first.parquet").read_bytes()
    (tmp_path / "first.parquet").write_bytes(whole[:-9])  # incomplete while it is written
    counter.update(2.0)
    assert (counter.rows, counter.tokens) == (0, 0)
    (tmp_path / "first.parquet").write_bytes(whole)
    pq.write_table(cut, tmp_path / "second.parquet")
    pq.write_table(rows.select(["query_id"]), tmp_path / "features.parquet")  # text features have no token counts
    counter.update(4.0)
    tokens = sum(rows.column("n_tokens").to_pylist())
    assert (counter.rows, counter.tokens) == (66, 2 * tokens - 12)
    assert counter.tokens_per_s(4.0) == (2 * tokens - 12) / 4
    monkeypatch.setattr(pq, "ParquetFile", None)  # every shard is read once
    counter.update(5.0)
    assert (counter.rows, counter.tokens) == (66, 2 * tokens - 12)


def test_the_rate_covers_at_least_a_minute_and_expires_without_shards(
    tmp_path: Path, encoder: TransformersEncoder
) -> None:
    rows = encoder(table())
    tokens = sum(rows.column("n_tokens").to_pylist())
    counter = ShardCounter(tmp_path, 0.0)

    def rate_after(now: float) -> float | None:
        pq.write_table(rows, tmp_path / f"{now}.parquet")
        counter.update(now)
        return counter.tokens_per_s(now)

    assert rate_after(50.0) == tokens / 50
    # Two actors finish shards one second apart, every hundred seconds: the rate does not depend on that second.
    assert rate_after(51.0) == 2 * tokens / 51
    assert rate_after(150.0) == tokens / 99
    assert rate_after(151.0) == 2 * tokens / 100
    assert counter.tokens_per_s(351.0) == 2 * tokens / 100
    assert counter.tokens_per_s(352.0) is None

"""String columns: distinct values are kept, text is not decoded by row, and every string type is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import make_table
from hypothesis import given, settings
from hypothesis import strategies as st

from prefill_router import text_columns
from prefill_router.errors import InputError
from prefill_router.outcomes.table import pivot, read_outcomes, unique_prompts, validate_outcomes
from prefill_router.prefill.prompts import read_prompts
from prefill_router.prefill.sample_check import sample_prompts
from prefill_router.prefill.shards import pending_prompts
from prefill_router.text_columns import decode_text, encode_text, read_columns

MODELS = ("small", "medium", "large")
# The file has about 15 kB. Its prompts have 24 MB, and 2.3 GB when they are decoded for every row.
REPEATED = """
import resource, sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from pathlib import Path
from prefill_router.outcomes.table import pivot, read_outcomes, unique_prompts
n, m, path = 100, 96, Path(sys.argv[1])
query, model = np.repeat(np.arange(n), m), np.tile(np.arange(m), n)
code = lambda codes, values: pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(values))
pq.write_table(pa.table({
    "query_id": code(query, [f"q{i}" for i in range(n)]),
    "benchmark": code(query * 0, ["b"]),
    "prompt": code(query, [f"{i} " + "x" * 240_000 for i in range(n)]),
    "model": code(model, [f"m{i}" for i in range(m)]),
    "correct": pa.array(query % 2, pa.int8()),
}), path, compression="zstd")
assert path.stat().st_size < 20_000
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
table = read_outcomes(path)
prompts = unique_prompts(table)
assert prompts.schema.field("prompt").type == pa.string() and prompts.num_rows == n
assert len(pivot(table, [f"m{i}" for i in range(m)]).prompts[7]) == 240_002
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_the_memory_of_repeated_prompts_is_that_of_the_distinct_ones(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", REPEATED, str(tmp_path / "outcomes.parquet")], capture_output=True, text=True
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-500:]}"
    assert int(done.stdout) < 300, "MiB"  # 24 MB are held as Parquet pages, Arrow arrays and Python strings


TEXTS = st.one_of(st.none(), st.sampled_from(["", "a", "b", "é", "ab", "a\x00"]))
KINDS = st.sampled_from([pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()])


@settings(max_examples=60, deadline=None)
@given(chunks=st.lists(st.lists(TEXTS, max_size=5), max_size=4), kind=KINDS, data=st.data())
def test_encoded_text_equals_the_column_and_has_distinct_values(chunks, kind, data):
    arrays = []
    if data.draw(st.booleans(), "dictionary"):
        for texts in chunks:  # dictionaries with unused, repeated and null entries, another one in each chunk
            entries = data.draw(st.permutations(["unused", "a", None, *texts]))
            at = [None if text is None else entries.index(text) for text in texts]
            values = pa.array(entries, pa.string()).cast(kind)
            arrays.append(pa.DictionaryArray.from_arrays(pa.array(at, pa.int8()), values))
        column = pa.chunked_array(arrays, pa.dictionary(pa.int8(), kind))
    else:
        column = pa.chunked_array([pa.array(texts, pa.string()).cast(kind) for texts in chunks], kind)
    texts = [text for chunk in chunks for text in chunk]
    encoded = encode_text(column, "prompt", "test")
    assert encoded.to_pylist() == texts
    assert encoded.dictionary.to_pylist() == list(dict.fromkeys(text for text in texts if text is not None))
    rows = np.arange(len(texts))[::-1]
    assert decode_text(encoded, rows).to_pylist() == texts[::-1]


@pytest.mark.parametrize("encoding", ["dictionary", "PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
@pytest.mark.parametrize("limit", [2**28, 64])
def test_files_of_every_page_encoding_and_size_are_read(
    encoding: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text_columns, "PART_BYTES", limit)
    monkeypatch.setattr(text_columns, "GROUP_BYTES", 4 * limit)
    table = make_table(n=40)[0].select(["prompt", "correct"])
    options = {} if encoding == "dictionary" else {"use_dictionary": False, "column_encoding": {"prompt": encoding}}
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=50, **options)
    read = read_columns(tmp_path / "p.parquet", ["prompt", "correct", "absent"], ["prompt"])
    assert read.to_pylist() == table.to_pylist()
    assert len(read.column("prompt").chunk(0).dictionary) == 40
    assert read_columns(tmp_path, ["prompt"], ["prompt"]).num_rows == 120  # a folder of files


def test_text_beyond_the_limit_of_a_string_array_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, _ = make_table(n=40)
    pq.write_table(source, tmp_path / "outcomes.parquet")
    pq.write_table(source.select(["query_id", "prompt"]), tmp_path / "prompts.parquet")
    small = pivot(read_outcomes(tmp_path / "outcomes.parquet"), MODELS)
    monkeypatch.setattr(text_columns, "STRING_BYTES", 300)  # the ids have 200 bytes, the prompts more
    table = read_outcomes(tmp_path / "outcomes.parquet")
    assert table.schema.field("prompt").type.value_type == pa.large_string()
    assert pivot(table, MODELS).digest() == small.digest()
    for prompts in (unique_prompts(table), read_prompts(tmp_path / "prompts.parquet")):
        assert prompts.schema.types == [pa.string(), pa.large_string()]
        assert prompts.column("prompt").to_pylist() == list(small.prompts)
        assert len(sample_prompts(prompts, 5)) == 5
        stored = pa.table({"query_id": list(small.query_ids[:3]), "prompt_digest": small.prompt_digests[:3]})
        assert pending_prompts(prompts, stored, tmp_path).num_rows == 37


def test_text_that_is_not_utf8_is_refused_with_column_and_row(tmp_path: Path):
    source, _ = make_table(n=4)
    texts = [text.encode() for text in source["prompt"].to_pylist()]
    texts[7] = b"caf\xe9 " + texts[7]
    for array in (
        pa.array(texts),
        pa.array(texts).view(pa.string()),
        pa.array(texts, pa.large_binary()).view(pa.large_string()),
        pa.array(texts).dictionary_encode(),
        pa.array(texts, pa.binary_view()),
    ):
        bad = source.set_column(source.column_names.index("prompt"), "prompt", array)
        with pytest.raises(InputError, match=r"column 'prompt', row 7: the text is not UTF-8 \(.* at byte 3\)"):
            validate_outcomes(bad)
        pq.write_table(bad, tmp_path / "p.parquet")
        for read in (read_outcomes, read_prompts):
            with pytest.raises(InputError, match=r"p.parquet: column 'prompt', row 7: the text is not UTF-8"):
                read(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (pa.int8(), pa.int64(), pa.int64()),
        (pa.int64(), pa.float64(), pa.float64()),
        (pa.null(), pa.int32(), pa.int32()),
    ],
)
def test_files_of_a_folder_may_have_numbers_of_different_types(
    first: pa.DataType, second: pa.DataType, kind: pa.DataType, tmp_path: Path
):
    table, _ = make_table(n=8)
    half = table.num_rows // 2
    for name, part, own in (("a", table[:half], first), ("b", table[half:], second)):
        values = pa.nulls(half) if own == pa.null() else part["input_tokens"].cast(own)
        index = part.column_names.index("input_tokens")
        pq.write_table(part.set_column(index, "input_tokens", values), tmp_path / f"{name}.parquet")
    read = read_columns(tmp_path, ["input_tokens"], [])["input_tokens"]
    expected = table["input_tokens"].to_pylist()
    assert read.type == kind
    assert read.to_pylist()[half:] == expected[half:]
    assert read_outcomes(tmp_path)["input_tokens"].to_pylist()[half:] == expected[half:]


def test_files_of_a_folder_with_other_types_are_refused_in_one_line(tmp_path: Path):
    table, _ = make_table(n=8)
    pq.write_table(table, tmp_path / "a.parquet")
    texts = pa.array(["7"] * table.num_rows)
    index = table.column_names.index("input_tokens")
    pq.write_table(table.set_column(index, "input_tokens", texts), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="column 'input_tokens' has several types in the files of this folder"):
        read_outcomes(tmp_path)

"""Faults of batch jobs on a cluster: prompts that end or block the process of their encoder."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pytest

from jobs.shards import run_on_sample, write_shards
from prefill_router.errors import InputError, UnavailableError
from prefill_router.prefill.isolation import Deadline


def fragile() -> type:
    """An extractor whose process crashes on the prompt "crash" and never returns from the prompt "hang".

    Classes of a function reach the workers by value: they cannot import the tests.
    """

    class Fragile:
        def __init__(self, _config: None) -> None:
            pass

        def __call__(self, prompts: pa.Table) -> pa.Table:
            import ctypes

            texts = prompts.column("prompt").to_pylist()
            if "crash" in texts:
                ctypes.string_at(0)
            if "hang" in texts:
                ctypes.PyDLL(None).sleep(600)  # keeps the interpreter's lock
            return pa.table(
                {
                    "query_id": prompts.column("query_id"),
                    "prompt_digest": pa.array(texts, pa.string()),
                    "error": pa.array([None if text else "prompt is null" for text in texts], pa.string()),
                }
            )

    return Fragile


def broken() -> type:
    """An extractor whose process crashes while it is loaded."""

    class Broken:
        def __init__(self, _config: None) -> None:
            import ctypes

            ctypes.string_at(0)

        def __call__(self, prompts: pa.Table) -> pa.Table:
            return prompts

    return Broken


def large() -> type:
    """An extractor of one row of 1 MiB per prompt."""

    class Large:
        def __init__(self, _config: None) -> None:
            pass

        def __call__(self, prompts: pa.Table) -> pa.Table:
            import os

            rows = pa.array([os.urandom(2**20) for _ in range(prompts.num_rows)])
            ids, digests = prompts.columns
            return pa.table({"query_id": ids, "prompt_digest": digests, "states": rows})

    return Large


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 6 MiB, which holds five rows of `large`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no small disk, because this user may not mount; run this test as root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def size_of() -> Callable[..., int]:
    """A test of a sample whose process crashes on the prompt "crash"."""

    def size(extractor: type, prompts: pa.Table, _limit_s: float) -> int:
        return extractor(None)(prompts).num_rows

    return size


@pytest.mark.usefixtures("ray_cluster")
def test_prompts_that_end_or_block_their_process_get_error_rows_and_all_others_are_encoded(tmp_path: Path) -> None:
    texts = ["a", "crash", "b", "c", "hang", "d"]
    prompts = pa.table({"query_id": [f"q{row}" for row in range(6)], "prompt": texts})
    resources: dict[str, Any] = {"num_cpus": 1}
    limit = Deadline(0.0, 0.0, fixed=1.0)
    write_shards("faults", tmp_path, prompts, fragile(), None, 2, 2, resources, None, limit)
    rows = {row["query_id"]: row for row in ds.dataset(tmp_path, format="parquet").to_table().to_pylist()}
    assert len(rows) == 6
    assert [rows[f"q{row}"]["prompt_digest"] for row in (0, 2, 3, 5)] == ["a", "b", "c", "d"]
    reason = "the encoder's process crashed on this prompt, or took longer than 1 s, twice"
    assert [rows[f"q{row}"]["error"] for row in range(6)] == [None, reason, None, None, reason, None]
    assert [path.suffix for path in tmp_path.iterdir()] == [".parquet"] * 3


@pytest.mark.usefixtures("ray_cluster")
def test_an_encoder_that_always_ends_its_process_while_it_loads_ends_the_run_with_one_line(tmp_path: Path) -> None:
    prompts = pa.table({"query_id": ["a"], "prompt": ["a"]})
    with pytest.raises(InputError, match=r"^faults: 4 processes in a row ended while they loaded the encoder; .*_s$"):
        write_shards("faults", tmp_path, prompts, broken(), None, 1, 1, {"num_cpus": 1})


@pytest.mark.usefixtures("ray_cluster")
def test_a_sample_with_a_prompt_that_ends_its_process_is_tested_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    sample = pa.table({"query_id": ["a", "b"], "prompt": ["a", "crash"]})
    assert run_on_sample("faults", size_of(), fragile(), sample, {"num_cpus": 1}, 60.0) == 1
    assert capsys.readouterr().out.count("the process that tests 2 prompts ended; trying again") == 2
    with pytest.raises(InputError, match=r"faults: the process that tests 1 prompts ended on each part of them"):
        run_on_sample("faults", size_of(), fragile(), sample.slice(1), {"num_cpus": 1}, 60.0)


@pytest.mark.usefixtures("ray_cluster")
def test_a_disk_that_fills_up_during_a_run_ends_it_with_one_line_and_the_rest_is_encoded_later(
    small_disk: Path,
) -> None:
    ids = [f"q{row}" for row in range(12)]
    prompts = pa.table({"query_id": ids, "prompt": ids})
    resources: dict[str, Any] = {"num_cpus": 1}
    message = (
        f"^{small_disk}: the disk is full: .* MiB are free, about 12.0 MiB are needed; free space and run the same"
    )
    with pytest.raises(UnavailableError, match=message):
        write_shards("faults", small_disk, prompts, large(), None, 1, 1, resources, needed=12 * 2**20)
    stored = ds.dataset(small_disk, format="parquet").to_table(columns=["query_id", "states"]).column("query_id")
    assert 1 <= len(stored) <= 5
    assert [path.suffix for path in small_disk.iterdir()] == [".parquet"] * len(stored)
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    rest = prompts.filter(pc.invert(pc.is_in(prompts.column("query_id"), stored.combine_chunks())))
    write_shards("faults", small_disk, rest, large(), None, 1, 1, resources)
    rows = ds.dataset(small_disk, format="parquet").to_table(columns=["query_id"]).column("query_id").to_pylist()
    assert sorted(rows) == sorted(ids)

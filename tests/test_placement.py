"""Placement of encoders: CPUs and GPUs per actor, actors per node, and the GPUs visible to tensor-parallel encoders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.placement import ActorPool, place
from prefill_router.cluster import Cluster
from prefill_router.errors import InputError
from prefill_router.prefill.config import EncoderConfig, VLLMConfig
from prefill_router.prefill.loading import EncoderShape

ROOT = Path(__file__).parents[1]
SMALL, LARGE = EncoderShape(6, 384, ("last_L6",)), EncoderShape(36, 4096, ("last_L36",))
NO_GPU, TWO, EIGHT = Cluster(((16, 0),), True), Cluster(((16, 2),), True), Cluster(((4, 0), (64, 4), (64, 4)), False)


def placed(
    shape: EncoderShape,
    cluster: Cluster,
    backend: str = "transformers",
    parallel: int = 1,
    actors: int | None = None,
    cpus: int | None = None,
    gpus: float | None = None,
) -> ActorPool:
    encoder = EncoderConfig(backend=backend, vllm=VLLMConfig(tensor_parallel_size=parallel, gpu_memory_utilization=0.8))
    return place(encoder, shape, cluster, actors, cpus, gpus)


@pytest.mark.parametrize(
    ("shape", "cluster", "backend", "parallel", "cpus", "gpus", "actors"),
    [
        (SMALL, NO_GPU, "transformers", 1, 1, 0, 16),
        (LARGE, NO_GPU, "transformers", 1, 8, 0, 2),
        (LARGE, NO_GPU, "vllm", 2, 8, 0, 2),
        (SMALL, TWO, "transformers", 1, 1, 0.25, 8),
        (SMALL, TWO, "vllm", 1, 1, 1, 2),
        (LARGE, TWO, "transformers", 1, 1, 1, 2),
        (LARGE, TWO, "transformers", 2, 1, 1, 2),  # field of another backend
        (LARGE, TWO, "vllm", 2, 2, 2, 1),
        (SMALL, EIGHT, "vllm", 4, 4, 4, 2),
        (LARGE, EIGHT, "vllm", 8, 8, 8, 1),  # one actor that waits for a new node
        (LARGE, TWO, "vllm_server", 2, 1, 0, 1),
    ],
)
def test_defaults_depend_on_the_backend_and_the_size_of_the_model(
    shape: EncoderShape, cluster: Cluster, backend: str, parallel: int, cpus: int, gpus: float, actors: int
) -> None:
    pool = placed(shape, cluster, backend, parallel)
    assert (pool.cpus, pool.gpus, pool.actors) == (cpus, gpus, actors)
    assert pool.resources == {"num_cpus": cpus, "num_gpus": gpus}


def test_settings_of_the_user_are_applied() -> None:
    pool = placed(SMALL, TWO, actors=3, cpus=2, gpus=0.5)
    assert (pool.cpus, pool.gpus, pool.actors) == (2, 0.5, 3)
    assert placed(SMALL, TWO, "vllm", 2, gpus=0.0).gpus == 0
    assert placed(LARGE, TWO, "vllm", 2, gpus=2.0).actors == 1
    assert place(EncoderConfig(device="cpu"), LARGE, TWO, None, None, None).resources == {"num_cpus": 8, "num_gpus": 0}


def test_an_actor_without_a_gpu_runs_on_the_cpu() -> None:
    assert placed(SMALL, TWO, gpus=0.0).encoder.device == placed(SMALL, NO_GPU).encoder.device == "cpu"
    assert placed(SMALL, TWO).encoder.device == "auto"


def test_vllm_encoders_on_one_gpu_share_its_memory() -> None:
    assert placed(SMALL, TWO, "vllm", gpus=0.25).encoder.vllm.gpu_memory_utilization == pytest.approx(0.2)
    assert placed(LARGE, TWO, "vllm", gpus=0.5).encoder.vllm.gpu_memory_utilization == pytest.approx(0.4)
    for pool in (
        placed(LARGE, TWO, "vllm"),
        placed(LARGE, TWO, "vllm", 2),
        placed(SMALL, NO_GPU, "vllm"),
        placed(SMALL, TWO),
    ):
        assert pool.encoder.vllm.gpu_memory_utilization == 0.8


def test_actors_are_counted_by_node_and_by_gpu() -> None:
    cluster = Cluster(((8, 3), (8, 3), (1, 8)), False)
    assert cluster.fitting(2, 2.0) == 2  # one of three GPUs stays free; the last node has too few CPUs
    assert cluster.fitting(1, 0.4) == 13  # two per GPU on six GPUs, and one on the single CPU of the last node
    assert cluster.fitting(3, 0.0) == 4
    assert (cluster.cpus, cluster.gpus, cluster.largest) == (17, 14, (8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backend": "vllm", "parallel": 4},
            r"encoder.vllm.tensor_parallel_size: got 4, allowed is at most 2, the GPUs of this "
            r"machine; or connect to a cluster with a node of 4 GPUs",
        ),
        (
            {"backend": "vllm", "parallel": 2, "gpus": 1.0},
            "gpus_per_actor: got 1, but .*tensor_parallel_size is 2; leave it out, or set it to 2",
        ),
        (
            {"backend": "vllm", "gpus": 2.0},
            "gpus_per_actor: got 2, but .*tensor_parallel_size is 1; leave it out, or set it to 1",
        ),
        ({"gpus": 1.5}, "gpus_per_actor: got 1.5, allowed are fractions below 1 and whole numbers"),
        ({"gpus": 3.0}, "needs 3 CPUs and 3 GPUs, this machine has 16 and 2"),
        ({"cpus": 17}, "needs 17 CPUs and 1 GPUs, this machine has 16 and 2"),
    ],
)
def test_impossible_settings_are_refused_with_a_way_out(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        placed(LARGE, TWO, **options)  # type: ignore[arg-type]


TENSOR_PARALLEL = """
import gc, json, os, subprocess, sys, time
from pathlib import Path
import pyarrow as pa, pyarrow.dataset as ds, ray
from prefill_router.cluster import connect
from jobs.placement import place
from jobs.shards import write_shards
from prefill_router.prefill.config import EncoderConfig, VLLMConfig
from prefill_router.prefill.loading import EncoderShape

class Recorder:
    def __init__(self, folder):
        self.folder = folder
        (folder / str(os.getpid())).touch()
    def __call__(self, prompts):
        while len(list(self.folder.iterdir())) < 2:  # otherwise the first actor would process all prompts
            time.sleep(0.05)
        if prompts.column("prompt")[0].as_py() == "fail":
            raise RuntimeError("deliberate failure")
        child = subprocess.run(["sh", "-c", "echo $CUDA_VISIBLE_DEVICES"], capture_output=True, text=True).stdout
        row = {"held": ",".join(map(str, ray.get_gpu_ids())), "visible": os.environ["CUDA_VISIBLE_DEVICES"],
               "of_a_child": child.strip()}
        return pa.table({"query_id": prompts.column("query_id"), **{key: [value] for key, value in row.items()}})

def gpus_left():
    gc.collect()  # the traceback of the failed run holds the actors
    deadline = time.monotonic() + 60
    while (left := ray.available_resources().get("GPU", 0)) < 4 and time.monotonic() < deadline:
        time.sleep(0.2)
    return left

folder = Path(sys.argv[1])
ray.init(address="local", num_cpus=4, num_gpus=4, include_dashboard=False, log_to_driver=False)
pool = place(EncoderConfig(backend="vllm", vllm=VLLMConfig(tensor_parallel_size=2)),
             EncoderShape(36, 4096, ("last_L36",)), connect(), None, None, None)
found = {"actors": pool.actors}
for text in ("read", "fail"):
    for name in (text, f"{text}-up"):
        (folder / name).mkdir()
    prompts = pa.table({"query_id": [str(row) for row in range(8)], "prompt": [text] * 8})
    try:
        write_shards(text, folder / text, prompts, Recorder, folder / f"{text}-up", 1, pool.actors, pool.resources)
    except Exception as error:
        if text == "read":
            raise
        found["failed"] = "deliberate failure" in str(error)
    found[f"left after {text}"] = gpus_left()
found["rows"] = ds.dataset(folder / "read", format="parquet").to_table().to_pylist()
print(json.dumps(found))
"""


@pytest.mark.ray
def test_tensor_parallel_encoders_see_only_their_gpus_and_release_them_after_a_failure(
    tmp_path: Path,
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", TENSOR_PARALLEL, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["actors"] == 2
    assert sorted(row["query_id"] for row in found["rows"]) == [str(row) for row in range(8)]
    assert {frozenset(row["held"].split(",")) for row in found["rows"]} in (
        {frozenset(pair) for pair in pairs} for pairs in (("01", "23"), ("02", "13"), ("03", "12"))
    )
    for row in found["rows"]:
        assert row["held"] == row["visible"] == row["of_a_child"]
    assert found["failed"]
    assert (found["left after read"], found["left after fail"]) == (4, 4)

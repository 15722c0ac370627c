"""The serving benchmark's client, upstream server and table; the application itself runs in the benchmark only."""

from __future__ import annotations

import asyncio

import pyarrow as pa
import pytest
from tiny_router import tiny_router

from benchmarks.serve import _answer_all, _load, _table, constant_encoder, free_port, upstream_server
from prefill_router.errors import InputError
from serve.config import EncoderDeploymentConfig
from serve.transport import unpacked


def test_the_client_counts_the_chats_of_the_measured_time() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    with upstream_server(port, _answer_all):
        figures = _load(url, "m", "none", ["a", "b", "c"], 2, 0.1, 0.5)
        taken = pytest.raises(InputError, match=f"upstream_port: another server answers at port {port}; choose a free")
        with taken, upstream_server(port, _answer_all):
            pass
        with pytest.raises(InputError, match=r"status 404"):
            _load(f"{url}/none", "m", "none", ["a"], 1, 0.0, 0.2)
    assert 0 < figures["p50"] <= figures["p95"] <= figures["p99"]
    # Two connections in a closed loop: chats per second times seconds per chat is about 2, or less if the client waits.
    assert 0.1 < figures["per_s"] * figures["p50"] / 1e3 < 2.5


def test_the_table_has_the_latency_above_the_upstream_server() -> None:
    def figures(p50: float) -> dict[str, float]:
        return {"per_s": 10.0, "p50": p50, "p95": p50 + 1, "p99": p50 + 3}

    table = _table({"upstream alone": {"1": figures(2)}, "ours": {"1": figures(7.25)}}, [1])
    assert table.splitlines()[-1] == "| ours | 1 | 10 | 5.2 | 5.2 | 5.2 |"


def test_the_constant_encoder_has_a_row_for_each_configuration_of_an_encoder() -> None:
    routers = [tiny_router("f", layer=layer) for layer in (2, 3)]
    rows = [{"f": pa.table({"n": [layer]})} for layer in (2, 3)]
    encoder = constant_encoder(list(zip(routers, rows, strict=True)))(EncoderDeploymentConfig())
    replies = [asyncio.run(encoder.encode("any", "f", router.encoders["f"])) for router in routers]
    assert [unpacked({"f": reply})["f"] for reply in replies] == [row["f"] for row in rows]

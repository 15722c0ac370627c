"""RAY_ADDRESS: values that are not the address of a cluster are one line within seconds."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from prefill_router.cluster import check_address
from prefill_router.errors import InputError, UnavailableError


@pytest.mark.parametrize(
    ("address", "error", "text"),
    [
        ("http://127.0.0.1:8265", InputError, "got 'http://127.0.0.1:8265', the address of a dashboard"),
        ("banana", InputError, "got 'banana', expected HOST:PORT"),
        ("127.0.0.1", InputError, "got '127.0.0.1', expected HOST:PORT"),
        ("host:port", InputError, "got 'host:port', expected HOST:PORT"),
        ("host:99999", InputError, "got 'host:99999', expected HOST:PORT"),
        ("127.0.0.1:1", UnavailableError, r"127\.0\.0\.1:1 does not answer \(Connection refused\); unset RAY_ADDRESS"),
        ("ray://127.0.0.1:1", UnavailableError, r"ray://127\.0\.0\.1:1 does not answer \(Connection refused\)"),
        ("no-such-host.invalid:6379", UnavailableError, r"no-such-host\.invalid:6379 does not answer"),
    ],
)
def test_a_wrong_address_is_refused_with_the_way_out(address: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        check_address(address)


def test_the_address_of_a_dashboard_without_http_is_recognised() -> None:
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    try:
        with pytest.raises(InputError, match="the address of a dashboard, which only `ray job submit` takes"):
            check_address(f"127.0.0.1:{server.server_address[1]}")
    finally:
        thread.join()
        server.server_close()


def test_a_job_with_the_address_of_a_dashboard_ends_with_one_line(tmp_path: Path) -> None:
    code = """
from prefill_router import cli, cluster, config

cli.main(config.FrozenModel, lambda _: str(cluster.connect()), [])
"""
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={"RAY_ADDRESS": "http://127.0.0.1:8265", "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("job: error: RAY_ADDRESS: got 'http://127.0.0.1:8265'")
    assert ended.stderr.count("\n") == 1
    assert time.monotonic() - started < 30

"""The application of `serve/` on the Ray of the test session, and a client of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from tiny_router import tiny_router

from prefill_router.pool import Pool
from prefill_router.prefill.config import EncoderConfig
from prefill_router.routing.checkpoint import save_checkpoint

APP = "prefill-router"
ORIGIN = "https://chat.example"  # whose scripts may call the application


# One model for short texts, one with all capabilities but vision, one without a context window.
DECLARED = {
    "cheap": {"context_tokens": 2_000},
    "middle": {"context_tokens": 8_192, "capabilities": ("tools", "json")},
    "dear": {"capabilities": ("tools",)},
}


def save_checkpoints(folder: Path, minilm: str) -> None:
    """Writes checkpoints named after the model that they choose. The models have the limits of `DECLARED`.

    `layer3` reads another layer, `foreign` another encoder, `torn` is corrupt.
    """
    from prefill_router.prefill.transformers_backend import TransformersEncoder

    encoder = TransformersEncoder(EncoderConfig(model=minilm, layers=(2,), poolings=("mean",), device="cpu"))
    for name, router in {
        "cheap": tiny_router(encoder.info.fingerprint, "cheap"),
        "dear": tiny_router(encoder.info.fingerprint, "dear"),
        "layer3": tiny_router(encoder.info.fingerprint, "middle", layer=3),
        "foreign": tiny_router("f" * 16, "middle"),
    }.items():
        models = tuple(model.model_copy(update=DECLARED[model.name]) for model in router.pool.models)
        save_checkpoint(replace(router, pool=Pool(models=models)), folder / name)
    save_checkpoint(tiny_router(encoder.info.fingerprint, "middle"), folder / "torn")
    (folder / "torn/checkpoint.safetensors").write_bytes(b"torn")


class Server:
    """The application on the Ray of the test session, deployed as by `serve deploy`."""

    def __init__(self, port: int) -> None:
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def deploy(
        self,
        checkpoint: Path | str,
        live: Path | dict[str, Any] | None = None,
        gateway: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        **encoder: Any,
    ) -> None:
        """Deploys `checkpoint`.

        `live`: user_config of all deployments, or its checkpoint; `environment`: variables of the replicas; others:
        further settings of a deployment.
        """
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        config = live if isinstance(live, dict) else {"checkpoint": str(live)}
        override = [{"name": name, "user_config": config} for name in ("Gateway", "Encoder", "Router")] if live else []
        _get_global_client().deploy_apps(
            ServeDeploySchema.model_validate(
                {
                    "applications": [
                        {
                            "name": APP,
                            "route_prefix": "/",
                            "import_path": "serve.app:build",
                            **({"runtime_env": {"env_vars": environment}} if environment else {}),
                            "args": {
                                "checkpoint": str(checkpoint),
                                "gateway": {"cpus": 0.1, "cors_origins": [ORIGIN]} | (gateway or {}),
                                "router": {"cpus": 0.1},
                                "encoder": {"cpus": 0.5, "max_batch_size": 4, "max_queued_requests": 8} | encoder,
                            },
                            "deployments": override,
                        }
                    ]
                }
            )
        )

    def settle(self, seconds: float = 240) -> str:
        """Waits until the application runs or has failed; returns its status and messages."""
        from ray import serve as ray_serve

        time.sleep(0.5)  # until the controller has the new target
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            status = ray_serve.status().applications[APP]
            if status.status in ("RUNNING", "DEPLOY_FAILED", "UNHEALTHY"):
                return f"{status.status.value} {status.message} " + " ".join(
                    deployment.message for deployment in status.deployments.values()
                )
            time.sleep(0.2)
        raise AssertionError(f"the application did not settle: {status}")

    def route(self, **body: Any) -> httpx.Response:
        return self.http.post(
            "/v1/route",
            json={name.replace("lam", "lambda") if name == "lam" else name: value for name, value in body.items()},
        )

    def checkpoint(self) -> str:
        return self.http.get("/healthz").json()["checkpoint"]


def under_load(server: Server, action: Callable[[], None]) -> list[tuple[int, str, str]]:
    """(status, checkpoint, model) of the requests of three clients before, during and after `action`."""
    seen: list[tuple[int, str, str]] = []
    done = threading.Event()

    def client() -> None:
        while not done.is_set():
            reply = server.route(prompt="What is 2 + 2?")
            body = reply.json()
            seen.append((reply.status_code, body.get("checkpoint", reply.text), body.get("model", "")))

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.5)
        action()
        time.sleep(0.5)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    return seen

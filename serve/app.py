"""The application builder: a `RouterAppConfig` in, a Serve application out.

    serve run serve.app:build checkpoint=runs/demo/checkpoint
    serve deploy configs/serve.yaml

This module does not use `from __future__ import annotations`: Serve reads the annotation of the builder at run time and
would pass a plain dict if the annotation were a string.
"""

import os

from ray import serve as ray_serve
from ray.serve import Application

from prefill_router import registry
from prefill_router.routing.checkpoint import load_checkpoint
from serve.config import RouterAppConfig
from serve.encoder import Encoder
from serve.gateway import Gateway
from serve.live import Live
from serve.router import RouterHead, novelty_fallback
from serve.store import Store


def build(config: RouterAppConfig) -> Application:
    """Builds the graph gateway -> encoder -> router, and the gateway's store of sessions.

    The store resolves aliases that are followed (`Live.follows`); others are resolved here, so that replicas that start
    later load the same version. Raises InputError if a checkpoint does not exist, is corrupt or lacks what
    `novelty_above` needs; a running application is not changed.
    """
    return build_with(config, Encoder)


def build_with(config: RouterAppConfig, encoder_class: type) -> Application:
    """`build` with another class in place of `Encoder`, which has its constructor and methods."""
    pinned = config.moved(lambda where: where if config.follows(where) else registry.pin_version(where))
    fallback = novelty_fallback(config.router)
    for where in pinned.sources:
        if where != pinned.checkpoint and pinned.follows(where):
            continue  # a canary or shadow that may not exist yet, and must not end the application if it is broken
        router = load_checkpoint(registry.resolve(where))
        if fallback is not None:
            router.check_fallback(fallback)
    live = pinned.model_dump(include=set(Live.model_fields))
    asks = {"runtime_env": {"env_vars": _registry_variables()}} if pinned.asks_registry else {}
    budgets = any(key.usd_per_day is not None for key in config.gateway.keys.values())
    store = ray_serve.deployment(
        name="Sessions",
        num_replicas=1,  # all replicas share it
        ray_actor_options={"num_cpus": config.sessions.cpus, **asks},
        max_ongoing_requests=1024,
    )(Store).bind(config.sessions, config.gateway.log.folder if budgets else None)
    encoder = ray_serve.deployment(
        name="Encoder",
        user_config=live,
        num_replicas=config.encoder.replicas,
        ray_actor_options={"num_cpus": config.encoder.cpus, "num_gpus": config.encoder.gpus, **asks},
        max_ongoing_requests=2 * config.encoder.max_batch_size,  # one batch runs while the next one fills
        max_queued_requests=config.encoder.max_queued_requests,
    )(encoder_class).bind(config.encoder, store)
    head = ray_serve.deployment(
        name="Router",
        user_config=live,
        num_replicas=config.router.replicas,
        ray_actor_options={"num_cpus": config.router.cpus, **asks},
        max_ongoing_requests=config.router.max_ongoing_requests,
        max_queued_requests=config.router.max_queued_requests,
        max_surge_percent=100,  # new replicas start before old ones stop; not for encoders, which may fill a GPU
    )(RouterHead).bind(config.router, store)
    return ray_serve.deployment(
        name="Gateway",
        user_config=live,
        num_replicas=config.gateway.replicas,
        ray_actor_options={"num_cpus": config.gateway.cpus},
        max_ongoing_requests=config.gateway.max_ongoing_requests,
        max_queued_requests=config.gateway.max_queued_requests,
        graceful_shutdown_timeout_s=config.gateway.drain_s,
        max_surge_percent=100,
    )(Gateway).bind(encoder, head, store, config.gateway, config.sessions.max_fall)


def _registry_variables() -> dict[str, str]:
    """The environment variables by which replicas find the registry of this process, and its cache."""
    others = {name: os.environ[name] for name in ("MLFLOW_REGISTRY_URI", "XDG_CACHE_HOME") if name in os.environ}
    return {"MLFLOW_TRACKING_URI": registry.tracking_uri(), **others}

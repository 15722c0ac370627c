"""The application builder: a `RouterAppConfig` in, a Serve application out.

    serve run serve.app:build checkpoint=runs/demo/checkpoint
    serve deploy configs/serve.yaml

This module does not use `from __future__ import annotations`: Serve reads the annotation of the builder at run time and
would pass a plain dict if the annotation were a string.
"""

from ray import serve as ray_serve
from ray.serve import Application

from prefill_router import registry
from prefill_router.routing.checkpoint import load_checkpoint
from serve.config import Live, RouterAppConfig
from serve.encoder import Encoder
from serve.gateway import Gateway
from serve.router import RouterHead, novelty_fallback
from serve.sessions import Sessions


def build(config: RouterAppConfig) -> Application:
    """Builds the graph gateway -> encoder -> router, and the gateway's store of sessions.

    Resolves an alias to its present version, so that replicas that start later load the same version. Raises InputError
    if a checkpoint does not exist, is corrupt or lacks what `novelty_above` needs; a running application is not
    changed.
    """
    return build_with(config, Encoder)


def build_with(config: RouterAppConfig, encoder_class: type) -> Application:
    """`build` with another class in place of `Encoder`, which has its constructor and methods."""
    pinned, fallback = config.moved(registry.pin_version), novelty_fallback(config.router)
    for where in pinned.sources:
        router = load_checkpoint(registry.resolve(where))
        if fallback is not None:
            router.check_fallback(fallback)
    live = pinned.model_dump(include=set(Live.model_fields))
    encoder = ray_serve.deployment(
        name="Encoder",
        user_config=live,
        num_replicas=config.encoder.replicas,
        ray_actor_options={"num_cpus": config.encoder.cpus, "num_gpus": config.encoder.gpus},
        max_ongoing_requests=2 * config.encoder.max_batch_size,  # one batch runs while the next one fills
        max_queued_requests=config.encoder.max_queued_requests,
    )(encoder_class).bind(config.encoder)
    head = ray_serve.deployment(
        name="Router",
        user_config=live,
        num_replicas=config.router.replicas,
        ray_actor_options={"num_cpus": config.router.cpus},
        max_ongoing_requests=config.router.max_ongoing_requests,
        max_queued_requests=config.router.max_queued_requests,
        max_surge_percent=100,  # new replicas start before old ones stop; not for encoders, which may fill a GPU
    )(RouterHead).bind(config.router)
    budgets = any(key.usd_per_day is not None for key in config.gateway.keys.values())
    sessions = ray_serve.deployment(
        name="Sessions",
        num_replicas=1,  # the store
        ray_actor_options={"num_cpus": config.sessions.cpus},
        max_ongoing_requests=1024,
    )(Sessions).bind(config.sessions, config.gateway.log.folder if budgets else None)
    return ray_serve.deployment(
        name="Gateway",
        user_config=live,
        num_replicas=config.gateway.replicas,
        ray_actor_options={"num_cpus": config.gateway.cpus},
        max_ongoing_requests=config.gateway.max_ongoing_requests,
        max_queued_requests=config.gateway.max_queued_requests,
        graceful_shutdown_timeout_s=config.gateway.drain_s,
        max_surge_percent=100,
    )(Gateway).bind(encoder, head, sessions, config.gateway, config.sessions.max_fall)

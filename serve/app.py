"""The builder: a typed configuration in, the Serve application out.

    serve run serve.app:build checkpoint=runs/demo/checkpoint
    serve deploy configs/serve.yaml

No `from __future__ import annotations` here: Serve reads the builder's annotation at run time, and would hand a
string annotation's builder a plain dict.
"""

from ray import serve as ray_serve
from ray.serve import Application

from prefill_router import registry
from prefill_router.routing.checkpoint import load_checkpoint
from serve.config import Live, RouterAppConfig
from serve.encoder import Encoder
from serve.gateway import Gateway
from serve.router import RouterHead


def build(config: RouterAppConfig) -> Application:
    """The graph gateway -> encoder -> router.

    Raises InputError when the checkpoint is not there or not sound, before anything that runs is touched. An alias
    is pinned to its version here, so that replicas that start later do not serve a later champion.
    """
    where = registry.pin(config.checkpoint)
    load_checkpoint(registry.resolve(where))
    live = Live(checkpoint=where).model_dump()
    encoder = ray_serve.deployment(
        name="Encoder",
        user_config=live,
        num_replicas=config.encoder.replicas,
        ray_actor_options={"num_cpus": config.encoder.cpus, "num_gpus": config.encoder.gpus},
        max_ongoing_requests=2 * config.encoder.max_batch_size,  # the next batch gathers while one runs
        max_queued_requests=config.encoder.max_queued_requests,
    )(Encoder).bind(config.encoder)
    router = ray_serve.deployment(
        name="Router",
        user_config=live,
        num_replicas=config.router.replicas,
        ray_actor_options={"num_cpus": config.router.cpus},
        max_ongoing_requests=config.router.max_ongoing_requests,
        max_queued_requests=config.router.max_queued_requests,
        max_surge_percent=100,  # new replicas start before old ones stop; encoders may be too large for that
    )(RouterHead).bind()
    return ray_serve.deployment(
        name="Gateway",
        user_config=live,
        num_replicas=config.gateway.replicas,
        ray_actor_options={"num_cpus": config.gateway.cpus},
        max_ongoing_requests=config.gateway.max_ongoing_requests,
        max_queued_requests=config.gateway.max_queued_requests,
        max_surge_percent=100,
    )(Gateway).bind(encoder, router, config.gateway)

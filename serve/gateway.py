"""The gateway deployment: answers HTTP requests and binds each request to one checkpoint.

A request uses the checkpoint that is live on arrival and carries it through encoder and router, which also hold the
previous one: during a swap no request mixes two checkpoints. A chat goes to the server of the chosen model, or of the
next candidate if it does not answer. Knows nothing of arrays.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from grpc import RpcError
from pydantic import BaseModel, ValidationError
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from prefill_router.errors import InputError, UnavailableError
from prefill_router.routing.eligibility import Requirements
from prefill_router.routing.router import Decision
from serve import answers, messages
from serve.access import Keys
from serve.cache import keep_serving
from serve.chat import AUTO, ChatRequest, RouterOptions, read_chat, upstream_body
from serve.config import GatewayConfig, Live
from serve.cors import Cors
from serve.decision_log import DecisionLog
from serve.http import (
    EXCEPTION_HANDLERS,
    ApiError,
    NoDecision,
    RelayedStream,
    no_answer,
    read_body,
    retry_later,
    unknown_model,
    upstream_error,
)
from serve.plan import (
    Plan,
    answer_record,
    decided,
    decision_record,
    kept,
    no_answer_record,
    note,
    note_headers,
    plan_of,
    reachable,
)
from serve.requests import RouteRequest, read_request
from serve.router import Checkpoint
from serve.schemas import (
    ErrorDetail,
    FeedbackReply,
    FeedbackRequest,
    Health,
    ModelReply,
    ModelsReply,
    RouteReply,
    Timings,
    TokenCount,
    invalid,
    model_reply,
    rejected,
    rejected_chat,
    route_reply,
)
from serve.sessions import Kept, awaits_tool, has_answer, session_key
from serve.telemetry import Telemetry, exported_metrics
from serve.upstream import BrokenAnswer, NoAnswer, Upstream, Upstreams, upstreams_of

PROBE = "Is this checkpoint alive?"  # the prompt that tests encoder and router before a checkpoint becomes live
SESSION_S = 1.0  # maximum time that a request waits for its session
READY_S = 5.0  # maximum time of the decision that GET /readyz waits for
PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
# The page has its script and style in itself, and talks to this server only.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MESSAGES_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"type": "object", "required": ["model", "messages", "max_tokens"]}}
        },
    }
}
# A failed call of a deployment. Calls by gRPC pass its exception on without a RayTaskError.
FAILED = (RayError, RpcError, RuntimeError)
DECISION_ID = re.compile(r"[0-9a-f]{32}")
logger = logging.getLogger("ray.serve")
app = FastAPI(title="Prefill Router", docs_url=None, redoc_url=None, exception_handlers=EXCEPTION_HANDLERS)
app.add_middleware(Keys)
app.add_middleware(Cors)  # outside: preflight requests have no key


def _check_models(models: list[str] | None, checkpoint: Checkpoint) -> None:
    """Raises InputError for an unknown model, before the prompt is encoded."""
    for name in models or ():
        if name not in checkpoint.models:
            raise InputError(f"models: {name!r:.80} is not in the pool; known: {', '.join(checkpoint.models)}")


@contextmanager
def _refused_body() -> Iterator[None]:
    """Raises ApiError for InputError."""
    try:
        yield
    except InputError as error:
        raise ApiError(400, rejected(error)) from None


def _body_of(model: type[BaseModel]) -> dict[str, Any]:
    """The request body in the OpenAPI document: handlers read the bytes themselves."""
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}},
    }


def _key(request: ChatRequest, options: RouterOptions) -> str:
    return session_key(request.messages, options.session_id, (options.lam, options.models, options.max_cost_usd))


# `ingress` copies the app here, so the functions that its handlers call must be defined above.
@ray_serve.ingress(app)
class Gateway:
    """Class of the deployment; `serve.app.build` sets its resources."""

    def __init__(
        self,
        encoder: DeploymentHandle,
        router: DeploymentHandle,
        sessions: DeploymentHandle,
        config: GatewayConfig,
        max_fall: float,
    ) -> None:
        self._encoder, self._router, self._sessions, self._config = encoder, router, sessions, config
        self._max_fall = max_fall  # of a session's confidence
        self.cors_origins, self.keys = config.cors_origins, config.keys  # read by the middleware
        self._live: Checkpoint | None = None
        self._servers: tuple[dict[str, Upstream], dict[str, str]] = ({}, {})  # of the live checkpoint's pool
        self._upstreams = Upstreams(config.upstream)
        self._log = DecisionLog(config.log)
        self._telemetry = Telemetry()
        self._searching = asyncio.Lock()
        self._refused: str | None = None

    async def __del__(self) -> None:
        """Serve awaits it when the replica stops, after the last request."""
        await asyncio.to_thread(self._log.close)
        await self._upstreams.close()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Makes a checkpoint live after a probe has passed through encoder and router with it."""
        where = Live.model_validate(user_config).checkpoint
        self._refused = await keep_serving(self._go_live(where), where, serving=self._live is not None)

    async def _go_live(self, where: str) -> None:
        checkpoint = await self._router.describe.remote(where)
        await self._router.probe.remote(checkpoint, await self._encode(PROBE, checkpoint))
        default = self._config.default_model
        servers, missing = upstreams_of(checkpoint.pool, os.environ, self._config.endpoints)
        if default is not None and default not in servers:
            raise InputError(
                f"gateway.default_model: {default!r} {missing.get(default, 'is not in the pool')}; name another model"
            )
        self._live, self._servers = checkpoint, (servers, missing)

    async def _encode(self, prompt: str, checkpoint: Checkpoint) -> dict[str, bytes]:
        replies = [
            self._encoder.encode.remote(prompt, fingerprint, config)
            for fingerprint, config in checkpoint.encoders.items()
        ]
        return dict(zip(checkpoint.encoders, await asyncio.gather(*replies), strict=True))

    @app.post(
        "/v1/route",
        openapi_extra=_body_of(RouteRequest),
    )
    async def route(self, http: Request) -> RouteReply:
        """Chooses a model for a prompt."""
        start = time.perf_counter()
        checkpoint = self._checkpoint()
        request: RouteRequest | None = None
        try:
            request = read_request(await self._body(http))
            prompt, requirements = request.text, request.requirements
            _check_models(request.models, checkpoint)
            decision, timings = await self._decide(checkpoint, prompt, requirements, request.lam, start)
        except ValidationError as error:
            raise ApiError(400, invalid(error)) from None
        except InputError as error:
            raise ApiError(400, rejected(error, request)) from None
        decision_id = uuid.uuid4().hex
        plan = replace(decided(AUTO, decision, None), added_tokens=requirements.added_tokens)
        self._note_decision(http, decision_id, plan, checkpoint, prompt)
        return route_reply(
            decision,
            encoder=list(checkpoint.encoders),
            checkpoint=checkpoint.id,
            timings_ms=timings,
            decision_id=decision_id,
        )

    @app.post(
        "/v1/chat/completions",
        openapi_extra=_body_of(ChatRequest),
    )
    async def chat(self, http: Request) -> Response:
        """Answers a chat from the server of the chosen model."""
        start = time.perf_counter()
        return await self._chat(http, await self._body(http), start)

    @app.post("/v1/messages", openapi_extra=MESSAGES_BODY)
    async def messages(self, http: Request) -> Response:
        """Answers a request of Anthropic's Messages API, by way of a chat."""
        start = time.perf_counter()
        with _refused_body():
            body = messages.chat_body(await self._body(http))
        reply = await self._chat(http, body, start)
        headers = {name: value for name, value in reply.headers.items() if name.startswith("x-router-")}
        if isinstance(reply, RelayedStream):
            return RelayedStream(messages.events_of(reply.events), headers, reply.release)
        if reply.status_code != 200:
            error = messages.error_of(reply.status_code, messages.error_message(bytes(reply.body)))
            return JSONResponse(error, reply.status_code, headers)
        try:
            return Response(messages.message_of(bytes(reply.body)), 200, headers, "application/json")
        except InputError as error:
            raise upstream_error(502, str(error)) from None

    @app.post("/v1/messages/count_tokens", openapi_extra=MESSAGES_BODY)
    async def count_tokens(self, http: Request) -> TokenCount:
        """The estimated input tokens of a request of Anthropic's Messages API."""
        with _refused_body():
            return TokenCount(input_tokens=messages.estimated_tokens(await self._body(http)))

    async def _body(self, http: Request) -> bytes:
        return await read_body(http, self._config.max_body_bytes, self._config.timeout_s)

    async def _chat(self, http: Request, body: bytes, start: float) -> Response:
        checkpoint, (servers, missing) = self._checkpoint(), self._servers
        try:
            request = read_chat(body)
            options = request.options(http.headers)
            if request.asked is not None and request.asked not in checkpoint.models:
                raise unknown_model(request.asked, checkpoint.models)
            _check_models(options.models, checkpoint)
            plan, prompt = plan_of(request, options, checkpoint, servers, missing, self._config.default_model), None
            if plan is None:
                plan, prompt = await self._decided(request, options, checkpoint, servers, missing, start)
        except ValidationError as error:
            raise ApiError(400, rejected_chat(error)) from None
        except InputError as error:
            raise ApiError(400, rejected_chat(error)) from None
        fallbacks = self._config.fallbacks if options.fallbacks is None else options.fallbacks
        overhead_ms = 1e3 * (time.perf_counter() - start)
        decision_id, text, stream = uuid.uuid4().hex, body.decode(), bool(request.stream)
        self._note_decision(http, decision_id, plan, checkpoint, prompt)

        def body_for(one: Upstream) -> bytes:
            return upstream_body(text, one.model, request)

        try:
            order = [servers[name] for name in plan.order]
            answer = await self._upstreams.ask(order, body_for, stream, 1 + fallbacks)
        except NoAnswer as failed:
            record = no_answer_record(str(failed), failed.attempts, time.perf_counter() - start)
            self._log.note(decision_id, "answer", record)
            self._telemetry.attempted(failed.attempts)
            raise no_answer(failed, decision_id) from None
        except asyncio.CancelledError:
            record = no_answer_record(answers.CLIENT_LEFT, (), time.perf_counter() - start)
            self._log.note(decision_id, "answer", record)
            raise
        found = note(plan, answer, checkpoint, decision_id, overhead_ms, options.explain)
        headers, first_byte_s = note_headers(found) | dict(answer.headers), time.perf_counter() - start
        self._telemetry.attempted(answer.attempts)

        ended = False

        def finished(usage: Any, error: str | None) -> None:
            nonlocal ended
            if ended:
                return
            ended, seconds = True, time.perf_counter() - start
            record = answer_record(found, answer.status, usage, error, seconds)
            self._log.note(decision_id, "answer", record)
            tokens, usd = answers.token_counts(usage), record["cost_usd"]
            self._telemetry.answered(plan, found, tokens, usd, error, first_byte_s, seconds, checkpoint.best_single)
            served = plan.candidate(found.model.name)
            if error is None and served is not None:
                self._sessions.keep.remote(_key(request, options), Kept(served.model, served.confidence))

        if stream and answer.is_stream:
            events = answers.stream(answer, found, request.wants_usage, self._config.keep_alive_s, finished)

            def release() -> None:
                answer.close()
                finished(None, answers.CLIENT_LEFT)

            return RelayedStream(events, headers, release)
        try:
            content = await answers.whole(answer, found, finished)
        except BrokenAnswer as broken:
            raise upstream_error(502, str(broken)) from None
        return Response(content, answer.status, headers)

    async def _decided(
        self,
        request: ChatRequest,
        options: RouterOptions,
        checkpoint: Checkpoint,
        servers: Mapping[str, Upstream],
        missing: Mapping[str, str],
        start: float,
    ) -> tuple[Plan, str]:
        """The plan of a decision, and the routed text.

        The default model is asked if there is one, and encoder or router do not decide.
        """
        names = reachable(options.models or checkpoint.models, servers, missing)
        query = request.query(options, names)
        session = asyncio.ensure_future(self._session(request, options))
        try:
            decision, _ = await self._decide(checkpoint, query.text, query.requirements, query.lam, start)
        except NoDecision as error:
            default = self._config.default_model
            if default is None or default not in names:
                raise
            logger.error("no decision, %s answers: %s", default, " ".join(str(error).split())[:300])
            return Plan(request.model, (default,), "router_unavailable"), query.text
        finally:
            if not session.done():
                await asyncio.wait({session})
        plan = decided(request.model, decision, options.min_confidence)
        plan = replace(plan, added_tokens=query.requirements.added_tokens)
        return kept(plan, session.result(), self._max_fall, awaits_tool(request.messages)), query.text

    async def _session(self, request: ChatRequest, options: RouterOptions) -> Kept | None:
        """The session of a later turn; None for a first turn, and if the store does not answer."""
        if options.session_id is None and not has_answer(request.messages):
            return None
        try:
            async with asyncio.timeout(SESSION_S):
                return await self._sessions.get.remote(_key(request, options))
        except (*FAILED, BackPressureError, TimeoutError) as error:
            logger.error("no session: %s", " ".join(str(error).split())[:300])
            return None

    def _note_decision(
        self, http: Request, decision_id: str, plan: Plan, checkpoint: Checkpoint, prompt: str | None
    ) -> None:
        self._telemetry.decided(plan)
        logged = prompt if self._config.log.prompts else None
        record = decision_record(plan, checkpoint, logged)
        self._log.note(decision_id, "decision", record | {"key": getattr(http.state, "key", None)})

    async def _decide(
        self, checkpoint: Checkpoint, prompt: str, requirements: Requirements, lam: float | None, start: float
    ) -> tuple[Decision, Timings]:
        """The decision, and its durations since `start`.

        Raises InputError if the request is at fault, NoDecision if encoder or router do not decide.
        """
        try:
            async with asyncio.timeout(self._config.timeout_s):
                rows = await self._encode(prompt, checkpoint)
                encoded = time.perf_counter()
                decision = await self._router.decide.remote(checkpoint, rows, lam, requirements)
            if isinstance(decision, InputError):
                raise decision
        except BackPressureError:
            raise NoDecision(
                *retry_later("too many requests are waiting; retry later", "overloaded", status=429)
            ) from None
        except UnavailableError as error:
            logger.error("%s", getattr(error, "cause", error))
            raise NoDecision(
                *retry_later("the server that encodes prompts does not answer; retry later", "encoder_unavailable")
            ) from None
        except FAILED as error:
            logger.error("%s", " ".join(str(error).split()))
            raise NoDecision(
                *retry_later("the encoder or the router has stopped; retry later", "router_unavailable")
            ) from None
        except TimeoutError:
            raise NoDecision(
                504,
                ErrorDetail(
                    message=f"no decision within {self._config.timeout_s:g} s; retry later",
                    type="server_error",
                    code="timeout",
                ),
            ) from None
        end = time.perf_counter()
        self._telemetry.stage("encode", encoded - start)
        self._telemetry.stage("route", end - encoded)
        return decision, Timings(encode=1e3 * (encoded - start), route=1e3 * (end - encoded), total=1e3 * (end - start))

    @app.get("/v1/models")
    @app.head("/v1/models", include_in_schema=False)
    async def models(self) -> ModelsReply:
        """The models of the pool, and `auto` for the router's choice."""
        return ModelsReply(data=list(self._models().values()))

    @app.get("/v1/models/{name:path}")
    @app.head("/v1/models/{name:path}", include_in_schema=False)
    async def model(self, name: str) -> ModelReply:
        """One model of the pool, or `auto`. Names may contain slashes."""
        models = self._models()
        if name not in models:
            raise unknown_model(name, self._checkpoint().models)
        return models[name]

    @app.get("/", include_in_schema=False)
    async def page(self) -> HTMLResponse:
        """A page that shows decisions and answers."""
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/v1/decisions/{decision_id}")
    async def decision(self, decision_id: str) -> dict[str, Any]:
        """What the log says about a decision: the decision, its answer and feedback."""
        return await self._logged(decision_id)

    @app.post(
        "/v1/feedback",
        openapi_extra=_body_of(FeedbackRequest),
    )
    async def feedback(self, http: Request) -> FeedbackReply:
        """Logs whether the answer of a decision was right."""
        try:
            request = FeedbackRequest.model_validate_json(await self._body(http))
        except ValidationError as error:
            raise ApiError(400, invalid(error, tuple(FeedbackRequest.model_fields))) from None
        await self._logged(request.decision_id)
        self._log.note(request.decision_id, "feedback", {"score": request.value, "source": request.source})
        return FeedbackReply(decision_id=request.decision_id)

    async def _logged(self, decision_id: str) -> dict[str, Any]:
        """Raises ApiError for an unknown decision."""
        found = self._log.recent(decision_id)
        if found is None and DECISION_ID.fullmatch(decision_id):
            async with self._searching:  # one at a time: a search reads the whole log
                found = await asyncio.to_thread(self._log.find, decision_id)
        if found is None:
            raise ApiError(
                404,
                ErrorDetail(
                    message=f"decision_id: {decision_id!r:.80} is not in the log; give the id of a reply",
                    type="invalid_request_error",
                    param="decision_id",
                    code="decision_not_found",
                ),
            )
        return found

    @app.get("/metrics")
    async def metrics(self) -> Response:
        """The metrics of this node, in Prometheus' format."""
        try:
            return Response(await exported_metrics(READY_S), media_type="text/plain; version=0.0.4")
        except UnavailableError as error:
            logger.error("%s", error)
            raise ApiError(
                *retry_later("Ray exports no metrics on this node; retry later", "no_metrics", after_s=10)
            ) from None

    @app.get("/healthz")
    @app.head("/healthz", include_in_schema=False)
    async def healthz(self) -> Health:
        """The live checkpoint; 503 if no checkpoint is live yet."""
        return Health(checkpoint=self._checkpoint().id, refused=self._refused)

    @app.get("/readyz")
    @app.head("/readyz", include_in_schema=False)
    async def readyz(self) -> Health:
        """The live checkpoint, after a decision of encoder and router; 503 if they do not decide."""
        checkpoint = self._checkpoint()
        try:
            async with asyncio.timeout(READY_S):
                await self._router.probe.remote(checkpoint, await self._encode(PROBE, checkpoint))
        except (*FAILED, BackPressureError, TimeoutError) as error:
            logger.error("not ready: %s", " ".join(str(getattr(error, "cause", error)).split())[:300])
            raise ApiError(*retry_later("encoder and router do not decide; retry later", "not_ready")) from None
        return Health(checkpoint=checkpoint.id, refused=self._refused)

    def _models(self) -> dict[str, ModelReply]:
        pool, (servers, _) = self._checkpoint().pool, self._servers
        return {AUTO: ModelReply(id=AUTO)} | {
            model.name: model_reply(model, model.name in servers) for model in pool.models
        }

    def _checkpoint(self) -> Checkpoint:
        if self._live is None:
            raise ApiError(*retry_later("no checkpoint is loaded yet; retry later", "not_ready"))
        return self._live

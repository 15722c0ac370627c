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
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from pydantic import ValidationError
from ray import serve as ray_serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from prefill_router.errors import InputError, UnavailableError
from prefill_router.routing.router import Decision
from prefill_router.version import __version__
from serve import answers, messages, response_events, responses, tracing
from serve.access import Keys, ask_store
from serve.arms import Arm, ArmName, Arms, arms_of, check_models
from serve.cache import keep_serving
from serve.chat import AUTO, ChatRequest, RouterOptions, read_chat, upstream_body
from serve.config import GatewayConfig, Live
from serve.cors import Cors
from serve.decider import FAILED, Decider
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
from serve.limits import Verdict
from serve.openapi import ERRORS, MESSAGES_ERRORS, Api, body_of, object_with
from serve.plan import (
    Plan,
    Query,
    Turn,
    answer_record,
    decided,
    decision_record,
    no_answer_record,
    note,
    note_headers,
    plan_of,
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
    ServerState,
    StatusReply,
    TokenCount,
    invalid,
    model_reply,
    rejected,
    rejected_chat,
    route_reply,
)
from serve.sessions import Kept, has_answer, session_key
from serve.telemetry import Telemetry, exported_metrics
from serve.traffic import LATEST, seen_decision, server_state
from serve.upstream import EVENT_STREAM, BrokenAnswer, NoAnswer, Upstream, Upstreams

QUESTION = "What is 2 + 2?"  # of the examples in the OpenAPI document
CHAT: dict[str, Any] = {"model": AUTO, "messages": [{"role": "user", "content": QUESTION}]}
SESSION_S = 1.0  # maximum time that a request waits for its session
READY_S = 5.0  # maximum time of the decision that GET /readyz waits for
PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
# The page has its script and style in itself, and talks to this server only.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DECISION_ID = re.compile(r"[0-9a-f]{32}")
logger = logging.getLogger("ray.serve")
app = Api(
    (RouteRequest, ChatRequest, RouterOptions, FeedbackRequest),
    title="Prefill Router",
    version=__version__,
    docs_url=None,
    redoc_url=None,
    responses=ERRORS,
    exception_handlers=EXCEPTION_HANDLERS,
)
app.add_middleware(Keys)
app.add_middleware(Cors)  # outside: preflight requests have no key


@contextmanager
def _refused_body() -> Iterator[None]:
    """Raises ApiError for InputError."""
    try:
        yield
    except InputError as error:
        raise ApiError(400, rejected(error)) from None


def _router_headers(reply: Response) -> dict[str, str]:
    return {name: value for name, value in reply.headers.items() if name.startswith("x-router-")}


def _translated(
    reply: Response,
    whole: Callable[[bytes], bytes],
    events: Callable[[AsyncIterator[bytes]], AsyncGenerator[bytes, None]],
) -> Response:
    """The answer of a chat in another API, by the translations of a complete answer and of a stream."""
    if isinstance(reply, RelayedStream):
        headers = _router_headers(reply) | {"content-type": EVENT_STREAM}
        return RelayedStream(events(reply.events), headers, reply.release)
    try:
        return Response(whole(bytes(reply.body)), 200, _router_headers(reply), "application/json")
    except InputError as error:
        raise upstream_error(502, str(error)) from None


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
        self._sessions, self._config = sessions, config
        self._max_fall = max_fall  # of a session's confidence
        self.cors_origins, self.keys = config.cors_origins, config.keys  # read by the middleware
        self._serving: Arms | None = None
        self._upstreams = Upstreams(config.upstream)
        self._log = DecisionLog(config.log)
        self._telemetry = Telemetry()
        self._decider = Decider(encoder, router, config.timeout_s, self._log, self._telemetry)
        self._searching = asyncio.Lock()
        self._refused: str | None = None

    async def __del__(self) -> None:
        """Serve awaits it when the replica stops, after the last request."""
        await asyncio.to_thread(self._log.close)
        await self._upstreams.close()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Makes checkpoints live after a probe has passed through encoder and router with each of them.

        If one is refused, the earlier ones stay. A replica that starts serves the live checkpoint alone then.
        """
        live, starts = Live.model_validate(user_config), self._serving is None
        self._refused = await keep_serving(
            self._go_live(live), ", ".join(live.sources), serving=not starts or live.beside
        )
        if self._refused is not None and starts:
            await self._go_live(Live(checkpoint=live.checkpoint))

    async def _go_live(self, live: Live) -> None:
        share = 0.0 if live.canary is None else live.canary.share
        given: list[tuple[ArmName, float, str]] = [("live", 1 - share, live.checkpoint)]
        if live.canary is not None:
            given.append(("canary", share, live.canary.checkpoint))
        if live.shadow is not None:
            given.append(("shadow", 0.0, live.shadow))
        found = [(name, share, await self._decider.describe(where)) for name, share, where in given]
        self._serving = arms_of(found, os.environ, self._config.endpoints, self._config.default_model)

    @app.post("/v1/route", openapi_extra=body_of(RouteRequest, {"prompt": QUESTION, "lambda": 0.2}))
    async def route(self, http: Request) -> RouteReply:
        """Chooses a model for a prompt."""
        start = time.perf_counter()
        arms, decision_id = self._arms(), uuid.uuid4().hex
        request: RouteRequest | None = None
        try:
            request = read_request(await self._body(http))
            models = request.models or ()
            check_models(models, arms.live)
            query = Query(request.text, request.requirements, request.lam)
            drawn = arms.drawn(lambda: decision_id, models, asks=False)
            made = await self._decider.decide_by(arms, drawn, lambda _: query, start)
            arm, decision = made.arm, made.decision
        except ValidationError as error:
            raise ApiError(400, invalid(error)) from None
        except InputError as error:
            raise ApiError(400, rejected(error, request)) from None

        def planned(decision: Decision) -> Plan:
            return replace(decided(AUTO, decision, None), added_tokens=query.requirements.added_tokens)

        async def plan_by(other: Arm) -> Plan:
            return planned((await self._decider.decide(other.checkpoint, query, time.perf_counter()))[0])

        self._telemetry.stages(made.timings)
        plan = replace(planned(decision), arm=arm.name, share=made.share)
        self._note_decision(http, decision_id, plan, arm.checkpoint, query.text)
        self._decider.observe(arms.observing(arm, models, asks=False), decision_id, plan, plan_by)
        return route_reply(
            decision,
            encoder=list(arm.checkpoint.encoders),
            checkpoint=arm.checkpoint.id,
            timings_ms=made.timings,
            decision_id=decision_id,
        )

    @app.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest, CHAT, streams=True))
    async def chat(self, http: Request) -> Response:
        """Answers a chat from the server of the chosen model."""
        start = time.perf_counter()
        return await self._chat(http, await self._body(http), start)

    @app.post("/v1/messages", openapi_extra=object_with(CHAT | {"max_tokens": 100}), responses=MESSAGES_ERRORS)
    async def messages(self, http: Request) -> Response:
        """Answers a request of Anthropic's Messages API, by way of a chat."""
        start = time.perf_counter()
        with _refused_body():
            body = messages.chat_body(await self._body(http))
        reply = await self._chat(http, body, start)
        if reply.status_code != 200:
            error = messages.error_of(reply.status_code, messages.error_message(bytes(reply.body)))
            return JSONResponse(error, reply.status_code, _router_headers(reply))
        return _translated(reply, messages.message_of, messages.events_of)

    @app.post("/v1/responses", openapi_extra=object_with({"model": AUTO, "input": QUESTION}))
    async def responses(self, http: Request) -> Response:
        """Answers a request of OpenAI's Responses API, by way of a chat."""
        start = time.perf_counter()
        asked = await self._body(http)
        with _refused_body():
            body = responses.chat_body(asked)
        try:
            reply = await self._chat(http, body, start)
        except ApiError as error:
            raise ApiError(error.status, responses.error_of(error.detail), error.headers) from None
        if reply.status_code != 200:
            return reply
        whole = partial(response_events.response_of, request=asked)
        return _translated(reply, whole, partial(response_events.events_of, request=asked))

    @app.post("/v1/messages/count_tokens", openapi_extra=object_with(CHAT, streams=False), responses=MESSAGES_ERRORS)
    async def count_tokens(self, http: Request) -> TokenCount:
        """The estimated input tokens of a request of Anthropic's Messages API."""
        with _refused_body():
            return TokenCount(input_tokens=messages.estimated_tokens(await self._body(http)))

    async def _body(self, http: Request) -> bytes:
        return await read_body(http, self._config.max_body_bytes, self._config.timeout_s)

    async def _chat(self, http: Request, body: bytes, start: float) -> Response:
        arms, decision_id = self._arms(), uuid.uuid4().hex
        arm = arms.live
        try:
            request = read_chat(body)
            options = request.options(http.headers)
            if request.asked is not None and request.asked not in arm.checkpoint.models:
                raise unknown_model(request.asked, arm.checkpoint.models)
            check_models(options.models or (), arm)
            plan, prompt = plan_of(request, options, arm, self._config.default_model), None
            if plan is None:
                arm, plan, prompt = await self._decided(request, options, arms, decision_id, start)
        except ValidationError as error:
            raise ApiError(400, rejected_chat(error)) from None
        except InputError as error:
            raise ApiError(400, rejected_chat(error)) from None
        checkpoint, servers = arm.checkpoint, arm.servers
        fallbacks = self._config.fallbacks if options.fallbacks is None else options.fallbacks
        overhead_ms = 1e3 * (time.perf_counter() - start)
        text, stream = body.decode(), bool(request.stream)
        self._note_decision(http, decision_id, plan, checkpoint, prompt)

        def body_for(one: Upstream) -> bytes:
            return upstream_body(text, one.model, request, one.effort)

        try:
            order = [servers[name] for name in plan.order]
            answer = await self._upstreams.ask(order, body_for, stream, 1 + fallbacks)
        except NoAnswer as failed:
            record = no_answer_record(str(failed), failed.attempts, time.perf_counter() - start)
            self._log.note(decision_id, "answer", record)
            self._telemetry.unanswered(failed.attempts)
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
            usd = answers.charged_usd(found, answer.status, usage, error, len(body), answer.output_tokens)
            record |= self._charge(http, usd)
            self._log.note(decision_id, "answer", record)
            tokens, usd = answers.token_counts(usage), record["cost_usd"]
            tracing.note(found.router, tokens)
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
        self, request: ChatRequest, options: RouterOptions, arms: Arms, decision_id: str, start: float
    ) -> tuple[Arm, Plan, str]:
        """The arm that decides, its plan, and the routed text.

        The default model is asked if there is one, and encoder or router do not decide.
        """
        models = options.models or ()
        drawn = arms.drawn(lambda: _key(request, options), models, asks=True)
        session = await self._session(request, options)
        turn = Turn(request, options, session, self._max_fall, self._upstreams.left_alone())
        try:
            made = await self._decider.decide_by(arms, drawn, turn.query, start)
        except NoDecision as error:
            default, query = self._config.default_model, turn.query(arms.live)
            if default is None or default not in (query.requirements.models or ()):
                raise
            logger.error("no decision, %s answers: %s", default, " ".join(str(error).split())[:300])
            share = drawn[1] if drawn[0] is arms.live else None
            return arms.live, Plan(request.model, (default,), "router_unavailable", share=share), query.text
        self._telemetry.stages(made.timings)
        plan = turn.plan(made.arm, made.query, made.decision)
        plan = replace(plan, arm=made.arm.name, share=made.share)

        async def plan_by(other: Arm) -> Plan:
            query = turn.query(other)
            decision, _ = await self._decider.decide(other.checkpoint, query, time.perf_counter())
            return turn.plan(other, query, decision)

        self._decider.observe(arms.observing(made.arm, models, asks=True), decision_id, plan, plan_by)
        return made.arm, plan, made.query.text

    async def _session(self, request: ChatRequest, options: RouterOptions) -> Kept | None:
        """The session of a later turn; None for a first turn, and if the store does not answer."""
        if options.session_id is None and not has_answer(request.messages):
            return None
        try:
            async with asyncio.timeout(SESSION_S):
                return await self._sessions.get.remote(_key(request, options))
        except (*FAILED, TimeoutError) as error:
            logger.error("no session: %s", " ".join(str(error).split())[:300])
            return None

    def _note_decision(
        self, http: Request, decision_id: str, plan: Plan, checkpoint: Checkpoint, prompt: str | None
    ) -> None:
        self._telemetry.decided(plan)
        logged = prompt if self._config.log.prompts else None
        record = decision_record(plan, checkpoint, logged)
        self._log.note(decision_id, "decision", record | {"key": getattr(http.state, "key", None)})

    async def check_limits(self, key: str, path: str) -> Verdict:
        """Whether the limits of an API key allow a request. The middleware calls it."""
        verdict = await ask_store(self._sessions, key, self.keys[key], path)
        if verdict.refused is not None:
            self._telemetry.refused(key, verdict.refused)
        return verdict

    def _charge(self, http: Request, usd: float) -> dict[str, Any]:
        """Adds the cost of an answer to the spend of its API key, and returns what the log says about it.

        Nothing if the key has no budget.
        """
        key, ended = getattr(http.state, "key", None), time.time()
        if key is None or self.keys[key].usd_per_day is None:
            return {}
        self._sessions.spend.remote(key, usd, ended)
        return {"key": key, "charged_usd": usd, "time": ended}  # the same time as in the store

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
            raise unknown_model(name, self._arms().live.checkpoint.models)
        return models[name]

    @app.get("/v1/status")
    @app.head("/v1/status", include_in_schema=False)
    async def status(self, http: Request) -> StatusReply:
        """What this replica has seen: traffic, spend, state of the servers, latest decisions of the API key."""
        health, now = self._health(), time.time()
        acting = [arm for arm in reversed(self._arms().arms) if arm.share > 0]  # the live arm last: its states count
        replica = ray_serve.get_replica_context().replica_tag
        return StatusReply(
            **health.model_dump(),
            time=now,
            replica=self._telemetry.traffic.reply(replica, now),
            servers={name: state for arm in acting for name, state in self._states(arm).items()},
            latest=[seen_decision(one) for one in self._log.latest(LATEST, getattr(http.state, "key", None))],
        )

    def _states(self, arm: Arm) -> dict[str, ServerState]:
        """The state of the server of each model in the pool of `arm`."""
        missing = {name: ServerState(state="missing", reason=reason) for name, reason in arm.missing.items()}
        return {
            name: missing.get(name) or server_state(*self._upstreams.state(arm.servers[name]))
            for name in arm.checkpoint.models
        }

    @app.get("/", include_in_schema=False)
    async def page(self) -> HTMLResponse:
        """A page that shows decisions and answers."""
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/v1/decisions/{decision_id}")
    async def decision(self, decision_id: str) -> dict[str, Any]:
        """What the log says about a decision: the decision, its answer and feedback."""
        return await self._logged(decision_id)

    @app.post("/v1/feedback", openapi_extra=body_of(FeedbackRequest, {"decision_id": "0" * 32, "correct": True}))
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

    @app.get("/metrics", response_class=PlainTextResponse)
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
        return self._health()

    @app.get("/readyz")
    @app.head("/readyz", include_in_schema=False)
    async def readyz(self) -> Health:
        """The live checkpoint, after a decision of encoder and router; 503 if they do not decide."""
        checkpoint, health = self._arms().live.checkpoint, self._health()
        try:
            async with asyncio.timeout(READY_S):
                await self._decider.probe(checkpoint)
        except (*FAILED, BackPressureError, TimeoutError) as error:
            logger.error("not ready: %s", " ".join(str(getattr(error, "cause", error)).split())[:300])
            raise ApiError(*retry_later("encoder and router do not decide; retry later", "not_ready")) from None
        return health

    def _models(self) -> dict[str, ModelReply]:
        live = self._arms().live
        return {AUTO: ModelReply(id=AUTO)} | {
            model.name: model_reply(model, model.name in live.servers) for model in live.checkpoint.pool.models
        }

    def _health(self) -> Health:
        arms = self._arms()
        ids = {arm.name: arm.checkpoint.id for arm in arms.arms}
        return Health(checkpoint=ids["live"], canary=ids.get("canary"), shadow=ids.get("shadow"), refused=self._refused)

    def _arms(self) -> Arms:
        if self._serving is None:
            raise ApiError(*retry_later("no checkpoint is loaded yet; retry later", "not_ready"))
        return self._serving

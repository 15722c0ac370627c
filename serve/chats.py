"""Handlers of chats: OpenAI's chat completions, and two other APIs by way of a chat.

In: requests. Out: the answer of the server of the chosen model, or of the next candidate if it does not answer. Knows
nothing of checkpoints that come and go.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from prefill_router.errors import InputError
from serve import answers, messages, response_events, responses, tracing
from serve.api import QUESTION, app
from serve.arms import Arm, Arms, check_models
from serve.chat import AUTO, ChatRequest, RouterOptions, read_chat, upstream_body
from serve.decider import FAILED
from serve.http import ApiError, NoDecision, RelayedStream, no_answer, unknown_model, upstream_error
from serve.openapi import MESSAGES_ERRORS, body_of, object_with
from serve.plan import Plan, Turn, answer_record, no_answer_record, note, note_headers, plan_of
from serve.replica import Replica, logger
from serve.schemas import TokenCount, rejected, rejected_chat
from serve.sessions import Kept, has_answer, session_key
from serve.upstream import EVENT_STREAM, BrokenAnswer, NoAnswer, Upstream

CHAT: dict[str, Any] = {"model": AUTO, "messages": [{"role": "user", "content": QUESTION}]}
SESSION_S = 1.0  # maximum time that a request waits for its session


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


class ChatHandlers(Replica):
    """The handlers of POST /v1/chat/completions, /v1/messages and /v1/responses."""

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
        checkpoint = arm.checkpoint
        fallbacks = self._config.fallbacks if options.fallbacks is None else options.fallbacks
        overhead_ms = 1e3 * (time.perf_counter() - start)
        text, stream = body.decode(), bool(request.stream)
        self._note_decision(http, decision_id, plan, checkpoint, prompt, _key(request, options))

        def body_for(one: Upstream) -> bytes:
            return upstream_body(text, one.model, request, one.effort)

        def report(failed: bool) -> None:
            if plan.decision is not None:
                self._report(arms, arm, plan.share, _key(request, options), "errors", float(failed))

        try:
            candidates, most = arms.candidates(arm, plan.order, 1 + fallbacks)
            answer = await self._upstreams.ask(candidates, body_for, stream, most)
        except NoAnswer as failed:
            report(failed=True)
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
            if error != answers.CLIENT_LEFT:  # the chosen model did not answer, or not properly
                report(error is not None or bool(answer.attempts) or plan.reason == "health")
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
            made = await self._decide(arms, drawn, _key(request, options), turn.query, start)
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

    def _charge(self, http: Request, usd: float) -> dict[str, Any]:
        """Adds the cost of an answer to the spend of its API key, and returns what the log says about it.

        Nothing if the key has no budget.
        """
        key, ended = getattr(http.state, "key", None), time.time()
        if key is None or self.keys[key].usd_per_day is None:
            return {}
        self._sessions.spend.remote(key, usd, ended)
        return {"key": key, "charged_usd": usd, "time": ended}  # the same time as in the store

"""The gateway's page from a stub of the gateway, in a thread of the test process, and a headless Chromium for it.

The stub's replies are made by the functions of `serve/` that make those of the gateway.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from playwright.sync_api import Browser, sync_playwright
from stub_upstream import running

from prefill_router.pool import Pool, TargetModel
from prefill_router.routing.eligibility import Excluded
from prefill_router.routing.router import Candidate, Decision
from serve.decision_log import DecisionLog, DecisionLogConfig
from serve.events import event_of
from serve.plan import Plan, answer_record, decided, decision_record, note
from serve.router import Checkpoint
from serve.schemas import ErrorDetail, ErrorReply, ServerState, StatusReply, Timings, route_reply
from serve.status import PAGE, PAGE_POLICY
from serve.traffic import LATEST, Traffic, seen_decision, server_state

NOW = 1_790_000_000.0
SMALL, MIDDLE, LARGE, GONE = "qwen3-8b", "llama-3.3-70b-instruct", "claude-sonnet-4.5", "gemma-3-4b"
PRICES = {SMALL: 0.05, MIDDLE: 0.6, LARGE: 5.0, GONE: 0.02}  # USD per million tokens of input
CONFIDENCES = {SMALL: 0.71, MIDDLE: 0.8, LARGE: 0.93}
POOL = Pool(
    models=tuple(
        TargetModel(name=name, input_usd_per_mtok=usd, output_usd_per_mtok=4 * usd) for name, usd in PRICES.items()
    )
)
CHECKPOINT = Checkpoint("c3ad3e39e69d5695", "runs/demo/checkpoint", POOL, {}, best_single=LARGE)
NO_ENDPOINT = "has no endpoint in gateway.endpoints or pool.yaml"


def decision_of(prompt: str, lam: float | None) -> Decision:
    """A decision whose confidences grow with the words of the prompt; lambda is 0.1 by default."""
    lam = 0.1 if lam is None else float(lam)
    sure = min(len(prompt.split()), 20) / 20 * 0.06
    candidates = [
        Candidate(name, value + sure, 0.02, 400e-6 * PRICES[name], value + sure - lam * PRICES[name] / 5, 300.0)
        for name, value in CONFIDENCES.items()
    ]
    best = sorted(candidates, key=lambda one: -one.score)
    return Decision(best[0].model, lam, tuple(best), (Excluded(GONE, NO_ENDPOINT),), "score", novelty=0.41)


def plan_of(prompt: str, lam: float | None = None) -> Plan:
    return decided("auto", decision_of(prompt, lam), None)


def note_of(plan: Plan, decision_id: str, *attempts: Any) -> Any:
    answer: Any = SimpleNamespace(upstream=SimpleNamespace(name=plan.order[0]), attempts=attempts)
    return note(plan, answer, CHECKPOINT, decision_id, 26.4, explain=False)


def status_of(replica: str = "k3x9", decisions: int = 48, **servers: ServerState) -> StatusReply:
    """The status of a replica with `decisions` decisions in the last ten minutes; all but one in 16 are answered."""
    traffic, log = Traffic(NOW - 7200), DecisionLog(DecisionLogConfig())
    for number in range(decisions):
        plan = plan_of("word " * (number % 20), (number * 7 % 11) / 10)
        decision_id = f"{Random(number).getrandbits(128):032x}"
        at = NOW - 590 * (1 - (number + 1) / decisions) ** 1.5
        traffic.decided(plan.order[0], plan.reason, at)
        log.note(decision_id, "decision", decision_record(plan, CHECKPOINT, None) | {"time": at})
        if number % 16 == 15:
            traffic.attempted(plan.order[0], "status 503")
            traffic.failed(plan.order[0])
            log.note(decision_id, "answer", {"served": None, "error": "status 503", "latency_s": 0.5})
            continue
        found, usage = note_of(plan, decision_id), {"prompt_tokens": 200 + number, "completion_tokens": 150}
        record = answer_record(found, 200, usage, None, 0.4 + number % 7 / 5)
        log.note(decision_id, "answer", record)
        traffic.answered(plan.order[0])
        traffic.spent(plan.order[0], record["cost_usd"], {"most_expensive": 2e-3, "best_single": 1.5e-3})
    states = {name: server_state("closed", 0.0) for name in CONFIDENCES}
    states[GONE] = ServerState(state="missing", reason=NO_ENDPOINT)
    return StatusReply(
        checkpoint=CHECKPOINT.id,
        time=NOW,
        replica=traffic.reply(replica, NOW),
        servers=states | servers,
        latest=[seen_decision(one) for one in log.latest(LATEST)],
    )


@dataclass
class StubGateway:
    """The stub. `status`: its reply of GET /v1/status; `turns`: other replies, in turn, if there are.

    `key`: the API key that it requires, None without keys; `asked`: paths and bodies of the requests. A stream ends
    when `finish` is set.
    """

    url: str = ""
    status: StatusReply = field(default_factory=status_of)
    turns: list[StatusReply] = field(default_factory=list)
    key: str | None = None
    asked: list[tuple[str, Any]] = field(default_factory=list)
    finish: threading.Event = field(default_factory=threading.Event)

    def bodies(self, path: str) -> list[Any]:
        """The bodies of the requests for `path`, in order."""
        return [body for asked, body in self.asked if asked == path]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        body = json.loads(text) if text else None
        self.asked.append((request.path, body))
        if request.path == "/":
            return web.Response(text=PAGE, content_type="text/html", headers={"Content-Security-Policy": PAGE_POLICY})
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            detail = ErrorDetail(message="Authorization: the API key is missing or wrong", type="invalid_request_error")
            return web.json_response(ErrorReply(error=detail).model_dump(), status=401)
        if request.path == "/v1/status":
            turns = self.turns or [self.status]
            status = turns[len(self.asked) % len(turns)]
            return web.Response(text=status.model_dump_json(), content_type="application/json")
        if request.path == "/v1/route":
            reply = route_reply(
                decision_of(body["prompt"], body.get("lambda")),
                encoder=["f61785ea61a742b1"],
                checkpoint=CHECKPOINT.id,
                timings_ms=Timings(encode=19.4, route=7.1, total=26.5),
                decision_id="0" * 32,
            )
            return web.Response(text=reply.model_dump_json(), content_type="application/json")
        return await self._stream(request, body)

    async def _stream(self, request: web.Request, body: Any) -> web.StreamResponse:
        found = note_of(plan_of(body["messages"][0]["content"]), "1" * 32)
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)

        async def send(text: str, changes: dict[str, Any]) -> None:
            chunk = {"choices": [{"index": 0, "delta": {"content": text}}], **changes}
            await reply.write(event_of(json.dumps(chunk)))

        await send("The first ", found.changes(None, with_usage=False))
        while not self.finish.is_set():
            await asyncio.sleep(0.01)
        await send("friend gets 8.", found.changes({"prompt_tokens": 40, "completion_tokens": 6}))
        await reply.write(event_of("[DONE]"))
        return reply


@contextmanager
def stub_gateway() -> Iterator[StubGateway]:
    """A running stub; `url` is its address."""
    stub, app = StubGateway(), web.Application()
    app.router.add_route("*", "/{path:.*}", stub.answer)
    with running(app) as stub.url:
        yield stub


@contextmanager
def chromium() -> Iterator[Browser]:
    """The installed Chromium or Chrome, headless. Without one the test is skipped."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"none of {', '.join(names)} is installed; install one, such as Debian's package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()

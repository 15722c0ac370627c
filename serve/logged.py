"""Handlers of the decision log: what became of a decision, and feedback about its answer.

In: ids of decisions. Out: what this replica or the files of all replicas say about them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from pydantic import ValidationError

from serve.api import app
from serve.http import ApiError
from serve.openapi import body_of
from serve.replica import Replica
from serve.schemas import ErrorDetail, FeedbackReply, FeedbackRequest, invalid
from serve.trial import Outcome

DECISION_ID = re.compile(r"[0-9a-f]{32}")


class LogHandlers(Replica):
    """The handlers of GET /v1/decisions and POST /v1/feedback."""

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
        decision = (await self._logged(request.decision_id)).get("decision", {})
        self._rated(request.decision_id, decision, request.value)
        self._log.note(request.decision_id, "feedback", {"score": request.value, "source": request.source})
        return FeedbackReply(decision_id=request.decision_id)

    def _rated(self, decision_id: str, decision: Mapping[str, Any], score: float) -> None:
        """Reports the score of a decision that an arm of the present comparison has made."""
        arms, share = self._arms(), decision.get("share")
        arm = next((one for one in arms.arms if one.name == decision.get("arm")), None)
        if arms.pair is None or arm is None or share in (1.0, None) or decision.get("checkpoint") != arm.checkpoint.id:
            return
        drawn = share if arm is arms.canary else 1 - share  # the share of the canary when the decision was made
        conversation = decision.get("conversation") or decision_id  # a log of an earlier release has none
        self._follower.report(arms.pair, Outcome(conversation[:16], "feedback", arm is arms.canary, drawn, 1 - score))

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

"""The web application of the gateway. Modules of handlers add their routes to it (serve/replica.py)."""

from __future__ import annotations

from prefill_router.version import __version__
from serve.access import Keys
from serve.chat import ChatRequest, RouterOptions
from serve.cors import Cors
from serve.http import EXCEPTION_HANDLERS
from serve.openapi import ERRORS, Api
from serve.requests import RouteRequest
from serve.schemas import FeedbackRequest

QUESTION = "What is 2 + 2?"  # of the examples in the OpenAPI document
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

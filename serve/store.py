"""The store deployment: what all replicas share. It has one replica.

In: calls of gateways, encoders and routers. Out: the sessions of conversations and the limits of API keys
(serve/sessions.py), and what the replicas serve now (serve/targets.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from serve.live import Live
from serve.sessions import Sessions, SessionsConfig
from serve.targets import Target, Targets
from serve.trial import Outcome, Pair


class Store(Sessions):
    """Class of the deployment `Sessions`; `serve.app.build` sets its resources."""

    def __init__(self, config: SessionsConfig, spent_log: Path | None = None) -> None:
        super().__init__(config, spent_log)
        self._targets = Targets()

    async def target(self, configured: Live, known: Target | None, outcomes: Sequence[tuple[Pair, Outcome]]) -> Target:
        """The present target of a configuration, as `Targets.target`."""
        return await self._targets.target(configured, known, outcomes)

"""Where the server was given an API key, requests must bring it."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from manyheads.server.errors import ApiError

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version", "/docs", "/openapi.json", "/metrics"})
"""These need no key: probes, the interface's description and the page (whose requests bring one)."""
DOCS_FILES = "/docs-files"
"""The scripts of /docs are served from here."""


class ApiKey:
    """This ASGI middleware wants `Authorization: Bearer KEY` for everything but OPEN_PATHS."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self._expected = b"Bearer " + key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and path not in OPEN_PATHS and not path.startswith(DOCS_FILES + "/"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                error = ApiError(401, "send this server's API key as Authorization: Bearer KEY", code="invalid_api_key")
                return await error.response()(scope, receive, send)
        return await self.app(scope, receive, send)

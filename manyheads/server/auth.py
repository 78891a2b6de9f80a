"""Where the server was given API keys, requests must bring one; a key may have limits."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from manyheads.server.errors import ApiError
from manyheads.server.keys import Key, Keys
from manyheads.server.logs import token_counts
from manyheads.server.pages import FILES

OPEN_PATHS = frozenset({"/", "/dashboard", "/favicon.ico", "/health", "/ready"})
"""These never need a key: probes, and the pages (whose requests bring one) with their FILES."""
DOCS_FILES = "/docs-files"
"""The scripts of /docs are served from here."""
INFO_PATHS = frozenset({"/version", "/docs", "/openapi.json", "/metrics"})
"""These need a key, as DOCS_FILES do, where the server is told to protect them."""


def client_of(request: Request) -> str:
    """Name the client whose fair share a request counts against: its API key, by name, else its address."""
    name = getattr(request.state, "client", None)
    if name is not None:
        return f"key {name}"
    return f"address {request.client.host}" if request.client is not None else "address unknown"


def session_of(request: Request) -> str:
    """Name the session that a request is part of, by its header `X-Session-Id`; "" is none."""
    return request.headers.get("x-session-id", "")


@dataclass
class Usage:
    """It counts what a key has open, and the tokens that it used and that time has not made good yet."""

    open: int = 0
    tokens: float = 0.0
    at: float = field(default_factory=time.monotonic)

    def check(self, key: Key) -> None:
        """Raise ApiError 429 if the key is at one of its limits."""
        if key.max_requests is not None and self.open >= key.max_requests:
            message = f"this API key has {self.open} requests open, the most it may; wait until one has ended"
            raise ApiError(429, message, code="too_many_requests", retry_after=1)
        now = time.monotonic()
        since, self.at = now - self.at, now
        if key.tokens_per_minute is None:
            self.tokens = 0.0  # nothing to make good, should the key be given a limit one day
        else:
            per_second = key.tokens_per_minute / 60
            self.tokens = max(0.0, self.tokens - since * per_second)
            if self.tokens >= key.tokens_per_minute:
                seconds = max(1, math.ceil((self.tokens - key.tokens_per_minute) / per_second))
                message = f"this API key has used its {key.tokens_per_minute} tokens a minute; wait {seconds} s"
                raise ApiError(429, message, code="too_many_tokens", retry_after=seconds)


class ApiKeys:
    """This ASGI middleware wants `Authorization: Bearer KEY` for everything but what is open to all.

    The name of the key goes into the request's state as `client`.
    """

    def __init__(self, app: ASGIApp, keys: Keys, *, protect_info: bool) -> None:
        self.app = app
        self._keys = keys
        self._protect_info = protect_info
        self._usage: defaultdict[str, Usage] = defaultdict(Usage)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not needs_key(_path(scope), self._protect_info):
            return await self.app(scope, receive, send)
        try:
            key = self._check(scope)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        if scope["method"] != "POST":  # questions about the server are not counted
            return await self.app(scope, receive, send)
        usage = self._usage[key.name]
        usage.open += 1
        try:
            return await self.app(scope, receive, send)
        finally:
            usage.open -= 1
            usage.tokens += sum(token_counts(scope["state"]))

    def _check(self, scope: Scope) -> Key:
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        key = self._keys.find(given.strip()) if scheme.lower() == b"bearer" else None
        if key is None:
            raise ApiError(401, "send this server's API key as Authorization: Bearer KEY", code="invalid_api_key")
        scope.setdefault("state", {})["client"] = key.name
        if scope["method"] == "POST":
            self._usage[key.name].check(key)
        return key


def needs_key(path: str, protect_info: bool) -> bool:
    """Tell whether a path asks for a key where there are any."""
    if path in INFO_PATHS or path.startswith(DOCS_FILES + "/"):
        return protect_info
    return path not in OPEN_PATHS and not path.startswith(FILES + "/")


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))

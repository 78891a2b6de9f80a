"""Every request has an id, and its end is a line in the log: who asked where, never what was asked or answered."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any
from urllib.parse import quote

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manyheads.server.unknown import ignored_header

LOG_FORMATS = ("text", "json")
_SANE_ID = re.compile(rb"[!-~]{1,128}")
_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
_log = logging.getLogger("manyheads.access")


class RequestLog:
    """This ASGI middleware, outside of all others, gives each request its id and writes a line when it has ended.

    The id is what the request brings as `X-Request-Id`, if that is printable ASCII of at most 128 characters, else one
    is made. It goes back on the answer and into every line of the log that the request causes.
    """

    def __init__(self, app: ASGIApp, *, access_log: bool) -> None:
        self.app = app
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        own_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        # NOTE: never reset, so that the web server's own line about an exception has the id too; each request is a task
        _request_id.set(own_id.decode())
        scope.setdefault("state", {})
        start = time.perf_counter()
        status, is_complete = 500, False

        async def send_on(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {
                    **message,
                    "headers": [*message["headers"], (b"x-request-id", own_id), *ignored_header(scope)],
                }
            else:
                is_complete = not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, receive, send_on)
            if not is_complete:
                status = 499  # the client has left in the middle of the answer
        except Exception:
            status = 500
            raise
        finally:
            if self._access_log:
                _log.info("request", extra={"fields": _facts(scope, status, time.perf_counter() - start)})


def token_counts(state: Mapping[str, Any]) -> tuple[int, int]:
    """Count the tokens of a request's prompts and of its output so far, from the state of its ASGI scope."""
    generations = state.get("generations", ())
    num_output_tokens = sum(len(output.token_ids) for g in generations for output in g.outputs)
    return sum(len(g.prompt.token_ids) for g in generations), num_output_tokens


def _facts(scope: Scope, status: int, seconds: float) -> dict[str, Any]:
    """Collect what the log says about a request that has ended."""
    state = scope["state"]
    facts = {
        "client": state.get("client"),
        "address": scope["client"][0] if scope.get("client") else None,
        "method": scope["method"],
        "path": quote(scope["path"]),
        "status": status,
        "seconds": round(seconds, 4),
    }
    if "generations" in state:
        facts["prompt_tokens"], facts["output_tokens"] = token_counts(state)
    return {name: value for name, value in facts.items() if value is not None}


class LineFormatter(logging.Formatter):
    """It writes a record of the log as a line with the time in UTC, as text or as a JSON object.

    An exception's traceback follows a line of text, and is the field `exception` of a JSON object.
    """

    def __init__(self, log_format: str) -> None:
        super().__init__()
        self._is_json = log_format == "json"

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        at = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": at, "level": record.levelname.lower(), "message": record.getMessage()}
        facts: dict[str, Any] = getattr(record, "fields", {})
        if (request_id := _request_id.get()) is not None:
            facts = {"request_id": request_id, **facts}
        traceback = self.formatException(record.exc_info) if record.exc_info else ""
        if self._is_json:
            return msgspec.json.encode(line | facts | ({"exception": traceback} if traceback else {})).decode()
        text = " ".join([*line.values(), *(f"{name}={value}" for name, value in facts.items())])
        return f"{text}\n{traceback}" if traceback else text


def log_config(log_format: str) -> dict[str, Any]:
    """Make the configuration of `logging` that the web server starts with: one handler, to standard error."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": LineFormatter, "log_format": log_format}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {_log.name: {"level": "INFO"}},
    }

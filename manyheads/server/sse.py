"""Streams are server-sent events."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any, Protocol

import msgspec
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from manyheads.frontend.generation import Update
from manyheads.server.errors import as_api_error
from manyheads.server.leaving import while_there

DONE = b"data: [DONE]\n\n"
_log = logging.getLogger(__name__)


def event(data: Any, name: str | None = None) -> bytes:
    """Write an event whose data is JSON, perhaps with a name."""
    named = b"" if name is None else b"event: " + name.encode() + b"\n"
    return named + b"data: " + msgspec.json.encode(data) + b"\n\n"


class Events(Protocol):
    """What an endpoint tells in a stream; each piece is any number of events."""

    def begin(self) -> bytes:
        """Write what comes before the first update."""

    def push(self, update: Update) -> bytes:
        """Write what an update brought."""

    def end(self) -> bytes:
        """Write what comes behind the last update."""


class EventStream(Response):
    """This answer sends events as updates come, past caches and buffers on the way.

    It begins with the first update, so that a refusal can still be the answer's status. What fails later is told by
    the last event. A client that leaves closes the updates.
    """

    media_type = "text/event-stream"

    def __init__(self, updates: AsyncGenerator[Update, None], events: Events) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._updates, self._events = updates, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it (ASGI)."""
        await while_there(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        has_begun = False
        try:
            async with contextlib.aclosing(self._updates) as updates:
                async for update in updates:
                    data = self._events.push(update) if has_begun else self._events.begin() + self._events.push(update)
                    if not has_begun:
                        has_begun = True
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    if data:
                        await send({"type": "http.response.body", "body": data, "more_body": True})
            data = self._events.end()
        except Exception as error:
            if not has_begun:
                raise
            api = as_api_error(error)
            if api.status == 500:
                _log.exception("while streaming")
            data = event(api.body()) + DONE
        await send({"type": "http.response.body", "body": data, "more_body": False})

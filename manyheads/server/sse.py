"""Streams are server-sent events."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import msgspec
from fastapi.responses import StreamingResponse

from manyheads.server.errors import as_api_error

DONE = b"data: [DONE]\n\n"
_log = logging.getLogger(__name__)


def event(data: Any, name: str | None = None) -> bytes:
    """Write an event whose data is JSON, perhaps with a name."""
    named = b"" if name is None else b"event: " + name.encode() + b"\n"
    return named + b"data: " + msgspec.json.encode(data) + b"\n\n"


async def guarded(events: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Pass events on, and an error as the last one: the status line has been sent by then."""
    try:
        async for data in events:
            yield data
    except Exception as error:
        api = as_api_error(error)
        if api.status == 500:
            _log.exception("while streaming")
        yield event(api.body())
        yield DONE


def stream_response(events: AsyncIterator[bytes]) -> StreamingResponse:
    """Answer with events as they come, past caches and buffers on the way."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(guarded(events), media_type="text/event-stream", headers=headers)

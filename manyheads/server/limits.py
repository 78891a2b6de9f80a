"""Bodies that are too large are not read."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manyheads.server.errors import ApiError

DISCARD_SECONDS = 5.0
"""A client may go on sending what is not wanted so long: closing before it has finished can lose it the answer."""


class BodyLimit:
    """This ASGI middleware reads a request's body up to a limit before the application sees the request.

    What announces more is answered 413 at once; what sends more without saying so, as soon as it does. The rest of such
    a body is thrown away as it comes.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_bytes:
            return await self._refuse(receive, send, more=True)
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_bytes:
                return await self._refuse(receive, send, more)
        read: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return read.pop() if read else await receive()

        return await self.app(scope, replay, send)

    async def _refuse(self, receive: Receive, send: Send, more: bool) -> None:
        async def discard() -> None:
            while (await receive()).get("more_body", False):
                pass

        message = f"the body is larger than {self.max_bytes} bytes, the most this server reads"
        response = ApiError(413, message, code="body_too_large").response()
        response.headers["Connection"] = "close"
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        if more:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(discard(), DISCARD_SECONDS)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

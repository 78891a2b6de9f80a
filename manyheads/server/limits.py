"""Requests and connections have limits: how large, how long, how many."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manyheads.server.drops import Drops
from manyheads.server.errors import ApiError

DISCARD_SECONDS = 5.0
"""A client may go on sending what is not wanted so long: closing before it has finished can lose it the answer."""
TIMED_BYTES = 2**20
"""Each so many bytes of a body have `--body-timeout` seconds to arrive: a large body may take longer than a small one,
but must keep that rate."""


class BodyLimit:
    """This ASGI middleware reads a request's body up to a limit before the application sees the request.

    What announces more is answered 413 at once; what sends more without saying so, as soon as it does; what does not
    arrive in time, 408. The rest of such a body is thrown away as it comes.

    Args:
        seconds: for each begun MiB.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float, drops: Drops) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.seconds = seconds
        self.drops = drops

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_bytes:
            return await self._refuse(self._too_large(), receive, send, more=True)
        loop = asyncio.get_running_loop()
        start = loop.time()
        body = bytearray()
        more = True
        while more:
            deadline = start + self.seconds * (1 + len(body) // TIMED_BYTES)
            try:
                message = await asyncio.wait_for(receive(), deadline - loop.time())
            except asyncio.TimeoutError:
                return await self._refuse(self._too_slow(), receive, send, more=True)
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_bytes:
                return await self._refuse(self._too_large(), receive, send, more)
        read: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return read.pop() if read else await receive()

        return await self.app(scope, replay, send)

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self.max_bytes} bytes, the most this server reads"
        return ApiError(413, message, code="body_too_large")

    def _too_slow(self) -> ApiError:
        self.drops.count("body", f"requests answered 408 whose body did not come within {self.seconds:g} s a MiB: %d")
        message = f"the body did not arrive in time: this server waits {self.seconds:g} s for each MiB of it"
        return ApiError(408, message, code="body_timeout")

    async def _refuse(self, error: ApiError, receive: Receive, send: Send, more: bool) -> None:
        async def discard() -> None:
            while (await receive()).get("more_body", False):
                pass

        response = error.response()
        response.headers["Connection"] = "close"
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        if more:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(discard(), DISCARD_SECONDS)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

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

HELD_BODIES = 64
"""Bodies on their way may take as much memory as so many of the largest; then those are refused that are not small."""
SMALL_BYTES = 2**16


class _RefusedError(Exception):
    """A body is not wanted; `more` tells whether some of it is still to come."""

    def __init__(self, error: ApiError, more: bool = True) -> None:
        super().__init__(error.message)
        self.error = error
        self.more = more


class BodyLimit:
    """This ASGI middleware reads a request's body up to a limit before the application sees the request.

    What announces more is answered 413 at once; what sends more without saying so, as soon as it does; what does not
    arrive in time, 408; and 503 when so many arrive that they take too much memory. The rest of such a body is thrown
    away as it comes.

    Args:
        seconds: for each begun MiB.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float, drops: Drops) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.seconds = seconds
        self.drops = drops
        self._num_held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        body = bytearray()
        try:
            self._check(int(length) if length.isdigit() else 0, body, more=True)
            if not await self._read(receive, body):
                return None
        except _RefusedError as refused:
            self._num_held -= len(body)
            body.clear()
            return await self._refuse(refused.error, receive, send, refused.more)
        finally:
            self._num_held -= len(body)
        read: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return read.pop() if read else await receive()

        return await self.app(scope, replay, send)

    async def _read(self, receive: Receive, body: bytearray) -> bool:
        """Read a whole body, and tell whether the client stayed until then."""
        loop = asyncio.get_running_loop()
        start, more = loop.time(), True
        while more:
            deadline = start + self.seconds * (1 + len(body) // TIMED_BYTES)
            try:
                message = await asyncio.wait_for(receive(), deadline - loop.time())
            except asyncio.TimeoutError as late:
                text = f"requests answered 408 whose body did not come within {self.seconds:g} s a MiB: %d"
                self.drops.count("body", text)
                reason = f"the body did not arrive in time: this server waits {self.seconds:g} s for each MiB of it"
                raise _RefusedError(ApiError(408, reason, code="body_timeout")) from late
            if message["type"] == "http.disconnect":
                return False
            part = message.get("body", b"")
            body += part
            self._num_held += len(part)
            more = message.get("more_body", False)
            self._check(len(body), body, more)
        return True

    def _check(self, size: int, body: bytearray, more: bool) -> None:
        if size > self.max_bytes:
            message = f"the body is larger than {self.max_bytes} bytes, the most this server reads"
            raise _RefusedError(ApiError(413, message, code="body_too_large"), more)
        if more and len(body) > SMALL_BYTES and self._num_held > HELD_BODIES * self.max_bytes:
            self.drops.tell("requests answered 503 because too many large bodies were on their way: %d")
            message = "too many large bodies are on their way to this server; try again later"
            raise _RefusedError(ApiError(503, message, code="too_many_bodies"))

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

"""A client asks a server for streams, and times them. It needs gevent, which only the generator's processes have."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import msgspec
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError

from manyheads.bench import record as reasons
from manyheads.bench.record import Record

FRESH_SECONDS = 2.0
"""Connections that have been idle for longer are not used again: servers close them at times of their own choice."""
_decode = msgspec.json.Decoder().decode


class Client:
    """A client sends requests to one endpoint; one object serves all greenlets of a process.

    Args:
        url: up to and without `/v1`.
        timeout: seconds without a byte after which a request has failed.
        max_tokens: output tokens asked for, to count by where the server does not tell.
    """

    def __init__(
        self,
        url: str,
        path: str,
        *,
        timeout: float,
        max_tokens: int | None = None,
        api_key: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._url = url
        self._path = path.rstrip("/")
        self._timeout = timeout
        self._max_tokens = max_tokens
        self._clock = clock
        self._idle: list[tuple[HTTPClient, float]] = []
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.in_flight = 0

    def ask(self, body: bytes, record: Record) -> None:
        """Send a request and read its answer to the end; how it went is written into the record.

        NOTE: GreenletExit is not caught. Locust kills a user with it once, and waits until the user is dead.

        Args:
            record: a new one, unfinished until the end of the answer is known.
        """
        connection = self._connection()
        record.sent = self._clock()
        reusable = False
        response: Any = None
        self.in_flight += 1
        try:
            response = connection.post(self._path, body, headers=self._headers)
            self._read(response, record)
            reusable = record.ok
        except TimeoutError as error:
            late = reasons.NO_ANSWER if response is None or not record.chunks else reasons.STALLED
            self._fail(record, late, f"nothing for {self._timeout:g} s ({type(error).__name__})")
        except (ConnectionRefusedError, socket.gaierror) as error:
            self._fail(record, reasons.UNREACHABLE, str(error))
        except (HTTPConnectionClosed, ConnectionError) as error:
            self._fail(record, reasons.CUT, str(error))
        except HTTPParseError as error:
            began = response is not None
            self._fail(record, reasons.CUT if began else reasons.MALFORMED, f"HTTP: {error}")
        except OSError as error:
            self._fail(record, reasons.UNREACHABLE if response is None else reasons.CUT, str(error))
        finally:
            self.in_flight -= 1
            if record.seconds == 0.0:
                record.seconds = self._clock() - record.sent
            self._release(connection, response, reusable)

    def _read(self, response: Any, record: Record) -> None:
        status = response.status_code
        if status != 200:
            self._fail(record, f"HTTP {status}", _message(response.read()))
            return
        if "event-stream" not in str(response.get("content-type", "")):
            self._fail(record, reasons.MALFORMED, f"not an event stream: {response.read(200)[:200]!r}")
            return
        done = False
        while True:
            line = response.readline(b"\n")
            now = self._clock() - record.sent
            if not line:
                break
            if line in (b"\n", b"\r\n") or line.startswith((b":", b"event:", b"id:", b"retry:")):
                continue
            if not line.startswith(b"data:"):
                self._fail(record, reasons.MALFORMED, f"not a field of an event: {line[:100]!r}")
                return
            data = line[5:].strip()
            if data == b"[DONE]":
                done = True
                continue
            try:
                event = _decode(data)
                if not isinstance(event, dict):
                    raise ValueError("not an object")
                if event.get("error") is not None:
                    error = event["error"]
                    text = error.get("message", "") if isinstance(error, dict) else error
                    self._fail(record, reasons.ERROR_EVENT, str(text))
                    return
                self._event(event, record, now)
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                self._fail(record, reasons.MALFORMED, f"{error}: {data[:100]!r}")
                return
        record.seconds = record.chunks[-1] if record.chunks else now
        if not done and record.finish is None:
            self._fail(record, reasons.CUT, "the stream ended without an end")
        elif not record.chunks:
            self._fail(record, reasons.EMPTY)
        else:
            record.reason = None
            self._count(record)

    @staticmethod
    def _event(event: dict[str, Any], record: Record, now: float) -> None:
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            text = (
                choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
            )
            if text:
                record.chunks.append(now)
            record.finish = choice.get("finish_reason") or record.finish
        usage = event.get("usage")
        if usage:
            record.prompt_tokens = usage.get("prompt_tokens")
            record.tokens = usage.get("completion_tokens")
            record.steps = usage.get("decoding_steps")

    def _count(self, record: Record) -> None:
        """Count the output tokens, if the server's usage does not tell them."""
        if record.tokens is not None:
            return
        if record.finish == "length" and self._max_tokens is not None:
            record.tokens, record.counted_by = self._max_tokens, "max_tokens"
        else:
            record.tokens, record.counted_by = len(record.chunks), "chunks"

    def _fail(self, record: Record, reason: str, detail: str = "") -> None:
        record.seconds = self._clock() - record.sent
        record.reason, record.detail = reason, detail[:200]

    def _connection(self) -> HTTPClient:
        now = self._clock()
        while self._idle:
            connection, since = self._idle.pop()
            if now - since < FRESH_SECONDS:
                return connection
            connection.close()
        connect = min(self._timeout, 10.0)
        return HTTPClient.from_url(self._url, connection_timeout=connect, network_timeout=self._timeout)

    def _release(self, connection: HTTPClient, response: Any, reusable: bool) -> None:
        if response is not None:
            response.release()
        if reusable:
            self._idle.append((connection, self._clock()))
        else:
            connection.close()


def _message(body: bytes) -> str:
    """Return an error's message, which has OpenAI's shape, FastAPI's, or none and is the text itself."""
    try:
        data = _decode(body)
    except ValueError:
        return body.decode(errors="replace")
    if isinstance(data, dict):
        error = data.get("error", data.get("detail", data))
        return str(error.get("message", error) if isinstance(error, dict) else error)
    return str(data)

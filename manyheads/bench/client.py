"""A client asks a server for streams, and times them. It needs gevent, which only the generator's processes have."""

from __future__ import annotations

import socket
import time
from typing import Any

import msgspec
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError

from manyheads.bench import record as reasons
from manyheads.bench.plan import Run
from manyheads.bench.record import Record

FRESH_SECONDS = 2.0
"""Connections that have been idle for longer are not used again: servers close them at times of their own choice."""
_decode = msgspec.json.Decoder().decode


class Client:
    """A client sends requests to a run's endpoint; one object serves all greenlets of a process."""

    def __init__(self, run: Run, api_key: str | None) -> None:
        self._run = run
        self._idle: list[tuple[HTTPClient, float]] = []
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.in_flight = 0

    def ask(self, body: bytes, record: Record) -> None:
        """Send a request and read its answer to the end; how it went is written into the record, which is a new one.

        NOTE: GreenletExit is not caught. Locust kills a user with it once, and waits until the user is dead.
        """
        connection = self._connection()
        record.sent = time.perf_counter()
        response: Any = None
        self.in_flight += 1
        try:
            response = connection.post(self._run.path, body, headers=self._headers)
            self._read(response, record)
        except TimeoutError as error:
            late = reasons.NO_ANSWER if response is None or not record.chunks else reasons.STALLED
            self._fail(record, late, f"nothing for {self._run.timeout:g} s ({type(error).__name__})")
        except (ConnectionRefusedError, socket.gaierror) as error:
            self._fail(record, reasons.UNREACHABLE, str(error))
        except (HTTPConnectionClosed, ConnectionError) as error:
            self._fail(record, reasons.CUT, str(error))
        except HTTPParseError as error:
            self._fail(record, reasons.MALFORMED if response is None else reasons.CUT, f"HTTP: {error}")
        except OSError as error:
            self._fail(record, reasons.UNREACHABLE if response is None else reasons.CUT, str(error))
        finally:
            self.in_flight -= 1
            if record.seconds == 0.0:
                record.seconds = time.perf_counter() - record.sent
            if response is not None:
                response.release()
            if record.ok:
                self._idle.append((connection, time.perf_counter()))
            else:
                connection.close()

    def _read(self, response: Any, record: Record) -> None:
        if response.status_code != 200:
            self._fail(record, f"HTTP {response.status_code}", _message(response.read()))
            return
        if "event-stream" not in str(response.get("content-type", "")):
            self._fail(record, reasons.MALFORMED, f"not an event stream: {response.read(200)[:200]!r}")
            return
        done = False
        while True:
            line = response.readline(b"\n")
            now = time.perf_counter() - record.sent
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
            if record.tokens is None and record.finish == "length" and self._run.max_tokens is not None:
                record.tokens, record.counted_by = self._run.max_tokens, "max_tokens"
            elif record.tokens is None:
                record.tokens, record.counted_by = len(record.chunks), "chunks"

    @staticmethod
    def _event(event: dict[str, Any], record: Record, now: float) -> None:
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            texts = (choice.get("text"), *map(delta.get, ("content", "reasoning_content", "reasoning")))
            if any(texts):
                record.chunks.append(now)
            record.finish = choice.get("finish_reason") or record.finish
        if usage := event.get("usage"):
            record.prompt_tokens = usage.get("prompt_tokens")
            record.tokens = usage.get("completion_tokens")
            record.steps = usage.get("decoding_steps")

    def _fail(self, record: Record, reason: str, detail: str = "") -> None:
        record.seconds = time.perf_counter() - record.sent
        record.reason, record.detail = reason, detail[:200]

    def _connection(self) -> HTTPClient:
        now = time.perf_counter()
        while self._idle:
            connection, since = self._idle.pop()
            if now - since < FRESH_SECONDS:
                return connection
            connection.close()
        timeout = self._run.timeout
        return HTTPClient.from_url(self._run.url, connection_timeout=min(timeout, 10.0), network_timeout=timeout)


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

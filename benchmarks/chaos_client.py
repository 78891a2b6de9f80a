"""What the faults of chaos.py are shown to: requests of every kind, how they are asked, and whether two answers agree.

The client is asyncio alone, since it shares the processors with the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from manyheads.bench.prompts import OPENINGS, SUBJECTS

ENDS_WITHIN = 300.0
"""A request that has not ended after so many seconds has been lost."""
CLOSE = 1e-3
"""Log-probabilities may differ by so much: sums in another order have other last digits."""
KINDS: tuple[dict[str, Any], ...] = (
    {"chat": True, "temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.95, "ignore_eos": True},
    {"chat": True, "temperature": 0.8, "n": 2, "logprobs": True, "top_logprobs": 3},
    {"temperature": 0.0, "logprobs": 2, "ignore_eos": True},
    {"temperature": 0.7, "repetition_penalty": 1.1, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    {"chat": True, "temperature": 0.0, "stop": [". The", "?"]},
    {"temperature": 1.0, "min_p": 0.02, "n": 2, "stop": [" and the"], "ignore_eos": True},
    {"chat": True, "temperature": 0.0, "repetition_penalty": 1.2, "logprobs": True, "speculative": False},
)
"""The mixture of requests goes through these in turn; `chat` is no field of a request but its endpoint."""


@dataclass(frozen=True)
class Ask:
    """One request: where it goes, and what it says."""

    path: str
    body: dict[str, Any]

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))


@dataclass
class Choice:
    """One continuation, as far as two answers must agree about it."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)
    """Each output token's bytes or text, where the request asked for log-probabilities."""
    logprobs: list[list[float]] = field(default_factory=list)
    """For each output token its own, then the most likely ones'."""
    finish_reason: str | None = None
    stop_reason: Any = None

    def add(self, choice: dict[str, Any]) -> None:
        """Takes a choice of a whole answer, or of a stream's next event."""
        message = choice.get("delta") or choice.get("message") or choice
        self.text += message.get("content") or message.get("text") or ""
        logprobs = choice.get("logprobs") or {}
        for entry in logprobs.get("content") or ():
            self.tokens.append(bytes(entry["bytes"]).hex())
            self.logprobs.append([entry["logprob"], *(top["logprob"] for top in entry["top_logprobs"])])
        for token, own, top in zip(*(logprobs.get(f"{name}s", ()) for name in _COLUMNS), strict=True):
            self.tokens.append(token)
            self.logprobs.append([own, *sorted(top.values(), reverse=True)])
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self.stop_reason = choice.get("stop_reason") or self.stop_reason


_COLUMNS = ("token", "token_logprob", "top_logprob")


@dataclass
class Answer:
    """What came of a request."""

    status: int = 0
    """HTTP's; 0 if there was no answer."""
    choices: dict[int, Choice] = field(default_factory=dict)
    num_tokens: int | None = None
    error: str | None = None
    """Why it is no whole answer, if it is none."""
    code: str | None = None
    """What a program is told of the error."""
    num_bytes: int = 0
    headers: dict[str, str] = field(default_factory=dict)


def mixture(count: int, streams: int, seed: int, max_tokens: int = 120, most_words: int = 60) -> list[Ask]:
    """So many different requests, of which the first ones stream; each has a seed and a prompt of its own.

    Args:
        most_words: prompts have up to so many words.
    """
    chance = random.Random(seed)
    texts = [o.format(s) for o in OPENINGS for s in SUBJECTS]
    chance.shuffle(texts)
    asks = []
    for number, kind, text in zip(range(count), itertools.cycle(KINDS), itertools.cycle(texts), strict=False):
        words = chance.randrange(most_words)
        while len(text.split()) < words:
            text += " " + chance.choice(texts)
        given = {key: value for key, value in kind.items() if key != "chat"}
        body = {"seed": seed * 1000 + number, "max_tokens": chance.randrange(max_tokens // 2, max_tokens + 1), **given}
        if kind.get("chat"):
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = text
        if number < streams:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        asks.append(Ask("/v1/chat/completions" if kind.get("chat") else "/v1/completions", body))
    return asks


async def ask(url: str, request: Ask, came: Callable[[int], object] | None = None) -> Answer:
    """Asks, and reads the answer to its end, however it ends.

    Args:
        came: is told the number of bytes whenever some arrive.
    """
    try:
        raw = await asyncio.wait_for(exchange(url, "POST", request.path, request.body, came), ENDS_WITHIN)
    except TimeoutError:
        return Answer(error=f"no end in {ENDS_WITHIN:g} s")
    except OSError as error:
        return Answer(error=f"{type(error).__name__}: {error}")
    return read(raw, request.streams)


async def get(url: str, path: str) -> tuple[int, str]:
    """Status and body of what the server tells of itself; status 0 if it does not answer."""
    try:
        response, body = parse(await asyncio.wait_for(exchange(url, "GET", path), 10))
    except (OSError, TimeoutError, http.client.HTTPException):
        return 0, ""
    return response.status, body.decode()


async def exchange(
    url: str, method: str, path: str, body: Any = None, came: Callable[[int], object] | None = None
) -> bytes:
    """Sends a request on a connection of its own and returns all that comes back, until the server closes it."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=2**20)
    try:
        data = b"" if body is None else json.dumps(body).encode()
        head = f"Host: here\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\nConnection: close\r\n"
        writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
        received = bytearray()
        while chunk := await reader.read(2**16):
            received += chunk
            if came is not None:
                came(len(chunk))
        return bytes(received)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def parse(raw: bytes) -> tuple[http.client.HTTPResponse, bytes]:
    """Status line and headers, and the body without its chunks' lengths. Raises HTTPException if it was cut."""

    class Received:
        def makefile(self, mode: str) -> io.BytesIO:
            return io.BytesIO(raw)

    response = http.client.HTTPResponse(Received())  # type: ignore[arg-type]
    response.begin()
    return response, response.read()


def read(raw: bytes, streams: bool) -> Answer:
    """Reads an answer; anything that a client could take for less than a whole one is an error."""
    answer = Answer(num_bytes=len(raw))
    try:
        response, body = parse(raw)
        answer.status, answer.headers = response.status, {k.lower(): v for k, v in response.getheaders()}
        events = body.split(b"\n\n") if streams and response.status == 200 else [b"data: " + body]
        done = not streams
        for line in filter(None, events):
            if line == b"data: [DONE]":
                done = True
            else:
                _take(answer, json.loads(line.removeprefix(b"data: ")))
    except (http.client.HTTPException, ValueError, LookupError) as error:
        answer.error = f"broken off: {type(error).__name__}: {error}"
        return answer
    if answer.error is None and not (done and answer.choices and all(c.finish_reason for c in answer.choices.values())):
        answer.error = "ended without an end"
    return answer


def _take(answer: Answer, data: dict[str, Any]) -> None:
    if error := data.get("error"):
        answer.error, answer.code = f"{answer.status} {error['message']}", error["code"]
    for choice in data.get("choices") or ():
        answer.choices.setdefault(choice["index"], Choice()).add(choice)
    if data.get("usage"):
        answer.num_tokens = data["usage"]["completion_tokens"]


def difference(wanted: Answer, got: Answer) -> str | None:
    """In what an answer differs from an undisturbed one; None if it is the same."""
    if got.error is not None:
        return got.error
    if got.num_tokens != wanted.num_tokens:
        return f"{got.num_tokens} tokens instead of {wanted.num_tokens}"
    if got.choices.keys() != wanted.choices.keys():
        return f"choices {sorted(got.choices)} instead of {sorted(wanted.choices)}"
    for number, want in wanted.choices.items():
        choice = got.choices[number]
        for name in ("text", "tokens", "finish_reason", "stop_reason"):
            one, other = getattr(choice, name), getattr(want, name)
            if one != other:
                return f"choice {number}: {name} {_around(one, other)} instead of {_around(other, one)}"
        rows = zip(choice.logprobs, want.logprobs, strict=True)  # as many as tokens
        if any(len(a) != len(b) or any(abs(x - y) > CLOSE for x, y in zip(a, b, strict=True)) for a, b in rows):
            return f"choice {number}: other log-probabilities"
    return None


def _around(one: Any, other: Any) -> str:
    """A text or its tokens, from shortly before the place where another one differs."""
    pairs = zip(one or "", other or "", strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return f"(from {same} on) {one[max(same - 5, 0) : same + 30]!r}" if one else repr(one)


class Load:
    """Requests with their undisturbed answers, to be asked again while something goes wrong."""

    def __init__(self, url: str, asks: Sequence[Ask], wanted: Sequence[Answer]) -> None:
        self.url, self.asks, self.wanted = url, list(asks), list(wanted)
        self.num_bytes = 0
        """What the streams of the latest `open` have brought so far."""
        self._in_all = sum(answer.num_bytes for a, answer in zip(asks, wanted, strict=True) if a.streams)

    @classmethod
    async def prepare(cls, url: str, asks: Sequence[Ask], left_out: str = "") -> Load:
        """Asks all at once, with nothing going wrong. Raises RuntimeError if an answer is not whole.

        Args:
            left_out: requests whose answer is an error with this code are not asked again.
        """
        answers = await asyncio.gather(*(ask(url, a) for a in asks))
        pairs = [
            (a, answer) for a, answer in zip(asks, answers, strict=True) if not left_out or answer.code != left_out
        ]
        for request, answer in pairs:
            if answer.error is not None:
                raise RuntimeError(f"undisturbed, {request} gave: {answer.error}")
        return cls(url, *zip(*pairs, strict=True))

    def open(self) -> asyncio.Future[list[Answer]]:
        """Asks all at once, and returns at once."""
        self.num_bytes = 0

        def came(count: int) -> None:
            self.num_bytes += count

        return asyncio.gather(*(ask(self.url, a, came if a.streams else None) for a in self.asks))

    async def until(self, share: float, answers: asyncio.Future[list[Answer]]) -> None:
        """Waits until the streams have brought this share of what they brought undisturbed, or all have ended."""
        while self.num_bytes < share * self._in_all and not answers.done():
            await asyncio.sleep(0.01)

    def differences(self, answers: Sequence[Answer]) -> list[str]:
        """Says of each answer that is not the undisturbed one how it differs."""
        pairs = zip(self.asks, self.wanted, answers, strict=True)
        found = [(request, difference(want, got)) for request, want, got in pairs]
        return [f"{request.path} {request.body}: {what}" for request, what in found if what is not None]

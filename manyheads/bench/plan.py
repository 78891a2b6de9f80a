"""What a run is to do: handed to the generator's processes as JSON."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Kind = Literal["users", "rate", "trace"]
GRACE = 5.0
"""Seconds that all processes of an interrupted run have to stop."""


class BenchError(Exception):
    """A load test that cannot be done as asked, or that went wrong; the message says what to do."""


class BenchInputError(BenchError, ValueError):
    """Options or files that make no sense."""


class Stage(msgspec.Struct, frozen=True):
    """A load that is held for a while."""

    load: float
    """Users; or requests per second; or the speed of a trace, 1 being its own."""
    seconds: float
    """How long is measured."""
    settle: float = 0.0
    """Seconds before that, which do not count."""


class Question(msgspec.Struct, frozen=True):
    """One prepared request."""

    body: dict[str, Any]
    at: float | None = None
    """Seconds from the start of a trace."""


class Run(msgspec.Struct, frozen=True):
    """One run of the generator."""

    url: str
    """Up to and without `/v1`."""
    path: str
    """Of the endpoint."""
    kind: Kind
    stages: list[Stage]
    questions: str
    """File with a Question on each line."""
    records: str
    """File for a Record on each line."""
    max_tokens: int | None = None
    timeout: float = 120.0
    """Seconds without a byte after which a request has failed."""
    drain: float = 60.0
    """Seconds that running requests have after the last stage."""
    workers: int = 0
    """Worker processes; 0 makes the load in the generator's own process."""
    bind: str | None = None
    """HOST:PORT where workers of other machines join; None starts them here."""
    seed: int = 0

    @property
    def ready_within(self) -> float:
        """Seconds that its workers have to report; those of other machines are started by hand."""
        return 600.0 if self.bind else 30.0

    @property
    def length(self) -> float:
        """Seconds without the drain."""
        return sum(stage.settle + stage.seconds for stage in self.stages)


class Event(msgspec.Struct, omit_defaults=True):
    """A line of the generator's output; times are seconds of the monotonic clock."""

    kind: Literal["stage", "progress", "end", "error"]
    at: float = 0.0
    stage: int = 0
    """Which one begins; at the end, how many were held as long as they should."""
    users: int = 0
    done: int = 0
    failed: int = 0
    in_flight: int = 0
    tokens: int = 0
    text: str = ""


class Part(msgspec.Struct):
    """What a worker process is to do."""

    run: Run
    questions: list[Question]
    number: int
    """Of this worker, from 0."""
    clock: float
    """The master's monotonic clock when it sent this."""


class Use(msgspec.Struct):
    """What a process of the generator was busy with since its last such line."""

    worker: int
    at: float
    seconds: float
    cpu: float
    """Seconds of processor time."""
    lags: list[float]
    """Seconds by which each of its timers was late."""


def read_questions(path: str) -> list[Question]:
    """Prepared requests."""
    with open(path, "rb") as file:
        return [msgspec.json.decode(line, type=Question) for line in file]


def split_address(text: str) -> tuple[str, int]:
    """HOST:PORT in its parts.

    Raises:
        BenchInputError: it is none.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise BenchInputError(f"{text!r} is no address; it looks like 10.0.0.1:5557")
    return host, int(port)

"""A plan says what a run is to do, and is handed to the generator's processes as JSON; events come back."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Kind = Literal["users", "rate", "trace", "mix"]
GRACE = 5.0
"""All processes of an interrupted run have so many seconds to stop."""


class BenchError(Exception):
    """A load test cannot be done as asked, or went wrong; the message says what to do."""


class BenchInputError(BenchError, ValueError):
    """Options or files of a load test make no sense."""


class Stage(msgspec.Struct, frozen=True):
    """A stage is a load that is held for a while."""

    load: float
    """The number of users, or requests per second, or the speed of a trace, of which 1 is its own."""
    seconds: float
    """The seconds that are measured."""
    settle: float = 0.0
    """The seconds before that, which do not count."""


class Question(msgspec.Struct, frozen=True):
    """A question is one prepared request; users ask questions in turn."""

    body: dict[str, Any]
    at: float | None = None
    """The seconds from the start of a trace, or of a load of a mix, at which it is sent."""


class Run(msgspec.Struct, frozen=True):
    """A run is what the generator does from its start to its end."""

    url: str
    """The server's URL, up to and without `/v1`."""
    path: str
    """The endpoint's path, with `/v1`."""
    kind: Kind
    stages: list[Stage]
    questions: str
    """The file with a Question on each line."""
    records: str
    """The file for a Record on each line."""
    max_tokens: int | None = None
    timeout: float = 120.0
    """A request has failed after so many seconds without a byte."""
    drain: float = 60.0
    """Running requests have so many seconds after the last stage."""
    workers: int = 0
    """The number of worker processes; 0 makes the load in the generator's own process."""
    bind: str | None = None
    """The HOST:PORT where workers of other machines join; None starts them here."""
    seed: int = 0

    @property
    def ready_within(self) -> float:
        """The seconds that its workers have to report; those of other machines are started by hand."""
        return 600.0 if self.bind else 30.0

    @property
    def timed(self) -> bool:
        """Whether each question is sent once, at its own time."""
        return self.kind in ("trace", "mix")

    @property
    def length(self) -> float:
        """The seconds of all stages, without the drain."""
        return sum(stage.settle + stage.seconds for stage in self.stages)


class Event(msgspec.Struct, omit_defaults=True):
    """An event is a line of the generator's output; times are seconds of the monotonic clock."""

    kind: Literal["stage", "progress", "end", "error"]
    at: float = 0.0
    stage: int = 0
    """The stage that begins; at the end, how many were held as long as they should."""
    users: int = 0
    done: int = 0
    failed: int = 0
    in_flight: int = 0
    tokens: int = 0
    text: str = ""


class Part(msgspec.Struct):
    """A part of a run is what one worker process is to do."""

    run: Run
    questions: list[Question]
    number: int
    """The number of this worker, from 0."""
    clock: float
    """The time of the master's monotonic clock when it sent this."""


class Use(msgspec.Struct):
    """A use says how busy a process of the generator was since its last one."""

    worker: int
    at: float
    seconds: float
    cpu: float
    """The seconds of processor time."""
    lags: list[float]
    """The seconds by which each of its timers was late."""


def read_questions(path: str) -> list[Question]:
    """Read the questions of a file."""
    with open(path, "rb") as file:
        return [msgspec.json.decode(line, type=Question) for line in file]


def part_of(questions: list[Question], timed: bool, share: tuple[int, int]) -> list[Question]:
    """Return the questions of one process, given its number and how many there are.

    It has none if there are fewer questions than processes and each is sent once; else it has them all, then.
    """
    part, parts = share
    if timed:
        return sorted(questions, key=lambda question: question.at or 0.0)[part::parts]
    return questions[part::parts] or questions


def split_address(text: str) -> tuple[str, int]:
    """Take HOST:PORT apart.

    Raises:
        BenchInputError: the text is no address.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise BenchInputError(f"{text!r} is no address; it looks like 10.0.0.1:5557")
    return host, int(port)


def parse_loads(text: str, kind: str, most: float) -> tuple[float, ...]:
    """Return the numbers of a text, which has commas between them, in rising order.

    Raises:
        BenchInputError: the text has something else.
    """
    try:
        loads = sorted({float(part) for part in text.split(",") if part.strip()})
    except ValueError:
        raise BenchInputError(f"{text!r} are no numbers; loads look like 1,2,4") from None
    wrong = [load for load in loads if not 0 < load <= most or (kind == "users" and load != int(load))]
    if wrong or (text.strip() and not loads):
        raise BenchInputError(f"loads must be {'whole numbers ' if kind == 'users' else ''}above 0, not {text!r}")
    return tuple(loads)

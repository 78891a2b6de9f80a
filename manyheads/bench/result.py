"""A result is what a load test found; `report.json` holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from manyheads.bench.plan import BenchInputError, Kind

FORMAT = 1
FILE = "report.json"
UNITS = {"users": "users", "rate": "requests/s", "trace": "times the trace's speed", "mix": "requests/s"}
"""These are the units of loads, by the kind of test."""


class Summary(msgspec.Struct):
    """A summary describes a distribution of seconds."""

    n: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float
    quantiles: list[float]
    """The quantiles at 0, 2, 4, … 100 per cent."""


class Generator(msgspec.Struct):
    """These figures say how busy the load generator was while a load was held."""

    cpu: float | None = None
    """The share of one core that its busiest process took."""
    lag: float | None = None
    """The 95th percentile of the seconds by which its timers were late."""
    late: float | None = None
    """The 99th percentile of the seconds by which open-loop requests were sent late."""
    bound: list[str] = []
    """The reasons why this load is the generator's limit and not the server's; empty if it is not."""


class Level(msgspec.Struct):
    """A level has the figures of one load, or (`Result.whole`) of all of them."""

    load: float
    seconds: float
    sent: int = 0
    completed: int = 0
    failed: int = 0
    unfinished: int = 0
    failures: dict[str, int] = {}
    requests_per_s: float = 0.0
    prompt_tokens: float | None = None
    """The mean of a request's prompt tokens."""
    output_tokens: float | None = None
    """The mean of a request's output tokens."""
    output_tokens_per_s: float = 0.0
    total_tokens_per_s: float = 0.0
    """Both the output tokens that came and the prompt tokens of requests that ended."""
    in_flight: float = 0.0
    """The mean number of requests under way."""
    ttft: Summary | None = None
    tpot: Summary | None = None
    gap: Summary | None = None
    e2e: Summary | None = None
    tokens_per_chunk: float | None = None
    tokens_per_step: float | None = None
    acceptance: list[float] = []
    """The share of trees that were accepted to depth 1, 2, …"""
    tokens_by_engine: dict[str, float] = {}
    """What each of several engines behind the server generated."""
    good: int = 0
    """The number of requests within both objectives."""
    goodput: float = 0.0
    """The requests a second within both objectives."""
    overloaded: bool = False
    interrupted: bool = False
    """Whether it was not held as long as it should have been."""
    generator: Generator = msgspec.field(default_factory=Generator)

    @property
    def attained(self) -> float:
        """The share of the requests sent that were within both objectives; who was refused or not answered was not."""
        return self.good / max(1, self.sent)


class Memory(msgspec.Struct):
    """This is the memory in bytes at a time, which is in seconds from the start of the first load."""

    at: float
    host: int | None = None
    gpu: int | None = None
    parts: dict[str, int] = {}
    """The bytes of weights, heads, K/V cache, …, if the server tells."""


class Point(msgspec.Struct):
    """A point has the figures of a moment of the run."""

    at: float
    in_flight: float
    requests_per_s: float
    tokens_per_s: float
    failures_per_s: float
    p50: float | None = None
    """The median latency of the requests that ended then, in seconds."""


class Result(msgspec.Struct):
    """A result has everything that a report shows."""

    name: str
    created: str
    kind: Kind
    settings: dict[str, Any]
    target: dict[str, Any]
    machine: dict[str, Any]
    objectives: dict[str, float]
    """The most seconds that `ttft` and `tpot` should take."""
    levels: list[Level]
    whole: Level
    attain: float | None = None
    """The share of the requests sent that must be within both for a rate of a mix to hold; None for other tests."""
    memory: list[Memory] = []
    timeline: list[Point] = []
    limit: dict[str, float] = {}
    """The requests and chunks a second that the generator alone could do."""
    counted_by: dict[str, int] = {}
    details: dict[str, list[str]] = {}
    """Examples of what the server said, by reason of failure."""
    notes: list[str] = []
    interrupted: str | None = None
    """The place where Ctrl-C, or a load generator that stood still, ended the test; None if it ran to its end."""
    format: Literal[1] = FORMAT  # type: ignore[assignment]

    @property
    def unit(self) -> str:
        """The unit of a level's load."""
        return UNITS[self.kind]

    @property
    def highest(self) -> Level | None:
        """The load with the highest rate that holds; None if none does, or it is not the test of a mix."""
        return max((v for v in self.levels if holds(v, self.attain)), key=lambda v: v.load, default=None)


def holds(level: Level, attain: float | None) -> bool:
    """Tell whether a load was held to its end and enough of its requests were within both objectives."""
    return attain is not None and level.attained >= attain and not level.interrupted


def save(result: Result, path: Path) -> None:
    """Write `report.json`."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def load(path: Path) -> Result:
    """Read a report, given its file or its folder.

    Raises:
        BenchInputError: there is no report.
    """
    file = path / FILE if path.is_dir() else path.with_name(FILE) if path.suffix == ".html" else path
    try:
        return msgspec.json.decode(file.read_bytes(), type=Result)
    except OSError as error:
        raise BenchInputError(
            f"cannot read {file}: {error.strerror}; give folders that manyheads bench has written"
        ) from error
    except msgspec.DecodeError as error:
        raise BenchInputError(f"{file} is no report of manyheads bench: {error}") from error

"""What a load test found: the contents of `report.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from manyheads.bench.plan import BenchInputError, Kind

FORMAT = 1
FILE = "report.json"
UNITS = {"users": "users", "rate": "requests/s", "trace": "times the trace's speed"}
"""What a load counts."""


class Summary(msgspec.Struct):
    """A distribution of seconds."""

    n: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float
    quantiles: list[float]
    """At 0, 2, 4, … 100 per cent."""


class Generator(msgspec.Struct):
    """How busy the load generator was while a load was held."""

    cpu: float | None = None
    """Share of one core that its busiest process took."""
    lag: float | None = None
    """Seconds by which its timers were late, 95th percentile."""
    late: float | None = None
    """Seconds by which open-loop requests were sent late, 99th percentile."""
    bound: list[str] = []
    """Why this load is the generator's limit and not the server's; empty if it is not."""


class Level(msgspec.Struct):
    """One load, or (`Result.whole`) all of them."""

    load: float
    seconds: float
    sent: int = 0
    completed: int = 0
    failed: int = 0
    unfinished: int = 0
    failures: dict[str, int] = {}
    requests_per_s: float = 0.0
    prompt_tokens: float | None = None
    """Mean of a request."""
    output_tokens: float | None = None
    """Mean of a request."""
    output_tokens_per_s: float = 0.0
    total_tokens_per_s: float = 0.0
    """Output tokens that came, and prompt tokens of requests that ended."""
    in_flight: float = 0.0
    """Mean number of requests under way."""
    ttft: Summary | None = None
    tpot: Summary | None = None
    gap: Summary | None = None
    e2e: Summary | None = None
    tokens_per_chunk: float | None = None
    tokens_per_step: float | None = None
    acceptance: list[float] = []
    """Share of trees that were accepted to depth 1, 2, …"""
    good: int = 0
    """Requests within both objectives."""
    goodput: float = 0.0
    """Requests a second within both objectives."""
    overloaded: bool = False
    interrupted: bool = False
    """It was not held as long as it should have been."""
    generator: Generator = msgspec.field(default_factory=Generator)


class Memory(msgspec.Struct):
    """Bytes at a time, in seconds from the start of the first load."""

    at: float
    host: int | None = None
    gpu: int | None = None
    parts: dict[str, int] = {}
    """Weights, heads, K/V cache, …: where the server tells."""


class Point(msgspec.Struct):
    """A moment of the run."""

    at: float
    in_flight: float
    requests_per_s: float
    tokens_per_s: float
    failures_per_s: float
    p50: float | None = None
    """Seconds: median latency of the requests that ended then."""


class Result(msgspec.Struct):
    """A whole load test."""

    name: str
    created: str
    kind: Kind
    settings: dict[str, Any]
    target: dict[str, Any]
    machine: dict[str, Any]
    objectives: dict[str, float]
    """`ttft` and `tpot`, seconds."""
    levels: list[Level]
    whole: Level
    memory: list[Memory] = []
    timeline: list[Point] = []
    limit: dict[str, float] = {}
    """What the generator alone could do: requests and chunks a second."""
    counted_by: dict[str, int] = {}
    details: dict[str, list[str]] = {}
    """Examples of what the server said, by reason of failure."""
    notes: list[str] = []
    interrupted: str | None = None
    """Where the test was ended by Ctrl-C, or because its load generator stood still; None if it ran to its end."""
    format: Literal[1] = FORMAT  # type: ignore[assignment]

    @property
    def unit(self) -> str:
        """What a level's load counts."""
        return UNITS[self.kind]


def save(result: Result, path: Path) -> None:
    """Write `report.json`."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def load(path: Path) -> Result:
    """Read a report, given its file or its folder.

    Raises:
        BenchInputError: there is none.
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

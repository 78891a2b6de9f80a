"""Records leave the generator this way: a worker sends them to the master, and the master writes them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import gevent
import msgspec

from manyheads.bench.plan import Use
from manyheads.bench.record import Record

EVERY = 0.5
"""A worker sends a batch each time that so many seconds have gone by."""
TIMER = 0.01
"""The timer whose lateness is watched is set to so many seconds."""


class Batch(msgspec.Struct):
    """A batch is what a process has to tell since its last one."""

    records: list[Record]
    use: Use
    in_flight: int = 0


class Writer:
    """A writer counts what batches hold and writes it to files: records, and how busy the processes were."""

    def __init__(self, records: str) -> None:
        self._records = open(records, "wb")  # noqa: SIM115 (closed by `close`)
        self._uses = open(uses_path(records), "wb")  # noqa: SIM115
        self.done = self.failed = self.tokens = 0
        self._in_flight: dict[int, int] = {}

    @property
    def in_flight(self) -> int:
        """The number of requests under way in all processes, by their last batches."""
        return sum(self._in_flight.values())

    def add(self, batch: Batch) -> None:
        """Write and count a batch."""
        for record in batch.records:
            self._records.write(msgspec.json.encode(record) + b"\n")
            self.done += record.ok
            self.failed += record.failed
            self.tokens += record.tokens or 0
        self._uses.write(msgspec.json.encode(batch.use) + b"\n")
        self._records.flush()  # this process may have to be killed
        self._uses.flush()
        self._in_flight[batch.use.worker] = batch.in_flight

    def close(self) -> None:
        """Close the files."""
        self._records.close()
        self._uses.close()


class Observer:
    """An observer collects one process's records, and watches how busy the process is.

    Args:
        behind: seconds by which this machine's clock is behind that of the master.
    """

    def __init__(self, traffic: Any, behind: float = 0.0) -> None:
        self._traffic = traffic
        self._behind = behind
        self._records: list[Record] = []
        self._lags: list[float] = []
        self._since, self._cpu = time.perf_counter(), time.process_time()
        traffic.listeners.append(self._records.append)
        gevent.spawn(self._watch)

    def take(self) -> Batch:
        """Return what has come since the last call."""
        now, cpu = time.perf_counter(), time.process_time()
        records, lags = self._records[:], self._lags
        self._records.clear()
        for record in records:
            record.sent += self._behind
            record.due = None if record.due is None else record.due + self._behind
        use = Use(self._traffic.part, now + self._behind, now - self._since, cpu - self._cpu, lags)
        self._since, self._cpu, self._lags = now, cpu, []
        return Batch(records, use, self._traffic.client.in_flight)

    def _watch(self) -> None:
        while True:
            due = time.perf_counter() + TIMER
            gevent.sleep(TIMER)
            self._lags.append(time.perf_counter() - due)


def uses_path(records: str) -> str:
    """Return the path of the file of uses, which stands beside the records."""
    return f"{records}.use"


def read_records(path: str) -> list[Record]:
    """Read the records of a run; there are none if it wrote none."""
    return _read(path, Record) if os.path.exists(path) else []


def read_uses(records: str) -> list[Use]:
    """Read how busy the processes were, which stands in the file beside the records."""
    path = uses_path(records)
    return _read(path, Use) if os.path.exists(path) else []


def _read(path: str, kind: Any) -> list[Any]:
    whole, _, _ = Path(path).read_bytes().rpartition(b"\n")  # what follows was being written when the writer was killed
    return [msgspec.json.decode(line, type=kind) for line in whole.splitlines()]

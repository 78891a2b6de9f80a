"""Records on their way out of the generator: a worker sends them to the master, the master writes them."""

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
"""Seconds between messages of a worker."""
TIMER = 0.01
"""Seconds of the timer whose lateness is watched."""


class Batch(msgspec.Struct):
    """What a process has to tell."""

    records: list[Record]
    use: Use
    in_flight: int = 0


class Writer:
    """Writes batches to files (records, and beside them what the processes were busy with) and counts."""

    def __init__(self, records: str) -> None:
        self._records = open(records, "wb")  # noqa: SIM115 (closed by `close`)
        self._uses = open(uses_path(records), "wb")  # noqa: SIM115
        self.done = self.failed = self.tokens = 0
        self._in_flight: dict[int, int] = {}

    @property
    def in_flight(self) -> int:
        return sum(self._in_flight.values())

    def add(self, batch: Batch) -> None:
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
        self._records.close()
        self._uses.close()


class Observer:
    """Collects one process's records and watches how busy the process is.

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
        """What has come since the last call."""
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
    """The file beside the records."""
    return f"{records}.use"


def read_records(path: str) -> list[Record]:
    """Records of a run; none if it wrote none."""
    return _read(path, Record) if os.path.exists(path) else []


def read_uses(records: str) -> list[Use]:
    """What the processes were busy with."""
    path = uses_path(records)
    return _read(path, Use) if os.path.exists(path) else []


def _read(path: str, kind: Any) -> list[Any]:
    whole, _, _ = Path(path).read_bytes().rpartition(b"\n")  # what follows was being written when the writer was killed
    return [msgspec.json.decode(line, type=kind) for line in whole.splitlines()]

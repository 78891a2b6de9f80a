"""The process that makes the load: `python -m manyheads.bench.generator RUN.json`; prints an Event on each line.

With workers, this process is Locust's master and makes none of the load itself.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import gevent
import locust
import msgspec
from locust.env import Environment
from locust.log import setup_logging

from manyheads.bench.plan import Event, Run
from manyheads.bench.recorder import EVERY, MESSAGE, Batch, Observer, Writer
from manyheads.bench.users import ArrivalUser, AskingUser, Traffic

WORKERS_READY = 30.0
"""Seconds that workers have to report."""


class Users(AskingUser):
    """Closed loop."""


class Arrivals(ArrivalUser):
    """Open loop."""


class Stages(locust.LoadTestShape):
    """Holds one stage after the other, and tells when each begins."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run
        self._stage = -1

    def tick(self) -> tuple[int, float] | None:
        """(users, users a second), or None at the end."""
        now = self.get_run_time()
        ends = itertools.accumulate(stage.settle + stage.seconds for stage in self._run.stages)
        index = next((i for i, end in enumerate(ends) if now < end), None)
        if index is None:
            if self._stage >= 0:
                emit(Event("end", at=time.perf_counter()))
                self._stage = -1
            return None
        if index != self._stage:
            self._stage = index
            emit(Event("stage", at=time.perf_counter(), stage=index))
        users = int(self._run.stages[index].load) if self._run.kind == "users" else max(1, self._run.workers)
        return users, 1000.0


def emit(event: Event) -> None:
    """Tell the process that started us."""
    sys.stdout.write(msgspec.json.encode(event).decode() + "\n")
    sys.stdout.flush()


def make_environment(run: Run, **more: Any) -> Environment:
    user: Any = Users if run.kind == "users" else Arrivals
    environment = Environment(user_classes=[user], catch_exceptions=False, **more)
    environment.stop_timeout = run.drain
    return environment


def main(argv: list[str]) -> int:
    """Run as the arguments say: RUN.json, or RUN.json PORT for a worker of the master on that port."""
    with open(argv[0], "rb") as file:
        run = msgspec.json.decode(file.read(), type=Run)
    setup_logging("WARNING")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of every `finally`: workers are ended, too
    if len(argv) > 1:
        return work(run, int(argv[1]))
    writer = Writer(run.records)
    try:
        return lead(run, argv[0], writer) if run.workers else alone(run, writer)
    finally:
        writer.close()


def alone(run: Run, writer: Writer) -> int:
    """Make the load in this process."""
    environment: Any = make_environment(run, shape_class=Stages(run))
    environment.create_local_runner()
    environment.traffic = Traffic(run, environment)
    observer = Observer(environment.traffic)
    _follow(environment, writer, lambda: writer.add(observer.take()))
    return 0


def lead(run: Run, path: str, writer: Writer) -> int:
    """Be the master of worker processes."""
    environment: Any = make_environment(run, shape_class=Stages(run))
    runner: Any = environment.create_master_runner("127.0.0.1", 0)
    batches: list[bytes] = []
    runner.register_message(MESSAGE, lambda environment, msg, **_: batches.append(msg.data))
    with _workers(run, path, runner.server.port) as processes:
        deadline = time.perf_counter() + WORKERS_READY
        while len(runner.clients.ready) < run.workers:
            if time.perf_counter() > deadline or any(p.poll() is not None for p in processes):
                emit(Event("error", text=f"{run.workers} workers did not get ready"))
                return 1
            gevent.sleep(0.1)

        def collect() -> None:
            while batches:
                writer.add(msgspec.msgpack.decode(batches.pop(0), type=Batch))

        _follow(environment, writer, collect)
    return 0


def work(run: Run, port: int) -> int:
    """Make a part of the load for a master."""
    environment: Any = make_environment(run)
    runner: Any = environment.create_worker_runner("127.0.0.1", port)
    while runner.worker_index < 0:
        gevent.sleep(0.01)
    environment.traffic = Traffic(run, environment, (runner.worker_index, run.workers))
    observer = Observer(environment.traffic)

    def send(**_: Any) -> None:
        runner.send_message(MESSAGE, msgspec.msgpack.encode(observer.take()))

    environment.events.test_stop.add_listener(send)  # before the worker says that it has stopped

    def report() -> None:
        while True:
            gevent.sleep(EVERY)
            send()

    gevent.spawn(report)
    runner.greenlet.join()
    return 0


@contextlib.contextmanager
def _workers(run: Run, path: str, port: int) -> Iterator[list[Any]]:
    command = [sys.executable, "-m", "manyheads.bench.generator", path, str(port)]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(run.workers)]
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def _follow(environment: Any, writer: Writer, collect: Any) -> None:
    """Start the shape and tell how it goes until all users have stopped."""
    runner = environment.runner
    environment.shape_class.runner = runner
    runner.start_shape()
    shape = runner.shape_greenlet
    while not shape.ready():
        shape.join(timeout=EVERY)
        collect()
        emit(
            Event(
                "progress",
                at=time.perf_counter(),
                users=runner.user_count,
                done=writer.done,
                failed=writer.failed,
                in_flight=writer.in_flight,
                tokens=writer.tokens,
            )
        )
    collect()


if __name__ == "__main__":
    # NOTE: not sys.exit: Locust's greenlets and zmq's sockets are not worth waiting for
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(status)

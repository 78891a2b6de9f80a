"""This process makes the load: `python -m manyheads.bench.generator RUN.json` prints an Event on each line.

With workers, this process is Locust's master and makes none of the load itself; a worker of a master, here or on
another machine, is `--join HOST:PORT`. SIGINT ends the run now: what is under way is unfinished.
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
from locust.runners import STATE_CLEANUP, MasterRunner

from manyheads.bench.plan import GRACE, Event, Part, Run, read_questions, split_address
from manyheads.bench.recorder import EVERY, Batch, Observer, Writer
from manyheads.bench.users import ArrivalUser, AskingUser, Traffic

JOIN, BATCH, HURRY = "manyheads join", "manyheads batch", "manyheads hurry"
"""These messages are a worker's first, which is answered with its part; what a worker has to tell; and to hurry up."""


class Users(AskingUser):
    """The users of a closed loop, as Locust wants them: a class that is not abstract."""


class Arrivals(ArrivalUser):
    """The users of an open loop, as Locust wants them: a class that is not abstract."""


USERS = {"users": Users, "rate": Arrivals, "trace": Arrivals, "mix": Arrivals}


class Stages(locust.LoadTestShape):
    """This shape, as Locust calls what sets the load, holds one stage after the other and tells when each begins."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run
        self._stage = -1
        self.interrupted = False

    def tick(self) -> tuple[int, float] | None:
        """Return how many users there should be, and how many may come in a second; or None at the end."""
        now = self.get_run_time()
        ends = itertools.accumulate(stage.settle + stage.seconds for stage in self._run.stages)
        index = next((i for i, end in enumerate(ends) if now < end), None)
        if index is None or self.interrupted:
            if self._stage >= 0:
                held = len(self._run.stages) if index is None else self._stage
                emit(Event("end", at=time.perf_counter(), stage=held))
                self._stage = -1
            return None
        if index != self._stage:
            self._stage = index
            emit(Event("stage", at=time.perf_counter(), stage=index))
        users = int(self._run.stages[index].load) if self._run.kind == "users" else max(1, self._run.workers)
        return users, 1000.0


def emit(event: Event) -> None:
    """Tell something to the process that started this one."""
    sys.stdout.write(msgspec.json.encode(event).decode() + "\n")
    sys.stdout.flush()


def make_environment(run: Run, **more: Any) -> Environment:
    """Make Locust's environment of a run whose load this process sets."""
    environment = Environment(catch_exceptions=False, **more)
    environment.stop_timeout = run.drain
    return environment


def main(argv: list[str]) -> int:
    """Do as the arguments say: RUN.json makes a run, and `--join HOST:PORT` is a worker of the master there."""
    setup_logging("WARNING")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of every `finally`: workers are ended, too
    if argv[0] == "--join":
        return work(argv[1])
    with open(argv[0], "rb") as file:
        run = msgspec.json.decode(file.read(), type=Run)
    writer = Writer(run.records)
    try:
        return lead(run, writer) if run.workers else alone(run, writer)
    finally:
        writer.close()


def alone(run: Run, writer: Writer) -> int:
    """Make the load in this process."""
    environment: Any = make_environment(run, user_classes=[USERS[run.kind]], shape_class=Stages(run))
    environment.create_local_runner()
    environment.traffic = Traffic(run, read_questions(run.questions), environment)
    observer = Observer(environment.traffic)
    _follow(environment, writer, lambda: writer.add(observer.take()))
    return 0


def lead(run: Run, writer: Writer) -> int:
    """Be the master of worker processes."""
    environment: Any = make_environment(run, user_classes=[USERS[run.kind]], shape_class=Stages(run))
    host, port = split_address(run.bind or "127.0.0.1:0")
    runner: Any = environment.create_master_runner(host, port)
    questions = read_questions(run.questions)
    joined: list[str] = []
    batches: list[bytes] = []

    def join(msg: Any, **_: Any) -> None:
        part = Part(run, questions, len(joined), time.perf_counter())
        joined.append(msg.node_id)
        runner.send_message(JOIN, msgspec.msgpack.encode(part), msg.node_id)

    runner.register_message(JOIN, join)
    runner.register_message(BATCH, lambda msg, **_: batches.append(msg.data))
    with _workers(0 if run.bind else run.workers, runner.server.port) as processes:
        deadline = time.perf_counter() + run.ready_within
        while len(joined) < run.workers:
            if time.perf_counter() > deadline or any(p.poll() is not None for p in processes):
                emit(Event("error", text=f"{run.workers} workers did not get ready"))
                return 1
            gevent.sleep(0.1)

        def collect() -> None:
            while batches:
                writer.add(msgspec.msgpack.decode(batches.pop(0), type=Batch))

        _follow(environment, writer, collect)
        runner.quit()
        collect()
    return 0


def work(address: str) -> int:
    """Make a part of the load, for the master at this address."""
    environment: Any = Environment(user_classes=list(dict.fromkeys(USERS.values())), catch_exceptions=False)
    runner: Any = environment.create_worker_runner(*split_address(address))
    observers: list[Observer] = []

    def begin(msg: Any, **_: Any) -> None:
        part = msgspec.msgpack.decode(msg.data, type=Part)
        # on one machine all processes have the same clock
        behind = part.clock - time.perf_counter() if part.run.bind else 0.0
        environment.traffic = Traffic(part.run, part.questions, environment, (part.number, part.run.workers))
        observers.append(Observer(environment.traffic, behind))

    def send(**_: Any) -> None:
        for observer in observers:
            runner.send_message(BATCH, msgspec.msgpack.encode(observer.take()))

    def stopped(**_: Any) -> None:
        send()  # before the worker says that it has stopped
        environment.stop_timeout = 0.0  # for Locust's worker sleeps that long once it has stopped

    def hurry(**_: Any) -> None:
        environment.stop_timeout = 0.0

    def report() -> None:
        while True:
            gevent.sleep(EVERY)
            send()

    environment.events.test_stop.add_listener(stopped)
    runner.register_message(HURRY, hurry)
    runner.register_message(JOIN, begin)
    runner.send_message(JOIN)
    gevent.spawn(report)
    runner.greenlet.join()
    return 0


@contextlib.contextmanager
def _workers(count: int, port: int) -> Iterator[list[Any]]:
    command = [sys.executable, "-m", "manyheads.bench.generator", "--join", f"127.0.0.1:{port}"]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def _follow(environment: Any, writer: Writer, collect: Any) -> None:
    """Start the shape and tell how it goes until all users have stopped; SIGINT ends it now."""
    runner, shape = environment.runner, environment.shape_class
    shape.runner = runner
    give_up: list[float] = []

    def interrupt() -> None:
        give_up.append(time.perf_counter() + GRACE)
        shape.interrupted = True
        environment.stop_timeout = 0.0
        if isinstance(runner, MasterRunner):
            runner.send_message(HURRY)
        elif runner.state == STATE_CLEANUP:  # it waits for the last answers
            runner.user_greenlets.kill(block=False)

    gevent.signal_handler(signal.SIGINT, interrupt)
    runner.start_shape()
    greenlet = runner.shape_greenlet
    while not greenlet.ready() and not (give_up and time.perf_counter() > give_up[0]):
        greenlet.join(timeout=EVERY)
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

"""The command runs the generator as a process of its own, and reads what that leaves."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from manyheads.bench.plan import GRACE, BenchError, Event, Question, Run, Use
from manyheads.bench.record import Record
from manyheads.bench.recorder import read_records, read_uses
from manyheads.interrupt import between_steps, on_interrupt

Listen = Callable[[Event], None]
GENERATOR = ("-m", "manyheads.bench.generator")
PATIENCE = 90.0
"""A generator is ended so many seconds after its time; Locust's master gives its workers 60 of them to stop."""
LAST_WORDS = 10.0
"""It has so many seconds then to write what it knows, before it is killed."""


@dataclass
class Outcome:
    """An outcome is what a run of the generator left, however it ended."""

    run: Run
    begins: list[float] = field(default_factory=list)
    """The monotonic times, in seconds, at which the stages began."""
    end: float = 0.0
    """The monotonic time at which the last stage ended."""
    records: list[Record] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    interrupted: bool = False
    overdue: bool = False
    """Whether the generator did not end by itself and was ended; what it had written until then is here."""
    held: bool = False
    """Whether every stage was held as long as it should, whatever came of the last answers."""

    def window(self, stage: int) -> tuple[float, float]:
        """Return start and end of the measured part of a stage that began; cut short, it may end before it starts."""
        begin = self.begins[stage] + self.run.stages[stage].settle
        end = self.begins[stage + 1] if stage + 1 < len(self.begins) else self.end
        if self.run.kind != "users":  # arrivals end on time, the shape's clock ticks once a second
            end = min(end, begin + self.run.stages[stage].seconds)
        return begin, end


def write_questions(questions: list[Question], path: Path) -> None:
    """Write questions to a file for the generator."""
    path.write_bytes(b"".join(msgspec.json.encode(question) + b"\n" for question in questions))


def drive(run: Run, folder: Path, api_key: str | None, listen: Listen = lambda event: None) -> Outcome:
    """Run the generator until it ends, or Ctrl-C ends it, or it takes longer than it may.

    Raises:
        BenchError: it failed, or did not begin in time; the message has what it said.
        KeyboardInterrupt: Ctrl-C before the first load began, or a second time.
    """
    path = folder / "run.json"
    path.write_bytes(msgspec.json.encode(run))
    outcome = Outcome(run)
    env = dict(os.environ)
    env.pop("MANYHEADS_API_KEY", None)
    if api_key:
        env["MANYHEADS_API_KEY"] = api_key
    command = [sys.executable, *GENERATOR, str(path)]
    trouble, last = "", 0.0
    deadline = time.perf_counter() + run.ready_within + PATIENCE
    with tempfile.TemporaryFile("w+") as log:
        with between_steps() as check:  # a Ctrl-C while it is started would leave it behind
            # NOTE: a session of its own, or the terminal's Ctrl-C would also end the generator's workers
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=env, start_new_session=True)

        def interrupt() -> None:
            nonlocal deadline
            outcome.interrupted = True
            process.send_signal(signal.SIGINT)
            deadline = min(deadline, time.perf_counter() + 3 * GRACE)

        def until() -> float:
            return deadline

        try:
            check()
            with on_interrupt(interrupt):
                for event in _events(process, until):
                    last = event.at
                    if event.kind == "stage" and event.stage == len(outcome.begins):
                        outcome.begins.append(event.at)
                        if event.stage == 0 and not outcome.interrupted:
                            deadline = event.at + run.length + run.drain + PATIENCE
                    elif event.kind == "end":
                        outcome.end, outcome.held = event.at, event.stage == len(run.stages)
                    elif event.kind == "error":
                        trouble = event.text
                    listen(event)
        except subprocess.TimeoutExpired:
            outcome.overdue, trouble = True, trouble or "it did not begin in time"
        finally:
            status = _end(process)
        log.seek(0)
        said = log.read()
    if outcome.overdue and outcome.begins:
        outcome.end = outcome.end or last
    elif outcome.interrupted and not outcome.end:
        raise KeyboardInterrupt
    elif not outcome.interrupted and (status or not outcome.end or len(outcome.begins) < len(run.stages)):
        raise BenchError(f"the load generator failed (status {status}): {trouble or said.strip()[-2000:]}")
    # NOTE: workers hear a moment after the master that a run ends; what they sent in that moment is not of the load
    outcome.records = [record for record in read_records(run.records) if record.sent < outcome.end]
    outcome.uses = read_uses(run.records)
    return outcome


def _events(process: subprocess.Popen[bytes], until: Callable[[], float]) -> Iterator[Event]:
    """Yield what the generator tells, until it has ended.

    Args:
        until: gives the time until which it may run, in monotonic seconds; events and Ctrl-C move it.

    Raises:
        subprocess.TimeoutExpired: it runs still.
    """
    assert process.stdout is not None
    rest = b""
    while True:
        left = max(0.0, until() - time.perf_counter())
        if select.select([process.stdout], [], [], min(left, 1.0))[0]:
            data = os.read(process.stdout.fileno(), 2**16)
            if not data:
                process.wait(LAST_WORDS)
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from (msgspec.json.decode(line, type=Event) for line in lines)
        elif not left:
            raise subprocess.TimeoutExpired(process.args, 0.0)


def _end(process: subprocess.Popen[bytes]) -> int:
    """End the generator if it runs still, and return its exit status."""
    assert process.stdout is not None
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(LAST_WORDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers, too: they are of its session
    process.stdout.close()
    return process.wait()

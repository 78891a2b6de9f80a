"""Runs the generator's process and reads what it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from manyheads.bench.plan import BenchError, Event, Job, Run, Use
from manyheads.bench.record import Record
from manyheads.bench.recorder import read_records, read_uses
from manyheads.interrupt import on_interrupt

Listen = Callable[[Event], None]


@dataclass
class Outcome:
    """What a run of the generator left."""

    run: Run
    begins: list[float] = field(default_factory=list)
    """When each stage began, monotonic seconds."""
    end: float = 0.0
    """When the last stage ended."""
    records: list[Record] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    interrupted: bool = False
    held: bool = False
    """Every stage was held as long as it should, whatever came of the last answers."""

    def window(self, stage: int) -> tuple[float, float]:
        """The measured part of a stage that began; of an interrupted one it may end before it starts."""
        begin = self.begins[stage] + self.run.stages[stage].settle
        end = self.begins[stage + 1] if stage + 1 < len(self.begins) else self.end
        if self.run.kind != "users":  # arrivals end on time, the shape's clock ticks once a second
            end = min(end, begin + self.run.stages[stage].seconds)
        return begin, end


def write_jobs(jobs: list[Job], path: Path) -> None:
    """Prepared requests for the generator."""
    path.write_bytes(b"".join(msgspec.json.encode(job) + b"\n" for job in jobs))


def drive(run: Run, folder: Path, api_key: str | None, listen: Listen = lambda event: None) -> Outcome:
    """Run the generator to its end, or until Ctrl-C.

    Raises:
        BenchError: it failed; the message has what it said.
        KeyboardInterrupt: Ctrl-C before the first load began, or a second time.
    """
    path = folder / "run.json"
    path.write_bytes(msgspec.json.encode(run))
    outcome = Outcome(run)
    env = dict(os.environ)
    env.pop("MANYHEADS_API_KEY", None)
    if api_key:
        env["MANYHEADS_API_KEY"] = api_key
    command = [sys.executable, "-m", "manyheads.bench.generator", str(path)]
    trouble = ""
    with tempfile.TemporaryFile("w+") as log:
        # NOTE: a session of its own, or the terminal's Ctrl-C would also end the generator's workers
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=env, start_new_session=True)
        assert process.stdout is not None

        def interrupt() -> None:
            outcome.interrupted = True
            process.send_signal(signal.SIGINT)

        try:
            with on_interrupt(interrupt):
                for line in process.stdout:
                    event = msgspec.json.decode(line, type=Event)
                    if event.kind == "stage" and event.stage == len(outcome.begins):
                        outcome.begins.append(event.at)
                    elif event.kind == "end":
                        outcome.end, outcome.held = event.at, event.stage == len(run.stages)
                    elif event.kind == "error":
                        trouble = event.text
                    listen(event)
                status = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            process.stdout.close()
        log.seek(0)
        said = log.read()
    if outcome.interrupted and not outcome.end:
        raise KeyboardInterrupt
    if not outcome.interrupted and (status or not outcome.end or len(outcome.begins) < len(run.stages)):
        raise BenchError(f"the load generator failed (status {status}): {trouble or said.strip()[-2000:]}")
    outcome.records = read_records(run.records)
    outcome.uses = read_uses(run.records)
    return outcome

"""A generator that never ends, whatever it is told: `python -m tests.bench.stuck_generator RUN.json`.

It makes no load and invents the record of one answered request; the next it leaves half-written. With --held before the
file it holds the load as long as it should, and stands still while the last answers are awaited.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from manyheads.bench.plan import Event, Run
from manyheads.bench.record import Record


def tell(event: Event) -> None:
    """Print a line as the generator does."""
    print(msgspec.json.encode(event).decode(), flush=True)


def main(held: bool, path: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # a worker
    run = msgspec.json.decode(Path(path).read_bytes(), type=Run)
    begin = time.perf_counter()
    tell(Event("stage", at=begin))
    time.sleep(0.5)
    record = Record(sent=begin + 0.1, seconds=0.2, chunks=[0.1, 0.2], tokens=2)
    line = msgspec.json.encode(record)
    Path(run.records).write_bytes(line + b"\n" + line[:20])
    Path(run.records + ".use").touch()
    if held:
        tell(Event("end", at=time.perf_counter(), stage=1))
    while True:
        tell(Event("progress", at=time.perf_counter(), done=1))
        time.sleep(0.1 if held else 600)  # it waits for the answers, or does nothing at all


if __name__ == "__main__":
    main(sys.argv[1] == "--held", sys.argv[-1])

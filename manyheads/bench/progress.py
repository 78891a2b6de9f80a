"""While a test runs, a terminal shows a live line; elsewhere there is a line for each load."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from manyheads.bench.plan import Event, Run
from manyheads.bench.result import UNITS


class Progress:
    """The progress listens to the generator's events, and shows them."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live = self._console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[counts]}"))
        self._bar = Bar(*columns, TimeRemainingColumn(), console=self._console)
        self._task = self._bar.add_task("", total=None, counts="", visible=False)
        self._run: Run | None = None
        self._load = ""
        self._last = Event("progress")
        self._begun = 0.0
        self._speed = 0.0

    def __enter__(self) -> Progress:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self._console.print(f"[dim]{text}[/dim]", highlight=False)

    def begin(self, run: Run) -> None:
        """Note that a run of the generator begins."""
        self._run = run
        self._begun = time.perf_counter()
        self._last = Event("progress")
        self._speed = 0.0
        self._bar.reset(self._task, total=run.length, visible=True)

    def event(self, event: Event) -> None:
        """Show what an event tells."""
        if self._run is None:
            return
        if event.kind == "stage":
            self._load = f"{UNITS[self._run.kind]}: {self._run.stages[event.stage].load:g}"
            if event.stage == 0:
                self._begun = event.at
            if not self._live:
                self.say(self._load)
        elif event.kind == "end":
            self._load = "last answers"
            if not self._live:
                self.say(self._load)
        elif event.kind == "progress":
            seconds = event.at - self._last.at
            if self._last.at and seconds > 0:
                now = (event.tokens - self._last.tokens) / seconds
                self._speed += (now - self._speed) * 0.3
            self._last = event
            counts = f"{event.done} answered · {event.failed} failed · {event.in_flight} running"
            counts += f" · {self._speed:.0f} tokens/s"
            done = min(time.perf_counter() - self._begun, self._run.length)
            self._bar.update(self._task, completed=done, description=self._load, counts=counts)

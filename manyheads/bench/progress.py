"""While a test runs, a terminal shows a live line; elsewhere there is a line for each load."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from manyheads.bench.plan import Event, Run
from manyheads.bench.result import UNITS


class Progress(Bar):
    """The progress listens to the generator's events, and shows them; the bar is there while it is a context."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[counts]}"))
        console = Console(stderr=True)
        super().__init__(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._task = self.add_task("", total=None, counts="", visible=False)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self.console.print(f"[dim]{text}[/dim]", highlight=False)

    def begin(self, run: Run) -> None:
        """Note that a run of the generator begins."""
        self._run, self._load, self._speed = run, "", 0.0
        self._begun = time.perf_counter()
        self._last = Event("progress")
        self.reset(self._task, total=run.length, visible=True)

    def event(self, event: Event) -> None:
        """Show what an event of the run that has begun tells."""
        if event.kind == "stage":
            self._load = f"{UNITS[self._run.kind]}: {self._run.stages[event.stage].load:g}"
            self._begun = self._begun if event.stage else event.at
        elif event.kind == "end":
            self._load = "last answers"
        if event.kind in ("stage", "end") and self.disable:
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
            self.update(self._task, completed=done, description=self._load, counts=counts)

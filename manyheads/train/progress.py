"""What a long run says: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Advance = Callable[[int, str], None]
"""Steps done, and a few words of how it goes."""

LINE_SECONDS = 20.0


class Progress:
    """Progress on standard error; none at all where it is `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def say(self, text: str) -> None:
        """Print a line, unless quiet."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        """A bar from `done` to `total`."""
        if self.quiet:
            yield lambda count, text: None
        elif sys.stderr.isatty():
            with _bar(name, total, done) as advance:
                yield advance
        else:
            yield _lines(name, total, done)


@contextlib.contextmanager
def _bar(name: str, total: int, done: int) -> Iterator[Advance]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[text]}"),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total, completed=done, text="")
        yield lambda count, text: bar.update(task, advance=count, text=text)


def _lines(name: str, total: int, done: int) -> Advance:
    last = time.monotonic()

    def advance(count: int, text: str) -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last >= LINE_SECONDS or (count and done == total):
            last = time.monotonic()
            print(f"{name} {done}/{total} {text}", file=sys.stderr, flush=True)

    return advance

"""Ctrl-C where work is not to be broken off in its middle."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def on_interrupt(call: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls a function and nothing else; a second one raises KeyboardInterrupt."""
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        call()

    previous = signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def between_steps() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back until the function that this gives is called: it raises KeyboardInterrupt then.

    A second Ctrl-C does not wait.
    """
    pressed = False

    def press() -> None:
        nonlocal pressed
        pressed = True

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    with on_interrupt(press):
        yield check


@contextlib.contextmanager
def ended_as_by_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP do what Ctrl-C does, so that what runs in other sessions is ended, too."""
    signals = (signal.SIGTERM, signal.SIGHUP)
    previous = [signal.signal(s, lambda *_: signal.raise_signal(signal.SIGINT)) for s in signals]
    try:
        yield
    finally:
        for s, handler in zip(signals, previous, strict=True):
            signal.signal(s, handler)

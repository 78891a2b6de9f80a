"""Words for whoever reads standard error."""

from __future__ import annotations

import contextlib
import sys


def say(text: str) -> None:
    """Write a line to standard error. It is lost where nobody reads any more (a pipe is closed) or a disk is full:
    no request and no process is to end for that."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)

"""A load test ends, whatever its users do at that moment."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from manyheads.bench.record import UNFINISHED
from tests.bench.mock import Script, running


@pytest.mark.parametrize(("how", "reasons"), [("between", [None]), ("asking", [None, UNFINISHED])])
def test_users_that_are_stopped(how: str, reasons: list[str | None]) -> None:
    """Locust stops a user between two requests, or kills it in the middle of one: it ends, and loses no record.

    A user that swallowed the kill went on asking, while Locust waited for its death, and the run never ended.
    """
    with running(Script(breaks=("", "never", "never", "never"))) as url:
        command = [sys.executable, "-m", "tests.bench.stopped_users", how, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == [True, reasons], done.stderr

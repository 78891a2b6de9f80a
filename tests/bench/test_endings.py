"""A load test ends, whatever its users do at that moment, and even if its generator does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from manyheads.bench import drive, result
from manyheads.bench.plan import BenchError, Run
from manyheads.bench.record import UNFINISHED
from manyheads.cli import main
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


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The generator never ends, and it is not waited for as long as usual."""
    monkeypatch.setattr(drive, "GENERATOR", ("-m", "tests.bench.stuck_generator"))
    monkeypatch.setattr(drive, "PATIENCE", 1.0)
    monkeypatch.setattr(drive, "LAST_WORDS", 0.2)
    return monkeypatch


@pytest.mark.parametrize(
    ("held", "where"), [("--held", "while the last answers were awaited"), ("--not-held", "of 1 s, because")]
)
def test_a_generator_that_does_not_end(
    stuck: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, held: str, where: str
) -> None:
    """It and its workers are killed; what it had written is kept, and the report says how it was."""
    stuck.setattr(drive, "GENERATOR", (*drive.GENERATOR, held))
    argv = ["users", "--users", "1", "--hold", "1", "--settle", "0", "--drain", "0.5", "--no-limit", "--no-check"]
    workers: list[psutil.Process] = []
    plain = drive._end

    def end(process: subprocess.Popen[bytes]) -> int:
        workers.extend(psutil.Process(process.pid).children())
        return plain(process)

    stuck.setattr(drive, "_end", end)
    assert main(["bench", *argv, "--url", "http://127.0.0.1:1", "-o", str(tmp_path / "report")]) == 130
    out = capsys.readouterr().out
    assert "The test was interrupted at 1 users" in out
    assert where in out
    assert "because the load generator did not end by itself; what was measured until then is here" in out
    found = result.load(tmp_path / "report")
    assert found.whole.completed == 1
    assert [level.interrupted for level in found.levels] == [held == "--not-held"]
    assert len(workers) == 1
    assert psutil.wait_procs(workers, timeout=5)[1] == []


def test_a_generator_that_does_not_begin(stuck: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stuck.setattr(drive, "GENERATOR", ("-c", "import time; time.sleep(600)"))
    run = Run("http://127.0.0.1:1", "/v1/completions", "users", [], "", "")
    stuck.setattr(Run, "ready_within", 0.0)
    with pytest.raises(BenchError, match="it did not begin in time"):
        drive.drive(run, tmp_path, None)

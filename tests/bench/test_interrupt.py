"""`manyheads bench` and signals: what was measured is kept, and no process is left behind."""

from __future__ import annotations

import csv
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from manyheads.bench import drive, result, server
from manyheads.bench.plan import Run
from tests.bench.mock import Script, running


def start(*argv: str) -> subprocess.Popen[str]:
    """The command, in a session of its own as a terminal would have it."""
    command = [sys.executable, "-m", "manyheads", "bench", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"it never said {text!r}")


def end(process: subprocess.Popen[str], number: int) -> tuple[int, str, str]:
    """Send the signal; the exit status and what it said. Nothing that it started may be left."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert not [child for child in started if child.is_running()]
    return process.returncode, out, err


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, "2"), (signal.SIGTERM, "0")])
def test_what_was_measured_is_kept(tmp_path: Path, number: int, workers: str) -> None:
    """The first load is whole, the second is cut, the third never came; answers under way are no failures."""
    argv = ["users", "--users", "2,4,6", "--hold", "3", "--settle", "0", "--no-limit", "--output-tokens", "5"]
    with running(Script(ttft=0.2, gap=0.05)) as url:
        process = start(*argv, "--workers", workers, "--url", url, "-o", str(tmp_path))
        wait_for(process, "users: 4")
        time.sleep(1)
        status, out, err = end(process, number)
    assert status == 130, err
    assert "The test was interrupted at 4 users, which were held for" in out
    found = result.load(tmp_path)
    assert found.interrupted is not None
    assert [(level.load, level.interrupted) for level in found.levels] == [(2, False), (4, True)]
    assert all(level.completed and not level.failed for level in found.levels)
    assert found.levels[1].seconds < found.levels[0].seconds
    assert found.whole.sent > found.whole.completed  # the others were under way
    assert not found.whole.failed
    assert "The test was interrupted at 4 users" in (tmp_path / "report.html").read_text()
    with open(tmp_path / "levels.csv", newline="") as file:
        assert [row["interrupted"] for row in csv.DictReader(file)] == ["False", "True"]
    with open(tmp_path / "requests.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == found.whole.sent


def test_workers_that_joined(tmp_path: Path) -> None:
    """They make the load of one run after the other; Ctrl-C or SIGTERM ends them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    argv = ["rate", "--rates", "20,40", "--hold", "1", "--settle", "0", "--output-tokens", "5"]
    joined = [start("--join", address) for _ in range(2)]
    try:
        with running(Script()) as url:
            process = start(*argv, "--workers", "2", "--bind", address, "--url", url, "-o", str(tmp_path))
            out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        assert f"waiting for 2 workers: manyheads bench --join {address}" in " ".join(err.split())
        found = result.load(tmp_path)
        was = "was" if any(level.generator.bound for level in found.levels) else "was not"  # a busy machine's may be
        assert f"The load generator {was} the bottleneck" in out
        assert [level.load for level in found.levels] == [20, 40]
        assert found.whole.completed > 25
        for worker, number in zip(joined, (signal.SIGINT, signal.SIGTERM), strict=True):
            # whatever its generator does now, for one run has ended and the next is being waited for
            status, _, err = end(worker, number)
            assert (status, err) == (130, "")
    finally:
        for worker in joined:
            if worker.poll() is None:
                worker.terminate()
            worker.communicate()


def test_while_the_last_answers_are_awaited(tmp_path: Path) -> None:
    """The load was held as it should be; only the answers are missing."""
    argv = ["rate", "--rates", "20", "--hold", "1", "--settle", "0", "--no-limit"]
    with running(Script(ttft=0.01, breaks=("", "stall"))) as url:
        process = start(*argv, "--url", url, "-o", str(tmp_path))
        wait_for(process, "last answers")
        status, out, err = end(process, signal.SIGINT)
    assert status == 130, err
    assert "at 20 requests/s, while the last answers were awaited" in out
    (level,) = result.load(tmp_path).levels
    assert not level.interrupted
    assert level.completed
    assert level.unfinished


def test_before_anything_was_measured(tmp_path: Path) -> None:
    """The server that it started is ended, too; there is nothing to report."""
    process = start("users", "-o", str(tmp_path / "report"))
    wait_for(process, "starting a server")
    deadline = time.monotonic() + 60
    while not psutil.Process(process.pid).children():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    status, _, err = end(process, signal.SIGINT)
    assert (status, err) == (130, "")
    assert not (tmp_path / "report").exists()


def start_server(folder: Path) -> None:
    with server.started("builtin", []):
        pytest.fail("it goes on")


def start_generator(folder: Path) -> None:
    drive.drive(Run("http://127.0.0.1:1", "/v1/completions", "users", [], "", ""), folder, None)


@pytest.mark.parametrize("begin", [start_server, start_generator])
def test_while_a_process_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: Callable[[Path], None]
) -> None:
    """It is there already, and whoever starts it does not know it yet."""
    made: list[subprocess.Popen[bytes]] = []

    def popen(command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
        made.append(plain([sys.executable, "-c", "import time; time.sleep(600)"], **settings))
        signal.raise_signal(signal.SIGINT)
        return made[-1]

    plain = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path)
    (process,) = made
    ended = process.poll() is not None
    process.kill()
    assert ended

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.server.tiny_tokenizer import save_tokenizer

ROOT = Path(__file__).parents[2]
_launched: list[subprocess.Popen[bytes]] = []


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Running:
    """A server in a process of its own."""

    process: subprocess.Popen[bytes]
    url: str
    temp: Path
    pids: Path

    def wait_ready(self, seconds: float = 120.0) -> Running:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the server ended while starting"
            try:
                if httpx.get(self.url + "/health").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError("the server did not start")

    def num_aborts(self) -> int:
        """Requests that the engine was told to give up."""
        file = self.pids.with_name("aborts")
        return len(file.read_text().splitlines()) if file.exists() else 0

    def errors(self) -> str:
        """What it wrote to standard error."""
        return self.pids.with_name("stderr").read_text()

    def is_gone(self, seconds: float = 20.0) -> bool:
        """Whether no process, socket or temporary folder is left."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pids = [self.process.pid, *(int(p.name) for p in self.pids.iterdir())]
            if not any(map(process_exists, pids)) and not list(self.temp.iterdir()):
                return True
            time.sleep(0.05)
        return False

    def engine_pid(self) -> int:
        """The process of the engine that is there now."""
        (pid,) = filter(process_exists, (int(path.name) for path in self.pids.iterdir()))
        return pid

    def kill_engine(self, number: int = signal.SIGKILL) -> None:
        """Send the engine's process a signal, SIGKILL or SIGSTOP."""
        os.kill(self.engine_pid(), number)

    def stop(self, number: int = signal.SIGINT) -> float:
        """Seconds that it took to end."""
        start = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(60)
        return time.monotonic() - start


def launch(temp: Path, *options: str, port: int = 0, files: int | None = None, **env: str) -> Running:
    """Start a server whose temporary files are under `temp`, with at most so many open files."""
    folder = temp / "model"
    if not folder.exists():
        folder.mkdir(parents=True)
        save_tokenizer(folder)
        (folder / "config.json").write_text("{}")
    port = port or free_port()
    sockets, pids = temp / "tmp", temp / "pids"
    for path in (sockets, pids):
        path.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.server.launch", str(folder), "--port", str(port)]
    if files is not None:
        command = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *command]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--served-model-name", "fake", *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(sockets), "FAKE_ENGINE_PID_FOLDER": str(pids), **env},
        stderr=(temp / "stderr").open("w"),
    )
    _launched.append(process)
    return Running(process, f"http://127.0.0.1:{port}", sockets, pids)


def pytest_sessionfinish() -> None:
    """A test that failed may have left its server behind."""
    for process in _launched:
        if process.poll() is None:
            process.kill()
            process.wait()


def process_exists(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether it comes true; the machine may have work of its own."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def num_running(url: str) -> int:
    line = next(x for x in httpx.get(url + "/metrics").text.splitlines() if x.startswith("manyheads_num_requests_run"))
    return int(float(line.split()[1]))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    options = ("--max-queue", "64", "--lora", "sql=where", "--tool-parser", "hermes")
    running = launch(tmp_path_factory.mktemp("server"), *options).wait_ready()
    yield running
    assert eventually(lambda: num_running(running.url) == 0)  # of clients that have just left
    running.stop()
    lines = [line for line in running.errors().splitlines() if "is ignored" not in line]
    assert len(lines) == 2, running.errors()  # its memory, and the greeting


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as c:
        yield c

"""Clients that hold connections and do not do their part, and what the others notice of them."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from manyheads.config import ConfigError
from manyheads.server.config import ConnectionLimits
from tests.server.conftest import Running, eventually, num_running
from tests.server.test_lifecycle import start
from tests.server.test_metrics import scrape

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import hostile

SHORT = ("--header-timeout", "1.5", "--body-timeout", "1", "--write-timeout", "1.5", "--keep-alive", "1")
STREAM = {"prompt": "Hi", "max_tokens": 4000, "ignore_eos": True, "logprobs": 1}
"""These events have about 1 MB: more than the systems on the way take for a client that does not read."""
VERSION = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"


def begin(temp: Path, *options: str, **more: Any) -> Running:
    return start(temp, *SHORT, "--max-model-len", "8192", *options, **more)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with short times."""
    running = begin(tmp_path_factory.mktemp("short")).wait_ready()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with short times whose engine takes its time, 20 ms a step."""
    running = begin(tmp_path_factory.mktemp("slow"), FAKE_ENGINE_STEP_SECONDS="0.02").wait_ready()
    yield running
    running.stop()


def address(running: Running) -> hostile.Address:
    host, port = running.url.removeprefix("http://").split(":")
    return host, int(port)


def connect(running: Running) -> socket.socket:
    return socket.create_connection(address(running), timeout=10)


def receive(s: socket.socket, end: bytes) -> bytes:
    """What comes until there is this in it."""
    received = b""
    while end not in received:
        data = s.recv(2**16)
        assert data, received
        received += data
    return received


def num_files(running: Running) -> int:
    return len(os.listdir(f"/proc/{running.process.pid}/fd"))


def dropped(running: Running, *reasons: str) -> float:
    with httpx.Client(base_url=running.url) as client:
        samples = scrape(client)
    return sum(samples[f"connections_dropped_total[reason={reason}]"] for reason in reasons)


def ask(running: Running) -> float:
    """Seconds that a request takes, on a connection of its own."""
    start, body = time.perf_counter(), {"prompt": "Hi", "parameters": {"max_new_tokens": 60}}
    response = httpx.post(running.url + "/generate", json=body, timeout=20)
    assert response.json()["details"]["generated_tokens"] == 60
    return time.perf_counter() - start


class Others:
    """Clients with honest requests, and what must hold for them and for the server."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.alone = min(ask(running) for _ in range(3))
        self.count = 0
        """Requests that were answered meanwhile."""
        assert eventually(lambda: num_connections(running) == 1)
        self.files = num_files(running)

    def are_served_until(self, gone: Callable[[], bool]) -> None:
        """They are, about as fast as alone; the machine may have work of its own."""
        deadline = time.monotonic() + 60
        times = [ask(self.running)]
        while not gone():
            assert time.monotonic() < deadline, "the clients are still there"
            times.append(ask(self.running))
        self.count += len(times)
        assert sorted(times)[len(times) // 2] < 3 * self.alone + 1.0

    def find_all_clean(self) -> None:
        """No descriptor has leaked, and no row is taken."""
        assert eventually(lambda: num_files(self.running) <= self.files)
        assert eventually(lambda: num_running(self.running.url) == 0)  # what the engine says of itself comes later
        assert len(self.running.errors()) < 100_000


def num_connections(running: Running) -> float:
    with httpx.Client(base_url=running.url) as client:
        return scrape(client)["connections"]


def test_half_open_connections(short: Running) -> None:
    others, before = Others(short), dropped(short, "headers")
    with hostile.half_open(address(short), 1200) as clients:

        def gone() -> bool:
            clients.drip()  # which gives no more time
            return clients.num_open() == 0

        others.are_served_until(gone)
    others.find_all_clean()
    assert dropped(short, "headers") - before == 1200


def test_clients_that_never_read(short: Running) -> None:
    others, before = Others(short), dropped(short, "write")
    with hostile.unread(address(short), 20, **STREAM) as clients:
        assert eventually(lambda: num_running(short.url) == 20)
        others.are_served_until(lambda: clients.num_open() == 0)
    others.find_all_clean()
    assert dropped(short, "write") - before == 20


def test_idle_connections_and_few_files(tmp_path: Path) -> None:
    running = begin(tmp_path, files=64).wait_ready()
    others = Others(running)
    with hostile.idle(address(running), 200) as clients:
        assert num_files(running) < 64
        others.are_served_until(lambda: clients.num_open() == 0)
    others.find_all_clean()
    assert dropped(running, "room", "headers") == 200
    running.stop()


def test_all_of_them_at_once(tmp_path: Path) -> None:
    running = begin(tmp_path, "--max-connections", "200").wait_ready()
    others = Others(running)
    with ExitStack() as stack:
        kinds = [
            stack.enter_context(hostile.unread(address(running), 20, **STREAM)),
            stack.enter_context(hostile.idle(address(running), 100)),
            stack.enter_context(hostile.half_open(address(running), 600)),
        ]
        others.are_served_until(lambda: not any(kind.num_open() for kind in kinds))
    others.find_all_clean()
    # where there is no more room, a connection whose answer is read may go before its client closes it
    assert 700 <= dropped(running, "room", "headers") <= 700 + others.count
    assert dropped(running, "write") == 20
    words = ("clients read nothing for 1.5 s", "closed to make room", "no whole headers within 1.5 s")
    assert eventually(lambda: all(word in running.errors() for word in words)), running.errors()
    assert len(running.errors().splitlines()) == 2 + len(words), running.errors()  # one of each kind
    running.stop()


def test_a_client_that_stops_reading_frees_its_rows(slow: Running) -> None:
    before, body = slow.num_aborts(), {**STREAM, "logprobs": 20, "n": 4}
    with hostile.unread(address(slow), 1, **body) as clients:
        assert eventually(lambda: num_running(slow.url) == 4)
        # in half of the 40 s that the steps take
        assert eventually(lambda: slow.num_aborts() - before == 4, 20)
        assert clients.num_open() == 0
    assert eventually(lambda: num_running(slow.url) == 0)


def test_a_slow_reader_is_kept(short: Running) -> None:
    before = dropped(short, "write")
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**15)
        s.connect(address(short))
        s.sendall(hostile.completion(**STREAM, stream=True))
        received, begun = b"", time.monotonic()
        while b"[DONE]" not in received:
            received += s.recv(2**14)
            if time.monotonic() < begun + 4:
                time.sleep(0.3)
    assert received.count(b'"finish_reason":"length"') == 1
    assert dropped(short, "write") == before


def test_a_whole_answer_that_nobody_takes(short: Running) -> None:
    """It has been handed over to be sent, and the connection to be closed: that waits for the client, too."""
    others, before = Others(short), dropped(short, "write")
    body = {**STREAM, "max_tokens": 2000, "logprobs": 20, "stream": False}
    with hostile.unread(address(short), 3, **body) as clients:
        assert eventually(lambda: num_running(short.url) == 3)
        assert eventually(lambda: clients.num_open() == 0)
    others.find_all_clean()
    assert dropped(short, "write") - before == 3


def test_a_body_that_does_not_come(short: Running) -> None:
    before = dropped(short, "body")
    with connect(short) as s:
        request = hostile.completion(prompt="Hi")
        s.sendall(request[:-5])
        begun = time.monotonic()
        answer = receive(s, b'"code":"body_timeout"')
        assert 0.8 < time.monotonic() - begun < 30
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"\r\nconnection: close\r\n" in answer
        s.sendall(request[-5:])
        while s.recv(2**16):  # it is closed
            pass
    assert dropped(short, "body") - before == 1
    assert eventually(lambda: "answered 408 whose body did not come within 1 s a MiB: 1" in short.errors())


def test_a_large_body_may_take_longer(short: Running) -> None:
    request = hostile.completion(prompt="Hi", max_tokens=1, user="x" * 3 * 2**20)
    with connect(short) as s:
        for i in range(0, len(request), 2**18):
            s.sendall(request[i : i + 2**18])
            time.sleep(0.15)
        assert receive(s, b"\r\n").startswith(b"HTTP/1.1 200 ")


def test_bodies_take_so_much_memory(tmp_path: Path) -> None:
    """Whoever begins bodies and does not end them keeps the large ones of others out, but not the small ones."""
    running = start(tmp_path, "--max-body-bytes", "200000").wait_ready()
    large = hostile.completion(prompt="Hi", max_tokens=1, user="x" * 190_000)
    with hostile.Clients(address(running), 80, large[:-10]):
        assert eventually(lambda: num_connections(running) >= 80)

        def is_refused() -> bool:
            with connect(running) as s:
                s.sendall(large[:-10])
                time.sleep(0.1)
                with contextlib.suppress(ConnectionError):
                    s.sendall(large[-10:])
                return receive(s, b"\r\n").startswith(b"HTTP/1.1 503 ")

        assert eventually(is_refused)
        ask(running)
    assert eventually(lambda: not is_refused())
    running.stop()


def test_an_unwanted_body_does_not_hold_a_connection(short: Running) -> None:
    with connect(short) as s:
        s.sendall(VERSION[:-2] + b"Content-Length: 100\r\n\r\n")
        receive(s, b'{"version":')

        def is_closed() -> bool:
            try:
                s.send(b"x")
            except ConnectionError:
                return True
            return False

        assert eventually(is_closed)


@pytest.mark.parametrize(("more", "reason", "least"), [(b"", "idle", 0.9), (VERSION[:9], "headers", 1.4)])
def test_connections_that_go_on_with_nothing(short: Running, more: bytes, reason: str, least: float) -> None:
    before = dropped(short, reason)
    with connect(short) as s:
        s.sendall(VERSION)
        receive(s, b'{"version":')
        s.sendall(more)
        begun = time.monotonic()
        assert s.recv(2**16) == b""
        assert least < time.monotonic() - begun < 30
    assert dropped(short, reason) > before


def test_requests_sent_ahead_are_answered_in_full(slow: Running) -> None:
    """The second one runs for longer than a connection may be idle; uvicorn's clock for that still goes."""
    with connect(slow) as s:
        s.sendall(VERSION + hostile.completion(prompt="Hi", max_tokens=300))
        answers = receive(s, b'"completion_tokens":300')
    assert answers.count(b"HTTP/1.1 200 ") == 2


@pytest.mark.parametrize(
    "first",
    [
        VERSION[:-2] + b"X-Long: ",
        VERSION[:-2] + b"A: b\r\n" * 100,
        b"GET /",
        VERSION + VERSION[:-2] + b"X-Long: ",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX-Long: ",
    ],
    ids=["value", "many", "path", "of a further request", "trailer"],
)
def test_headers_without_end(short: Running, first: bytes) -> None:
    """They are refused, and not kept in memory."""
    with connect(short) as s:
        s.sendall(first)
        piece = b"A: b\r\n" * 1000 if first.endswith(b"\n") else b"a" * 6000
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 2**23:
                s.sendall(piece)
                sent += len(piece)
        assert sent < 2**23, "the server takes them all"


def test_long_headers(short: Running) -> None:
    """32 kB of them, in pieces, are none too many."""
    with connect(short) as s:
        s.sendall(VERSION[:-2])
        for i in range(8):
            s.sendall(b"X-%d: %s\r\n" % (i, b"a" * 4000))
            time.sleep(0.01)
        s.sendall(b"\r\n")
        assert receive(s, b"version").startswith(b"HTTP/1.1 200 ")


def test_who_goes_when_there_are_too_many(tmp_path: Path) -> None:
    running = start(tmp_path, "--max-connections", "3", FAKE_ENGINE_STEP_SECONDS="0.02").wait_ready()

    def stream(s: socket.socket) -> socket.socket:
        s.sendall(hostile.completion(prompt="Hi", max_tokens=1500, ignore_eos=True, stream=True))
        receive(s, b"data: ")
        return s

    with ExitStack() as stack:
        first, half, idle = (stack.enter_context(connect(running)) for _ in range(3))
        stream(first)
        half.sendall(b"GET /ver")
        idle.sendall(VERSION)
        receive(idle, b'{"version":')
        half.setblocking(False)
        # the idle one goes first, though the other is there for longer
        second = stream(stack.enter_context(connect(running)))
        assert idle.recv(2**16) == b""
        with pytest.raises(BlockingIOError):
            half.recv(1)
        # then those without whole headers
        third = stream(stack.enter_context(connect(running)))
        assert half.recv(2**16) == b""
        # then nobody, and who comes is told so
        with connect(running) as refused:
            answer = receive(refused, b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"\r\nRetry-After: 1\r\n" in answer
        for s in (first, second, third):
            receive(s, b"data: ")
    assert eventually(lambda: "connections refused because 3 are in requests" in running.errors())
    assert eventually(lambda: httpx.get(running.url + "/health").status_code == 200)
    assert dropped(running, "room") >= 2
    assert dropped(running, "refused") >= 1
    running.stop()


def test_no_more_file_descriptors(tmp_path: Path) -> None:
    """Other things than connections can take them: those that are open go on, and the log stays short."""
    running = start(tmp_path, FAKE_ENGINE_STEP_SECONDS="0.02").wait_ready()
    limits = resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE)
    assert limits[0] == min(limits[1], 2**16)  # as many as may be
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=running.url, timeout=30) as client:
        long = pool.submit(client.post, "/v1/completions", json=STREAM | {"max_tokens": 400})
        assert eventually(lambda: num_running(running.url) == 1)
        resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (5, limits[1]))
        with pytest.raises(httpx.TimeoutException):
            httpx.get(running.url + "/health", timeout=1)
        resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, limits)
        assert httpx.get(running.url + "/health", timeout=5).status_code == 200
        assert long.result().json()["usage"]["completion_tokens"] == 400
    assert running.errors().count("no connection could be accepted (Too many open files)") == 1
    assert len(running.errors()) < 2000
    running.stop()


def test_malformed_requests_do_not_fill_the_log(short: Running) -> None:
    with hostile.Clients(address(short), 50, b"\0\r\n\r\n") as clients:
        assert eventually(lambda: clients.num_open() == 0)
    assert short.errors().count("Invalid HTTP request") == 1


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_impossible_limits(value: float) -> None:
    with pytest.raises(ConfigError, match="write_timeout must be above 0"):
        ConnectionLimits(write_timeout=value)

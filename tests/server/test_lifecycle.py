"""From start to end: clients that leave, signals, an engine that dies, a port that is taken."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from manyheads.config import ConfigError
from manyheads.frontend.conversation import Conversation
from manyheads.frontend.tokenizer import Tokenizer
from manyheads.server.run import _bind
from tests.server.conftest import Running, eventually, launch, num_running
from tests.server.fake_engine import TEXT
from tests.server.tiny_tokenizer import LightTokenizer

LONG = {"prompt": "Hi", "parameters": {"max_new_tokens": 2000}}
HELLO = [{"role": "user", "content": "hello"}]


def data_lines(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.iter_lines() if line]


class Clients:
    """Requests in flight: one that waits for the whole answer, one that streams."""

    def __init__(self, pool: ThreadPoolExecutor, running: Running) -> None:
        self.whole = pool.submit(self.ask, running.url)
        self.stream = pool.submit(self.read, running.url)
        assert eventually(lambda: num_running(running.url) == 2)

    @staticmethod
    def ask(url: str, **parameters: Any) -> httpx.Response:
        body = {"prompt": "Hi", "parameters": LONG["parameters"] | parameters}
        return httpx.post(url + "/generate", json=body, timeout=30)

    @staticmethod
    def read(url: str) -> list[str]:
        body = {"messages": HELLO, "stream": True}
        with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=30) as response:
            return data_lines(response)


def start(temp: Path, *options: str, **more: Any) -> Running:
    return launch(temp, *options, FAKE_TOKENIZER="1", **more)


# clients


def test_a_stream_that_is_left_is_aborted(server: Running) -> None:
    before = server.num_aborts()
    body = {"prompt": "SLOW", "n": 3, "stream": True, "max_tokens": 2000}
    with httpx.stream("POST", server.url + "/v1/completions", json=body) as response:
        next(response.iter_lines())
    assert eventually(lambda: server.num_aborts() == before + 3)
    assert eventually(lambda: num_running(server.url) == 0)


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_gives_up_waiting_is_aborted(server: Running, path: str) -> None:
    before = server.num_aborts()

    def give_up() -> None:
        with httpx.stream("POST", server.url + path, json=LONG | {"prompt": "SLOW"}, timeout=0.15) as response:
            next(response.iter_raw())
            raise httpx.ReadTimeout("the answer has begun")

    with pytest.raises(httpx.ReadTimeout):
        give_up()
    assert eventually(lambda: server.num_aborts() == before + 1)
    assert eventually(lambda: num_running(server.url) == 0)


def test_a_reader_that_stalls_and_leaves_is_aborted(server: Running) -> None:
    before = server.num_aborts()
    body = json.dumps({"prompt": ["Hi"] * 4, "n": 4, "max_tokens": 1900, "logprobs": 20, "stream": True}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        s.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}".encode() + body)
        assert eventually(lambda: num_running(server.url) == 16)
    assert eventually(lambda: server.num_aborts() == before + 16)


def test_the_engine_stops_at_a_stop_string(server: Running, client: httpx.Client) -> None:
    before = server.num_aborts()
    answer = client.post("/generate", json={"prompt": "Hi", "parameters": {"stop": ["mat"]}}).json()
    assert answer["response"] == "The cat 🐈 sat on the "
    assert eventually(lambda: server.num_aborts() == before + 1)


def test_eight_clients_at_once(server: Running, client: httpx.Client) -> None:
    def ask(i: int) -> tuple[str, int]:
        prompt, length = "Hi " * 60 * i + "you", 1 + 37 * i
        if i % 3 == 0:
            answer = client.post("/generate", json={"prompt": prompt, "parameters": {"max_new_tokens": length}}).json()
            return answer["response"], answer["details"]["generated_tokens"]
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": length, "stream": i % 3 == 1}
        if i % 3 == 2:
            answer = client.post("/v1/completions", json=body).json()
            return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]
        body["stream_options"] = {"include_usage": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            *chunks, usage, done = data_lines(response)
        assert done == "[DONE]"
        return "".join(json.loads(c)["choices"][0]["text"] for c in chunks), json.loads(usage)["usage"][
            "completion_tokens"
        ]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert [count for _, count in answers] == [1 + 37 * i for i in range(8)]
    assert all(text and TEXT.startswith(text.rstrip("\ufffd")) for text, _ in answers)
    assert eventually(lambda: num_running(server.url) == 0)


# signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_requests_running(tmp_path: Path, number: signal.Signals) -> None:
    # once with everything as it is in earnest
    launcher = launch if number == signal.SIGINT else start
    options = ("--api-key", "key", "--drain-timeout", "2")
    running = launcher(tmp_path, *options, FAKE_ENGINE_STEP_SECONDS="0.05").wait_ready()
    refused = httpx.post(running.url + "/generate", json=LONG)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    with httpx.Client(base_url=running.url, headers={"Authorization": "Bearer key"}, timeout=30) as client:
        with ThreadPoolExecutor(3) as pool:
            long = pool.submit(client.post, "/generate", json=LONG)
            short = pool.submit(client.post, "/generate", json={"prompt": "Hi", "parameters": {"max_steps": 10}})
            stream = pool.submit(client.post, "/v1/chat/completions", json={"messages": HELLO, "stream": True})
            assert eventually(lambda: num_running(running.url) == 3)
            assert running.stop(number) < 20
        assert short.result().json()["details"]["finish_reason"] == "length"  # there was time for this one
        check_cut(long.result())
        *_, last, done = data_lines(stream.result())
        assert (json.loads(last)["choices"][0]["finish_reason"], done) == ("abort", "[DONE]")
    assert running.process.returncode == 0
    assert running.is_gone()
    assert "Traceback" not in running.errors()


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    running = start(tmp_path, FAKE_ENGINE_STEP_SECONDS="0.05").wait_ready()
    with ThreadPoolExecutor(2) as pool:
        clients = Clients(pool, running)
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert running.stop(signal.SIGINT) < 20
        check_cut(clients.whole.result())
    assert running.is_gone()


def check_cut(response: httpx.Response) -> None:
    """An answer that was not finished does not look whole, and what there is of it is not lost."""
    assert (response.status_code, response.json()["error"]["code"]) == (503, "cut")
    partial = response.json()["partial"]
    assert partial["details"]["finish_reason"] == "abort"
    assert partial["response"]
    assert TEXT.startswith(partial["response"].rstrip("\ufffd"))


def test_sigterm_finishes_what_runs(tmp_path: Path) -> None:
    running = start(tmp_path).wait_ready()
    assert httpx.get(running.url + "/ready").status_code == 200
    pause = running.pids.with_name("pause")
    pause.touch()
    with ThreadPoolExecutor(24) as pool:
        body = {"messages": HELLO, "stream": True, "max_tokens": 200}
        url = running.url + "/v1/chat/completions"
        streams = [pool.submit(httpx.post, url, json=body, timeout=30) for _ in range(24)]
        assert eventually(lambda: num_running(running.url) == 24)
        running.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: httpx.get(running.url + "/ready").status_code == 503)
        assert httpx.get(running.url + "/health").status_code == 200
        refused = httpx.post(running.url + "/generate", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert refused.headers["Retry-After"]
        pause.unlink()
        for stream in streams:
            *_, last, done = data_lines(stream.result())
            assert (json.loads(last)["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
    assert running.process.wait(60) == 0
    assert running.is_gone()


def test_a_stuck_engine_does_not_keep_it(tmp_path: Path) -> None:
    running = start(tmp_path, "--drain-timeout", "1").wait_ready()
    running.kill_engine(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(Clients.ask, running.url)
        time.sleep(0.2)
        assert running.stop(signal.SIGTERM) < 20
        with contextlib.suppress(httpx.TransportError):
            assert answer.result().status_code >= 500
    assert running.is_gone()


def test_a_signal_while_it_starts(tmp_path: Path) -> None:
    running = start(tmp_path, FAKE_ENGINE_START_SECONDS="60")
    assert eventually(lambda: bool(list(running.pids.iterdir())))
    assert running.stop(signal.SIGINT) < 20
    assert running.is_gone()
    assert "Traceback" not in running.errors()


# ends that nobody asked for


@pytest.fixture(scope="module")
def restarting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose engines come to an end and are replaced."""
    options = ("--watchdog", "2", "--max-restarts", "100")
    running = start(tmp_path_factory.mktemp("restarting"), *options, FAKE_ENGINE_STEP_SECONDS="0.004").wait_ready()
    yield running
    assert running.stop(signal.SIGTERM) < 20
    assert running.is_gone()


def check_whole(clients: Clients) -> None:
    """The texts are as if nothing had happened."""
    tokenizer, answer = Tokenizer(LightTokenizer()), clients.whole.result().json()
    tokens, room = tokenizer.encode(TEXT), 2048 - len(tokenizer.encode_chat(Conversation(HELLO)))
    assert answer["details"]["generated_tokens"] == 2000
    assert answer["response"] == tokenizer.decode(tokens[:2000])
    assert streamed(clients.stream.result()) == (tokenizer.decode(tokens[:room]), "length")


def streamed(lines: list[str]) -> tuple[str, str]:
    """The text of a stream, and why it ended."""
    *chunks, done = lines
    assert done == "[DONE]"
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    return "".join(choice["delta"].get("content") or "" for choice in choices), choices[-1]["finish_reason"]


def metric(running: Running, name: str) -> int:
    lines = httpx.get(running.url + "/metrics").text.splitlines()
    return int(float(next(line for line in lines if line.startswith(f"manyheads_{name}_total")).split()[1]))


def counts(running: Running) -> tuple[int, int]:
    """Restarts, and requests that went on in another engine."""
    return metric(running, "engine_restarts"), metric(running, "requests_resumed")


def test_answers_survive_the_engine(restarting: Running) -> None:
    restarts, resumed = counts(restarting)
    hold = restarting.pids.with_name("hold")
    with ThreadPoolExecutor(2) as pool:
        clients = Clients(pool, restarting)
        hold.touch()
        restarting.kill_engine()
        assert eventually(lambda: httpx.get(restarting.url + "/health").json()["status"] == "restarting")
        assert httpx.get(restarting.url + "/ready").status_code == 503
        hold.unlink()
        check_whole(clients)
    assert counts(restarting) == (restarts + 1, resumed + 2)
    assert httpx.get(restarting.url + "/ready").status_code == 200
    assert "the engine process ended by signal 9 (out of memory?); starting another" in restarting.errors()


def test_a_stopped_engine_is_replaced(restarting: Running) -> None:
    restarts, resumed = counts(restarting)
    with ThreadPoolExecutor(2) as pool:
        clients = Clients(pool, restarting)
        restarting.kill_engine(signal.SIGSTOP)
        check_whole(clients)
    assert counts(restarting) == (restarts + 1, resumed + 2)
    assert "the engine did nothing for 2 s" in restarting.errors()


def test_an_engine_that_stood_still_with_its_server_is_not_replaced(restarting: Running) -> None:
    restarts = counts(restarting)
    with ThreadPoolExecutor(2) as pool:
        clients = Clients(pool, restarting)
        engine = restarting.engine_pid()
        os.kill(engine, signal.SIGSTOP)
        restarting.process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        restarting.process.send_signal(signal.SIGCONT)
        time.sleep(0.3)  # it goes on with a long step
        os.kill(engine, signal.SIGCONT)
        check_whole(clients)
    assert counts(restarting) == restarts


def test_an_idle_engine_that_stops_is_replaced(restarting: Running) -> None:
    restarts = metric(restarting, "engine_restarts")
    time.sleep(2.5)  # an engine with nothing to do is alive
    assert metric(restarting, "engine_restarts") == restarts
    restarting.kill_engine(signal.SIGSTOP)
    assert eventually(lambda: metric(restarting, "engine_restarts") == restarts + 1)
    assert httpx.get(restarting.url + "/ready").status_code == 200


def test_a_request_that_kills_engines_is_given_up(restarting: Running) -> None:
    running, restarts = restarting, metric(restarting, "engine_restarts")
    crash = httpx.post(running.url + "/generate", json=LONG | {"prompt": "CRASH"}, timeout=30)
    assert (crash.status_code, crash.json()["error"]["code"]) == (503, "engine_unavailable")
    assert "2 times in a row while this request ran: RuntimeError: the fake engine was told" in crash.text
    answer = Clients.ask(running.url, max_new_tokens=30)
    assert (answer.status_code, answer.json()["details"]["generated_tokens"]) == (200, 30)
    assert metric(running, "engine_restarts") == restarts + 2
    assert "Traceback" in running.errors()  # of the engine, for whoever mends it


def test_engines_that_go_on_dying_end_the_server(tmp_path: Path) -> None:
    running = start(tmp_path, "--max-restarts", "1", FAKE_ENGINE_STEP_SECONDS="0.05").wait_ready()
    with ThreadPoolExecutor(2) as pool:
        clients = Clients(pool, running)
        running.kill_engine()
        assert eventually(lambda: metric(running, "engine_restarts") == 1)
        running.kill_engine()
        check_engine_died(clients.whole, clients.stream, "the engine process ended by signal 9")
    assert running.process.wait(60) == 1
    assert "manyheads: error: the engine has stopped: the engine process ended by signal 9" in running.errors()
    assert running.is_gone()


def check_engine_died(whole: Future[httpx.Response], stream: Future[list[str]], reason: str) -> None:
    response = whole.result()
    assert response.status_code == 503
    assert response.headers["Retry-After"]
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "engine_unavailable")
    assert reason in error["message"]
    *_, last, done = stream.result()
    assert done == "[DONE]"
    assert reason in json.loads(last)["error"]["message"]


def test_the_server_is_killed(tmp_path: Path) -> None:
    running = start(tmp_path, FAKE_ENGINE_STEP_SECONDS="0.05").wait_ready()
    with ThreadPoolExecutor(2) as pool:
        clients = Clients(pool, running)
        running.stop(signal.SIGKILL)
        assert running.is_gone()  # the engine notices
        for client in (clients.whole, clients.stream):
            assert isinstance(client.exception(), httpx.TransportError)


def test_nobody_reads_its_standard_error_any_more(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stderr")
    reader = os.open(tmp_path / "stderr", os.O_RDONLY | os.O_NONBLOCK)
    running = start(tmp_path, FAKE_ENGINE_STEP_SECONDS="0.004").wait_ready()
    os.close(reader)  # as `manyheads serve 2>&1 | tee log` has it, where Ctrl-C ends tee, too
    with ThreadPoolExecutor(2) as pool:
        clients = Clients(pool, running)
        running.kill_engine()  # which the server tells
        assert eventually(lambda: metric(running, "engine_restarts") == 1)
        assert running.stop(signal.SIGTERM) < 20  # and that it waits for requests
        check_whole(clients)
    assert running.is_gone()


# starts that fail


def test_the_engine_refuses_to_start(tmp_path: Path) -> None:
    running = start(tmp_path, FAKE_ENGINE_ERROR="heads do not fit; take others")
    assert running.process.wait(60) == 2
    assert running.errors() == "manyheads: error: heads do not fit; take others\n"
    assert running.is_gone()


def test_port_taken(tmp_path: Path) -> None:
    with _bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        running = start(tmp_path, port=port)
        assert running.process.wait(60) == 2
    address = f"127.0.0.1:{port}"
    assert running.errors() == (
        f"manyheads: error: cannot listen on {address}: Address already in use; choose another --port or --host\n"
    )
    assert running.is_gone()


def test_connections_do_not_wait_to_fill_packets() -> None:
    """asyncio sets TCP_NODELAY on sockets that say that they speak TCP; 40 ms a reply otherwise."""
    with _bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("no.such.host.invalid", 8000), ("192.0.2.1", 8000)])
def test_no_such_address(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match=rf"cannot listen on {host}:{port}: .+; choose another --port or --host"):
        _bind(host, port)

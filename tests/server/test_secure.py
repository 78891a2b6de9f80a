"""Who may ask: addresses, keys and their limits, TLS, paths behind a proxy; and what the log says."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from manyheads.cli import main, make_parser
from manyheads.config import ConfigError
from manyheads.server import keys as keys_module
from manyheads.server.auth import Usage, needs_key
from manyheads.server.config import ServerConfig
from manyheads.server.errors import ApiError
from manyheads.server.keys import Key, Keys, hash_key, parse_keys
from manyheads.server.logs import LineFormatter, RequestLog
from tests.server.conftest import Running, launch, process_exists

BODY = {"prompt": "my secret", "parameters": {"max_new_tokens": 6}}


# addresses


def test_listens_on_this_machine_alone(server: Running) -> None:
    assert make_parser().parse_args(["serve"]).host == ServerConfig().host == "127.0.0.1"
    # the first version's client asks 0.0.0.0, which is this machine too
    assert httpx.get(server.url.replace("127.0.0.1", "0.0.0.0") + "/health").status_code == 200


@pytest.mark.parametrize(
    ("host", "key", "exposed"),
    [
        ("127.0.0.1", None, False),
        ("127.9.9.9", None, False),
        ("localhost", None, False),
        ("::1", None, False),
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("192.0.2.1", None, True),
        ("example.org", None, True),
        ("0.0.0.0", "key", False),
    ],
)
def test_another_address_wants_a_key(host: str, key: str | None, exposed: bool) -> None:
    assert ServerConfig(host=host, api_key=key).is_exposed == exposed


# keys


def write_keys(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_new_key(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["key", "alice"]) == 0
    out, err = capsys.readouterr()
    secret = err.split()[-1]
    assert secret not in out
    assert len(secret) > 40
    (key,) = parse_keys(write_keys(tmp_path / "keys", out))
    assert key.name == "alice"
    assert Keys(path=str(tmp_path / "keys")).find(secret.encode()) == key
    assert main(["key", "a b"]) == 2


def test_a_file_of_keys(tmp_path: Path) -> None:
    file = write_keys(
        tmp_path / "keys",
        "# who may ask",
        "",
        f"alice {hash_key('a')}",
        f"  bob\t{hash_key('b')}  max_requests=2 tokens_per_minute=1000  ",
    )
    keys = Keys("c", str(file))
    found = [keys.find(secret) for secret in (b"a", b"b", b"c", b"d", b"", b"\xff")]
    assert [key and key.name for key in found] == ["alice", "bob", "default", None, None, None]
    assert found[1] is not None
    assert (found[1].max_requests, found[1].tokens_per_minute) == (2, 1000)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("alice", "is not of the form"),
        ("alice secret", "is not of the form"),
        ("alice sha256:123", "is not of the form"),
        (f"al/ice {hash_key('x')}", "is not of the form"),
        (f"alice {hash_key('x')} max_requests=-1", "is not of the form"),
        (f"alice {hash_key('x')} max_requests", "is not of the form"),
        (f"alice {hash_key('x')} most=1", "no limit 'most'"),
        (f"alice {hash_key('x')} max_requests=0", "at least 1"),
        (f"bob {hash_key('x')}", "'bob' or its key is taken"),
        (f"alice {hash_key('b')}", "'alice' or its key is taken"),
        (f"default {hash_key('x')}", "'default' or its key is taken"),
    ],
)
def test_a_malformed_line(tmp_path: Path, line: str, reason: str) -> None:
    file = write_keys(tmp_path / "keys", f"bob {hash_key('b')}", line)
    with pytest.raises(ConfigError, match=f"line 2 of {file}.*{reason}"):
        ServerConfig(api_key="c", api_key_file=str(file)).check()
    with pytest.raises(ConfigError, match=r"cannot read the API keys in .*: No such file"):
        Keys(path=str(tmp_path / "none"))


def test_the_file_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(keys_module.time, "monotonic", lambda: now)
    file = write_keys(tmp_path / "keys", f"alice {hash_key('a')}")
    keys = Keys(path=str(file))
    write_keys(file, f"bob {hash_key('b')} max_requests=3")
    assert keys.find(b"a") is not None, "it is looked at once a second at most"
    now += 1.0
    assert keys.find(b"a") is None
    assert keys.find(b"b") is not None
    for change in (lambda: write_keys(file, "nonsense"), file.unlink):
        change()
        for _ in range(3):
            now += 1.0
            assert keys.find(b"b") is not None
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["the API keys remain what they were"] * 2
    write_keys(file, "")
    now += 1.0
    assert keys.find(b"b") is None, "an empty file admits nobody"


def test_tokens_per_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(keys_module.time, "monotonic", lambda: now)
    key = Key(name="alice", digest=b"", tokens_per_minute=600)  # ten a second
    usage = Usage(at=now)
    usage.check(key)
    usage.tokens += 599
    usage.check(key)
    usage.tokens += 101
    with pytest.raises(ApiError) as refusal:
        usage.check(key)
    assert (refusal.value.status, refusal.value.retry_after) == (429, 10)
    assert refusal.value.response().headers["retry-after"] == "10"
    now += 10.1
    usage.check(key)
    assert usage.tokens == pytest.approx(599)


def test_a_limit_that_comes_later_does_not_count_what_was_used_without() -> None:
    usage = Usage()
    for _ in range(100):
        usage.check(Key(name="alice", digest=b""))
        usage.tokens += 500
    usage.check(Key(name="alice", digest=b"", tokens_per_minute=600))


def test_open_paths() -> None:
    for path in ("/", "/health", "/ready"):
        assert not needs_key(path, True)
    for path in ("/version", "/docs", "/openapi.json", "/metrics", "/docs-files/swagger-ui.css"):
        assert not needs_key(path, False)
        assert needs_key(path, True)
    for path in ("", "*", "/v1/models", "/generate", "/docs-files", "/health/", "//health", "/docs/../generate"):
        assert needs_key(path, False)


# settings


def test_settings_that_cannot_hold(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    locked = tmp_path / "locked.pem"
    openssl("rsa", "-aes256", "-passout", "pass:secret", "-in", str(key), "-out", str(locked))
    for wrong, reason in (
        (ServerConfig(protect_info=True), "--protect-info needs a key"),
        (ServerConfig(root_path="llm"), "--root-path must begin with /"),
        (ServerConfig(root_path="/"), "--root-path must begin with / and not end with it"),
        (ServerConfig(ssl_keyfile=str(key)), "--ssl-keyfile needs --ssl-certfile"),
        (ServerConfig(ssl_certfile=str(tmp_path / "none")), "no TLS with the certificate .*none: .*No such file"),
        (ServerConfig(ssl_certfile=str(certificate)), "no TLS with the certificate"),
        (ServerConfig(ssl_certfile=str(key), ssl_keyfile=str(key)), "no TLS with the certificate"),
        (ServerConfig(ssl_certfile=str(certificate), ssl_keyfile=str(locked)), "no TLS with .*locked.pem"),
    ):
        with pytest.raises(ConfigError, match=reason):
            wrong.check()


def openssl(*options: str) -> None:
    subprocess.run(["openssl", *options], check=True, capture_output=True)


def make_certificate(folder: Path) -> tuple[Path, Path]:
    certificate, key = folder / "cert.pem", folder / "key.pem"
    names = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names, *files)
    return certificate, key


# a server with all of it


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("guarded")
    certificate, key = make_certificate(folder)
    keys = write_keys(
        folder / "keys",
        f"alice {hash_key('key-a')}",
        f"bob {hash_key('key-b')} max_requests=1",
        f"carol {hash_key('key-c')} tokens_per_minute=10",
    )
    options = ["--host", "0.0.0.0", "--api-key-file", str(keys), "--protect-info", "--root-path", "/llm"]
    options += ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--cors-origin", "*"]
    options += ["--access-log", "--log-format", "json"]
    running = launch(folder, *options, FAKE_TOKENIZER="1")
    running.url = running.url.replace("http", "https")
    trust = ssl.create_default_context(cafile=str(certificate))
    with httpx.Client(base_url=running.url, verify=trust) as client:
        deadline = time.monotonic() + 40
        while True:
            assert time.monotonic() < deadline, running.errors()
            try:
                assert client.get("/health").status_code == 200
                break
            except httpx.TransportError:
                time.sleep(0.05)
    yield running
    running.stop()
    assert process_exists(running.process.pid) is False
    errors = running.errors()
    assert "secret" not in errors
    assert "key-" not in errors
    assert "warning" not in errors.splitlines()[0], "it has keys"


@pytest.fixture
def ask(guarded: Running) -> Iterator[Callable[..., httpx.Response]]:
    trust = ssl.create_default_context(cafile=str(guarded.temp.with_name("cert.pem")))
    with httpx.Client(base_url=guarded.url, verify=trust, timeout=30) as client:

        def send(
            path: str, authorization: str | None = "Bearer key-a", body: Any = None, **headers: str
        ) -> httpx.Response:
            headers = {name.replace("_", "-"): value for name, value in headers.items()}
            headers |= {"Authorization": authorization} if authorization else {}
            return client.request("POST" if body else "GET", path, json=body, headers=headers)

        yield send


def lines_of(server: Running, request_id: str) -> list[dict[str, Any]]:
    """Return the lines of the log that a request caused, once the one about its end is there."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        lines = [json.loads(line) for line in server.errors().splitlines() if line.startswith("{")]
        found = [line for line in lines if line["request_id"] == request_id]
        if any(line["message"] == "request" for line in found):
            return found
        time.sleep(0.02)
    raise AssertionError(f"no line about {request_id}")


def test_bearer(ask: Callable[..., httpx.Response]) -> None:
    for fits in ("Bearer key-a", "bearer key-a", "BEARER  key-a", "Bearer key-b"):
        assert ask("/v1/models", fits).status_code == 200
    for wrong in (None, "key-a", "Bearer", "Bearer key-a2", "Basic key-a", "Bearer\tkey-a", "Bearer key-a key-b"):
        response = ask("/v1/models", wrong)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]


def test_protected_information(ask: Callable[..., httpx.Response]) -> None:
    for path in ("/metrics", "/openapi.json", "/docs", "/version", "/docs-files/swagger-ui.css"):
        assert ask(path, None).status_code == 401
        assert ask(path).status_code == 200
    for path in ("/", "/health"):
        assert ask(path, None).status_code == 200


def test_behind_a_proxy(ask: Callable[..., httpx.Response]) -> None:
    links = re.findall(r'(?:src|href)="([^"]+)"', ask("/docs").text)
    assert links
    for link in links:
        assert link.startswith("/llm/docs-files/")
        assert ask(link.removeprefix("/llm")).status_code == 200
    assert "url: '/llm/openapi.json'" in ask("/docs").text
    assert ask("/openapi.json").json()["servers"] == [{"url": "/llm"}]


def test_at_most_so_many_requests(guarded: Running, ask: Callable[..., httpx.Response]) -> None:
    slow = {"prompt": "SLOW", "parameters": {"max_new_tokens": 90}}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, "/generate", "Bearer key-b", slow)
        while "manyheads_num_requests_running 1.0" not in ask("/metrics").text:
            time.sleep(0.02)
        refused = ask("/generate", "Bearer key-b", BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_requests")
        assert int(refused.headers["retry-after"]) >= 1
        assert ask("/v1/models", "Bearer key-b").status_code == 200, "it is not counted"
        assert ask("/generate", "Bearer key-a", BODY).status_code == 200, "others have their own limits"
        assert first.result().status_code == 200
    assert ask("/generate", "Bearer key-b", BODY).status_code == 200


def test_at_most_so_many_tokens(ask: Callable[..., httpx.Response]) -> None:
    assert ask("/generate", "Bearer key-c", BODY).status_code == 200  # 6 tokens, and the prompt's
    refused = ask("/generate", "Bearer key-c", BODY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_tokens")
    assert 1 <= int(refused.headers["retry-after"]) <= 120


def test_request_ids_and_the_log(guarded: Running, ask: Callable[..., httpx.Response]) -> None:
    whole = ask("/generate", body=BODY, X_Request_Id="my-id/1", Origin="http://example.org")
    assert whole.headers["x-request-id"] == "my-id/1"
    assert "X-Request-Id" in whole.headers["access-control-expose-headers"]
    (line,) = lines_of(guarded, "my-id/1")
    details = whole.json()["details"]
    assert line == {
        "time": line["time"],
        "level": "info",
        "message": "request",
        "request_id": "my-id/1",
        "client": "alice",
        "address": "127.0.0.1",
        "method": "POST",
        "path": "/llm/generate",
        "status": 200,
        "seconds": line["seconds"],
        "prompt_tokens": details["prompt_tokens"],
        "output_tokens": details["generated_tokens"],
    }
    for path, body, status in (
        ("/generate_stream", BODY, 200),
        ("/generate", {"prompt": ""}, 400),
        ("/no/such%0A%22path'?key=secret", None, 404),
    ):
        answer = ask(path, body=body)
        assert answer.status_code == status
        (line,) = lines_of(guarded, answer.headers["x-request-id"])
        assert line["status"] == status
    for insane in ("", "a b", "x" * 129, "é".encode()):
        made = ask("/health", None, X_Request_Id=insane).headers["x-request-id"]  # type: ignore[arg-type]
        assert re.fullmatch("[0-9a-f]{32}", made)


def test_a_stream_that_nobody_reads_to_its_end(guarded: Running) -> None:
    trust = ssl.create_default_context(cafile=str(guarded.temp.with_name("cert.pem")))
    headers = {"Authorization": "Bearer key-a", "X-Request-Id": "left"}
    slow = {"prompt": "SLOW", "parameters": {"max_new_tokens": 2000}}
    with httpx.stream("POST", guarded.url + "/generate_stream", json=slow, headers=headers, verify=trust) as response:
        next(response.iter_lines())
    (line,) = lines_of(guarded, "left")
    assert line["status"] == 499
    assert 0 < line["output_tokens"] < 2000


# the form of the log


def formatted(log_format: str, message: str, error: Exception | None = None, **fields: Any) -> str:
    record = logging.LogRecord("x", logging.WARNING, "f", 1, message, (), (type(error), error, None) if error else None)
    record.created = 0.5
    record.fields = fields
    return LineFormatter(log_format).format(record)


def test_lines() -> None:
    assert formatted("text", "hello", a=1, b="x") == "1970-01-01T00:00:00.500+00:00 warning hello a=1 b=x"
    assert formatted("text", "hello", ValueError("no")).splitlines()[1:] == ["ValueError: no"]
    line = json.loads(formatted("json", "two\nlines", ValueError("no"), a=1))
    assert (line["message"], line["a"], line["exception"]) == ("two\nlines", 1, "ValueError: no")


def test_an_exception_has_the_id_of_its_request(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("broken")

    async def one_request() -> str:
        scope = {"type": "http", "headers": [(b"x-request-id", b"mine")], "method": "GET", "path": "/a b"}
        with pytest.raises(ValueError, match="broken"):
            await RequestLog(app, access_log=True)(scope, None, None)  # type: ignore[arg-type]
        return formatted("text", "while answering")  # as the web server does, in the same task

    with caplog.at_level(logging.INFO, "manyheads.access"):
        assert asyncio.run(one_request()).endswith("warning while answering request_id=mine")
    (record,) = caplog.records
    assert (record.fields["status"], record.fields["path"]) == (500, "/a%20b")  # type: ignore[attr-defined]

"""`manyheads chat --url`."""

from __future__ import annotations

import pytest

from manyheads.cli import main
from tests.server.conftest import Running
from tests.server.fake_engine import TEXT
from tests.test_cli import Capture, check, feed


def test_chat_with_a_server(capsys: Capture, monkeypatch: pytest.MonkeyPatch, server: Running) -> None:
    feed(monkeypatch, "hello\nFAIL\n")
    assert main(["chat", "--url", server.url + "/v1/", "--max-tokens", "9", "--stop", "zz", "--seed", "1"]) == 0
    out, err = capsys.readouterr()
    assert TEXT.startswith(out.strip().rstrip("\ufffd"))
    assert f"chatting with fake at {server.url}" in err
    assert "9 tokens" in err
    assert "error: told to fail" in err


def test_chat_with_something_else(capsys: Capture, server: Running) -> None:
    check(capsys, ["chat", "--url", server.url + "/metrics?x="], "answers, but not as this API does; is --url right?")

"""`manyheads bench` from its options to its report, against servers that do not answer as they should."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from manyheads.bench import record as reasons
from manyheads.bench import result
from manyheads.bench.report import setup
from manyheads.cli import main
from tests.bench.mock import Script, running

BROKEN = {
    "500": ("HTTP 500", "told to answer 500"),
    "429": ("HTTP 429", "told to answer 429"),
    "close": (reasons.CUT, ""),
    "cut": (reasons.CUT, ""),
    "never": (reasons.NO_ANSWER, "nothing for 1 s"),
    "stall": (reasons.STALLED, "nothing for 1 s"),
    "json": (reasons.MALFORMED, "{nonsense"),
    "line": (reasons.MALFORMED, "not a field of an event"),
    "plain": (reasons.MALFORMED, "not an event stream"),
    "error": (reasons.ERROR_EVENT, "told to fail"),
    "empty": (reasons.EMPTY, ""),
}
TEST = ["users", "--settle", "0", "--timeout", "1", "--no-limit", "--output-tokens", "5"]


def test_each_under_its_reason(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Good answers and all kinds of broken ones in turn: the run goes on, all are counted, the report says why."""
    argv = ["bench", *TEST, "--users", "8", "--hold", "3"]
    with running(Script(breaks=("", *BROKEN))) as url:
        assert main([*argv, "--url", url, "-o", str(tmp_path)]) == 0
    out, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    found = result.load(tmp_path)
    assert found.whole.completed > 0
    assert found.whole.failures.keys() == {reason for reason, _ in BROKEN.values()}
    assert found.whole.failed == sum(found.whole.failures.values())
    for reason, count in found.whole.failures.items():
        assert f"{count} × {reason}" in out
        assert f"<td>{reason}</td>" in page
    for reason, detail in BROKEN.values():
        assert detail in " ".join(found.details.get(reason, []))


def test_nobody_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert (
            main(["bench", *TEST, "--users", "1", "--hold", "1", "--no-check", "--url", url, "-o", str(tmp_path)]) == 1
        )
    found = result.load(tmp_path)
    assert set(found.whole.failures) == {reasons.UNREACHABLE}
    assert f"0 requests were answered and {found.whole.failed} failed" in capsys.readouterr().out


def test_the_generator_is_the_bottleneck(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A server whose answers cost less to write than to read: the figures are those of the load generator."""
    argv = ["users", "--users", "16", "--hold", "1", "--settle", "0.5", "--output-tokens", "500"]
    with running(Script(ttft=0.0, chunks=500, at_once=True)) as url:
        assert main(["bench", *argv, "--url", url, "-o", str(tmp_path)]) == 0
    found = result.load(tmp_path)
    assert found.levels[0].generator.bound
    assert found.limit["chunks_per_s"] > 1000
    assert "the generator's limit" in dict(setup(found))
    assert "The load generator was the bottleneck at 16 users" in capsys.readouterr().out

"""What the generator counts, against a server with known answers. How exact its times are: benchmarks/bench_mock.py."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from manyheads.bench import record as reasons
from manyheads.bench.drive import Outcome, drive, write_questions
from manyheads.bench.plan import BenchError, Event, Question, Run, Stage
from tests.bench.mock import Script, running


def run(folder: Path, url: str, stages: list[Stage], seen: list[Event] | None = None, **more: Any) -> Outcome:
    write_questions(
        [Question({"prompt": "x", "max_tokens": 5}, at) for at in more.pop("at", [None])], folder / "questions.jsonl"
    )
    given: dict[str, Any] = {"kind": "users", "path": "/v1/completions", "timeout": 30.0, "drain": 5.0} | more
    files = {"questions": str(folder / "questions.jsonl"), "records": str(folder / "records.jsonl")}
    return drive(Run(url=url, stages=stages, **files | given), folder, None, (seen if seen is not None else []).append)


def test_tokens_and_chunks(tmp_path: Path) -> None:
    seen: list[Event] = []
    with running(Script(tokens_per_chunk=3)) as url:
        outcome = run(tmp_path, url, [Stage(1.0, 1.0), Stage(3.0, 1.0, 1.0)], seen)
    assert outcome.records
    assert {(len(r.chunks), r.tokens, r.prompt_tokens, r.counted_by, r.reason) for r in outcome.records} == {
        (5, 15, 7, "usage", None)
    }
    for r in outcome.records:
        assert r.ttft is not None
        assert r.tpot is not None
        assert 0.015 < r.ttft < 1.0
        assert 0.0 < r.tpot < 1.0
    begin, end = outcome.window(1)
    assert 0.5 < end - begin < 4.0
    assert outcome.window(0)[1] < begin
    progress = [event for event in seen if event.kind == "progress"]
    assert max(event.users for event in progress) == 3
    # a user that has not heard yet that the run is over sends one more, which is not of the load
    assert 0 <= progress[-1].done - len(outcome.records) <= 3
    assert progress[-1].tokens == 15 * progress[-1].done


def test_tokens_without_usage(tmp_path: Path) -> None:
    with running(Script(usage=False, tokens_per_chunk=2)) as url:
        told = run(tmp_path, url, [Stage(1.0, 1.0)], max_tokens=10, path="/v1/chat/completions")
    assert {(r.tokens, r.counted_by) for r in told.records} == {(10, "max_tokens")}


BROKEN = {
    "500": "HTTP 500",
    "429": "HTTP 429",
    "cut": reasons.CUT,
    "close": reasons.CUT,
    "never": reasons.NO_ANSWER,
    "stall": reasons.STALLED,
    "json": reasons.MALFORMED,
    "line": reasons.MALFORMED,
    "plain": reasons.MALFORMED,
    "error": reasons.ERROR_EVENT,
    "empty": reasons.EMPTY,
}


def test_failures_by_reason(tmp_path: Path) -> None:
    """Good answers and each kind of broken one in turn; the run goes on to its end."""
    expected = [None, None, *BROKEN.values()]
    with running(Script(breaks=("", "stop", *BROKEN))) as url:
        at = [i * 0.1 for i in range(len(expected))]
        outcome = run(tmp_path, url, [Stage(1.0, at[-1] + 0.5)], kind="trace", at=at, timeout=1.0)
    records = sorted(outcome.records, key=lambda r: r.sent)
    assert [r.reason for r in records] == expected
    assert (records[1].tokens, records[1].counted_by) == (3, "chunks")
    assert records[2].detail == "told to answer 500"
    gone = run(tmp_path, url, [Stage(2.0, 1.0)])
    assert {r.reason for r in gone.records} == {reasons.UNREACHABLE}
    assert len(gone.records) <= 10  # users pause after a failure


def test_arrivals(tmp_path: Path) -> None:
    """An open loop does not wait for answers; 60 a second are 60 in a second, give or take five standard deviations."""
    with running(Script(ttft=0.3, chunks=1)) as url:
        outcome = run(tmp_path, url, [Stage(60.0, 1.0)], kind="rate", seed=1)
    assert 21 < len(outcome.records) < 99
    assert all(r.ok and r.due is not None and r.sent >= r.due for r in outcome.records)


def test_a_trace(tmp_path: Path) -> None:
    with running(Script()) as url:
        outcome = run(tmp_path, url, [Stage(2.0, 1.5)], kind="trace", at=[0.0, 1.0, 0.4, 2.0])
    start = min(r.due or 0.0 for r in outcome.records)
    assert sorted(round((r.due or 0.0) - start, 3) for r in outcome.records) == [0.0, 0.2, 0.5, 1.0]


def test_unfinished_requests_are_no_failures(tmp_path: Path) -> None:
    with running(Script(ttft=60.0)) as url:
        outcome = run(tmp_path, url, [Stage(2.0, 1.0)], timeout=60.0, drain=0.5)
        arrivals = run(tmp_path, url, [Stage(5.0, 1.0)], timeout=60.0, drain=0.5, kind="rate")
    assert [r.reason for r in outcome.records] == [reasons.UNFINISHED] * 2
    assert {r.reason for r in arrivals.records} == {reasons.UNFINISHED}
    assert not any(r.failed for r in outcome.records)


def test_workers(tmp_path: Path) -> None:
    """Two processes make the load; their records come together, none twice."""
    with running(Script()) as url:
        outcome = run(tmp_path, url, [Stage(30.0, 1.0)], kind="rate", workers=2)
    assert {use.worker for use in outcome.uses} == {0, 1}
    assert len({r.sent for r in outcome.records}) == len(outcome.records) > 9
    assert all(r.ok for r in outcome.records)


def test_workers_of_other_machines(tmp_path: Path) -> None:
    """Two processes join by the address alone, and go when the run is over. Their clocks are wrong by 1000 s, which
    nobody notices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    program = "import runpy, time\nright = time.perf_counter\ntime.perf_counter = lambda: right() + 1000\n"
    program += "runpy.run_module('manyheads.bench.generator', run_name='__main__')"
    command = [sys.executable, "-c", program, "--join", address]
    workers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    try:
        with running(Script()) as url:
            outcome = run(tmp_path, url, [Stage(30.0, 1.0)], kind="rate", workers=2, bind=address)
        assert [worker.wait(20) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    assert {use.worker for use in outcome.uses} == {0, 1}
    assert len(outcome.records) > 9
    assert all(r.ok for r in outcome.records)
    begin, end = outcome.window(0)
    assert all(begin - 0.5 < r.sent < end + 0.5 for r in outcome.records)


def test_a_generator_that_fails(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(BenchError, match="the load generator failed"):
        run(tmp_path, "http://127.0.0.1:1", [Stage(1.0, 1.0)], records=str(tmp_path / "x"))


def test_nothing_is_left_when_it_is_ended(tmp_path: Path) -> None:
    """Ending the generator ends its workers."""
    write_questions([Question({"prompt": "x"})], tmp_path / "questions.jsonl")
    files = {"questions": str(tmp_path / "questions.jsonl"), "records": str(tmp_path / "records.jsonl")}
    plan = Run(
        url="http://127.0.0.1:1", path="/v1/completions", kind="users", stages=[Stage(2.0, 60.0)], workers=2, **files
    )
    (tmp_path / "run.json").write_bytes(msgspec.json.encode(plan))
    command = [sys.executable, "-m", "manyheads.bench.generator", str(tmp_path / "run.json")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert b"stage" in process.stdout.readline()
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.terminate()
    assert process.wait(20) == 143
    process.stdout.close()
    assert not [worker for worker in workers if worker.is_running()]

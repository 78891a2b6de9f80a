"""`manyheads bench` from its options to its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from manyheads.bench import prompts, result
from manyheads.bench.plan import BenchInputError, Question
from manyheads.bench.prompts import Workload, prepare
from manyheads.bench.server import Target, clean_url
from manyheads.bench.watch import gpu_bytes, listener, resident, visible_gpus
from manyheads.cli import main, make_parser
from manyheads.cli.bench import bench_options
from tests.bench.mock import Script, running

Capture = pytest.CaptureFixture[str]


def options(*argv: str) -> Any:
    return bench_options(make_parser().parse_args(["bench", *argv]))


def test_the_first_versions_test() -> None:
    first = options("first")
    assert [(s.load, s.seconds, s.settle) for s in first.stages()] == [*((n, 10, 0) for n in (1, 2, 3, 4)), (5, 110, 0)]
    assert sum(stage.seconds for stage in first.stages()) == 150
    assert (first.work.prompt_tokens, first.work.output_tokens, first.work.natural) == (7, 100, False)


def test_loads() -> None:
    assert [s.load for s in options("users", "--users", "8,1,2").stages()] == [1, 2, 8]
    assert options("rate").loads == ()
    assert options("rate", "--rates", "0.5,3").loads == (0.5, 3)
    assert [s.load for s in options("--users", "3", "--ramp", "5", "--hold", "9").stages()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["rate", "--users", "3"], "--users is for `manyheads bench users`, not for rate"),
        (["users", "--users", "1,x"], "'1,x' are no numbers"),
        (["users", "--users", "0.5"], "loads must be whole numbers above 0"),
        (["users", "--users", ","], "loads must be whole numbers above 0"),
        (["rate", "--rates", "-1"], "loads must be above 0"),
        (["rate", "--rates", "nan"], "loads must be above 0"),
        (["--hold", "0"], "--hold must be above 0"),
        (["--hold", "nan"], "--hold must be above 0"),
        (["--prompt-tokens", "0"], "--prompt-tokens must be above 0"),
        (["--workers", "3", "--users", "2"], "--workers 3 are more than the 2 users"),
        (["trace"], "a trace needs --prompts FILE"),
        (["--bind", "0.0.0.0:5557"], "--bind needs --workers"),
        (["--bind", "nonsense", "--workers", "1", "--url", "http://127.0.0.1:1"], "'nonsense' is no address"),
        (["--join", "here:99999"], "'here:99999' is no address"),
        (["--body", "{"], "--body is no JSON"),
        (["--body", "[]"], "--body must be a JSON object"),
        (["--body", '{"stream": false}'], "--body cannot set stream"),
        (["--url", "http://127.0.0.1:1", "--serve", "--tree-size 2"], "--serve is for servers that are started here"),
        (["--url", "nonsense"], "'nonsense' is no URL"),
        (["--url", "http://127.0.0.1:1"], "no answer from http://127.0.0.1:1"),
        (["--compare", "nowhere", "there"], "cannot read nowhere"),
        (["--compare", "nowhere"], "two reports or more"),
        (["sers"], "invalid choice: 'sers'"),
    ],
)
def test_wrong_options(capsys: Capture, argv: list[str], words: str) -> None:
    try:
        status = main(["bench", *argv])
    except SystemExit as ended:
        status = int(ended.code or 0)
    assert status in (1, 2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in line
    assert words in line


def test_a_whole_test(capsys: Capture, tmp_path: Path) -> None:
    """Against a server that is there; every third answer is broken."""
    argv = ["bench", "users", "--users", "2", "--hold", "1", "--settle", "0.5", "--no-limit", "--output-tokens", "5"]
    with running(Script(tokens_per_chunk=2, breaks=("", "", "500"))) as url:
        assert main([*argv, "--url", f"{url}/v1/", "--name", "mock", "-o", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "× HTTP 500" in out
    assert f"report: {tmp_path}/report.html" in out
    found = result.load(tmp_path)
    (level,) = found.levels
    assert (found.name, level.load, level.prompt_tokens, level.output_tokens) == ("mock", 2, 7, 10)
    assert (level.tokens_per_chunk, level.tokens_per_step) == (2, None)
    assert set(found.whole.failures) == {"HTTP 500"}
    assert found.details == {"HTTP 500": ["told to answer 500"]}
    assert found.memory[0].host is not None  # of the process that listens there
    assert found.whole.generator.cpu is not None


def test_rates_until_overload(capsys: Capture, tmp_path: Path) -> None:
    """The server answers 9 s late, so that within the window no load is kept up with."""
    argv = ["bench", "rate", "--rates", "40,80", "--hold", "2", "--settle", "0.1", "--drain", "0.5", "--no-limit"]
    with running(Script(ttft=9.0)) as url:
        assert main([*argv, "--url", url, "-o", str(tmp_path)]) == 1
    found = result.load(tmp_path)
    assert [(level.load, level.overloaded, level.completed) for level in found.levels] == [(40.0, True, 0)]
    assert found.levels[0].unfinished > 0
    assert "The load generator" in capsys.readouterr().out


def target() -> Target:
    return Target("http://127.0.0.1:1", "m")


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "max_tokens": 3, "at": 0.5}\n\n{"prompt": [1, 2], "id": "x"}\n')
    questions, _ = prepare(Workload(file=file, output_tokens=9, extra={"top_p": 0.5}), target(), None)
    assert [(q.body["prompt"], q.body["max_tokens"], q.at) for q in questions] == [("a", 3, 0.5), ([1, 2], 9, None)]
    assert all(q.body["ignore_eos"] and q.body["stream"] and q.body["top_p"] == 0.5 for q in questions)
    file.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n{"prompt": "b"}')
    questions, _ = prepare(Workload(file=file, chat=True, natural=True), target(), None)
    assert [q.body["messages"][0]["content"] for q in questions] == ["hi", "b"]
    assert "ignore_eos" not in questions[0].body


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no prompt"),
        ('{"prompt": "a"}\n{"prompt"', "line 2: Input data was truncated"),
        ('{"prompt": "a", "x": 1}', "line 1: Object contains unknown field `x`"),
        ("{}", "line 1: needs either `prompt` or `messages`"),
        ('{"messages": []}', "line 1: `messages` need --chat"),
        ('{"prompt": "a", "at": -1}', "line 1: `at` must be seconds"),
        ('{"prompt": "a", "max_tokens": 0}', "line 1: max_tokens must be 1 or more"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(text)
    with pytest.raises(BenchInputError, match=words.replace("(", r"\(")):
        prepare(Workload(file=file), target(), None)
    with pytest.raises(BenchInputError, match="cannot read"):
        prepare(Workload(file=tmp_path / "none"), target(), None)


def test_prompts_of_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(url: str, body: Any = None, api_key: str | None = None) -> Any:
        assert url.endswith("/tokenize")
        return {"tokens": list(range(len(body["prompt"].split())))}

    questions, notes = prepare(Workload(prompt_tokens=50), target(), None)  # nobody there to count tokens
    assert all(len(q.body["prompt"].split()) == 38 for q in questions)
    assert "prompts have 38 words" in notes[0]
    monkeypatch.setattr(prompts, "get", get)
    for count in (7, 300):
        questions, notes = prepare(Workload(prompt_tokens=count), target(), None)
        assert [len(q.body["prompt"]) for q in questions] == [count] * prompts.COUNT
        assert notes == []


def test_urls() -> None:
    for url in ("http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"):
        assert clean_url(url) == "http://a:1"
    for url in ("", "a:1", "ftp://a", "http://", "http://a:port"):
        with pytest.raises(BenchInputError):
            clean_url(url)


def test_processes_that_are_gone() -> None:
    assert resident(2**22 + 1) is None
    assert listener("http://example.org") is None
    assert listener("http://127.0.0.1:1") is None


def test_the_memory_of_the_servers_own_gpus(tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\ncase \"$*\" in *--id=1*) echo 700;; *) printf '500\\n700\\n';; esac\n")
    tool.chmod(0o755)
    others = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    for env, expected in ((others | {"CUDA_VISIBLE_DEVICES": "1"}, 700), (others, 1200)):
        command = [sys.executable, "-c", "print(flush=True); input()"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as server:
            assert server.stdout is not None
            server.stdout.readline()  # NOTE: the kernel does not show the environment of a program that just begins
            assert gpu_bytes(str(tool), visible_gpus(server.pid)) == expected * 2**20
            server.communicate(b"\n")
    assert visible_gpus(2**22 + 1) is None
    assert gpu_bytes(str(tmp_path / "nothing")) is None


def test_requests_are_json() -> None:
    question = Question(Workload().body(target(), "x", None, None))
    assert json.loads(json.dumps(question.body))["stream_options"] == {"include_usage": True}

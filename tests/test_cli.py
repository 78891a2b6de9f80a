"""The command: help, advice, exit statuses, and what `generate` and `chat` do with their input."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from manyheads import LLM, EngineConfig
from manyheads.cli import main, make_parser
from manyheads.cli.parser import engine_config
from manyheads.config import CheckpointError
from manyheads.errors import EngineError
from tests.server.fake_engine import TEXT, FakeEngine
from tests.server.tiny_tokenizer import tiny_tokenizer

COMMANDS = ("serve", "chat", "generate")
Capture = pytest.CaptureFixture[str]


def ends(*argv: str) -> int:
    """The exit status, however it ends."""
    try:
        return main(argv)
    except SystemExit as end:
        return int(end.code or 0)


def check(capsys: Capture, argv: list[str], *words: str) -> None:
    """It ends with status 2 and one line that says what is wrong and what to do."""
    assert ends(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *_, line = err.splitlines()
    assert line.startswith("manyheads")
    assert ": error: " in line
    for word in words:
        assert word in line
    assert "Traceback" not in err


# help and advice


def test_help(capsys: Capture) -> None:
    assert ends("--help") == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    assert ends() == 2
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_commands(capsys: Capture, command: str) -> None:
    assert ends(command, "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: manyheads {command}" in text
    assert f"example: manyheads {command}" in text
    for option in ("--chat-template", "--no-speculative", "--max-num-seqs", "--tree-size", "--debug"):
        assert option in text
    assert "(default: 16)" in text
    assert "(default: 64 on a CPU, 256 on a GPU)" in " ".join(text.split())
    assert "None" not in text


def test_help_is_quick() -> None:
    code = "import sys; from manyheads.cli import main\ntry: main(['serve', '--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'transformers', 'fastapi', 'zmq'} & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_version(capsys: Capture) -> None:
    assert ends("--version") == 0
    assert capsys.readouterr().out.startswith("manyheads 0.")


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_option(capsys: Capture, command: str) -> None:
    check(capsys, [command, "--max-num-seq", "3"], "unknown option --max-num-seq; did you mean --max-num-seqs")
    check(capsys, [command, "--max-num-seq=3"], "did you mean --max-num-seqs")
    check(capsys, [command, "--zzz"], f"unknown option --zzz; see manyheads {command} --help")
    check(capsys, [command, "one", "two"], f"unknown argument two; see manyheads {command} --help")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["serv"], ["unknown command 'serv'; did you mean serve?"]),
        (["zzz"], ["unknown command 'zzz'; there are: serve, chat, generate"]),
        (["--prot"], ["unknown option --prot; see manyheads --help"]),
        (["serve", "--port"], ["--port: expected one argument; see manyheads serve --help"]),
        (["serve", "--port", "http"], ["--port: invalid int value: 'http'; see manyheads serve --help"]),
        (["serve", "--port", "70000"], ["cannot listen on 127.0.0.1:70000", "choose another --port"]),
        (["serve", "--quantization", "int3"], ["quantization must be one of none, int8, fp8, int4", "not 'int3'"]),
        (["serve", "--dtype", "int4"], ["dtype must be auto, float32, bfloat16 or float16, not 'int4'"]),
        (["serve", "--memory", "15G"], ["--memory: '15G' is no size; write it like 15GiB, 500MiB or 16GB"]),
        (["serve", "--memory", "0"], ["memory_bytes must be at least 1, not 0"]),
        (["generate", "--memory", "1MiB", __file__], ["a memory of 1 MiB is too little: ", "weights 33 MiB"]),
        (["deploy", "--config", "--replicas", "-1"], ["scaling.replicas: ", "greater than or equal to 0"]),
        (["deploy", "--config", "--replicas", "0"], ["replicas must be at least 1 where they do not follow the load"]),
        (["deploy", "--config", "--replicas", "4", "--most-replicas", "2"], ["replicas must be at most 2, ", "not 4"]),
        (["deploy", "--replicas", "1", "--most-replicas", "4", "--least-replicas", "2"], ["must be at least 2, "]),
        (["deploy", "--config", "--tool-parser", "no"], ["--tool-parser must be hermes", "not 'no'"]),
        (["serve", "--tree-size", "100"], ["tree_size must be between 1 and 64"]),
        (["chat", "--temperature", "nan"], ["temperature must be between 0 and 100, not nan"]),
        (["chat", "--acceptance", "most"], ["acceptance must be exact or typical, not 'most'"]),
        (["chat", "--url", "http://127.0.0.1:1"], ["no answer from http://127.0.0.1:1", "is the server running?"]),
        (["chat", "--url", "nonsense"], ["no answer from nonsense"]),
        (["generate", "--n", "1000000", "/dev/null"], ["n must be between 1 and 64"]),
        (["generate", "no-such-file.txt"], ["cannot read no-such-file.txt", "give a file, or - for standard input"]),
        (["generate", "/dev/null"], ["the input holds no prompt"]),
        (["generate", "--json-schema", "nowhere.json", "-"], ["--json-schema: cannot read nowhere.json"]),
        (["generate", "--regex", "", "-"], ["grammar of kind regex: the value is empty"]),
        (["generate", "--format", "xml", "x"], ["invalid choice: 'xml'", "jsonl", "see manyheads generate --help"]),
    ],
)
def test_wrong_input(capsys: Capture, argv: list[str], words: list[str]) -> None:
    check(capsys, argv, *words)


@pytest.mark.parametrize("command", COMMANDS)
def test_sizes(command: str) -> None:
    config = engine_config(make_parser().parse_args([command, "--memory", "1.5 GiB", "--kv-cache-bytes", "200MB"]))
    assert (config.memory_bytes, config.kv_cache_bytes) == (3 * 2**29, 200 * 10**6)


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_unknown_model(capsys: Capture, command: str, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a")
    argv = ["chat", "nowhere"] if command == "chat" else ["generate", str(tmp_path / "in.txt"), "--model", "nowhere"]
    check(capsys, argv, "'nowhere' is no folder; give a local folder, a hub id (name/model) or 'builtin'")


def test_serving_an_unknown_model(tmp_path: Path) -> None:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "manyheads", "serve", "--port", "0", "no-such/model"]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith("manyheads: error: ")
    assert "'no-such/model' is no local folder and could not be had from the hub" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("manyheads-*"))


@pytest.mark.parametrize(
    ("error", "status"),
    [(CheckpointError("no Medusa heads here"), 2), (EngineError("it died"), 1), (OSError("disk full"), 1)],
)
def test_exit_status(capsys: Capture, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr("manyheads.cli.serve.run", run)
    assert main(["serve"]) == status
    assert capsys.readouterr().err == f"manyheads: error: {error}\n"
    with pytest.raises(type(error)):
        main(["serve", "--debug"])


# generate


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every LLM gets the fake engine."""

    def make(**settings: Any) -> LLM:
        settings.pop("chat_template")
        engine: Any = FakeEngine(EngineConfig(**settings))
        return LLM(engine=engine, **settings | {"tokenizer": tiny_tokenizer()})

    monkeypatch.setattr("manyheads.frontend.llm.LLM", make)


def feed(monkeypatch: pytest.MonkeyPatch, data: str | bytes) -> None:
    raw = data.encode() if isinstance(data, str) else data
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))


@pytest.mark.usefixtures("fake")
def test_generate_from_text(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("first\n\n  \nsecond\r\n")
    out = tmp_path / "out.jsonl"
    assert main(["generate", str(tmp_path / "in.txt"), "-o", str(out), "--max-tokens", "6", "--n", "2"]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["line"], r["prompt"], r["index"]) for r in records] == [
        (1, "first", 0),
        (1, "first", 1),
        (4, "second", 0),
        (4, "second", 1),
    ]
    assert all(TEXT.startswith(r["text"].rstrip("\ufffd")) and r["tokens"] == 6 for r in records)
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("fake")
def test_generate_from_json(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        '{"prompt": "a", "id": 7, "params": {"max_tokens": 2, "logit_bias": {"5": -100}, "stop": ["zz"]}}',
        '{"messages": [{"role": "user", "content": "b"}]}',
        '{"prompt": "a"',
        '{"prompt": "a", "nonsense": 1}',
        "{}",
        '{"prompt": ""}',
        '{"prompt": "a", "params": {"nonsense": 1}}',
        '{"prompt": "a", "params": {"temperature": -1}}',
        '{"prompt": "FAIL"}',
    ]
    feed(monkeypatch, "\n".join(lines).encode() + b'\n{"prompt": "\xff"}\n')
    assert main(["generate", "--max-tokens", "4"]) == 1
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert [r["line"] for r in records] == list(range(1, 11))
    assert (records[0]["id"], records[0]["tokens"], records[1]["tokens"]) == (7, 2, 4)
    for record, word in zip(
        records[2:],
        ["truncated", "nonsense", "needs either", "empty", "nonsense", "temperature", "told to fail", "UTF-8"],
        strict=True,
    ):
        assert word.lower() in record["error"].lower(), record
    assert "line 5: needs either `prompt` or `messages`" in err
    assert "8 of 10 lines have no answer; their records say why" in err


@pytest.mark.usefixtures("fake")
def test_generate_to_a_reader_that_leaves(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a\n" * 50)
    code = (
        "import sys\nfrom tests import test_cli\nimport manyheads.frontend.llm as g\n"
        "from manyheads.cli import main\n"
        "g.LLM = lambda **s: test_cli.LLM(engine=test_cli.FakeEngine(test_cli.EngineConfig()), "
        "tokenizer=test_cli.tiny_tokenizer())\n"
        f"sys.exit(main(['generate', {str(tmp_path / 'in.txt')!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(30), process.stderr.read()) == (141, "")
    process.stderr.close()


# chat


@pytest.mark.usefixtures("fake")
def test_chat_here(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    feed(monkeypatch, "hello\n\n/nonsense\nFAIL\n/clear\nhello\n/exit\nnot read\n")
    assert main(["chat", "--max-tokens", "9", "--system", "be brief"]) == 0
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first == second
    assert TEXT.startswith(first.rstrip("\ufffd"))
    assert err.count("[9 tokens, ") == 2
    assert "3.00 tokens/step" in err
    assert err.count("/exit ends") == 2  # at the start and for /nonsense
    assert "error: told to fail" in err


@pytest.mark.usefixtures("fake")
def test_chat_goes_on_after_ctrl_c(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    plain = FakeEngine.step

    def step(self: FakeEngine) -> Any:
        nonlocal steps
        steps += 1
        if steps == 2:
            os.kill(os.getpid(), 2)
        return plain(self)

    monkeypatch.setattr(FakeEngine, "step", step)
    feed(monkeypatch, "hello\nhello\n")
    assert main(["chat", "--max-tokens", "12"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(" [stopped]")
    assert second.startswith(first.removesuffix(" [stopped]").rstrip("\ufffd"))
    assert len(second) > len(first) - len(" [stopped]")


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["sql"], "--lora must be NAME=PATH, not 'sql'"),
        (["=there"], "--lora must be NAME=PATH, not '=there'"),
        (["a=b", "a=c"], "--lora: two adapters are called 'a'"),
        (["builtin=b"], "an adapter needs a name, and 'builtin' is the built-in model's"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "deploy"])
def test_adapters_that_cannot_be_named_are_refused(command: str, given: list[str], error: str, capsys: Capture) -> None:
    check(capsys, [command, *(part for text in given for part in ("--lora", text))], error)

"""Every example runs, with the built-in model, and says what it should."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from manyheads.bench.server import started

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import clients

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
HASTY = """
import runpy, sys
from manyheads.engine import warmup
warmup.MAX_SECONDS, warmup.TURN_SECONDS = 0.2, 0.02
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs an example with an engine that does not look long for what pays on this machine."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of a server that guesses whatever speculation pays on this machine."""
    with started("builtin", ["--max-num-seqs", "8", "--tree-size", "8"], 120) as (url, _):
        yield url


def run(name: str, *options: str, text: str | None = None, by: tuple[str, ...] = ()) -> str:
    """What an example prints.

    Args:
        by: what Python is to run in place of the script, which gets the script's path.
    """
    command = [sys.executable, *by, str(EXAMPLES / name), *options]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_offline() -> None:
    said = run("offline.py", "--max-tokens", "12", by=("-c", HASTY))
    assert "Hip hop is" in said
    assert re.findall(r"\[(\d+) tokens in \d+ steps\]", said) == ["12"] * 3


def test_stream(url: str) -> None:
    said = run("stream.py", "--url", url, "--max-tokens", "12", "Who was Napoleon?")
    assert said.endswith("[12 tokens]\n")
    assert "Napoleon" in said
    assert run("stream.py", "--url", url, "--max-tokens", "12", "Who was Napoleon?") == said


def test_choices(url: str) -> None:
    said = run("choices.py", "--url", url, "--max-tokens", "20", "--n", "3").splitlines()
    assert [line[:3] for line in said] == ["1. ", "   ", "2. ", "   ", "3. ", "   "]
    assert len({line[3:] for line in said[::2]}) > 1
    for line in said[1::2]:
        assert re.search(r"least sure of .*, \d+%; likeliest were .* \d+%, .* \d+%, .* \d+%$", line)


def test_speculation(url: str) -> None:
    with_heads, without, verdict = run("speculation.py", "--url", url, "--max-tokens", "30").splitlines()
    assert verdict == "the text is the same"
    tokens, steps, checked, right = map(int, re.findall(r"\d+", with_heads))
    assert tokens == 30
    assert steps < tokens - 5
    assert checked > right > 5
    tokens, steps, checked, right = map(int, re.findall(r"\d+", without))
    assert (tokens, checked, right) == (30, 0, 0)
    assert steps == 29  # the first token comes with the prompt


def test_many_prompts(url: str, tmp_path: Path) -> None:
    prompts = ["Who was Napoleon?", "Tell me a joke.", "What is the capital of France?"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([prompts[0], "", *prompts[1:]]) + "\n")
    lines = run("many_prompts.py", "--url", url, "--max-tokens", "8", str(file)).splitlines()
    said = [json.loads(line) for line in lines]
    assert sorted((record["line"], record["prompt"]) for record in said) == list(enumerate(prompts, 1))
    assert all(record["answer"].strip() for record in said)
    assert run("many_prompts.py", "--url", url, "--max-tokens", "8", text=prompts[0]).count("Napoleon") == 2


def test_a_session_with_openais_client(url: str) -> None:
    found = clients.run(sys.executable, EXAMPLES / "clients" / "openai_session.py", url)
    assert found["outcome"] == "passed", found
    kinds = [line.partition(": ")[0] for line in found["says"]]
    assert kinds == ["stream", "call", "after the call", "parsed", "response", "response calls"]
    assert found["versions"].keys() == {"openai"}


def test_a_session_that_fails_or_is_not_installed_is_told(tmp_path: Path) -> None:
    session = tmp_path / "some_session.py"
    session.write_text('"""A client (pip install no-such-client)."""\n')
    assert clients.run(sys.executable, session, "")["outcome"] == "not installed"
    session.write_text('"""A client."""\nraise ValueError("so")\n')
    assert clients.run(sys.executable, session, "")["outcome"] == "failed: ValueError: so"


def test_the_published_sessions_are_those_that_there_are() -> None:
    published = json.loads(clients.RESULT.read_text())["clients"]
    assert [record["session"] for record in published] == sorted(p.name for p in clients.SESSIONS.glob("*_session.py"))
    assert {record["outcome"] for record in published} == {"passed"}


def test_all_examples_are_tested_and_listed() -> None:
    tests, table = Path(__file__).read_text(), (EXAMPLES / "README.md").read_text()
    scripts = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert scripts
    assert all(f'"{name}"' in tests and f"[{name}]({name})" in table for name in scripts)

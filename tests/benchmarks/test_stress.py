"""A few mixtures, and what is told of one that differs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from manyheads.engine.engine import Engine
from manyheads.request import EngineRequest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import stress
from stress_mix import MODELS, model_folder

SEEDS = (14, 23, 51)
"""With what the first test looks for; the second one has three engines."""
SHORT = 24


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], dict[str, Any]]:
    """Runs it from a seed on, and reads its result."""
    monkeypatch.setattr(stress.logging, "disable", lambda level: None)  # which other tests would not get back
    monkeypatch.setattr(stress, "disable_progress_bar", lambda: None)

    def run(first: int, count: int) -> dict[str, Any]:
        out = tmp_path / "stress.json"
        monkeypatch.setattr(sys, "argv", ["stress.py", "--seeds", str(first), str(count), "--out", str(out)])
        try:
            stress.main()
        finally:
            result: dict[str, Any] = json.loads(out.read_text())
        return result

    return run


def test_mixtures_give_what_their_requests_give_alone(models: Path) -> None:
    counts, features = Counter[str](), Counter[str]()
    assert [stress.stress(seed, models, counts, features) for seed in SEEDS] == [[]] * len(SEEDS)
    assert counts["seeds"] == len(SEEDS)
    assert min(counts[name] for name in ("accepted tokens", "preemptions", "tokens of shared prefixes", "aborted")) > 0
    assert {"death", "second rank", "recorded steps", "overlapping steps", "asked: grammar"} <= features.keys()


def test_every_family_has_drafters_and_adapters(models: Path) -> None:
    for family in MODELS:
        folder = model_folder(models, family, False)
        assert all((folder / name).is_dir() for name in ("heads", "eagle3", "a", "b")), family


def test_a_seed_is_the_same_every_time(models: Path) -> None:
    runs = Counter[str](), Counter[str]()
    for counts in runs:
        assert stress.stress(SEEDS[1], models, counts, Counter()) == []
    assert runs[0] == runs[1]
    assert runs[0]["engines"] == 3


def test_another_token_is_told_with_its_seed(
    script: Callable[[int, int], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert script(SHORT, 1)["mismatches"] == {}
    right = stress.alone
    others: list[EngineRequest] = []

    def other(engine: Engine, message: EngineRequest) -> stress.Answer:
        """What a request gives alone, with another last token where it is the first with some."""
        found = right(engine, message)
        if others or len(found.tokens) < 2 or found.end[0] != "length":
            return found
        others.append(message)
        return replace(found, tokens=[*found.tokens[:-1], found.tokens[-1] ^ 1])

    monkeypatch.setattr(stress, "alone", other)
    with pytest.raises(SystemExit, match=f"--seeds SEED 1 for a SEED of {SHORT}"):
        script(SHORT, 1)
    told = capsys.readouterr().out
    assert f"seed {SHORT}:" in told
    assert f"{others[0].prompt_token_ids}" in told
    result = json.loads((tmp_path / "stress.json").read_text())
    assert list(result["mismatches"]) == [str(SHORT)]
    assert "and not Answer(tokens=" in result["mismatches"][str(SHORT)][0]


def test_an_error_in_the_middle_is_a_mismatch(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_integrity(self: Engine) -> None:
        raise RuntimeError("a page is nobody's")

    monkeypatch.setattr(Engine, "check_integrity", check_integrity)
    problems = stress.stress(SHORT, models, Counter(), Counter())
    assert "RuntimeError: a page is nobody's" in problems[-1]

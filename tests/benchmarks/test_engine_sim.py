"""The simulated engine answers everyone, as fast as its device's arithmetic says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import engine_sim
from engine_sim import CACHED, PASS, PASS_ROW, PRODUCTS, STEP, TOKEN, simulate
from traffic import Ask

from manyheads.engine import engine as engine_module


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine have its own clock again, when a test has ended."""
    monkeypatch.setattr(engine_module, "time", engine_module.time)  # type: ignore[attr-defined]


def ask(at: float, num_prompt: int, num_answer: int) -> Ask:
    return Ask(at, [7 + round(at)] * num_prompt, num_answer)


def test_one_token_takes_one_step() -> None:
    [answer], padded = simulate([ask(3.0, 576, 1)], pads=False)
    assert answer.first == answer.last == pytest.approx(PRODUCTS[576] + 576 * TOKEN + STEP + PASS + PASS_ROW)
    assert padded == 1.0
    [answer], padded = simulate([ask(3.0, 576, 1)], pads=True)
    assert answer.first is not None
    assert answer.first > PRODUCTS[768]
    assert padded == pytest.approx(768 / 576)


def test_an_answer_takes_as_many_steps_as_guesses_leave() -> None:
    """A row alone has the largest tree that pays; a step takes at least what its weights do."""
    num_tokens = 300
    [answer], _ = simulate([ask(0.0, 64, num_tokens)], pads=True)
    step = PRODUCTS[16] + STEP + PASS + CACHED * 64
    seconds = answer.token_seconds * (num_tokens - 1)
    assert step * num_tokens / 4.5 < seconds < step * num_tokens / 2, "2 to 4.5 tokens a step"


def test_everyone_is_answered_and_waits_under_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_sim, "ROWS", 8)
    few, _ = simulate([ask(float(at), 300, 60) for at in range(30)], pads=True)
    many, _ = simulate([ask(at / 100, 300, 60) for at in range(30)], pads=True)
    for answers in (few, many):
        assert [answer.tokens for answer in answers] == [60] * 30
        assert all(answer.first and 0 < answer.first < answer.last for answer in answers)
    assert max(answer.last for answer in many) > 2 * max(answer.last for answer in few)

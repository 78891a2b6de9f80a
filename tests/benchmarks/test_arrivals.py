"""What the API process adds: from what the engine and the clients wrote down."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest

pytest.importorskip("psutil")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import arrivals
import streams

from manyheads.request import EngineRequest, SamplingParams

STEP = 0.01


def figures(delay: float, merge: int = 1) -> dict[str, object]:
    """A request each 0.1 s of ten steps of two tokens; all passes the API process after so long, some steps at once."""
    engine, clients = {}, []
    for number in range(20):
        sent = number / 10
        steps = [(sent + 0.005 + STEP * i, 2 * i) for i in range(1, 11)]
        engine[number] = arrivals.Told(sent + 0.003, steps)
        last = [steps[min(9, i // merge * merge + merge - 1)] for i in range(10)]
        clients.append(arrivals.Heard(number, sent, [(sent, 0), *dict.fromkeys((at + delay, n) for at, n in last)]))
    return arrivals.figures(engine, clients, 0.5, 1.5, STEP)


def test_delays_are_those_of_the_api_process() -> None:
    found = figures(0.002)
    assert found["event_ms_p50"] == found["event_ms_max"] == pytest.approx(2.0)
    assert found["first_ms_p50"] == pytest.approx(3 + 2)  # in and out, without the engine's time
    assert (found["requests_per_s"], found["tokens_per_s"], found["events_per_s"]) == (10, 200, 100)
    assert (found["late"], found["keeps_up"]) == (0, True)


def test_late_tokens_are_counted() -> None:
    assert not figures(0.02)["keeps_up"]
    merged = figures(0.002, merge=2)  # of two steps, the first one's tokens come with the second one's
    assert merged["event_ms_max"] == pytest.approx(12.0)
    assert (merged["late"], merged["events_per_s"]) == (0.5, 50)


def test_what_has_not_arrived_is_late() -> None:
    engine = {0: arrivals.Told(0.51, [(0.6, 2), (0.61, 4)])}
    found = arrivals.figures(engine, [arrivals.Heard(0, 0.5, [(0.602, 2)])], 0.5, 1.5, STEP)
    assert found["late"] == 0.5
    assert found["event_ms_max"] == pytest.approx(1e3 * (1.5 + arrivals.LAST_SECONDS - 0.61))


def test_streams_of_the_past_are_open_from_the_start() -> None:
    asks = arrivals.asks_of(60.0, 0.04, 5.0, None)
    at_once = [ask for ask, _ in asks if ask.at == 0]
    later = [ask for ask, _ in asks if ask.at > 0]
    assert 200 < len(at_once) < 300  # 60 a second, 206 tokens on average, 50 a second each
    assert 250 < len(later) < 350
    assert statistics.mean(ask.max_tokens for ask in later) == pytest.approx(206, rel=0.2)
    assert all(text and len(ask.prompt) >= 16 for ask, text in asks)


def test_the_log_says_who_came_and_what_they_got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("STREAMS_LOG", str(log))
    monkeypatch.setenv("STREAMS_STEP", "0.001")
    engine = streams.Engine()
    params = SamplingParams(seed=7, max_tokens=9)
    engine.add_request(EngineRequest(request_id="a", prompt_token_ids=[5], params=params))
    deltas = []
    while engine.has_work():
        deltas += engine.step()
    told = arrivals.told(log)[7]
    assert [count for _, count in told.steps][-1] == 9 == sum(len(delta.new_token_ids) for delta in deltas)
    assert len(told.steps) == len(deltas)
    assert told.came <= told.steps[0][0] <= told.steps[-1][0]
    with pytest.raises(FileExistsError):  # a second engine would begin anew
        streams.Engine()

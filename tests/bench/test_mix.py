"""`manyheads bench mix`: what is drawn, how the highest rate that holds is found, and what is said about it."""

from __future__ import annotations

import json
import random
import statistics
import zlib
from pathlib import Path
from typing import Any

import pytest

from manyheads.bench import mix as mixes
from manyheads.bench import result as results
from manyheads.bench.compare import compare
from manyheads.bench.findings import comparison, findings
from manyheads.bench.measure import MOST_RATES, Options, _Bench
from manyheads.bench.mix import Lengths, Mix, Requests
from manyheads.bench.plan import BenchInputError, Question, Stage, part_of
from manyheads.bench.prompts import Workload, prepare
from manyheads.bench.record import UNFINISHED, Record
from manyheads.bench.report import render
from manyheads.bench.result import Level, Result
from manyheads.bench.server import Target
from manyheads.bench.stats import make_level
from manyheads.cli import main, make_parser
from manyheads.cli.bench import bench_options
from tests.bench.mock import Script, running
from tests.bench.samples import OBJECTIVES, record, result

BOS = 1
PROMPTS, ANSWERS = Lengths(50, 0.9, 4, 300), Lengths(20, 0.8, 2, 60)


def options(*argv: str) -> Options:
    return bench_options(make_parser().parse_args(["bench", *argv]))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The bodies of a server's `/tokenize`, whose tokens are words."""
    bodies: list[dict[str, Any]] = []

    def get(url: str, body: dict[str, Any], api_key: str | None) -> dict[str, Any]:
        bodies.append(body)
        first = [BOS] if body["add_special_tokens"] else []
        return {"tokens": first + [2 + zlib.crc32(word.encode()) % 4000 for word in body["prompt"].split()]}

    monkeypatch.setattr(mixes, "get", get)
    return bodies


def requests(mix: Mix | None = None, context: int | None = None, **work: Any) -> Requests:
    """Those of a server that is not there."""
    target = Target("http://127.0.0.1:1", "m", context=context)
    return Requests(mix or Mix(PROMPTS, ANSWERS), Workload(**work), target, None)


def test_the_defaults_are_the_traffic_that_users_make() -> None:
    made = options("mix")
    assert made.mix == Mix(Lengths(250, 0.9, 16, 1400), Lengths(150, 0.8, 8, 600), 0, 1, 0.95)
    assert made.objectives == {"ttft": 0.5, "tpot": 0.02}
    assert (made.kind, made.loads, made.hold) == ("mix", (), 20.0)
    assert made.settings["prompt_tokens"] == "lognormal:250,0.9,16,1400"
    fixed = options("mix", "--rates", "5,15", "--prompt-tokens", "7", "--ttft-ms", "90", "--system-tokens", "9").mix
    assert fixed is not None
    assert (fixed.prompts, fixed.system_tokens, str(fixed.prompts)) == (Lengths(7, 0, 7, 7), 9, "7")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["mix", "--prompt-tokens", "lognormal:250,0.9,16"],
            "--prompt-tokens takes a whole number or lognormal:MEDIAN",
        ),
        (["mix", "--output-tokens", "normal:1,2,3,4"], "--output-tokens takes a whole number"),
        (["mix", "--output-tokens", "7.5"], "takes a whole number"),
        (["mix", "--prompt-tokens", "lognormal:250,0.9,300,1400"], "must be above 0, with LEAST <= MEDIAN <= MOST"),
        (["mix", "--attain", "2"], "--attain must be above 0, at most 1: not 2"),
        (
            ["users", "--prompt-tokens", "lognormal:9,1,1,99"],
            "lengths that vary are for `manyheads bench mix`, not for",
        ),
        (["rate", "--system-tokens", "9"], "--system-tokens is for `manyheads bench mix`, not for rate"),
        (["mix", "--users", "9"], "--users is for `manyheads bench users`, not for mix"),
    ],
)
def test_wrong_options(argv: list[str], words: str) -> None:
    with pytest.raises(BenchInputError, match=words.replace("(", r"\(")):
        options(*argv)


def test_lengths_are_as_asked() -> None:
    """Half of them are below the median, and the logarithm's spread is sigma: by ten standard errors, and more."""
    lengths = Lengths(250, 0.9, 1, 10**6)
    drawn = [lengths.draw(random.Random(i)) for i in range(2000)]
    assert 200 < statistics.median(drawn) < 312
    assert 330 < statistics.fmean(drawn) < 430  # 250 × exp(0.9² / 2) is 375
    near = [Lengths(250, 0.9, 200, 300).draw(random.Random(i)) for i in range(200)]
    assert (min(near), max(near)) == (200, 300)
    assert {Lengths(250, 0, 250, 250).draw(random.Random(i)) for i in range(9)} == {250}


def test_requests_are_drawn(asked: list[dict[str, Any]]) -> None:
    """Arrivals at the rate, lengths within limits, no two prompts alike; and few calls, however many requests."""
    drawn = requests().draw(100.0, 30.0)
    assert len(asked) < 300
    assert 2400 < len(drawn) < 3600
    times = [question.at or 0.0 for question in drawn]
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 30
    lengths = [len(question.body["prompt"]) for question in drawn]
    assert (min(lengths), max(lengths)) == (4, 300)
    assert {question.body["prompt"][0] for question in drawn} == {BOS}
    assert all(2 <= question.body["max_tokens"] <= 60 and question.body["ignore_eos"] for question in drawn)
    assert len({str(question.body["prompt"][:16]) for question in drawn}) > 0.7 * len(drawn)
    assert len(requests().draw(0.01, 1.0)) >= 1


def test_the_same_seed_draws_the_same(asked: list[dict[str, Any]]) -> None:
    def prompts(seed: int, rate: float) -> list[Any]:
        return [question.body["prompt"] for question in requests(seed=seed).draw(rate, 2.0)]

    assert prompts(1, 20.0) == prompts(1, 20.0)
    assert prompts(1, 20.0) != prompts(2, 20.0)
    assert prompts(1, 20.0)[:9] != prompts(1, 40.0)[:9]  # no load finds the prompts of another in a cache


def test_servers_get_the_same_times_and_lengths(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    """Also where texts, and so the choice of a place in them, differ."""
    (tmp_path / "t.txt").write_text("another text " * 99)
    one, other = requests(), requests(Mix(PROMPTS, ANSWERS, 40, 3), file=tmp_path / "t.txt")
    drawn = [
        [(q.at, len(q.body["prompt"]) - system, q.body["max_tokens"]) for q in made.draw(20.0, 5.0)]
        for made, system in ((one, 0), (other, 40))
    ]
    assert drawn[0] == drawn[1]


def test_shared_beginnings(asked: list[dict[str, Any]]) -> None:
    drawn = requests(Mix(PROMPTS, ANSWERS, system_tokens=40, system_prompts=3)).draw(50.0, 4.0)
    assert len({str(question.body["prompt"][:40]) for question in drawn}) == 3
    assert all(44 <= len(question.body["prompt"]) <= 340 for question in drawn)
    talk = requests(Mix(PROMPTS, ANSWERS, system_tokens=40), chat=True).draw(50.0, 4.0)
    systems = {question.body["messages"][0]["content"] for question in talk}
    assert [m["role"] for m in talk[0].body["messages"]] == ["system", "user"]
    assert [len(text.split()) for text in systems] == [40]


def test_words_where_tokens_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(url: str, body: dict[str, Any], api_key: str | None) -> dict[str, Any]:
        raise OSError("404")

    monkeypatch.setattr(mixes, "get", get)
    made = requests(Mix(Lengths(130, 0, 130, 130), ANSWERS))
    assert {len(question.body["prompt"].split()) for question in made.draw(9.0, 3.0)} == {100}
    assert "no /tokenize" in made.notes[0]


def test_no_request_is_longer_than_the_server_holds(asked: list[dict[str, Any]]) -> None:
    made = requests(Mix(PROMPTS, ANSWERS, system_tokens=40), context=160)
    drawn = made.draw(50.0, 4.0)
    assert max(len(question.body["prompt"]) + question.body["max_tokens"] for question in drawn) <= 160
    assert "the server holds 160 tokens a request: lengths were cut to at most 100 tokens in and 20 out" in made.notes
    with pytest.raises(BenchInputError, match="--system-tokens 40 leave no room in a context of 40"):
        requests(Mix(PROMPTS, ANSWERS, system_tokens=40), context=40)


def test_texts_of_a_file(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    lines, plain, empty = tmp_path / "t.jsonl", tmp_path / "t.txt", tmp_path / "e.jsonl"
    lines.write_text('{"turns": ["a b", "c"], "id": 3}\n\n{"prompt": "d"}\n{"text": "e f"}\n')
    plain.write_text("all of this\nis text")
    empty.write_text('{"id": 3}\n')
    requests(file=lines)
    assert sorted(asked[-1]["prompt"].split()) == ["a", "b", "c", "d", "e", "f"]
    requests(file=plain)
    assert asked[-1]["prompt"] == "all of this\nis text"
    plain.with_suffix(".jsonl").write_text("{")
    for name, words in (("e.jsonl", "holds no text"), ("no", "cannot read texts"), ("t.jsonl", "truncated")):
        with pytest.raises(BenchInputError, match=words):
            requests(file=tmp_path / name)


class Swept(_Bench):
    """A test whose server answers so many requests a second in time, all of them or none."""

    capacity = 0.0

    def hold(self, stages: list[Stage]) -> None:
        load = stages[0].load
        good = 100 if load <= self.capacity else 0
        self.levels.append(Level(load, 20.0, sent=100, good=good, overloaded=load > 1.2 * self.capacity))


@pytest.mark.parametrize("capacity", [0.4, 1.0, 11.0, 37.0, 400.0])
def test_the_highest_rate_is_found(capacity: float, tmp_path: Path) -> None:
    bench: Any = Swept(options("mix"), *[None] * 5, {})  # type: ignore[arg-type]
    bench.capacity = capacity
    bench.all_rates()
    found = mixed(bench.levels)
    assert found.highest is not None
    assert found.highest.load <= capacity <= 1.1 * found.highest.load
    assert len(bench.levels) < MOST_RATES + 6


def test_rates_that_were_given_are_all_held() -> None:
    bench: Any = Swept(options("mix", "--rates", "5,15,30"), *[None] * 5, {})  # type: ignore[arg-type]
    bench.capacity = 7.0
    bench.all_rates()
    assert [level.load for level in bench.levels] == [5, 15, 30]
    none: Any = Swept(options("mix"), *[None] * 5, {})  # type: ignore[arg-type]
    none.all_rates()
    assert [level.load for level in none.levels] == [1, 0.5, 0.25]  # it gives up


def mixed(levels: list[Level], name: str = "one", **more: Any) -> Result:
    settings = {"prompt_tokens": "lognormal:50,0.9,4,300", "output_tokens": "20"}
    levels = sorted(levels, key=lambda level: level.load)
    return result(name, **{"kind": "mix", "attain": 0.95, "levels": levels, "settings": settings} | more)


def held(load: float, good: int, misses: list[Record] | None = None) -> Level:
    records = [record(i * 0.01, [0.1, 0.12]) for i in range(good)] + (misses or [])
    return make_level(records, (0.0, 10.0), load, "mix", OBJECTIVES)


def test_who_is_refused_or_not_answered_misses() -> None:
    late = record(1.0, [0.6, 0.62])
    level = held(8.0, 97, [Record(sent=1.0, reason="HTTP 429"), Record(sent=2.0, reason=UNFINISHED), late])
    assert (level.sent, level.good, level.attained) == (100, 97, 0.97)
    worse = held(9.0, 90, [Record(sent=1.0, reason=UNFINISHED)] * 10)
    found = mixed([level, worse])
    said = findings(found)
    assert said[0].startswith("Highest rate that holds: 8 requests/s. 97.0% of the 100 requests sent were within both")
    assert said[0].endswith(
        "(first token within 500 ms, 50 ms a token or less); 95% are needed. At 9 requests/s, 90.0% were."
    )
    assert findings(mixed([worse]))[0].startswith("No rate holds: 95% of the requests sent must be")
    assert findings(mixed([level]))[0].endswith("and no higher rate was tried.")
    page = render(found)
    for word in ("the highest rate that holds", "Requests within the objectives", "50 (4 to 300) tokens in, 20 out"):
        assert word in page


def test_several_systems(tmp_path: Path) -> None:
    ours = mixed([held(8.0, 100), held(12.0, 100), held(16.0, 10, [Record(sent=1.0, reason=UNFINISHED)] * 90)], "ours")
    theirs = mixed([held(8.0, 100), held(12.0, 10, [Record(sent=1.0, reason=UNFINISHED)] * 90)], "theirs")
    for found in (theirs, ours):
        (tmp_path / found.name).mkdir()
        results.save(found, tmp_path / found.name / results.FILE)
    page = compare([tmp_path / "theirs", tmp_path / "ours"], tmp_path / "out").read_text()
    assert "The highest rates that hold, in requests/s: theirs 8, ours 12." in page
    assert "<td>theirs</td><td>8</td><td>1.00</td>" in page
    assert "<td>ours</td><td>12</td><td>1.50</td>" in page
    assert page.count("Requests within the objectives") > 0
    other = mixed([held(8.0, 100)], objectives={"ttft": 9.0, "tpot": 9.0})
    assert "these rates are not to be compared" in " ".join(comparison([ours, other]))


def test_a_whole_test(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every fourth request is refused, so that half of them within limits are enough, and nine in ten are not."""
    argv = ["mix", "--rates", "60", "--hold", "2", "--settle", "0.2", "--no-limit", "--attain", "0.5", "--save-traces"]
    argv += ["--ttft-ms", "90000", "--tpot-ms", "90000", "-o", str(tmp_path)]
    with running(Script(chunks=2, breaks=("", "", "", "500"))) as url:
        assert main(["bench", *argv, "--url", url]) == 0
    assert "Highest rate that holds: 60 requests/s." in capsys.readouterr().out
    found = results.load(tmp_path)
    (level,) = found.levels
    assert level.load == 60
    assert 0.6 < level.attained < 0.9
    assert level.failures["HTTP 500"]
    trace = tmp_path / "trace-60.jsonl"
    lines = trace.read_text().splitlines()
    again, _ = prepare(Workload(file=trace), Target("http://127.0.0.1:1", "m"), None)
    assert [q.at for q in again] == [json.loads(line)["at"] for line in lines]
    assert again[0].body["max_tokens"] == json.loads(lines[0])["max_tokens"]


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_each_request_is_sent_once(count: int) -> None:
    """A process that has no part in so few requests sends none."""
    questions = [Question({"prompt": str(i)}, float(-i)) for i in range(count)]
    parts = [part_of(questions, True, (number, 3)) for number in range(3)]
    assert sorted((q for part in parts for q in part), key=lambda q: -(q.at or 0.0)) == questions
    assert all(part == sorted(part, key=lambda q: q.at or 0.0) for part in parts)
    assert count == 0 or all(part_of(questions, False, (number, 3)) for number in range(3))

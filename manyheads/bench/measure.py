"""A load test goes from a server and requests to a load and its figures."""

from __future__ import annotations

import contextlib
import datetime
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manyheads.bench import calibrate, counters, stats
from manyheads.bench.drive import Outcome, drive, write_questions
from manyheads.bench.machine import machine
from manyheads.bench.mix import Mix, Requests, next_rate, save_trace
from manyheads.bench.plan import BenchError, BenchInputError, Kind, Question, Run, Stage
from manyheads.bench.progress import Progress
from manyheads.bench.prompts import Workload, prepare
from manyheads.bench.record import Record
from manyheads.bench.result import UNITS, Level, Memory, Result
from manyheads.bench.server import Target, clean_url, identify, started
from manyheads.bench.watch import Watch

CALIBRATION = 3.0
"""It takes so many seconds to measure the generator's own limit."""
MOST_RATES = 10
"""An automatic sweep has at most so many rates, and that of a mix as many more to narrow it down."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a load test say what to measure, and how."""

    kind: Kind
    loads: tuple[float, ...]
    """These are users, rates or speeds; no rates at all are doubled from 1/s until the server is overloaded."""
    hold: float
    settle: float
    ramp: float | None = None
    """In a closed loop, one more user comes after so many seconds, until there are max(loads), who stay for `hold`."""
    work: Workload
    mix: Mix | None = None
    """What the requests are drawn from, in the test of a mix."""
    traces: Path | None = None
    """The folder that gets a trace of each load of a mix."""
    objectives: dict[str, float]
    """The most seconds that `ttft` and `tpot` should take."""
    url: str | None = None
    model: str | None = None
    serve: tuple[str, ...] = ()
    """The options of `manyheads serve`, if the server is started here."""
    api_key: str | None = None
    check: bool = True
    workers: int = 0
    bind: str | None = None
    """The HOST:PORT where workers of other machines join; None starts them here."""
    timeout: float = 120.0
    drain: float = 60.0
    calibrate: bool = True
    name: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """What was asked for, as the report shows it."""

    def stages(self) -> list[Stage]:
        """Return the stages of a run."""
        if self.ramp is None:
            return [Stage(load, self.hold, self.settle) for load in self.loads]
        most = int(max(self.loads))
        return [Stage(float(n), self.ramp) for n in range(1, most)] + [Stage(float(most), self.hold)]


@dataclass
class _Bench:
    """This is a load test under way; each run adds an outcome, and each load that was held a level."""

    options: Options
    target: Target
    questions: list[Question]
    folder: Path
    watch: Watch
    progress: Progress
    machine: dict[str, Any]
    """The machine as it was before the test."""
    outcomes: list[Outcome] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)
    mix: Requests | None = None
    interrupted: str | None = None

    def run(self, stages: list[Stage], number: int) -> Run:
        """Make the run of the generator with these stages; its number names its files."""
        work = self.options.work
        same_length = all(q.body["max_tokens"] == self.questions[0].body["max_tokens"] for q in self.questions)
        return Run(
            url=self.target.url,
            path=work.path,
            kind=self.options.kind,
            stages=stages,
            questions=str(self.folder / "questions.jsonl"),
            records=str(self.folder / f"records-{number}.jsonl"),
            max_tokens=self.questions[0].body["max_tokens"] if same_length else None,
            timeout=self.options.timeout,
            drain=self.options.drain,
            workers=self.options.workers,
            bind=self.options.bind,
            seed=work.seed,
        )

    def hold(self, stages: list[Stage]) -> None:
        """Run these stages, and take their figures as far as they come."""
        if self.mix is not None:
            self.questions = self.mix.draw(stages[0].load, stages[0].settle + stages[0].seconds)
            if self.options.traces is not None:
                save_trace(self.questions, self.options.traces / f"trace-{stages[0].load:g}.jsonl")
            write_questions(self.questions, self.folder / "questions.jsonl")
        run = self.run(stages, len(self.outcomes))
        self.progress.begin(run)
        outcome = drive(run, self.folder, self.options.api_key, self.progress.event)
        self.watch.look()
        self.outcomes.append(outcome)
        for i, stage in enumerate(stages[: len(outcome.begins)]):
            start, end = outcome.window(i)
            if start < end:
                self.levels.append(self.level(outcome, (start, end), stage.load))
        if outcome.interrupted or outcome.overdue:
            self.cut(outcome)

    def cut(self, outcome: Outcome) -> None:
        """Note where a run was ended, and why if not by Ctrl-C."""
        last = len(outcome.begins) - 1
        stage, (start, end) = outcome.run.stages[last], outcome.window(last)
        self.interrupted = f"at {stage.load:g} {UNITS[self.options.kind]}"
        held = max(end - start, 0.0)
        if outcome.held:
            self.interrupted += ", while the last answers were awaited"
        else:
            self.interrupted += f", which were held for {held:.3g} of {stage.seconds:g} s"
        if outcome.overdue:
            self.interrupted += ", because the load generator did not end by itself"
        if held and not outcome.held:
            self.levels[-1].interrupted, self.levels[-1].overloaded = True, False
            if not self.levels[-1].completed + self.levels[-1].failed:
                self.levels.pop()  # too short for a single answer

    @property
    def full(self) -> bool:
        """Tell whether more load makes no sense: the server does not keep up, or the test is to end."""
        return bool(self.interrupted or (self.levels and self.levels[-1].overloaded))

    def level(self, outcome: Outcome, window: tuple[float, float], load: float) -> Level:
        """Return the figures of a window, of the requests, the generator and the server's own counters."""
        options = self.options
        level = stats.make_level(outcome.records, window, load, options.kind, options.objectives)
        level.generator = stats.generator_use(outcome.uses, outcome.records, window)
        looks = self.watch.between(*window)
        if looks is not None:
            told = counters.tokens_per_step(*looks)
            level.tokens_per_step = told if told is not None else level.tokens_per_step
            level.acceptance = counters.acceptance(*looks)
            level.tokens_by_engine = counters.by_engine(*looks)
        return level

    def limit(self) -> dict[str, float]:
        """Measure what the generator can do by itself."""
        if not self.options.calibrate or self.options.bind:  # other machines do not reach the server of that test
            return {}
        self.progress.say("measuring the load generator itself")
        chunks = self.options.work.output_tokens
        with calibrate.running(chunks) as url:
            outcome = drive(calibrate.limit_run(url, self.run([], 0), self.folder, CALIBRATION), self.folder, None)
        if outcome.interrupted:
            raise KeyboardInterrupt
        return calibrate.limit(outcome, chunks)

    def all_rates(self) -> None:
        """Hold rate after rate, each to its end, until the server does not keep up; of a mix, all that were given."""
        options = self.options
        for load in options.loads or [2.0**i for i in range(MOST_RATES)]:
            self.hold([self.open_stage(load)])
            if self.interrupted or (self.full and not (options.mix and options.loads)):
                break
        if options.mix is not None:
            for _ in range(0 if options.loads else MOST_RATES):
                if self.interrupted or (rate := next_rate(self.levels, options.mix.attain)) is None:
                    break
                self.hold([self.open_stage(rate)])
            return
        fine = [level.load for level in self.levels if not level.overloaded]
        if fine and not options.loads and not self.interrupted and self.levels[-1].overloaded:
            # a closer look between the last that went well and the first that did not
            self.hold([self.open_stage(round((fine[-1] * self.levels[-1].load) ** 0.5, 2))])

    def open_stage(self, load: float) -> Stage:
        """Return a stage of arrivals; that of a trace lasts as long as the trace."""
        if self.options.kind == "trace":
            return Stage(load, max(q.at or 0.0 for q in self.questions) / load + 1.0)
        return Stage(load, self.options.hold, self.options.settle)


def measure(options: Options, progress: Progress) -> tuple[Result, list[Record]]:
    """Make a load test, and return its figures and the record of every request.

    Raises:
        BenchError: it cannot be done as asked, or the server did not start.
        KeyboardInterrupt: Ctrl-C before anything was measured; later, the figures are of what was measured until then.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="manyheads-bench-")))
        where = machine()
        target = stack.enter_context(_server(options, progress))
        mix = Requests(options.mix, options.work, target, options.api_key) if options.mix is not None else None
        questions, notes = (mix.draw(1.0, 60.0), mix.notes) if mix else prepare(options.work, target, options.api_key)
        if options.kind == "trace" and any(q.at is None for q in questions):
            raise BenchInputError("a trace needs `at`, seconds from its start, on each line")
        write_questions(questions, folder / "questions.jsonl")
        if options.bind:
            progress.say(f"waiting for {options.workers} workers: manyheads bench --join {options.bind}")
        stack.enter_context(progress)
        watch = Watch(target.url, target.pid, options.api_key)
        bench = _Bench(options, target, questions, folder, watch, progress, where, mix=mix)
        limit = bench.limit()
        with watch:
            if options.kind == "users":
                bench.hold(options.stages())
            else:
                bench.all_rates()
        if not bench.levels and bench.outcomes[-1].overdue:
            raise BenchError("the load generator stood still before anything was measured, and was ended")
        if not bench.levels:
            raise KeyboardInterrupt
        return _result(bench, limit, notes), [r for outcome in bench.outcomes for r in outcome.records]


@contextlib.contextmanager
def _server(options: Options, progress: Progress) -> Iterator[Target]:
    """Give the block the server that is to be asked, or start one of our own."""
    if options.url is not None:
        url = clean_url(options.url)
        yield identify(url, options.model, options.api_key) if options.check else Target(url, options.model or "model")
        return
    model = options.model or "builtin"
    progress.say(f"starting a server with {model}")
    key = ("--api-key", options.api_key) if options.api_key else ()
    with started(model, (*options.serve, *key)) as (url, pid):
        target = identify(url, None, options.api_key)
        target.pid, target.options, target.started_here = pid, options.serve, True
        yield target


def _result(bench: _Bench, limit: dict[str, float], notes: list[str]) -> Result:
    options, target, outcomes = bench.options, bench.target, bench.outcomes
    records = [r for outcome in outcomes for r in outcome.records]
    start, end = outcomes[0].begins[0], outcomes[-1].end
    together = Outcome(outcomes[0].run, [start], end, records, [u for outcome in outcomes for u in outcome.uses])
    whole = bench.level(together, (start, end), max(level.load for level in bench.levels))
    details: dict[str, list[str]] = {}
    for record in records:
        said = details.setdefault(record.reason, []) if record.failed and record.reason else None
        if said is not None and record.detail and record.detail not in said and len(said) < 3:
            said.append(record.detail)
    for level in bench.levels:
        level.generator.bound = level.generator.bound or stats.near_limit(level, limit)
    return Result(
        name=options.name or _name(target),
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        kind=options.kind,
        settings=options.settings,
        target={
            "model": target.model,
            "server": target.owner,
            "heads": target.heads,
            "options": list(target.options),
            "started_here": target.started_here,
            "url": None if target.started_here else target.url,
        },
        machine=bench.machine,
        objectives=options.objectives,
        attain=options.mix.attain if options.mix is not None else None,
        levels=sorted(bench.levels, key=lambda level: level.load),
        whole=whole,
        memory=[
            Memory(at - start, sizes.host, sizes.gpu, sizes.parts) for at, sizes in bench.watch.memory if at <= end + 1
        ],
        timeline=stats.make_timeline(records, start, end),
        limit=limit,
        counted_by=dict(Counter(r.counted_by for r in records if r.ok)),
        details=details,
        notes=notes,
        interrupted=bench.interrupted,
    )


def _name(target: Target) -> str:
    options = " ".join(target.options)
    return f"{target.owner} {target.model} {options}".strip() if target.owner else target.model

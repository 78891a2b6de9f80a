"""Random mixtures of requests, each compared with what it gives alone; writes results/stress.json, and fails on any
difference.

    python benchmarks/stress.py                                    # 1,000 seeds, half an hour of one core
    python benchmarks/stress.py --seeds 5000 100000 --seconds 600 --out /tmp/stress.json
    python benchmarks/stress.py --seeds 5163 1 --out /tmp/stress.json        # this seed once more

**A seed** is a mixture (`stress_mix.py`): a tiny random model of some family, with weights in float32, int8 or fp8 and
a K/V cache in float32 or 8 bits; up to 22 requests of whatever can be asked of an engine, which come, are aborted and
come again at their steps, some with a part of their text, as from another engine; and one to three engines with any
drafter, few pages, few rows and chunks of any size, whose steps overlap or not, are recorded or not, or are told to a
second rank. All but the last engine die, and the next one, of other settings, takes over. In some models some tokens'
embeddings, or what the last layer makes of some places, are no numbers. Random models draw what no drafter guesses, so
drafters are told the texts in some steps. What would depend on time is drawn as well: each step's tree and tokens of
prompts, when a grammar is compiled, what the clock says. So **to repeat** a seed its number is enough.

**Compared** are tokens, how texts end, errors and log-probabilities with those of a plain engine that has each request
alone: no drafter, no prefix cache, one chunk. Sampled texts are compared seed by seed; aborted ones, and those that
ended by `max_steps`, have to be beginnings. What typical acceptance draws is only held to the request's own rules. With
K/V in 8 bits a sampled text may be another now and then (docs/quantization.md), so there requests are greedy.
After every step pages, rows and requests are accounted for, and both ranks' rows are the same; at the end nothing is
left over.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec
import torch
from common import ROOT, machine, write_json
from stress_mix import Asked, Life, Mix, draw_mix
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from manyheads import EngineConfig
from manyheads.engine import build
from manyheads.engine.blueprint import Blueprint
from manyheads.engine.engine import Engine
from manyheads.engine.rank_messages import Follower, Message, Teller
from manyheads.engine.readout import PendingStep
from manyheads.engine.runner import Runner
from manyheads.engine.step import StepPlan, nothing
from manyheads.errors import QueueFull
from manyheads.request import EngineRequest, RequestDelta, TokenLogprobs
from manyheads.speculation.draft import NO_DRAFT, Draft
from manyheads.speculation.drafter import Drafter, Kept
from manyheads.speculation.tree import Tree
from tests.engine.test_graphs import record

STEP_SECONDS = 0.1
"""By the clock of the mixtures."""
MOST_STEPS = 20_000
BROKEN_TOKENS, BROKEN_ABOVE = slice(5, None, 16), 1.8
"""Tokens without an embedding; and places whose first hidden number is larger are what the last layer breaks."""
CLOSE = {"auto": 1e-3, "int8": 0.05, "fp8": 0.05}
"""How far log-probabilities may be apart, by what the K/V cache holds."""
LONGEST = 300
"""Characters of a mismatch in the result."""


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    end: tuple[str | None, int | None]
    """The reason and the stop token."""
    error: str
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs]

    @classmethod
    def of(cls, deltas: list[RequestDelta]) -> Answer:
        return cls(
            tokens=[token for delta in deltas for token in delta.new_token_ids],
            end=(deltas[-1].finish_reason, deltas[-1].stop_token_id) if deltas else (None, None),
            error=(deltas[-1].error or "") if deltas else "",
            logprobs=[entry for delta in deltas for entry in delta.logprobs or ()],
            prompt_logprobs=[entry for delta in deltas for entry in delta.prompt_logprobs or ()],
        )


@dataclass(eq=False)
class Job:
    """What is asked, with what it brings of its text, what it is to give, and what it gave."""

    asked: Asked
    message: EngineRequest
    wanted: Answer
    deltas: list[RequestDelta] = field(default_factory=list)
    is_sent: bool = False

    def __str__(self) -> str:
        return f"{msgspec.to_builtins(self.message)}, sent at {self.asked.at}, aborted at {self.asked.abort_at}"


class Overlapping(Runner):
    """As on a GPU: a step is launched before the one before is read."""

    @property
    def overlaps(self) -> bool:
        return True


class Overflowing:
    """A final norm behind a layer that makes no numbers of some places."""

    def __init__(self, norm: Any) -> None:
        self._norm = norm

    def add(self, x: Any, residual: Tensor, scheme: None) -> Tensor:
        hidden: Tensor = self._norm.add(x, residual, scheme)
        broken = hidden[:, 0] > BROKEN_ABOVE
        hidden[broken] = residual[broken] = math.inf
        return hidden


class Slowly:
    """Compiles grammars, in place of the compiler's threads, while so many steps pass."""

    def __init__(self, rng: Random) -> None:
        self._rng, self._left = rng, list[tuple[int, Future[Any], Callable[[], Any]]]()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        self._left.append((self._rng.randint(0, 4), future := Future[Any](), lambda: function(*args)))
        return future

    def go_on(self) -> None:
        left, self._left = self._left, []
        for steps, future, compile in left:
            if steps > 0:
                self._left.append((steps - 1, future, compile))
                continue
            try:
                future.set_result(compile())
            except Exception as error:  # as a thread does
                future.set_exception(error)


def break_model(runner: Runner, how: str) -> None:
    if how == "embedding":
        runner.model.embedding[BROKEN_TOKENS, 3] = math.inf
    elif how == "last layer":
        runner.model.norm = Overflowing(runner.model.norm)  # type: ignore[assignment]


def build_engine(config: EngineConfig, broken: str) -> tuple[Engine, Runner]:
    """An engine that has not measured costs, since nothing is to depend on them."""
    with mock.patch.object(build, "measure_costs"):
        engine = build.build_engine(config)
    assert isinstance(engine.runner, Runner)
    break_model(engine.runner, broken)
    return engine, engine.runner


def inspire(drafter: Drafter, engine: Engine, texts: dict[str, list[int]], rng: Random, skill: float) -> None:
    """Let a drafter know the texts now and then; that of another rank with the same numbers knows the same."""
    ranks = [(depth, rank) for depth, some in enumerate(drafter.prior) for rank in range(len(some))]
    chains = {choice for depth, rank in ranks for choice in ((0,) * depth + (rank,), (rank,) + (0,) * depth)}
    choices = sorted({(), *(drafter.offered or chains)}, key=lambda choice: (len(choice), choice))
    places = dict(zip(drafter.columns(Tree(tuple(choices))), choices, strict=True))  # a candidate's column, from 1 on
    del places[0]
    propose, vocab = drafter.propose, engine.ready.vocab_size

    def knowing(state: Any, kept: Kept, depth: int, nodes: float) -> tuple[Tensor, Tensor]:
        tokens, chances = propose(state, kept, depth, nodes)
        if rng.random() >= skill:
            return tokens, chances
        tokens, chances, good = tokens.clone(), chances.clone(), rng.choice([0, 0, 1, 2])
        running = {request.row: request.request_id for request in engine.scheduler.running}
        for i, row in enumerate(kept.index.tolist()):
            ahead = texts.get(running.get(row, ""), [])[int(state.cached_len[row]) + 1 :]
            for column, choice in places.items():
                right = ahead[len(choice) - 1] if len(choice) <= len(ahead) else 0
                tokens[i, column - 1] = (right + choice[-1] - good) % vocab
                chances[i, column - 1] = 0.6 if choice[-1] == good else 0.3 if choice[-1] < 3 else 0.0
        return tokens, chances

    drafter.propose = knowing  # type: ignore[method-assign]


class SecondRank:
    """Another rank, with all of the model, which does what the first one says that it does."""

    def __init__(self, config: EngineConfig, broken: str, first: Runner) -> None:
        plan = Blueprint.draw(config, lambda line: None)
        self.first, self.runner = first, plan.runner(lambda line: None)
        break_model(self.runner, broken)
        self._inbox = deque[bytes]()
        self._follower, self._teller = Follower(self.runner, plan.compiler(), self._receive), Teller()
        self._launch, first.launch = first.launch, self._launching  # type: ignore[method-assign]

    def _receive(self) -> Message:
        return msgspec.msgpack.decode(self._inbox.popleft(), type=Message)

    def _launching(self, plan: StepPlan, follow: Callable[[], None] = nothing) -> PendingStep:
        def lead() -> None:
            follow()
            self._inbox.append(msgspec.msgpack.encode(self._teller.followed(plan)))

        self._inbox.append(msgspec.msgpack.encode(self._teller.launch(plan)))
        step = self._launch(plan, lead)
        self._follower.follow(self._receive())
        assert not self._inbox, "the second rank has not read all"
        for name in ("cached_len", "drafts", "chances", "ints", "floats", "output_count", "tail"):
            a, b = (getattr(rank.state, name) for rank in (self.first, self.runner))
            rows = self.runner.state.num_rows
            assert a is None or torch.equal(a[:rows], b[:rows]), f"ranks differ in {name}: {a.tolist()}, {b.tolist()}"
        return step


class Run:
    """A mixture's requests and its engines, one after another."""

    def __init__(self, seed: int, mix: Mix, jobs: list[Job]) -> None:
        self.mix, self.jobs, self.rng, self.lives = mix, jobs, Random(f"run {seed}"), iter(mix.lives)
        self.texts = {job.message.request_id: job.message.prompt_token_ids + job.wanted.tokens for job in jobs}
        self.live: dict[str, list[Job]] = {}
        self.counts, self.now, self.step = Counter[str](), 1000.0, 0
        self.begin(next(self.lives))

    def begin(self, life: Life) -> None:
        """Start an engine."""
        rng, broken = self.rng, self.mix.broken
        self.engine, runner = build_engine(life.config, broken)
        engine, target, planner = self.engine, self.engine.scheduler.target, self.engine.planner
        assert engine.ready.max_model_len == life.config.max_model_len
        assert engine._grammars is not None
        if life.overlaps:
            runner.__class__ = Overlapping
        ranks = [runner, SecondRank(life.config, broken, runner).runner] if life.second_rank else [runner]
        seed, has_passes = rng.getrandbits(40), rng.random() < 0.5
        for rank in ranks:
            if life.recorded:
                recorded = record(mock.Mock(runner=rank))
                if has_passes:
                    recorded.record_passes(64, 64, {})
            if rank.drafter is not None and life.skill > 0:
                inspire(rank.drafter, engine, self.texts, Random(seed), life.skill)

        def choose(rows: int, prompt_tokens: int = 0) -> Draft:
            draft = planner.draft(rng.choice([1.25, 1.5, 2, 3, 4, 8, 16, 32]), rng.choice([None, 1, 2, 3]))
            return NO_DRAFT if rng.random() < life.plain or not draft.propose else draft

        if runner.drafter is not None:
            planner.choose = choose  # type: ignore[method-assign]
        target.most_prompt_tokens = lambda rows: rng.randint(1, target.max_num_batched_tokens)  # type: ignore[method-assign]
        engine.scheduler.admission.clock = lambda: self.now
        engine._grammars._compiler._threads = self.compiling = Slowly(rng)  # type: ignore[assignment]
        self.dies_at = None if life.steps is None else self.step + life.steps

    def hand_over(self) -> None:
        """The engine has died, and the next one takes what it was asked; what the aborted were to be told is lost."""
        self.count()
        self.begin(next(self.lives))
        for queue in self.live.values():
            for gone in queue[:-1]:
                gone.is_sent = False
            del queue[:-1]
            for job in queue:
                tokens = job.message.output_token_ids + Answer.of(job.deltas).tokens
                steps = job.deltas[-1].num_steps if job.deltas else 0
                some = {"output_token_ids": tokens, "num_steps": steps, "resumes": True}
                self.engine.add_request(msgspec.structs.replace(job.message, **some))

    def send(self, job: Job) -> None:
        try:
            self.engine.add_request(job.message)
        except QueueFull:
            self.counts["refused"] += 1
            assert not job.message.resumes, "who was accepted before is refused"
            return
        job.is_sent = True
        self.live.setdefault(job.message.request_id, []).append(job)

    def abort(self, job: Job) -> None:
        self.engine.abort(job.message.request_id)
        if job in self.live.get(job.message.request_id, []):
            self.counts["aborted"] += 1
            if job.asked.again:
                self.jobs.append(Job(job.asked, job.message, job.wanted))
                self.send(self.jobs[-1])

    def run(self) -> None:
        """All that is asked. Raises what ends it."""
        waiting = deque(sorted(self.jobs, key=lambda job: job.asked.at))
        aborts = [job for job in self.jobs if job.asked.abort_at is not None]
        while waiting or self.engine.has_work():
            while waiting and waiting[0].asked.at <= self.step:
                self.send(waiting.popleft())
            for job in aborts:
                if job.asked.abort_at == self.step:
                    self.abort(job)
            if self.step == self.dies_at:
                self.hand_over()
            self.tick()
            for delta in self.engine.step():
                queue = self.live[delta.request_id]
                queue[0].deltas.append(delta)
                if delta.finish_reason is not None:
                    queue.pop(0)
            self.engine.check_integrity()
            assert self.step < MOST_STEPS, "it does not end"
        self.count()

    def tick(self) -> None:
        self.now += STEP_SECONDS
        self.step += 1
        self.compiling.go_on()

    def count(self) -> None:
        stats = self.engine.stats()
        some = {"engines": 1, "steps": stats.steps, "tokens": stats.generation_tokens}
        some |= {"accepted tokens": stats.accepted_tokens, "tokens of shared prefixes": stats.prefix_hits}
        self.counts.update(some | {"preemptions": stats.preemptions})

    def left_over(self) -> Iterator[str]:
        """What an engine without requests still has."""
        engine, scheduler, pages = self.engine, self.engine.scheduler, self.engine.scheduler.pages
        for _ in range(6):  # the grammars of requests that are gone
            self.tick()
            engine.step()
        assert engine._grammars is not None
        for name, some in {
            "requests": [*engine._requests, *engine._ended, *engine._drawing, *scheduler.running],
            "deltas": [*engine._pending, *engine._said],
            "steps": engine._unread,
            "lines": scheduler.waiting._lines,
            "grammars": engine._grammars._held,
            "pages": pages.num_needed or pages.num_usable - pages.num_available,
        }.items():
            if some:
                yield f"left over: {name}: {some}"


def alone(engine: Engine, message: EngineRequest) -> Answer:
    """What a plain engine gives, without the limits that others, or trees, have to do with."""
    params = msgspec.structs.replace(message.params, max_steps=None)
    engine.add_request(msgspec.structs.replace(message, params=params, timeout=None))
    deltas: list[RequestDelta] = []
    while engine.has_work():
        deltas += engine.step()
    return Answer.of(deltas)


def differences(mix: Mix, job: Job) -> Iterator[str]:
    """What of a request's answer is not as it should be."""
    ends = [delta.finish_reason is not None for delta in job.deltas]
    if sum(ends) != 1 or not ends[-1]:
        yield f"{sum(ends)} ends in {len(ends)} deltas"
        return
    message, params, wanted, got = job.message, job.message.params, job.wanted, Answer.of(job.deltas)
    done, text, reason = len(message.output_token_ids), message.output_token_ids + got.tokens, got.end[0]
    is_lossy = params.acceptance == "typical" and params.temperature > 0 and params.speculative
    if "did not start within" in got.error:
        if text or (message.timeout is None and all(life.config.max_wait is None for life in mix.lives)):
            yield f"refused though it may not be: {got.error}"
        return
    if params.grammar is not None and "not finite" in got.error + wanted.error:
        # What a grammar leaves no choice about may be told before an error, or not. And where one engine draws a token,
        # another knows it and computes it in the middle of a chunk, where nobody reads what the last layer makes of it;
        # or it does not compute it, since the text ends with it.
        most = min(len(text), len(wanted.tokens))
        if not mix.broken or (text[:most] != wanted.tokens[:most] and not is_lossy):
            yield f"{text}, error {got.error!r}, and not {wanted}"
        return
    if reason == "error":
        if is_lossy and mix.broken:
            return
        if text != wanted.tokens or got.error != wanted.error:
            yield f"{text}, error {got.error!r}, and not {wanted}"
        return
    yield from broken_rules(job, got, text)
    whole = reason != "abort" and (reason != "length" or params.max_steps is None)
    if is_lossy:
        return
    if text != (wanted.tokens if whole else wanted.tokens[: len(text)]) or (whole and got.end != wanted.end):
        yield f"{text}, {got.end}, and not {wanted}"
    pairs = [(got.logprobs, wanted.logprobs[done : len(text)])]
    pairs += [(got.prompt_logprobs, wanted.prompt_logprobs)] if whole and done == 0 else []
    for mine, others in pairs:
        if not alike(mine, others, CLOSE[mix.plain.kv_cache_dtype]):
            yield f"log-probabilities {mine} and not {others}"


def alike(some: list[TokenLogprobs], others: list[TokenLogprobs], tolerance: float) -> bool:
    tokens, values = ([(entry.token_id, entry.logprob) for entry in entries] for entries in (some, others))
    return len(tokens) == len(values) and all(
        a == b and abs(x - y) <= tolerance for (a, x), (b, y) in zip(tokens, values, strict=True)
    )


def broken_rules(job: Job, got: Answer, text: list[int]) -> Iterator[str]:
    """What a request says of any answer to it."""
    params, prompt, (reason, stop) = job.message.params, job.message.prompt_token_ids, got.end
    is_free = params.grammar is None and params.min_tokens == 0
    whole = (*prompt, *text)
    rules = {
        "too many tokens": params.max_tokens is not None and len(text) > params.max_tokens,
        "too many steps": params.max_steps is not None and job.deltas[-1].num_steps > params.max_steps,
        "a stop token that is not the last": stop is not None and text[-1] != stop,
        "a stop too soon": reason == "stop" and params.grammar is None and len(text) <= params.min_tokens,
        "a token that is not allowed": bool(
            is_free and params.allowed_token_ids and set(text) - set(params.allowed_token_ids)
        ),
        "a bad run": any(
            whole[max(0, end - len(run)) : end] == run
            for run in (params.bad_token_ids if is_free and not params.allowed_token_ids else ())
            for end in range(len(prompt) + 1, len(whole) + 1)
        ),
        "log-probabilities of other tokens": params.logprobs is not None
        and [entry.token_id for entry in got.logprobs] != got.tokens,
        "a trace of other tokens": any(
            delta.trace is not None and delta.trace.num_tokens != len(delta.new_token_ids) for delta in job.deltas
        ),
        "a cached prompt that is longer": any(delta.num_cached_tokens > len(prompt) for delta in job.deltas),
    }
    yield from (f"{rule}: {text}, {got.end}" for rule, is_broken in rules.items() if is_broken)


def stress(seed: int, root: Path, counts: Counter[str], features: Counter[str]) -> list[str]:
    """Run the mixture of a seed, and count what it has: what is not as it should be, if anything."""
    mix = draw_mix(seed, root)
    try:
        plain, _ = build_engine(mix.plain, mix.broken)
        jobs = []
        for asked in mix.asked:
            wanted = alone(plain, asked.message)
            known = wanted.tokens[: int(asked.known * len(wanted.tokens))]
            message = msgspec.structs.replace(asked.message, output_token_ids=known, resumes=bool(known))
            jobs.append(Job(asked, message, wanted))
        run = Run(seed, mix, jobs)
        run.run()
        sent = [job for job in run.jobs if job.is_sent]
        problems = [f"{problem}\n    of {job}" for job in sent for problem in differences(mix, job)]
        problems += run.left_over()
    except Exception:  # a mismatch as any other, whose seed is to be told
        return [f"{replace(mix, asked=[])}", traceback.format_exc()]
    counts.update(run.counts | {"seeds": 1, "requests": len(sent)})
    counts.update({"not finite": sum("not finite" in Answer.of(job.deltas).error for job in sent)})
    features.update(mix.features())
    features.update(f"asked: {name}" for asked in mix.asked for name in asked.options)
    return [f"{replace(mix, asked=[])}", *problems] if problems else []


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs=2, type=int, default=(0, 1000), metavar=("FROM", "COUNT"))
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no seed after so many")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/stress.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # tiny models have peculiar sizes
    disable_progress_bar()  # type: ignore[no-untyped-call]
    gc.collect()
    gc.freeze()  # engines that are built look for garbage, which what imports have made is not
    about, begun, wrong = machine(), time.monotonic(), dict[int, list[str]]()
    counts, features = Counter[str](), Counter[str]()
    first, count = args.seeds
    with tempfile.TemporaryDirectory() as root:
        for seed in range(first, first + count):
            if time.monotonic() - begun > args.seconds:
                break
            if problems := stress(seed, Path(root), counts, features):
                wrong[seed] = [problem[:LONGEST] for problem in problems[1:3]]
                print(f"seed {seed}:", *problems, sep="\n  ", flush=True)
    result = {
        "machine": about,
        "first_seed": first,
        "seconds": round(time.monotonic() - begun),
        "counts": dict(counts),
        "features": dict(features.most_common()),
        "mismatches": wrong,
    }
    write_json(args.out, result)
    print(result["counts"])
    if wrong:
        raise SystemExit(f"mismatches: to repeat one, --seeds SEED 1 for a SEED of {', '.join(map(str, wrong))}")


if __name__ == "__main__":
    main()

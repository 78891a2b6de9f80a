"""A fake model whose text is known, under the real scheduler and engine, and what must hold after every step."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from manyheads.engine.admission import Admission
from manyheads.engine.engine import Engine
from manyheads.engine.page_manager import PageManager
from manyheads.engine.scheduler import Scheduler, StepsUnread
from manyheads.engine.step import Request, RowResult, StepPlan, StepResult, nothing
from manyheads.engine.step_target import StepTarget
from manyheads.request import EngineReady, EngineRequest, RequestDelta, SamplingParams, TokenLogprobs
from manyheads.speculation.draft import SIZES, Draft
from manyheads.speculation.planner import Planner
from manyheads.speculation.tree import Choice, Tree

VOCAB, EOS = 7, 0
HEADS, RANKS = 3, 3


def entry_of(context: list[int], token: int) -> int:
    """The fake model: a token's K/V entry depends on all entries before it; modulo VOCAB it is the next token."""
    return hash((*context, token))


def continuation(prompt: list[int], params: SamplingParams, max_len: int) -> list[int]:
    """The right answer, without an engine."""
    stop = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    context: list[int] = []
    for token in prompt:
        context.append(entry_of(context, token))
    output: list[int] = []
    while len(prompt) + len(output) < max_len and len(output) != params.max_tokens and stop.isdisjoint(output[-1:]):
        output.append(context[-1] % VOCAB)
        context.append(entry_of(context, output[-1]))
    return output


class FakeStep:
    """A result that the host must not see before it asks for it."""

    foreseen: tuple[RowResult, ...] = ()

    def __init__(self, runner: FakeRunner, result: StepResult) -> None:
        self.runner, self.result = runner, result

    def read(self) -> StepResult:
        assert self.runner.unread.popleft() is self, "steps are read once each, in order"
        return self.result


class FakeRunner:
    """Keeps a paged cache and the rows' state as the real runner does, so that a wrong page gives a wrong text.

    What the step does happens at its launch, as far as the host can tell; what it gave stays unknown until it is read.

    Args:
        skill: of ten proposals of a head, how many are right; the rank of the right one varies below 10.
        ragged: whether a row brings a part of the nodes that it may bring, another one in each step.
        window: how far back it looks at the companions of pages, where these have some.
    """

    def __init__(
        self, page_size: int, max_len: int, skill: int, overlaps: bool, ragged: bool = False, window: int = 0
    ) -> None:
        self.page_size, self.max_len, self.skill = page_size, max_len, skill
        self.overlaps, self.window = overlaps, window
        self.random = random.Random(0) if ragged else None
        self.cache: dict[int, int] = {}  # slot → K/V entry
        self.companions: dict[int, list[int]] = {}  # page → those that hold the same for other layers
        self.cached_len: dict[int, int] = {}  # by row, from here on
        self.last_token: dict[int, int] = {}
        self.candidates: dict[int, list[list[int]]] = {}
        self.tables: dict[int, dict[int, int]] = {}  # row → place → page
        self.writers: dict[int, Request] = {}  # page → who writes it in this step
        self.plans: list[StepPlan] = []
        self.unread: deque[FakeStep] = deque()

    def listen(self, beat: Callable[[], None]) -> None:
        pass

    def watch(self, tell: Callable[[str], None]) -> None:
        pass

    def launch(self, plan: StepPlan, follow: Callable[[], None] = nothing) -> FakeStep:
        assert len(self.unread) <= self.overlaps, "the host is too far ahead"
        step = FakeStep(self, self.compute(plan))
        self.unread.append(step)
        return step

    def compute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        self.writers.clear()
        self.companions.update(plan.companions)
        requests = [*(chunk.request for chunk in plan.chunks), *plan.decoding]
        assert requests, "a step without a row"
        assert len(set(map(id, requests))) == len(requests)
        for request in plan.admitted:
            self.cached_len[request.row] = request.cached_len
            self.last_token[request.row] = request.tokens[-1]
            self.candidates.pop(request.row, None)
        for request in requests:
            self.check_row(request)
        result = StepResult(rows=[], hits=[[0] * RANKS for _ in range(HEADS)], trials=[0] * HEADS)
        for chunk in plan.chunks:
            request, n = chunk.request, chunk.num_inflight
            assert request.unread == 0, "known tokens, and the device is past them"
            assert 1 <= n <= request.num_uncomputed
            assert chunk.is_last == (n == request.num_uncomputed)
            known = request.tokens[request.cached_len :][:n]
            nodes = {(0,) * i: token for i, token in enumerate(known)}
            target = self.forward(request, nodes)[(0,) * (n - 1)]
            self.cached_len[request.row] += n
            if chunk.is_last:
                self.finish(plan, result, request, [target], [()])
        for request in plan.decoding:
            self.decode(plan, result, request, plan.draft.tree)
        if plan.draft.propose and plan.decoding:
            result.gains.extend(0.1 * i for i in range(len(SIZES)))
        return result

    def check_row(self, request: Request) -> None:
        """What the host knows of a row bounds what the device has; the row's pages go to the device."""
        cached_len, table = self.cached_len[request.row], request.table
        if request.unread == 0:
            assert cached_len == request.cached_len == request.max_cached_len
        else:
            assert request.cached_len <= cached_len <= request.max_cached_len
            assert len(request.tokens) + request.unread < self.max_len, "there may be no room"
            assert request.room > 1, "it has all that it gets"
        device = self.tables.setdefault(request.row, {})
        device |= {i: table.pages[i] for i in range(table.num_synced, len(table.pages))}
        table.num_synced = len(table.pages)

    def decode(self, plan: StepPlan, result: StepResult, request: Request, tree: Tree) -> None:
        row = request.row
        cached_len = self.cached_len[row]
        assert request.decoding
        assert request.has_candidates == (row in self.candidates)
        brought = self.part_of(tree)
        speculates = request.has_candidates and request.params.speculative
        # a row that knows no candidates may still fill the step up, with what it must not accept
        taken = brought if speculates else brought[:1]
        nodes: dict[Choice, int] = dict.fromkeys(brought, 1)
        nodes[()] = self.last_token[row]
        nodes |= {choice: self.candidates[row][len(choice) - 1][choice[-1]] for choice in taken[1:]}
        target = self.forward(request, nodes)
        path: list[Choice] = [()]
        while below := [c for c in taken if c and c[:-1] == path[-1] and nodes[c] == target[path[-1]]]:
            path.append(below[0])
        tokens = [target[choice] for choice in path]
        where = {choice: cached_len + i for i, choice in enumerate(nodes)}
        for depth, choice in enumerate(path):
            sources, targets = self.slots(request, where[choice]), self.slots(request, cached_len + depth)
            for source, destination in zip(sources, targets, strict=True):
                self.cache[destination] = self.cache[source]
        self.cached_len[row] += len(path)
        if request.has_candidates and plan.draft.propose:
            for depth, token in enumerate(tokens[:HEADS]):
                result.trials[depth] += 1
                for rank, candidate in enumerate(self.candidates[row][depth]):
                    result.hits[depth][rank] += candidate == token
        self.finish(plan, result, request, tokens, taken)

    def part_of(self, tree: Tree) -> list[Choice]:
        """Some of its nodes, with all that is above them; all of them once in a while."""
        if self.random is None or self.random.random() < 0.2:
            return list(tree.choices)
        share, part = self.random.random(), [tree.choices[0]]
        for choice in tree.choices[1:]:
            if choice[:-1] in part and self.random.random() < share:
                part.append(choice)
        return part

    def forward(self, request: Request, nodes: dict[Choice, int]) -> dict[Choice, int]:
        """Compute a row's tree; the token that the model continues each node with."""
        cached_len = self.cached_len[request.row]
        prefix = [self.cache[self.slot(request, i)] for i in range(cached_len)]
        for i in range(max(0, cached_len + 1 - self.window), cached_len):
            assert {self.cache[slot] for slot in self.slots(request, i)} == {prefix[i]}, "a companion of another text"
        entries: dict[Choice, int] = {}
        for i, (choice, token) in enumerate(nodes.items()):
            above = [entries[choice[:depth]] for depth in range(len(choice))]
            entries[choice] = entry_of(prefix + above, token)
            for slot in self.slots(request, cached_len + i):
                assert self.writers.setdefault(slot // self.page_size, request) is request, "a page with two writers"
                self.cache[slot] = entries[choice]
        return {choice: entry % VOCAB for choice, entry in entries.items()}

    def finish(
        self, plan: StepPlan, result: StepResult, request: Request, tokens: list[int], taken: list[Choice]
    ) -> None:
        row, params = request.row, request.params
        logprobs = None if params.logprobs is None else [TokenLogprobs(token, 0.0, 1, []) for token in tokens]
        result.rows.append(RowResult(request, tokens, logprobs, max(map(len, taken)), len(taken) - 1))
        self.last_token[row] = tokens[-1]
        if plan.draft.propose:
            context = [self.cache[self.slot(request, i)] for i in range(self.cached_len[row])]
            self.candidates[row] = self.propose(context, tokens[-1])
        else:
            self.candidates.pop(row, None)

    def propose(self, context: list[int], token: int) -> list[list[int]]:
        context, proposals = list(context), []
        for _ in range(HEADS):
            context.append(entry_of(context, token))
            token = context[-1] % VOCAB
            luck = context[-1] // VOCAB
            ranks = [(token + 1 + rank) % VOCAB for rank in range(RANKS)]  # all of them wrong
            if luck % 10 < self.skill:
                ranks[0 if self.skill == 10 else luck // 10 % RANKS] = token
            proposals.append(ranks)
        return proposals

    def slot(self, request: Request, position: int) -> int:
        page = self.tables[request.row][position // self.page_size]
        assert page == request.table.pages[position // self.page_size]
        return page * self.page_size + position % self.page_size

    def slots(self, request: Request, position: int) -> list[int]:
        """Where a token's entry is, in each group of layers."""
        slot = self.slot(request, position)
        page, offset = divmod(slot, self.page_size)
        return [slot, *(companion * self.page_size + offset for companion in self.companions.get(page, []))]


class RestlessPlanner(Planner):
    """Trees of another size at every step."""

    def __init__(self, sizes: list[float]) -> None:
        super().__init__([[0.6, 0.3, 0.1]] * HEADS)
        self.sizes = itertools.cycle(sizes)

    def choose(self, rows: int, prompt_tokens: int = 0) -> Draft:
        return self.draft(next(self.sizes))


@dataclass(frozen=True, kw_only=True)
class Setup:
    pages: int = 16
    """That texts may have at once, with companions."""
    companions: int = 0
    window: int = 4
    """Of layers whose pages are companions, if there are any."""
    page_size: int = 4
    max_len: int = 32
    rows: int = 4
    budget: int = 8
    max_queue: int = 8
    max_wait: float | None = None
    step_seconds: float = 0.1
    """What a step takes by the scheduler's clock."""
    sizes: list[float] = field(default_factory=lambda: [1])
    """Nodes a row, on average, of one step after the other; a row may bring four times as many."""
    ragged: bool = False
    skill: int = 10
    caching: bool = True
    overlaps: bool = False


@dataclass
class Sent:
    message: EngineRequest
    abort_at: int | None = None
    output: list[int] = field(default_factory=list)
    last: RequestDelta | None = None


class World:
    """An engine, and everything that it was asked and has said. Looks at all that must hold after every step."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.now = 1000.0
        window = setup.window if setup.companions else None
        num_pages = setup.pages * (1 + setup.companions) + 1
        pages = PageManager(num_pages, setup.page_size, setup.caching, window, setup.companions)
        self.max_len = min(setup.max_len, pages.longest_text)
        self.runner = FakeRunner(setup.page_size, self.max_len, setup.skill, setup.overlaps, setup.ragged, window or 0)
        self.scheduler = Scheduler(
            pages,
            StepTarget(RestlessPlanner(setup.sizes), setup.budget),
            max_num_seqs=setup.rows,
            max_model_len=self.max_len,
            max_queue=setup.max_queue,
            admission=Admission(setup.max_wait, lambda: self.now),
        )
        ready = EngineReady(
            model="fake",
            max_model_len=self.max_len,
            vocab_size=VOCAB,
            drafter="medusa",
            draft_depth=HEADS,
            dtype="float32",
            device="cpu",
            num_pages=setup.pages,
            page_size=setup.page_size,
            eos_token_ids=[EOS],
        )
        self.engine = Engine(self.runner, self.scheduler, ready, seed=0)
        self.sent: dict[str, Sent] = {}
        self.finished: list[str] = []
        self.num_steps = 0

    def watch_preemptions(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Nobody is preempted while steps are unread; the numbers of the steps that found that they would be."""
        schedule, preempt = self.scheduler.schedule, self.scheduler._preempt
        too_early: list[int] = []

        def scheduling() -> StepPlan | None:
            try:
                return schedule()
            except StepsUnread:
                too_early.append(self.num_steps)
                raise

        def preempting(request: Request) -> None:
            assert all(other.unread == 0 for other in self.scheduler.running)
            preempt(request)

        monkeypatch.setattr(self.scheduler, "schedule", scheduling)
        monkeypatch.setattr(self.scheduler, "_preempt", preempting)
        return too_early

    def add(
        self,
        prompt: list[int],
        *,
        abort_after: int | None = None,
        client: str = "",
        priority: int = 0,
        timeout: float | None = None,
        **params: Any,
    ) -> str:
        name = str(len(self.sent))
        message = EngineRequest(
            request_id=name,
            prompt_token_ids=prompt,
            params=SamplingParams(temperature=0.0, **params),
            client=client,
            priority=priority,
            timeout=timeout,
        )
        self.engine.add_request(message)
        self.sent[name] = Sent(message, None if abort_after is None else self.num_steps + abort_after)
        return name

    def step(self) -> None:
        for name, sent in self.sent.items():
            if sent.abort_at == self.num_steps:
                self.engine.abort(name)
        self.num_steps += 1
        self.now += self.setup.step_seconds
        scheduler = self.scheduler
        oldest = next(iter([*scheduler.running, *scheduler.waiting.in_turn(scheduler.waiting.served)]), None)
        before = (len(oldest.tokens), oldest.cached_len, oldest.unread) if oldest else (0, 0, 0)
        deltas = self.engine.step()
        self.engine.check_integrity()
        for delta in deltas:
            self.take(delta)
        if oldest is not None and self.sent[oldest.request_id].last is None:
            self.check_progress(oldest, *before)
        self.check_order()
        if scheduler.running:
            self.check_plan(self.runner.plans[-1])

    def check_progress(self, oldest: Request, num_tokens: int, cached_len: int, unread: int) -> None:
        """What was unread is read; who had nothing unread runs."""
        if unread:
            assert len(oldest.tokens) > num_tokens, "the oldest request stands still"
        else:
            more = (len(oldest.tokens), oldest.cached_len, oldest.unread) > (num_tokens, cached_len, 0)
            assert more, "the oldest request stands still"
        assert self.setup.overlaps or oldest.unread == 0
        assert len(oldest.tokens) + oldest.unread <= oldest.max_len + HEADS

    def take(self, delta: RequestDelta) -> None:
        sent = self.sent[delta.request_id]
        assert sent.last is None, "a delta after the last one"
        sent.output += delta.new_token_ids
        if sent.message.params.logprobs is not None and delta.new_token_ids:
            assert [x.token_id for x in delta.logprobs or ()] == delta.new_token_ids
        assert delta.num_cached_tokens % self.setup.page_size == 0
        assert delta.num_cached_tokens < len(sent.message.prompt_token_ids)
        if delta.finish_reason is not None:
            sent.last = delta
            self.finished.append(delta.request_id)

    def check_order(self) -> None:
        """First come, first served, among requests of one client and priority: nobody who waits came before one who
        runs."""
        orders: dict[tuple[str, int], list[int]] = {}
        for request in (*self.scheduler.running, *self.scheduler.waiting):
            orders.setdefault((request.client, request.priority), []).append(int(request.request_id))
        for order in orders.values():
            assert order == sorted(order)

    def check_plan(self, plan: StepPlan) -> None:
        assert len(self.scheduler.running) <= self.setup.rows
        assert plan.num_prompt_tokens <= self.setup.budget

    def run(self) -> None:
        """To the end, which comes within as many steps as there are tokens: the oldest gains one at every step (or, if
        one more might be too many, at every other one). A request that goes before it may set it back, once."""
        most = sum(self.max_len for sent in self.sent.values() if sent.last is None)
        most *= len({sent.message.priority for sent in self.sent.values()}) or 1
        bound = self.num_steps + (2 * most + 2 if self.setup.overlaps else most + 1)
        while self.engine.has_work():
            assert self.num_steps < bound, "does not end"
            self.step()
        self.check_answers()

    def check_answers(self) -> None:
        assert sorted(self.finished, key=int) == list(self.sent)
        for sent in self.sent.values():
            params, last = sent.message.params, sent.last
            right = continuation(sent.message.prompt_token_ids, params, self.max_len)
            stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
            assert last is not None
            assert sent.output == right[: len(sent.output)]
            if last.finish_reason == "abort":
                assert sent.abort_at is not None
                assert sent.output != right
            elif last.finish_reason == "stop":
                assert sent.output == right
                assert last.stop_token_id == right[-1]
                assert right[-1] in stops
            else:
                assert last.finish_reason == "length"
                assert not stops & set(sent.output)
                assert sent.output == right or last.num_steps == params.max_steps
            assert params.max_steps is None or last.num_steps <= params.max_steps
        assert not self.runner.unread
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_pages == stats.num_pages == self.setup.pages
        assert sorted(self.scheduler._free_rows) == list(range(self.setup.rows))
        assert stats.generation_tokens == sum(len(sent.output) for sent in self.sent.values())
        assert stats.prompt_tokens == sum(len(s.message.prompt_token_ids) for s in self.sent.values() if s.output)

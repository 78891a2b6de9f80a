"""Scheduler and engine, driven by a fake model whose text is known: whatever is scheduled, the text must not change."""

from __future__ import annotations

import itertools
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.engine.block_manager import BlockManager
from manyheads.engine.engine import Engine
from manyheads.engine.scheduler import Scheduler, Unsettled
from manyheads.engine.step import Request, RowResult, StepPlan, StepResult
from manyheads.request import (
    EngineReady,
    EngineRequest,
    QueueFull,
    RequestDelta,
    RequestError,
    SamplingParams,
    TokenLogprobs,
)
from manyheads.speculation.planner import SIZES, Draft, Planner
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
    """

    def __init__(self, page_size: int, skill: int, overlaps: bool, ragged: bool = False) -> None:
        self.page_size, self.skill, self.overlaps = page_size, skill, overlaps
        self.random = random.Random(0) if ragged else None
        self.cache: dict[int, int] = {}  # slot → K/V entry
        self.cached_len: dict[int, int] = {}  # by row, from here on
        self.last_token: dict[int, int] = {}
        self.candidates: dict[int, list[list[int]]] = {}
        self.tables: dict[int, dict[int, int]] = {}  # row → place → page
        self.writers: dict[int, Request] = {}  # page → who writes it in this step
        self.plans: list[StepPlan] = []
        self.unread: deque[FakeStep] = deque()

    def launch(self, plan: StepPlan) -> FakeStep:
        assert len(self.unread) <= self.overlaps, "the host is too far ahead"
        step = FakeStep(self, self.compute(plan))
        self.unread.append(step)
        return step

    def compute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        self.writers.clear()
        requests = [*(chunk.request for chunk in plan.chunks), *plan.decoding]
        assert requests, "a step without a row"
        assert len(set(map(id, requests))) == len(requests)
        for request in plan.admitted:
            self.cached_len[row_of(request)] = request.cached_len
            self.last_token[row_of(request)] = request.tokens[-1]
            self.candidates.pop(row_of(request), None)
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
            self.cached_len[row_of(request)] += n
            if chunk.is_last:
                self.finish(plan, result, request, [target], [()])
        for request in plan.decoding:
            self.decode(plan, result, request, plan.draft.tree)
        if plan.draft.propose and plan.decoding:
            result.gains.extend(0.1 * i for i in range(len(SIZES)))
        return result

    def check_row(self, request: Request) -> None:
        """What the host knows of a row bounds what the device has; the row's pages go to the device."""
        cached_len, table = self.cached_len[row_of(request)], request.table
        if request.unread == 0:
            assert cached_len == request.cached_len == request.max_cached_len
        else:
            assert request.cached_len <= cached_len <= request.max_cached_len
            assert len(request.tokens) + request.unread < request.max_len, "it may have all that it gets"
        device = self.tables.setdefault(row_of(request), {})
        device |= {i: table.blocks[i] for i in range(table.num_synced, len(table.blocks))}
        table.num_synced = len(table.blocks)

    def decode(self, plan: StepPlan, result: StepResult, request: Request, tree: Tree) -> None:
        row = row_of(request)
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
            self.cache[self.slot(request, cached_len + depth)] = self.cache[self.slot(request, where[choice])]
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
        cached_len = self.cached_len[row_of(request)]
        prefix = [self.cache[self.slot(request, i)] for i in range(cached_len)]
        entries: dict[Choice, int] = {}
        for i, (choice, token) in enumerate(nodes.items()):
            above = [entries[choice[:depth]] for depth in range(len(choice))]
            entries[choice] = entry_of(prefix + above, token)
            slot = self.slot(request, cached_len + i)
            assert self.writers.setdefault(slot // self.page_size, request) is request, "a page with two writers"
            self.cache[slot] = entries[choice]
        return {choice: entry % VOCAB for choice, entry in entries.items()}

    def finish(
        self, plan: StepPlan, result: StepResult, request: Request, tokens: list[int], taken: list[Choice]
    ) -> None:
        row, params = row_of(request), request.params
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
        page = self.tables[row_of(request)][position // self.page_size]
        assert page == request.table.blocks[position // self.page_size]
        return page * self.page_size + position % self.page_size


def row_of(request: Request) -> int:
    assert request.row is not None
    return request.row


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
    page_size: int = 4
    max_len: int = 32
    rows: int = 4
    budget: int = 8
    max_queue: int = 8
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
        self.runner = FakeRunner(setup.page_size, setup.skill, setup.overlaps, setup.ragged)
        self.scheduler = Scheduler(
            BlockManager(setup.pages + 1, setup.page_size, setup.caching),
            RestlessPlanner(setup.sizes),
            max_num_seqs=setup.rows,
            max_num_batched_tokens=setup.budget,
            max_queue=setup.max_queue,
        )
        self.max_len = min(setup.max_len, setup.pages * setup.page_size)
        ready = EngineReady(
            model="fake",
            max_model_len=self.max_len,
            vocab_size=VOCAB,
            num_heads=HEADS,
            dtype="float32",
            device="cpu",
            num_blocks=setup.pages,
            block_size=setup.page_size,
            eos_token_ids=[EOS],
        )
        self.engine = Engine(self.runner, self.scheduler, ready, seed=0)
        self.sent: dict[str, Sent] = {}
        self.finished: list[str] = []
        self.num_steps = 0

    def add(self, prompt: list[int], *, abort_after: int | None = None, **params: Any) -> str:
        name = str(len(self.sent))
        message = EngineRequest(
            request_id=name, prompt_token_ids=prompt, params=SamplingParams(temperature=0.0, **params)
        )
        self.engine.add_request(message)
        self.sent[name] = Sent(message, None if abort_after is None else self.num_steps + abort_after)
        return name

    def step(self) -> None:
        for name, sent in self.sent.items():
            if sent.abort_at == self.num_steps:
                self.engine.abort(name)
        self.num_steps += 1
        scheduler = self.scheduler
        oldest = next(iter([*scheduler.running, *scheduler.waiting]), None)
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
        """First come, first served: nobody who waits came before one who runs."""
        order = [int(request.request_id) for request in (*self.scheduler.running, *self.scheduler.waiting)]
        assert order == sorted(order)

    def check_plan(self, plan: StepPlan) -> None:
        assert len(self.scheduler.running) <= self.setup.rows
        assert plan.num_prompt_tokens <= self.setup.budget

    def run(self) -> None:
        """To the end, which comes within as many steps as there are tokens: the oldest gains one at every step (or, if
        one more might be too many, at every other one)."""
        most = sum(self.max_len for sent in self.sent.values() if sent.last is None)
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
        assert stats.num_free_blocks == stats.num_blocks == self.setup.pages
        assert sorted(self.scheduler._free_rows) == list(range(self.setup.rows))
        assert stats.generation_tokens == sum(len(sent.output) for sent in self.sent.values())
        assert stats.prompt_tokens == sum(len(s.message.prompt_token_ids) for s in self.sent.values() if s.output)


@dataclass(frozen=True, kw_only=True)
class Arrival:
    after: int
    """Steps since the one before."""
    prompt: list[int]
    params: dict[str, Any]
    abort_after: int | None


def several(elements: st.SearchStrategy[Any], low: int, high: int) -> st.SearchStrategy[list[Any]]:
    """Lists whose every length is equally likely (plain `lists` are mostly short)."""
    return st.integers(low, high).flatmap(lambda n: st.lists(elements, min_size=n, max_size=n))


SETUPS = st.builds(
    Setup,
    pages=st.integers(1, 24),
    page_size=st.integers(2, 4),
    rows=st.integers(1, 5),
    budget=st.integers(1, 12),
    max_queue=st.integers(1, 8),
    sizes=st.lists(st.sampled_from([1, 1.25, 2, 4, 8, 13]), min_size=1, max_size=4),
    skill=st.sampled_from([0, 5, 8, 10]),
    caching=st.booleans(),
    ragged=st.booleans(),
    overlaps=st.booleans(),
)
ARRIVALS = st.builds(
    Arrival,
    after=st.sampled_from([0, 0, 0, 1, 2, 5]),
    prompt=several(st.integers(1, 2), 1, 14),
    params=st.fixed_dictionaries(
        {"ignore_eos": st.sampled_from([True, True, False])},
        optional={
            "max_tokens": st.integers(1, 16),
            "max_steps": st.integers(1, 9),
            "stop_token_ids": st.just((3,)),
            "speculative": st.just(False),
            "logprobs": st.just(0),
        },
    ),
    abort_after=st.one_of(st.none(), st.none(), st.integers(0, 12)),
)


@given(setup=SETUPS, arrivals=several(ARRIVALS, 1, 12))
@settings(max_examples=800, deadline=None)
def test_any_traffic(setup: Setup, arrivals: list[Arrival]) -> None:
    world = World(setup)
    for arrival in arrivals:
        for _ in range(arrival.after):
            world.step()
        waiting = len(world.scheduler.waiting)
        refusal: type[Exception] | None = None
        if len(arrival.prompt) + arrival.params.get("max_tokens", 1) > world.max_len:
            refusal = RequestError
        elif waiting >= setup.max_queue:
            refusal = QueueFull
        if refusal is None:
            world.add(arrival.prompt, abort_after=arrival.abort_after, **arrival.params)
        else:
            with pytest.raises(refusal):
                world.add(arrival.prompt, **arrival.params)
            assert len(world.scheduler.waiting) == waiting
        world.engine.check_integrity()
    world.run()


@pytest.fixture(params=[False, True], ids=["in turn", "overlapping"])
def overlaps(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_preemption_keeps_the_text(overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps, pages=8, page_size=2, max_len=16, budget=16))
    for first in (1, 2, 3, 4):
        world.add([first] * 4, ignore_eos=True)
    world.run()
    assert world.engine.stats().preemptions > 0
    assert world.finished == ["0", "1", "2", "3"]
    assert [len(sent.output) for sent in world.sent.values()] == [12] * 4


@pytest.mark.parametrize(("pages", "trees"), [(36, {32, 16}), (20, {16, 8}), (12, {8, 1}), (8, {1})])
def test_trees_shrink_before_anyone_is_preempted(pages: int, trees: set[int], overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps, pages=pages, page_size=2, max_len=8, sizes=[8], skill=0))
    for first in (1, 2):
        world.add([first], max_tokens=7, ignore_eos=True)
    world.run()
    assert {plan.draft.tree.num_nodes for plan in world.runner.plans if len(plan.decoding) == 2} == trees
    assert world.engine.stats().preemptions == 0


def test_admission_leaves_a_page_for_those_who_run(overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps, pages=3, page_size=2))
    world.add([1, 1], max_tokens=3, ignore_eos=True)
    world.add([2, 2, 2], max_tokens=2, ignore_eos=True)  # its two pages are free, but one is needed in the next step
    world.run()
    assert world.engine.stats().preemptions == 0


def test_a_chunk_shrinks_to_the_pages_that_are_left(overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps, pages=4, page_size=2, budget=4))
    world.add([1, 1], max_tokens=2, ignore_eos=True)
    world.add([2] * 7, max_tokens=1)
    world.run()
    assert [[chunk.num_inflight for chunk in plan.chunks] for plan in world.runner.plans] == [[2, 2], [2], [3]]
    assert world.engine.stats().preemptions == 0


def test_one_request_may_fill_the_whole_cache(overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps, pages=3, page_size=4, max_len=12, sizes=[8, 1], budget=3))
    world.add([1] * 7, ignore_eos=True)
    world.add([1] * 11, ignore_eos=True)
    world.run()
    assert [len(sent.output) for sent in world.sent.values()] == [5, 1]


def test_a_long_prompt_goes_in_chunks_beside_those_who_decode(overlaps: bool) -> None:
    """Half as many tokens a step as alone, so that those who decode wait for less."""
    world = World(Setup(overlaps=overlaps, budget=8))
    world.add([1, 2, 3], ignore_eos=True, max_tokens=8)
    world.step()
    world.add([2] * 10, ignore_eos=True, max_tokens=2)
    world.run()
    chunks = [[chunk.num_inflight for chunk in plan.chunks] for plan in world.runner.plans]
    assert chunks[:4] == [[3], [4], [4], [2]]
    assert all(plan.decoding for plan in world.runner.plans[1:])


def test_a_known_prefix_is_not_computed_again(overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps))
    world.add([1, 2, 3, 4, 5, 6], max_tokens=1)
    world.run()
    name = world.add([1, 2, 3, 4, 5, 5], max_tokens=1)
    world.run()
    last = world.sent[name].last
    assert last is not None
    assert last.num_cached_tokens == 4
    assert world.runner.plans[-1].num_prompt_tokens == 2
    stats = world.engine.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (12, 4)


@pytest.mark.parametrize(("skill", "steps"), [(0, 12), (10, 4)])
def test_heads_save_steps_and_change_no_token(skill: int, steps: int, overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps, sizes=[13], skill=skill))
    name = world.add([1, 2, 3], max_tokens=12, ignore_eos=True)
    world.run()
    last, stats = world.sent[name].last, world.engine.stats()
    assert last is not None
    assert last.num_steps == steps  # one token from the prompt, then 1 + the right ones of 3 heads at a time
    assert stats.accepted_by_depth == ([3, 3, 3] if skill else [0, 0, 0])
    assert stats.drafted_by_depth == [3 if skill else 11] * 3


def test_a_request_may_decline_speculation(overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps, pages=40, sizes=[8]))
    declining = world.add([1, 2, 3], max_tokens=6, ignore_eos=True, speculative=False)
    other = world.add([1, 2, 3], max_tokens=6, ignore_eos=True)
    world.run()
    steps = [world.sent[name].last.num_steps for name in (declining, other)]  # type: ignore[union-attr]
    assert steps == [6, 3]
    stats = world.engine.stats()
    assert stats.drafted_by_depth == [2] * HEADS  # of the other one
    assert stats.drafted_tokens == 2 * 31
    assert stats.accepted_tokens == 2 * HEADS  # the last step's, though not all of them were wanted


@pytest.mark.parametrize("ragged", [False, True])
def test_what_rows_brought_is_counted(ragged: bool, overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps, pages=99, sizes=[2], ragged=ragged, skill=5))
    for first in (1, 2, 3):
        world.add([first] * 3, max_tokens=12, ignore_eos=True)
    rows: list[RowResult] = []
    read = FakeStep.read

    def reading(step: FakeStep) -> StepResult:
        result = read(step)
        rows.extend(row for row in result.rows if row.request.request_id in world.engine._requests)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeStep, "read", reading)
        world.run()
    stats, brought = world.engine.stats(), [row for row in rows if row.num_drafted]
    assert brought
    assert (len({row.num_drafted for row in brought}) > 1) == ragged
    assert stats.drafted_tokens == sum(row.num_drafted for row in brought)
    assert stats.accepted_tokens == sum(len(row.tokens) - 1 for row in brought)
    assert stats.drafted_by_depth == [sum(row.drafted_depth > d for row in brought) for d in range(HEADS)]
    assert stats.accepted_by_depth == [sum(len(row.tokens) - 1 > d for row in brought) for d in range(HEADS)]


def test_the_planner_learns_what_came_of_a_step(overlaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of decoding rows only: what a prompt's row gains is no draft's."""
    world = World(Setup(overlaps=overlaps, sizes=[8, 1], budget=4))
    seen: list[tuple[Draft, list[float], list[int]]] = []
    monkeypatch.setattr(world.scheduler.planner, "observe_gains", lambda *args: seen.append(args))
    world.add([1, 2, 3], max_tokens=10, ignore_eos=True)
    world.step()
    world.add([2] * 9, max_tokens=8, ignore_eos=True)
    world.run()
    drafting = [plan for plan in world.runner.plans if plan.draft.propose and plan.decoding]
    assert [draft for draft, _, _ in seen] == [plan.draft for plan in drafting]
    assert [len(gained) for _, _, gained in seen] == [len(plan.decoding) for plan in drafting]
    assert all(len(gains) == len(SIZES) for _, gains, _ in seen)
    assert any(plan.chunks for plan in drafting)
    assert all(0 <= n <= HEADS for _, _, gained in seen for n in gained)


def test_max_steps_ends_a_request(overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps, sizes=[13]))
    name = world.add([1, 2, 3], max_steps=2, ignore_eos=True)
    world.run()
    assert len(world.sent[name].output) == 5


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([1] * 32, {}, "the prompt has 32 tokens"),
        ([1] * 30, {"max_tokens": 3}, "together exceed the context of 32"),
        ([], {}, "empty"),
        ([VOCAB], {}, "between 0 and 6"),
        ([-1], {}, "between 0 and 6"),
        ([1], {"stop_token_ids": (VOCAB,)}, "stop_token_ids"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ([1], {"n": 2}, "one sequence"),
        ([1], {"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(
    prompt: list[int], params: dict[str, Any], message: str, overlaps: bool
) -> None:
    world = World(Setup(overlaps=overlaps))
    with pytest.raises(RequestError, match=message):
        world.add(prompt, **params)
    assert not world.engine.has_work()
    assert world.engine.step() == []


def test_an_id_in_use_is_refused(overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps))
    world.add([1], max_tokens=2)
    with pytest.raises(RequestError, match="in use"):
        world.engine.add_request(world.sent["0"].message)
    world.run()


def test_a_full_queue_refuses_until_someone_leaves_it(overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps, rows=1, max_queue=2))
    for _ in range(2):
        world.add([1], max_tokens=2, ignore_eos=True)
    with pytest.raises(QueueFull, match="the limit is 2"):
        world.add([1])
    assert world.engine.stats().num_waiting == 2
    world.step()
    world.add([1], max_tokens=2)
    with pytest.raises(QueueFull):
        world.add([1])
    world.run()


def test_aborts_free_what_was_held_and_answer_once(overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps, rows=1))
    running = world.add([1] * 6, ignore_eos=True, abort_after=2)
    waiting = world.add([2] * 6, ignore_eos=True, abort_after=1)
    for _ in range(3):
        world.step()
    world.engine.abort(running)
    world.engine.abort("unknown")
    assert world.finished == [waiting, running]
    world.run()
    assert len(world.sent[running].output) == 2 - overlaps  # the last one was not read yet
    assert world.sent[waiting].output == []


def test_a_step_is_launched_before_the_one_before_is_read() -> None:
    world = World(Setup(overlaps=True))
    name = world.add([1, 2, 3], max_tokens=3, ignore_eos=True)
    seen = []
    while world.engine.has_work():
        world.step()
        seen.append((len(world.runner.plans), len(world.runner.unread), len(world.sent[name].output)))
    assert seen == [(1, 1, 0), (2, 1, 1), (3, 1, 2), (3, 0, 3)]
    world.check_answers()


@pytest.mark.parametrize("sizes", [[1], [13]], ids=["plain", "trees"])
def test_what_was_launched_after_the_end_is_dropped(sizes: list[int]) -> None:
    """The second request gets the row and the pages of the first while a step of the first is unread."""
    prompt = next([1, a, b, c] for a in (1, 2) for b in (1, 2) for c in (1, 2) if 2 < ends_after([1, a, b, c]) < 10)
    world = World(Setup(overlaps=True, rows=1, pages=5, page_size=4, max_len=20, sizes=sizes))
    first = world.add(prompt)
    second = world.add([2] * 5, ignore_eos=True)
    world.run()
    last = world.sent[first].last
    assert last is not None
    assert (last.finish_reason, last.stop_token_id) == ("stop", EOS)
    took_part = [any(r.request_id == first for r in plan.decoding) for plan in world.runner.plans]
    assert took_part.count(True) == last.num_steps  # one for the prompt is missing, one is too many
    assert len(world.sent[second].output) == 15


def ends_after(prompt: list[int]) -> int:
    return len(continuation(prompt, SamplingParams(), 32))


@pytest.mark.parametrize("sizes", [[1], [13]], ids=["plain", "trees"])
@pytest.mark.parametrize("after", range(1, 6))
def test_an_abort_while_a_step_is_unread(after: int, sizes: list[int]) -> None:
    """Row and pages go on to the next one; what the step gave is dropped."""
    world = World(Setup(overlaps=True, rows=1, pages=6, page_size=4, max_len=24, sizes=sizes))
    first = world.add([1] * 4, ignore_eos=True)
    second = world.add([1] * 4 + [2] * 3, ignore_eos=True)
    for _ in range(after):
        world.step()
    assert world.runner.unread
    world.sent[first].abort_at = world.num_steps
    world.run()
    assert world.finished == [first, second]
    assert world.sent[first].last.finish_reason == "abort"  # type: ignore[union-attr]
    assert len(world.sent[second].output) == 17


def test_nobody_is_preempted_for_what_unread_steps_may_not_need(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(Setup(overlaps=True, pages=8, page_size=2, max_len=16, budget=16, sizes=[8], skill=0))
    for first in (1, 2, 3, 4):
        world.add([first] * 4, ignore_eos=True)
    schedule, preempt, unsettled = world.scheduler.schedule, world.scheduler._preempt, []

    def scheduling() -> StepPlan | None:
        try:
            return schedule()
        except Unsettled:
            unsettled.append(world.num_steps)
            raise

    def preempting(request: Request) -> None:
        assert all(other.unread == 0 for other in world.scheduler.running)
        preempt(request)

    monkeypatch.setattr(world.scheduler, "schedule", scheduling)
    monkeypatch.setattr(world.scheduler, "_preempt", preempting)
    world.run()
    assert unsettled
    assert world.engine.stats().preemptions > 0
    assert [len(sent.output) for sent in world.sent.values()] == [12] * 4


@pytest.mark.parametrize("sizes", [[1], [13], [4, 1, 13]], ids=str)
@pytest.mark.parametrize("length", [1, 5, 12])
def test_pages_for_one_request_are_enough(sizes: list[int], length: int, overlaps: bool) -> None:
    """Whatever is unread, nothing past its last token is reserved."""
    world = World(Setup(overlaps=overlaps, pages=13, page_size=1, max_len=13, sizes=sizes, budget=4))
    for _ in range(3):
        world.add([1] * length, ignore_eos=True)
    world.run()
    assert [len(sent.output) for sent in world.sent.values()] == [13 - length] * 3


def test_an_idle_engine_says_nothing(overlaps: bool) -> None:
    world = World(Setup(overlaps=overlaps))
    assert world.engine.step() == []
    assert world.runner.plans == []

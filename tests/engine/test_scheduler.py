"""Scheduler and engine, driven by a fake model whose text is known: whatever is scheduled, the text must not change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.engine.step import RowResult, StepResult
from manyheads.errors import QueueFull, RequestError
from manyheads.request import SamplingParams
from manyheads.speculation.draft import SIZES, Draft
from tests.engine.world import EOS, HEADS, VOCAB, FakeStep, Setup, World, continuation


@dataclass(frozen=True, kw_only=True)
class Arrival:
    after: int
    """Steps since the one before."""
    prompt: list[int]
    params: dict[str, Any]
    abort_after: int | None
    client: str = ""
    priority: int = 0


def several(elements: st.SearchStrategy[Any], low: int, high: int) -> st.SearchStrategy[list[Any]]:
    """Lists whose every length is equally likely (plain `lists` are mostly short)."""
    return st.integers(low, high).flatmap(lambda n: st.lists(elements, min_size=n, max_size=n))


SETUPS = st.builds(
    Setup,
    pages=st.integers(1, 24),
    companions=st.sampled_from([0, 0, 1, 2]),
    window=st.integers(1, 9),
    page_size=st.integers(2, 4),
    rows=st.integers(1, 5),
    budget=st.sampled_from([*range(1, 13), 24]),
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
PLACES = st.tuples(st.sampled_from(["a", "a", "a", "b", "c"]), st.sampled_from([0, 0, 0, -1, 1]))
"""Whose request it is, and with what priority."""


@given(setup=SETUPS, arrivals=several(ARRIVALS, 1, 12))
@settings(max_examples=200, deadline=None)
def test_any_traffic(setup: Setup, arrivals: list[Arrival]) -> None:
    serve(setup, arrivals)


@given(setup=SETUPS, arrivals=several(st.tuples(ARRIVALS, PLACES), 1, 16))
@settings(max_examples=200, deadline=None)
def test_any_traffic_of_many_clients(setup: Setup, arrivals: list[tuple[Arrival, tuple[str, int]]]) -> None:
    serve(setup, [replace(arrival, client=place[0], priority=place[1]) for arrival, place in arrivals])


def serve(setup: Setup, arrivals: list[Arrival]) -> None:
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
            place = {"client": arrival.client, "priority": arrival.priority}
            world.add(arrival.prompt, abort_after=arrival.abort_after, **place, **arrival.params)
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


@pytest.mark.parametrize(("window", "most"), [(None, 100), (6, 6)])
def test_the_planner_is_told_what_rows_look_at(window: int | None, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world, told = World(Setup(page_size=16)), list[int]()
    world.scheduler.pages.window = window
    monkeypatch.setattr(world.scheduler.planner, "rows_are", lambda adapters, num_cached: told.append(num_cached))
    world.add([1] * 4, max_tokens=6, ignore_eos=True)
    world.run()
    assert told == [0, *(min(cached, most) for cached in range(4, 9))]


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


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("budget", [4, 10, 24])
def test_a_text_whose_last_pages_alone_have_companions_is_served(budget: int, caching: bool, overlaps: bool) -> None:
    """Pages with companions for 10 tokens; a longer text gives some back before it is whole."""
    setup = Setup(overlaps=overlaps, pages=5, page_size=2, companions=6, window=3, budget=budget, caching=caching)
    world = World(setup)
    assert world.max_len == 2 * (7 * 5 - 6 * 4)
    for length in (world.max_len - 2, 12):
        world.add([1, 2] * (length // 2), ignore_eos=True)
    world.run()
    assert [len(sent.output) for sent in world.sent.values()] == [2, world.max_len - 12]


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
    alone = [plan for plan in world.runner.plans if len(plan.decoding) == 1 and not plan.chunks]
    assert alone
    assert not any(plan.draft.propose for plan in alone), "what nobody wants costs nothing"


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
    seen: list[tuple[Draft, list[float], list[int], list[int]]] = []
    monkeypatch.setattr(world.scheduler.planner, "observe_gains", lambda *args: seen.append(args))
    world.add([1, 2, 3], max_tokens=10, ignore_eos=True)
    world.step()
    world.add([2] * 9, max_tokens=8, ignore_eos=True)
    world.run()
    drafting = [plan for plan in world.runner.plans if plan.draft.propose and plan.decoding]
    assert [draft for draft, *_ in seen] == [plan.draft for plan in drafting]
    assert [len(gained) for _, _, gained, _ in seen] == [len(plan.decoding) for plan in drafting]
    assert all(adapters == [0] * len(gained) for _, _, gained, adapters in seen)
    assert all(len(gains) == len(SIZES) for _, gains, _, _ in seen)
    assert any(plan.chunks for plan in drafting)
    assert all(0 <= n <= HEADS for _, _, gained, _ in seen for n in gained)


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
        ([1], {"max_tokens": -1}, "max_tokens must be at least 0"),
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


@pytest.mark.parametrize("goes_on", [False, True], ids=["alone", "beside one that goes on"])
def test_who_may_have_all_its_tokens_comes_along_where_a_step_runs_anyway(goes_on: bool) -> None:
    """Else it waits for the news, for which a step would be too long."""
    world = World(Setup(overlaps=True, pages=40, page_size=4, max_len=64, sizes=[13], skill=1))
    name = world.add([1, 2, 3], max_tokens=6, ignore_eos=True)
    if goes_on:
        world.add([2, 1, 3], max_tokens=40, ignore_eos=True)
    world.run()
    world.check_answers()
    took_part = [any(request.request_id == name for request in plan.decoding) for plan in world.runner.plans]
    last = world.sent[name].last
    assert last is not None
    assert last.num_steps > 3
    if goes_on:
        assert took_part[1 : last.num_steps] == [True] * (last.num_steps - 1)  # the first one is for the prompt
    else:
        assert took_part == [False] + [True] * (last.num_steps - 1)


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
    too_early = world.watch_preemptions(monkeypatch)
    world.run()
    assert too_early
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

"""Measures what a step costs on this machine, for the planner."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from manyheads.batch import MAX_NODES
from manyheads.config import ConfigError
from manyheads.engine.page_manager import PageTable
from manyheads.engine.record_sizes import TREE_ROWS, padded_rows
from manyheads.engine.recorded import all_steps
from manyheads.engine.runner import Runner
from manyheads.engine.step import Chunk, Request, StepPlan
from manyheads.request import SamplingParams
from manyheads.speculation.costs import CostTable
from manyheads.speculation.draft import NO_DRAFT, Draft
from manyheads.speculation.planner import Planner

CONTEXT = 192
"""Cached tokens of each row while measuring;"""
LONG, LONG_ROWS = 2048, 4
"""and so many, of so many rows, for what reading a cache takes."""
BURST = 4
"""Steps launched before the first is read, on a device that works beside the host: the engine does not wait either."""
SIZES = (1.25, 2, 3, 4, 8, 16, 32, 64)
"""Nodes a row that are measured; between them, costs are interpolated."""
MIN_TURNS, MAX_TURNS, TURN_SECONDS = 4, 24, 0.25
"""Steps of each kind: at least so many (the first does not count), at most so many, for about so long. Where that takes
longer than MAX_SECONDS, two will do."""
PROMPTS = (4, 16, 64, 128, 256, 512, 1024)
"""Tokens of prompts that are measured: beside many of them, a node is not free any more."""
GREEDY = SamplingParams(temperature=0.0)
SAMPLINGS = (
    GREEDY,
    SamplingParams(temperature=1.0, top_p=0.9, top_k=40, min_p=0.01, presence_penalty=0.1, repetition_penalty=1.1),
    SamplingParams(temperature=1.0, acceptance="typical", logprobs=2),
    SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=2),
)
"""What the sampler does for rows, one way or another."""
SAME, SAME_TURNS, MAX_SECONDS = 1.1, 3, 3.0
"""A shortest time is believed when so many steps took at most so many times as long; other work on the machine can make
a few steps last many times too long. After so many seconds of measuring, times are believed all the same, as first
guesses: steps correct them (`RunningCosts`)."""
PASSES_AT_MOST = 0.99
"""Of a step, passes of the drafter take at most this share."""
ENOUGH_ROWS = 4
"""On a CPU that is busy with something else, so that time has run out, no more rows are measured."""


def measure_costs(runner: Runner, planner: Planner, progress: Callable[[str], None]) -> None:
    """Time steps over a grid of rows and drafts, and let the planner choose by what they took.

    Each row has pages of its own, which nobody else has yet, as far as there are enough: a page that all of them read
    comes from a device's cache. `read` ends with results on the host, so a host clock times the device too. The
    shortest of a few times counts.
    """
    state, padded, padded_pass = runner.state, None, None
    context = min(CONTEXT, state.max_len // 2)
    costs = CostTable(context=context)
    patience = MAX_SECONDS
    if runner.recorded is not None:
        progress("capturing steps")
        runner.record_steps(all_steps(planner, state.num_rows))
        padded = partial(padded_rows, most=state.num_rows, sizes=TREE_ROWS)
        padded_pass = runner.recorded.padded_pass
    counts = [rows for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256) if rows <= state.num_rows]
    least = TURN_SECONDS
    if not planner.chooses:  # a rough idea will do, of how much a step's prompts may take
        counts, patience, least = sorted({counts[0], counts[len(counts) // 2], counts[-1]}), 0.0, 0.0
    for num_rows in counts:
        if planner.chooses and patience == 0 and num_rows > ENOUGH_ROWS and runner.device.type == "cpu":
            break
        requests = [_dummy(runner, i, context) for i in range(num_rows)]
        runner.put(requests)
        progress(f"measuring steps of {num_rows} row{'s' if num_rows > 1 else ''}")
        drafts = _measured_drafts(planner.drafts(num_rows))
        plans = [StepPlan(chunks=[], decoding=requests, draft=draft) for draft in (NO_DRAFT, *drafts)]
        began = time.perf_counter()
        plain, *seconds = _time(runner, plans, patience, least)
        patience = max(0.0, patience - (time.perf_counter() - began))
        costs.plain[num_rows] = plain
        costs.trees[num_rows], costs.passes[num_rows] = _apart(drafts, seconds, num_rows)
    progress("measuring caches and prompts")
    costs.cached = _time_cached(runner, context, least)
    costs.prompts = _time_prompts(runner, MIN_TURNS if planner.chooses else 2)
    runner.clear()
    planner.measured(costs, padded, padded_pass)


def exercise(runner: Runner, planner: Planner, max_tokens: int) -> None:
    """Run a step of every kind that no recording serves as a whole, so that nothing is compiled while requests wait.

    Those are steps with prompts, of any number of rows and any draft, and steps whose rows want what only the
    sampler in one pass does.

    Args:
        max_tokens: of prompts in a step.
    """
    state = runner.state
    context = min(CONTEXT, state.max_len // 2)
    length = min(state.max_len - 1, max_tokens)
    most = state.num_rows - 1  # beside the prompt's
    counts = [n for n in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= most]
    if most > 256:
        counts.append(most)
    for count in counts:
        for params in SAMPLINGS if count == min(2, counts[-1]) else SAMPLINGS[:1]:
            requests = [_dummy(runner, i, context, params) for i in range(count)]
            prompt = _dummy(runner, count, length, params)
            prompt.cached_len = 0
            runner.put([*requests, prompt])
            drafts = [NO_DRAFT, *planner.drafts(count)] if count else [planner.best(1)]
            # prompts of any length go through a pass of their own, or one with few tokens of trees
            chunks = [Chunk(prompt, n, is_last=True) for n in (*PROMPTS, length) if n <= length]
            plans = [StepPlan(chunks=[chunks[0]], decoding=requests, draft=draft) for draft in drafts]
            plans += [StepPlan(chunks=[chunk], decoding=requests, draft=drafts[-1]) for chunk in chunks[1:]]
            if params.logprobs and requests:
                plans += [StepPlan(chunks=[], decoding=requests, draft=draft) for draft in drafts]
            for plan in plans:
                runner.rewind([*requests, prompt])
                runner.launch(plan).read()
    runner.clear()


def _time_cached(runner: Runner, context: int, least: float) -> float:
    """Seconds for a cached token: how much longer steps of a few roots take behind long texts than behind `context`
    tokens. 0 where texts cannot become much longer."""
    state, seconds = runner.state, []
    rows = min(LONG_ROWS, state.num_rows)
    room = runner.cache.num_text_pages * state.page_size // rows
    long = min(LONG, state.max_len - MAX_NODES - 1, room - MAX_NODES)
    if long < 2 * context:
        return 0.0
    for length in (context, long):
        requests = [_dummy(runner, i, length) for i in range(rows)]
        runner.put(requests)
        seconds += _time(runner, [StepPlan(chunks=[], decoding=requests, draft=NO_DRAFT)], 0.0, least)
    return max(0.0, seconds[1] - seconds[0]) / (rows * (long - context))


def _time_prompts(runner: Runner, turns: int) -> dict[int, float]:
    """Seconds of passes over chunks of PROMPTS tokens, the shortest of a few; no larger ones where they take long."""
    state, seconds = runner.state, dict[int, float]()
    for size in (size for size in PROMPTS if size < state.max_len):
        request = _dummy(runner, 0, size)
        request.cached_len = 0
        plan = StepPlan(chunks=[Chunk(request, size, is_last=False)], decoding=[])
        runner.put([request])
        taken: list[float] = []
        while len(taken) < (2 if sum(taken) > TURN_SECONDS else turns):
            runner.rewind([request])
            began = time.perf_counter()
            runner.launch(plan).read()
            if runner.device.type == "cuda":  # nothing is drawn, so that reading waits for nothing
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
        seconds[size] = min(taken)
        if sum(taken) > TURN_SECONDS:
            break
    return seconds


def _measured_drafts(drafts: list[Draft]) -> list[Draft]:
    """One of each size, the deepest; and where depth costs passes, behind them the shallowest of the size whose two are
    the most passes apart. Where there is one size only, it is measured, whatever it is."""
    sizes = {draft.nodes: [other for other in drafts if other.nodes == draft.nodes] for draft in drafts}
    measured = [alike for nodes, alike in sizes.items() if nodes in SIZES or len(sizes) == 1]
    ends = [(min(alike, key=_passes), max(alike, key=_passes)) for alike in measured]
    apart = max(ends, key=lambda pair: pair[1].passes - pair[0].passes, default=None)
    shallow = [apart[0]] if apart is not None and apart[0].passes < apart[1].passes else []
    return [*(deep for _, deep in ends), *shallow]


def _passes(draft: Draft) -> int:
    return draft.passes


def _apart(drafts: list[Draft], seconds: list[float], num_rows: int) -> tuple[dict[int, float], float]:
    """Seconds of steps by in-flight tokens without passes, and of a pass."""
    one_pass = 0.0
    deepest: dict[float, tuple[Draft, float]] = {}  # by nodes
    for draft, took in zip(drafts, seconds, strict=True):
        deep, longer = deepest.setdefault(draft.nodes, (draft, took))
        if draft is not deep:
            one_pass = max(0.0, longer - took) / (deep.passes - draft.passes)
    # other work on the machine may have held up the one and not the other: no step is all passes
    one_pass = min([one_pass, *(PASSES_AT_MOST * took / deep.passes for deep, took in deepest.values() if deep.passes)])
    without = {draft.num_tokens(num_rows): took - draft.passes * one_pass for draft, took in deepest.values()}
    return without, one_pass


def _time(runner: Runner, plans: list[StepPlan], patience: float, least: float) -> list[float]:
    """The shortest time of each step, in seconds; at least so many are spent on it, unless MAX_TURNS take less."""
    burst = BURST if runner.overlaps else 1
    # in turns, since a machine's speed wanders; the shortest counts, since what disturbs a step makes it longer
    times: list[list[float]] = [[] for _ in plans]
    start = time.perf_counter()
    while not _enough(times, time.perf_counter() - start, max(patience, least), least):
        for plan, taken in zip(plans, times, strict=True):
            runner.rewind(plan.decoding)
            began = time.perf_counter()
            for step in [runner.launch(plan) for _ in range(burst)]:
                if not all(row.is_finite for row in step.read().rows):
                    dtype = str(runner.model.dtype).removeprefix("torch.")
                    raise ConfigError(f"the model's logits are not finite in {dtype}; dtype=float32 has more range")
            taken.append((time.perf_counter() - began) / burst)
    return [min(taken[1:]) for taken in times]


def _enough(kinds: list[list[float]], elapsed: float, patience: float, least: float) -> bool:
    turns = len(kinds[0])
    if turns < (MIN_TURNS if elapsed < patience else 2) or (turns < MAX_TURNS and elapsed < least):
        return False
    shortest = [sorted(times[1:])[:SAME_TURNS] for times in kinds]
    return elapsed > patience or all(times[-1] <= SAME * times[0] for times in shortest)


def _dummy(runner: Runner, row: int, context: int, params: SamplingParams = GREEDY) -> Request:
    """A row with pages of its own, as far as there are enough. Where there are adapters, rows have them in turn, as
    most of traffic will."""
    count, usable = -(-(context + MAX_NODES) // runner.state.page_size), runner.cache.num_text_pages
    pages = [1 + (row * count + i) % usable for i in range(count)]
    adapters = runner.model.adapters
    return Request(
        request_id=f"warm-up {row}",
        params=params,
        tokens=[0] * (context + 1),
        prompt_len=context,
        max_len=context + 65,
        stop_ids=frozenset(),
        seed=0,
        adapter=1 + row % adapters.count if adapters is not None else 0,
        table=PageTable(pages=pages),
        held_row=row,
        cached_len=context,
        has_candidates=True,
    )

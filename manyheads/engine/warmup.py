"""Measures what a step costs on this machine, for the planner."""

from __future__ import annotations

import time
from collections.abc import Callable

from manyheads.engine.block_manager import DUMMY_BLOCK, BlockTable
from manyheads.engine.graphs import TREE_ROWS, padded_rows
from manyheads.engine.runner import Runner
from manyheads.engine.step import Request, StepPlan
from manyheads.request import SamplingParams
from manyheads.speculation.planner import CostTable, Planner

CONTEXT = 192
"""Cached tokens of each row while measuring."""
BURST = 4
"""Steps launched before the first is read, on a device that works beside the host: the engine does not wait either."""
SIZES = (1.25, 2, 3, 4, 8, 16, 32, 64)
"""Nodes a row that are measured; between them, costs are interpolated."""
MIN_TURNS, MAX_TURNS, TURN_SECONDS = 4, 24, {"cpu": 0.5, "cuda": 0.25}
"""Steps of each kind: at least so many (the first does not count), at most so many, for about so long. Where that takes
longer than MAX_SECONDS, two will do."""
SAME, SAME_TURNS, MAX_SECONDS = 1.1, 3, 3.0
"""A shortest time is believed when so many steps took at most so many times as long; other work on the machine can make
a few steps last many times too long. After so many seconds it is believed all the same."""


def measure_costs(
    runner: Runner,
    planner: Planner,
    max_rows: int,
    max_len: int,
    progress: Callable[[str], None],
) -> CostTable:
    """Time steps over a grid of rows and nodes; all rows read and write the dummy page.

    `read` ends with results on the host, so a host clock times the device too.

    Returns:
        Seconds, the shortest of a few runs.
    """
    costs = CostTable()
    burst = BURST if runner.overlaps else 1
    context = min(CONTEXT, max_len // 2)
    rows = [r for r in (1, 2, 4, 8, 16, 32, 64, 128, 256) if r <= max_rows]
    turn_seconds = TURN_SECONDS[runner.device.type]
    if runner.graphs is not None:
        progress("capturing steps")
        runner.graphs.capture(planner)
        planner.padded = lambda rows: padded_rows(rows, max_rows, TREE_ROWS)
    for num_rows in rows:
        requests = [_dummy(i, context, runner.block_size) for i in range(num_rows)]
        for request in requests:
            request.table.num_synced = 0
        runner.state.admit(requests)

        progress(f"measuring steps of {num_rows} row{'s' if num_rows > 1 else ''}")
        plain = StepPlan(chunks=[], decoding=requests)
        drafts = [draft for draft in planner.drafts(num_rows) if draft.nodes in SIZES]
        plans = {d.num_tokens(num_rows): StepPlan(chunks=[], decoding=requests, draft=d) for d in drafts}
        # in turns, since a machine's speed wanders; the shortest counts, since what disturbs a step makes it longer
        seconds: dict[int, list[float]] = {0: [], **{num_inflight: [] for num_inflight in plans}}
        start = time.perf_counter()
        while not _enough(list(seconds.values()), time.perf_counter() - start, turn_seconds):
            for num_inflight, plan in ((0, plain), *plans.items()):
                runner.state.cached_len[:num_rows] = context
                began = time.perf_counter()
                for step in [runner.launch(plan) for _ in range(burst)]:
                    step.read()
                seconds[num_inflight].append((time.perf_counter() - began) / burst)
        shortest = {num_inflight: min(times[1:]) for num_inflight, times in seconds.items()}
        costs.plain[num_rows] = shortest.pop(0)
        costs.trees[num_rows] = shortest
    runner.state.cached_len.zero_()
    runner.state.block_table.zero_()
    return costs


def _enough(kinds: list[list[float]], elapsed: float, turn_seconds: float) -> bool:
    turns = len(kinds[0])
    if turns < (MIN_TURNS if elapsed < MAX_SECONDS else 2) or (turns < MAX_TURNS and elapsed < turn_seconds):
        return False
    shortest = [sorted(times[1:])[:SAME_TURNS] for times in kinds]
    return elapsed > MAX_SECONDS or all(times[-1] <= SAME * times[0] for times in shortest)


def _dummy(row: int, context: int, block_size: int) -> Request:
    blocks = [DUMMY_BLOCK] * (-(-(context + 64) // block_size))
    return Request(
        request_id=f"warm-up {row}",
        params=SamplingParams(temperature=0.0),
        tokens=[0] * (context + 1),
        prompt_len=context,
        max_len=context + 65,
        stop_ids=frozenset(),
        seed=0,
        table=BlockTable(blocks=blocks),
        row=row,
        cached_len=context,
        has_candidates=True,
    )

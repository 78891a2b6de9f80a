"""One engine under mixed traffic in virtual time: what its scheduler and planner make of a GPU that nobody has here.

    python benchmarks/engine_sim.py                       # writes results/engine_sim.json
    python benchmarks/engine_sim.py --rates 52 60 --no-padding

Scheduler, page manager, prompt budget, planner and the loop that launches a step before it reads the one before are the
project's own; the device alone is made up. A step takes what its tokens, the K/V that it reads and its drafter's passes
took on an H200 with a 7B model's shape in half precision (results/gpu_sizes.json, gpu_mixed_steps.json), padded as
recorded passes are, and candidates are right as often as by_chance.py has it for EAGLE-3. The host takes no time.
Requests are those of traffic.py. The table has what gpu_mix.py measured of the same beside it
(results/gpu_mix_chance.json), which says how far to believe the rest.

`--no-padding` is a device that computes exactly the tokens that it is given, `--target-step-ms` the server's option.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from by_chance import Table, table_of
from common import ROOT, machine, save, table
from planner import padded_pass
from traffic import Answer, Ask, draw, figures

from manyheads.engine import engine as engine_module
from manyheads.engine.admission import Admission
from manyheads.engine.engine import Engine
from manyheads.engine.page_manager import PageManager
from manyheads.engine.quickest import choose
from manyheads.engine.record_sizes import CHUNKS, TREE_ROWS, padded_rows, pass_keys
from manyheads.engine.scheduler import Scheduler
from manyheads.engine.step import RowResult, StepPlan, StepResult, nothing
from manyheads.engine.step_target import StepTarget
from manyheads.request import EngineReady, EngineRequest, SamplingParams
from manyheads.speculation.costs import CostTable, interpolate
from manyheads.speculation.draft import SIZES
from manyheads.speculation.eagle3.template import Template
from manyheads.speculation.planner import Planner, most_inflight
from manyheads.speculation.tree import Choice, grow

AT_WORK = {1: 1.0, 64: 1.0, 256: 1.06, 576: 1.11}
"""Products take so many times as long, by tokens, where the GPU does much else (`products_ms` of gpu_mixed_steps.json).
"""
CACHED, TOKEN, STEP = 0.1375e-6, 1e-6, 0.4e-3
"""Seconds for a cached token that is read, for a token beside its products, and for a step (`64x1`, `192x1`)."""
PASS, PASS_ROW = 0.25e-3, 0.6e-6
"""Seconds of a drafter's pass, and of each row in it."""
ROWS, PAGES, PAGE, MOST_PROMPTS, MAX_LEN, VOCAB = 256, 12_000, 16, 2048, 4096, 32_000
MEASURED_CONTEXT = 192
"""Cached tokens of a row while an engine measures its costs (`engine/warmup.py`)."""
MIN_GAIN = 1.04
"""As on a GPU (`engine/build.py`)."""
WORDS = 64
"""Random tokens of a text that prompts are cut from, so that no two share pages."""


class Clock:
    """Stands for the module `time`."""

    now = 0.0

    def perf_counter(self) -> float:
        """Seconds."""
        return self.now


class Launched:
    """A step on its way."""

    foreseen: tuple[RowResult, ...] = ()

    def __init__(self, clock: Clock, result: StepResult, done: float) -> None:
        self.clock, self.result, self.done = clock, result, done

    def read(self) -> StepResult:
        """Wait for it."""
        self.clock.now = max(self.clock.now, self.done)
        return self.result


class Device:
    """A `StepRunner` that takes as long as a GPU and computes nothing.

    Args:
        rates: [depth][rank], how often candidates are right.
        pads: whether it pads as recorded passes do.
    """

    overlaps = True

    def __init__(self, clock: Clock, rates: Table, pads: bool) -> None:
        self.clock, self.rates, self.pads = clock, rates, pads
        self.chance = random.Random(0)
        self.free = 0.0  # when it has done all that was launched
        self.num_tokens = self.num_padded = 0
        choices, probabilities = grow(rates, 64)
        self.order = {choice: place for place, choice in enumerate(choices.choices)}
        self.promise = list(accumulate(probabilities))

    def listen(self, beat: Callable[[], None]) -> None:
        """Nothing takes long."""

    def watch(self, tell: Callable[[str], None]) -> None:
        """Nothing is compiled."""

    def launch(self, plan: StepPlan, follow: Callable[[], None] = nothing) -> Launched:
        """Run a step behind those before."""
        rows, padded = len(plan.decoding), len(plan.decoding)
        if self.pads and rows and plan.draft.propose:
            padded = padded_rows(rows, ROWS, TREE_ROWS)
        trees = plan.draft.num_tokens(padded)
        prompts = plan.num_prompt_tokens
        tokens = tokens_of_pass(prompts, trees, padded) if self.pads and prompts else prompts + trees
        self.num_tokens += prompts + plan.draft.num_tokens(rows)
        self.num_padded += tokens
        cached = sum(request.cached_len for request in [*plan.decoding, *(chunk.request for chunk in plan.chunks)])
        seconds = product_seconds(tokens) + TOKEN * tokens + CACHED * cached + STEP
        begin = sum(chunk.is_last for chunk in plan.chunks)  # their first guesses are one deep
        for count, passes in ((rows, plan.draft.passes), (begin, min(1, plan.draft.passes))):
            seconds += passes * (PASS + PASS_ROW * count) if count else 0.0
        self.free = max(self.free, self.clock.now) + seconds
        # dummy rows have a root each, and the others the rest of the nodes
        return Launched(self.clock, self._result(plan, (trees - padded + rows) / max(rows, 1)), self.free)

    def _result(self, plan: StepPlan, nodes: float) -> StepResult:
        result = StepResult(rows=[], hits=[[0] * len(ranks) for ranks in self.rates], trials=[0] * len(self.rates))
        result.rows.extend(RowResult(chunk.request, [0]) for chunk in plan.chunks if chunk.is_last)
        if not plan.draft.propose:
            result.rows.extend(RowResult(request, [0]) for request in plan.decoding)
            return result
        for request in plan.decoding:
            has = int(nodes) + (self.chance.random() < nodes % 1) if request.has_candidates else 1
            gained = self._gained(has, plan.draft.tree.max_depth, result)
            result.rows.append(RowResult(request, [0] * gained, None, plan.draft.tree.max_depth, has - 1))
        if plan.decoding:
            result.gains.extend(self.promise[min(int(size), 64) - 1] - 1 for size in SIZES)
        return result

    def _gained(self, nodes: int, depth: int, result: StepResult) -> int:
        """Tokens that a row gains whose tree has so many nodes: the most probable ones."""
        path: Choice = ()
        while len(path) < depth:
            ranks = self.rates[len(path)]
            rank = self.chance.choices(range(len(ranks) + 1), [*ranks, max(0.0, 1 - sum(ranks))])[0]
            below = (*path, rank)
            if self.order.get(below, nodes) >= nodes:
                break
            path = below
        return len(path) + 1


def products() -> dict[int, float]:
    """Seconds of a step's matrix products by tokens, in steps of 16."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "gpu_sizes.json").read_text())["rows"]
    return {row["tokens"]: row["layers_ms"] * 1e-3 * interpolate(AT_WORK, min(row["tokens"], 576)) for row in rows}


PRODUCTS = products()


def product_seconds(tokens: float) -> float:
    """Of so many tokens: those of the next number that was measured. NOTE: more tokens may take less."""
    most = max(PRODUCTS)
    return min((size, time) for size, time in PRODUCTS.items() if size >= min(tokens, most))[1] * max(
        1.0, tokens / most
    )


INSTEAD = choose(
    {chunks[0] + trees[0] for chunks, trees in pass_keys(ROWS, MOST_PROMPTS, most_inflight(ROWS))},
    lambda sizes: {size: product_seconds(size) for size in sizes},
)


def tokens_of_pass(num_prompts: int, num_trees: int, num_rows: int) -> int:
    """What a recorded pass over so many computes."""
    tokens = padded_pass(num_prompts, num_trees, num_rows)
    return INSTEAD.get(tokens, tokens)


def planner_of(rates: Table, pads: bool) -> Planner:
    """As a start on this device would make it."""
    template = Template(rates)
    prior, offered = [list(ranks) for ranks in rates[: template.max_depth]], frozenset(template.choices)
    planner = Planner(prior, None, MIN_GAIN, 1, offered=offered, scratch=template.num_inner)
    counts = (1, 2, 4, 8, 16, 32, 64, 128, 256)

    def step(tokens: float, rows: int = 0) -> float:
        return product_seconds(tokens) + TOKEN * tokens + CACHED * MEASURED_CONTEXT * rows + STEP

    costs = CostTable(
        plain={rows: step(rows, rows) for rows in counts},
        trees={rows: {int(rows * size): step(rows * size, rows) for size in SIZES[1:]} for rows in counts},
        passes={rows: PASS + PASS_ROW * rows for rows in counts},
        prompts={tokens: step(tokens) for tokens in (4, 16, 64, 128, 256, 512, 1024)},
        context=MEASURED_CONTEXT,
        cached=CACHED,
    )
    padding = (partial(padded_rows, most=ROWS, sizes=TREE_ROWS), tokens_of_pass) if pads else (None, None)
    planner.measured(costs, *padding)
    return planner


def simulate(asks: list[Ask], pads: bool, target: float | None = None) -> tuple[list[Answer], float]:
    """How requests went, and how many tokens were computed for each that rows brought; target: seconds of a step."""
    clock, rates = Clock(), table_of("eagle3")
    engine_module.time = clock  # type: ignore[attr-defined, assignment]
    device = Device(clock, rates, pads)
    sizes = tuple(size for size, _ in CHUNKS[1:]) if pads else ()
    scheduler = Scheduler(
        PageManager(PAGES + 1, PAGE, True),
        StepTarget(planner_of(rates, pads), MOST_PROMPTS, target, sizes),
        max_num_seqs=ROWS,
        max_model_len=MAX_LEN,
        max_queue=len(asks),
        admission=Admission(None, clock.perf_counter),
    )
    ready = EngineReady(
        model="made up",
        max_model_len=MAX_LEN,
        vocab_size=VOCAB,
        drafter="eagle3",
        draft_depth=len(rates),
        dtype="float16",
        device="made up",
        num_pages=PAGES,
        page_size=PAGE,
        eos_token_ids=[VOCAB - 1],
    )
    engine = Engine(device, scheduler, ready, seed=0)
    times: dict[str, list[float]] = {str(i): [] for i in range(len(asks))}
    waiting = deque(enumerate(asks))
    while waiting or engine.has_work():
        if not engine.has_work():
            clock.now = max(clock.now, waiting[0][1].at)
        while waiting and waiting[0][1].at <= clock.now:
            number, ask = waiting.popleft()
            params = SamplingParams(temperature=0.0, max_tokens=ask.max_tokens, ignore_eos=True)
            engine.add_request(EngineRequest(request_id=str(number), prompt_token_ids=ask.prompt, params=params))
        for delta in engine.step():
            if delta.new_token_ids:
                times[delta.request_id].append(clock.now)
    answers = [answer_of(ask, times[str(i)]) for i, ask in enumerate(asks)]
    return answers, device.num_padded / device.num_tokens


def answer_of(ask: Ask, times: list[float]) -> Answer:
    """As a client would have seen it."""
    gap = max((after - before for before, after in pairwise(times)), default=0.0)
    return Answer(ask.at, times[0] - ask.at, times[-1] - ask.at, ask.max_tokens, None, gap)


def measured(rate: float) -> str:
    """What gpu_mix.py found: the means over its seeds."""
    found = json.loads((ROOT / "benchmarks" / "results" / "gpu_mix_chance.json").read_text())["eagle3"]["rows"]
    rows = [row for row in found if row["rate"] == rate]
    return told(rows) if rows else "-"


def told(rows: list[dict[str, Any]]) -> str:
    """Milliseconds a token (p50), seconds to the first token (p99), share within the limits, tokens/s."""
    mean = {key: statistics.mean(row[key] for row in rows) for key in rows[0] if isinstance(rows[0][key], float | int)}
    return f"{mean['token_ms_p50']:.1f} / {mean['first_s_p99']:.2f} / {mean['good']:.2f} / {mean['tokens_per_s']:,.0f}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[15, 30, 45, 52, 56, 60, 75])
    parser.add_argument("--hold", type=float, default=30.0, help="seconds of a rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-padding", action="store_true")
    parser.add_argument("--target-step-ms", type=float)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "engine_sim.json")
    args = parser.parse_args()
    target = args.target_step_ms / 1e3 if args.target_step_ms else None
    what = "without padding" if args.no_padding else "now"
    what += f", steps of {args.target_step_ms:g} ms" if target else ""
    rows, chance = [], random.Random(0)
    texts = [[chance.randrange(VOCAB - 1) for _ in range(WORDS)] for _ in range(1000)]
    for rate in args.rates:
        for seed in args.seeds:
            answers, padded = simulate(draw(rate, args.hold, seed, texts), not args.no_padding, target)
            rows.append(figures(answers, rate, seed) | {"padded": round(padded, 3)})
    save(args.out, what, {"machine": machine(), "rows": rows})
    by_rate = {rate: [row for row in rows if row["rate"] == rate] for rate in args.rates}
    lines = [[f"{rate:g}", told(of), measured(rate), f"{of[0]['padded']:.2f}"] for rate, of in by_rate.items()]
    print("token p50, ms / first p99, s / share within the limits / tokens/s:")
    table(("requests/s", "simulated", "measured", "padded"), lines)


if __name__ == "__main__":
    main()

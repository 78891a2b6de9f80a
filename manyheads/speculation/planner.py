"""The tree planner: speculation that never loses.

It holds the cost of a step by rows and nodes, measured on this machine, and the acceptance of each head's candidates,
measured as the engine runs, and takes the tree with the most expected tokens per second.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

from manyheads.speculation.tree import MAX_NODES, ROOT, Tree, grow

SIZES = (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Nodes a row, on average over a step's rows, that are considered."""
MAX_INFLIGHT = 256
"""A step of more in-flight tokens is not considered, unless its rows bring two nodes each: on every machine known,
arithmetic has long begun to count."""
REACHES = (8, 16, 32, 64)
"""Nodes that a row may bring at most: four times the average."""

MIN_GAIN = 1.15
"""Speculation must promise this much more than plain decoding: the best of many estimates is an overestimate, costs are
measured at one length of context, and a change to trees costs a step whose proposals come too late."""
PRIOR_TRIALS = 64.0
"""Weight of the prior acceptance, in observed tokens."""
WINDOW_TRIALS = 20_000.0
"""Older observations fade: the table remembers about this many tokens."""
REGROW_EVERY = 32
"""Steps between two looks at the tree's shape."""

GAINS_WINDOW = 0.02
"""Share of a new step in the running means of what heads expect and of what came of it."""
SUREST = 1.1
"""Times as much as where all rows have the same tree is gained where a step's nodes go to the rows whose heads are
surest: 1.09 to 1.12 times at 32 to 128 rows (benchmarks/results/gpu)."""
FORGOTTEN = 0.0005
"""Of those means, by a step without heads: text that heads did badly on is followed by other text."""


@dataclass(frozen=True)
class Draft:
    """What the decoding rows of a step bring: of the nodes that `tree` has for each of them, the most probable ones, so
    many that a row has `nodes` on average."""

    tree: Tree
    nodes: float

    @property
    def propose(self) -> bool:
        """Whether the heads run, for the next step's trees."""
        return self.nodes > 1

    @property
    def most_gained(self) -> int:
        """Tokens that a row can gain."""
        return self.tree.max_depth + 1

    def num_tokens(self, rows: int) -> int:
        """In-flight tokens of so many rows."""
        return min(int(self.nodes * rows), self.tree.num_nodes * rows)


NO_DRAFT = Draft(ROOT, 1)

# Where heads bring no statistics: a starting point of the shape that is published for Vicuna-7B's heads (chains of
# best candidates hold for 1, 2, 3 tokens with probability 0.56, 0.30, 0.16). What is observed replaces it.
DEFAULT_ACCEPTANCE = [
    [0.56, 0.12, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01],
    [0.53, 0.11, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01],
    [0.53, 0.10, 0.05, 0.04, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01],
    [0.50, 0.09, 0.05, 0.03, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01],
]


@dataclass
class CostTable:
    """Seconds of a step by decoding rows and in-flight tokens, measured."""

    plain: dict[int, float] = field(default_factory=dict)
    """rows → seconds of a step of roots alone, without heads."""
    trees: dict[int, dict[int, float]] = field(default_factory=dict)
    """rows → in-flight tokens in all → seconds, heads included."""

    def plain_cost(self, rows: int, extra_tokens: int = 0) -> float:
        """Without speculation, `extra_tokens` prompt tokens beside the rows."""
        base = _interpolate(self.plain, rows)
        if extra_tokens == 0:
            return base
        # prompt tokens cost what a tree's nodes cost
        return base + self.tree_cost(rows, rows + extra_tokens) - self.tree_cost(rows, rows)

    def tree_cost(self, rows: int, num_inflight: int) -> float:
        """With speculation; the nearest measured numbers of rows are interpolated."""
        keys = sorted(self.trees)
        at = bisect_left(keys, rows)
        if at < len(keys) and keys[at] == rows:
            return _interpolate(self.trees[rows], num_inflight)
        if at == 0 or at == len(keys):
            return _interpolate(self.trees[keys[min(at, len(keys) - 1)]], num_inflight)
        low, high = keys[at - 1], keys[at]
        share = (rows - low) / (high - low)
        below, above = (_interpolate(self.trees[k], num_inflight) for k in (low, high))
        return below + share * (above - below)


def _interpolate(points: dict[int, float], x: float) -> float:
    """Piecewise linear; past the last point its slope goes on, before the first one the value stays.

    More work cannot cost less: a point above a later one is noise, and is taken for the later one's value.
    """
    keys = sorted(points)
    values = list(accumulate((points[key] for key in reversed(keys)), min))[::-1]
    if x <= keys[0] or len(keys) == 1:
        return values[0]
    at = min(bisect_left(keys, x), len(keys) - 1)
    slope = (values[at] - values[at - 1]) / (keys[at] - keys[at - 1])
    return values[at - 1] + slope * (x - keys[at - 1])


class Acceptance:
    """Running estimate of [depth][rank]: how often a head's candidate is right once its parent was accepted."""

    def __init__(self, prior: list[list[float]]) -> None:
        self._hits = [[p * PRIOR_TRIALS for p in ranks] for ranks in prior]
        self._trials = [PRIOR_TRIALS for _ in prior]

    @property
    def num_depths(self) -> int:
        return len(self._trials)

    def observe(self, hits: list[list[int]], trials: list[int]) -> None:
        for d, n in enumerate(trials):
            fade = 1.0 if self._trials[d] + n <= WINDOW_TRIALS else WINDOW_TRIALS / (self._trials[d] + n)
            self._trials[d] = (self._trials[d] + n) * fade
            self._hits[d] = [(old + new) * fade for old, new in zip(self._hits[d], hits[d], strict=True)]

    def table(self) -> list[list[float]]:
        return [[h / n for h in ranks] for ranks, n in zip(self._hits, self._trials, strict=True)]


class Planner:
    """Chooses the tree of a step.

    Args:
        prior: [depth][rank] acceptance to start from; empty where the model has no heads.
        tree_size: this many nodes always, whatever the load; None to choose.
        min_gain: see MIN_GAIN; where step times hardly vary, less will do.
    """

    def __init__(self, prior: list[list[float]], tree_size: int | None = None, min_gain: float = MIN_GAIN) -> None:
        self.acceptance = Acceptance(prior)
        self.min_gain = min_gain
        self.tree_size = tree_size
        self.costs: CostTable | None = None
        """Set by warm-up; without it, and without `tree_size`, the planner does not speculate."""
        self.padded: Callable[[int], int] = lambda rows: rows
        """What steps with trees round a number of rows up to; set by warm-up."""
        self._grown = ROOT
        self._expected: list[float] = []
        self._steps_until_regrow = 0
        self._chosen: dict[tuple[int, int], Draft] = {}
        self._offsets: dict[int, dict[int, float]] = {}  # rows → nodes that each may bring → seconds
        self._observed: Counter[tuple[int, int]] = Counter()  # rows, nodes that each may bring → steps
        self._brought: int | None = None  # nodes that each could bring in the step before
        self._gains: list[float] | None = None  # by SIZES, running mean of what the heads expect
        self._outcome = [1.0, 1.0]  # running means: gained, and what was expected of the same steps
        self._hoped: list[float] = []  # by SIZES, gains by the prior
        if prior:
            self._regrow()
            self._hoped = [SUREST * (self._by_table(size) - 1) for size in SIZES]

    def choose(self, rows: int, prompt_tokens: int = 0) -> Draft:
        """What `rows` decoding rows are to bring beside `prompt_tokens` of prompts; NO_DRAFT when nothing pays.

        A choice holds until the next look at the tree's shape.
        """
        if not self.acceptance.num_depths or (self.costs is None and self.tree_size is None):
            return NO_DRAFT
        self._regrow()
        load = (rows, prompt_tokens)
        if load not in self._chosen:
            self._chosen[load] = self._best(rows, prompt_tokens)
        return self._chosen[load]

    def _best(self, rows: int, prompt_tokens: int) -> Draft:
        if self.tree_size is not None:
            return self.draft(self.tree_size)
        assert self.costs is not None
        seconds = self.costs.plain_cost(rows, prompt_tokens) + self._offset(rows, 1)
        best = self.min_gain * rows / seconds
        draft = NO_DRAFT
        padded = self.padded(rows)
        for candidate in self.drafts(padded):
            seconds = self.costs.tree_cost(padded, candidate.num_tokens(padded) + prompt_tokens)
            seconds += self._offset(rows, candidate.tree.num_nodes)
            rate = rows * self.expected_tokens(candidate.nodes, rows) / seconds
            if rate > best:
                best, draft = rate, candidate
        return draft

    def drafts(self, rows: int) -> list[Draft]:
        """What so many rows may bring beside their roots: each more than the one before."""
        self._regrow()
        most = max(MAX_INFLIGHT, 2 * rows)
        sizes = (size for size in SIZES if size <= self._grown.num_nodes and rows < int(rows * size) <= most)
        return list({int(rows * size): self.draft(size) for size in sizes}.values())

    def draft(self, nodes: float) -> Draft:
        """Rows of `nodes` nodes on average, out of the four times as many that are best by the running estimate."""
        if nodes <= 1:
            return NO_DRAFT
        reach = next(size for size in REACHES if size >= min(4 * nodes, MAX_NODES))
        tree = Tree(self._grown.choices[:reach])
        return Draft(tree, min(nodes, tree.num_nodes))

    def smaller(self, draft: Draft) -> Draft:
        """What needs fewer pages."""
        reach = max((size for size in REACHES if size < draft.tree.num_nodes), default=1)
        return self.draft(reach / 4) if reach > 4 else NO_DRAFT

    def expected_tokens(self, nodes: float, rows: int = 1) -> float:
        """Tokens that each of so many rows gains in a step where they bring so many nodes on average."""
        self._regrow()
        if self._gains is None:  # no step yet
            return 1.0 + (SUREST if rows >= 16 else 1.0) * (self._by_table(nodes) - 1.0)
        gain = self._gains[max(i for i, size in enumerate(SIZES) if size <= nodes)]
        gained, expected = self._outcome
        return 1.0 + gain * gained / expected

    def _by_table(self, nodes: float) -> float:
        """`expected_tokens` if all rows had the same tree."""
        return float(_interpolate(dict(enumerate(self._expected, 1)), min(nodes, len(self._expected))))

    def observe(self, hits: list[list[int]], trials: list[int]) -> None:
        """Take in what a step showed of the heads; shapes as `StepResult`'s."""
        self.acceptance.observe(hits, trials)

    def observe_gains(self, draft: Draft, expected: list[float], gained: list[int]) -> None:
        """Take in what the heads expected of a step, and what came of it.

        Args:
            draft: what the step's rows brought.
            expected: as `StepResult.gains`.
            gained: tokens beside its own of each decoding row.
        """
        if self._gains is None:
            self._gains = list(expected)
        self._gains = [old + GAINS_WINDOW * (new - old) for old, new in zip(self._gains, expected, strict=True)]
        at = max(i for i, size in enumerate(SIZES) if size <= draft.nodes)
        means = (sum(gained) / len(gained), expected[at])
        self._outcome = [old + GAINS_WINDOW * (new - old) for old, new in zip(self._outcome, means, strict=True)]

    def observe_plain(self) -> None:
        """Take in a step without heads: what they were last seen to gain counts a little less, so that heads that were
        given up are tried again."""
        if self._gains is not None:
            self._gains = [old + FORGOTTEN * (new - old) for old, new in zip(self._gains, self._hoped, strict=True)]
            gained, expected = self._outcome
            self._outcome[0] = gained + FORGOTTEN * (expected - gained)

    def observe_cost(self, rows: int, draft: Draft, seconds: float) -> None:
        """Take in the time of a step of `rows` decoding rows without prompt tokens.

        Longer contexts make a step dearer than it was at warm-up: what the rows' caches cost to read, and the more, the
        more nodes may look at them. So the difference is kept as an offset for each number of rows and of nodes that a
        row may bring. Those that are not observed drift to the one that is, so that what was given up is tried again.
        First observations count for more: a choice holds for many steps. A step that brings another tree than the one
        before says nothing, as it also waits for the change.
        """
        if self.costs is None:
            return
        seen = draft.tree.num_nodes
        changed, self._brought = self._brought not in (None, seen), seen
        if changed:
            return
        if draft.propose:
            padded = self.padded(rows)
            predicted = self.costs.tree_cost(padded, draft.num_tokens(padded))
        else:
            predicted = self.costs.plain_cost(rows)
        known = self._offset(rows, seen)
        seconds = min(seconds, 4 * (predicted + known))  # one slow step says little
        self._observed[rows, seen] += 1
        weight = max(0.05, 1 / (1 + self._observed[rows, seen]))
        now = max(0.0, known + weight * (seconds - predicted - known))
        offsets = {reach: self._offset(rows, reach) for reach in (1, *REACHES)}
        drifted = {reach: offset + 0.003 * (now - offset) for reach, offset in offsets.items()}
        self._offsets[rows] = {**self._offsets.get(rows, {}), **drifted, seen: now}

    def _offset(self, rows: int, reach: int) -> float:
        """Seconds; what is not observed costs what it does with the nearest number of rows, by the row.

        And no less than where rows may bring fewer nodes.
        """
        if rows not in self._offsets:
            if not self._offsets:
                return 0.0
            near = min(self._offsets, key=lambda known: abs(known - rows))
            return self._offset(near, reach) * rows / near
        known = self._offsets[rows]
        offset = known.get(reach, 0.0)
        if (rows, reach) in self._observed:
            return offset
        return max([offset, *(known[other] for other in known if other < reach and (rows, other) in self._observed)])

    def _regrow(self) -> None:
        self._steps_until_regrow -= 1
        if self._steps_until_regrow > 0:
            return
        self._steps_until_regrow = REGROW_EVERY
        self._chosen.clear()
        self._grown, probabilities = grow(self.acceptance.table(), MAX_NODES)
        self._expected = list(accumulate(probabilities))

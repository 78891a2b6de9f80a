"""The tree planner: speculation that never loses.

It holds the cost of a step by rows and nodes, measured on this machine, and the acceptance of each head's candidates,
measured as the engine runs, and takes the tree with the most expected tokens per second.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate

from manyheads.medusa.tree import MAX_NODES, ROOT, Tree, grow

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Tree sizes that are considered."""

MIN_GAIN = 1.15
"""Speculation must promise this much more than plain decoding: the best of many estimates is an overestimate, costs are
measured at one length of context, and a change to trees costs a step whose proposals come too late."""
PRIOR_TRIALS = 64.0
"""Weight of the prior acceptance, in observed tokens."""
WINDOW_TRIALS = 20_000.0
"""Older observations fade: the table remembers about this many tokens."""
REGROW_EVERY = 32
"""Steps between two looks at the tree's shape."""

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


def _interpolate(points: dict[int, float], x: int) -> float:
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
        self.max_inflight = 10**9
        """Most in-flight tokens of all trees together; set by warm-up."""
        self._grown = ROOT
        self._expected: list[float] = []
        self._steps_until_regrow = 0
        self._chosen: dict[tuple[int, int], Tree] = {}
        self._offsets: dict[int, list[float]] = {}  # rows → seconds, [plain, trees]

    def choose(self, rows: int, prompt_tokens: int = 0) -> Tree:
        """The tree for `rows` decoding rows beside `prompt_tokens` of prompts; ROOT when nothing pays.

        A choice holds until the next look at the tree's shape.
        """
        if not self.acceptance.num_depths or (self.costs is None and self.tree_size is None):
            return ROOT
        self._regrow()
        load = (rows, prompt_tokens)
        if load not in self._chosen:
            self._chosen[load] = self._best(rows, prompt_tokens)
        return self._chosen[load]

    def _best(self, rows: int, prompt_tokens: int) -> Tree:
        if self.tree_size is not None:
            return self._tree(self.tree_size)
        assert self.costs is not None
        plain, offset = self._offsets.get(rows, [0.0, 0.0])
        best = self.min_gain * rows / (self.costs.plain_cost(rows, prompt_tokens) + plain)
        tree = ROOT
        for size in SIZES[1:]:
            if size > len(self._expected) or rows * size > self.max_inflight:
                break
            seconds = self.costs.tree_cost(rows, rows * size + prompt_tokens) + offset
            rate = rows * self._expected[size - 1] / seconds
            if rate > best:
                best, tree = rate, self._tree(size)
        return tree

    def largest(self, size: int) -> Tree:
        """The best tree of at most `size` nodes, by the running estimate."""
        self._regrow()
        return self._tree(size)

    def expected_tokens(self, size: int) -> float:
        """Tokens that a row gains in a step with the best tree of this size, by the running estimate."""
        self._regrow()
        return self._expected[min(size, len(self._expected)) - 1]

    def observe(self, hits: list[list[int]], trials: list[int]) -> None:
        """Take in what a step showed of the heads; shapes as `StepResult`'s."""
        self.acceptance.observe(hits, trials)

    def observe_cost(self, rows: int, tree: Tree, seconds: float) -> None:
        """Take in the time of a step of `rows` decoding rows without prompt tokens.

        Longer contexts make a step dearer than it was at warm-up: what the rows' caches cost to read, and more with
        trees than without. So the difference is kept as two offsets per number of rows. The one that is not observed
        drifts to the other, so that what was given up is tried again.
        """
        if self.costs is None:
            return
        size = tree.num_nodes
        predicted = self.costs.tree_cost(rows, rows * size) if size > 1 else self.costs.plain_cost(rows)
        offsets = self._offsets.setdefault(rows, [0.0, 0.0])
        seen, other = (1, 0) if size > 1 else (0, 1)
        offsets[seen] += 0.05 * (min(seconds, 4 * predicted) - predicted - offsets[seen])
        offsets[seen] = max(0.0, offsets[seen])
        offsets[other] += 0.003 * (offsets[seen] - offsets[other])

    def _regrow(self) -> None:
        self._steps_until_regrow -= 1
        if self._steps_until_regrow > 0:
            return
        self._steps_until_regrow = REGROW_EVERY
        self._chosen.clear()
        self._grown, probabilities = grow(self.acceptance.table(), MAX_NODES)
        self._expected = list(accumulate(probabilities))

    def _tree(self, size: int) -> Tree:
        return Tree(self._grown.choices[:size])

"""What the planner has measured: what steps cost on this machine, and how often guesses hold."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate

REACHES = (8, 16, 32, 64)
"""Nodes that a row may bring at most: four times the average."""
PRIOR_TRIALS = 64.0
"""Weight of the prior acceptance, in observed tokens."""
WINDOW_TRIALS = 20_000.0
"""Older observations fade: the table remembers about this many tokens."""


@dataclass
class CostTable:
    """Seconds of a step by decoding rows and in-flight tokens, measured."""

    plain: dict[int, float] = field(default_factory=dict)
    """rows → seconds of a step of roots alone, without a drafter."""
    trees: dict[int, dict[int, float]] = field(default_factory=dict)
    """rows → in-flight tokens in all → seconds, what the drafter does once for all depths included."""
    passes: dict[int, float] = field(default_factory=dict)
    """rows → seconds of a pass of a drafter that runs some for each depth; 0 where it runs none."""

    def plain_cost(self, rows: int, extra_tokens: int = 0) -> float:
        """Without speculation, `extra_tokens` prompt tokens beside the rows."""
        base = interpolate(self.plain, rows)
        if extra_tokens == 0:
            return base
        # prompt tokens cost what a tree's nodes cost
        return base + self.tree_cost(rows, rows + extra_tokens) - self.tree_cost(rows, rows)

    def tree_cost(self, rows: int, num_inflight: int, passes: int = 0) -> float:
        """With speculation and so many passes; the nearest measured numbers of rows are interpolated."""
        return self._one_pass_cost(rows, num_inflight) + (passes * interpolate(self.passes, rows) if passes else 0.0)

    def _one_pass_cost(self, rows: int, num_inflight: int) -> float:
        keys = sorted(self.trees)
        at = bisect_left(keys, rows)
        if at < len(keys) and keys[at] == rows:
            return interpolate(self.trees[rows], num_inflight)
        if at == 0 or at == len(keys):
            return interpolate(self.trees[keys[min(at, len(keys) - 1)]], num_inflight)
        low, high = keys[at - 1], keys[at]
        share = (rows - low) / (high - low)
        below, above = (interpolate(self.trees[k], num_inflight) for k in (low, high))
        return below + share * (above - below)


def interpolate(points: dict[int, float], x: float) -> float:
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
        """Depths that have rates; 0 where there is no drafter."""
        return len(self._trials)

    def observe(self, hits: list[list[int]], trials: list[int]) -> None:
        """Take in what a step showed; shapes as `StepResult`'s."""
        for d, n in enumerate(trials):
            fade = 1.0 if self._trials[d] + n <= WINDOW_TRIALS else WINDOW_TRIALS / (self._trials[d] + n)
            self._trials[d] = (self._trials[d] + n) * fade
            self._hits[d] = [(old + new) * fade for old, new in zip(self._hits[d], hits[d], strict=True)]

    def table(self) -> list[list[float]]:
        """[depth][rank]: the rates now."""
        return [[h / n for h in ranks] for ranks, n in zip(self._hits, self._trials, strict=True)]


class ContextCosts:
    """What steps cost beyond the table: longer contexts make a step dearer than it was when costs were measured.

    What the rows' caches cost to read is added, and the more, the more nodes may look at them. So the difference is
    kept as an offset, in seconds, for each number of rows and of nodes that a row may bring.
    """

    def __init__(self) -> None:
        self._offsets: dict[int, dict[int, float]] = {}  # rows → nodes that each may bring → seconds
        self._observed: Counter[tuple[int, int]] = Counter()  # rows, nodes that each may bring → steps

    def observe(self, rows: int, reach: int, predicted: float, seconds: float) -> None:
        """Take in the time of a step that the table predicted otherwise.

        Those that are not observed drift to the one that is, so that what was given up is tried again. First
        observations count for more: a choice holds for many steps.
        """
        known = self.offset(rows, reach)
        seconds = min(seconds, 4 * (predicted + known))  # one slow step says little
        self._observed[rows, reach] += 1
        weight = max(0.05, 1 / (1 + self._observed[rows, reach]))
        now = max(0.0, known + weight * (seconds - predicted - known))
        offsets = {other: self.offset(rows, other) for other in (1, *REACHES)}
        drifted = {other: offset + 0.003 * (now - offset) for other, offset in offsets.items()}
        self._offsets[rows] = {**self._offsets.get(rows, {}), **drifted, reach: now}

    def offset(self, rows: int, reach: int) -> float:
        """Seconds; what is not observed costs what it does with the nearest number of rows, by the row.

        And no less than where rows may bring fewer nodes.
        """
        if rows not in self._offsets:
            if not self._offsets:
                return 0.0
            near = min(self._offsets, key=lambda known: abs(known - rows))
            return self.offset(near, reach) * rows / near
        known = self._offsets[rows]
        offset = known.get(reach, 0.0)
        if (rows, reach) in self._observed:
            return offset
        return max([offset, *(known[other] for other in known if other < reach and (rows, other) in self._observed)])

"""What the planner has measured: what steps cost on this machine, and how often guesses hold."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from math import log, pow, sqrt
from typing import NamedTuple

REACHES = (8, 16, 32, 64)
"""Nodes that a row may bring at most: four times the average."""
PRIOR_TRIALS = 64.0
"""Weight of the prior acceptance, in observed tokens."""
WINDOW_TRIALS = 20_000.0
"""Older observations fade: the table remembers about this many tokens."""

LEAST_RATE = 1e-9

MOST_SLOWER = 4.0
"""A step says at most that it takes so many times as long as was thought: other work may have disturbed it."""
PACE_WINDOW = 0.05
"""Share of a new step in the machine's pace."""
SETTLED_STEPS = 16
"""What a kind takes beside the others is known after so many steps; what changes then is the pace."""
FRESH_STEPS = 64
"""What was not seen for more steps is doubted: the next look at it counts for half."""
PAST_BELIEF = 2.0
"""Where one guess was so many times too high or too low, the others say little."""
HALVED_STEPS = 128
"""In so many steps, what was seen may have become half as dear."""
LEAST_SHARE = 0.25
"""Of what a step was measured to take, rows whose caches are shorter leave at least this share."""


@dataclass
class CostTable:
    """Seconds of a step by decoding rows and in-flight tokens, measured."""

    plain: dict[int, float] = field(default_factory=dict)
    """rows → seconds of a step of roots alone, without a drafter."""
    trees: dict[int, dict[int, float]] = field(default_factory=dict)
    """rows → in-flight tokens in all → seconds, what the drafter does once for all depths included."""
    passes: dict[int, float] = field(default_factory=dict)
    """rows → seconds of a pass of a drafter that runs some for each depth; 0 where it runs none."""
    prompts: dict[int, float] = field(default_factory=dict)
    """tokens of a prompt → seconds of a step that computes nothing else."""
    context: int = 0
    """Cached tokens that each row had in all of these,"""
    cached: float = 0.0
    """and seconds for each that a row has beyond, which a step reads."""

    def plain_cost(self, rows: int) -> float:
        """Without speculation."""
        return interpolate(self.plain, rows)

    def prompt_cost(self, num_inflight: int, num_tokens: int) -> float:
        """What `num_tokens` of prompts cost beside so many other tokens, in one pass with them: few are nearly free
        beside few, as the weights are read anyway; many cost what arithmetic takes."""
        if not self.prompts:
            return 0.0
        return interpolate(self.prompts, num_inflight + num_tokens) - interpolate(self.prompts, num_inflight)

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
        """[depth][rank]: the rates now. None is 0, so that the largest tree has as many nodes whatever was seen, and
        the steps that are recorded for it serve it for ever."""
        return [[max(h / n, LEAST_RATE) for h in ranks] for ranks, n in zip(self._hits, self._trials, strict=True)]


class Kind(NamedTuple):
    """What tells steps of as many rows apart."""

    nodes: float = 1
    """That a row brings, on average."""
    passes: int = 0
    """Of a drafter that runs some for each depth."""

    @property
    def is_plain(self) -> bool:
        """Whether rows bring their roots alone, and no drafter runs."""
        return self.nodes <= 1

    @property
    def reach(self) -> int:
        """Nodes that a row may bring at most."""
        return 1 if self.is_plain else next(size for size in REACHES if size >= min(4 * self.nodes, REACHES[-1]))

    def is_less_than(self, other: Kind) -> bool:
        """Whether it is less work, in no respect more."""
        return self != other and self.nodes <= other.nodes and self.passes <= other.passes

    def distance(self, other: Kind) -> float:
        """How unlike two kinds are."""
        return abs(log(self.nodes / other.nodes)) + abs(self.passes - other.passes)


PLAIN = Kind()


@dataclass
class _Seen:
    """What steps of a kind took, by so many rows: this many times what was guessed, at the machine's pace."""

    ratio: float
    count: int
    """Steps that say so."""
    step: int
    """When the last of them was, by number."""


class RunningCosts:
    """Seconds of a step, learnt from the steps themselves; what start-up measured is the first guess.

    A step takes the guess × the machine's pace × the ratio of its kind. The pace is what all kinds have in common:
    other work on the machine, its clock, the number of threads. It follows the steps that run, and what is known of
    other kinds keeps its proportion to them. The ratio is what a kind turned out to take beside the others: the guess
    was wrong, or nodes that look at long caches cost more than reading these. That is part of the guess, since it
    decides how many nodes pay: under load a row's cache takes as long to read as a few nodes take to compute.

    Where prompts are computed beside the rows, it takes that and what so many more tokens cost, times what such steps
    turned out to take.

    Args:
        guess: as measured at start.
        padded: what steps with trees round a number of rows up to; None rounds nothing.
        padded_pass: tokens of a pass over so many of prompts, and so many of so many rows' trees; None pads none.
    """

    def __init__(
        self,
        guess: CostTable,
        padded: Callable[[int], int] | None = None,
        padded_pass: Callable[[int, int, int], int] | None = None,
    ) -> None:
        self.guess = guess
        self.padded = padded or (lambda rows: rows)
        self.padded_pass = lru_cache(maxsize=4096)(padded_pass or (lambda prompts, trees, rows: prompts + trees))
        self.context: float = guess.context
        """Cached tokens of each row of the steps to come, on average."""
        self._pace = 1.0
        self._steps = 0
        self._seen: dict[int, dict[Kind, _Seen]] = {}  # by rows
        self._latest: dict[tuple[int, Kind], int] = {}  # rows' magnitude, kind → when a step was seen, by number
        self._guessed: dict[tuple[int, Kind], float] = {}
        self._prompt_cost = lru_cache(maxsize=4096)(guess.prompt_cost)
        self._mixed: dict[int, _Seen] = {}  # magnitude of prompt tokens → what steps with so many take
        self._mixed_latest = 0  # the one that was seen last
        # a step is chosen by dozens of costs: what is looked up for each is kept in order, and what was found until
        # something new is seen
        self._rows_seen: tuple[list[int], list[int]] = ([], [])  # in order, with trees and of roots alone
        self._ratios: dict[tuple[int, Kind], float] = {}

    def seconds(self, rows: int, kind: Kind, prompt_tokens: int = 0) -> float:
        """What a step is thought to take, with so many tokens of prompts beside its rows."""
        seconds = self._at_pace(rows, kind) * self._ratio(rows, kind)
        if prompt_tokens == 0:
            return seconds
        padded = rows if kind.is_plain else self.padded(rows)
        tokens = int(kind.nodes * padded)
        added = self._prompt_cost(tokens, self.padded_pass(prompt_tokens, tokens, padded) - tokens)
        return (seconds + added * self._pace) * self._mixed_ratio(prompt_tokens)

    def least(self, rows: int, kind: Kind) -> float:
        """What a step may take at the least, after all that was seen.

        It takes no less than less work does. That alone holds of a kind that was never seen, if the guess is past
        belief: it says that so many times the nodes take even more times as long, or it was far off elsewhere. A guess
        that may well be true is doubted by half. What was seen is believed the less the longer ago that is.
        """
        seconds = self.seconds(rows, kind)
        known = self._seen.get(rows, {})
        kinds = [other for other in known if other.is_less_than(kind)]
        if not kind.is_plain and PLAIN not in kinds and self.age(rows, PLAIN) is not None:
            kinds.append(PLAIN)
        taken = {other: self.seconds(rows, other) for other in kinds}
        bound = min(seconds, max(taken.values(), default=0.0))
        age = self.age(rows, kind)
        if age is not None:
            return max(bound, seconds * pow(0.5, age / HALVED_STEPS))
        past_belief = any(seconds * other.nodes > taken[other] * kind.nodes for other in kinds)
        past_belief |= any(not 1 / PAST_BELIEF < seen.ratio < PAST_BELIEF for seen in known.values())
        return bound if past_belief else sqrt(bound * seconds)

    def age(self, rows: int, kind: Kind) -> int | None:
        """Steps since one of this kind was seen, by about as many rows; None if none was."""
        latest = self._latest.get((rows.bit_length(), kind))
        return None if latest is None else self._steps - latest

    def observe(self, rows: int, kind: Kind, seconds: float) -> float:
        """Take in the time of a step without prompt tokens.

        Returns:
            how many times as dear its kind is thought to be now, beside the others.
        """
        self._steps += 1
        times = min(seconds / self.seconds(rows, kind), MOST_SLOWER)
        known = self._seen.get(rows, {})
        seen = known.get(kind) or _Seen(self._ratio(rows, kind), 0, self._steps)
        if self._steps - seen.step > FRESH_STEPS:
            seen.count = min(seen.count, 1)
        weight = 1 / (1 + seen.count) if seen.count < SETTLED_STEPS else 0.0
        seen.ratio *= 1 + weight * (times - 1)
        self._pace *= 1 + PACE_WINDOW * (1 - weight) * (times - 1)
        # what is past belief does not count, so that the next step can take it back, or confirm it
        seen.count += times < MOST_SLOWER
        seen.step = self._latest[rows.bit_length(), kind] = self._steps
        if kind not in known:
            of_kind = self._rows_seen[kind.is_plain]
            if rows not in of_kind:
                insort(of_kind, rows)
            self._seen.setdefault(rows, {})[kind] = seen
        if weight:
            self._ratios.clear()
        return 1 + weight * (times - 1)

    def observe_mixed(self, rows: int, kind: Kind, prompt_tokens: int, seconds: float) -> None:
        """Take in the time of a step with prompt tokens. The pace is left to steps without."""
        self._steps += 1
        ratio = self._mixed_ratio(prompt_tokens)
        times = min(seconds / self.seconds(rows, kind, prompt_tokens), MOST_SLOWER)
        size = prompt_tokens.bit_length()
        seen = self._mixed.setdefault(size, _Seen(ratio, 0, self._steps))
        if self._steps - seen.step > FRESH_STEPS:
            seen.count = min(seen.count, 1)
        seen.ratio = ratio * (1 + max(PACE_WINDOW, 1 / (1 + seen.count)) * (times - 1))
        seen.count += times < MOST_SLOWER
        seen.step, self._mixed_latest = self._steps, size

    def _mixed_ratio(self, prompt_tokens: int) -> float:
        """Of steps with about so many tokens of prompts; of those that were never seen, what the nearest ones took.

        One that seemed dear is not chosen again, so that is believed the less the longer ago it was: what was not seen
        for FRESH_STEPS loses half of what it is dearer than the latest that was seen in every HALVED_STEPS.
        """
        size = prompt_tokens.bit_length()
        if size not in self._mixed:
            size = min(self._mixed, key=lambda other: abs(other - size), default=size)
        if size not in self._mixed:
            return 1.0
        seen, latest = self._mixed[size], self._mixed[self._mixed_latest]
        age, dearer = latest.step - seen.step - FRESH_STEPS, seen.ratio - latest.ratio
        if age <= 0 or dearer <= 0:
            return seen.ratio
        return latest.ratio + dearer * pow(0.5, age / HALVED_STEPS)

    def _at_pace(self, rows: int, kind: Kind) -> float:
        """What was measured at start, at the pace of now."""
        if (rows, kind) not in self._guessed:
            padded = self.padded(rows)
            plain, nodes = kind.is_plain, int(kind.nodes * padded)
            guess = self.guess.plain_cost(rows) if plain else self.guess.tree_cost(padded, nodes, kind.passes)
            self._guessed[rows, kind] = guess
        guess = self._guessed[rows, kind]
        longer = rows * (self.context - self.guess.context) * self.guess.cached
        return max(guess + longer, LEAST_SHARE * guess) * self._pace

    def _ratio(self, rows: int, kind: Kind) -> float:
        """Of a kind: its own, else what those that were seen make likely."""
        if (rows, kind) not in self._ratios:
            known = self._seen.get(rows, {})
            if kind in known:
                return known[kind].ratio
            nearest = self._nearest(rows, kind.is_plain)
            found = self._ratio(nearest, kind) if nearest != rows else self._likely(rows, kind, known)
            self._ratios[rows, kind] = found
        return self._ratios[rows, kind]

    def _nearest(self, rows: int, plain: bool) -> int:
        """Of the numbers of rows that a kind alike was seen of, else any kind, the one that is most like so many."""
        seen = self._rows_seen[plain] or self._rows_seen[not plain]
        at = bisect_left(seen, rows)
        return min(seen[max(0, at - 1) : at + 1], key=lambda other: abs(log(other / rows)), default=rows)

    def _likely(self, rows: int, kind: Kind, known: dict[Kind, _Seen]) -> float:
        """The ratio of a kind that was not seen, by those that were by as many rows."""
        guess = likely = self._at_pace(rows, kind)
        seconds = {other: self._at_pace(rows, other) * seen.ratio for other, seen in known.items()}
        share = 1.0  # of what was guessed, for more work
        trees = [other for other in known if not other.is_plain and not kind.is_plain]
        if trees:
            near = min(trees, key=kind.distance)
            if known[near].ratio <= 1:  # the guess was too dear, for all trees
                share = known[near].ratio
                likely = guess * share
            elif near.reach == kind.reach:  # the rows' caches take longer to read, for as many nodes
                likely = guess + seconds[near] - self._at_pace(rows, near)
        less = [other for other in known if other.is_less_than(kind)]
        if less:  # more work takes no less, and as much longer as was guessed
            near = min(less, key=kind.distance)
            added = (guess - self._at_pace(rows, near)) * min(share, known[near].ratio)
            likely = max(likely, seconds[near] + added, *(seconds[other] for other in less))
        return min([likely, *(seconds[other] for other in known if kind.is_less_than(other))]) / guess

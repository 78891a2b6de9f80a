"""The tree planner: speculation that never loses.

It holds the cost of a step by rows and nodes and the acceptance of a drafter's candidates, both measured as the engine
runs, and takes the tree with the most expected tokens per second. Now and then it tries what it would not take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from manyheads.batch import MAX_NODES
from manyheads.speculation.costs import REACHES, Acceptance, CostTable, Kind, RunningCosts
from manyheads.speculation.draft import NO_DRAFT, SIZES, Draft, deepest
from manyheads.speculation.gains import TINY, Gains, size_at
from manyheads.speculation.tree import ROOT, Choice, Tree, grow
from manyheads.speculation.trials import Trials

MAX_INFLIGHT = 256
"""A step of more in-flight tokens is not considered, unless it has many rows (`most_inflight`): on every machine known,
arithmetic has long begun to count."""

MIN_GAIN = 1.15
"""Speculation must promise this much more than plain decoding: the best of many estimates is an overestimate, and a
change to trees costs a step whose proposals come too late."""
REGROW_EVERY = 32
"""Steps between two looks at the tree's shape, and between two looks at what could be tried,"""
REVIEW_SOON, NEWS = 4, 0.05
"""but only so many if costs turned out to be other ones, by such a share at least."""

SUREST = 1.1
"""Times as much as where all rows have the same tree is gained where a step's nodes go to the rows whose guesses are
surest: 1.09 to 1.12 times at 32 to 128 rows (benchmarks/results/gpu)."""


def most_inflight(rows: int) -> int:
    """In-flight tokens that so many rows may bring together: four each where there are many, as long as reading a row's
    cache takes as long as computing a few sure guesses."""
    return max(MAX_INFLIGHT, 4 * rows)


class Planner:
    """Chooses the tree of a step.

    Args:
        prior: [depth][rank] acceptance to start from; empty where the model has no drafter.
        tree_size: this many nodes always, whatever the load; None to choose.
        min_gain: see MIN_GAIN; where step times hardly vary, less will do.
        passes_per_depth, prior_holds, offered, scratch: as the drafter's.
    """

    def __init__(
        self,
        prior: list[list[float]],
        tree_size: int | None = None,
        min_gain: float = MIN_GAIN,
        passes_per_depth: int = 0,
        prior_holds: bool = False,
        offered: frozenset[Choice] | None = None,
        scratch: int = 0,
    ) -> None:
        self.acceptance = Acceptance(prior)
        self.min_gain, self.tree_size, self.passes_per_depth = min_gain, tree_size, passes_per_depth
        self._offered, self.scratch = offered, scratch
        self.costs: RunningCosts | None = None
        """Without it, and without `tree_size`, nothing is drafted."""
        self._trials: Trials | None = None
        self._until_review = REGROW_EVERY
        self._grown = ROOT
        self._probabilities: list[float] = []
        self._expected: list[float] = []
        self._steps_until_regrow = 0
        self._chosen: dict[tuple[int, int, int | None], Draft] = {}
        self._drafts: dict[tuple[float, int | None], Draft] = {}  # that can be made of the tree that was grown,
        self._lists: dict[int, list[Draft]] = {}  # those of so many rows,
        self._shares: dict[Kind, float] = {}  # and `_share` of those that there are
        self._brought: int | None = None  # nodes that each could bring in the step before
        hoped: list[float] = []
        if prior:
            self._regrow()
            hoped = [SUREST * self._promise(size) for size in SIZES]
        self._gains = Gains(hoped, prior_holds)

    def measured(
        self,
        costs: CostTable,
        padded: Callable[[int], int] | None = None,
        padded_pass: Callable[[int, int, int], int] | None = None,
    ) -> None:
        """Choose by these costs from now on, the first guess, and by what steps turn out to take.

        Args:
            padded, padded_pass: as `RunningCosts`'s.
        """
        self.costs = RunningCosts(costs, padded, padded_pass)
        self._trials = Trials(self.costs)
        self._chosen.clear()

    @property
    def chooses(self) -> bool:
        """Whether there is anything to choose."""
        return self.tree_size is None and self.acceptance.num_depths > 0

    def rows_are(self, adapters: Sequence[int], num_cached: int) -> None:
        """The decoding rows of the next steps have these adapters (`Request.adapter`), and look at so many cached
        tokens in all."""
        self._gains.rows_are(adapters)
        if adapters and self.costs is not None:
            self.costs.context = num_cached / len(adapters)

    def choose(self, rows: int, prompt_tokens: int = 0) -> Draft:
        """What `rows` decoding rows are to bring beside `prompt_tokens` of prompts; NO_DRAFT when nothing pays.

        A choice holds until the next look at the tree's shape or at costs, but for steps that try something else.
        """
        self._regrow()
        if prompt_tokens == 0 and (trial := self._trial(rows)) is not None:
            return trial
        return self.best(rows, prompt_tokens)

    def best(self, rows: int, prompt_tokens: int = 0) -> Draft:
        """What pays best, by what is known."""
        if not self.acceptance.num_depths:
            return NO_DRAFT
        if self.tree_size is not None:
            return self.draft(self.tree_size)
        if self.costs is None:
            return NO_DRAFT
        load = (rows, 0, self._gains.level)
        if prompt_tokens:  # no two such steps are alike, but they are rounded up to some that are
            load = (self.costs.padded(rows), self.costs.padded_pass(prompt_tokens, 0, 0), self._gains.level)
        if load not in self._chosen:
            self._chosen[load] = self._best(rows, prompt_tokens)
        return self._chosen[load]

    def _best(self, rows: int, prompt_tokens: int) -> Draft:
        """The draft that gives most tokens beyond what its time is worth: what the rows gain in as long a time without
        prompts, which have to be computed anyway. Where there are none, that is the draft with the best rate."""
        costs = self.costs
        assert costs is not None
        worth = self._worth(rows)
        rate = max(gained / costs.seconds(rows, draft.kind) for draft, gained in worth)
        return max(worth, key=lambda of: of[1] - rate * costs.seconds(rows, of[0].kind, prompt_tokens))[0]

    def _worth(self, rows: int) -> list[tuple[Draft, float]]:
        """Tokens that each row gains with each draft that there is, those of trees as far as they are counted on."""
        assert self.costs is not None
        drafts = self.drafts(self.costs.padded(rows))
        return [(NO_DRAFT, 1.0), *((draft, self.expected_tokens(draft, rows) / self.min_gain) for draft in drafts)]

    def _trial(self, rows: int) -> Draft | None:
        """What is being tried, if so many rows can."""
        if self._trials is None or self.costs is None or (kind := self._trials.kind) is None:
            return None
        if kind.is_plain:
            return NO_DRAFT
        return next((draft for draft in self.drafts(self.costs.padded(rows)) if draft.kind == kind), None)

    def drafts(self, rows: int) -> list[Draft]:
        """What so many rows may bring beside their roots, each more than the one before; of each size every depth,
        where that costs passes."""
        if rows not in self._lists:
            self._lists[rows] = self._all_drafts(rows)
        return self._lists[rows]

    def _all_drafts(self, rows: int) -> list[Draft]:
        if self.tree_size is not None:
            return [draft for draft in [self.draft(self.tree_size)] if draft.propose]
        most = most_inflight(rows)
        sizes = [size for size in SIZES if size <= self._grown.num_nodes and rows < int(rows * size) <= most]
        by_tokens = {int(rows * size): size for size in sizes}
        if not self.passes_per_depth:
            return [self.draft(size) for size in by_tokens.values()]
        depths = {size: min(self._grown.max_depth, deepest(size)) for size in by_tokens.values()}
        drafts = (self.draft(size, depth) for size, deep in depths.items() for depth in range(1, deep + 1))
        return list(dict.fromkeys(draft for draft in drafts if draft.propose))

    def draft(self, nodes: float, depth: int | None = None) -> Draft:
        """Rows of `nodes` nodes on average, out of the four times as many that are best by the running estimate; no
        deeper than `depth`."""
        if nodes <= 1:
            return NO_DRAFT
        if (nodes, depth) not in self._drafts:
            choices = self._grown.choices
            if depth is not None:
                choices = tuple(choice for choice in choices if len(choice) <= depth)
            tree = Tree(choices[: Kind(nodes).reach])
            passes = self.passes_per_depth * tree.max_depth
            self._drafts[nodes, depth] = Draft(tree, min(nodes, tree.num_nodes), passes, self.scratch)
        return self._drafts[nodes, depth]

    def smaller(self, draft: Draft) -> Draft:
        """What needs fewer pages."""
        reach = max((size for size in REACHES if size < draft.tree.num_nodes), default=1)
        return self.draft(reach / 4) if reach > 4 else NO_DRAFT

    def expected_tokens(self, draft: Draft, rows: int = 1) -> float:
        """Tokens that each of so many rows gains in a step with a draft."""
        gain = self._gains.promised(draft.nodes)
        if gain is None:  # no step yet
            gain = (SUREST if rows >= 16 else 1.0) * self._promise(draft.nodes)
        return 1.0 + gain * self._share(draft)

    def _promise(self, nodes: float) -> float:
        """Tokens beside its own that a row gains if all rows have the same tree of so many nodes, of any depth."""
        known, part = divmod(min(nodes, len(self._expected)), 1)
        at = int(known) - 1
        return self._expected[at] + (part and part * (self._expected[at + 1] - self._expected[at])) - 1

    def _share(self, draft: Draft) -> float:
        """Of what so many nodes promise at any depth, the share that they do at the draft's."""
        if not draft.passes:
            return 1.0
        if draft.kind not in self._shares:
            depth, count = draft.tree.max_depth, max(2, round(draft.nodes))
            by_depth = zip(self._grown.choices[1:], self._probabilities[1:], strict=True)
            shallow = [p for choice, p in by_depth if len(choice) <= depth]
            self._shares[draft.kind] = sum(shallow[: count - 1]) / max(sum(self._probabilities[1:count]), TINY)
        return self._shares[draft.kind]

    def observe(self, hits: list[list[int]], trials: list[int]) -> None:
        """Take in what a step showed of the candidates; shapes as `StepResult`'s."""
        self.acceptance.observe(hits, trials)

    def observe_gains(
        self, draft: Draft, expected: list[float], gained: list[int], adapters: Sequence[int] = ()
    ) -> None:
        """Take in what the drafter expected of a step, and what came of it.

        Args:
            draft: what the step's rows brought.
            expected: as `StepResult.gains`.
            gained: tokens beside its own of each decoding row.
            adapters: of each row; none are the base's.
        """
        share = self._share(draft)
        if draft.passes:
            # it guessed what was asked for and no more: of that it says how sure it is, and of other sizes nothing
            at = size_at(draft.nodes)
            sure = expected[at] / max(self._promise(SIZES[at]), TINY)
            expected = [sure * self._promise(size) for size in SIZES]
        self._gains.observe(draft.nodes, share, expected, gained, adapters)

    def observe_plain(self) -> None:
        """Take in a step without trees."""
        self._gains.observe_plain()

    def observe_cost(self, rows: int, draft: Draft, seconds: float, prompt_tokens: int = 0) -> None:
        """Take in the time of a step of `rows` decoding rows, and of so many tokens of prompts beside them.

        A step that brings another tree than the one before says nothing, as it also waits for the change.
        """
        if self.costs is None or self._trials is None or rows == 0:
            return
        reach = draft.tree.num_nodes
        changed, self._brought = self._brought not in (None, reach), reach
        if prompt_tokens:
            if not changed:
                self.costs.observe_mixed(rows, draft.kind, prompt_tokens, seconds)
            return
        told = None
        if not changed:
            told = seconds / self.costs.seconds(rows, draft.kind)
            dearer = self.costs.observe(rows, draft.kind, seconds)
            if not self.chooses:
                return
            if abs(dearer - 1) > NEWS:
                self._until_review = min(self._until_review, REVIEW_SOON)
        if self._trials.observe(seconds, told if draft.kind == self._trials.kind else None):
            self._until_review = REVIEW_SOON
            self._chosen.clear()
        if self._trials.kind is None:
            self._until_review -= 1
        if self._until_review == 0:
            self._review(rows)

    def _review(self, rows: int) -> None:
        """Look at what costs turned out to be, and whether anything is to be tried."""
        assert self._trials is not None
        self._chosen.clear()
        self._trials.begin(rows, {draft.kind: worth for draft, worth in self._worth(rows)})
        self._until_review = REGROW_EVERY

    def _regrow(self) -> None:
        self._steps_until_regrow -= 1
        if self._steps_until_regrow > 0:
            return
        self._steps_until_regrow = REGROW_EVERY
        for made in (self._chosen, self._drafts, self._lists, self._shares):
            made.clear()
        self._grown, self._probabilities = grow(self.acceptance.table(), MAX_NODES, self._offered)
        self._expected = list(accumulate(self._probabilities))

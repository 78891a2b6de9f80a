"""What stands between a drafter's passes, against plain Python."""

from __future__ import annotations

import pytest

from manyheads.batch import OpenNodes
from manyheads.ops.torch import TorchOps
from manyheads.speculation.tree import Choice
from tests.guesses import Passes

OPS = TorchOps()
Node = tuple[int, Choice]


class Plain:
    """Rows' guesses by node: a row and a choice."""

    def __init__(self, passes: Passes) -> None:
        self.passes, self.state, self.children = passes, passes.state, passes.template.children
        self.rows = passes.index.tolist()
        self.features: list[Node] = [(row, ()) for row in range(len(self.rows))]
        """Whose they are, in order: roots, then what was opened."""
        self.tokens: dict[Node, int] = {}
        self.chances: dict[Node, float] = {}
        self.worth = {root: float(self.state.speculative[self.rows[root[0]]]) for root in self.features}

    def offer(self, nodes: list[Node], tokens: list[list[int]], chances: list[list[float]]) -> None:
        for (row, choice), guessed, sure in zip(nodes, tokens, chances, strict=True):
            for rank in range(len(self.children[choice])):
                child, token = (row, (*choice, rank)), guessed[rank]
                self.tokens[child] = token if self.passes.token_map is None else int(self.passes.token_map[token])
                self.chances[child] = sure[rank]
                # what filled a pass up is worth nothing
                self.worth[child] = sure[rank] * self.worth.get((row, choice), 0.0)

    def open(self, depth: int, count: int) -> list[Node]:
        level = sorted(choice for choice in self.children if len(choice) == depth)
        every = [(row, choice) for row in range(len(self.rows)) for choice in level]
        new = sorted(sorted(every, key=lambda node: -self.worth.get(node, 0.0))[:count])
        self.features += new
        return new

    def check(self, found: OpenNodes, new: list[Node]) -> None:
        """What a pass is told of all opened nodes."""
        opened = self.features[len(self.rows) :]
        flat = [node for row in range(len(self.rows)) for node in opened if node[0] == row]
        assert found.row_start.tolist() == [sum(r < row for r, _ in flat) for row in range(len(self.rows) + 1)]
        assert [flat[at] for at in found.new_at.tolist()] == new
        assert found.new_row.tolist() == [row for row, _ in new]
        for at, (row, choice) in enumerate(flat):
            mine = [other for r, other in opened if r == row]
            cached, size = int(self.state.cached_len[self.rows[row]]), self.state.page_size
            assert found.tokens[at] == self.tokens.get((row, choice), 0)
            assert found.position[at] == cached + len(choice) - 1
            page, inside = divmod(cached + mine.index(choice), size)
            assert found.slots[at] == self.state.page_table[self.rows[row], page] * size + inside
            if (row, choice) in self.tokens:  # else it fills the pass up, and what it says means nothing
                above = [place for place, other in enumerate(mine) if choice[: len(other)] == other]
                assert found.bits[at] == sum(1 << place for place in above)
                assert found.source[at] == self.features.index((row, choice[:-1]))


@pytest.mark.parametrize("seed", range(24))
def test_passes(seed: int) -> None:
    passes = Passes(num_rows=1 + seed % 6, padding=seed % 3, seed=seed, levels=(0, 2, 3, 5)[seed % 4])
    plain, template = Plain(passes), passes.template
    levels = passes.levels("cpu")
    guesses = OPS.begin_guesses(passes.state, passes.index, template.num_candidates, template.num_inner)
    nodes, new = None, list(plain.features)
    for level, count in zip(levels, [*passes.counts, 0], strict=True):
        tokens, chances = passes.children(level, len(new))
        OPS.offer_children(guesses, level, nodes, tokens, chances, passes.token_map)
        plain.offer(new, tokens.tolist(), chances.tolist())
        if count:
            nodes, new = OPS.open_nodes(guesses, levels[level.depth + 1], count), plain.open(level.depth + 1, count)
            plain.check(nodes, new)
    for row in range(len(passes.index)):
        every = [(row, choice) for choice in template.choices]
        assert guesses.tokens[row, 1:-1].tolist() == [plain.tokens.get(node, 0) for node in every]
        assert guesses.chances[row, 1:-1].tolist() == [plain.chances.get(node, 0.0) for node in every]
